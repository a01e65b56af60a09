"""Answers to a task -> a score with its standard error, also by the rows' `task`."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from graftllm.records import Prompt
from graftllm.sampling.scoring import check_judgeable, judge_answers
from graftllm.transfer_options import JudgeOptions, judge_named

Answer = Callable[[Sequence[Prompt]], Sequence[str]]  # prompts in, one text each out


@dataclass(frozen=True)
class Score:
    """A mean of `n` judgements between 0 and 1."""

    value: float
    n: int

    @property
    def stderr(self) -> float:
        """Standard error of the mean, sqrt(p (1 - p) / n); of judgements that are fractions it is at most this."""
        return math.sqrt(self.value * (1 - self.value) / self.n)


@dataclass(frozen=True)
class Evaluation:
    """Scores of one set of prompts: over all, and by the rows' `task`."""

    overall: Score
    by_task: Mapping[str, Score]

    @property
    def value(self) -> float:
        """The score over all prompts."""
        return self.overall.value


Measured = Mapping[str, Evaluation]  # by the name of the test set: a skill's, or `general`


def evaluate(
    answer: Answer, prompts: Sequence[Prompt], judge: str | JudgeOptions, *, device: str = "auto"
) -> Evaluation:
    """Ask for an answer to every prompt and judge it.

    Args:
        answer: prompts in, one text each out.
        prompts: with what the judge compares with.
        judge: a judge, or its kind.
        device: of a judge that is a model.

    Raises:
        SamplingError: a prompt lacks what the judge compares with, which is told before it is asked for an answer; or
            the judge cannot work.
    """
    judge = judge_named(judge)
    check_judgeable(prompts, judge)
    judged: dict[str, list[float]] = defaultdict(list)
    values = judge_answers(prompts, answer(prompts), judge, device=device)
    for prompt, value in zip(prompts, values, strict=True):
        judged[prompt.task or "all"].append(value)
    return merged({task: Score(sum(some) / len(some), len(some)) for task, some in judged.items()})


def merged(tasks: Mapping[str, Score]) -> Evaluation:
    """Return the evaluation whose scores by task are these."""
    n = sum(score.n for score in tasks.values())
    return Evaluation(Score(sum(score.value * score.n for score in tasks.values()) / n, n), tasks)
