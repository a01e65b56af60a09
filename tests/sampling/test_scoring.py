from pathlib import Path

import pytest

from graftllm.errors import SamplingError
from graftllm.records import Message, Prompt, Response
from graftllm.sampling.rules import RULES, judge_choice, judge_exact, judge_math
from graftllm.sampling.scoring import judge_answers, score_responses
from graftllm.transfer_options import JudgeOptions, RuleJudge, judge_named

QUESTION = (Message(role="user", content="2 + 2?"),)
EXACT = RuleJudge(kind="exact")


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


@pytest.mark.parametrize(
    ("reference", "right", "wrong"),
    [
        (r"2\sqrt{3}", [r"\boxed{2\sqrt{3}}", r"$\sqrt{12}$", r"2\sqrt{3}"], [r"\boxed{2}", "2", r"\boxed{\sqrt{3}}"]),
        ("2", [r"\boxed{2}", "2", "**2**", "2."], [r"2\sqrt{3}", "2+3i", "x^2"]),
        (r"\frac{3}{4}\pi", [r"\boxed{\frac{3\pi}{4}}"], [r"\boxed{\frac34}", r"\boxed{\pi}"]),
        (r"\frac34", [r"\boxed{0.75}", "3/4"], [r"\boxed{\frac43}", "0.34"]),
        ("3/4", ["so 0.75", r"$\frac{3}{4}$"], ["3", "4/3"]),
        ("x^2-1", ["$(x-1)(x+1)$", "x^2-1"], [r"\boxed{x^2+1}", "1", ""]),
        ("x=5", [r"\boxed{5}", "$x = 5$"], [r"\boxed{6}", "$x=6$"]),
        ("(1,2)", [r"\boxed{(1,2)}", "(1, 2)"], [r"\boxed{(2,1)}", r"\boxed{[1,2]}", "2"]),
        ("(1,2,3)", [r"\boxed{(1,2,3)}"], [r"\boxed{(1,3,2)}", r"\boxed{(1,2)}"]),
        ("[0,1)", [r"\boxed{[0,1)}"], [r"\boxed{[0,1]}", r"\boxed{(0,1)}"]),
        (r"(-\infty, 3]", [r"$(-\infty,3]$"], [r"\boxed{3}", r"\boxed{(-\infty,3)}"]),
        (r"(0,1)\cup(2,3)", [r"\boxed{(0,1)\cup(2,3)}"], [r"\boxed{(0,1)}"]),
        (r"\{1,2,3\}", [r"\boxed{\{3,2,1\}}"], [r"\boxed{\{1,2\}}"]),
        ("1/2 or 2", [r"\boxed{2, \frac{1}{2}}"], [r"\boxed{2}"]),
        (r"50\%", [r"\boxed{50\%}", r"\boxed{0.5}"], [r"\boxed{5}", r"\boxed{500\%}"]),
        ("50%", [r"\boxed{50\%}"], [r"\boxed{5\%}"]),
        (r"5\text{ cm}", [r"\boxed{5}", "5 cm"], [r"\boxed{6\text{ cm}}"]),
        ("5 square inches", [r"\boxed{5}"], [r"\boxed{25}"]),
        (r"\$5", [r"\boxed{5}", r"\boxed{\$5}"], [r"\boxed{6}"]),
        ("1,000", ["The answer is 1000."], ["The answer is 1."]),
        ("1e-05", [r"\boxed{0.00001}"], [r"\boxed{1}"]),
        ("10^{6}", [r"\boxed{1000000}"], [r"\boxed{10}"]),
        (r"x \ge 2", [r"\boxed{x \ge 2}"], [r"\boxed{x \le 2}", r"\boxed{2}"]),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", [r"$\begin{pmatrix}1\\2\end{pmatrix}$"], [r"\boxed{1}"]),
        (r"\text{Evelyn}", [r"\boxed{\text{Evelyn}}", r"\boxed{Evelyn}", "Evelyn"], [r"\boxed{\text{Brianna}}", ""]),
        ("no solution", [r"\boxed{\text{No solution}}", "No solution."], [r"\boxed{2}", "I do not know"]),
        ("The answer is 12", [r"\boxed{12}", "12"], [r"\boxed{1}"]),
        ("Answer: 12", [r"\boxed{12}"], [r"\boxed{1}"]),
        (r"$\sqrt{4}$", [r"\boxed{2}"], [r"\boxed{4}"]),
        (r"so it is \boxed{7}", [r"\boxed{7}"], [r"\boxed{8}"]),
    ],
)
def test_math_reads_references_as_data_sets_have_them(reference: str, right: list[str], wrong: list[str]) -> None:
    assert {answer: judge_math(answer, reference) for answer in right} == dict.fromkeys(right, 1.0)
    assert {answer: judge_math(answer, reference) for answer in wrong} == dict.fromkeys(wrong, 0.0)


