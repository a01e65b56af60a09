"""What `fusion.py` compares: each row answers the test prompts of all skills and of the general tasks.

A merge into one model gets the best of one grid of scales, the same for all, on validation prompts drawn apart: of the
576 of skills in three seeds, 6 are training prompts too. Methods with a model for each task are served by the router
that serves the packs, and pay for it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from fusion_models import Built
from torch import Tensor

from graftllm.checkpoint import Checkpoint
from graftllm.compression.calibration import collect_moments
from graftllm.compression.prices import Calibration
from graftllm.delta import Delta
from graftllm.demo import GENERAL as GENERAL_TASKS
from graftllm.demo import WordTask, word_rows
from graftllm.evaluation.scores import evaluate
from graftllm.fusion.directory import write_grafted
from graftllm.fusion.grafted import AUTO, GraftedModel
from graftllm.fusion.inputs import Stacks, open_tuned, stacked
from graftllm.fusion.methods.table import METHODS, Method
from graftllm.fusion.methods.tasks import Knobs, Tasks
from graftllm.fusion.search import answer_loss, search_weights
from graftllm.generation import generate
from graftllm.live import named_values
from graftllm.loading import load_model, load_tokenizer
from graftllm.packer import compress_to
from graftllm.packing_options import PackOptions
from graftllm.pipeline.baselines import BASELINES
from graftllm.pipeline.packing import fuse
from graftllm.pipeline.work import GENERAL
from graftllm.records import Prompt, read_prompts
from graftllm.tensors import DTYPES

SCALES = (0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5)
DISTILLED = PackOptions(budget="4%", distill=600)
THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6)  # of tall-mask, for each task, as published
_TESTS, _VALIDATIONS = 200, 32  # prompts of each skill; of the general tasks together half as many, and as many
_VALIDATION_SEED = 1000  # far from the seeds of the rows that models learn from


@dataclass(frozen=True)
class Measurement:
    """One row of the comparison, of one seed.

    Attributes:
        scores: by skill, and of the general tasks together.
        stored_bytes: everything that has to be kept to answer so, the base included where it is needed.
        note: what was chosen for it.
    """

    scores: Mapping[str, float]
    stored_bytes: int
    note: str = ""


@dataclass(frozen=True)
class Bench:
    """One seed's models, its prompts, and a live base model whose weights are set to what is measured."""

    built: Built
    words: Sequence[WordTask]  # the skills

    @cached_property
    def base(self) -> Checkpoint:
        """The target."""
        return self.built.work.target

    @cached_property
    def stacks(self) -> Stacks:
        """The deltas of the fine-tunes, uncompressed: what merging methods get."""
        work = self.built.work
        return stacked(self.base, [open_tuned(self.base, work.tuned(name), name=name) for name in self.built.skills])

    @cached_property
    def deltas(self) -> dict[str, Tensor]:
        """The same, in memory: these models are small."""
        return dict(self.stacks)

    @property
    def names(self) -> tuple[str, ...]:
        """The skills, in the order of the stacks."""
        return tuple(one.name for one in self.stacks.tuned)

    @cached_property
    def live(self) -> Any:
        """The target as a live model."""
        return load_model(self.base.path, device=self.built.work.device)

    @cached_property
    def tokenizer(self) -> Any:
        """The target's tokenizer."""
        return load_tokenizer(self.base.path)

    @cached_property
    def grafted(self) -> GraftedModel:
        """The base with all packs and a router."""
        fuse(self.built.work, [self.built.stamp])
        return GraftedModel.load(self.built.work.grafted, device=self.built.work.device)

    @cached_property
    def distilled(self) -> GraftedModel:
        """The same with packs whose codes are trained, on the SFT rows that calibrate the others."""
        work, home = self.built.work, self.distilled_home

        def pack(skill: str, out: Path) -> None:
            delta, rows = Delta(self.base, Checkpoint.open(work.tuned(skill))), work.skill(skill) / "sft.jsonl"
            compress_to(out, delta, DISTILLED, calibration=read_prompts(rows), device=work.device)

        packs = {skill: home / f"{skill}.safetensors" for skill in self.built.skills}
        for skill, out in packs.items():
            work.stages.run(f"distilled.{skill}", [self.built.stamp, DISTILLED], [out], partial(pack, skill, out))
        write_grafted(home / "grafted", work.recipe.target, packs, self.grafted.router)
        return GraftedModel.load(home / "grafted", device=work.device)

    @property
    def distilled_home(self) -> Path:
        """Where these packs lie, and `grafted` with them."""
        return self.built.work.directory / "distilled"

    @cached_property
    def tests(self) -> dict[str, list[Prompt]]:
        """Test prompts of each skill, and of the general tasks."""
        home = self.built.work.directory / "zoo" / "prompts"
        found = {name: read_prompts(home / f"{name}.test.jsonl")[:_TESTS] for name in self.built.skills}
        return found | {GENERAL: read_prompts(home / "general.test.jsonl")[::5]}

    @cached_property
    def validation(self) -> dict[str, list[Prompt]]:
        """Validation prompts of each skill, and of the general tasks."""
        seed = _VALIDATION_SEED + self.built.work.recipe.seed
        found = {word.name: word_rows(word, _VALIDATIONS, seed=seed) for word in self.words}
        each = _VALIDATIONS // len(GENERAL_TASKS) + 1
        return found | {GENERAL: [row for word in GENERAL_TASKS for row in word_rows(word, each, seed=seed)]}

    @cached_property
    def routes(self) -> dict[str, list[str]]:
        """Where the router sends the test prompts."""
        found = {}
        for name, prompts in self.tests.items():
            found[name] = [route.name for route in self.grafted.route([prompt.question for prompt in prompts])]
        return found

    def set_weights(self, delta: Callable[[str], Tensor] | None) -> None:
        """Give the live model the base's weights plus a delta; the base's alone for None."""
        parameters = named_values(self.live)
        for name, spec in self.base.specs.items():
            value = self.base.tensor(name)
            if delta is not None:
                value = (value.float() + delta(name)).to(DTYPES[spec.dtype])
            parameters[name].data.copy_(value)

    def texts(self, prompts: Sequence[Prompt]) -> list[str]:
        """Return the live model's greedy answers."""
        questions = [prompt.question for prompt in prompts]
        return [one[0] for one in generate(self.live, self.tokenizer, questions, self.built.work.greedy)]

    def scores(self, prompts: Mapping[str, Sequence[Prompt]]) -> dict[str, float]:
        """Return the live model's score on each set of prompts."""
        return {name: evaluate(self.texts, rows, "exact").value for name, rows in prompts.items()}


