import math
from collections.abc import Sequence

import pytest

from graftllm.errors import SamplingError
from graftllm.evaluation.scores import Score, evaluate
from graftllm.records import Message, Prompt
from graftllm.sampling.scoring import check_judgeable
from graftllm.transfer_options import judge_named


def _prompt(number: int, task: str, reference: str | None = "x") -> Prompt:
    return Prompt(str(number), (Message(role="user", content="q"),), task, reference)


def test_scores_are_means_over_all_and_by_task() -> None:
    prompts = [_prompt(0, "a"), _prompt(1, "a"), _prompt(2, "b"), _prompt(3, "")]
    found = evaluate(lambda rows: ["x", "y", "x", "x"], prompts, "exact")
    assert found.overall == Score(0.75, 4)
    assert found.by_task == {"a": Score(0.5, 2), "b": Score(1.0, 1), "all": Score(1.0, 1)}


def test_standard_error_is_that_of_a_share() -> None:
    assert Score(0.5, 100).stderr == pytest.approx(0.05)
    assert Score(1.0, 7).stderr == 0
    assert Score(0.2, 50).stderr == pytest.approx(math.sqrt(0.16 / 50))


@pytest.mark.parametrize(("judge", "lacks"), [("exact", "reference"), ("math", "reference"), ("code", "tests")])
def test_a_row_that_lacks_what_the_judge_needs_is_refused_before_it_is_answered(judge: str, lacks: str) -> None:
    def never(rows: Sequence[Prompt]) -> Sequence[str]:
        raise AssertionError("was asked")

    with pytest.raises(SamplingError, match=f"prompt '0' has no '{lacks}', which the judge '{judge}' "):
        evaluate(never, [_prompt(0, "a", None)], judge)


def test_a_row_of_reasoning_gym_needs_no_reference() -> None:
    check_judgeable([_prompt(0, "a", None)], judge_named("reasoning_gym"))
