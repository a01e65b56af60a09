import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from graftllm.checkpoint import INDEX, Checkpoint
from graftllm.delta import Delta
from graftllm.errors import FusionError, PackError
from graftllm.fusion.applying import apply_packs
from graftllm.fusion.grafting import plug
from graftllm.packer import compress
from graftllm.packing_options import PackOptions, Strategy
from graftllm.skillpack import SkillPack
from graftllm.tensors import digest
from tests.models import perturb, save_llama, with_vocabulary


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


@pytest.mark.parametrize("weight", [float("nan"), float("-inf")])
def test_a_weight_that_is_no_number_is_refused(
    base: Checkpoint, exact: SkillPack, tmp_path: Path, weight: float
) -> None:
    with pytest.raises(FusionError, match=f"an unsaved pack: expected a finite weight, found {weight}."):
        apply_packs(base, [(exact, weight)], tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(base.path)
    with pytest.raises(FusionError, match=f"an unsaved pack: expected a finite weight, found {weight}."):
        plug(model, (exact, weight))
    assert not (tmp_path / "out").exists()


def test_another_base_is_refused_and_nothing_is_written(exact: SkillPack, tmp_path: Path) -> None:
    other = Checkpoint.open(save_llama(tmp_path / "other", seed=9))
    with pytest.raises(PackError, match="but the pack was made for"):
        apply_packs(other, [(exact, 1.0)], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]


@pytest.mark.parametrize("strategy", ["exact", "paper"])
def test_added_vocabulary_rows_are_written(
    base_dir: Path, base: Checkpoint, tmp_path: Path, strategy: Strategy
) -> None:
    tuned = Checkpoint.open(with_vocabulary(base_dir, tmp_path / "tuned", 80))
    compress(Delta(base, tuned), PackOptions(strategy=strategy)).save(tmp_path / "pack.safetensors")
    apply_packs(base, [(SkillPack.load(tmp_path / "pack.safetensors"), 1.0)], tmp_path / "out")
    out = Checkpoint.open(tmp_path / "out")
    assert out.specs == tuned.specs
    assert out.config["vocab_size"] == 80
    assert AutoModelForCausalLM.from_pretrained(out.path).get_input_embeddings().weight.shape == (80, 32)
    assert (out.fingerprint == tuned.fingerprint) == (strategy == "exact")


@pytest.mark.parametrize(("before", "after"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_the_tuned_dtype_is_written(tmp_path: Path, before: str, after: str) -> None:
    base = Checkpoint.open(save_llama(tmp_path / "base", dtype=getattr(torch, before)))
    tuned = Checkpoint.open(save_llama(tmp_path / "tuned", seed=1, dtype=getattr(torch, after)))
    compress(Delta(base, tuned), PackOptions(strategy="exact")).save(tmp_path / "pack.safetensors")
    apply_packs(base, [(SkillPack.load(tmp_path / "pack.safetensors"), 1.0)], tmp_path / "out")
    assert Checkpoint.open(tmp_path / "out").fingerprint == tuned.fingerprint
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == getattr(torch, after)


def test_shards_of_another_dtype_have_their_size_in_the_index(tmp_path: Path) -> None:
    for name, dtype in (("base", torch.float32), ("tuned", torch.bfloat16)):
        save_llama(tmp_path / "whole" / name, dtype=dtype)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / name, dtype="auto")
        model.save_pretrained(tmp_path / name, max_shard_size="20KB")
    base, tuned = Checkpoint.open(tmp_path / "base"), Checkpoint.open(tmp_path / "tuned")
    apply_packs(base, [(compress(Delta(base, tuned), PackOptions(strategy="exact")), 1.0)], tmp_path / "out")
    assert json.loads((tmp_path / "out" / INDEX).read_text())["metadata"]["total_size"] == 2 * tuned.parameters
    assert Checkpoint.open(tmp_path / "out").fingerprint == tuned.fingerprint


def test_packs_of_different_dtypes_do_not_add_up(base: Checkpoint, exact: SkillPack, tmp_path: Path) -> None:
    wide = Checkpoint.open(save_llama(tmp_path / "wide", dtype=torch.float32))
    other = compress(Delta(base, wide), PackOptions(strategy="exact"))
    with pytest.raises(FusionError, match=r"makes 'model.embed_tokens.weight' F32 of shape .* makes it BF16 of shape"):
        apply_packs(base, [(exact, 1.0), (other, 1.0)], tmp_path / "out")


def test_dtypes_may_be_mixed_and_buffers_be_integers_or_truths(base_dir: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "tuned")):
        perturb(base_dir, tmp_path / name, seed=seed)
        tensors = load_file(tmp_path / name / "model.safetensors")
        tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
        tensors["model.layers.0.steps"] = torch.tensor([1 << 60, seed])
        tensors["model.layers.0.scale_steps"] = torch.tensor(seed)
        tensors["model.layers.0.allowed"] = torch.ones(1, 1, 4, 4).tril(seed).bool()
        tensors["model.layers.0.codes"] = torch.arange(9, dtype=torch.uint8) + seed
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    before, after = Checkpoint.open(tmp_path / "base"), Checkpoint.open(tmp_path / "tuned")
    for strategy in ("exact", "paper"):
        pack = compress(Delta(before, after), PackOptions(strategy=strategy))
        apply_packs(before, [(pack, 1.0)], tmp_path / strategy)
        out = Checkpoint.open(tmp_path / strategy)
        assert out.specs == after.specs
        buffers = [name for name in out.specs if not out.tensor(name).is_floating_point()]
        assert len(buffers) == 4
        assert all(torch.equal(out.tensor(name), after.tensor(name)) for name in buffers)
        assert (out.fingerprint == after.fingerprint) == (strategy == "exact")


def test_what_no_pack_changes_keeps_its_bits_and_whole_numbers_become_those_that_all_agree_on(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    whole = torch.randint(-(2**31), 2**31 - 1, (8, 8), generator=draw, dtype=torch.int64)
    tensors = {
        "kept": whole.int(), "wide": torch.randn(4, 4, generator=draw, dtype=torch.float64), "zero": -torch.zeros(4, 4),
        "counted": torch.arange(16, dtype=torch.uint8).reshape(4, 4), "value": torch.randn(4, 4, generator=draw),
    }  # fmt: skip
    for name, extra in (("base", 0), ("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"architectures": ["X"]}')
        here = tensors | {"value": tensors["value"] + extra, "counted": tensors["counted"] + min(extra, 1)}
        save_file(here, tmp_path / name / "model.safetensors")
    base = Checkpoint.open(tmp_path / "base")
    packs = [
        compress(Delta(base, Checkpoint.open(tmp_path / name)), PackOptions(strategy="exact"))
        for name in ("one", "two")
    ]
    apply_packs(base, [(packs[0], 0.5), (packs[1], 0.25)], tmp_path / "out")
    found = Checkpoint.open(tmp_path / "out")
    for name in ("kept", "wide", "zero"):
        assert digest(found.tensor(name)) == digest(base.tensor(name))
    assert torch.equal(found.tensor("counted"), tensors["counted"] + 1)
    assert torch.allclose(found.tensor("value"), tensors["value"] + 1)
