import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import graftllm
from graftllm.checkpoint import Checkpoint
from tests.conftest import TinyRun


def test_every_public_name_is_there_and_documented() -> None:
    assert 10 <= len(graftllm.__all__) <= 14
    for name in graftllm.__all__:
        assert getattr(graftllm, name).__doc__ or isinstance(getattr(graftllm, name), type)
    with pytest.raises(AttributeError, match="module 'graftllm' has no attribute 'nonsense'"):
        graftllm.nonsense  # noqa: B018


def test_shells_complete_public_names_without_importing_pytorch() -> None:
    code = "import sys, graftllm; assert set(graftllm.__all__) <= set(dir(graftllm)); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_readmes_example_runs(tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    lines = [line for line in example.splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) <= 10
    monkeypatch.chdir(tmp_path)
    Path("base").symlink_to(tiny_run.directory / "zoo" / "target")
    Path("tuned").symlink_to(tiny_run.directory / "skills" / "next" / "tuned")
    Path("rows.jsonl").symlink_to(tiny_run.directory / "skills" / "next" / "sft.jsonl")
    Path("grafted").symlink_to(tiny_run.directory / "grafted")
    names: dict[str, object] = {}
    exec(example, names)  # the README's own text
    assert isinstance(names["pack"], graftllm.SkillPack)
    assert Path("math.safetensors").stat().st_size < 0.26 * Path("tuned/model.safetensors").stat().st_size
    assert torch.isfinite(names["model"].model.embed_tokens.weight).all()
    assert len(names["answers"]) == 1


def test_a_place_or_a_text_for_what_it_holds_is_told_of_in_one_line(
    base: Checkpoint, tuned: Checkpoint, delta: graftllm.Delta, tmp_path: Path
) -> None:
    place, pack = str(base.path), graftllm.compress(delta, graftllm.PackOptions(strategy="exact"))
    checkpoint = r": expected a checkpoint, as Checkpoint.open gives it, found str\."
    with pytest.raises(graftllm.GraftError, match="base" + checkpoint):
        graftllm.Delta(place, tuned)  # pyright: ignore[reportArgumentType]
    with pytest.raises(graftllm.GraftError, match="tuned" + checkpoint):
        graftllm.measure_fidelity(base, pack, place, [])  # pyright: ignore[reportArgumentType]
    with pytest.raises(graftllm.GraftError, match="base" + checkpoint):
        graftllm.apply_packs(place, [pack], tmp_path / "out")  # pyright: ignore[reportArgumentType]
    rows = r": expected prompts, as read_prompts gives them, found str\."
    for given in ("rows.jsonl", ["a text"]):
        with pytest.raises(graftllm.GraftError, match="calibration" + rows):
            graftllm.compress(delta, calibration=given)  # pyright: ignore[reportArgumentType]
        with pytest.raises(graftllm.GraftError, match="prompts" + rows):
            graftllm.measure_fidelity(base, pack, tuned, given)  # pyright: ignore[reportArgumentType]
    graftllm.apply_packs(base, pack, tmp_path / "out")
    assert graftllm.Checkpoint.open(tmp_path / "out").fingerprint == tuned.fingerprint


def test_a_pack_is_not_saved_over_a_model(base: Checkpoint, delta: graftllm.Delta, tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    shutil.copy(base.path / "model.safetensors", weights)
    with pytest.raises(graftllm.GraftError, match="found something else, which would be lost"):
        graftllm.compress(delta, graftllm.PackOptions(strategy="exact")).save(weights)
    assert weights.read_bytes() == (base.path / "model.safetensors").read_bytes()
