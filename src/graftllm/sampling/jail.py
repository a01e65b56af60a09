"""The inside of the sandbox: a script that shuts itself in, runs one program and leaves.

Run by path (`python -I -S jail.py SETTINGS`), with the standard library alone. It makes its own user,
mount, network, process and IPC namespaces, a root that holds the Python installation (read-only), an
empty working directory (a tmpfs) and nothing else, sets limits, gives up every capability and the
system calls that reach past all this, and only then starts another interpreter. As root it becomes a
user that owns nothing instead of needing a user namespace. The program comes on standard input; what it
ends with goes to file descriptor 3.

Linux 5.14 or newer: `mount_setattr`, and process limits that count per user namespace; on the machines of
`_MACHINES`, whose system calls are known here.
"""

import ctypes
import errno
import json
import os
import platform
import resource
import signal
import struct
import sys

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = (
    0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4
_AT_FDCWD, _AT_RECURSIVE, _MNT_DETACH = -100, 0x8000, 2
_SYS_MOUNT_SETATTR = 442  # on every architecture
# pivot_root, socket, and what is refused: memory that RLIMIT_AS does not count (shmget, msgget, semget, memfd_create,
# memfd_secret, and mount and fsopen in a user namespace of one's own), the keyrings of the parent (add_key,
# request_key, keyctl), and io_uring_setup, whose rings open sockets past the filter.
_ON_X86_64 = (155, 41, (29, 68, 64, 319, 447, 165, 430, 248, 249, 250, 425))
_ON_OTHERS = (41, 198, (194, 186, 190, 279, 447, 40, 430, 217, 218, 219, 425))
_MACHINES = {  # and AUDIT_ARCH of linux/audit.h
    "x86_64": (0xC000003E, *_ON_X86_64),
    "aarch64": (0xC00000B7, *_ON_OTHERS),
    "riscv64": (0xC00000F3, *_ON_OTHERS),
    "loongarch64": (0xC0000102, *_ON_OTHERS),
}
_X32 = 0x40000000  # set in the numbers of another table of x86_64
_FAMILIES = 1, 2, 10  # AF_UNIX, AF_INET, AF_INET6: the others reach past network namespaces, as AF_VSOCK does
# struct sock_filter {u16 code; u8 if_so, if_not; u32 k}: how many instructions are skipped then
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_CALL_AT, _ARCH_AT, _ARGUMENT_AT = 0, 4, 16  # in struct seccomp_data; the low half, all machines being little-endian
_KILL, _REFUSE, _ALLOW = 0x80000000, 0x00050000 | errno.EPERM, 0x7FFF0000
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_SECUREBITS, _PR_SET_NO_NEW_PRIVS = 1, 4, 24, 28, 38
_NO_ROOT_LOCKED = 0x2F  # user 0 gains no capability by exec, and none of this can be undone
_CANNOT = 125  # exit status: the platform cannot isolate

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Shut this process in, run the program, and exit as it did (or with 125 where that is not possible)."""
    settings = json.loads(sys.argv[1])
    os.dup2(settings["verdict"], 3)
    os.closerange(4, 1 << 16)
    if settings["isolate"]:
        try:
            _shut_in(settings)
        except (OSError, KeyError, AttributeError) as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(_CANNOT)
    else:
        _limit(settings)
        _become_interpreter(settings)
    init = os.fork()  # the first process of the new PID namespace; when it goes, all its descendants go
    if init:
        _, status = os.waitpid(init, 0)
        os._exit(_seen(status))
    _checked(libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
    _drop_privileges()
    _limit(settings)
    _refuse_calls()
    program = os.fork()
    if not program:
        _become_interpreter(settings)
    while True:
        ended, status = os.wait()
        if ended == program:
            os._exit(_seen(status))


def _seen(status: int) -> int:
    """Return the exit status of a program; 125 is this process's own to say."""
    code = os.waitstatus_to_exitcode(status) & 0xFF
    return _CANNOT - 1 if code == _CANNOT else code


def _shut_in(settings: dict) -> None:
    """Enter new namespaces and a new root."""
    user, group = os.geteuid(), os.getegid()
    spaces = _NEWNS | _NEWNET | _NEWPID | _NEWIPC | _NEWUTS
    _checked(libc.unshare(spaces if user == 0 else spaces | _NEWUSER), "unshare")
    if user != 0:
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{user} {user} 1")
        _write("/proc/self/gid_map", f"{group} {group} 1")
    pivot_root = _MACHINES[platform.machine()][1]
    root = settings["root"]  # an empty directory; the tmpfs on it is seen in here only
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={settings['disk_mb']}m,nr_inodes=4096,mode=755")
    for path in settings["visible"]:
        _show(path, root + path)
    for device in ("null", "urandom"):
        _show(f"/dev/{device}", f"{root}/dev/{device}", read_only=False)
    os.mkdir(f"{root}/work")
    os.chmod(f"{root}/work", 0o777)
    os.chdir(root)
    _checked(libc.syscall(pivot_root, b".", b"."), "pivot_root")
    _checked(libc.umount2(b".", _MNT_DETACH), "umount2")
    os.chdir("/work")


def _show(path: str, place: str, *, read_only: bool = True) -> None:
    """Make what is at `path` visible at `place`: a symlink as such, all else as a read-only mount."""
    os.makedirs(os.path.dirname(place), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), place)
        return
    if os.path.isdir(path):
        os.makedirs(place, exist_ok=True)
    else:
        os.close(os.open(place, os.O_CREAT, 0o644))
    _mount(path, place, None, _MS_BIND | _MS_REC)
    if read_only:
        # struct mount_attr: attr_set, attr_clr, propagation, userns_fd
        attributes = (ctypes.c_uint64 * 4)(_ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV, 0, 0, 0)
        place_bytes = ctypes.c_char_p(place.encode())
        size = ctypes.c_size_t(ctypes.sizeof(attributes))
        done = libc.syscall(_SYS_MOUNT_SETATTR, _AT_FDCWD, place_bytes, _AT_RECURSIVE, attributes, size)
        _checked(done, "mount_setattr")


