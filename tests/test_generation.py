from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, GPT2Config, OPTConfig, PreTrainedConfig

from graftllm.checkpoint import Checkpoint
from graftllm.errors import CheckpointError, RecipeError, RecordError
from graftllm.generation import (
    _answer,
    _length,
    generate,
    generate_answers,
    load_model,
    load_tokenizer,
    render,
    render_answered,
    stream,
)
from graftllm.recipe import SamplingOptions
from graftllm.records import Message, Prompt
from tests.models import save_reward_model

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


@pytest.mark.parametrize("config", [GPT2Config(n_positions=20), OPTConfig(max_position_embeddings=20)])
def test_answers_end_where_learned_positions_do(base: Checkpoint, config: PreTrainedConfig) -> None:
    small = {"vocab_size": 96, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 16}
    ends = {"bos_token_id": 0, "eos_token_id": 95, "pad_token_id": 0, "word_embed_proj_dim": 16}
    model = AutoModelForCausalLM.from_config(type(config)(**(config.to_diff_dict() | small | ends))).eval()
    words = load_tokenizer(base.path)
    question = [Message(role="user", content="abc")]
    room = 20 - len(render(words, question, answer_next=True))
    options = GREEDY.model_copy(update={"max_new_tokens": 100})
    answer = generate_answers(model, words, [question], options)[0][0]
    assert answer.output_tokens == room
    assert answer.truncated
    assert "".join(stream(model, words, question, options)) == answer.text
    with pytest.raises(RecordError, match="expected prompts of fewer tokens than the 20 positions that the model has"):
        generate_answers(model, words, [[Message(role="user", content="abc" * 10)]], options)


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


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_stream_ends_before_a_stop_text_however_it_comes(
    base: Checkpoint, prompts: list[Prompt], length: int
) -> None:
    model, words = load_model(base.path), load_tokenizer(base.path)
    whole = generate(model, words, [prompts[0].question], GREEDY)[0][0]
    for stop in (whole[4 : 4 + length], whole[4 : 4 + length] + "~"):
        options = GREEDY.model_copy(update={"stop": (stop, "never")})
        expected = generate(model, words, [prompts[0].question], options)[0][0]
        assert "".join(stream(model, words, prompts[0].question, options)) == expected
        assert (expected == whole) == stop.endswith("~")


def test_a_stream_is_one_answer(base: Checkpoint, prompts: list[Prompt]) -> None:
    model, words = load_model(base.path), load_tokenizer(base.path)
    with pytest.raises(RecipeError, match="samples: expected 1 for a stream, which is one answer; found 3."):
        next(stream(model, words, prompts[0].question, DRAWN))


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


def test_a_conversation_that_the_template_refuses_is_told(base: Checkpoint) -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}x"
    tokenizer = load_tokenizer(base.path, chat_template=refusing)
    asked = [Message(role="system", content="be kind"), Message(role="user", content="hi")]
    with pytest.raises(RecordError, match="its chat template refuses a conversation of system, user .System role not"):
        render(tokenizer, asked, answer_next=True)


def test_a_given_chat_template_stands_in_for_the_tokenizers_own(base: Checkpoint, tmp_path: Path) -> None:
    template = "{% for m in messages %}<user>{{ m.content }}{% endfor %}{% if add_generation_prompt %}?{% endif %}"
    (tmp_path / "chat.jinja").write_text(template)
    for given in (template, str(tmp_path / "chat.jinja")):
        words = load_tokenizer(base.path, chat_template=given)
        assert words.decode(render(words, [Message(role="user", content="ab")], answer_next=True)) == "<user>ab?"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("no/chat.jinja", r"chat_template: expected a Jinja template or a file that holds one, found 'no/chat.jinja'"),
        ("{% for m in messages %}", r"chat_template: expected a Jinja template that renders a user's message \(Unexp"),
        ("{{ raise_exception('no users') }}", r"that renders a user's message \(no users\)\.$"),
    ],
)
def test_what_is_no_chat_template_is_refused(base: Checkpoint, given: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(base.path, chat_template=given)


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


def test_a_parameter_that_the_checkpoint_lacks_is_not_drawn_at_random(tmp_path: Path) -> None:
    save_reward_model(tmp_path)
    with pytest.raises(
        CheckpointError,
        match=r"has no tensor for 'lm_head.weight' of LlamaForCausalLM, which .* config.json names another class",
    ):
        load_model(tmp_path)


def test_tokens_are_counted_to_the_end_of_the_answer_or_to_the_padding() -> None:
    for ends in (3, [3, 7]):
        config = GenerationConfig(eos_token_id=ends, pad_token_id=0)
        rows = ([5, 6, 3, 0], [5, 0, 6, 0], [5, 6, 8, 9])
        assert [_length(tokens, config) for tokens in rows] == [(3, True), (3, False), (4, False)]
    assert _length([5, 0, 0], GenerationConfig(eos_token_id=0, pad_token_id=0)) == (2, True)


@pytest.mark.parametrize(
    ("tokens", "text", "truncated"),
    [
        ([5, 6, 7, 8], "abcd", True),
        ([5, 6, 7, 3], "abc", False),  # the last token allowed is the end
        ([5, 6, 3, 0], "ab", False),
        ([5, 6, 7, 8], "ab..", False),  # the last token allowed makes the stop text whole
        ([5, 6, 0, 0], "ab", False),  # a stop text that is a special token is in no text
    ],
)
def test_an_answer_is_cut_off_when_only_the_limit_ended_it(tokens: list[int], text: str, truncated: bool) -> None:
    config = GenerationConfig(eos_token_id=3, pad_token_id=0, max_new_tokens=4, stop_strings=[".."])
    found = _answer(text, tokens, 7, config)
    assert (found.text, found.input_tokens, found.truncated) == (text.removesuffix(".."), 7, truncated)


@pytest.mark.parametrize("limit", [1, 3, 12])
def test_what_is_longer_than_the_limit_is_cut_off(base: Checkpoint, prompts: list[Prompt], limit: int) -> None:
    model, words = load_model(base.path), load_tokenizer(base.path)
    conversations = [prompt.question for prompt in prompts[:12]]

    def lengths(limit: int) -> list[tuple[int, bool]]:
        answers = generate_answers(
            model, words, conversations, GREEDY.model_copy(update={"max_new_tokens": limit, "stop": ("a",)})
        )
        return [(answer.output_tokens, answer.truncated) for (answer,) in answers]

    whole = lengths(60)
    assert [cut for _, cut in lengths(limit)] == [length > limit for length, _ in whole]
