"""New skills for a grafted model: trained as in a run, added as packs, and the old ones measured before and after.

Each skill of the recipe that the shelf lacks is learnt; those that are on it are measured, so that one
recipe grows with the shelf. Stages are skipped when done: a killed `learn` goes on where it was. What is on the
shelf then counts, not what a stage once put there.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel

from graftllm.errors import FusionError, RecipeError
from graftllm.evaluation.scores import Answer, Score
from graftllm.evaluation.tables import Grid
from graftllm.fusion.applying import apply_packs
from graftllm.fusion.directory import add_packs
from graftllm.fusion.fitting import check_prompts, features_of, fit_router
from graftllm.fusion.grafted import GraftedModel
from graftllm.fusion.manifest import AUTO, Manifest, open_packs, open_router, read_manifest, sha256_of
from graftllm.fusion.names import unknown_pack
from graftllm.fusion.routes import BASE
from graftllm.fusion.routing import Router
from graftllm.loading import load_model, load_tokenizer
from graftllm.pipeline.measuring import answering, measure, measure_source, measure_tuned
from graftllm.pipeline.packing import check_budget, pack
from graftllm.pipeline.preparing import check_inputs, prompts_of, test_of
from graftllm.pipeline.transfer import score, tune
from graftllm.pipeline.work import GENERAL, Work, check_target
from graftllm.records import read_prompts
from graftllm.stages import Stamp
from graftllm.storage import write_text


class Learned(BaseModel):
    """The forgetting matrix of a `learn`, and whether anything old has changed.

    Attributes:
        rows: `before`, then `after NAME` for each skill learnt.
        columns: test sets: old skills, new skills, `general`.
        scores: share of right answers, one list a row; the router chooses the packs.
        n: prompts of each test set.
        old: the columns that were there before.
        moved: of each old column, how many prompts now go elsewhere than before, or to packs by other weights.
        packs_unchanged: whether every old pack is the same bytes.
        drift: by skill learnt, largest share of any old class's examples that the new router sends elsewhere.
    """

    rows: list[str]
    columns: list[str]
    scores: list[list[float]]
    n: dict[str, int]
    old: list[str]
    moved: dict[str, int]
    packs_unchanged: bool
    drift: dict[str, float]

    @property
    def forgotten(self) -> dict[str, float]:
        """By old column, by how much its score has fallen (or risen, below 0)."""
        places = [(name, self.columns.index(name)) for name in self.old]
        return {name: self.scores[0][i] - self.scores[-1][i] for name, i in places}

    def grid(self) -> Grid:
        """Return the matrix as a table, in percent with standard errors."""
        rows = [
            [row, *(f"{100 * value:.1f} ± {100 * Score(value, self.n[test]).stderr:.1f}" for test, value in cells)]
            for row, cells in ((row, zip(self.columns, line, strict=True)) for row, line in self._lines())
        ]
        return Grid("Forgetting matrix, % right", ["", *self.columns], rows)

    def sentences(self) -> list[str]:
        """Return what the matrix does not say, a line each."""
        same = "are the same bytes" if self.packs_unchanged else "are NOT the same bytes"
        moved = ", ".join(f"{count} of {self.n[test]} of {test}" for test, count in self.moved.items() if count)
        changed = ", ".join(f"{name} {-100 * by:+.1f} points" for name, by in self.forgotten.items() if by)
        return [
            f"Old packs {same}; old test prompts that go elsewhere: {moved or 'none'}.",
            f"Old scores: {changed or 'identical'}.",
        ]

    def _lines(self) -> list[tuple[str, list[float]]]:
        return list(zip(self.rows, self.scores, strict=True))


def learn(work: Work, into: Path, *, on: Sequence[str] = ()) -> Learned:
    """Learn the skills of a recipe that a grafted model lacks, and add them to it as packs.

    Args:
        work: a recipe whose target is the grafted model's base, and a directory for what is made on the way.
        into: the grafted model. Its packs stay as they are; the router learns the new packs from their prompts alone.
        on: packs of it that training starts from, on top of the base. The new pack then holds what they know, too, as
            every pack is a difference to the bare base.

    Returns:
        The matrix, which is also written to `forgetting.json` and `forgetting.md` of the run's directory.

    Raises:
        RecipeError: the target is another base, or there is nothing to learn.
        FusionError: a pack is unknown, packs have no router, the new prompts are too much like old ones, or the shelf
            has another pack of a skill than the recipe makes now.
        GraftError: something else cannot be used; see the message.
    """
    manifest = read_manifest(into)
    if manifest.fingerprint != work.target.fingerprint:
        raise RecipeError(
            f"target: expected the base of {into}, {manifest.base} ({manifest.fingerprint[:12]}), found "
            f"{work.recipe.target} ({work.target.fingerprint[:12]})."
        )
    if stranger := next((name for name in on if name not in manifest.packs), None):
        raise unknown_pack(stranger, manifest.packs)
    shelf = _shelf_before(work, into)
    before = cast(dict[str, str], shelf.result)
    new = [name for name in work.recipe.skills if name not in before]
    if not new:
        raise RecipeError(f"skills: expected one that {into} has no pack of, found {', '.join(before)} alone; add it.")
    check_inputs(work)
    check_budget(work)
    tests = [name for name in work.recipe.skills if name in before] + [GENERAL]
    columns = [*tests[:-1], *new, GENERAL]
    rows = {"before": measure(work, "before", [shelf], columns, partial(_routed, work, into))}
    routes = _routes(work, into, "before", shelf, tests)
    drift, start, state = {}, _start(work, into, on), {}
    for name in new:
        joined = cast(dict[str, Any], _join(work, into, name, start).result)
        drift[name] = joined["drift"]
        state = _state(into) if name == new[-1] else joined["shelf"]
        rows[f"after {name}"] = measure(work, f"after.{name}", [state], columns, partial(_routed, work, into))
    after = _routes(work, into, f"after.{new[-1]}", state, tests)
    moved = {test: sum(a != b for a, b in zip(routes[test], after[test], strict=True)) for test in tests}
    learned = Learned(
        rows=list(rows),
        columns=columns,
        scores=[[found[test].value for test in columns] for found in rows.values()],
        n={test: rows["before"][test].overall.n for test in columns},
        old=tests,
        moved=moved,
        packs_unchanged=_unchanged(into, before),
        drift=drift,
    )
    _write(learned, work.directory)
    return learned


def _shelf_before(work: Work, into: Path) -> Stamp:
    """Remember which packs were there before this recipe was learnt, by name and SHA-256."""

    def action() -> dict[str, str]:
        return {name: pack.sha256 for name, pack in read_manifest(into).packs.items()}

    return work.stages.run("shelf", [str(into.resolve()), list(work.recipe.skills)], [], action)


def _start(work: Work, into: Path, on: Sequence[str]) -> Path:
    """Return the checkpoint that training starts from."""
    if not on:
        return Path(work.target.path)
    manifest, out = read_manifest(into), work.directory / "start"

    def action() -> None:
        packs = open_packs(into, manifest)
        apply_packs(work.target, [packs[name] for name in on], out)

    work.stages.run("start", [manifest.packs[name].sha256 for name in on], [out], action)
    return out


def _join(work: Work, into: Path, name: str, start: Path) -> Stamp:
    """Train, pack and add one skill.

    The result is the `drift`, the largest share of any old class's examples that the router sends elsewhere, and the
    `shelf` as it then is.
    """
    check_target(work)
    score(work, name)
    target = work.target.path
    trained = tune(work, name, start, work.tuned(name), name=name)
    scores = {
        "base": measure(work, f"base.{name}", [target], [name], partial(answering, work, target)),
        f"source.{name}": measure_source(work, name),
        f"tuned.{name}": measure_tuned(work, name, trained),
    }
    packed = pack(work, name, trained, scores)
    shelved = read_manifest(into).packs.get(name)
    if shelved is None:
        work.stages.forget(f"join.{name}")  # whoever added it once, it is not there
    elif shelved.sha256 != sha256_of(work.pack(name)):
        raise FusionError(
            f"{into}: expected the pack {name!r} that this recipe makes, found another ({shelved.sha256[:12]}); remove "
            f"it first (`graftllm remove {into} {name}`), or give the skill another name."
        )

    def action() -> dict[str, Any]:
        if name not in read_manifest(into).packs:  # else an attempt added it that was killed before it could say so
            _add(work, into, name)
        return {"drift": _drift_of(into, name), "shelf": _state(into)}

    return work.stages.run(f"join.{name}", [packed, str(into.resolve())], [], action)


def _add(work: Work, into: Path, name: str) -> None:
    """Put a skill's pack on the shelf, and teach the router its prompts."""
    manifest, target = read_manifest(into), work.target.path
    old, prompts = _router(into, manifest), read_prompts(work.skill(name) / "sft.jsonl")
    if old is None:
        both = {BASE: read_prompts(prompts_of(work, GENERAL)), name: prompts}
        router = fit_router(target, both, work.recipe.router, seed=work.recipe.seed, device=work.device)
    else:
        check_prompts({name: prompts})
        model, tokenizer = load_model(target, device=work.device), load_tokenizer(target)
        features = features_of(model, tokenizer, prompts, old.options, label=f"router: {name}")
        router = old.with_pack(name, features, drift=work.recipe.router.drift)
    add_packs(into, {name: work.pack(name)}, router=router, taught=manifest)


