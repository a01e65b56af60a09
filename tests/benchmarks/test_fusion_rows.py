from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from fusion_rows import Bench, _routed_merge

from graftllm.checkpoint import Checkpoint
from graftllm.fusion.methods.table import METHODS


def test_a_model_for_each_task_pays_for_the_router_that_serves_it(base: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "router-1.safetensors").write_bytes(b"x" * 1000)
    (tmp_path / "manifest.json").write_text("{}")
    built: Any = SimpleNamespace(work=SimpleNamespace(grafted=tmp_path))
    bench, names = Bench(built, []), ("code", "math")
    stacks = SimpleNamespace(tuned=[SimpleNamespace(name=name) for name in names])
    deltas = {name: torch.zeros(2, *spec.shape) for name, spec in base.specs.items()}
    vars(bench).update(base=base, stacks=stacks, deltas=deltas, tests={}, routes={})
    stored = METHODS["emr"].stored_bytes(base.specs.values(), 2, 0)
    assert _routed_merge(bench, METHODS["emr"]).stored_bytes == stored + 1000
