"""The table of merging methods: name, function, paper, defaults, and what a method needs and gives."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from graftllm.errors import FusionError
from graftllm.fusion.methods.competition import pcb
from graftllm.fusion.methods.factors import factor_parameters, routed_lora, twin
from graftllm.fusion.methods.masks import consensus, emr, tall_mask
from graftllm.fusion.methods.signs import (
    breadcrumbs,
    dare,
    dare_ties,
    della,
    sce,
    sce_fuseai,
    ties,
    ties_tensor,
)
from graftllm.fusion.methods.sums import linear, regmean, task_arithmetic
from graftllm.fusion.methods.tasks import Knobs, Prepare
from graftllm.tensors import DTYPES, TensorSpec

Storage = Literal["one", "masks", "factors"]


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: as the command has it.
        prepare: looks at the whole model and returns what merges one parameter.
        paper: arXiv number.
        about: what it does, in a few words.
        defaults: its knobs and their values; other knobs mean nothing to it.
        weighted: whether tasks have weights.
        storage: what is kept: one model, a mask a task beside a merged delta, or low-rank factors a task.
        rows: what prompt rows it needs: each task's own (`calibration`), some of all tasks (`search`), or none.
    """

    name: str
    prepare: Prepare
    paper: str
    about: str
    defaults: Mapping[str, float]
    weighted: bool = True
    storage: Storage = "one"
    rows: Literal["calibration", "search"] | None = None

    @property
    def per_task(self) -> bool:
        """Whether it gives a model for each task instead of one for all."""
        return self.storage != "one"

    def knobs(self, given: Mapping[str, float | None]) -> Knobs:
        """Return the method's knobs: what is given, and its defaults for what is None.

        Raises:
            FusionError: the method has no such knob, or the value is out of range.
        """
        chosen = {key: value for key, value in given.items() if value is not None}
        for key, value in chosen.items():
            if key not in self.defaults:
                known = ", ".join(f"--{knob}" for knob in self.defaults)
                raise FusionError(f"--{key}: {self.name} has no such knob, only {known}; leave it out.")
            if not math.isfinite(value) or (key in _RANGES and not _RANGES[key][0] < value <= _RANGES[key][1]):
                above, most = _RANGES.get(key, (-math.inf, math.inf))
                limits = "a finite number" if most == math.inf == -above else f"above {above:g} and at most {most:g}"
                raise FusionError(f"--{key}: expected {limits}, found {value:g}.")
        values = {**self.defaults, **chosen}
        plain = Knobs()
        return Knobs(
            scale=values.get("scale", plain.scale),
            density=values.get("density", plain.density),
            threshold=values.get("threshold", plain.threshold),
            rank=int(values.get("rank", plain.rank)),
            seed=int(values.get("seed", plain.seed)),
        )

    def weight(self, given: float | None) -> float:
        """Return a task's weight: the given one, or 1.

        Raises:
            FusionError: the method has no weights, or the weight is no finite number.
        """
        if given is not None and not self.weighted:
            raise FusionError(f"weight: {self.name} takes none, found {given:g}; leave it out.")
        if given is not None and not math.isfinite(given):
            raise FusionError(f"weight: expected a finite number, found {given:g}.")
        return 1.0 if given is None else given

    def stored_bytes(self, specs: Iterable[TensorSpec], tasks: int, rank: int, added_bytes: int = 0) -> int:
        """Return how many bytes what the method keeps takes in the models' own dtype, with the base where it is needed.

        One model: that model. Masks: the base, a merged delta, and a bit a number and task. Factors: one model
        (the base, or what all tasks share) and each task's factors. Of rows that the base lacks, `added_bytes` in one
        model, each task keeps its own where it keeps anything.
        """
        specs = list(specs)
        model = sum(spec.nbytes for spec in specs)
        if self.storage == "masks":
            return 2 * model + tasks * (math.ceil(sum(spec.parameters for spec in specs) / 8) + 4 + added_bytes)
        if self.storage == "factors":
            numbers = sum(factor_parameters(spec.shape, rank) * DTYPES[spec.dtype].itemsize for spec in specs)
            return model + tasks * (numbers + added_bytes)
        return model + added_bytes


_RANGES = {"density": (0.0, 1.0), "rank": (0.0, 1 << 16), "threshold": (0.0, math.inf)}
_ROWS = (
    Method("linear", linear, "2203.05482", "weighted average (model soup)", {"scale": 1.0}),
    Method("task-arithmetic", task_arithmetic, "2212.04089", "weighted sum", {"scale": 0.3}),
    Method("ties", ties, "2306.01708", "trim whole models, elect signs, average", {"density": 0.2, "scale": 1.0}),
    Method("ties-tensor", ties_tensor, "2306.01708", "TIES as mergekit trims", {"density": 0.2, "scale": 1.0}),
    Method("dare", dare, "2311.03099", "random drop, rescale, sum", {"density": 0.5, "scale": 0.3, "seed": 0}),
    Method(
        "dare-ties", dare_ties, "2311.03099", "random drop, rescale, TIES", {"density": 0.5, "scale": 1.0, "seed": 0}
    ),
    Method("della", della, "2406.11617", "drop by rank, rescale, TIES", {"density": 0.5, "scale": 1.0, "seed": 0}),
    Method("breadcrumbs", breadcrumbs, "2312.06795", "drop outliers and small entries", {"density": 0.9, "scale": 0.3}),
    Method("sce", sce, "2408.07990", "select, calculate, erase (mergekit)", {"density": 0.1, "scale": 1.0}, False),
    Method(
        "sce-fuseai", sce_fuseai, "2408.07990", "SCE merging all entries", {"density": 0.1, "scale": 1.0}, False
    ),
    Method("pcb", pcb, "2410.02396", "parameter competition", {"density": 0.1, "scale": 1.0}),
    Method("regmean", regmean, "2212.09849", "least squares of outputs", {"scale": 1.0}, rows="calibration"),
    Method("consensus", consensus, "2405.07813", "entries of two tasks' masks", {"threshold": 0.6, "scale": 0.3}),
    Method(
        "lorahub", task_arithmetic, "2307.13269", "sum, weights by search", {"scale": 1.0, "seed": 0}, False,
        rows="search",
    ),
    Method("emr", emr, "2405.17461", "elect, mask, rescale", {"scale": 1.0}, False, "masks"),
    Method(
        "tall-mask", tall_mask, "2405.07813", "sum, masked for the task", {"threshold": 0.6, "scale": 1.0}, True,
        "masks",
    ),
    Method(
        "twin", twin, "2406.15479", "shared sum, own truncated SVD", {"rank": 16, "scale": 0.3}, True, "factors"
    ),
    Method(
        "routed-lora", routed_lora, "2106.09685", "own truncated SVD", {"rank": 16, "scale": 1.0}, True, "factors"
    ),
)  # fmt: skip
METHODS: Mapping[str, Method] = {row.name: row for row in _ROWS}


def method(name: str) -> Method:
    """Return a row of the table.

    Raises:
        FusionError: there is none of that name.
    """
    if name not in METHODS:
        raise FusionError(f"--method: expected one of {', '.join(METHODS)}; found {name!r}.")
    return METHODS[name]