def _drop_privileges() -> None:
    """Become a user that owns nothing (when root) and give up every capability for good."""
    for capability in range(64):
        if libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) < 0:
            break  # the first that this kernel does not know
    _checked(libc.prctl(_PR_SET_SECUREBITS, _NO_ROOT_LOCKED, 0, 0, 0), "prctl")
    if os.geteuid() == 0:
        nobody = 61184 + os.getppid() % 4000 if os.getppid() else 61184 + os.getpgrp() % 4000
        os.setgroups([])
        os.setresgid(nobody, nobody, nobody)
        os.setresuid(nobody, nobody, nobody)
        _checked(libc.unshare(_NEWUSER), "unshare")  # where its processes are counted apart
    _checked(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    _checked(libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")  # a new user clears it
    _checked(libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl")


def _limit(settings: dict) -> None:
    """Set what a process may use: CPU seconds, memory, file sizes, open files, and processes of its namespace."""
    memory, disk = settings["memory_mb"] << 20, settings["disk_mb"] << 20
    seconds = max(1, round(settings["timeout_s"]))
    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: disk,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    if settings["isolate"]:
        limits[resource.RLIMIT_NPROC] = settings["processes"] + 1  # and the one that waits for them
    for kind, value in limits.items():
        resource.setrlimit(kind, (value, value))


def _refuse_calls() -> None:
    """Let system calls past namespaces and limits fail with EPERM, for good and for all children (seccomp)."""
    architecture, _, socket, refused = _MACHINES[platform.machine()]
    refuse, allow = (_RETURN, 0, 0, _REFUSE), (_RETURN, 0, 0, _ALLOW)
    steps = [(_LOAD, 0, 0, _ARCH_AT), (_IF_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL)]
    steps += [(_LOAD, 0, 0, _CALL_AT), (_IF_AT_LEAST, 0, 1, _X32), refuse]
    for number in refused:
        steps += [(_IF_EQUAL, 0, 1, number), refuse]
    steps += [(_IF_EQUAL, 1, 0, socket), allow, (_LOAD, 0, 0, _ARGUMENT_AT)]
    for family in _FAMILIES:
        steps += [(_IF_EQUAL, 0, 1, family), allow]
    steps.append(refuse)
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = struct.pack("HP", len(steps), ctypes.addressof(code))  # struct sock_fprog
    _checked(libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program, 0, 0), "prctl")


def _become_interpreter(settings: dict) -> None:
    environment = {"PATH": "/usr/bin:/bin", "HOME": os.getcwd(), "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
    python = settings["python"]
    os.execve(python, [python, "-I", "-S", "-B", "-c", settings["driver"]], environment)


def _mount(source: str | None, place: str, kind: str | None, flags: int, data: str | None = None) -> None:
    given = [text.encode() if text is not None else None for text in (source, place, kind, data)]
    _checked(libc.mount(given[0], given[1], given[2], ctypes.c_ulong(flags), given[3]), f"mount {place}")


def _checked(result: int, call: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


if __name__ == "__main__":
    main()
