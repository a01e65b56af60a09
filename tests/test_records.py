import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftllm.errors import RecordError
from graftllm.records import (
    Message,
    PreferencePair,
    Prompt,
    Response,
    appending,
    prompt_row,
    read_calibration,
    read_pairs,
    read_prompts,
    read_responses,
    write_rows,
)

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(st.lists(st.builds(Response, text, text, st.integers(0, 9), text, st.none() | st.floats(0, 1)), max_size=5))
def test_responses_come_back_as_written(tmp_path_factory: pytest.TempPathFactory, responses: list[Response]) -> None:
    path = tmp_path_factory.mktemp("rows") / "responses.jsonl"
    write_rows(path, responses[:2])
    with appending(path) as append:
        append(responses[2:3])
        append(responses[3:])
    assert read_responses(path) == responses


def test_a_half_written_last_response_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    whole = [Response("a", "s", 0, "x"), Response("b", "s", 0, "y")]
    write_rows(path, whole)
    data = path.read_bytes()
    for cut in range(len(data.splitlines(keepends=True)[0]), len(data)):
        path.write_bytes(data[:cut])
        assert read_responses(path) == whole[:1]


def test_a_half_written_last_response_is_mended_before_others_follow(tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    whole = [Response("a", "s", 0, "x" * 70000), Response("b", "s", 0, "y" * 70000)]
    write_rows(path, whole)
    data = path.read_bytes()
    first = data.index(b"\n") + 1
    for cut in (len(data) - 1, len(data) - 66000, first, first - 1, 9, 0):
        path.write_bytes(data[:cut])
        with appending(path) as append:
            append([Response("c", "s", 0, "z")])
        assert [row.prompt_id for row in read_responses(path)] == (["a", "c"] if cut >= first else ["c"])


def test_prompt_string_stands_for_one_user_message(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "hi", "reference": 3, "extra": [1]}\n\n{"id": 7, "prompt": "ho"}\n')
    first, second = read_prompts(tmp_path / "p.jsonl")
    assert first == Prompt("1", (Message(role="user", content="hi"),), "", "3")
    assert second.id == "7"


def test_answer_is_the_last_assistant_message_or_else_the_reference() -> None:
    question = Message(role="user", content="q")
    answered = Prompt("1", (question, Message(role="assistant", content="a")), "", "r")
    assert (answered.question, answered.answer) == ((question,), "a")
    open_question = Prompt("1", (question,), "", "r")
    assert (open_question.question, open_question.answer) == ((question,), "r")


def test_rows_as_trl_has_them_are_read_with_their_answers(tmp_path: Path) -> None:
    message, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    rows = [
        {"prompt": "q", "completion": "a"},
        {"prompt": [message], "completion": [answer]},
        {"prompt": "q", "completion": "b", "reference": "a"},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = read_prompts(tmp_path / "p.jsonl")
    assert [(row.question, row.answer, row.reference) for row in found] == [((message,), "a", "a")] * 3


@given(st.lists(st.sampled_from(("user", "assistant")), min_size=1), st.data())
def test_a_completion_of_several_messages_is_the_rest_of_the_conversation(
    roles: list[str], data: st.DataObject
) -> None:
    messages = [{"role": role, "content": str(i)} for i, role in enumerate(["user", *roles, "assistant"])]
    cut = data.draw(st.integers(1, len(messages) - 1))
    whole = prompt_row({"messages": messages}, "here", 1)
    found = prompt_row({"prompt": messages[:cut], "completion": messages[cut:]}, "here", 1)
    assert (found.messages, found.question, found.answer) == (whole.messages, whole.question, whole.answer)
    assert found.reference == messages[-1]["content"]


def test_pairs_come_back_as_written(tmp_path: Path) -> None:
    pair = PreferencePair("1", (Message(role="user", content="q"),), "good", "bad", "source")
    write_rows(tmp_path / "pairs.jsonl", [pair])
    assert read_pairs(tmp_path / "pairs.jsonl") == [pair]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "p.jsonl: expected at least one row, found an empty file"),
        ("{", "p.jsonl:1: expected one JSON object a line, found {"),
        ("[" * 100_000, r"p.jsonl:1: expected one JSON object a line, found \[\["),
        ('{"n": ' + "9" * 5000 + "}", "p.jsonl:1: expected one JSON object a line, found .*Exceeds the limit"),
        (r'{"prompt": "a\uD83D"}', "p.jsonl:1: expected one JSON object a line, found .*surrogates not allowed"),
        ("[1]", r"p.jsonl:1: expected a JSON object, found \[1\]"),
        ('{"id": "a"}', "p.jsonl:1: expected 'messages' or a 'prompt' string, found the keys 'id'"),
        ('{"messages": []}', "p.jsonl:1: 'messages' has nothing to answer"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "p.jsonl:1: 'messages' has nothing to answer"),
        ('{"messages": 3}', "p.jsonl:1: 'messages': Input should be a valid tuple, found 3"),
        ('{"messages": [{"role": "user"}]}', "p.jsonl:1: 'messages.0.content': Field required"),
        (
            '{"prompt": "x", "completion": 3}',
            "p.jsonl:1: 'completion': expected a text, or messages of which the last is the assistant's, found 3.",
        ),
        (
            '{"prompt": "x", "completion": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}',
            r"p.jsonl:1: 'completion': expected a text, or messages of which the last is the assistant's, found \[{",
        ),
        ('{"prompt": "x", "completion": []}', r"p.jsonl:1: 'completion': expected a text, or messages .* found \[\]."),
        (
            '{"prompt": "x", "completion": ["a"]}',
            r"p.jsonl:1: 'completion': expected a text, or messages .* found \['a",
        ),
        (
            '{"prompt": [], "completion": [{"role": "assistant", "content": "a"}]}',
            "p.jsonl:1: 'messages' has nothing to",
        ),
        ('{"prompt": [3], "completion": "a"}', "p.jsonl:1: 'messages.0': Input should be a valid dictionary, found 3"),
        ('{"id": "a", "prompt": "x"}\n{"id": "a", "prompt": "y"}', "p.jsonl:2: id 'a' is already taken"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(RecordError, match=message):
        read_prompts(tmp_path / "p.jsonl")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"none.jsonl: no such file; expected JSONL rows there"):
        read_prompts(tmp_path / "none.jsonl")


def test_paragraphs_calibrate_as_well(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("first\nparagraph\n\n \t\n\nsecond\n")
    found = read_calibration(tmp_path / "text.txt")
    assert [prompt.messages[0]["content"] for prompt in found] == ["first\nparagraph", "second"]


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"id": "1", "prompt": "x"}\n', encoding="utf-8-sig")
    (tmp_path / "text.txt").write_text("x\n", encoding="utf-8-sig")
    for name in ("rows.jsonl", "text.txt"):
        assert [prompt.messages[0]["content"] for prompt in read_calibration(tmp_path / name)] == ["x"]


def test_text_without_paragraphs_and_missing_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(RecordError, match="expected paragraphs of text or JSONL rows, found an empty file"):
        read_calibration(tmp_path / "empty.txt")
    with pytest.raises(RecordError, match="no such file"):
        read_calibration(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes("Straße".encode("latin-1"))
    with pytest.raises(RecordError, match=r"latin.txt: expected JSONL rows or a text file in UTF-8 \(not UTF-8\)"):
        read_calibration(tmp_path / "latin.txt")
    with pytest.raises(RecordError, match=r"expected JSONL rows or a text file in UTF-8 \(Is a directory\)"):
        read_calibration(tmp_path)
