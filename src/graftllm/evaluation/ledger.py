"""What the directory of a run tells: its recipe, and the result and cost of each stage that is done.

Only what stages left behind is read, so a run that was killed, or still works, can be told of, too.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from graftllm.errors import RecordError
from graftllm.evaluation.scores import Evaluation, Score, merged

Form = TypeVar("Form", bound=BaseModel)


class Step(BaseModel):
    """A finished stage, and what it took; runs of before did not measure all of it."""

    name: str
    result: Any = None
    seconds: float
    peak_memory_bytes: int
    cpu_seconds: float = 0
    gpu_seconds: float = 0
    peak_gpu_bytes: int = 0


class SourceFigures(BaseModel):
    """What a source gave to a skill; from its data card."""

    responses: int
    right: int
    sft_rows: int
    pairs: int
    input_tokens: int = 0
    output_tokens: int = 0
    dollars: float | None = None


class DataFigures(BaseModel):
    """What a skill was learnt from; from its data card."""

    sources: dict[str, SourceFigures]


class _Task(BaseModel):
    value: float
    n: int


class _Measured(BaseModel):
    result: dict[str, dict[str, _Task]]


@dataclass(frozen=True)
class Ledger:
    """A run, as far as it has come.

    Attributes:
        directory: the run's.
        recipe: its text; empty when there is none.
        name: of the run.
        seed: of its draws; None when the recipe is missing.
        skills: in the recipe's order.
        steps: finished stages by name, in the order that they ended.
        unfinished: names of stages that were begun and are not done.
        scores: by what was evaluated (`base`, `tuned.SKILL`, `routed`, ...), then by test set.
        data: by skill.
    """

    directory: Path
    recipe: str
    name: str
    seed: int | None
    skills: Sequence[str]
    steps: Mapping[str, Step]
    unfinished: Sequence[str]
    scores: Mapping[str, Mapping[str, Evaluation]]
    data: Mapping[str, DataFigures]

    def result(self, name: str) -> Mapping[str, Any]:
        """Return the result of a stage; empty when it is not done."""
        found = self.steps[name].result if name in self.steps else None
        return found if isinstance(found, dict) else {}

    @property
    def packs(self) -> Mapping[str, Path]:
        """The files of its packs by name, in the order of the skills."""
        found = {path.stem: path for path in sorted((self.directory / "packs").glob("*.safetensors"))}
        return {name: found[name] for name in sorted(found, key=[*self.skills, *found].index)}


def read_ledger(directory: Path) -> Ledger:
    """Read what a run's directory tells.

    Raises:
        RecordError: it is not the directory of a run, or a file in it is damaged.
    """
    stages = directory / "stages"
    if not stages.is_dir():
        raise RecordError(
            f"{directory}: expected the directory of a run, found no stages in it; give what --dir was, or runs/NAME."
        )
    files = sorted(stages.glob("*.json"), key=lambda file: (file.stat().st_mtime_ns, file.name))
    steps = {file.name.removesuffix(".json"): _read(file, Step) for file in files}
    begun = sorted(file.name.removesuffix(".started") for file in stages.glob("*.started"))
    text, told = _read_recipe(directory / "recipe.yaml")
    cards = {name: directory / "skills" / name / "data-card.json" for name in told.skills}
    return Ledger(
        directory=directory,
        recipe=text,
        name=told.name or directory.resolve().name,
        seed=told.seed,
        skills=list(told.skills),
        steps=steps,
        unfinished=[name for name in begun if name not in steps],
        scores={
            name.removeprefix("evaluate."): _scores(_read(stages / f"{name}.json", _Measured))
            for name in steps
            if name.startswith("evaluate.")
        },
        data={name: _read(path, DataFigures) for name, path in cards.items() if path.exists()},
    )


class _Told(BaseModel):
    """The part of a recipe that is of interest here; what newer recipes say besides is ignored."""

    name: str = ""
    seed: int | None = None
    skills: dict[str, Any] = {}


def _read_recipe(path: Path) -> tuple[str, _Told]:
    if not path.exists():
        return "", _Told()
    try:
        text = path.read_text(encoding="utf-8")
        return text, _Told.model_validate(yaml.safe_load(text))
    except (ValueError, yaml.YAMLError) as error:
        raise _damaged(path, error) from error


def _read(path: Path, form: type[Form]) -> Form:
    try:
        return form.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> RecordError:
    first = error.errors()[0] if isinstance(error, ValidationError) else None
    reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else " ".join(str(error).split())
    return RecordError(f"{path}: not what a run writes there ({reason}); delete it and run the recipe again.")


def _scores(found: _Measured) -> dict[str, Evaluation]:
    return {
        test: merged({task: Score(one.value, one.n) for task, one in tasks.items()})
        for test, tasks in found.result.items()
    }
