from pathlib import Path

import pytest
import torch

from graftllm.checkpoint import Checkpoint
from graftllm.delta import Delta
from graftllm.errors import PackError
from graftllm.packer import compress
from graftllm.packing_options import PackOptions
from graftllm.skillpack import SkillPack


@pytest.fixture(scope="module")
def layered(tmp_path_factory: pytest.TempPathFactory, delta: Delta) -> Path:
    path = tmp_path_factory.mktemp("layered") / "pack.safetensors"
    compress(delta, PackOptions(strategy="exact", budget="25%")).save(path)
    return path


def test_the_exact_layer_gives_the_tuned_bits(layered: Path, delta: Delta) -> None:
    pack = SkillPack.load(layered, "exact")
    assert any(entry.refinement for entry in pack.header.tensors.values())
    for name in delta:
        base, tuned = delta.base.tensor(name), delta.tuned.tensor(name)
        assert torch.equal(pack.restore(name, base), tuned)
        assert torch.equal(pack.delta(name, base), tuned.float() - base.float())


def test_the_lossy_layer_is_a_pack_of_that_budget(layered: Path, delta: Delta, tmp_path: Path) -> None:
    path = tmp_path / "lossy.safetensors"
    lossy = SkillPack.load(layered, "lossy")
    lossy.save(path)
    assert path.stat().st_size <= 0.25 * delta.tuned.nbytes < layered.stat().st_size
    saved = SkillPack.load(path)
    restored = {name: saved.restore(name, delta.base.tensor(name)) for name in delta}
    assert all(torch.equal(value, lossy.restore(name, delta.base.tensor(name))) for name, value in restored.items())
    assert not all(torch.equal(value, delta.tuned.tensor(name)) for name, value in restored.items())


def test_a_lossy_pack_has_no_exact_layer(layered: Path, tmp_path: Path) -> None:
    path = tmp_path / "lossy.safetensors"
    SkillPack.load(layered, "lossy").save(path)
    with pytest.raises(PackError, match="expected a pack with an exact layer, but .* has none. Take the lossy layer"):
        SkillPack.load(path, "exact")


def test_exact_values_of_other_bits_are_refused(layered: Path, base: Checkpoint) -> None:
    pack = SkillPack.load(layered)
    name = next(name for name, entry in pack.header.tensors.items() if entry.refinement)
    entry = pack.header.tensors[name].model_copy(update={"tuned_digest": "0" * 16})
    header = pack.header.model_copy(update={"tensors": pack.header.tensors | {name: entry}})
    with pytest.raises(PackError, match=f"'{name}' is stored exactly, but gives values of digest .*, expected 0000"):
        SkillPack(header, "x", pack._payload).restore(name, base.tensor(name))