def average(scores: Mapping[str, float], skills: Sequence[str]) -> float:
    """Return the mean over the skills and the general tasks, each counting once."""
    return sum(scores[name] for name in (*skills, GENERAL)) / (len(skills) + 1)


def rows(bench: Bench) -> Iterator[tuple[str, Callable[[], Measurement]]]:
    """Yield the rows of the comparison by name, each with what measures it."""
    yield "base", lambda: _base(bench)
    for name in bench.built.skills:
        yield f"tuned on {name}", lambda name=name: _tuned(bench, name)
    yield "tuned, by name", lambda: _by_name(bench)
    for method in METHODS.values():
        if method.per_task:
            yield method.name, lambda method=method: _routed_merge(bench, method)
        else:
            yield method.name, lambda method=method: _merge(bench, method)
    home, distilled = bench.built.work.grafted, bench.distilled_home / "grafted"
    yield "packs, by name", lambda: _packs(bench, bench.grafted, home, routed=False)
    yield "packs, routed", lambda: _packs(bench, bench.grafted, home, routed=True)
    yield "packs, distilled, routed", lambda: _packs(bench, bench.distilled, distilled, routed=True)


def baselines(bench: Bench, names: Sequence[str]) -> Iterator[tuple[str, Callable[[], Measurement]]]:
    """Yield what is trained instead of packs, by the pipeline's own baselines."""
    for name in names:
        yield name, lambda name=name: _baseline(bench, name)


def _base(bench: Bench) -> Measurement:
    bench.set_weights(None)
    return Measurement(bench.scores(bench.tests), bench.base.nbytes)


def _tuned(bench: Bench, name: str) -> Measurement:
    task = bench.names.index(name)
    bench.set_weights(lambda parameter: bench.deltas[parameter][task])
    return Measurement(bench.scores(bench.tests), bench.base.nbytes)


def _by_name(bench: Bench) -> Measurement:
    """Every fine-tune on its own skill, and the base on the general tasks: what nothing below can pass."""
    bench.set_weights(None)
    scores = bench.scores({GENERAL: bench.tests[GENERAL]})
    for task, name in enumerate(bench.names):
        bench.set_weights(lambda parameter, task=task: bench.deltas[parameter][task])
        scores |= bench.scores({name: bench.tests[name]})
    return Measurement(scores, (len(bench.names) + 1) * bench.base.nbytes)


def _merge(bench: Bench, method: Method) -> Measurement:
    """Merge into one model, with the scale that validation prompts like best."""
    weights, note = torch.ones(len(bench.names)), ""
    if method.rows == "search":
        weights = _searched(bench, method)
        note = ", weights " + " ".join(f"{weight:.2f}" for weight in weights.tolist())
    calibrations = _calibrations(bench) if method.rows == "calibration" else ()
    knobs = replace(method.knobs({}), scale=1.0)  # all of these methods are linear in it
    merge = method.prepare(Tasks(bench.names, weights, bench.deltas, calibrations), knobs)
    delta = {name: merge(name, stack, 0) for name, stack in bench.deltas.items()}
    found = {scale: _validated(bench, lambda name, scale=scale: scale * delta[name]) for scale in SCALES}
    scale = max(found, key=lambda scale: found[scale])
    bench.set_weights(lambda name: scale * delta[name])
    return Measurement(bench.scores(bench.tests), bench.base.nbytes, f"scale {scale:g}{note}")


