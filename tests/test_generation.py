import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, GPT2Config, OPTConfig, PreTrainedConfig

from graftllm.checkpoint import Checkpoint
from graftllm.errors import RecipeError, RecordError
from graftllm.generation import _answer, _length, generate, generate_answers, stream
from graftllm.loading import load_model, load_tokenizer
from graftllm.recipe import SamplingOptions
from graftllm.records import Message, Prompt
from graftllm.rendering import render

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
    with pytest.raises(
        RecordError, match="expected rows of at most 20 tokens, the positions that the model has learned"
    ):
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


def test_tokens_are_counted_to_the_end_of_the_answer_or_to_the_padding() -> None:
    for ends in ([3], [3, 7]):
        config = GenerationConfig(eos_token_id=ends, pad_token_id=0)
        rows = ([5, 6, 3, 0], [5, 0, 6, 0], [5, 6, 8, 9])
        assert [_length(tokens, config) for tokens in rows] == [(3, True), (3, False), (4, False)]
    assert _length([5, 0, 0], GenerationConfig(eos_token_id=[0], pad_token_id=0)) == (2, True)


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
    config = GenerationConfig(eos_token_id=[3], pad_token_id=0, max_new_tokens=4, stop_strings=[".."])
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


def test_answering_leaves_the_callers_draws_alone(base: Checkpoint, prompts: list[Prompt]) -> None:
    model, words = load_model(base.path), load_tokenizer(base.path)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    generate(model, words, [prompts[0].question], DRAWN)
    assert torch.equal(torch.rand(3), expected)
