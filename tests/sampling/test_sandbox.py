"""Programs that try to get out, or to take what they are not given."""

import os
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from functools import partial
from pathlib import Path

import pytest

from graftllm.errors import SamplingError
from graftllm.records import Message, Prompt
from graftllm.sampling import programs, sandbox
from graftllm.sampling.programs import judge_programs, program_in
from graftllm.sampling.sandbox import Verdict, isolation_problem, run_tests
from graftllm.transfer_options import CodeJudge

LIMITS = CodeJudge(kind="code", timeout_s=2, memory_mb=256, processes=4, disk_mb=1)
isolated = pytest.mark.skipif(bool(isolation_problem()), reason=f"no isolation here: {isolation_problem()}")


@pytest.fixture(params=["isolated", "limited"])
def anywhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> CodeJudge:
    """Limits, inside the sandbox and where a platform has none."""
    if request.param == "isolated":
        if isolation_problem():
            pytest.skip(isolation_problem())
        return LIMITS
    monkeypatch.setattr(sandbox, "isolation_problem", lambda: "told so")
    return LIMITS.model_copy(update={"allow_unsandboxed": True})


def _run(program: str, *tests: str, limits: CodeJudge = LIMITS) -> Verdict:
    return run_tests(textwrap.dedent(program), tests, limits)


@pytest.mark.parametrize(
    ("program", "tests", "problem"),
    [
        ("def double(x): return 2 * x", ["assert double(2) == 4", "assert double('a') == 'aa'"], None),
        ("import re, collections, math, heapq, typing", [], None),
        ("def double(x): return x", ["assert double(2) == 4, 'not four'"], "AssertionError: not four"),
        ("def double(x: return", ["1"], "SyntaxError"),
        ("import sys; sys.exit(0)", ["1"], "SystemExit: 0"),
        ("import os; os._exit(0)", ["1"], "ended early with status 0"),
        ("raise KeyboardInterrupt", ["1"], "KeyboardInterrupt"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", ["1"], "ended early"),
        ("import ctypes; ctypes.string_at(0)", ["1"], "ended early"),
        ("def f(): return f()\nf()", [], "RecursionError"),
        ("input()", [], "EOFError"),
        ("huge = [0] * 10**9", [], "MemoryError"),
        ("open('numbers', 'w').write('x' * 10**6 * 3)", [], "OSError"),
        ("print('a' * 10**7)", [], None),
        ("import os; os._exit(125)", [], "ended early with status 12"),
    ],
)
def test_a_program_passes_when_all_its_tests_do(
    anywhere: CodeJudge, program: str, tests: list[str], problem: str | None
) -> None:
    verdict = _run(program, *tests, limits=anywhere)
    assert verdict.passed == (problem is None), verdict
    assert verdict.problem.startswith(problem or "")


@pytest.mark.parametrize("program", ["while True: pass", "while True: print('endless output', flush=True)"])
def test_what_does_not_end_is_ended(anywhere: CodeJudge, program: str) -> None:
    verdict = _run(program, limits=anywhere.model_copy(update={"timeout_s": 1}))
    assert not verdict.passed
    assert verdict.problem == "out of time" or verdict.problem.startswith("ended early")


def test_what_waits_for_ever_is_killed_with_all_that_it_started(
    anywhere: CodeJudge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "_GRACE_S", 1)
    marker = f"graftllm-test-{os.getpid()}"
    program = f"""
        import subprocess, sys, time
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)", "{marker}"])
        time.sleep(1000)
    """
    assert _run(program, limits=anywhere.model_copy(update={"timeout_s": 0.5})) == Verdict(False, "out of time")
    started = time.monotonic()
    while marker in _command_lines():  # the kernel takes a moment to end what was killed
        assert time.monotonic() < started + 60, "still there"


def _command_lines() -> str:
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_text())
        except OSError:
            continue  # it has just ended
    return "\n".join(lines)


@isolated
def test_what_outlives_the_program_dies_with_its_namespace() -> None:
    marker = f"graftllm-daemon-{os.getpid()}"
    program = f"""
        import subprocess, sys
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)", "{marker}"], start_new_session=True)
    """
    assert _run(program).passed
    assert marker not in _command_lines()


@isolated
def test_a_fork_bomb_stays_within_its_processes() -> None:
    program = """
        import os, time
        children = 0
        try:
            while True:
                if not os.fork():
                    time.sleep(100)
                children += 1
        except BlockingIOError:
            pass
    """
    assert _run(program, "assert children == 3, children").passed
    doubling = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    assert not _run(doubling, limits=LIMITS.model_copy(update={"timeout_s": 1})).passed


