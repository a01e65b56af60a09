"""Scored responses -> rows to fine-tune on, and pairs to prefer by.

SFT rows: the best response to each prompt, over all sources. Preference pairs: the best against
the worst response of the same source to the same prompt (arXiv 2505.18502, FuseChat 3.0).
"""

from collections import defaultdict
from collections.abc import Sequence

from graftllm.errors import SamplingError
from graftllm.records import Message, PreferencePair, Prompt, Response

RIGHT = 1.0  # the score of a right answer; anything below is not learnt from


def sft_rows(prompts: Sequence[Prompt], responses: Sequence[Response], *, skill: str) -> list[Prompt]:
    """Return one answered row per prompt that has a right response; of equals, the first wins.

    Raises:
        SamplingError: no response to any prompt is right; the message shows some of them.
    """
    best: dict[str, Response] = {}
    for response in responses:
        if (response.score or 0) >= RIGHT:
            best.setdefault(response.prompt_id, response)
    if not best:
        raise SamplingError(_nothing_right(prompts, responses, skill))
    return [
        Prompt(
            prompt.id, (*prompt.question, Message(role="assistant", content=best[prompt.id].text)), prompt.task or skill
        )
        for prompt in prompts
        if prompt.id in best
    ]


def preference_pairs(prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[PreferencePair]:
    """Return best against worst of each source to each prompt, where the best is right and the worst is not."""
    by_source: dict[tuple[str, str], list[Response]] = defaultdict(list)
    for response in responses:
        by_source[response.prompt_id, response.source].append(response)
    messages = {prompt.id: prompt.question for prompt in prompts}
    pairs: list[PreferencePair] = []
    for (prompt_id, source), answers in by_source.items():
        ranked = sorted(answers, key=lambda response: response.score or 0)
        worst, best = ranked[0], ranked[-1]
        if (best.score or 0) >= RIGHT > (worst.score or 0):
            pairs.append(PreferencePair(prompt_id, messages[prompt_id], best.text, worst.text, source))
    return pairs


def _nothing_right(prompts: Sequence[Prompt], responses: Sequence[Response], skill: str) -> str:
    by_id = {prompt.id: prompt for prompt in prompts}
    examples = "; ".join(
        f"{by_id[r.prompt_id].messages[-1]['content']!r} -> {r.text!r} (expected {by_id[r.prompt_id].reference!r})"
        for r in responses[:3]
    )
    sources = ", ".join(sorted({response.source for response in responses}))
    return (
        f"skill {skill!r}: none of {len(responses)} responses of {sources} is right. For example: {examples}. "
        "Check the judge and the references, or choose a source that has the skill."
    )
