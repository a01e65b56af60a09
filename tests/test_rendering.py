import pytest

from graftllm.checkpoint import Checkpoint
from graftllm.errors import RecordError
from graftllm.loading import load_tokenizer
from graftllm.records import Message, Prompt
from graftllm.rendering import render, render_answered


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
