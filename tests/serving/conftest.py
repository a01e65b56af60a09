import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from graftllm.checkpoint import Checkpoint
from graftllm.delta import Delta
from graftllm.fusion.assembly import fuse_packs
from graftllm.fusion.grafted import GraftedModel
from graftllm.generation import generate
from graftllm.packer import compress
from graftllm.packing_options import PackOptions
from graftllm.recipe import SamplingOptions
from graftllm.records import Message, Prompt, write_rows
from graftllm.serving.app import build_app
from graftllm.serving.server import Limits, Local
from tests.models import perturb, rows, save_llama
from tests.serving.running import served

FACTORS = PackOptions(servable=4)


@pytest.fixture(scope="session")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a grafted model of three packs (`whole` can only be merged), and a spare pack's file.

    The router sends digits to `one` and punctuation to `two`.
    """
    home = tmp_path_factory.mktemp("served")
    base = Checkpoint.open(save_llama(home / "base", dtype=torch.float32))
    for seed, (name, options) in enumerate(
        {"one": FACTORS, "two": FACTORS, "whole": PackOptions(strategy="exact"), "spare": FACTORS}.items(), 1
    ):
        tuned = Checkpoint.open(perturb(base.path, home / f"tuned-{name}", seed=seed, scale=0.4))
        compress(Delta(base, tuned), options).save(home / f"{name}.safetensors")
    digits = [Prompt(f"d{i}", (Message(role="user", content=f"{i * 7919} {i}"),), "one") for i in range(40)]
    marks = [Prompt(f"m{i}", (Message(role="user", content="?!" * (i % 9 + 1)),), "two") for i in range(40)]
    others = [Prompt(f"w{i}", (Message(role="user", content="...,,," * (i % 9 + 1)),), "whole") for i in range(40)]
    write_rows(home / "router.jsonl", [*digits, *marks, *others, *rows(40, answered=False, task="general")])
    packs = {name: home / f"{name}.safetensors" for name in ("one", "two", "whole")}
    fuse_packs(home / "grafted", str(base.path), packs, router_data=home / "router.jsonl")
    return home


@pytest.fixture
def own(fused: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    shutil.copytree(fused, tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture(scope="session")
def expected(fused: Path) -> "Expected":
    """What each pack answers, by the library alone."""
    return Expected(GraftedModel.load(fused / "grafted"))


class Expected:
    def __init__(self, grafted: GraftedModel) -> None:
        self._grafted, self._known = grafted, dict[tuple[str, str, int], str]()

    def __call__(self, question: str, pack: str, length: int) -> str:
        key = question, pack, length
        if key not in self._known:
            options = SamplingOptions(samples=1, temperature=0, top_p=1, max_new_tokens=length)
            conversation = [[Message(role="user", content=question)]]
            with self._grafted.using(pack) as model:
                self._known[key] = generate(model, self._grafted.tokenizer, conversation, options)[0][0]
        return self._known[key]


@pytest.fixture(scope="session")
def backend(fused: Path) -> Local:
    return Local(fused / "grafted", Limits(max_queue=200), device="cpu")


@pytest.fixture(scope="session")
def address(backend: Local) -> Iterator[str]:
    with served(build_app(backend, max_body=1 << 20)) as address:
        yield address
