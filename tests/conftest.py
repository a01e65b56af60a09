"""No network, no GPU, seeds everywhere; and the tiny models that many tests share."""

import os

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",  # a test process a core: more threads only wait for each other
}

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from graftllm.checkpoint import Checkpoint
from graftllm.delta import Delta
from graftllm.demo import build_zoo
from graftllm.evaluation.report import Report
from graftllm.pipeline import river
from graftllm.pipeline.work import open_work
from graftllm.records import Prompt
from tests.command import Command, command
from tests.models import perturb, rows, save_llama
from tests.zoo import RECIPE, TINY

# What a shell starts in the background ignores Ctrl-C, and so does what that starts: tests that interrupt would wait.
signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("graftllm", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("graftllm")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep tests that share models in one process: those of the tiny run, else those of a file."""
    for item in items:
        shares = "tiny_run" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group("tiny_run" if shares else item.nodeid.partition("::")[0]))


def pytest_make_parametrize_id(val: object) -> str | None:
    """Cut what would fill the screen when a test fails."""
    return f"{val[:40]!a}..." if isinstance(val, str | bytes) and len(val) > 80 else None


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield


@pytest.fixture
def graftllm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return command(monkeypatch, capsys)


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="session")
def tuned_dir(base_dir: Path) -> Path:
    return perturb(base_dir, base_dir.with_name("tuned"), seed=1)


@pytest.fixture(scope="session")
def base(base_dir: Path) -> Checkpoint:
    return Checkpoint.open(base_dir)


@pytest.fixture(scope="session")
def tuned(tuned_dir: Path) -> Checkpoint:
    return Checkpoint.open(tuned_dir)


@pytest.fixture(scope="session")
def delta(base: Checkpoint, tuned: Checkpoint) -> Delta:
    return Delta(base, tuned)


@pytest.fixture(scope="session")
def prompts() -> list[Prompt]:
    return rows(40)


@dataclass(frozen=True)
class TinyRun:
    """A whole run on a zoo that was trained on the spot, and its report."""

    directory: Path
    recipe: Path
    report: Report


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """Takes about a minute on two idle cores; every end-to-end test shares it."""
    directory = tmp_path_factory.mktemp("tiny")
    (directory / "recipe-in.yaml").write_text(RECIPE)
    work = open_work(directory / "recipe-in.yaml", directory)
    build_zoo(directory / "zoo", work.stages, TINY)
    return TinyRun(directory, directory / "recipe-in.yaml", river.run(work))
