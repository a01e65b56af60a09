"""What a run found, gathered under the fixed keys of `report.json`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from pydantic import BaseModel

from graftllm.evaluation.scores import Measured
from graftllm.header import Overhead
from graftllm.recipe import Recipe
from graftllm.stages import Stamp

IN_SEQUENCE = {  # baselines that learn skill after skill, and what their steps are called
    "sequential": "fine-tuned after",
    "sequential_lora": "LoRA after",
    "replay": "replay after",
    "grafting": "grafting after",
}


@dataclass(frozen=True)
class Results:
    """What the stages of a run left behind.

    Attributes:
        scores: by what was evaluated: `base`, `source.S`, `tuned.S`, `pack.S`, `routed`, `sequential.I`,
            `summed`, `lora.S`, `sequential_lora.I`, `replay.I`, `grafting.I` for skill S and step I.
        packed: stamps of packing, by skill.
        verified: stamps of verification, by skill.
        routes: stamp of counting the router's choices, by test set.
        unplugged: stamp of the unplugging check.
    """

    scores: Mapping[str, Measured]
    packed: Mapping[str, Stamp]
    verified: Mapping[str, Stamp]
    routes: Stamp
    unplugged: Stamp


class SkillScores(BaseModel):
    """Scores of one skill's test prompts, and their standard errors."""

    source: float
    base: float
    tuned: float
    pack: float
    routed: float
    n: int
    stderr: dict[str, float]


class GeneralScores(BaseModel):
    """Scores of one general task: before, after any one fine-tuning, and of the grafted model."""

    base: float
    tuned_mean: float
    routed: float
    n: int


class PackFigures(BaseModel):
    """Size and fidelity of one pack, and what each stage of making it took."""

    file_bytes: int
    tuned_bytes: int
    bits_per_parameter: float
    kl_to_tuned: float
    top1_agreement: float
    bytes_by_role: dict[str, int]
    overheads: dict[str, Overhead] = {}


class RouterFigures(BaseModel):
    """How often the router chose right on test prompts; `routes` counts its choices by test set."""

    accuracy: float
    n: int
    routes: dict[str, dict[str, int]]


class Forgetting(BaseModel):
    """Scores after each step of learning, one row a step and one column a test set."""

    rows: list[str]
    columns: list[str]
    scores: list[list[float]]


class Report(BaseModel):
    """`report.json`. Scores are shares of right answers; baselines that were not asked for are empty."""

    name: str
    seed: int
    skills: dict[str, SkillScores]
    general: dict[str, GeneralScores]
    packs: dict[str, PackFigures]
    router: RouterFigures
    sequential: dict[str, float]
    summed: dict[str, float]
    lora: dict[str, float]
    forgetting: Forgetting
    unplug_bit_exact: bool
    seconds: dict[str, float]
    peak_memory_bytes: int


def build_report(recipe: Recipe, results: Results, stamps: Sequence[Stamp]) -> Report:
    """Gather the results of a run under the fixed keys of `report.json`."""
    scores, names = results.scores, list(recipe.skills)
    seconds: dict[str, float] = {}
    for stamp in stamps:
        kind = stamp.name.split(".")[0]
        seconds[kind] = round(seconds.get(kind, 0) + stamp.seconds, 2)
    last = f"sequential.{len(names) - 1}"
    routes = cast(dict[str, dict[str, int]], results.routes.result)
    asked = sum(sum(chosen.values()) for chosen in routes.values())
    right = sum(chosen.get("base" if test == "general" else test, 0) for test, chosen in routes.items())
    return Report(
        name=recipe.name,
        seed=recipe.seed,
        skills={name: _skill_scores(name, scores) for name in names},
        general=_general_scores(names, scores),
        packs={name: _pack_figures(results.packed[name], results.verified[name]) for name in names},
        router=RouterFigures(accuracy=right / asked, n=asked, routes=routes),
        sequential={name: scores[last][name].value for name in names} if last in scores else {},
        summed={name: scores["summed"][name].value for name in names} if "summed" in scores else {},
        lora={name: scores[f"lora.{name}"][name].value for name in names if f"lora.{name}" in scores},
        forgetting=_forgetting(names, scores),
        unplug_bit_exact=bool(results.unplugged.result),
        seconds=seconds,
        peak_memory_bytes=max(stamp.peak_memory_bytes for stamp in stamps),
    )


def _skill_scores(name: str, scores: Mapping[str, Measured]) -> SkillScores:
    found = {
        "base": scores["base"][name],
        "source": scores[f"source.{name}"][name],
        "tuned": scores[f"tuned.{name}"][name],
        "pack": scores[f"pack.{name}"][name],
        "routed": scores["routed"][name],
    }
    values = {key: one.value for key, one in found.items()}
    errors = {key: round(one.overall.stderr, 4) for key, one in found.items()}
    return SkillScores(**values, n=found["base"].overall.n, stderr=errors)


def _general_scores(names: Sequence[str], scores: Mapping[str, Measured]) -> dict[str, GeneralScores]:
    tuned = [scores[f"tuned.{name}"]["general"].by_task for name in names]
    return {
        task: GeneralScores(
            base=base.value,
            tuned_mean=sum(one[task].value for one in tuned) / len(tuned),
            routed=scores["routed"]["general"].by_task[task].value,
            n=base.n,
        )
        for task, base in scores["base"]["general"].by_task.items()
    }


def _pack_figures(packed: Stamp, verified: Stamp) -> PackFigures:
    made, fidelity = cast(dict[str, Any], packed.result), cast(dict[str, Any], verified.result)
    return PackFigures(**made, kl_to_tuned=fidelity["kl"], top1_agreement=fidelity["top1_agreement"])


def _forgetting(names: Sequence[str], scores: Mapping[str, Measured]) -> Forgetting:
    steps = {"base": scores["base"]}
    for rival, title in IN_SEQUENCE.items():
        found = {f"{title} {name}": scores.get(f"{rival}.{i}") for i, name in enumerate(names)}
        steps |= {step: one for step, one in found.items() if one is not None}
    steps |= {"grafted, routed": scores["routed"]}
    columns = [*names, "general"]
    return Forgetting(
        rows=list(steps), columns=columns, scores=[[found[test].value for test in columns] for found in steps.values()]
    )
