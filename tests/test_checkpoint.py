import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from graftllm.checkpoint import INDEX, Checkpoint, write_checkpoint
from graftllm.errors import CheckpointError, StorageError
from graftllm.loading import load_model
from graftllm.tensors import DTYPES, TensorSpec, digest, is_finite, natural_order, raw_bytes, write_safetensors
from tests.models import save_llama


def _sharded(tmp_path: Path) -> Path:
    whole = save_llama(tmp_path / "whole")
    AutoModelForCausalLM.from_pretrained(whole).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    return tmp_path / "sharded"


def test_tensors_are_those_that_transformers_saved(base: Checkpoint) -> None:
    expected = load_file(base.path / "model.safetensors")
    assert set(base.names()) == set(expected)
    for name, value in expected.items():
        assert torch.equal(base.tensor(name), value)
        assert base.specs[name] == TensorSpec("BF16", tuple(value.shape))
    assert base.parameters == sum(value.numel() for value in expected.values())
    assert base.dtype == torch.bfloat16


def test_shards_make_one_checkpoint(tmp_path: Path) -> None:
    sharded = Checkpoint.open(_sharded(tmp_path))
    assert len(set(sharded.shards.values())) > 1
    whole = Checkpoint.open(tmp_path / "whole")
    assert sharded.fingerprint == whole.fingerprint
    assert sharded.names() == whole.names()


def test_one_changed_bit_changes_the_fingerprint(base: Checkpoint, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(base.path, copy)
    assert Checkpoint.open(copy).fingerprint == base.fingerprint
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"].view(torch.int16)[0] ^= 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert Checkpoint.open(copy).fingerprint != base.fingerprint


def test_layers_come_in_numeric_order() -> None:
    names = ["layers.10.b", "layers.2.b", "layers.2.a", "embed"]
    assert sorted(names, key=natural_order) == ["embed", "layers.2.a", "layers.2.b", "layers.10.b"]


@given(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 3), max_size=3))
def test_written_tensors_are_read_by_safetensors(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, shape: list[int]
) -> None:
    path = tmp_path_factory.mktemp("written") / "x.safetensors"
    layout = {"b": TensorSpec(dtype, tuple(shape)), "a": TensorSpec("U8", (3,))}
    data = {name: np.arange(spec.nbytes, dtype=np.uint8) % 2 for name, spec in layout.items()}
    write_safetensors(path, layout, data.__getitem__, metadata={"note": "ä"})
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"note": "ä"}
        for name, spec in layout.items():
            value = file.get_tensor(name)
            assert (value.dtype, tuple(value.shape)) == (DTYPES[spec.dtype], spec.shape)
            assert np.array_equal(raw_bytes(value), data[name])


def test_a_chunk_of_another_size_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="x: expected 4 bytes, found 3"):
        layout = {"x": TensorSpec("F32", (1,))}
        write_safetensors(tmp_path / "x", layout, lambda _: np.zeros(3, np.uint8), metadata={})
    assert list(tmp_path.iterdir()) == []


def test_a_copied_checkpoint_loads_and_has_the_same_bytes(tmp_path: Path) -> None:
    sharded = Checkpoint.open(_sharded(tmp_path))
    write_checkpoint(sharded, tmp_path / "copy", sharded.tensor)
    copy = Checkpoint.open(tmp_path / "copy")
    assert copy.fingerprint == sharded.fingerprint
    assert dict(copy.shards) == dict(sharded.shards)
    AutoModelForCausalLM.from_pretrained(tmp_path / "copy")


def test_a_copied_checkpoint_has_config_and_tokenizer(base: Checkpoint, tmp_path: Path) -> None:
    write_checkpoint(base, tmp_path / "copy", base.tensor)
    words = AutoTokenizer.from_pretrained(tmp_path / "copy")
    assert words.chat_template is not None
    assert (tmp_path / "copy" / "config.json").read_bytes() == (base.path / "config.json").read_bytes()


