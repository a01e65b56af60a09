"""A run as one HTML page that needs nothing beside it: no script, no other file, no network.

Names, recipes and cards may come from strangers: all text is escaped, and the page's own policy forbids scripts.
"""

from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

from graftllm.errors import StorageError
from graftllm.evaluation.ledger import Ledger, read_ledger
from graftllm.evaluation.plots import PLOTS
from graftllm.evaluation.portrait import draw_portrait
from graftllm.evaluation.report import IN_SEQUENCE
from graftllm.evaluation.scores import Evaluation, Score
from graftllm.evaluation.tables import Grid, layer_grid, overhead_grids, pack_lines, role_grid
from graftllm.fusion.inventory import take_inventory
from graftllm.skillpack import SkillPack
from graftllm.storage import write_text

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_LARGEST_PLOT = 4 << 20  # bytes; what a run draws has a tenth of that


@dataclass(frozen=True)
class Share:
    """A cell with a colored ground: a score, or a part of a whole as a bar."""

    value: float
    text: str
    kind: str = "share"


Cell = str | Share


def write_page(run: Path, out: Path) -> None:
    """Write the page of a run, finished or not.

    Args:
        run: its directory.
        out: an .html file.

    Raises:
        RecordError: there is no run, or a file of it is damaged.
        PackError: a pack is damaged.
        StorageError: the page cannot be written, or its name does not end in .html.
    """
    if out.suffix != ".html":
        raise StorageError(f"{out}: expected a name that ends in .html; found {out.suffix!r}.")
    ledger = read_ledger(run)
    sections = {
        "Skills": _skills(ledger),
        "Instead of packs": _instead(ledger),
        "General tasks": _general(ledger),
        "Forgetting": _forgetting(ledger),
        "Router": _router(ledger),
        "SkillPacks": "".join(_pack(name, path, ledger) for name, path in ledger.packs.items()),
        "Learnt from": _data(ledger),
        "Costs": _costs(ledger),
        "Plots": _plots(run),
        "Recipe": f"<details><summary>All of it</summary><pre>{escape(ledger.recipe)}</pre></details>"
        if ledger.recipe
        else "",
    }
    body = "".join(f"<section><h2>{title}</h2>{inside}</section>" for title, inside in sections.items() if inside)
    style = files("graftllm.evaluation").joinpath("page.css").read_text(encoding="utf-8")
    name = escape(ledger.name)
    write_text(
        out,
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{name} · GraftLLM</title>\n'
        f'<meta http-equiv="content-security-policy" content="{_POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>\n{style}</style>\n</head>\n'
        f"<body>\n<header><h1>{name}</h1>{_summary(ledger)}</header>\n<main>{body}</main>\n</body>\n</html>\n",
    )


def _summary(ledger: Ledger) -> str:
    seconds = sum(step.seconds for step in ledger.steps.values())
    sizes = [path.stat().st_size for path in ledger.packs.values()]
    routes = _routed(ledger)
    tiles = {f"{len(sizes)} packs": f"{sum(sizes):,} bytes"} if sizes else {}
    if routes:
        tiles |= {f"{routes.value:.1%}": f"of {routes.n:,} test prompts routed right"}
    if "unplug" in ledger.steps:
        exact = ledger.steps["unplug"].result is True
        tiles |= {"Bit for bit" if exact else "NOT bit for bit": "is the base back when packs are unplugged"}
    if seconds:
        tiles |= {_duration(seconds): f"in {len(ledger.steps)} stages"}
    waiting = ", ".join(ledger.unfinished)
    seed = "" if ledger.seed is None else f'<p class="quiet">Seed {ledger.seed}</p>'
    unfinished = f'<p class="wrong">Begun and not finished: {escape(waiting)}.</p>' if waiting else ""
    items = "".join(f"<li><b>{escape(key)}</b>{escape(text)}</li>" for key, text in tiles.items())
    return f'{seed}{unfinished}<ul class="tiles">{items}</ul>'


def _skills(ledger: Ledger) -> str:
    columns = ("base", "source", "tuned", "pack", "routed")
    rows = []
    for skill in ledger.skills:
        kinds = {
            "base": _first(ledger, skill, "base", f"base.{skill}"),
            "source": _best_source(ledger, skill),
            "tuned": _first(ledger, skill, f"tuned.{skill}"),
            "pack": _first(ledger, skill, f"pack.{skill}"),
            "routed": _first(ledger, skill, "routed", f"after.{skill}"),
        }
        if any(kinds.values()):
            rows.append([skill, *(_score(kinds[column]) for column in columns)])
    return _table("% right, ± standard error", ["skill", *columns], rows)


