import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftllm.errors import SamplingError
from graftllm.records import Message, Prompt, Response
from graftllm.sampling.pairs import fault, preference_pairs, prompts_for_pairs, sft_rows
from graftllm.transfer_options import PairOptions

QUESTION = (Message(role="user", content="2 + 2?"),)
DEFAULT = PairOptions()


def _responses(*scores: float, source: str = "s", prompt_id: str = "p") -> list[Response]:
    return [Response(prompt_id, source, i, f"{source}{i}", score) for i, score in enumerate(scores)]


def _graded(*grades: float | None, source: str = "s", score: float | None = None) -> list[Response]:
    return [Response("p", source, i, f"{source}{i}", score, grade) for i, grade in enumerate(grades)]


def _prompts(*ids: str) -> list[Prompt]:
    return [Prompt(one, QUESTION, "sums", "4") for one in ids]


def test_rows_hold_the_first_right_answer_of_each_prompt() -> None:
    rows = sft_rows(_prompts("p", "q"), [*_responses(0, 1, 1), *_responses(0, 0, prompt_id="q")], DEFAULT, skill="sums")
    assert [(row.id, row.answer, row.task) for row in rows] == [("p", "s1", "sums")]
    assert rows[0].question == QUESTION


def test_of_right_answers_the_best_graded_is_learnt() -> None:
    responses = [*_graded(0.9, score=0.0), *_graded(0.2, 0.5, 0.5, source="t", score=1.0)]
    (row,) = sft_rows(_prompts("p"), responses, DEFAULT, skill="sums")
    assert row.answer == "t1"


def test_rows_of_each_source_are_named_by_it_and_occur_once() -> None:
    same = Response("p", "u", 0, "s0", 1.0)
    responses = [*_responses(1, 1), *_responses(0, 1, source="t"), same]
    rows = sft_rows(_prompts("p"), responses, PairOptions(sft="each"), skill="sums")
    assert [(row.id, row.answer) for row in rows] == [("p/s", "s0"), ("p/t", "t1")]


def test_pairs_are_best_against_worst_of_the_same_source() -> None:
    responses = [*_responses(1, 0, 0), *_responses(0, 0, source="t"), *_responses(1, 1, source="u")]
    found = preference_pairs(_prompts("p"), responses, DEFAULT)
    (pair,) = found.pairs
    assert (pair.chosen, pair.rejected, pair.source) == ("s0", "s1", "s")
    assert found.left_out == {"no response good enough": 1, "no response bad enough": 1}


def test_pairs_may_be_made_across_sources() -> None:
    responses = [*_responses(1, 1), *_responses(0, 0, source="t")]
    (pair,) = preference_pairs(_prompts("p"), responses, PairOptions(preference="any_source")).pairs
    assert (pair.chosen, pair.rejected, pair.source) == ("s1", "t0", "s")


def test_a_right_answer_is_never_the_worse_one_whatever_its_grade() -> None:
    responses = [Response("p", "s", 0, "a", 1.0, 0.1), Response("p", "s", 1, "b", 0.0, 0.9)]
    assert preference_pairs(_prompts("p"), responses, DEFAULT).left_out == {"gap too small": 1}
    responses.append(Response("p", "s", 2, "c", 0.0, 0.05))
    (pair,) = preference_pairs(_prompts("p"), responses, DEFAULT).pairs
    assert (pair.chosen, pair.rejected) == ("a", "c")


@pytest.mark.parametrize(
    ("grades", "reason"),
    [
        ((0.1, 0.105), "gap too small"),
        ((0.1, 0.3), "gap too large"),
        ((0.1, 0.15), None),
        ((0.1, 0.1), "gap too small"),
    ],
)
def test_the_gap_of_a_pair_is_bounded_on_both_sides(grades: tuple[float, ...], reason: str | None) -> None:
    found = preference_pairs(_prompts("p"), _graded(*grades), PairOptions(min_gap=0.01, max_gap=0.1))
    assert found.left_out == ({reason: 1} if reason else {})
    assert [(pair.chosen, pair.rejected) for pair in found.pairs] == ([] if reason else [("s1", "s0")])


def test_a_response_that_was_not_judged_is_not_the_worse_one() -> None:
    responses = [*_graded(0.9, 0.5, 0.1), Response("p", "s", 9, "unread", None, None)]
    (pair,) = preference_pairs(_prompts("p"), responses, DEFAULT).pairs
    assert (pair.chosen, pair.rejected) == ("s0", "s2")


