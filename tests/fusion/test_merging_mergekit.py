"""Our merges against mergekit's of the same checkpoints, where mergekit is installed."""

from pathlib import Path
from typing import Any

import pytest
import torch

from graftllm.checkpoint import Checkpoint
from graftllm.fusion.inputs import open_tuned
from graftllm.fusion.merging import merge
from graftllm.fusion.methods.table import METHODS
from tests.models import save_llama

pytest.importorskip("mergekit", reason="mergekit is not installed: pip install -e .[mergekit]")
pytestmark = pytest.mark.filterwarnings("ignore")  # of mergekit's own dependencies

WEIGHTS = {"one": 0.75, "two": 1.5}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two models, in float32, so that nothing is rounded."""
    home = tmp_path_factory.mktemp("mergekit")
    for seed, name in enumerate(("base", *WEIGHTS)):
        save_llama(home / name, seed=seed, dtype=torch.float32)
    return home


@pytest.mark.parametrize(
    ("ours", "theirs", "knobs", "parameters", "model_parameters"),
    [
        ("task-arithmetic", "task_arithmetic", {"scale": 0.5}, {"lambda": 0.5, "normalize": False}, {}),
        ("linear", "task_arithmetic", {"scale": 1.0}, {"normalize": True}, {}),
        ("dare", "dare_linear", {"density": 1.0, "scale": 1.0}, {"normalize": False}, {"density": 1.0}),
        ("dare-ties", "dare_ties", {"density": 1.0, "scale": 1.0}, {"normalize": True}, {"density": 1.0}),
        ("della", "della", {"density": 1.0, "scale": 1.0}, {"normalize": True}, {"density": 1.0, "epsilon": 0.0}),
        ("ties-tensor", "ties", {"density": 0.3, "scale": 1.0}, {"normalize": True}, {"density": 0.3}),
        ("ties-tensor", "ties", {"density": 1.0, "scale": 0.7}, {"normalize": True, "lambda": 0.7}, {}),
        ("breadcrumbs", "breadcrumbs", {"density": 0.6, "scale": 1.0}, {"normalize": False, "rescale": False},
         {"density": 0.6, "gamma": 0.01}),
        ("sce", "sce", {"density": 0.1, "scale": 1.0}, {"select_topk": 0.1}, {}),
        ("sce", "sce", {"density": 1.0, "scale": 1.0}, {"select_topk": 1.0}, {}),
    ],
)  # fmt: skip
def test_merges_are_mergekits(
    home: Path, tmp_path: Path, ours: str, theirs: str, knobs: dict[str, float], parameters: dict[str, Any],
    model_parameters: dict[str, float],
) -> None:  # fmt: skip
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    row, base = METHODS[ours], Checkpoint.open(home / "base")
    weights = {name: weight if row.weighted else 1.0 for name, weight in WEIGHTS.items()}
    models = [open_tuned(base, home / name, name=name, weight=weight) for name, weight in weights.items()]
    merge(base, models, row, tmp_path / "ours", knobs=row.knobs(knobs))
    given = [
        {"model": str(home / name), "parameters": model_parameters | ({"weight": weight} if row.weighted else {})}
        for name, weight in weights.items()
    ]
    asked = {"merge_method": theirs, "base_model": str(home / "base"), "models": given, "dtype": "float32"}
    config = MergeConfiguration.model_validate(asked | {"parameters": parameters})
    run_merge(config, str(tmp_path / "theirs"), MergeOptions(quiet=True))
    mine, found = Checkpoint.open(tmp_path / "ours"), Checkpoint.open(tmp_path / "theirs")
    for name in mine.names():
        assert torch.allclose(mine.tensor(name), found.tensor(name), atol=1e-5), name
