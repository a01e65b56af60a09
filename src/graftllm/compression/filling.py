"""The strategy `auto`: every matrix at one step, by the operator that is cheapest there, and a budget filled.

Every matrix is looked at (`outlook`). At the step that is foreseen to fill the budget each is coded in all ways that
may be the cheapest. Whatever was coded is an offer, of so many bytes at such a cost; taken are the offers that
fill the budget at the least cost together. Where what was coded takes more or less than was foreseen, the step is
corrected. Looks and codes are pure functions of their inputs, kept by name when they are done: work that was
stopped goes on from there, and any number of workers gives the same bytes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

from graftllm.compression.allocation import BITS_WORTH, Kind, Offer, falls_short, foreseen, select, step_for
from graftllm.compression.automatic import ways
from graftllm.compression.crew import Crew
from graftllm.compression.matrix import matrix_shape
from graftllm.compression.outlook import Outlook, directions_for, twice_as_many
from graftllm.compression.units import Compressed, Job, Unit, carry_out, found_code, found_outlook
from graftllm.errors import BudgetError
from graftllm.packing_options import DEFAULT_SHARE

_FULL = 0.985  # a budget filled to this share is met
_AIM = (1 + _FULL) / 2  # share of a budget that is aimed at
_NEAR = 1.1  # a byte may save so much more elsewhere than where it is spent
_SAME = 1e-3  # relative difference of steps that is none
_PASSES = 4  # codings of everything, to fill a budget
_MANY = 64  # matrices; more are coded in parts, each of which corrects the foresight for those after it
_PARTS = 8


def fill_budget(job: Job, crew: Crew, payload_budget: int | None) -> list[Compressed]:
    """Return every parameter in compressed form, so that all payloads together take as many bytes as they may.

    Without a budget matrices take their default share, whatever norms and biases take.

    Raises:
        BudgetError: norms and biases, which are kept exactly, take more.
        CheckpointError: the delta holds NaN, infinity or values above 2 ** 48.
    """
    looks = _first_looks(job, payload_budget)
    crew(list(looks.values()), "looking")
    found = {name: found_outlook(job, look) for name, look in looks.items()}
    outlooks = {name: one for name, one in found.items() if one is not None}
    parts = {name: found_code(job, looks[name]) for name, one in found.items() if one is None}
    fixed = sum(part.facts.nbytes for part in parts.values())
    if payload_budget is None:
        room = round(DEFAULT_SHARE * sum(job.delta.tuned.specs[name].nbytes for name in outlooks))
    else:
        room = payload_budget - fixed
    if room < 0:
        raise BudgetError(
            f"budget: too small by {-room:,} bytes: the header, and {fixed:,} bytes of norms and biases, which are "
            "kept exactly, take more. Raise it."
        )
    step = _first_step(job, crew, looks, outlooks, room)
    parts |= _Filling(job, crew, looks, outlooks, room).filled(step)
    return [parts[name] for name in job.delta]


def _first_looks(job: Job, payload_budget: int | None) -> dict[str, Unit]:
    """Return looks that take as many directions as the budget is likely to pay."""
    specs = job.delta.tuned.specs
    nbytes = DEFAULT_SHARE * job.delta.tuned.nbytes if payload_budget is None else max(payload_budget, 0)
    rate = 8 * nbytes / max(1, job.delta.tuned.parameters)
    return {
        name: Unit(name, "look", directions=directions_for(matrix_shape(specs[name].shape), rate)) for name in job.delta
    }


def _first_step(job: Job, crew: Crew, looks: dict[str, Unit], outlooks: dict[str, Outlook], room: int) -> float:
    """Return the step that is foreseen to fill the room.

    Matrices of which all directions that were found are worth their bytes are looked at again, for twice as many.
    """
    while True:
        step = step_for(((one, None) for one in outlooks.values()), 8 * room * _AIM)
        short = [name for name, one in outlooks.items() if falls_short(one, step)]
        if not short:
            return step
        for name in short:
            looks[name] = replace(looks[name], directions=twice_as_many(looks[name].directions, outlooks[name].shape))
        crew([looks[name] for name in short], "looking closer")
        outlooks |= {name: one for name in short if (one := found_outlook(job, looks[name])) is not None}


@dataclass
class _Filling:
    """A room on the way to being filled with codes.

    Attributes:
        offers: of each matrix all that was coded; first that it is left out.
        last: of each matrix what it takes for now, by which foresight is corrected: the cheapest at its last step.
        settled: whether all stay with the operators that they have in `last`.
    """

    job: Job
    crew: Crew
    looks: Mapping[str, Unit]
    outlooks: Mapping[str, Outlook]
    room: int
    offers: dict[str, list[Compressed]] = field(default_factory=dict)
    last: dict[str, Compressed] = field(default_factory=dict)
    settled: bool = False

    def filled(self, step: float) -> dict[str, Compressed]:
        """Return the matrices as they fill the room at the least cost, beginning with one step for all."""
        for name in self.outlooks:
            left_out = replace(self.looks[name], kind="code", way="zero")
            carry_out(self.job, left_out)
            self.offers[name] = [found_code(self.job, left_out)]
        parts, selected = self._parts(), {name: some[0] for name, some in self.offers.items()}
        for number in range(max(_PASSES, 2 * len(parts)) if parts else 0):
            part, label = parts[number % len(parts)], "packing"
            if len(parts) > 1:
                label += f" {number % len(parts) + 1}/{len(parts)}"
            self._code(part, step, label)
            if len(self.last) == len(self.outlooks):
                selected, saved = self._selected()
                if self._is_met(selected, saved, step):
                    break
            again = self._next_step(parts[(number + 1) % len(parts)], step)
            if len(parts) == 1 and math.isclose(again, step, rel_tol=_SAME):
                # Two operators are about as cheap, but far from each other in bytes: no step lies between them.
                if self.settled:
                    break
                self.settled = True  # nothing that has a place loses it
                self.last |= {name: one for name, one in selected.items() if one.unit.way != "zero"}
                again = self._next_step(parts[0], step)
            step = again
        return selected

    def _parts(self) -> list[list[str]]:
        """Return the names of the matrices in parts that are coded after each other; the largest are spread over them.

        They come first, so that the last part has little left to miss.
        """
        ordered = sorted(self.outlooks, key=lambda name: -math.prod(self.outlooks[name].shape))
        count = _PARTS if len(ordered) > _MANY else 1
        return [ordered[number::count] for number in range(count)] if ordered else []

    def _code(self, part: Sequence[str], step: float, label: str) -> None:
        """Code matrices at a step."""
        units: dict[str, list[Unit]] = {}
        for name in part:
            if not self.settled:
                tried = ways(self.outlooks[name], step)
            else:
                tried = [way for way in (self._way(name),) if way is not None]
            code = replace(self.looks[name], kind="code")
            units[name] = [replace(code, at=None if way == "exact" else step, way=way) for way in tried]
        self.crew([unit for some in units.values() for unit in some], label)
        for name, some in units.items():
            coded = [found_code(self.job, unit) for unit in some]
            self.offers[name] += coded
            if not self.settled:
                self.last[name] = min(
                    (self.offers[name][0], *coded),
                    key=lambda one: one.facts.cost + _worth(step) * one.facts.nbytes,
                )
            elif coded:
                self.last[name] = coded[0]

    def _selected(self) -> tuple[dict[str, Compressed], float]:
        """Return what fills the room at the least cost, and what a byte would save in the best that has no place."""
        offers = [[Offer(one.facts.nbytes, one.facts.cost) for one in some] for some in self.offers.values()]
        numbers, saved = select(offers, self.room)
        return {name: some[at] for (name, some), at in zip(self.offers.items(), numbers, strict=True)}, saved

    def _is_met(self, selected: Mapping[str, Compressed], saved: float, step: float) -> bool:
        """Return whether the room is full, and neither a matrix nor a byte that is worth more was left out for that."""
        coarsest = max(one.unit.at or step for one in self.last.values())
        left_out = any(one.unit.way == "zero" != self.last[name].unit.way for name, one in selected.items())
        full = sum(one.facts.nbytes for one in selected.values()) >= _FULL * self.room
        return full and not left_out and saved <= _NEAR * _worth(coarsest)

    def _next_step(self, part: Sequence[str], step: float) -> float:
        """Return the step at which a part, or all that was not coded yet, fills what the others leave of the room."""
        group = [name for name in self.outlooks if name not in self.last] or list(part)
        if self.settled:
            group = [name for name in group if self._way(name) is not None]
        left = _AIM * self.room - sum(one.facts.nbytes for name, one in self.last.items() if name not in group)
        took = expected = 0.0
        for name, one in self.last.items():
            if (way := self._way(name)) is not None:
                took += one.facts.nbytes
                expected += foreseen(self.outlooks[name], cast(float, one.unit.at), way).bits / 8
        if not group:
            return step
        right = expected / took if took and expected else 1.0
        kinds: list[Kind | None] = [self._way(name) if self.settled else None for name in group]
        matrices = zip((self.outlooks[name] for name in group), kinds, strict=True)
        return step_for(matrices, 8 * max(left, 0) * right)

    def _way(self, name: str) -> Kind | None:
        """Return the operator that a matrix has for now; None where it is left out, or exact."""
        way = self.last[name].unit.way
        return None if way in (None, "zero", "exact") else way


def _worth(step: float) -> float:
    """Return what a byte has to save at a step."""
    return 8 * BITS_WORTH * step**2