def _validated(bench: Bench, delta: Callable[[str], Tensor]) -> float:
    bench.set_weights(delta)
    return average(bench.scores(bench.validation), bench.names)


def _searched(bench: Bench, method: Method) -> Tensor:
    few = [row for prompts in bench.validation.values() for row in prompts]

    def loss(weights: Tensor) -> float:
        merge = method.prepare(Tasks(bench.names, weights, bench.deltas), Knobs())
        bench.set_weights(lambda name: merge(name, bench.deltas[name], 0))
        return answer_loss(bench.live, bench.tokenizer, few)

    return search_weights(loss, len(bench.names), seed=bench.built.work.recipe.seed)


def _calibrations(bench: Bench) -> tuple[Calibration, ...]:
    work = bench.built.work
    return tuple(
        collect_moments(work.tuned(name), read_prompts(work.skill(name) / "sft.jsonl"), device=work.device)
        for name in bench.names
    )


def _routed_merge(bench: Bench, method: Method) -> Measurement:
    """Make a model for each task, with the knob that its validation prompts like best; the router chooses."""
    candidates = _candidates(method)
    chosen: dict[str, Callable[[str], Tensor]] = {}
    notes = []
    for task, name in enumerate(bench.names):
        best, kept = -1.0, ""
        for knobs, note in candidates:
            merge = method.prepare(Tasks(bench.names, torch.ones(len(bench.names)), bench.deltas), knobs)
            made = {key: merge(key, stack, task) for key, stack in bench.deltas.items()}
            score = 0.0
            if len(candidates) > 1:
                bench.set_weights(made.__getitem__)
                score = bench.scores({name: bench.validation[name]})[name]
            if score > best:
                best, chosen[name], kept = score, made.__getitem__, note
        notes.append(kept)
    scores = {name: _routed_score(bench, name, chosen) for name in bench.tests}
    stored = method.stored_bytes(bench.base.specs.values(), len(bench.names), candidates[0][0].rank)
    router = sum(path.stat().st_size for path in bench.built.work.grafted.glob("router*"))
    return Measurement(scores, stored + router, " ".join(notes).strip())


def _candidates(method: Method) -> list[tuple[Knobs, str]]:
    knobs = method.knobs({})
    if method.name == "tall-mask":
        return [(replace(knobs, threshold=value), f"{value:g}") for value in THRESHOLDS]
    if method.name == "twin":
        return [(replace(knobs, scale=value), f"{value:g}") for value in SCALES[:4]]
    return [(knobs, "")]


def _routed_score(bench: Bench, test: str, deltas: Mapping[str, Callable[[str], Tensor]]) -> float:
    prompts, routes = bench.tests[test], bench.routes[test]
    answers = [""] * len(prompts)
    for route in dict.fromkeys(routes):
        mine = [i for i, name in enumerate(routes) if name == route]
        bench.set_weights(deltas.get(route))
        for i, text in zip(mine, bench.texts([prompts[i] for i in mine]), strict=True):
            answers[i] = text
    return evaluate(lambda _: answers, prompts, "exact").value


def _packs(bench: Bench, grafted: GraftedModel, directory: Path, *, routed: bool) -> Measurement:
    work, scores = bench.built.work, {}
    for name, prompts in bench.tests.items():
        pack = AUTO if routed else ("base" if name == GENERAL else name)

        def answer(rows: Sequence[Prompt], pack: str = pack) -> list[str]:
            return grafted.generate([row.question for row in rows], pack, work.greedy)

        scores[name] = evaluate(answer, prompts, "exact").value
    files = [path for path in directory.rglob("*") if path.is_file() and (routed or "router" not in path.name)]
    return Measurement(scores, bench.base.nbytes + sum(path.stat().st_size for path in files))


def _baseline(bench: Bench, name: str) -> Measurement:
    """Score what a baseline of the pipeline ends with, on its own test sets: all of their prompts."""
    built, skills = bench.built, bench.built.skills
    trained = dict.fromkeys(skills, built.stamp)
    packed = {skill: replace(built.stamp, result=built.packs[skill]) for skill in skills}
    measured = BASELINES[name](built.work, trained, packed)
    if all(f"{name}.{skill}" in measured for skill in skills):  # a part for each skill, chosen by name
        scores = {skill: measured[f"{name}.{skill}"][skill].value for skill in skills}
        bench.set_weights(None)
        scores |= bench.scores({GENERAL: bench.tests[GENERAL]})
        parts = [built.work.directory / "baselines" / name / skill for skill in skills]
        size = sum(path.stat().st_size for part in parts for path in part.glob("*.safetensors"))
        return Measurement(scores, bench.base.nbytes + size, "by name")
    last = measured[list(measured)[-1]]
    scores = {test: last[test].value for test in (*skills, GENERAL)}
    return Measurement(scores, bench.base.nbytes)