def _instead(ledger: Ledger) -> str:
    last = ledger.skills[-1] if ledger.skills else ""
    in_sequence = ("LoRA in sequence" if rival == "sequential_lora" else rival for rival in IN_SEQUENCE)
    columns = (*in_sequence, "summed", "LoRA")
    found = {
        skill: [
            *(_first(ledger, skill, f"{rival}.{last}") for rival in IN_SEQUENCE),
            _first(ledger, skill, "summed"),
            _first(ledger, skill, f"lora.{skill}"),
        ]
        for skill in ledger.skills
    }
    asked = [i for i in range(len(columns)) if any(row[i] for row in found.values())]
    rows = [
        [skill, _score(_first(ledger, skill, "routed")), *(_score(row[i]) for i in asked)]
        for skill, row in found.items()
    ]
    title = "% right at the end of all steps"
    return _table(title, ["skill", "packs, routed", *(columns[i] for i in asked)], rows) if asked else ""


def _general(ledger: Ledger) -> str:
    shown = {
        name: tests["general"].by_task
        for name, tests in ledger.scores.items()
        if "general" in tests and name.split(".")[0] in ("base", "before", "tuned", "routed", "after")
    }
    tasks = list(dict.fromkeys(task for by_task in shown.values() for task in by_task))
    rows = [[task, *(_score(by_task.get(task)) for by_task in shown.values())] for task in tasks]
    return _table("% right", ["task", *map(_titled, shown)], rows)


def _forgetting(ledger: Ledger) -> str:
    tests = [*ledger.skills, "general"]
    steps = ["base", *(f"{rival}.{skill}" for rival in IN_SEQUENCE for skill in ledger.skills)]
    steps += ["before", *(f"after.{skill}" for skill in ledger.skills), "routed"]
    rows = [
        [_titled(step), *(_score(ledger.scores[step].get(test)) for test in tests)]
        for step in steps
        if step in ledger.scores
    ]
    return _table("% right, one row a step", ["", *tests], rows) if len(rows) > 2 else ""


def _router(ledger: Ledger) -> str:
    routes: Mapping[str, Mapping[str, int]] = ledger.result("routes")
    chosen = list(dict.fromkeys(["base", *ledger.skills, *(name for row in routes.values() for name in row)]))
    rows: list[list[Cell]] = [
        [test, *(Share(row.get(name, 0) / sum(row.values()), f"{row.get(name, 0):,}") for name in chosen)]
        for test, row in routes.items()
    ]
    parts = [_table("Test prompts by where they come from, and where the router sent them", ["", *chosen], rows)]
    grafted = ledger.directory / "grafted"
    if (grafted / "manifest.json").exists():
        shelf = take_inventory(grafted)
        parts += [_grid(Grid("On the shelf", shelf.columns, shelf.rows())), _facts(shelf.sentences())]
    return "".join(parts)


def _pack(name: str, path: Path, ledger: Ledger) -> str:
    pack = SkillPack.load(path)
    title, *facts = pack_lines(pack.header, path.stat().st_size)
    fidelity = ledger.result(f"verify.{name}")
    if fidelity:
        facts.append(f"KL to tuned  {fidelity['kl']:.4f} nats a token, on {fidelity['tokens']:,} tokens")
        facts.append(f"same top-1   {fidelity['top1_agreement']:.1%} of tokens")
    with TemporaryDirectory() as scratch:
        portrait = Path(scratch) / "portrait.png"
        draw_portrait(pack, portrait)
        picture = _picture(portrait, f"Rates, errors, bytes and directions of {name}")
    costs = "".join(map(_grid, overhead_grids(pack.header)))
    tables = _grid(role_grid(pack.header)) + _grid(layer_grid(pack.header))
    details = f"<details><summary>Bytes, rates and errors by role and layer</summary>{tables}{picture}</details>"
    return f"<article><h3>{escape(title)}</h3>{_facts(facts)}{costs}{details}</article>"


def _data(ledger: Ledger) -> str:
    rows = [
        [
            skill,
            name,
            f"{one.responses:,}",
            Share(one.right / max(1, one.responses), f"{one.right / max(1, one.responses):.1%}"),
            f"{one.sft_rows:,}",
            f"{one.pairs:,}",
            f"{one.output_tokens:,}" if one.output_tokens else "",
            "" if one.dollars is None else f"{one.dollars:.2f}",
        ]
        for skill, data in ledger.data.items()
        for name, one in data.sources.items()
    ]
    head = ["skill", "source", "responses", "right", "SFT rows", "pairs", "tokens written", "$"]
    return _table("Responses of each source, and what was kept of them", head, rows)


