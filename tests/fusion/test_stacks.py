from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import PreTrainedModel
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from graftllm.checkpoint import Checkpoint
from graftllm.delta import Delta
from graftllm.fusion.beside import Beside
from graftllm.fusion.branches import Branch
from graftllm.fusion.stacks import Batch, Stacked, multiplied, normed, takes_rows, with_values
from graftllm.loading import load_model
from graftllm.packer import compress
from graftllm.packing_options import PackOptions
from graftllm.skillpack import SkillPack
from tests.models import perturb, save_llama

NAMES = ("a", "b", "c", "d")


@given(data=st.data())
def test_the_grouped_product_is_each_rows_own(data: st.DataObject) -> None:
    size, tokens = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 3))
    weights = st.sampled_from([-0.5, 1.0, 2.0])
    mixes = [
        tuple(sorted(data.draw(st.dictionaries(st.sampled_from(NAMES), weights, max_size=3)).items()))
        for _ in range(size)
    ]
    draw = torch.Generator().manual_seed(0)
    module = nn.Linear(5, 7)
    branches = [
        Branch((torch.randn(7, rank, generator=draw), torch.randn(rank, 5, generator=draw)), {}) if rank else None
        for rank in (2, 3, 0, 1)
    ]
    stacked, batch = Stacked.of(branches, module, {}), Batch(mixes, NAMES)
    for _ in range(2):  # the second time with what the first has made
        x, output = torch.randn(size, tokens, 5, generator=draw), torch.randn(size, tokens, 7, generator=draw)
        expected = output.clone()
        for row, mix in enumerate(mixes):
            for name, weight in mix:
                branch = branches[NAMES.index(name)]
                if branch is not None and isinstance(branch.weight, tuple):
                    left, right = branch.weight
                    expected[row] += weight * x[row] @ right.T @ left.T
        before = output.clone()
        found = multiplied(stacked, batch, x, output) if batch.lanes else output
        torch.testing.assert_close(found, expected)
        assert torch.equal(output, before)


@pytest.mark.parametrize(("module", "expected"), [
    (LlamaRMSNorm(6), True), (Gemma2RMSNorm(6), True), (nn.LayerNorm(6), False), (nn.RMSNorm(6), False),
])  # fmt: skip
def test_norms_run_with_the_vectors_of_each_row(module: nn.Module, expected: bool) -> None:
    names = [name for name, _ in module.named_parameters()]
    assert takes_rows(module, names) is expected
    draw = torch.Generator().manual_seed(0)
    deltas = [{name: torch.randn(6, generator=draw) for name in names} for _ in range(2)]
    stacked = Stacked.of([Branch(None, one) for one in deltas], module, {})
    x = torch.randn(3, 4, 6, generator=draw)
    with torch.no_grad():
        found = normed(module, stacked, Batch([(("a", 1.0),), (), (("b", 0.5),)], ("a", "b")), [x])
        for row, (delta, weight) in enumerate(((deltas[0], 1.0), (deltas[0], 0.0), (deltas[1], 0.5))):
            values = {name: module.get_parameter(name) + weight * delta[name] for name in names}
            torch.testing.assert_close(found[row], with_values(module, values, x[row]))


def test_a_module_gets_its_own_values_back_when_its_code_fails() -> None:
    module = nn.LayerNorm(4)
    own = module.weight
    with pytest.raises(RuntimeError):
        with_values(module, {"weight": torch.ones(3)}, torch.ones(1, 4))
    assert module.weight is own


@pytest.fixture
def carried(tmp_path: Path) -> tuple[PreTrainedModel, SkillPack]:
    """A model and a pack in factors for it."""
    base = save_llama(tmp_path / "base", dtype=torch.float32)
    tuned = perturb(base, tmp_path / "tuned", seed=1)
    pack = compress(Delta(Checkpoint.open(base), Checkpoint.open(tuned)), PackOptions(strategy="paper", energy=0.9))
    return load_model(base), pack


def test_a_base_that_changes_between_two_batches_of_the_same_rows_is_seen(
    carried: tuple[PreTrainedModel, SkillPack],
) -> None:
    model, pack = carried
    norm = model.get_parameter("model.layers.0.input_layernorm.weight")
    ids = torch.arange(4, 16).reshape(2, 6)
    beside = Beside(model, {"a": pack})
    with torch.inference_mode(), beside.rows(["a", None]):
        model(input_ids=ids)
    norm.data = norm.data + 0.5
    with torch.inference_mode():
        with beside.rows(["a", None]):
            found = model(input_ids=ids).logits
        with beside.rows(["a"]):  # other rows, for which nothing was kept
            expected = model(input_ids=ids[:1]).logits
    torch.testing.assert_close(found[:1], expected, rtol=1e-4, atol=1e-4)


def test_a_norm_has_its_own_vector_after_an_error_in_the_middle_of_a_batch(
    carried: tuple[PreTrainedModel, SkillPack],
) -> None:
    model, pack = carried
    norm = model.get_submodule("model.layers.1.input_layernorm")
    before, plain = norm.weight, norm.forward

    def fail(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("a bug of the model")

    with Beside(model, {"a": pack}).rows(["a"]):
        model(input_ids=torch.arange(4, 16).reshape(1, 12))
        norm.forward = fail
        with pytest.raises(ValueError, match="a bug of the model"):
            model(input_ids=torch.arange(4, 16).reshape(1, 12))
        assert norm.weight is before
    norm.forward = plain
