"""Tokens a second of `graftllm serve` against `transformers serve` with the base alone, and a load test.

    python benchmarks/serving.py                 speed at 1, 8 and 32 clients, ratios in the same run
    python benchmarks/serving.py --load 60       64 clients over 8 packs for 60 s: answers and memory checked
    python benchmarks/serving.py --size large    a model of 201 M parameters instead of 3.2 M; --device cuda on a GPU

The model is a random Llama that is built on the spot, so that nothing but speed means anything.
"""

import argparse
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx2
import torch
from openai import OpenAI

from graftllm.checkpoint import Checkpoint
from graftllm.delta import Delta
from graftllm.devices import resolve_device
from graftllm.fusion.assembly import fuse_packs
from graftllm.packer import compress
from graftllm.packing_options import PackOptions
from graftllm.records import Message, Prompt, write_rows

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.models import perturb, rows, save_llama  # the tokenizer and the model that tests use

TOKENS = 48
CLIENTS = (1, 8, 32)
SIZES = {"small": (256, 4), "large": (1024, 16)}  # width and layers


def build(home: Path, packs: int, *, width: int, layers: int, device: str) -> None:
    """Write a base and a grafted model with servable packs and a router."""
    shape = {
        "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512,
    }  # fmt: skip
    base = Checkpoint.open(save_llama(home / "base", dtype=torch.float32, **shape))
    files, prompts = {}, rows(40, answered=False, task="general")
    for i in range(packs):
        tuned = Checkpoint.open(perturb(base.path, home / f"tuned-{i}", seed=i + 1, scale=0.1))
        files[f"p{i}"] = home / f"p{i}.safetensors"
        compress(Delta(base, tuned), PackOptions(servable=16)).save(files[f"p{i}"])
        words = [f"{chr(97 + 3 * i) * (2 + k % 7)} {chr(98 + 3 * i) * (1 + k % 5)}" for k in range(40)]
        prompts += [Prompt(f"{i}-{k}", (Message(role="user", content=word),), f"p{i}") for k, word in enumerate(words)]
    write_rows(home / "router.jsonl", prompts)
    fuse_packs(home / "grafted", str(base.path), files, router_data=home / "router.jsonl", device=device)