@pytest.mark.parametrize("reference", ["", "  "])
def test_math_refuses_a_reference_with_nothing_in_it(reference: str) -> None:
    with pytest.raises(
        SamplingError, match=r"prompt 'p': 'reference', which the judge 'math' compares with: expected an .* found '"
    ):
        judge_answers([Prompt("p", QUESTION, reference=reference)], ["4"], judge_named("math"))


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("B", "B", 1),
        ("(b)", "B", 0),  # a letter that is not a choice
        ("**B**", "(B)", 1),
        ("B. Paris, not A.", "B", 1),
        ("The answer is A. No, the answer is B.", "B", 1),
        ("Answer: (C)", "B", 0),
        (r"\boxed{\text{D}}", "D", 1),
        (r"First A. So \boxed{B}, the answer is C", "B", 1),
        ("A long way from home", "A", 0),
        ("I don't know", "I", 0),
        ("", "A", 0),
    ],
)
def test_choice_takes_the_letter_that_the_answer_settles_on(answer: str, reference: str, score: float) -> None:
    assert judge_choice(answer, reference) == score


@pytest.mark.parametrize("part", [" ", "\n", "*", "(", "answer", "answer is ", "answer:**", "\\boxed{ ", "A"])
def test_choice_is_judged_in_time_linear_in_the_answer(part: str) -> None:
    assert judge_choice("answer" + part * 100_000 + "!", "B") == 0
    assert judge_choice(part * 100_000 + "! Answer: B", "B") == 1


def test_reasoning_gym_wants_full_marks() -> None:
    reasoning_gym = pytest.importorskip("reasoning_gym")
    judge = RULES["reasoning_gym"]
    entry = next(iter(reasoning_gym.create_dataset("basic_arithmetic", size=1, seed=3)))
    prompt = Prompt("p", QUESTION, reference=entry["answer"], metadata=entry["metadata"])
    assert judge(f" {entry['answer']}\n", prompt) == 1
    assert judge(f"I think <answer>{entry['answer']}</answer>", prompt) == 1
    assert judge(f"it is {entry['answer']}.", prompt) == 0  # its own scorer gives a part of a mark for that
    assert judge("", prompt) == 0
    assert judge("<answer>" * 100_000, prompt) == 0  # in linear time, too


def test_reasoning_gym_wants_to_know_the_task() -> None:
    pytest.importorskip("reasoning_gym")
    for metadata in (None, {"source_dataset": "no_such_task"}):
        with pytest.raises(SamplingError, match="prompt 'p': the judge 'reasoning_gym' expects its entry's metadata"):
            RULES["reasoning_gym"]("4", Prompt("p", QUESTION, reference="4", metadata=metadata))


def test_responses_are_scored_against_their_prompts_reference(tmp_path: Path) -> None:
    prompt = Prompt("p", QUESTION, reference="4")
    responses = [Response("p", "s", 0, "4"), Response("p", "s", 1, "5"), Response("p", "s", 2, "<think>5</think>4")]
    scored = score_responses([prompt], responses, [EXACT], directory=tmp_path)
    assert [response.score for response in scored.responses] == [1, 0, 1]
    assert [(cost.judge, cost.dollars, cost.unjudged) for cost in scored.costs] == [("exact", None, 0)]
    assert scored.agreement is None


def test_an_answer_is_right_when_every_rule_says_so(tmp_path: Path) -> None:
    prompt = Prompt("p", QUESTION, reference="4")
    responses = [Response("p", "s", i, text) for i, text in enumerate(("4", "so 4", "5"))]
    scored = score_responses([prompt], responses, [EXACT, RuleJudge(kind="math")], directory=tmp_path)
    assert [response.score for response in scored.responses] == [1, 0, 0]


@pytest.mark.parametrize("kind", ["exact", "math", "choice"])
def test_a_prompt_without_a_reference_cannot_be_judged(kind: str) -> None:
    with pytest.raises(SamplingError, match=f"prompt 'p' has no 'reference', which the judge {kind!r} compares with"):
        judge_answers([Prompt("p", QUESTION)], ["4"], judge_named(kind))


def test_a_prompt_without_tests_cannot_be_judged_by_them() -> None:
    code: JudgeOptions = judge_named("code")
    with pytest.raises(SamplingError, match="prompt 'p' has no 'tests', which the judge 'code' runs; add some"):
        judge_answers([Prompt("p", QUESTION)], ["4"], code)
