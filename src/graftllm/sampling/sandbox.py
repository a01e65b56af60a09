"""Programs of strangers, run where they can do no harm: no network, no files, few resources, little time.

`jail` is what happens inside. Where the platform cannot isolate (anything but Linux, containers that
forbid namespaces), nothing runs unless it is told to; then only limits, an empty directory and the
wall clock are left. What is measured is whether the tests passed: a program that sets out to forge the
verdict of its own interpreter is not defended against.
"""

import functools
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftllm.errors import SamplingError
from graftllm.transfer_options import CodeJudge

_JAIL = Path(__file__).with_name("jail.py")
_GRACE_S = 5.0  # for starting two interpreters on a busy machine, beside the program's own time
_SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/libx32", "/bin", "/sbin", "/nix/store", "/etc/ld.so.cache")
# The token says that the tests were reached and passed: a program that exits early has not passed.
_DRIVER = """
import json, os, sys
given = json.loads(sys.stdin.buffer.read())
out, null = os.fdopen(3, "w"), os.open(os.devnull, os.O_RDWR)
for descriptor in (0, 1, 2):
    os.dup2(null, descriptor)
del null, descriptor
space = {"__name__": "__main__"}
try:
    exec(compile(given["program"], "program", "exec"), space)
    for test in given["tests"]:
        exec(compile(test, "test", "exec"), space)
except BaseException as error:
    out.write(f"{type(error).__name__}: {error}"[:300])
else:
    out.write(given["token"])
out.flush()
os._exit(0)
"""


@dataclass(frozen=True)
class Verdict:
    """Whether a program passed its tests, and if not, why."""

    passed: bool
    problem: str = ""


def run_tests(program: str, tests: tuple[str, ...], limits: CodeJudge) -> Verdict:
    """Run a Python program and then its tests in one namespace, in a process of its own.

    Args:
        program: source text.
        tests: statements such as `assert f(2) == 4`; each must end without an exception.
        limits: of time, memory, processes and files.

    Raises:
        SamplingError: the platform cannot isolate, and `limits.allow_unsandboxed` is not set.
    """
    problem = isolation_problem()
    if problem and not limits.allow_unsandboxed:
        raise SamplingError(
            f"judge 'code': programs cannot be isolated here ({problem}), so none was run. Use Linux 5.14 or newer "
            "with user namespaces, or a machine that may be harmed and allow_unsandboxed: true."
        )
    return _run(program, tests, limits, isolate=not problem)


@functools.cache
def isolation_problem() -> str:
    """Return why programs cannot be isolated here, or nothing; found out by trying, once."""
    if sys.platform != "linux":
        return f"namespaces are Linux's, this is {sys.platform}"
    try:
        tried = _run("", (_ALONE,), CodeJudge(kind="code"), isolate=True)
    except SamplingError as error:
        return str(error)
    return "" if tried.passed else f"a trial ended with {tried.problem}"


_ALONE = f"""
import os, socket
assert sorted(os.listdir(".")) == [] and not os.path.exists({str(Path.home())!r} + "/.bashrc")
assert not os.path.exists("/proc/1") and not os.path.exists("/etc/passwd")
try:
    socket.create_connection(("127.0.0.1", 9), timeout=1)
except OSError as error:
    assert error.errno == 101, error
"""


def _run(program: str, tests: tuple[str, ...], limits: CodeJudge, *, isolate: bool) -> Verdict:
    token = secrets.token_hex(16)
    given = json.dumps({"program": program, "tests": tests, "token": token}).encode()
    directory = Path(tempfile.mkdtemp(prefix="graftllm-"))
    receiving, sending = os.pipe()
    try:
        process = subprocess.Popen(
            _command(directory, limits, isolate, sending),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=(sending,),
            cwd=directory,
            env={},
            start_new_session=True,
        )
        os.close(sending)
        sending = -1
        timed_out = False
        try:
            _, said = process.communicate(given, timeout=limits.timeout_s + _GRACE_S)
        except subprocess.TimeoutExpired:
            timed_out, said = True, b""
        finally:
            _kill_group(process)
        if isolate and process.returncode == 125:
            raise SamplingError(" ".join(said.decode(errors="replace").split()))
        os.set_blocking(receiving, False)
        answer = _received(receiving)
    finally:
        os.close(receiving)
        if sending >= 0:
            os.close(sending)
        shutil.rmtree(directory, ignore_errors=True)
    if answer == token:
        return Verdict(True)
    return Verdict(False, "out of time" if timed_out else answer or f"ended early with status {process.returncode}")


def _command(directory: Path, limits: CodeJudge, isolate: bool, verdict: int) -> list[str]:
    python = os.path.realpath(sys.executable)
    visible = [path for path in _SYSTEM if os.path.lexists(path)]
    if not any(Path(sys.base_prefix).is_relative_to(path) for path in visible):
        visible.append(os.path.realpath(sys.base_prefix))
    settings: dict[str, Any] = limits.model_dump(mode="json") | {
        "isolate": isolate,
        "root": str(directory),
        "visible": visible,
        "python": python,
        "driver": _DRIVER,
        "verdict": verdict,
    }
    return [python, "-I", "-S", str(_JAIL), json.dumps(settings)]


def _received(descriptor: int) -> str:
    try:
        return os.read(descriptor, 65536).decode(errors="replace")
    except BlockingIOError:
        return ""


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a process with all that it started; the PID namespace goes with its first process."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    for stream in (process.stdin, process.stderr):
        if stream is not None:
            stream.close()
