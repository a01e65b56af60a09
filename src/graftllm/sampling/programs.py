"""Programs in answers, judged by their prompts' unit tests."""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from graftllm.errors import SamplingError
from graftllm.progress import progress
from graftllm.records import Prompt
from graftllm.sampling.sandbox import run_tests
from graftllm.sampling.verdicts import judged_as, verdicts
from graftllm.transfer_options import CodeJudge


def judge_programs(prompts: Sequence[Prompt], answers: Sequence[str], judge: CodeJudge, path: Path) -> list[float]:
    """Return 1.0 for each answer whose program passes every test of its prompt, else 0.0.

    Args:
        prompts: one for each answer, with tests.
        answers: without reasoning traces.
        judge: limits.
        path: JSONL of verdicts; equal programs are run once, and those that are there already not again.

    Raises:
        SamplingError: a prompt has no tests, or programs cannot be isolated here.
    """
    check_tests(prompts)
    asked = [(program_in(answer), prompt.tests) for prompt, answer in zip(prompts, answers, strict=True)]
    names = {one: judged_as(one[0], *one[1]) for one in asked}
    with (
        verdicts(path, judge.kind) as (passed, keep),
        ThreadPoolExecutor(judge.workers) as pool,
        progress("running tests") as show,
    ):
        missing = [one for one, name in names.items() if name not in passed]
        running = {pool.submit(run_tests, *one, judge): names[one] for one in missing}
        try:
            for done in as_completed(running):
                keep({running[done]: float(done.result().passed)})
                show(len(passed), len(names))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [passed[names[one]] for one in asked]


def check_tests(prompts: Sequence[Prompt]) -> None:
    """Check that prompts have tests to run.

    Raises:
        SamplingError: one has none.
    """
    for prompt in prompts:
        if not prompt.tests:
            raise SamplingError(f"prompt {prompt.id!r} has no 'tests', which the judge 'code' runs; add some.")


def program_in(answer: str) -> str:
    r"""Return the longest fenced block of Python in an answer, or the whole of it when there is none.

    >>> program_in("Here:\n```python\ndef f():\n    return 1\n```\nUse it as\n```\nf()\n```")
    'def f():\n    return 1\n'
    """
    blocks = re.findall(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)^[ \t]*```", answer, flags=re.DOTALL | re.MULTILINE)
    python = [text for language, text in blocks if language.lower() in ("python", "py", "python3")]
    return max(python or [text for _, text in blocks] or [answer], key=len)
