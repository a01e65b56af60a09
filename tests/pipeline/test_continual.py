from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from graftllm.pipeline import continual
from graftllm.pipeline.continual import keep_most_changed, mix
from graftllm.pipeline.work import open_work
from graftllm.records import read_prompts, write_rows
from tests.models import rows


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
    skill = "{sources: [s], prompts: p, test: p}"
    (tmp_path / "recipe.yaml").write_text(
        f"name: x\ntarget: t\nskills: {{a: {skill}, b: {skill}}}\ngeneral: {{prompts: p, test: p}}\n"
    )
    work = open_work(tmp_path / "recipe.yaml", tmp_path / "run")
    for name in ("a", "b"):
        write_rows(work.skill(name) / "sft.jsonl", rows(20))
    write_rows(tmp_path / "general.jsonl", rows(20))
    monkeypatch.setattr(continual, "prompts_of", lambda *_: tmp_path / "general.jsonl")
    files = [tmp_path / "rows.jsonl", tmp_path / "pairs.jsonl"]
    continual._mix_rows(work, ["a", "b"], files)
    assert len(read_prompts(files[0])) == 20


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
