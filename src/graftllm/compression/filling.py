"""The strategy `auto`: every matrix at one step, by the operator that is cheapest there, and a budget filled.

Every matrix is looked at (`outlook`). At the step that is foreseen to fill the budget each is coded in all ways that
may be the cheapest. Whatever was coded is an offer, of so many bytes at such a cost; taken are the offers that
fill the budget at the least cost together. Where what was coded takes more or less than was foreseen, the step is
corrected. Looks and codes are pure functions of their inputs, kept by name when they are done: work that was
stopped goes on from there, and any number of workers gives the same bytes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

from graftllm.compression.allocation import BITS_WORTH, Kind, Offer, falls_short, foreseen, select, step_for
from graftllm.compression.automatic import ways
from graftllm.compression.crew import Crew
from graftllm.compression.jobs import Compressed, Job, Unit, found_code, found_outlook
from graftllm.compression.matrix import matrix_shape
from graftllm.compression.outlook import Outlook, directions_for, twice_as_many
from graftllm.compression.units import carry_out
from graftllm.errors import BudgetError
from graftllm.packing_options import DEFAULT_SHARE

_FULL = 0.985  # a budget filled to this share is met
_AIM = (1 + _FULL) / 2  # share of a budget that is aimed at
_NEAR = 1.1  # a byte may save so much more elsewhere than where it is spent
_SAME = 1e-3  # relative difference of steps that is none
_PASSES = 4  # codings of everything, to fill a budget
_MANY = 64  # matrices; more are coded in parts, each of which corrects the foresight for those after it
_PARTS = 8
_ENTRY = 40  # bytes that the file's header takes for a matrix that is coded, about, more than for one that is left out


@dataclass(frozen=True)
class Budget:
    """Bytes that a file may take.

    Attributes:
        nbytes: of the whole file.
        beside: returns how many of them are not payloads, where parameters are coded like these.
    """

    nbytes: int
    beside: Callable[[Sequence[Compressed]], int]

    def left(self, parts: Mapping[str, Compressed]) -> int:
        """Return how many bytes parameters that are coded like these leave."""
        return self.nbytes - self.beside(list(parts.values())) - _payload_bytes(parts)


def fill_budget(job: Job, crew: Crew, budget: Budget | None) -> list[Compressed]:
    """Return every parameter in compressed form, so that the file takes as many bytes as it may.

    Without a budget matrices take their default share, whatever norms and biases take.

    Raises:
        BudgetError: norms and biases, which are kept exactly, take more.
        CheckpointError: the delta holds NaN, infinity or values above 2 ** 48.
    """
    looks = _first_looks(job, budget)
    crew(list(looks.values()), "looking")
    found = {name: found_outlook(job, look) for name, look in looks.items()}
    outlooks = {name: one for name, one in found.items() if one is not None}
    parts = {name: found_code(job, looks[name]) for name, one in found.items() if one is None}
    filling = _Filling(job, crew, looks, outlooks, parts, budget)
    parts |= filling.filled(_first_step(job, crew, looks, outlooks, filling.room))
    return [parts[name] for name in job.delta.distinct]


def _first_looks(job: Job, budget: Budget | None) -> dict[str, Unit]:
    """Return looks that take as many directions as the budget is likely to pay."""
    specs = job.delta.tuned.specs
    nbytes = DEFAULT_SHARE * job.delta.tuned.nbytes if budget is None else max(budget.nbytes - budget.beside([]), 0)
    rate = 8 * nbytes / max(1, job.delta.tuned.parameters)
    return {
        name: Unit(name, "look", directions=directions_for(matrix_shape(specs[name].shape), rate))
        for name in job.delta.distinct
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
        fixed: parameters that are no matrices, or unchanged.
        budget: of the whole file.
        room: bytes that the budget leaves to the payloads of matrices, as far as is known.
        offers: of each matrix all that was coded; first that it is left out.
        last: of each matrix what it takes for now, by which foresight is corrected: the cheapest at its last step.
        settled: whether all stay with the operators that they have in `last`.
    """

    job: Job
    crew: Crew
    looks: Mapping[str, Unit]
    outlooks: Mapping[str, Outlook]
    fixed: Mapping[str, Compressed]
    budget: Budget | None
    room: int = 0
    offers: dict[str, list[Compressed]] = field(default_factory=dict)
    last: dict[str, Compressed] = field(default_factory=dict)
    settled: bool = False

    def __post_init__(self) -> None:
        """Find the room that is left where all matrices are left out.

        Raises:
            BudgetError: there is none.
        """
        for name in self.outlooks:
            left_out = replace(self.looks[name], kind="code", way="zero")
            carry_out(self.job, left_out)
            self.offers[name] = [found_code(self.job, left_out)]
        if self.budget is None:
            specs = self.job.delta.tuned.specs
            self.room = round(DEFAULT_SHARE * sum(specs[name].nbytes for name in self.outlooks))
            return
        left = self.budget.left({**self.fixed, **self._left_out()})
        if left < 0:
            fixed = _payload_bytes(self.fixed)
            raise BudgetError(
                f"budget: too small by {-left:,} bytes: the header, tokenizer files of the tuned model's own, and "
                f"{fixed:,} bytes of norms, biases and whole numbers, which are kept exactly, take more. Raise it."
            )
        self.room = max(0, left - _ENTRY * len(self.outlooks))

    def _left_out(self) -> dict[str, Compressed]:
        return {name: some[0] for name, some in self.offers.items()}

    def filled(self, step: float) -> dict[str, Compressed]:
        """Return the matrices as they fill the room at the least cost, beginning with one step for all."""
        parts, selected = self._parts(), self._left_out()
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
        """Return what fills the room at the least cost, and what a byte would save in the best that has no place.

        The room is corrected by what the header takes with these codes.
        """
        offers = [[Offer(one.facts.nbytes, one.facts.cost) for one in some] for some in self.offers.values()]
        may_grow = True
        while True:
            numbers, saved = select(offers, self.room)
            selected = {name: some[at] for (name, some), at in zip(self.offers.items(), numbers, strict=True)}
            if self.budget is None:
                return selected, saved
            used = _payload_bytes(selected)
            room = used + self.budget.left({**self.fixed, **selected})
            if used <= room and (room <= self.room or not may_grow):
                return selected, saved
            self.room, may_grow = room, False

    def _is_met(self, selected: Mapping[str, Compressed], saved: float, step: float) -> bool:
        """Return whether the room is full, and neither a matrix nor a byte that is worth more was left out for that."""
        coarsest = max(one.unit.at or step for one in self.last.values())
        left_out = any(one.unit.way == "zero" != self.last[name].unit.way for name, one in selected.items())
        full = _payload_bytes(selected) >= _FULL * self.room
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


def _payload_bytes(parts: Mapping[str, Compressed]) -> int:
    return sum(part.facts.nbytes for part in parts.values())


def _worth(step: float) -> float:
    """Return what a byte has to save at a step."""
    return 8 * BITS_WORTH * step**2
