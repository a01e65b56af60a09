from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from graftllm.pipeline import continual
from graftllm.pipeline.baselines import lora, sequential_lora
from graftllm.pipeline.continual import keep_most_changed, mix
from graftllm.pipeline.work import Work, open_work
from graftllm.records import read_prompts, write_rows
from graftllm.stages import Stamp
from tests.models import rows, save_llama

_LAYER = "model.layers.0.mlp.up_proj.weight"


def _two_skills(directory: Path, target: Path) -> Work:
    """A run with rows to learn two skills from."""
    write_rows(directory / "test.jsonl", rows(4, seed=1, answered=False))
    skill = f"{{sources: [s], prompts: p, test: {directory}/test.jsonl}}"
    (directory / "recipe.yaml").write_text(
        f"{{name: x, target: {target}, skills: {{a: {skill}, b: {skill}}}, "
        f"general: {{prompts: p, test: {directory}/test.jsonl}}, dpo: null, lora: {{rank: 2, learning_rate: 0.01}}, "
        "sft: {epochs: 2, batch_size: 8, learning_rate: 0.001, max_length: 64}}"
    )
    work = open_work(directory / "recipe.yaml", directory / "run", device="cpu")
    for seed, name in enumerate(("a", "b")):
        write_rows(work.skill(name) / "sft.jsonl", rows(20, seed=seed))
    return work


@given(st.integers(1, 40), st.lists(st.integers(1, 40), max_size=4), st.integers(0, 3))
def test_a_mix_has_as_many_rows_as_the_new_skill_and_half_of_them_new_at_least(
    new: int, old: list[int], seed: int
) -> None:
    sets = [[f"old {i} {j}" for j in range(size)] for i, size in enumerate(old)]
    fresh = [f"new {i}" for i in range(new)]
    rows = mix(fresh, sets, seed=seed)
    assert len(rows) == len(set(rows)) == new
    assert sum(row.startswith("new") for row in rows) >= new / 2
    recalled = [sum(row.startswith(f"old {i} ") for row in rows) for i in range(len(old))]
    share = new // 2 // len(old) if old else 0
    assert recalled == [min(share, size) for size in old]
    assert rows == mix(fresh, sets, seed=seed)


def test_rows_of_several_skills_may_have_the_same_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = _two_skills(tmp_path, tmp_path)
    write_rows(tmp_path / "general.jsonl", rows(20))
    monkeypatch.setattr(continual, "prompts_of", lambda *_: tmp_path / "general.jsonl")
    files = [tmp_path / "rows.jsonl", tmp_path / "pairs.jsonl"]
    continual._mix_rows(work, ["a", "b"], files)
    assert len(read_prompts(files[0])) == 20


def test_a_lora_in_sequence_is_trained_on_the_model_that_those_before_are_merged_into(
    tmp_path: Path,
) -> None:
    target = save_llama(tmp_path / "target", dtype=torch.float32)
    work = _two_skills(tmp_path, target)
    packed = {name: Stamp(f"pack.{name}", "", {"file_bytes": 1}, 0.0, 0) for name in ("a", "b")}
    measured = sequential_lora(work, {}, packed)
    assert [*measured] == ["sequential_lora.0", "sequential_lora.1"]
    assert all(set(found) == {"a", "b", "general"} for found in measured.values())
    home = work.directory / "baselines" / "sequential_lora"
    models = [load_file(path / "model.safetensors") for path in (target, home / "0-a", home / "1-b")]
    steps = [after[_LAYER] - before[_LAYER] for before, after in pairwise(models)]
    assert [_rank(step) for step in steps] == [2, 2]
    assert _rank(models[2][_LAYER] - models[0][_LAYER]) == 4
    adapter = work.directory / "baselines" / "lora" / "a" / "adapter_model.safetensors"
    trained = adapter.stat().st_mtime_ns
    lora(work, {}, packed)  # its first is the same
    assert adapter.stat().st_mtime_ns == trained


def _rank(change: Tensor) -> int:
    strengths = torch.linalg.svdvals(change.double())
    return int((strengths > 1e-4 * strengths[0]).sum())


def test_only_the_most_changed_parameters_are_kept(base_dir: Path, tuned_dir: Path, tmp_path: Path) -> None:
    base, tuned = (load_file(path / "model.safetensors") for path in (base_dir, tuned_dir))
    keep_most_changed(base_dir, tuned_dir, tmp_path / "out", 0.1)
    found = load_file(tmp_path / "out" / "model.safetensors")
    changed = torch.cat([(found[name] != base[name]).flatten() for name in base])
    sizes = torch.cat([(tuned[name].float() - base[name].float()).abs().flatten() for name in base])
    assert abs(int(changed.sum()) - round(0.1 * len(sizes))) <= 0.01 * len(sizes)  # sizes in bfloat16 tie
    assert sizes[changed].min() >= sizes[~changed].max()
    assert all(torch.equal(found[n], torch.where(found[n] != base[n], tuned[n], base[n])) for n in base)


def test_keeping_everything_is_the_tuned_model_and_nothing_the_old_one(
    base_dir: Path, tuned_dir: Path, tmp_path: Path
) -> None:
    for density, expected in ((1.0, tuned_dir), (0.0, base_dir)):
        keep_most_changed(base_dir, tuned_dir, tmp_path / "out", density)
        wanted = load_file(expected / "model.safetensors")
        found = load_file(tmp_path / "out" / "model.safetensors")
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
