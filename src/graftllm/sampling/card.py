"""The data card: what a skill's rows were made of, as JSON and as a page to read."""

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from graftllm.records import Prompt, Response
from graftllm.sampling.pairs import Pairs, fault
from graftllm.sampling.scoring import RIGHT, dollars
from graftllm.storage import write_text
from graftllm.transfer_options import PairOptions, SourceOptions

_EXAMPLES = 3
_CUT = 400  # characters of an example on the page; the JSON has it whole


@dataclass(frozen=True)
class Lengths:
    """Characters of texts."""

    mean: float
    median: float
    longest: int


@dataclass(frozen=True)
class SourceCard:
    """What a source gave; tokens and dollars where its endpoint counts them and the recipe has a price."""

    responses: int
    right: int
    mean_grade: float | None
    lengths: Lengths | None
    sft_rows: int
    pairs: int
    input_tokens: int
    output_tokens: int
    dollars: float | None


@dataclass(frozen=True)
class DataCard:
    """A skill's rows: counts, lengths, sources, judges, rejections, contamination, examples."""

    skill: str
    prompts: Mapping[str, Any]
    sources: Mapping[str, SourceCard]
    failed_requests: Mapping[str, int]
    judges: list[dict[str, Any]]
    agreement: dict[str, Any] | None
    not_learnt_from: Mapping[str, int]
    sft: dict[str, Any]
    preference: dict[str, Any]


def build_card(
    skill: str,
    responses: Sequence[Response],
    rows: Sequence[Prompt],
    found: Pairs,
    options: PairOptions,
    sources: Sequence[SourceOptions],
    about: Mapping[str, Any],
) -> DataCard:
    """Count what went in and what came out.

    Args:
        skill: the skill's name.
        responses: all of them, judged.
        rows: to fine-tune on.
        found: pairs to prefer by.
        options: how rows and pairs were chosen.
        sources: in the order that they were asked.
        about: `prompts`: what preparing them found; `failed`: responses that could not be had, by source;
            `judges`: what each took; `agreement`: of grades with rules, or None.
    """
    said = {(row.prompt_id, row.text): row.source for row in reversed(responses)}
    by_source = Counter(said[_prompt_id(row, said), row.answer or ""] for row in rows)
    reasons = Counter(reason for row in responses if (reason := fault(row, options)))
    return DataCard(
        skill=skill,
        prompts=about["prompts"],
        sources={
            one.name: _source_card(
                [row for row in responses if row.source == one.name],
                one,
                by_source[one.name],
                sum(pair.source == one.name for pair in found.pairs),
            )
            for one in sources
        },
        failed_requests=about["failed"],
        judges=about["judges"],
        agreement=about["agreement"],
        not_learnt_from=dict(reasons.most_common()),
        sft={
            "rows": len(rows),
            "answer_lengths": _lengths([row.answer or "" for row in rows]),
            "examples": [{"question": row.question[-1]["content"], "answer": row.answer} for row in rows[:_EXAMPLES]],
        },
        preference={
            "pairs": len(found.pairs),
            "chosen_lengths": _lengths([pair.chosen for pair in found.pairs]),
            "rejected_lengths": _lengths([pair.rejected for pair in found.pairs]),
            "groups_without_a_pair": dict(found.left_out),
            "examples": [
                {"question": pair.messages[-1]["content"], "chosen": pair.chosen, "rejected": pair.rejected}
                for pair in found.pairs[:_EXAMPLES]
            ],
        },
    )


def write_card(card: DataCard, directory: Path) -> list[Path]:
    """Write `data-card.json` and `data-card.md`; return their paths."""
    paths = [directory / "data-card.json", directory / "data-card.md"]
    write_text(paths[0], json.dumps(asdict(card), ensure_ascii=False, indent=1) + "\n")
    write_text(paths[1], _page(card))
    return paths