def test_a_config_is_changed_where_it_is_nested(base: Checkpoint, tmp_path: Path) -> None:
    settings = {"text_config": {"vocab_size": 73, "dtype": "bfloat16"}, "dtype": "bfloat16", "vocab_size": 5}
    wide = {name: TensorSpec("F32", spec.shape) for name, spec in base.specs.items()}
    write_checkpoint(
        dataclasses.replace(base, config=settings),
        tmp_path / "copy",
        lambda name: base.tensor(name).float(),
        specs=wide,
        config={"text_config.vocab_size": 80},
    )
    expected = {"text_config": {"vocab_size": 80, "dtype": "float32"}, "dtype": "float32", "vocab_size": 5}
    assert json.loads((tmp_path / "copy" / "config.json").read_text()) == expected


def test_digests_tell_negative_zero_from_zero() -> None:
    assert digest(torch.tensor([0.0])) != digest(torch.tensor([-0.0]))


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none: expected a checkpoint directory, found nothing. Check the path"):
        Checkpoint.open(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file: expected a checkpoint directory, found a file"):
        Checkpoint.open(tmp_path / "file")
    with pytest.raises(
        CheckpointError, match=r"org/name: there is no such directory, and the Hugging Face Hub did not"
    ):
        Checkpoint.open("org/name")


def test_a_directory_without_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected a model directory, found no config.json in it"):
        Checkpoint.open(tmp_path)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(
        CheckpointError, match=r"found pytorch_model.bin. Only safetensors is read: load the model with"
    ):
        Checkpoint.open(tmp_path)


def test_half_a_checkpoint_is_refused(tmp_path: Path) -> None:
    sharded = _sharded(tmp_path)
    (sharded / "model-00002-of-00004.safetensors").unlink(missing_ok=True)
    gone = sorted(sharded.glob("model-*"))[-1]
    gone.unlink()
    with pytest.raises(
        CheckpointError, match=r"names the shard model-.*, which is not there. The checkpoint is incomp"
    ):
        Checkpoint.open(sharded)


def test_a_shard_whose_name_is_too_long_for_a_file_is_not_there(tmp_path: Path) -> None:
    sharded = _sharded(tmp_path)
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["extra"] = f"{'a' * 300}.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="a.safetensors, which is not there"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("told", [None, 3, [1], "x"])
def test_an_index_with_odd_metadata_is_copied_with_its_own(tmp_path: Path, told: object) -> None:
    sharded = _sharded(tmp_path)
    (sharded / INDEX).write_text(json.dumps(json.loads((sharded / INDEX).read_text()) | {"metadata": told}))
    like = Checkpoint.open(sharded)
    write_checkpoint(like, tmp_path / "out", like.tensor)
    assert set(json.loads((tmp_path / "out" / INDEX).read_text())["metadata"]) == {"total_size", "total_parameters"}


def test_a_shard_without_its_tensor_is_refused(tmp_path: Path) -> None:
    sharded = _sharded(tmp_path)
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["extra"] = next(iter(index["weight_map"].values()))
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="holds 'extra', but it does not"):
        Checkpoint.open(sharded)


def test_an_index_that_names_the_wrong_shard_is_refused(tmp_path: Path) -> None:
    sharded = _sharded(tmp_path)
    index = json.loads((sharded / INDEX).read_text())
    first, last = sorted(set(index["weight_map"].values()))[:: len(set(index["weight_map"].values())) - 1]
    name = next(name for name, file in index["weight_map"].items() if file == first)
    index["weight_map"][name] = last
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"says that {last} holds '{name}', but it does not"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize(("named", "found"), [(None, "NoneType"), ([], "list")])
def test_an_index_without_its_map_is_refused(tmp_path: Path, named: object, found: str) -> None:
    sharded = _sharded(tmp_path)
    (sharded / INDEX).write_text(json.dumps({"weight_map": named}))
    with pytest.raises(CheckpointError, match=f"expected a 'weight_map' from tensors to shards, found {found}. The"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "model.bin"])
