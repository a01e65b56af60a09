import pytest

from graftllm.errors import SamplingError
from graftllm.records import Message, Prompt, Response
from graftllm.sampling.pairs import preference_pairs, sft_rows
from graftllm.sampling.scoring import judge_exact, judge_math, score_responses

QUESTION = (Message(role="user", content="2 + 2?"),)


def _responses(*scores: float, source: str = "s", prompt_id: str = "p") -> list[Response]:
    return [Response(prompt_id, source, i, f"{source}{i}", score) for i, score in enumerate(scores)]


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [("4", "4", 1), (" 4\n", "4", 1), ("four", "4", 0), ("", "4", 0), ("44", "4", 0)],
)
def test_exact_compares_texts_without_outer_space(answer: str, reference: str, score: float) -> None:
    assert judge_exact(answer, reference) == score


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        (r"so the answer is \boxed{\frac{1}{2}}", "0.5", 1),
        (r"$x = 3$", "3", 1),
        ("The answer is 17.", "17", 1),
        ("I do not know", "17", 0),
        ("The answer is 18.", "17", 0),
    ],
)
def test_math_compares_values(answer: str, reference: str, score: float) -> None:
    assert judge_math(answer, reference) == score


def test_responses_are_scored_against_their_prompts_reference() -> None:
    prompt = Prompt("p", QUESTION, reference="4")
    scored = score_responses([prompt], [Response("p", "s", 0, "4"), Response("p", "s", 1, "5")], "exact")
    assert [response.score for response in scored] == [1, 0]


def test_a_prompt_without_a_reference_cannot_be_judged() -> None:
    with pytest.raises(SamplingError, match="prompt 'p' has no 'reference', which the judge 'exact' compares with"):
        score_responses([Prompt("p", QUESTION)], [Response("p", "s", 0, "4")], "exact")


def test_rows_hold_the_first_right_answer_of_each_prompt() -> None:
    prompts = [Prompt("p", QUESTION, "sums", "4"), Prompt("q", QUESTION, "sums", "4")]
    rows = sft_rows(prompts, [*_responses(0, 1, 1), *_responses(0, 0, prompt_id="q")], skill="sums")
    assert [(row.id, row.answer, row.task) for row in rows] == [("p", "s1", "sums")]
    assert rows[0].question == QUESTION


def test_pairs_are_best_against_worst_of_the_same_source() -> None:
    prompts = [Prompt("p", QUESTION, reference="4")]
    responses = [*_responses(1, 0, 0), *_responses(0, 0, source="t"), *_responses(1, 1, source="u")]
    (pair,) = preference_pairs(prompts, responses)
    assert (pair.chosen, pair.rejected, pair.source) == ("s0", "s1", "s")


def test_a_source_without_a_right_answer_is_shown_with_samples() -> None:
    prompts = [Prompt("p", QUESTION, reference="4")]
    with pytest.raises(SamplingError) as raised:
        sft_rows(prompts, _responses(0, 0), skill="sums")
    assert str(raised.value) == (
        "skill 'sums': none of 2 responses of s is right. For example: '2 + 2?' -> 's0' (expected '4'); "
        "'2 + 2?' -> 's1' (expected '4'). Check the judge and the references, or choose a source that has the skill."
    )
