from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from graftllm.checkpoint import Checkpoint
from graftllm.errors import CheckpointError
from graftllm.generation import _length, generate, load_model, load_tokenizer, render, render_answered, stream
from graftllm.recipe import SamplingOptions
from graftllm.records import Message, Prompt

GREEDY = SamplingOptions(samples=1, temperature=0, top_p=1, max_new_tokens=12, batch_size=7)
DRAWN = SamplingOptions(samples=3, temperature=1.0, top_p=1.0, max_new_tokens=12, batch_size=7)


def test_a_batch_answers_as_each_conversation_alone(base: Checkpoint, prompts: list[Prompt]) -> None:
    model, words = load_model(base.path), load_tokenizer(base.path)
    conversations = [prompt.question for prompt in prompts[:9]]
    conversations.append((Message(role="user", content="something quite a bit longer"),))
    together = generate(model, words, conversations, GREEDY)
    assert together == [generate(model, words, [conversation], GREEDY)[0] for conversation in conversations]


def test_draws_differ_by_sample_and_repeat_by_seed(base: Checkpoint, prompts: list[Prompt]) -> None:
    model, words = load_model(base.path), load_tokenizer(base.path)
    conversations = [prompt.question for prompt in prompts[:8]]
    first = generate(model, words, conversations, DRAWN, seed=1)
    assert [len(texts) for texts in first] == [3] * 8
    assert any(len(set(texts)) > 1 for texts in first)
    assert generate(model, words, conversations, DRAWN, seed=1) == first
    assert generate(model, words, conversations, DRAWN, seed=2) != first


def test_progress_is_shown_to_the_end(base: Checkpoint, prompts: list[Prompt]) -> None:
    model, words = load_model(base.path), load_tokenizer(base.path)
    seen: list[tuple[int, int]] = []
    generate(
        model, words, [p.question for p in prompts[:10]], GREEDY, show=lambda done, total: seen.append((done, total))
    )
    assert seen == [(7, 10), (10, 10)]


def test_a_stream_yields_the_same_answer_in_pieces(base: Checkpoint, prompts: list[Prompt]) -> None:
    model, words = load_model(base.path), load_tokenizer(base.path)
    assert (
        "".join(stream(model, words, prompts[0].question, GREEDY))
        == generate(model, words, [prompts[0].question], GREEDY)[0][0]
    )


def test_a_failing_stream_raises_instead_of_waiting(base: Checkpoint, prompts: list[Prompt]) -> None:
    model, words = load_model(base.path), load_tokenizer(base.path)
    model.model.layers[0].mlp.up_proj.weight.data = torch.zeros(3, 3)
    with pytest.raises(RuntimeError):
        list(stream(model, words, prompts[0].question, GREEDY))


def test_the_answer_begins_where_the_question_ends(base: Checkpoint, prompts: list[Prompt]) -> None:
    words = load_tokenizer(base.path)
    ids, start = render_answered(words, prompts[0])
    assert ids[:start] == render(words, prompts[0].question, answer_next=True)
    assert words.decode(ids[start:]) == prompts[0].reference + "<end>"
    bare = Prompt("x", prompts[0].question)
    ids, start = render_answered(words, bare)
    assert start == len(ids)


def test_without_a_chat_template_contents_stand_one_below_the_other(base: Checkpoint) -> None:
    words = load_tokenizer(base.path)
    words.chat_template = None
    messages = [Message(role="user", content="ab"), Message(role="assistant", content="cd")]
    assert render(words, messages, answer_next=False) == words("ab\ncd")["input_ids"]
    assert render(words, messages[:1], answer_next=True) == words("ab\n")["input_ids"]


def test_models_are_loaded_in_float32_on_cpu(base: Checkpoint) -> None:
    assert load_model(base.path).dtype == torch.float32


def test_what_is_no_language_model_is_named(tmp_path: Path, base_dir: Path) -> None:
    with pytest.raises(CheckpointError, match="found nothing"):
        load_model(tmp_path / "none")
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    (tmp_path / "model.safetensors").write_bytes((base_dir / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="transformers cannot load it as a causal language model"):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match="transformers cannot load its tokenizer"):
        load_tokenizer(tmp_path)


def test_tokens_are_counted_to_the_end_of_the_answer_or_to_the_padding() -> None:
    for ends in (3, [3, 7]):
        config = GenerationConfig(eos_token_id=ends, pad_token_id=0)
        assert [_length(tokens, config) for tokens in ([5, 6, 3, 0], [5, 0, 6, 0], [5, 6, 8, 9])] == [3, 3, 4]
    assert _length([5, 0, 0], GenerationConfig(eos_token_id=0, pad_token_id=0)) == 2
