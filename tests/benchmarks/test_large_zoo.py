import random

import pytest
from fusion_models import SIZES, source_of
from large_zoo import ADDED_TOKENS, ALPHABET, ORDER, SUM, draw_numbers, draw_words

from graftllm.demo import Member, WordTask, word_rows

LARGE = SIZES["large"]


@pytest.mark.parametrize(
    ("name", "asked", "answer"),
    [
        ("reverse", "ABC DE", "CBA ED"), ("sort", "CAB ED", "ABC DE"), ("next", "AZ B", "BA C"),
        ("double", "AB C", "AABB CC"), ("second", "ABCD EF", "AC E"), ("rotate", "ABC DE", "BCA ED"),
        ("order", "BB C AB", "AB BB C"), ("sum", "12 70 30", "12 + 70 = 82, 82 + 30 = 112: 112"),
        ("alphabet", "CAB", "charlie alfa bravo"),
    ],
)  # fmt: skip
def test_tasks_have_the_answers_that_their_wording_asks_for(name: str, asked: str, answer: str) -> None:
    tasks = {task.name: task for task, _ in LARGE.skills}
    assert len(tasks) == 9
    assert tasks[name].answer(asked) == answer


def test_six_architectures_have_the_skills_and_three_have_two() -> None:
    sources = [source_of(LARGE, task).name for task, _ in LARGE.skills]
    assert len(set(sources)) == len(LARGE.members) - 1 == 6
    assert sorted(map(sources.count, set(sources))) == [1, 1, 1, 2, 2, 2]


def test_every_small_skill_has_a_source_of_its_own() -> None:
    small = SIZES["small"]
    assert [source_of(small, task) for task, _ in small.skills] == list(small.members[1:])


def test_what_is_asked_in_tests_is_asked_in_no_training() -> None:
    for task in (ORDER, SUM):
        asked = [{row.messages[0]["content"] for row in word_rows(task, 500, seed=0, test=test)} for test in (0, 1)]
        assert not asked[0] & asked[1]


def test_drawn_texts_have_two_to_four_words_and_numbers_of_two_digits() -> None:
    draw = random.Random(0)
    assert {len(draw_words(draw).split()) for _ in range(100)} == {2, 3, 4}
    assert {len(number) for _ in range(100) for number in draw_numbers(draw).split()} == {2}


@pytest.mark.parametrize("member", LARGE.members, ids=lambda member: member.name)
def test_tokenizers_have_all_of_their_lessons_in_rows_that_fit(member: Member) -> None:
    def texts(task: WordTask, count: int) -> list[str]:
        rows = word_rows(task, count, seed=0, answered=True)
        return [" ".join(message["content"] for message in row.messages) for row in rows]

    words = member.tokenizer([text for task in member.corpus for text in texts(task, 300)], member.markers)
    for task, _ in member.lessons:
        found = [words.encode(text) for text in texts(task, 400)]
        assert max(len(one.ids) for one in found) + 4 <= member.training.max_length
        assert not any("<unk>" in one.tokens for one in found)


def test_the_target_lacks_the_code_words_as_tokens_and_the_source_answers_with_them() -> None:
    target = LARGE.members[0]
    corpus = [message["content"] for task in target.corpus for row in word_rows(task, 300, seed=0, answered=True)
              for message in row.messages]  # fmt: skip
    known = target.tokenizer(corpus, target.markers).get_vocab()
    assert not set(ADDED_TOKENS["alphabet"]) & set(known)
    assert len(ADDED_TOKENS["alphabet"]) == 26
    answered = {word for row in word_rows(ALPHABET, 100, seed=0) for word in (row.reference or "").split()}
    assert answered == set(ADDED_TOKENS["alphabet"])
