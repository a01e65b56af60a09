import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from graftllm.checkpoint import Checkpoint
from graftllm.errors import RecordError
from graftllm.loading import load_model, load_tokenizer
from graftllm.records import Message, Prompt
from graftllm.rendering import pad, render, render_answered


def test_the_answer_begins_where_the_question_ends(base: Checkpoint, prompts: list[Prompt]) -> None:
    words = load_tokenizer(base.path)
    ids, start = render_answered(words, prompts[0])
    assert ids[:start] == render(words, prompts[0].question, answer_next=True)
    assert words.decode(ids[start:]) == prompts[0].reference + "<end>"
    bare = Prompt("x", prompts[0].question)
    ids, start = render_answered(words, bare)
    assert start == len(ids)


def test_an_answer_never_begins_at_the_first_token(base: Checkpoint, prompts: list[Prompt]) -> None:
    """Nothing foretells that, though a template may render a question otherwise once it is answered."""
    template = "{% if add_generation_prompt %}ab{% else %}cd{% endif %}{{ messages[-1].content }}"
    words = load_tokenizer(base.path, chat_template=template)
    assert render_answered(words, prompts[0])[1] == 1


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


def test_rows_that_a_model_cannot_read_are_refused(base: Checkpoint) -> None:
    words, model = load_tokenizer(base.path), load_model(base.path)
    ids, mask = pad([[5, 6, 7], [8]], words, model)
    assert (ids.tolist(), mask.tolist()) == ([[5, 6, 7], [8, 0, 0]], [[1, 1, 1], [1, 0, 0]])
    assert pad([[5, 6, 7], [8]], words, model, "left")[1].tolist() == [[1, 1, 1], [0, 0, 1]]
    known = model.get_input_embeddings().num_embeddings
    with pytest.raises(RecordError, match=f"its token {known} has no row in the model's embedding of {known}; take"):
        pad([[5, known]], words, model)
    few = GPT2LMHeadModel(GPT2Config(n_positions=20, vocab_size=96, n_embd=16, n_layer=1, n_head=2))
    assert pad([[5] * 20], words, few)[0].shape == (1, 20)
    with pytest.raises(RecordError, match="expected rows of at most 20 tokens, the positions that the model has lear"):
        pad([[5] * 21], words, few)
