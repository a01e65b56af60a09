from pathlib import Path

import pytest
import torch

from graftllm.checkpoint import Checkpoint
from graftllm.errors import FusionError
from graftllm.fusion.features import WIDEST, folded, prompt_features
from graftllm.loading import load_model, load_tokenizer
from graftllm.records import Message, Prompt
from graftllm.rendering import render
from tests.architectures import CONFIGS, load, save_base
from tests.models import tokenizer


def test_features_are_pooled_states_of_unit_length(base: Checkpoint, prompts: list[Prompt]) -> None:
    model, words = load_model(base.path), load_tokenizer(base.path)
    found = prompt_features(model, words, [prompts[0].question], layer=1)
    ids = torch.tensor([render(words, prompts[0].question, answer_next=True)])
    states = model(input_ids=ids, output_hidden_states=True).hidden_states
    embedded, hidden = (torch.nn.functional.normalize(state[0], dim=1) for state in states[:2])
    expected = torch.cat([embedded.mean(dim=0), hidden.mean(dim=0), hidden[-1]])
    assert torch.allclose(found[0], expected, atol=1e-6)


def test_features_do_not_depend_on_the_rest_of_the_batch(base: Checkpoint, prompts: list[Prompt]) -> None:
    model, words = load_model(base.path), load_tokenizer(base.path)
    questions = [prompt.question for prompt in prompts[:3]]
    questions.append((Message(role="user", content="a much longer question than the others are"),))
    together = prompt_features(model, words, questions, layer=2)
    assert together.shape == (4, 96)
    alone = torch.cat([prompt_features(model, words, [question], layer=2) for question in questions])
    assert torch.allclose(together, alone, atol=1e-4)


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - {"t5", "bert", "vit"}))
def test_every_causal_architecture_has_features(name: str, tmp_path: Path, prompts: list[Prompt]) -> None:
    model, words = load(name, save_base(name, tmp_path / name, dtype=torch.float32)), tokenizer()
    questions = [prompts[0].question, (Message(role="user", content="a longer one"),)]
    together = prompt_features(model, words, questions)
    assert together.shape == (2, 3 * model.config.get_text_config().hidden_size)
    alone = torch.cat([prompt_features(model, words, [question]) for question in questions])
    assert torch.allclose(together, alone, atol=1e-4)


def test_layers_behind_the_one_asked_for_do_not_run(base: Checkpoint, prompts: list[Prompt]) -> None:
    model, words = load_model(base.path), load_tokenizer(base.path)
    expected = prompt_features(model, words, [prompts[0].question])
    model.model.layers[1].forward = None  # would fail if it were called
    assert torch.equal(prompt_features(model, words, [prompts[0].question]), expected)
    assert not model.model.layers[0]._forward_hooks


def test_a_layer_that_the_model_lacks_is_named(base: Checkpoint, prompts: list[Prompt]) -> None:
    model, words = load_model(base.path), load_tokenizer(base.path)
    with pytest.raises(FusionError, match="router.layer: expected 1 to 2, the layers of this base; found 3"):
        prompt_features(model, words, [prompts[0].question], layer=3)


def test_wide_features_are_folded_and_keep_their_inner_products() -> None:
    draw = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(40, 6000, generator=draw), dim=1)
    vectors[1] = vectors[0]
    short = folded(vectors)
    assert short.shape == (40, WIDEST)
    assert (short @ short.T - vectors @ vectors.T).abs().max() < 0.3
    assert torch.equal(short[0], short[1])
    assert folded(vectors[:, :WIDEST]).data_ptr() == vectors.data_ptr()
