from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graftllm.checkpoint import Checkpoint
from graftllm.errors import TrainingError
from graftllm.tensors import TensorSpec
from graftllm.training import defaults
from graftllm.training.defaults import batching_for, dpo_for, sft_for
from graftllm.training.memory import Batching
from graftllm.training_options import DpoOptions, SftOptions

LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
FAMILIES = ["llama", "qwen2", "gemma2", "mistral"]


def _model(parameters: int, config: dict[str, Any] | str = "llama") -> Checkpoint:
    config = {"model_type": config} if isinstance(config, str) else config
    return Checkpoint(Path("m"), "m", {"w": TensorSpec("BF16", (parameters,))}, {"w": "m.safetensors"}, config)


@pytest.mark.parametrize(
    ("family", "size", "sft", "dpo"),
    [
        ("llama", 8e9, 5e-6, (8e-7, "length_normalised", 10)),
        ("llama", 3e9, 5e-6, (1e-6, "length_normalised", 10)),
        ("llama", 1.2e9, 5e-6, (1e-6, "length_normalised", 10)),
        ("qwen2", 7.6e9, 2e-6, (3e-7, "sigmoid", 0.01)),
        ("gemma2", 9.2e9, 2e-6, (5e-7, "sigmoid", 0.01)),
        ("mistral", 7e9, 5e-6, (8e-7, "sigmoid", 0.1)),
    ],
)
def test_published_targets_get_the_published_values(family: str, size: float, sft: float, dpo: tuple) -> None:
    target = _model(int(size), family)
    found = dpo_for(DpoOptions(), target)
    assert sft_for(SftOptions(), target).learning_rate == sft
    assert (found.learning_rate, found.loss, found.beta) == dpo


@given(st.sampled_from(FAMILIES), st.integers(1000, 10**11), st.integers(1000, 10**11))
def test_a_larger_model_of_a_family_never_gets_a_higher_learning_rate(family: str, one: int, other: int) -> None:
    small, large = sorted((one, other))
    for fill, options in ((sft_for, SftOptions()), (dpo_for, DpoOptions())):
        rates = [fill(options, _model(size, family)).learning_rate for size in (small, large)]
        assert rates[0] >= rates[1]


@given(st.sampled_from(FAMILIES), st.integers(1000, 10**11))
def test_what_a_recipe_says_stays(family: str, size: int) -> None:
    sft = SftOptions(learning_rate=5e-6)
    dpo = DpoOptions(learning_rate=8e-7, loss="sigmoid", beta=0.1)  # the defaults, but said
    assert sft_for(sft, _model(size, family)) == sft
    assert dpo_for(dpo, _model(size, family)) == dpo


def test_options_that_were_chosen_once_are_chosen() -> None:
    target = _model(10**6)
    chosen = dpo_for(DpoOptions(epochs=2), target)
    assert chosen.epochs == 2
    assert chosen.learning_rate == 2e-5
    assert dpo_for(chosen, _model(10**10, "qwen2")) == chosen


def test_beta_follows_the_loss_and_a_beta_alone_is_the_ordinary_losss() -> None:
    llama, qwen = _model(8 * 10**9), _model(7 * 10**9, "qwen2")
    assert dpo_for(DpoOptions(loss="sigmoid"), llama).beta == 0.1
    assert dpo_for(DpoOptions(loss="length_normalised"), qwen).beta == 10
    assert dpo_for(DpoOptions(beta=0.3), llama).loss == "sigmoid"


def _batching(options: SftOptions, model: Checkpoint, tokens: int = 2048) -> Batching:
    return batching_for(
        options, model, tokens=tokens, device=torch.device("cpu"), trained=model.parameters, label="SFT sums"
    )


@given(st.integers(1, 256), st.floats(1e6, 1e13), st.sampled_from([1, 2, 8]))
def test_what_goes_through_makes_a_batch_whatever_the_memory(batch: int, memory: float, processes: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(defaults, "_memory", lambda device: memory)
        patch.setenv("WORLD_SIZE", str(processes))
        options = SftOptions(batch_size=batch * processes)
        found = _batching(options, _model(10**9, LLAMA_8B))
        assert found.rows * found.accumulate * processes == options.batch_size
        patch.setattr(defaults, "_memory", lambda device: 2 * memory)
        assert _batching(options, _model(10**9, LLAMA_8B)).rows >= found.rows


def test_a_batch_of_128_fits_beside_8_billion_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "_memory", lambda device: 135e9)
    found = _batching(SftOptions(), _model(8 * 10**9, LLAMA_8B))
    assert found == Batching(rows=1, accumulate=128, checkpointing=True)
    monkeypatch.setattr(defaults, "_memory", lambda device: 1e15)
    assert _batching(SftOptions(), _model(8 * 10**9, LLAMA_8B)) == Batching(128, 1, False)


def test_as_many_rows_at_once_as_asked_for() -> None:
    found = _batching(SftOptions(batch_size=12, micro_batch=4), _model(10**6, LLAMA_8B), tokens=16)
    assert (found.rows, found.accumulate) == (4, 3)


@pytest.mark.parametrize(("batch", "micro", "processes"), [(12, 5, 1), (12, 4, 2), (9, None, 2)])
def test_a_batch_that_cannot_be_divided_is_said(
    batch: int, micro: int | None, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(TrainingError, match=f"SFT sums: expected a batch_size that {processes} processes times"):
        _batching(SftOptions(batch_size=batch, micro_batch=micro), _model(10**6, LLAMA_8B))