@isolated
def test_there_is_no_home_and_nothing_of_other_users() -> None:
    secret = Path.home() / ".graftllm-sandbox-test"
    secret.write_text("secret")
    try:
        for path in (secret, Path(__file__), Path("/etc/passwd"), Path("/proc/self/environ"), Path("/proc/1/root")):
            verdict = _run(f"open({str(path)!r}).read()")
            assert verdict.problem.startswith(("FileNotFoundError", "NotADirectoryError")), (path, verdict)
    finally:
        secret.unlink()
    assert _run(
        "import os", "assert os.listdir('.') == []", "assert list(os.environ) and 'USER' not in os.environ"
    ).passed
    assert _run("import os", "assert os.path.expanduser('~') == os.getcwd() == '/work'").passed


@isolated
def test_nothing_outside_can_be_written(tmp_path: Path) -> None:
    for place in (
        tmp_path,
        Path("/tmp"),
        Path("/dev/shm"),
        Path(sys.base_prefix),
        Path("/usr"),
        Path("/"),
        Path("/dev"),
    ):
        verdict = _run(f"open({str(place / 'graftllm-was-here')!r}, 'w').write('x')")
        assert not verdict.passed, place
        assert not (place / "graftllm-was-here").exists()
    assert _run("open('here', 'w').write('x')", "assert open('here').read() == 'x'").passed


@isolated
def test_there_is_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)"
        assert _run(program).problem.startswith("OSError: [Errno 101] Network is unreachable")
    assert _run("import socket\nsocket.getaddrinfo('example.org', 80)").problem.startswith("gaierror")
    verdict = _run("import socket\nsocket.socket(socket.AF_UNIX).connect('/var/run/docker.sock')")
    assert verdict.problem.startswith("FileNotFoundError")


@isolated
def test_capabilities_are_gone_and_do_not_come_back() -> None:
    program = """
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        tries = {
            "mount": lambda: libc.mount(b"tmpfs", b"/usr", b"tmpfs", 0, None),
            "umount": lambda: libc.umount2(b"/usr", 2),
            "chroot": lambda: libc.chroot(b"/work"),
            "sethostname": lambda: libc.sethostname(b"x", 1),
            "setuid": lambda: libc.setuid((os.getuid() + 1) % 65536),
            "ptrace": lambda: libc.ptrace(16, 1, 0, 0),
        }
        done = [name for name, attempt in tries.items() if attempt() != -1]
    """
    assert _run(program, "assert not done, done").passed


@isolated
def test_calls_past_limits_and_namespaces_are_refused() -> None:
    program = """
        import ctypes, errno, os, platform, socket
        libc = ctypes.CDLL(None, use_errno=True)
        keyctl = 250 if platform.machine() == "x86_64" else 219
        tries = {
            "shmget": lambda: libc.shmget(0, 1 << 20, 0o1600),
            "msgget": lambda: libc.msgget(0, 0o1600),
            "semget": lambda: libc.semget(0, 1, 0o1600),
            "memfd_create": lambda: libc.memfd_create(b"x", 0),
            "memfd_secret": lambda: libc.syscall(447, 0),
            "keyctl": lambda: libc.syscall(keyctl, 0, -3, 0),
            "io_uring_setup": lambda: libc.syscall(425, 1, ctypes.create_string_buffer(120)),
            "vsock": lambda: libc.socket(40, 1, 0),
            "netlink": lambda: libc.socket(16, 3, 0),
        }
        if platform.machine() == "x86_64":
            tries["x32"] = lambda: libc.syscall(0x40000000 + 39)
        done = [name for name, attempt in tries.items() if attempt() != -1 or ctypes.get_errno() != errno.EPERM]
        for family in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6):
            socket.socket(family).close()
        socket.socketpair()
    """
    assert _run(program, "assert not done, done") == Verdict(True)


@isolated
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the 32-bit calls of x86_64")
def test_calls_of_another_architecture_end_the_program() -> None:
    program = """
        import ctypes, mmap
        code = mmap.mmap(-1, 4096, prot=7)
        code.write(bytes.fromhex("b814000000cd80c3"))  # mov eax, 20 (getpid); int 0x80; ret
        ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()
    """
    assert _run(program).problem == "ended early with status 225"  # 256 - SIGSYS


@isolated
def test_descriptors_of_the_parent_are_closed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    with open(tmp_path / "secret") as file:
        os.set_inheritable(file.fileno(), True)
        program = """
            import os
            readable = []
            for descriptor in range(4, 64):
                try:
                    readable.append(os.read(descriptor, 9))
                except OSError:
                    pass
        """
        assert _run(program, "assert b'secret' not in readable, readable").passed