def test_an_index_cannot_point_outside(tmp_path: Path, file: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": file}}))
    with pytest.raises(CheckpointError, match="expected shards named like model-00001-of-00002.safetensors"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("size", [0, 4, 100, 5000])
def test_a_truncated_shard_is_refused(base: Checkpoint, tmp_path: Path, size: int) -> None:
    shutil.copytree(base.path, tmp_path / "cut")
    path = tmp_path / "cut" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"model.safetensors: not a whole safetensors file"):
        Checkpoint.open(tmp_path / "cut")


@pytest.mark.parametrize("own", ["notes.txt", "eval_results.json"])
def test_a_checkpoint_with_files_of_ones_own_is_not_replaced(base: Checkpoint, tmp_path: Path, own: str) -> None:
    for _ in range(2):
        write_checkpoint(base, tmp_path / "out", base.tensor)
    (tmp_path / "out" / own).write_text("mine")
    with pytest.raises(StorageError, match=f"found {own} as well, which would be lost; choose another place"):
        write_checkpoint(base, tmp_path / "out", base.tensor)
    assert (tmp_path / "out" / own).read_text() == "mine"


@pytest.mark.parametrize("lost", [None, "model.safetensors"])
def test_a_model_that_was_written_elsewhere_is_not_replaced(base: Checkpoint, tmp_path: Path, lost: str | None) -> None:
    own = save_llama(tmp_path / "out", seed=5)
    if lost:
        (own / lost).write_bytes(b"damaged")
    there = {file: file.read_bytes() for file in own.iterdir()}
    with pytest.raises(StorageError, match="found another model, which would be lost; choose another place"):
        write_checkpoint(base, own, base.tensor)
    assert {file: file.read_bytes() for file in own.iterdir()} == there


def test_a_trainers_directory_is_not_replaced_by_a_checkpoint(base: Checkpoint, tmp_path: Path) -> None:
    write_checkpoint(base, tmp_path / "out", base.tensor)
    write_checkpoint(base, tmp_path / "out", base.tensor)  # what it wrote itself it may replace
    (tmp_path / "out" / "checkpoint-500").mkdir()
    (tmp_path / "out" / "checkpoint-500" / "optimizer.pt").write_text("hours of work")
    with pytest.raises(StorageError, match="found checkpoint-500/optimizer.pt as well, which would be lost"):
        write_checkpoint(base, tmp_path / "out", base.tensor)
    assert (tmp_path / "out" / "checkpoint-500" / "optimizer.pt").exists()


def test_one_file_is_read_before_an_index_as_transformers_does(base: Checkpoint, tmp_path: Path) -> None:
    save_llama(tmp_path / "both", seed=5)
    weights = (tmp_path / "both" / "model.safetensors").read_bytes()
    model = load_model(tmp_path / "both")
    model.save_pretrained(tmp_path / "both", max_shard_size="20KB")
    (tmp_path / "both" / "model.safetensors").write_bytes(weights)
    found = Checkpoint.open(tmp_path / "both")
    assert set(found.shards.values()) == {"model.safetensors"}
    write_checkpoint(found, tmp_path / "copy", found.tensor)
    assert not list((tmp_path / "copy").glob("*.index.json"))


def test_a_checkpoint_without_tensors_is_refused(base: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="expected a model's tensors, found none in its safetensors files"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e5m2, torch.int32])
@pytest.mark.parametrize("place", [None, 0, 7, 8, 20])
def test_what_is_no_number_is_found_in_any_part(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, place: int | None
) -> None:
    monkeypatch.setattr("graftllm.tensors._BLOCK", 8)
    values = torch.arange(21).float()
    if place is not None and dtype.is_floating_point:
        values[place] = float("inf")
    assert is_finite(values.reshape(3, 7).to(dtype)) == (place is None or not dtype.is_floating_point)