def _prompt_id(row: Prompt, said: Mapping[tuple[str, str], str]) -> str:
    """Return the id of the prompt that a row answers; with rows of each source, the source stands behind it."""
    return row.id if (row.id, row.answer or "") in said else row.id.rpartition("/")[0]


def _source_card(responses: Sequence[Response], options: SourceOptions, rows: int, pairs: int) -> SourceCard:
    grades = [row.grade for row in responses if row.grade is not None]
    tokens = (sum(row.input_tokens for row in responses), sum(row.output_tokens for row in responses))
    return SourceCard(
        responses=len(responses),
        right=sum((row.score or 0) >= RIGHT for row in responses),
        mean_grade=statistics.fmean(grades) if grades else None,
        lengths=_lengths([row.text for row in responses]),
        sft_rows=rows,
        pairs=pairs,
        input_tokens=tokens[0],
        output_tokens=tokens[1],
        dollars=dollars(options.price, *tokens),
    )


def _lengths(texts: Sequence[str]) -> Lengths | None:
    sizes = [len(text) for text in texts]
    return Lengths(round(statistics.fmean(sizes), 1), statistics.median(sizes), max(sizes)) if sizes else None


def _page(card: DataCard) -> str:
    count = sum(one.responses for one in card.sources.values())
    lengths = (
        ("SFT answers", card.sft["answer_lengths"]),
        ("chosen", card.preference["chosen_lengths"]),
        ("rejected", card.preference["rejected_lengths"]),
    )
    lines = [
        f"# Data of {card.skill}",
        f"{card.sft['rows']} rows to fine-tune on and {card.preference['pairs']} preference pairs, from {count} "
        f"responses to {card.prompts['prompts']} prompts.",
        "## Prompts",
        "{read} read, {duplicates} duplicates left out. {contaminated} share words with the {compared_with} test "
        "prompts (runs of {ngram} words; action: {action}).".format(**card.prompts),
        _bullets(f"{_short(one['prompt_id'])}: {_short(one['shared'])}" for one in card.prompts["examples"]),
        "## Sources",
        _table(_SOURCE_HEAD, [_source_row(name, one) for name, one in card.sources.items()]),
        _bullets(
            f"{failed} responses of {name} could not be had" for name, failed in card.failed_requests.items() if failed
        ),
        "## Judges",
        _table(list(card.judges[0]), [list(one.values()) for one in card.judges]),
        "Grades put a right answer above a wrong one in {share:.1%} of {pairs} cases (right by {rule}).".format(
            **card.agreement
        )
        if card.agreement
        else "",
        "## Left out",
        _bullets(f"{reason}: {count} responses" for reason, count in card.not_learnt_from.items()),
        _bullets(f"no pair, {why}: {n} groups" for why, n in card.preference["groups_without_a_pair"].items()),
        "## Lengths, in characters",
        _table(
            ["", "mean", "median", "longest"],
            [[name, one.mean, one.median, one.longest] for name, one in lengths if one is not None],
        ),
        "## Examples",
        _bullets(f"{_short(one['question'])} → {_short(one['answer'])}" for one in card.sft["examples"]),
        _bullets(
            f"{_short(one['question'])} → chosen: {_short(one['chosen'])}; rejected: {_short(one['rejected'])}"
            for one in card.preference["examples"]
        ),
    ]
    return "\n\n".join(line for line in lines if line) + "\n"


_SOURCE_HEAD = (
    "source", "responses", "right", "mean grade", "mean chars", "SFT rows", "pairs", "tokens in", "tokens out", "$",
)  # fmt: skip


def _source_row(name: str, one: SourceCard) -> list[Any]:
    mean = one.lengths and one.lengths.mean
    counts = [name, one.responses, one.right, one.mean_grade, mean, one.sft_rows, one.pairs]
    return [*counts, one.input_tokens, one.output_tokens, one.dollars]


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _short(text: str) -> str:
    shown = json.dumps(text, ensure_ascii=False)
    return f"`{shown if len(shown) <= _CUT else shown[:_CUT] + '...'}`".replace("|", "\\|")