def _costs(ledger: Ledger) -> str:
    whole = sum(step.seconds for step in ledger.steps.values()) or 1.0
    kinds: dict[str, list[str]] = {}
    for name in ledger.steps:
        kinds.setdefault(name.split(".")[0], []).append(name)

    def row(title: str, names: Iterable[str]) -> list[Cell]:
        steps = [ledger.steps[name] for name in names]
        seconds = sum(step.seconds for step in steps)
        return [
            title,
            f"{seconds:,.1f}",
            Share(seconds / whole, f"{seconds / whole:.1%}", "bar"),
            _measured(sum(step.cpu_seconds for step in steps), 1),
            _measured(sum(step.gpu_seconds for step in steps), 1),
            _measured(max(step.peak_memory_bytes for step in steps) / 1e9, 2),
            _measured(max(step.peak_gpu_bytes for step in steps) / 1e9, 2),
        ]

    head = ["stage", "seconds", "share", "CPU s", "GPU s", "peak memory, GB", "peak GPU, GB"]
    by_kind = _table("By kind of stage", head, [row(kind, names) for kind, names in kinds.items()])
    each = _table("Each stage, as they ended", head, [row(name, [name]) for name in ledger.steps])
    return f"{by_kind}<details><summary>Each stage</summary>{each}</details>" if kinds else ""


def _plots(run: Path) -> str:
    found = [*sorted((run / "plots").glob("*.png")), *sorted((run / "skills").glob("*/*.png"))]
    return "".join(_picture(path, PLOTS.get(path.name, str(path.relative_to(run)))) for path in found)


def _picture(path: Path, caption: str) -> str:
    content = path.read_bytes()
    if len(content) > _LARGEST_PLOT:
        return f'<p class="quiet">{escape(caption)}: {len(content):,} bytes are too many for this page.</p>'
    source = f"data:image/png;base64,{b64encode(content).decode()}"
    return f'<figure><img alt="{escape(caption)}" src="{source}"><figcaption>{escape(caption)}</figcaption></figure>'


def _first(ledger: Ledger, test: str, *names: str) -> Evaluation | None:
    """Return the score on a test set of the first of these that was measured on it."""
    return next((ledger.scores[name][test] for name in names if test in ledger.scores.get(name, {})), None)


def _best_source(ledger: Ledger, skill: str) -> Evaluation | None:
    found = [
        tests[skill]
        for name, tests in ledger.scores.items()
        if f"{name}.".startswith(f"source.{skill}.") and skill in tests
    ]
    return max(found, key=lambda one: one.value, default=None)


def _routed(ledger: Ledger) -> Score | None:
    """Return how often the router chose right on test prompts; None where that was not counted."""
    routes: Mapping[str, Mapping[str, int]] = ledger.result("routes")
    asked = sum(sum(row.values()) for row in routes.values())
    right = sum(row.get("base" if test == "general" else test, 0) for test, row in routes.items())
    return Score(right / asked, asked) if asked else None


_TITLES = {**IN_SEQUENCE, "tuned": "tuned:", "routed": "packs, routed"}


def _titled(name: str) -> str:
    kind, _, skill = name.partition(".")
    return f"{_TITLES.get(kind, kind)} {skill}".strip()


def _score(found: Evaluation | Score | None) -> Cell:
    if found is None:
        return ""
    score = found.overall if isinstance(found, Evaluation) else found
    return Share(score.value, f"{100 * score.value:.1f} ± {100 * score.stderr:.1f}")


def _measured(value: float, decimals: int) -> str:
    return f"{value:,.{decimals}f}" if value else ""


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


def _facts(lines: Iterable[str]) -> str:
    """Return lines whose first column is twelve wide, or ends at two spaces, as a list of terms."""
    pairs = [line.split("  ", 1) if "  " in line else line.split(" ", 1) for line in lines]
    return f"<dl>{''.join(f'<dt>{escape(a.strip())}</dt><dd>{escape(b.strip())}</dd>' for a, b in pairs)}</dl>"


def _grid(grid: Grid) -> str:
    return _table(grid.title, grid.columns, grid.rows)


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Return a table; nothing when it has no rows."""
    if not rows:
        return ""
    words = [any(map(_is_words, column)) for column in zip(*rows, strict=True)]
    top = "".join(
        f'<th scope="col"{_WORDS if left else ""}>{escape(cell)}</th>' for cell, left in zip(head, words, strict=True)
    )
    lines = "".join(f"<tr>{''.join(map(_cell, row, words))}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><caption>{escape(title)}</caption><thead><tr>{top}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


_WORDS = ' class="words"'


def _is_words(cell: Cell) -> bool:
    return isinstance(cell, str) and bool(cell) and not cell[:1].isdigit()


def _cell(cell: Cell, words: bool) -> str:
    if isinstance(cell, Share):
        return f'<td class="{cell.kind}" style="--v:{100 * min(1, max(0, cell.value)):.1f}%">{escape(cell.text)}</td>'
    return f"<td{_WORDS if words else ''}>{escape(cell)}</td>"
