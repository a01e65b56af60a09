from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from graftllm.checkpoint import Checkpoint
from graftllm.delta import Delta
from graftllm.errors import PackError
from graftllm.fusion.merging import apply_packs
from graftllm.recipe import PackOptions
from graftllm.skillpack import SkillPack, compress
from tests.models import save_llama


@pytest.fixture(scope="module")
def exact(delta: Delta) -> SkillPack:
    return compress(delta, PackOptions(strategy="exact"))


def test_one_exact_pack_gives_the_tuned_checkpoint_back(
    base: Checkpoint, tuned: Checkpoint, exact: SkillPack, tmp_path: Path
) -> None:
    apply_packs(base, [(exact, 1.0)], tmp_path / "out")
    assert Checkpoint.open(tmp_path / "out").fingerprint == tuned.fingerprint
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template is not None


def test_weight_zero_gives_the_base_back(base: Checkpoint, exact: SkillPack, tmp_path: Path) -> None:
    apply_packs(base, [(exact, 0.0)], tmp_path / "out")
    assert Checkpoint.open(tmp_path / "out").fingerprint == base.fingerprint


def test_weighted_packs_add_up(base: Checkpoint, delta: Delta, exact: SkillPack, tmp_path: Path) -> None:
    apply_packs(base, [(exact, 0.25), (exact, 0.5)], tmp_path / "out")
    out = Checkpoint.open(tmp_path / "out")
    for name in base.names():
        expected = (base.tensor(name).float() + 0.75 * delta[name]).bfloat16().float()
        assert torch.allclose(out.tensor(name).float(), expected, rtol=2**-7)


def test_another_base_is_refused_and_nothing_is_written(exact: SkillPack, tmp_path: Path) -> None:
    other = Checkpoint.open(save_llama(tmp_path / "other", seed=9))
    with pytest.raises(PackError, match="but the pack was made for"):
        apply_packs(other, [(exact, 1.0)], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]
