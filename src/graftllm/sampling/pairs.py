"""Judged responses -> rows to fine-tune on, and pairs to prefer by.

SFT rows: the best response to each prompt, over all sources. Preference pairs: the best against
the worst response of the same source to the same prompt (arXiv 2505.18502, FuseChat 3.0); where a
rule judges, a right one against a wrong one. The grade orders what the rule leaves equal.
"""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from graftllm.errors import SamplingError
from graftllm.records import Message, PreferencePair, Prompt, Response
from graftllm.sampling.reasoning import without_reasoning
from graftllm.sampling.scoring import RIGHT
from graftllm.transfer_options import PairOptions


def sft_rows(
    prompts: Sequence[Prompt], responses: Sequence[Response], options: PairOptions, *, skill: str
) -> list[Prompt]:
    """Return one answered row per prompt (or prompt and source) with an acceptable response; of equals the first wins.

    Rows of several sources to one prompt have the source's name behind the id. A row occurs once.

    Raises:
        SamplingError: no response to any prompt is acceptable; the message shows some of them.
    """
    best: dict[tuple[str, str], Response] = {}
    for row in responses:
        key = (row.prompt_id, row.source if options.sft == "each" else "")
        if fault(row, options) is None and (key not in best or _rank(row) > _rank(best[key])):
            best[key] = row
    by_prompt = defaultdict[str, list[Response]](list)
    for row in best.values():
        by_prompt[row.prompt_id].append(row)
    rows: dict[tuple[str, str], Prompt] = {}
    for prompt in _share(prompts, options, first=True):
        for row in by_prompt[prompt.id]:
            name = f"{prompt.id}/{row.source}" if options.sft == "each" else prompt.id
            answer = Message(role="assistant", content=row.text)
            rows.setdefault((prompt.id, row.text), Prompt(name, (*prompt.question, answer), prompt.task or skill))
    if not rows:
        raise SamplingError(_nothing_right(prompts, responses, options, skill))
    return list(rows.values())


@dataclass(frozen=True)
class Pairs:
    """Preference pairs, and how many groups of responses gave none, by reason."""

    pairs: list[PreferencePair]
    left_out: Mapping[str, int]


def preference_pairs(prompts: Sequence[Prompt], responses: Sequence[Response], options: PairOptions) -> Pairs:
    """Return best against worst to each prompt: of each source, or over all of them.

    A pair's gap is the difference of grades, or of scores where nothing was graded.
    """
    asked = {prompt.id: prompt.question for prompt in prompts_for_pairs(prompts, options)}
    groups = defaultdict[tuple[str, str], list[Response]](list)
    for row in responses:
        if row.prompt_id in asked:
            groups[row.prompt_id, "" if options.preference == "any_source" else row.source].append(row)
    pairs, left_out = [], Counter[str]()
    for (prompt_id, _), answers in groups.items():
        found = _pair(sorted(answers, key=_rank), options)
        if isinstance(found, str):
            left_out[found] += 1
        else:
            best, worst = found
            pairs.append(PreferencePair(prompt_id, asked[prompt_id], best.text, worst.text, best.source))
    return Pairs(pairs, dict(left_out))


def prompts_for_pairs(prompts: Sequence[Prompt], options: PairOptions) -> Sequence[Prompt]:
    """Return the prompts that pairs are made of: all of them, or those that `sft_share` leaves."""
    return _share(prompts, options, first=False)


def fault(response: Response, options: PairOptions) -> str | None:
    """Return why a response is not learnt from, or None."""
    if problem := _flaw(response, options):
        return problem
    if response.score is None and response.grade is None:
        return "not judged"
    if (RIGHT if response.score is None else response.score) < RIGHT:
        return "wrong"
    if options.min_grade is not None and (response.grade is None or response.grade < options.min_grade):
        return "graded too low"
    return None if without_reasoning(response.text).strip() else "empty"


def _flaw(response: Response, options: PairOptions) -> str | None:
    """Return what makes a response useless also as the worse of a pair: it would teach something else."""
    said = without_reasoning(response.text)
    if response.truncated:
        return "cut off"
    if any(marker in said for marker in _MARKERS) or (response.text.strip() and not said.strip()):
        return "broken template"
    if options.refusals == "drop" and (response.score or 0) < RIGHT and _REFUSAL.match(said):
        return "refusal"
    if options.max_chars is not None and len(response.text) > options.max_chars:
        return "too long"
    return None


_MARKERS = (
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "[INST]",
    "[/INST]", "<|endoftext|>", "<|user|>", "<|assistant|>", "<think>",
)  # fmt: skip
_REFUSAL = re.compile(
    r"\W*(?:(?:i'?m sorry|i am sorry|sorry|i apologi[sz]e|unfortunately|as an ai(?: language)? model)\W*)?(?:but\W+)?"
    r"(?:i (?:cannot|can'?t|can not|won'?t|will not) (?:help|assist|fulfil|comply|provide|answer|do that|engage|create)"
    r"|i(?:'?m| am) (?:unable|not able) to|i(?:'?m| am) (?:just )?an ai|as an ai(?: language)? model"
    r"|(?:抱歉|对不起|很抱歉).{0,3}(?:我)?(?:无法|不能))",
    flags=re.IGNORECASE,
)


def _rank(response: Response) -> tuple[float, float]:
    return response.score or 0.0, response.grade if response.grade is not None else float("-inf")


def _is_judged(response: Response) -> bool:
    return response.score is not None or response.grade is not None


def _pair(ranked: Sequence[Response], options: PairOptions) -> tuple[Response, Response] | str:
    """Return the best and the worst of responses in ascending order, or why they make no pair."""
    best = next((row for row in reversed(ranked) if fault(row, options) is None), None)
    worst = next((row for row in ranked if _is_judged(row) and _flaw(row, options) is None), None)
    if best is None:
        return "no response good enough"
    if worst is None or (best.score is not None and (worst.score or 0) >= RIGHT):
        return "no response bad enough"
    if best.grade is not None and worst.grade is not None:
        gap = best.grade - worst.grade
    else:
        gap = (best.score or 0) - (worst.score or 0)
    if gap <= 0 or gap < options.min_gap:
        return "gap too small"
    return "gap too large" if options.max_gap is not None and gap > options.max_gap else (best, worst)


def _share(prompts: Sequence[Prompt], options: PairOptions, *, first: bool) -> Sequence[Prompt]:
    """Return the prompts for SFT (`first`) or those for pairs; which is which depends on their ids alone."""
    if options.sft_share is None:
        return prompts
    ordered = sorted(prompts, key=lambda prompt: hashlib.sha256(prompt.id.encode()).digest())
    count = round(options.sft_share * len(prompts))
    chosen = {prompt.id for prompt in (ordered[:count] if first else ordered[count:])}
    return [prompt for prompt in prompts if prompt.id in chosen]


def _nothing_right(prompts: Sequence[Prompt], responses: Sequence[Response], options: PairOptions, skill: str) -> str:
    by_id = {prompt.id: prompt for prompt in prompts}

    def shown(row: Response) -> str:
        prompt, reason = by_id[row.prompt_id], fault(row, options)
        why = f"expected {prompt.reference!r}" if reason == "wrong" and prompt.reference is not None else reason
        return f"{prompt.messages[-1]['content']!r} -> {row.text!r} ({why})"

    examples = "; ".join(map(shown, responses[:3]))
    sources = ", ".join(sorted({response.source for response in responses}))
    return (
        f"skill {skill!r}: none of {len(responses)} responses of {sources} is right. For example: {examples}. "
        "Check the judge and the references, or choose a source that has the skill."
    )
