"""Answers judged by rule: 1.0 for right, 0.0 for wrong.

A judge is a function of the answer and the reference; `JUDGES` is the table of them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from graftllm.errors import SamplingError
from graftllm.records import Prompt, Response

Judging = Callable[[str, str], float]


def judge_exact(answer: str, reference: str) -> float:
    r"""Return 1.0 when both texts are the same but for white space around them.

    >>> judge_exact(" TREWQ\n", "TREWQ"), judge_exact("TREW", "TREWQ")
    (1.0, 0.0)
    """
    return float(answer.strip() == reference.strip())


def judge_math(answer: str, reference: str) -> float:
    r"""Return 1.0 when the last expression of the answer equals the reference's, by math-verify.

    >>> judge_math("So x is $\\frac{1}{2}$.", "0.5"), judge_math("It is 3.", "4")
    (1.0, 0.0)
    """
    from math_verify import parse, verify  # imported late: it takes a while and few runs need it

    return float(verify(parse(reference), parse(answer)))


JUDGES: Mapping[str, Judging] = {"exact": judge_exact, "math": judge_math}


def score_responses(prompts: Sequence[Prompt], responses: Sequence[Response], judge: str) -> list[Response]:
    """Return the responses with their scores.

    Raises:
        SamplingError: a prompt has no reference to judge by.
    """
    references = {prompt.id: prompt.reference for prompt in prompts}
    scored: list[Response] = []
    for response in responses:
        reference = references[response.prompt_id]
        if reference is None:
            raise SamplingError(
                f"prompt {response.prompt_id!r} has no 'reference', which the judge {judge!r} compares with; add one."
            )
        scored.append(replace(response, score=JUDGES[judge](response.text, reference)))
    return scored
