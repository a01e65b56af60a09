"""Judges put together: rules say right or wrong, and a grade orders what they leave equal.

An answer is right when every rule says so. Reasoning traces are not judged.
"""

import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from graftllm.records import Prompt, Response
from graftllm.sampling.reasoning import without_reasoning
from graftllm.sampling.rules import RULES, check_references, judge_exact
from graftllm.transfer_options import CodeJudge, JudgeOptions, LlmJudge, Price, RewardJudge, RuleJudge

SPOOL = "judged.jsonl"  # what judges said so far
RIGHT = 1.0  # the score of a right answer; anything below is not learnt from


@dataclass(frozen=True)
class JudgeCost:
    """What one judge took, and how many responses it said nothing readable of."""

    judge: str
    seconds: float
    input_tokens: int
    output_tokens: int
    dollars: float | None
    unjudged: int


@dataclass(frozen=True)
class Agreement:
    """How often a grade puts a right answer above a wrong one to the same prompt; equal grades count half."""

    share: float
    pairs: int
    rule: str


@dataclass(frozen=True)
class Scored:
    """Responses with scores and grades, what each judge took, and whether the grades agree with the rules."""

    responses: list[Response]
    costs: list[JudgeCost]
    agreement: Agreement | None


def score_responses(
    prompts: Sequence[Prompt],
    responses: Sequence[Response],
    judges: Sequence[JudgeOptions],
    *,
    directory: Path,
    device: str = "auto",
) -> Scored:
    """Judge responses.

    Args:
        prompts: with what the judges compare with.
        responses: to them.
        judges: rules and at most one that grades.
        directory: where what judges of programs, reward models and judges behind URLs say is kept, as `judged.jsonl`;
            they are not asked twice.
        device: of a reward model.

    Raises:
        SamplingError: a prompt lacks what a judge compares with, or a judge cannot work.
    """
    by_id = {prompt.id: prompt for prompt in prompts}
    asked, answers = [by_id[row.prompt_id] for row in responses], [without_reasoning(row.text) for row in responses]
    scores: list[float | None] = [None] * len(responses)
    grades: list[float | None] = [None] * len(responses)
    costs, rules = [], [judge.kind for judge in judges if isinstance(judge, RuleJudge | CodeJudge)]
    for judge in judges:
        started = time.monotonic()
        values, tokens = _judged(asked, answers, judge, directory, device)
        seconds = round(time.monotonic() - started, 2)
        if judge.kind in rules:
            scores = [
                min(cast(float, new), 1.0 if old is None else old) for new, old in zip(values, scores, strict=True)
            ]
        else:
            grades = values
        price = judge.price if isinstance(judge, LlmJudge) else None
        costs.append(JudgeCost(judge.kind, seconds, *tokens, dollars(price, *tokens), values.count(None)))
    scored = [
        replace(row, score=score, grade=value) for row, score, value in zip(responses, scores, grades, strict=True)
    ]
    return Scored(scored, costs, _agreement(asked, scored, rules))


def judge_answers(
    prompts: Sequence[Prompt], answers: Sequence[str], judge: JudgeOptions, *, device: str = "auto"
) -> list[float]:
    """Return what one judge says of one answer to each prompt; an unreadable grade counts as 0.

    Raises:
        SamplingError: a prompt lacks what the judge compares with, or the judge cannot work.
    """
    with tempfile.TemporaryDirectory(prefix="graftllm-") as directory:
        values, _ = _judged(prompts, [without_reasoning(text) for text in answers], judge, Path(directory), device)
    return [value or 0.0 for value in values]


def check_judgeable(prompts: Sequence[Prompt], judge: JudgeOptions) -> None:
    """Check that prompts have what a judge compares with, before anybody answers them.

    Raises:
        SamplingError: one has no reference, or no tests.
    """
    if isinstance(judge, CodeJudge):
        from graftllm.sampling.programs import check_tests

        check_tests(prompts)
    elif isinstance(judge, RuleJudge) and judge.kind != "reasoning_gym":  # which has what it needs in metadata
        check_references(prompts, judge.kind)


def dollars(price: Price | None, input_tokens: int, output_tokens: int) -> float | None:
    """Return what tokens cost; None without a price.

    >>> dollars(Price(input=1, output=4), 500_000, 1_000_000)
    4.5
    """
    return None if price is None else (price.input * input_tokens + price.output * output_tokens) / 1e6


def _judged(
    prompts: Sequence[Prompt], answers: Sequence[str], judge: JudgeOptions, directory: Path, device: str
) -> tuple[list[float | None], tuple[int, int]]:
    """Return one judge's values, and the tokens that went in and came out."""
    if isinstance(judge, RuleJudge):
        return [RULES[judge.kind](answer, prompt) for answer, prompt in zip(answers, prompts, strict=True)], (0, 0)
    if isinstance(judge, CodeJudge):
        from graftllm.sampling.programs import judge_programs

        return list(judge_programs(prompts, answers, judge, directory / SPOOL)), (0, 0)
    from graftllm.sampling.grades import grade, reward

    if isinstance(judge, RewardJudge):
        found = reward(prompts, answers, judge, directory / SPOOL, device=device)
    else:
        found = grade(prompts, answers, judge, directory / SPOOL)
    return found.values, (found.input_tokens, found.output_tokens)


def _agreement(prompts: Sequence[Prompt], responses: Sequence[Response], rules: Sequence[str]) -> Agreement | None:
    """Compare grades with the rules; without rules with the references, where there are some."""
    right, wrong = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
    for prompt, row in zip(prompts, responses, strict=True):
        score = row.score
        if score is None and prompt.reference is not None:
            score = judge_exact(without_reasoning(row.text), prompt.reference)
        if score is not None and row.grade is not None:
            (right if score >= RIGHT else wrong)[prompt.id].append(row.grade)
    pairs = [(a, b) for prompt_id, grades in right.items() for a in grades for b in wrong[prompt_id]]
    if not pairs:
        return None
    share = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)
    return Agreement(share, len(pairs), " and ".join(rules) or "exact")
