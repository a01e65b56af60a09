"""Sampling that is killed, for real, fifty times, and started again."""

import subprocess
import sys
from pathlib import Path

from graftllm.records import Message, Prompt, read_responses
from graftllm.sampling.endpoint import EndpointSource
from graftllm.sampling.responses import sample_responses
from graftllm.transfer_options import SamplingOptions, SourceOptions
from tests.chat_server import chat_server

_KILLS, _PROMPTS, _SAMPLES = 50, 120, 4
# A process that has loaded everything forks a sampler, kills it a random moment after the file has grown
# by a random size, sometimes cuts what a power failure would take, and forks the next.
_SAMPLING = """
import os, random, signal, sys
from pathlib import Path
from openai import AsyncOpenAI
from tests.sampling.test_killed import sample

AsyncOpenAI(api_key="none").chat.completions.with_raw_response  # what it loads at its first use
url, path, kills = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
draw = random.Random(0)
size = lambda: path.stat().st_size if path.exists() else 0
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
for _ in range(kills):
    child = os.fork()
    if not child:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        sample(url, path)
        os._exit(0)
    start, grown = size(), draw.randrange(200)
    while size() < start + grown and not signal.sigtimedwait({signal.SIGCHLD}, 0.001):
        pass
    signal.sigtimedwait({signal.SIGCHLD}, draw.uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    signal.sigtimedwait({signal.SIGCHLD}, 0)  # what its end left pending
    if path.exists() and draw.random() < 0.5:
        os.truncate(path, max(0, path.stat().st_size - draw.randrange(40)))
    print("killed", flush=True)
"""


def sample(url: str, path: Path) -> None:
    """Ask a hundred and twenty questions four times each."""
    source = SourceOptions(model="big", url=url, concurrency=4, retries=0)
    prompts = [Prompt(str(i), (Message(role="user", content=f"question {i}"),)) for i in range(_PROMPTS)]
    options = SamplingOptions(samples=_SAMPLES)
    sample_responses(prompts, lambda: EndpointSource(source), options, path, source_name="big", seed=0)


def test_a_run_killed_fifty_times_ends_with_the_same_rows(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    with chat_server() as server:
        sample(server.url, whole)
        asked = len(server.seen)
        assert asked == _PROMPTS * _SAMPLES
        server.allow(asked + 4)
        command = [sys.executable, "-c", _SAMPLING, server.url, str(killed), str(_KILLS)]
        kills = 0
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as killing:
            assert killing.stdout is not None
            for line in killing.stdout:
                assert line == b"killed\n"
                kills += 1
                server.allow(len(server.seen) + 4)  # so that no sampler finishes before it is killed
        assert (killing.returncode, kills) == (0, _KILLS)
        kept, before = len(read_responses(killed)), len(server.seen)
        assert 50 < kept < asked
        server.allow(float("inf"))
        sample(server.url, killed)
        assert len(server.seen) - before == asked - kept
    assert killed.read_bytes() == whole.read_bytes()
