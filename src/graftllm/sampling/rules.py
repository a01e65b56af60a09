"""Answers judged by rule: 1.0 for right, 0.0 for wrong.

A rule is a function of the answer, without its reasoning trace, and the prompt; `RULES` is the table of them.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from graftllm.errors import SamplingError
from graftllm.records import Prompt

Rule = Callable[[str, Prompt], float]


def judge_exact(answer: str, reference: str) -> float:
    r"""Return 1.0 when both texts are the same but for white space around them.

    >>> judge_exact(" TREWQ\n", "TREWQ"), judge_exact("TREW", "TREWQ")
    (1.0, 0.0)
    """
    return float(answer.strip() == reference.strip())


def judge_math(answer: str, reference: str) -> float:
    r"""Return 1.0 when the last expression of the answer equals the reference's, by math-verify.

    A bare reference counts as written in LaTeX, and so does an answer that is a bare expression.

    >>> judge_math("So x is $\\frac{1}{2}$.", "0.5"), judge_math(r"\boxed{2}", r"2\sqrt{3}")
    (1.0, 0.0)

    Raises:
        ValueError: there is nothing in the reference to compare with.
    """
    from math_verify import parse, verify  # imported late: it takes a while and few runs need it

    expected = _expected(reference)
    if not expected:
        raise ValueError(f"expected an expression, a number or words, found {reference!r}")
    bare = answer.strip("*#_. \t\n")
    said = parse(f"${bare}$" if _is_bare(bare) and "\n" not in bare and not _words(bare) else answer)
    same = bool(_plain(reference)) and _plain(reference) == _plain(str(said[-1]) if said else answer)
    return float(same or verify(expected, said))


def _expected(reference: str) -> list[Any]:
    """Return what math-verify reads in a reference; it sees LaTeX only between delimiters, so a bare one gets them."""
    from math_verify import parse

    bare = _EXPONENT.sub(r"\1 \\cdot 10^{\2}", reference.strip())
    is_prose = "\\" not in bare and (len(_words(bare)) > 1 or (":" in bare and bool(_words(bare))))
    return (parse(bare) if is_prose or not _is_bare(bare) else []) or parse(f"${bare}$")


def _is_bare(text: str) -> bool:
    return re.search(r"\\boxed|\\\(|\\\[|(?<!\\)\$.*(?<!\\)\$", text, flags=re.DOTALL) is None


def _words(text: str) -> list[str]:
    """Return the words of a text that are no LaTeX and no part of a formula."""
    found = re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", re.sub(r"\\(?:text|mathrm|mbox)\s*\{[^{}]*\}", "", text))
    return [word for word in found if word not in _IN_FORMULAS]


def _plain(text: str) -> str:
    """Return what a text says, without the LaTeX that sets words, case and space."""
    return re.sub(r"\\(?:text|textbf|mathrm|mbox)\b|[{}$\s]|\.$", "", text).lower()


def judge_choice(answer: str, reference: str) -> float:
    r"""Return 1.0 when the answer settles on the reference's letter.

    The last `\boxed{B}`, or else the last "answer is (B)" or "Answer: B", or else a letter that the answer begins
    with ("B", "(B) because", "B. Paris").

    >>> judge_choice("A is wrong, so the answer is (B).", "B"), judge_choice("C", "(C)"), judge_choice("A fox", "A")
    (1.0, 1.0, 0.0)
    """
    wanted = reference.strip().strip("().").upper()
    said = " ".join(answer.split())  # runs of white space, which the patterns would search in cubic time
    for pattern in _CHOICES:
        if found := re.findall(pattern, said):
            return float(found[-1].upper() == wanted)
    return 0.0


def judge_reasoning_gym(answer: str, prompt: Prompt) -> float:
    """Return 1.0 when reasoning-gym's own scorer gives full marks, and 0.0 for anything less.

    Its scorers give partial credit and may raise on odd answers; neither is a right answer.

    Raises:
        SamplingError: reasoning-gym is not installed, or the prompt does not say which of its tasks it is of.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise SamplingError("judge 'reasoning_gym': run pip install 'graftllm[reasoning]' first.") from error
    metadata = dict(prompt.metadata or {})
    try:
        scorer: Any = reasoning_gym.get_score_answer_fn(metadata["source_dataset"])
    except (KeyError, ValueError) as error:
        raise SamplingError(
            f"prompt {prompt.id!r}: the judge 'reasoning_gym' expects its entry's metadata with the name of a task as "
            f"'source_dataset', found {metadata.get('source_dataset')!r}."
        ) from error
    before, closing, _ = answer.rpartition("</answer>")  # behind it, each <answer> would be searched to the end
    tagged = re.findall(r"<answer>(.*?)</answer>", before + closing, flags=re.DOTALL)
    entry = {"question": prompt.question[-1]["content"], "answer": prompt.reference, "metadata": metadata}
    try:
        return float(scorer(answer=(tagged[-1] if tagged else answer).strip(), entry=entry) >= 1.0)
    except Exception:  # whatever a scorer trips over, the answer is not one that it can read
        return 0.0


def _judged_math(answer: str, prompt: Prompt) -> float:
    try:
        return judge_math(answer, _reference(prompt, "math"))
    except ValueError as error:
        raise SamplingError(
            f"prompt {prompt.id!r}: 'reference', which the judge 'math' compares with: {error}; mend it."
        ) from error


RULES: Mapping[str, Rule] = {
    "exact": lambda answer, prompt: judge_exact(answer, _reference(prompt, "exact")),
    "math": _judged_math,
    "choice": lambda answer, prompt: judge_choice(answer, _reference(prompt, "choice")),
    "reasoning_gym": judge_reasoning_gym,
}

_EXPONENT = re.compile(r"^([-+]?[\d.]+)[eE]([-+]?\d+)$")  # as JSON writes large and small numbers
_IN_FORMULAS = {"or", "and", "sin", "cos", "tan", "log", "ln", "exp", "pi", "sqrt"}
_CHOICES = (
    r"\\boxed\{\s*(?:\\text\{)?\(?([A-Za-z])\)?\}",
    r"(?i:answer|choice|option)(?i:\s+is)?\s*:?\s*\**\s*\(?([A-Z])\b(?!')",
    r"^\**\(?([A-Z])(?:\)|[.:](?:\s|$)|\**$)",
)


def _reference(prompt: Prompt, judge: str) -> str:
    if prompt.reference is None:
        raise SamplingError(
            f"prompt {prompt.id!r} has no 'reference', which the judge {judge!r} compares with; add one."
        )
    return prompt.reference


def check_references(prompts: Iterable[Prompt], judge: str) -> None:
    """Check that a judge has what it compares with.

    Raises:
        SamplingError: a prompt has no reference.
    """
    for prompt in prompts:
        _reference(prompt, judge)
