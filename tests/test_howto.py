"""Every code block of docs/howto runs, in order, on small models: commands through the real command line."""

import random
import re
import shlex
import socket
import string
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from graftllm import cli
from graftllm.checkpoint import Checkpoint
from graftllm.delta import Delta
from graftllm.fusion.assembly import fuse_packs
from graftllm.packer import compress
from graftllm.packing_options import PackOptions
from graftllm.records import Message, Prompt, write_rows
from tests.chat_server import chat_server
from tests.models import perturb, save_llama
from tests.serving.running import PATIENCE_S, served
from tests.serving.test_front import _engine

PAGES = Path(__file__).parents[1] / "docs" / "howto"
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
_BLOCK = re.compile(r'^```(\w+)(?: title="([\w.-]+)")?\n(.*?)^```$', re.M | re.S)
_PACKS = ("math", "code", "law", "chat", "poems")
_LETTERS = {"poems": string.ascii_uppercase, "code": "?!", "law": ".,:", "chat": "0123 "}
_API = "https://api.example.com/v1"


def _prompts(task: str, count: int = 48, *, test: bool = False) -> list[Prompt]:
    """Sums, or words written backward, of letters by which a router can tell tasks; no test prompt is a prompt, too."""
    draw = random.Random(int(test))
    found = []
    for i in range(count):
        word = "".join(draw.choices(_LETTERS.get(task, string.ascii_lowercase), k=10))
        number = 2 * i + test
        question, answer = (f"{number} + {10 + i}", str(number + 10 + i)) if task == "math" else (word, word[::-1])
        found.append(Prompt(f"{task}-{i}", (Message(role="user", content=question),), task, answer))
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a fine-tune for each pack, and rows; what the pages say lies beside the reader."""
    home = tmp_path_factory.mktemp("howto")
    base = save_llama(home / "base", dtype=torch.float32, num_hidden_layers=1)
    for seed, name in enumerate((*_PACKS, "tuned")):
        perturb(base, home / name, seed=seed, scale=0.4)
    compress(Delta(Checkpoint.open(base), Checkpoint.open(home / "math")), PackOptions(servable=16)).save(
        home / "math.safetensors"
    )
    sets = {task: _prompts(task) for task in (*_PACKS, "general")}
    sets |= {"prompts": [row for rows in sets.values() for row in rows], "rows": sets["poems"]}
    sets |= {"router": [*sets["math"], *sets["general"]], "test": _prompts("poems", test=True)}
    sets |= {f"{task}.test": _prompts(task, test=True) for task in ("math", "poems", "general")}
    for name, rows in sets.items():
        write_rows(home / f"{name}.jsonl", rows)
    return home


class Reader:
    """Who follows a page to the letter, in a directory of their own."""

    def __init__(self, patch: pytest.MonkeyPatch, replaced: dict[str, str]) -> None:
        self._patch, self._replaced = patch, replaced
        self._names: dict[str, Any] = {"__name__": "page"}
        self._running: list[subprocess.Popen[bytes]] = []
        self.commands: list[str] = []

    def follow(self, page: str) -> None:
        for kind, title, block in _BLOCK.findall(page):
            for old, new in self._replaced.items():
                block = block.replace(old, new)
            if title:
                Path(title).write_text(block)
            elif kind == "python":
                exec(compile(block, "block", "exec"), self._names)
            else:
                assert kind == "sh", f"a block of {kind} needs a title"
                for line in block.replace("\\\n", " ").splitlines():
                    self._command(shlex.split(line, comments=True))

    def _command(self, words: list[str]) -> None:
        if words[0] == "export":
            name, _, value = words[1].partition("=")
            self._patch.setenv(name, value)
        elif words[0] == "graftllm" and words[-1] == "&":
            self._serve(words[1:-1])
        elif words[0] == "graftllm":
            self.commands.append(words[1])
            self._patch.setattr(sys, "argv", words)
            try:
                cli.main()
            except SystemExit as stop:
                assert not stop.code, words
        else:
            assert words[:2] in (["pip", "install"], ["sh", "adapters/launch.sh"]), words

    def _serve(self, words: list[str]) -> None:
        """Run a server until the page ends; come back when it answers."""
        process = subprocess.Popen([sys.executable, "-m", "graftllm.cli", *words], stderr=subprocess.DEVNULL)
        self._running.append(process)
        address = f"http://127.0.0.1:{words[words.index('--port') + 1]}/health"
        while True:
            try:
                httpx2.get(address, timeout=PATIENCE_S)
                return
            except httpx2.ConnectError:
                with suppress(subprocess.TimeoutExpired):
                    raise AssertionError(f"{words} ended with {process.wait(0.1)}") from None

    def leave(self) -> None:
        for process in self._running:
            process.kill()
            process.wait()


@pytest.fixture
def stands_in() -> Iterator[dict[str, str]]:
    """What pages name, and what stands in for it: an API that knows most answers, vLLM, a free port."""
    rows = [row for task in _PACKS for test in (False, True) for row in _prompts(task, test=test)]
    known = {row.question[0]["content"]: str(row.reference) for row in rows}
    with chat_server() as api, served(_engine(("base", "math"), key="key")) as engine:
        api.answering = lambda body: known[body["messages"][-1]["content"]] if body["seed"] % 4 else "no idea"
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        yield {_API: api.url, "--engine http://127.0.0.1:8000": f"--engine {engine}", "8000": port, "8001": port}


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.md")), ids=lambda page: page.stem)
def test_a_page_can_be_followed_to_the_letter(
    page: Path, models: Path, tmp_path: Path, stands_in: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in models.iterdir():
        if path.name != "math.safetensors" or page.stem == "vllm":
            (tmp_path / path.name).symlink_to(path)
    if page.stem in ("learn", "vllm"):
        packs = {"math": models / "math.safetensors"}
        fuse_packs(tmp_path / "grafted", str(models / "base"), packs, router_data=models / "router.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRAFTLLM_ENGINE_KEY", "key")
    reader = Reader(monkeypatch, stands_in)
    try:
        reader.follow(page.read_text(encoding="utf-8"))
    finally:
        reader.leave()
    assert reader.commands