@isolated
@pytest.mark.skipif(os.geteuid() != 0, reason="root only: every test here is of an ordinary user otherwise")
def test_an_ordinary_user_is_isolated_too(monkeypatch: pytest.MonkeyPatch) -> None:
    python, nobody = "/usr/bin/python3", {"user": 65534, "group": 65534, "extra_groups": []}
    if not Path(python).exists():
        pytest.skip("no interpreter that every user may start")
    with tempfile.TemporaryDirectory() as open_to_all:
        os.chmod(open_to_all, 0o777)
        jail = Path(open_to_all) / "jail.py"
        jail.write_text(Path(sandbox.__file__).with_name("jail.py").read_text())
        monkeypatch.setattr(sandbox, "_JAIL", jail)
        monkeypatch.setattr(sandbox.sys, "executable", python)
        monkeypatch.setattr(sandbox.sys, "base_prefix", "/usr")
        monkeypatch.setattr(sandbox.subprocess, "Popen", partial(subprocess.Popen, **nobody))
        monkeypatch.setattr(sandbox.tempfile, "mkdtemp", lambda prefix: _made(Path(open_to_all) / prefix))
        assert isolation_problem.__wrapped__() == ""
        assert _run("import os", "assert os.getuid() == 65534 and os.getcwd() == '/work'").passed
        assert _run("import os\nwhile True: os.fork()").problem != ""


def _made(path: Path) -> str:
    path.mkdir(mode=0o777)
    os.chmod(path, 0o777)
    return str(path)


def test_without_isolation_nothing_runs_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "isolation_problem", lambda: "unshare: Operation not permitted")
    with pytest.raises(SamplingError) as raised:
        run_tests("", (), LIMITS)
    assert str(raised.value) == (
        "judge 'code': programs cannot be isolated here (unshare: Operation not permitted), so none was run. Use Linux "
        "5.14 or newer with user namespaces, or a machine that may be harmed and allow_unsandboxed: true."
    )
    assert run_tests("", (), LIMITS.model_copy(update={"allow_unsandboxed": True})).passed


def test_a_platform_that_cannot_isolate_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    assert isolation_problem.__wrapped__() == "namespaces are Linux's, this is darwin"
    monkeypatch.undo()
    monkeypatch.setattr(sandbox, "_SYSTEM", ("/no such directory",))
    monkeypatch.setattr(sandbox.os.path, "lexists", lambda path: True)
    if sys.platform == "linux":
        assert "/no such directory" in isolation_problem.__wrapped__() or "unshare" in isolation_problem.__wrapped__()


@pytest.mark.parametrize(
    ("answer", "program"),
    [
        ("x = 1", "x = 1"),
        ("```python\nx = 1\n```", "x = 1\n"),
        ("```py\nx = 1\n```\nor\n```\nlonger than the other one\n```", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```python\nx = 1\n```\nthen\n```python\ny = 2; z = 3\n```", "y = 2; z = 3\n"),
        ("1. First:\n   ```python\n   x = 1\n   ```", "   x = 1\n"),
    ],
)
def test_the_program_is_the_longest_block_of_python(answer: str, program: str) -> None:
    assert program_in(answer) == program


def test_equal_programs_run_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran = []
    monkeypatch.setattr(programs, "run_tests", lambda *given: ran.append(given) or Verdict(True))
    prompt = Prompt("p", (Message(role="user", content="?"),), tests=("1",))
    assert judge_programs([prompt] * 3, ["x = 1", "```\nx = 2\n```", "x = 1"], LIMITS, tmp_path / "judged.jsonl") == [
        1,
        1,
        1,
    ]
    assert len(ran) == 2


def test_programs_that_ran_before_a_kill_do_not_run_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, ran = tmp_path / "judged.jsonl", []

    def running(program: str, *given: object) -> Verdict:
        ran.append(program)
        if ran == ["x = 1", "x = 2", "x = 3"]:
            while path.read_bytes().count(b"\n") < 2:
                time.sleep(0.001)
            raise KeyboardInterrupt
        return Verdict(program != "x = 2")

    monkeypatch.setattr(programs, "run_tests", running)
    prompt, answers = Prompt("p", (Message(role="user", content="?"),), tests=("1",)), [f"x = {i}" for i in range(1, 6)]
    one_by_one = LIMITS.model_copy(update={"workers": 1})
    with pytest.raises(KeyboardInterrupt):
        judge_programs([prompt] * 5, answers, one_by_one, path)
    assert judge_programs([prompt] * 5, answers, one_by_one, path) == [1, 0, 1, 1, 1]
    assert (ran.count("x = 1"), ran.count("x = 2"), ran.count("x = 3")) == (1, 1, 2)


def test_answers_are_judged_by_the_tests_of_their_prompts(anywhere: CodeJudge, tmp_path: Path) -> None:
    question = (Message(role="user", content="Write f that doubles."),)
    prompts = [Prompt(str(i), question, tests=("assert f(3) == 6", "assert f(0) == 0")) for i in range(3)]
    answers = ["```python\ndef f(x):\n    return 2 * x\n```", "def f(x): return x + 3", "I cannot."]
    assert judge_programs(prompts, answers, anywhere, tmp_path / "judged.jsonl") == [1, 0, 0]