def _drift_of(into: Path, name: str) -> float:
    """Return the largest share of any other class's examples that the router sent elsewhere before it knew a pack."""
    router = _router(into, read_manifest(into))
    assert router is not None  # it knows every pack, and there is one
    return max(router.without(name).drift(router).values())


def _state(into: Path) -> dict[str, Any]:
    """Return all that a grafted model's answers depend on."""
    return read_manifest(into).model_dump(mode="json")


def _router(into: Path, manifest: Manifest) -> Router | None:
    """Return the router of a grafted model; None if it never had one, nor packs."""
    if manifest.unrouted():
        raise FusionError(
            f"{into}: expected a router that knows every pack, and none knows {', '.join(manifest.unrouted())}; "
            "fuse it with --router-data first."
        )
    return open_router(into, manifest)


def _routed(work: Work, into: Path) -> Answer:
    grafted = GraftedModel.load(into, device=work.device)
    return lambda prompts: grafted.generate([prompt.question for prompt in prompts], AUTO, work.greedy)


def _routes(work: Work, into: Path, name: str, state: Any, tests: Sequence[str]) -> dict[str, list[Any]]:
    """Return where each test prompt goes, and by which weights."""
    files = {test: test_of(work, test) for test in tests}

    def action() -> dict[str, Any]:
        grafted = GraftedModel.load(into, device=work.device)
        return {
            test: [
                [route.name, dict(route.weights)]
                for route in grafted.route([prompt.question for prompt in read_prompts(path)])
            ]
            for test, path in files.items()
        }

    stamp = work.stages.run(f"routed.{name}", [state, *files.values()], [], action)
    return cast(dict[str, list[Any]], stamp.result)


def _unchanged(into: Path, before: dict[str, str]) -> bool:
    manifest = read_manifest(into)
    open_packs(into, manifest)  # compares each file with the manifest's hash
    return all(name in manifest.packs and manifest.packs[name].sha256 == found for name, found in before.items())


def _write(learned: Learned, directory: Path) -> None:
    grid = learned.grid()
    lines = [grid.columns, ["---"] * len(grid.columns), *grid.rows]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    closing = "\n".join(f"- {line}" for line in learned.sentences())
    write_text(directory / "forgetting.md", f"# {grid.title}\n\n{text}\n\n{closing}\n")
    write_text(directory / "forgetting.json", learned.model_dump_json(indent=1))
