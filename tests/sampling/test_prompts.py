import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftllm.errors import RecordError
from graftllm.records import Message, Prompt
from graftllm.sampling.prompts import contamination, load_prompts, without_duplicates
from graftllm.transfer_options import PromptSet

WORDS = "the quick brown fox jumps over the lazy dog and then runs far away from all of the other animals".split()


def _prompt(text: str, id: str = "p") -> Prompt:
    return Prompt(id, (Message(role="user", content=text),))


def _file(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_columns_are_renamed_and_rows_limited(tmp_path: Path) -> None:
    rows = [{"problem": f"{i} + 1?", "solution": i + 1, "checks": ["a", "b"]} for i in range(5)]
    columns = {"prompt": "problem", "reference": "solution", "tests": "checks"}
    path = str(_file(tmp_path / "sums.jsonl", *rows))
    found = load_prompts([PromptSet(files=(path,), columns=columns, limit=2)])
    assert [(one.id, one.messages[0]["content"], one.reference, one.tests) for one in found] == [
        ("1", "0 + 1?", "1", ("a", "b")),
        ("2", "1 + 1?", "2", ("a", "b")),
    ]


def test_parquet_and_jsonl_and_a_data_set_say_the_same(tmp_path: Path) -> None:
    rows = [{"id": f"r{i}", "prompt": f"question {i}", "reference": str(i), "metadata": {"n": i}} for i in range(4)]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "rows.parquet")
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "set" / "train.parquet")
    jsonl = load_prompts([PromptSet(files=(str(_file(tmp_path / "rows.jsonl", *rows)),))])
    assert load_prompts([PromptSet(files=(str(tmp_path / "rows.parquet"),))]) == jsonl
    assert load_prompts([PromptSet(dataset=str(tmp_path / "set"), split="train")]) == jsonl
    assert jsonl[3] == Prompt("r3", _prompt("question 3").messages, "", "3", (), {"n": 3})


def test_conversations_of_sharegpt_are_read(tmp_path: Path) -> None:
    turns = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    path = str(_file(tmp_path / "chats.jsonl", {"conversations": turns}))
    (found,) = load_prompts([PromptSet(files=(path,), columns={"messages": "conversations"})])
    assert [(m["role"], m["content"]) for m in found.messages] == [
        ("system", "Be brief."), ("user", "q"), ("assistant", "a"),
    ]  # fmt: skip
    assert found.answer == "a"


def test_ids_of_several_sets_begin_with_the_sets_name(tmp_path: Path) -> None:
    one, two = (_file(tmp_path / name, {"prompt": name}) for name in ("a.jsonl", "b.jsonl"))
    assert [p.id for p in load_prompts([PromptSet(files=(str(one),))])] == ["1"]
    both = [PromptSet(files=(str(one), str(two)))]
    assert [p.id for p in load_prompts(both)] == ["a.jsonl/1", "b.jsonl/1"]
    assert [p.id for p in load_prompts([PromptSet(files=(str(one), str(one)))])] == ["a.jsonl-0/1", "a.jsonl-1/1"]


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("p.parquet", None, {}, "p.parquet: no such file; expected Parquet rows there"),
        ("p.parquet", "no parquet", {}, "p.parquet: cannot be read as Parquet"),
        ("p.jsonl", "", {}, "p.jsonl: expected at least one row, found none"),
        ("p.jsonl", '{"q": "x"}', {"columns": {"prompt": "ask"}}, "p.jsonl:1: expected the column 'ask', found q"),
        ("p.jsonl", '{"prompt": "x", "tests": 3}', {}, "p.jsonl:1: 'tests': Input should be a valid tuple, found 3"),
    ],
)  # fmt: skip
def test_bad_sets_are_named(tmp_path: Path, name: str, content: str | None, options: dict, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(RecordError, match=message):
        load_prompts([PromptSet(files=(str(tmp_path / name),), **options)])


def test_a_data_set_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="none: `datasets` cannot load it, split 'train'"):
        load_prompts([PromptSet(dataset=str(tmp_path / "none"))])


def test_a_question_is_asked_once() -> None:
    system = Prompt("s", (Message(role="system", content="Be brief."), Message(role="user", content="2 + 2?")))
    prompts = [_prompt("2 + 2?", "a"), _prompt(" 2  +\n2? ", "b"), _prompt("2 - 2?", "c"), _prompt("A?", "d"), system]
    assert [one.id for one in without_duplicates([*prompts, _prompt("a?", "e")])] == ["a", "c", "d", "s", "e"]


@given(st.integers(0, 7), st.integers(9, 14), st.integers(0, 5))
def test_a_shared_run_of_words_is_found_wherever_it_stands(start: int, length: int, before: int) -> None:
    test = _prompt("noise " * 3 + " ".join(WORDS[start : start + length]) + " other words at the end of it", "t")
    prompt = _prompt("x " * before + " ".join(word.upper() for word in WORDS[start : start + length]) + "!", "p")
    found = contamination([prompt], [test], ngram=9)
    assert [(one.prompt_id, one.test_id) for one in found] == [("p", "t")]
    assert found[0].shared in " ".join(WORDS)
    assert contamination([prompt], [test], ngram=length + 1) == []


@pytest.mark.parametrize(
    ("test", "prompt", "found"),
    [
        ("What is 3 + 4?", "what is  3 + 4?", True),  # short tests are compared whole, but for case and space
        ("What is 3 + 4?", "What is 3 - 4?", False),
        ("What is 3 + 4?", "Tell me: What is 3 + 4?", False),
        ("How many moons has the planet Jupiter now", "So: how many moons has the planet Jupiter now?", True),
        ("How many moons has the planet Jupiter now", "How many moons has the planet Saturn now", False),
        (" ".join(WORDS), " ".join(WORDS[:13]), True),
        (" ".join(WORDS), " ".join(WORDS[:12]), False),
        ("小明有三个苹果他又买了五个苹果一共有几个", "请问小明有三个苹果他又买了五个苹果吗", True),
        ("+ - ?", "+ - ?", True),
    ],
)  # fmt: skip
def test_contamination_by_hand(test: str, prompt: str, found: bool) -> None:
    assert bool(contamination([_prompt(prompt)], [_prompt(test)])) is found


def test_answers_and_system_prompts_are_not_compared() -> None:
    answered = Prompt("t", (*_prompt("short").messages, Message(role="assistant", content=" ".join(WORDS))))
    assert contamination([_prompt(" ".join(WORDS))], [answered]) == []
