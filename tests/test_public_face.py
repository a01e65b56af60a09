import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import graftllm
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
