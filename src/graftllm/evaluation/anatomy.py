"""What a pack is made of: bytes, rates and errors by role and by layer, from its header alone.

The strengths of the stored directions need payloads too, one at a time. None of it needs the base
model, or knows how it is printed or drawn.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from statistics import median
from typing import Any

from torch import Tensor

from graftllm.compression.factored import Factored, Hybrid
from graftllm.compression.lowrank import LowRank
from graftllm.compression.matrix import matrix_shape
from graftllm.errors import PackError
from graftllm.header import Header, TensorEntry
from graftllm.skillpack import SkillPack

OTHER = "other"  # where parameters outside of numbered layers are counted


@dataclass(frozen=True)
class Portion:
    """Some parameters of a pack, taken together.

    Attributes:
        tensors: how many there are.
        parameters: how many values they have in the tuned model.
        nbytes: size of their payloads.
        operators: how many of the tensors each operator holds, most frequent first.
        median_error: of their relative errors, ||decoded - delta|| / ||delta||.
        max_error: the largest of them.
    """

    tensors: int
    parameters: int
    nbytes: int
    operators: Mapping[str, int]
    median_error: float
    max_error: float

    @property
    def rate(self) -> float:
        """Bits per parameter."""
        return 8 * self.nbytes / self.parameters if self.parameters else 0.0

    def figures(self) -> dict[str, Any]:
        """Return what `graftllm inspect --json` prints of it."""
        return {
            "tensors": self.tensors,
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "bits_per_parameter": self.rate,
            "operators": dict(self.operators),
            "median_error": self.median_error,
            "max_error": self.max_error,
        }


def portion(entries: Iterable[TensorEntry]) -> Portion:
    """Return the sums over some parameters."""
    entries = list(entries)
    errors = [0.0 if entry.refinement else entry.error for entry in entries] or [0.0]
    return Portion(
        tensors=len(entries),
        parameters=sum(entry.tuned_spec.parameters for entry in entries),
        nbytes=sum(entry.stored_bytes for entry in entries),
        operators=dict(Counter(entry.operator for entry in entries).most_common()),
        median_error=median(errors),
        max_error=max(errors),
    )


def layered(header: Header) -> tuple[Portion, int] | None:
    """Return the lossy layer of a pack that has two, and how many bytes the exact one adds; None for other packs."""
    if not any(entry.refinement for entry in header.tensors.values()):
        return None
    lossy = portion(header.lossy_layer().tensors.values())
    return lossy, portion(header.tensors.values()).nbytes - lossy.nbytes


def by_role(entries: Iterable[TensorEntry]) -> dict[str, list[TensorEntry]]:
    """Return parameters by their role, in the order in which roles first appear."""
    roles: dict[str, list[TensorEntry]] = {}
    for entry in entries:
        roles.setdefault(entry.role, []).append(entry)
    return roles


def by_layer(header: Header, *, at_most: int | None = None) -> dict[str, list[TensorEntry]]:
    """Return parameters by layer; those outside of layers come last, as `other`.

    Keys are layers' numbers, after the name of their stack where there are several (`encoder.block 0`).

    Args:
        header: a pack's.
        at_most: where there are more layers, neighbours share a key (`0-3`), equally many each, so that
            there are about so many keys.
    """
    stacks: dict[str, dict[int, list[TensorEntry]]] = {}
    others: list[TensorEntry] = []
    for name, entry in header.tensors.items():
        place = layer_of(name)
        if place is None:
            others.append(entry)
        else:
            stacks.setdefault(place[0], {}).setdefault(place[1], []).append(entry)
    short = dict(zip(stacks, _without_common_start(list(stacks)), strict=True))
    count = sum(map(len, stacks.values()))
    together = math.ceil(count / at_most) if at_most else 1
    layers: dict[str, list[TensorEntry]] = {}
    for stack, members in stacks.items():
        numbers = sorted(members)
        for start in range(0, len(numbers), together):
            run = numbers[start : start + together]
            label = str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}"
            layers[f"{short[stack]} {label}".strip()] = [one for n in run for one in members[n]]
    return layers | ({OTHER: others} if others else {})


def layer_of(name: str) -> tuple[str, int] | None:
    """Return the stack and the number of the layer that a parameter is in, by its name; None outside of layers.

    >>> layer_of("model.layers.10.mlp.experts.3.up_proj.weight"), layer_of("model.norm.weight")
    (('model.layers', 10), None)
    """
    found = re.search(r"(?:^|\.)([0-9]{1,6})(?=\.|$)", name)
    return (name[: found.start()], int(found[1])) if found else None


def _without_common_start(names: list[str]) -> list[str]:
    """Return dotted names without the parts that all of them start with.

    >>> _without_common_start(["model.vision.blocks", "model.text.layers"]), _without_common_start(["model.layers"])
    (['vision.blocks', 'text.layers'], [''])
    """
    parts = [name.split(".") for name in names]
    common = len(list(takewhile(lambda same: len(set(same)) == 1, zip(*parts, strict=False))))
    return [".".join(part[common:]) for part in parts]


def figures(header: Header, file_bytes: int) -> dict[str, Any]:
    """Return what `graftllm inspect --json` prints: the header's fields and, as `anatomy`, what they sum up to."""
    whole = portion(header.tensors.values())
    anatomy = {
        "file_bytes": file_bytes,
        "file_bits_per_parameter": 8 * file_bytes / whole.parameters if whole.parameters else 0.0,
        **whole.figures(),
        "roles": {role: portion(entries).figures() for role, entries in by_role(header.tensors.values()).items()},
        "layers": {
            layer: portion(entries).figures()
            | {"roles": {role: portion(some).figures() for role, some in by_role(entries).items()}}
            for layer, entries in by_layer(header).items()
        },
    }
    if (two := layered(header)) is not None:
        anatomy |= {"lossy_layer": two[0].figures(), "exact_layer": {"bytes": two[1]}}
    return header.model_dump(mode="json") | {"anatomy": anatomy}


