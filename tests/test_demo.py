from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer

from graftllm.demo import DEMO, GENERAL, NEXT, REVERSE, SORT, WordTask, word_rows
from tests.conftest import TinyRun


@pytest.mark.parametrize(
    ("task", "answer"),
    [
        (REVERSE, "ACZB"), (SORT, "ABCZ"), (NEXT, "CADB"), (GENERAL[0], "BZCA"), (GENERAL[1], "B"), (GENERAL[2], "A"),
        (GENERAL[3], "4"), (GENERAL[4], "bzca"),
    ],
    ids=lambda part: getattr(part, "name", part),
)  # fmt: skip
def test_tasks_have_the_answers_that_their_wording_asks_for(task: WordTask, answer: str) -> None:
    assert task.answer("BZCA") == answer


def test_rows_are_different_and_repeat_by_seed() -> None:
    rows = word_rows(REVERSE, 500, seed=1)
    assert len({row.messages[0]["content"] for row in rows}) == 500
    assert word_rows(REVERSE, 500, seed=1) == rows
    assert word_rows(REVERSE, 500, seed=2) != rows


def test_test_words_never_occur_elsewhere() -> None:
    def words(**options: object) -> set[str]:
        return {row.reference for seed in range(3) for row in word_rows(GENERAL[0], 2000, seed=seed, **options)}

    assert not words(test=True) & words()


def test_the_zoo_is_heterogeneous() -> None:
    built = [member.config(100, 0, 1) for member in DEMO.members]
    assert len({config.model_type for config in built}) == 4
    assert len({member.markers for member in DEMO.members}) == 4


def test_members_are_ordinary_checkpoints(tiny_run: TinyRun) -> None:
    zoo = tiny_run.directory / "zoo"
    kinds = {AutoConfig.from_pretrained(zoo / name).model_type for name in ("target", "qwen3-next", "mistral-double")}
    assert kinds == {"llama", "qwen3", "mistral"}
    sizes = {len(AutoTokenizer.from_pretrained(zoo / name)) for name in ("target", "qwen3-next", "mistral-double")}
    assert len(sizes) == 3
    assert not list(Path(zoo).glob(".*"))