@contextmanager
def started(words: list[str]) -> Iterator[tuple[str, int]]:
    """Run a server on a free port until the block ends; yield its address and process id."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([*words, "--port", str(port)], stdout=log, stderr=log)
        address = f"http://127.0.0.1:{port}"
        try:
            while True:
                try:
                    if httpx2.get(f"{address}/health", timeout=60).status_code == 200:
                        break
                except httpx2.HTTPError:
                    pass
                if process.poll() is not None:
                    log.seek(0)
                    raise SystemExit(f"{words[0]} ended: {log.read().decode()[-800:]}")
                time.sleep(0.2)  # between two looks; a server of another project tells of itself only when asked
            yield address, process.pid
        finally:
            process.terminate()
            process.wait(60)


def speed(address: str, clients: int, model_of: Callable[[int], str], *, requests: int, packs: int = 1) -> float:
    """Return written tokens a second of requests that so many clients share, once so many packs are loaded."""
    client = OpenAI(base_url=f"{address}/v1", api_key="none", timeout=600, max_retries=0)

    def ask(i: int) -> int:
        pieces = client.chat.completions.create(
            model=model_of(i), messages=[{"role": "user", "content": f"backward: {i * 7919}"}],
            max_tokens=TOKENS, temperature=0, stream=True,
        )  # fmt: skip
        return sum(len(choice.delta.content or "") for piece in pieces for choice in piece.choices)  # a token a letter

    with ThreadPoolExecutor(clients) as crowd:
        list(crowd.map(ask, range(max(clients, packs))))  # warm
        began = time.perf_counter()
        written = sum(crowd.map(ask, range(requests)))
    return written / (time.perf_counter() - began)


def compare(home: Path, packs: int, device: str) -> None:
    """Print tokens a second by the number of clients."""
    found: dict[str, list[float]] = {}
    with started(_served(home, device)) as (ours, _):
        ways: dict[str, Callable[[int], str]] = {
            "graftllm, base": lambda i: "base",
            "graftllm, one pack": lambda i: "p0",
            f"graftllm, {packs} packs mixed": lambda i: f"p{i % packs}",
            "graftllm, auto": lambda i: "auto",
        }
        for name, model_of in ways.items():
            found[name] = [speed(ours, n, model_of, requests=max(packs, 2 * n), packs=packs) for n in CLIENTS]
    rival = [str(Path(sys.executable).with_name("transformers")), "serve", str(home / "base"), "--device", device]
    try:
        with started([*rival, "--dtype", "float32", "--continuous-batching"]) as (theirs, _):
            base = str(home / "base")
            found["transformers serve, base"] = [
                speed(theirs, n, lambda i: base, requests=max(packs, 2 * n)) for n in CLIENTS
            ]
    except SystemExit as error:
        print(f"transformers serve did not start: {error}")
    print(f"| tokens/s | {' | '.join(f'{n} clients' for n in CLIENTS)} |")
    for name, values in found.items():
        print(f"| {name} | {' | '.join(f'{value:.0f}' for value in values)} |")


def load(home: Path, packs: int, seconds: float, device: str, clients: int = 64) -> None:
    """Ask with many clients for a while; print how many answers were wrong or missing, and the server's memory."""
    with started(_served(home, device)) as (url, pid):
        client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=600, max_retries=0)
        questions = [(f"backward: {k}", f"p{i}") for i in range(packs) for k in ("ABC", "XY", "hello", "31")]

        def ask(question: str, pack: str) -> str:
            answer = client.chat.completions.create(
                model=pack, messages=[{"role": "user", "content": question}], max_tokens=16, temperature=0
            )
            return answer.choices[0].message.content or ""

        expected = {one: ask(*one) for one in questions}  # each alone
        end, memory = time.perf_counter() + seconds, [_memory(pid)]

        def keep_asking(seed: int) -> tuple[int, int]:
            draw, right, wrong = random.Random(seed), 0, 0
            while time.perf_counter() < end:
                one = draw.choice(questions)
                right, wrong = (right + 1, wrong) if ask(*one) == expected[one] else (right, wrong + 1)
            return right, wrong

        with ThreadPoolExecutor(clients) as crowd:
            asked = [crowd.submit(keep_asking, seed) for seed in range(clients)]
            while time.perf_counter() < end:
                time.sleep(min(5.0, seconds / 6))  # between two samples of the memory
                memory.append(_memory(pid))
            counts = [one.result() for one in asked]  # a lost answer raises here
    print(f"{clients} clients, {packs} packs, {seconds:.0f} s: {sum(r for r, _ in counts)} right answers, "
          f"{sum(w for _, w in counts)} wrong; memory in MiB: {' '.join(f'{m >> 20}' for m in memory)}")  # fmt: skip


def _served(home: Path, device: str) -> list[str]:
    return [sys.executable, "-m", "graftllm.cli", "serve", str(home / "grafted"), "--device", device]


def _memory(pid: int) -> int:
    """Return the resident memory of a process in bytes (Linux)."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Build a model, serve it, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", type=float, metavar="SECONDS", help="the load test instead of the comparison")
    parser.add_argument("--packs", type=int, default=8)
    parser.add_argument("--size", choices=list(SIZES), default="small", help="width and layers of the model")
    parser.add_argument("--device", default="auto", help="of both servers")
    parser.add_argument("--width", type=int, help="instead of the size's")
    parser.add_argument("--layers", type=int, help="instead of the size's")
    given = parser.parse_args()
    (width, layers), device = SIZES[given.size], str(resolve_device(given.device))
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        build(home, given.packs, width=given.width or width, layers=given.layers or layers, device=device)
        if given.load:
            load(home, given.packs, given.load, device)
        else:
            compare(home, given.packs, device)


if __name__ == "__main__":
    main()