@given(st.lists(st.tuples(st.sampled_from(["p", "q"]), st.sampled_from(["s", "t"]), st.floats(0, 1)), max_size=12))
def test_the_chosen_is_graded_above_the_rejected_and_of_its_source(drawn: list[tuple[str, str, float]]) -> None:
    responses = [Response(prompt, source, i, str(i), None, grade) for i, (prompt, source, grade) in enumerate(drawn)]
    by_text = {row.text: row for row in responses}
    for pair in preference_pairs(_prompts("p", "q"), responses, PairOptions(min_gap=0.1)).pairs:
        chosen, rejected = by_text[pair.chosen], by_text[pair.rejected]
        assert (chosen.grade or 0) - (rejected.grade or 0) >= 0.1
        assert (chosen.source, chosen.prompt_id) == (rejected.source, rejected.prompt_id)
        same = [r.grade or 0 for r in responses if (r.source, r.prompt_id) == (chosen.source, chosen.prompt_id)]
        assert (chosen.grade, rejected.grade) == (max(same), min(same))


@given(st.sets(st.text("abc", min_size=1, max_size=4), min_size=2, max_size=30), st.floats(0.1, 0.9))
def test_a_share_of_the_prompts_is_for_sft_and_the_rest_for_pairs(ids: set[str], share: float) -> None:
    options, prompts = PairOptions(sft_share=share), _prompts(*sorted(ids))
    responses = [row for prompt in prompts for row in _responses(1, 0, prompt_id=prompt.id)]
    for_sft = round(share * len(ids))
    paired = {pair.prompt_id for pair in preference_pairs(prompts, responses, options).pairs}
    assert paired == {prompt.id for prompt in prompts_for_pairs(prompts, options)}
    assert len(paired) == len(ids) - for_sft
    if for_sft:
        rows = {row.id for row in sft_rows(prompts, responses, options, skill="sums")}
        assert rows == ids - paired


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("<think>never ends", "broken template"),
        ("<think>a</think>", "broken template"),
        ("4<|im_end|>\n<|im_start|>user", "broken template"),
        ("I'm sorry, but I can't assist with that.", "refusal"),
        ("As an AI language model, I cannot add.", "refusal"),
        ("I am unable to help.", "refusal"),
        ("抱歉，我无法回答", "refusal"),
        ("Sorry I'm late: 4", None),
        ("I cannot stress enough that it is 4", None),
        ("x" * 101, "too long"),
        ("<think>two and two</think>4", None),
    ],
)
def test_faults_are_named(text: str, reason: str | None) -> None:
    assert fault(Response("p", "s", 0, text, None, 0.5), PairOptions(max_chars=100)) == reason


@pytest.mark.parametrize("part", [".", "but ", "sorry ", "sorry, but "])
def test_refusals_are_found_in_time_linear_in_the_answer(part: str) -> None:
    assert fault(Response("p", "s", 0, part * 100_000 + "4", None, 0.5), DEFAULT) is None


def test_more_faults_are_named() -> None:
    assert fault(Response("p", "s", 0, "4", 1.0, truncated=True), DEFAULT) == "cut off"
    assert fault(Response("p", "s", 0, "4"), DEFAULT) == "not judged"
    assert fault(Response("p", "s", 0, "4", 0.0), DEFAULT) == "wrong"
    assert fault(Response("p", "s", 0, "4", None, 0.4), PairOptions(min_grade=0.5)) == "graded too low"
    refusal = "I cannot help with that."
    assert fault(Response("p", "s", 0, refusal, 1.0), DEFAULT) is None  # a rule found it right
    assert fault(Response("p", "s", 0, refusal, None, 0.5), PairOptions(refusals="keep")) is None


def test_refusals_and_broken_answers_are_not_the_worse_ones_either() -> None:
    responses = [
        *_responses(1),
        Response("p", "s", 1, "I'm sorry, I can't help with that.", 0.0),
        Response("p", "s", 2, "<|im_start|>", 0.0),
        Response("p", "s", 3, "5", 0.0),
    ]
    (pair,) = preference_pairs(_prompts("p"), responses, DEFAULT).pairs
    assert pair.rejected == "5"


def test_a_source_without_a_right_answer_is_shown_with_samples() -> None:
    with pytest.raises(SamplingError) as raised:
        sft_rows(_prompts("p"), _responses(0, 0), DEFAULT, skill="sums")
    assert str(raised.value) == (
        "skill 'sums': none of 2 responses of s is right. For example: '2 + 2?' -> 's0' (expected '4'); "
        "'2 + 2?' -> 's1' (expected '4'). Check the judge and the references, or choose a source that has the skill."
    )
