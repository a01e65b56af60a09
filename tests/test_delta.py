from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from graftllm.checkpoint import Checkpoint
from graftllm.delta import Delta
from graftllm.errors import CheckpointError
from tests.models import perturb, save_llama


def test_delta_is_tuned_minus_base_in_float32(base: Checkpoint, tuned: Checkpoint) -> None:
    delta = Delta(base, tuned)
    assert list(delta) == base.names()
    assert len(delta) == len(base.specs)
    for name, change in delta.items():
        assert change.dtype == torch.float32
        assert torch.equal(change, tuned.tensor(name).float() - base.tensor(name).float())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_diverged_tuned_model_is_refused(base_dir: Path, tmp_path: Path, value: float) -> None:
    broken = perturb(base_dir, tmp_path / "broken", seed=2)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][3] = value
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    delta = Delta(Checkpoint.open(base_dir), Checkpoint.open(broken))
    with pytest.raises(
        CheckpointError, match=r"tensor 'model.norm.weight': 1 of 32 differences to the base are NaN or"
    ):
        delta["model.norm.weight"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 64}, r"not the same architecture; check that one was trained from the other"),
        ({"num_hidden_layers": 3}, r"has no tensor 'model.layers.2.input_layernorm.weight', which .*other has"),
        ({"tie_word_embeddings": False}, r"base: ties the output head to its embedding, but .*other has its own"),
        ({"dtype": torch.float32}, r"is F32, but .*base has BF16. Save both in the same dtype"),
    ],
)
def test_models_of_different_shape_or_tying_are_refused(
    base: Checkpoint, tmp_path: Path, change: dict, message: str
) -> None:
    other = Checkpoint.open(save_llama(tmp_path / "other", **change))
    with pytest.raises(CheckpointError, match=message):
        Delta(base, other)


def test_models_of_different_vocabularies_are_refused(base_dir: Path, base: Checkpoint, tmp_path: Path) -> None:
    other = perturb(base_dir, tmp_path / "other", seed=0)
    tensors = load_file(other / "model.safetensors")
    words = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = torch.cat([words, words[:2]])
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"has shape \[75, 32\], but .* has \[73, 32\]. Their vocabularies differ"
    ):
        Delta(base, Checkpoint.open(other))