def strengths(pack: SkillPack, name: str) -> Tensor | None:
    """Return how strong each stored direction of a parameter's delta is, strongest first.

    The delta is a sum of outer products of columns of one factor and rows of another; the strength of a
    direction is the norm of its product, ||a|| ||b||. Of a hybrid, these are the directions apart from the
    rest. None where the operator stores no directions.

    Raises:
        PackError: the payload is damaged, or is not what the header says.
    """
    entry = pack.header.tensors[name]
    operator, (rows, columns) = entry.how, matrix_shape(entry.tuned_spec.shape)
    if not isinstance(operator, LowRank | Factored | Hybrid):
        return None
    payload = pack.encoded(name).payload
    if isinstance(operator, Hybrid):
        operator, payload, turned = operator.strong, payload[: operator.split], operator.transposed
    else:
        turned = isinstance(operator, Factored) and operator.transposed
    try:
        if (found := factor_values(entry)) > (most := _most_values(entry)):  # no base vouches for the shape
            raise ValueError(f"expected factors of at most {most:,} values in {entry.nbytes:,} bytes, found {found:,}")
        left, right = operator.factors(payload, (columns, rows) if turned else (rows, columns))
    except ValueError as error:
        raise PackError(
            f"{pack.source}: the payload of {name!r} cannot be decoded ({error}). The file is damaged."
        ) from error
    return (left.norm(dim=0) * right.norm(dim=1)).sort(descending=True).values


def factor_values(entry: TensorEntry) -> int:
    """Return how many values the factors of a parameter have; 0 where the operator stores none."""
    operator = entry.how.strong if isinstance(entry.how, Hybrid) else entry.how
    return operator.rank * sum(matrix_shape(entry.tuned_spec.shape)) if isinstance(operator, LowRank | Factored) else 0


def out_of_proportion(entry: TensorEntry) -> bool:
    """Return whether the factors of a parameter would take far more memory than their bytes suggest."""
    return factor_values(entry) > _most_values(entry)


def _most_values(entry: TensorEntry) -> int:
    return min(_MOST_VALUES, max(_FEW_VALUES, _VALUES_PER_BYTE * entry.nbytes))


_MOST_VALUES = 1 << 28
_FEW_VALUES = 1 << 22  # that are decoded from however few bytes
_VALUES_PER_BYTE = 64  # real factors have a few
