"""Every way to compress a delta that `codec.py` compares: ours, by the library, and the rivals.

A method is a row: settings, and a function that compresses a yardstick's delta at one of them,
measures what it lost and returns JSON. Its sources say when it has to be measured again.
"""

import ast
import hashlib
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from codec_bound import bound_nbytes
from codec_measures import Yardstick
from rivals import RIVALS, Rival, Setting, compress, distinct
from zstandard import ZstdCompressor

import graftllm.packer
from graftllm.compression.metric import Metric
from graftllm.errors import CompressionError
from graftllm.packing_options import PackOptions
from graftllm.skillpack import SkillPack
from graftllm.tensors import raw_bytes

RATES = (0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)  # bits per parameter that our budgets ask for
OWN = ("auto", "auto, distilled", "auto, not calibrated", "paper")
_DISTILLED = 600  # steps of 32 rows
PAPER = "https://arxiv.org/abs/2505.18502"
_LIBRARY = Path(graftllm.packer.__file__).parent
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Method:
    """A row of the comparison.

    Attributes:
        name: as tables and plots show it.
        settings: from the smallest file to the largest, more or less.
        measure: (yardstick, setting) -> what was found, as JSON; `refused` alone when it cannot be met.
        sources: files whose code the result depends on.
        paper: where it is from.
    """

    name: str
    settings: tuple[Any, ...]
    measure: Callable[[Yardstick, Any], dict[str, Any]]
    sources: tuple[Path, ...]
    paper: str = ""

    def settings_for(self, target: str, *, quick: bool) -> tuple[Any, ...]:
        """Return the settings to measure on a target; with `quick` at most a dozen of them, spread over all."""
        # Embedding and head are 2 % of the wide model and less of the large one: one way to code them is enough.
        some = distinct(self.settings) if target in ("wide", "large") and self.name in RIVALS else self.settings
        return some[:: max(1, len(some) // 12)] if quick else some


def methods(rates: Sequence[float] = RATES) -> dict[str, Method]:
    """Return all methods by name; `rates` are those of ours."""
    codec = (
        *sorted((_LIBRARY / "compression").glob("*.py")),
        _LIBRARY / "skillpack.py",
        _LIBRARY / "packer.py",
        _LIBRARY / "header.py",
        _HERE / "codec_bound.py",
    )
    budgets = tuple(rates)
    own = [
        Method("auto", budgets, partial(_pack, PackOptions(), True), codec),
        Method("auto, distilled", budgets, partial(_pack, PackOptions(distill=_DISTILLED), True), codec),
        Method("auto, not calibrated", budgets, partial(_pack, PackOptions(), False), codec),
        Method("paper", budgets, partial(_pack, PackOptions(strategy="paper"), True), codec, PAPER),
        Method("exact", ("exact",), _exact, codec),
    ]
    theirs = [
        Method(rival.name, rival.settings, partial(_rival, rival), _sources(rival), rival.paper)
        for rival in RIVALS.values()
    ]
    return {method.name: method for method in (*own, *theirs)}


def code_digest(sources: Sequence[Path]) -> str:
    """Return a digest of what Python files do: comments, docstrings and layout do not count."""
    return hashlib.sha256("\n".join(_code(path) for path in sources).encode()).hexdigest()[:16]


def _pack(options: PackOptions, calibrated: bool, yardstick: Yardstick, rate: float) -> dict[str, Any]:
    """Compress with the library to a budget of `rate` bits per parameter; measure the file."""
    budget = str(int(rate * yardstick.delta.base.parameters / 8))
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "pack.safetensors"
        try:
            sized = options.model_copy(update={"budget": budget})
            rows = yardstick.rows if calibrated else ()
            graftllm.packer.compress(yardstick.delta, sized, calibration=rows, device="cpu").save(path)
        except CompressionError as error:
            return {"refused": str(error)}
        seconds, pack = time.monotonic() - started, SkillPack.load(path)
        decoded = {name: pack.delta(name, yardstick.delta.base.tensor(name)) for name in pack}
        loss = yardstick.measure(decoded, lambda name: pack.restore(name, yardstick.delta.base.tensor(name)))
        sizes = {name: entry.nbytes for name, entry in pack.header.tensors.items()}
        limit = _bound(yardstick, decoded, sizes, calibrated)
        return {"nbytes": path.stat().st_size, "seconds": round(seconds, 2), **limit, **asdict(loss)}


def _rival(rival: Rival, yardstick: Yardstick, setting: Setting) -> dict[str, Any]:
    started = time.monotonic()
    moments = yardstick.moments if rival.calibrated else None
    decoded, nbytes = compress(rival, yardstick.matrices, moments, setting, exact=yardstick.vector_sizes)
    if rival.distilled:
        decoded = yardstick.distilled(decoded)
    seconds = time.monotonic() - started
    loss = yardstick.measure(decoded | dict(yardstick.vectors))
    return {"nbytes": nbytes, "seconds": round(seconds, 2), **asdict(loss)}


def _exact(yardstick: Yardstick, setting: str) -> dict[str, Any]:
    """Pack bit for bit; compare the file with zstd -19 on the XOR of the same checkpoints."""
    delta = yardstick.delta
    changed = [np.bitwise_xor(*(raw_bytes(part) for part in delta.pair(name))) for name in delta]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "pack.safetensors"
        graftllm.packer.compress(delta, PackOptions(strategy="exact"), device="cpu").save(path)
        nbytes = path.stat().st_size
    return {"nbytes": nbytes, "zstd_nbytes": len(ZstdCompressor(level=19).compress(np.concatenate(changed).tobytes()))}


def _bound(
    yardstick: Yardstick, decoded: Mapping[str, Any], sizes: Mapping[str, int], calibrated: bool
) -> dict[str, float]:
    """Return what the matrices took and the least that they could have, each at the distortion that it has.

    Distortion is what our codec minimises: errors weighed by the input's moments, and by row. Lossless matrices, and
    with calibration those that nothing was measured of, are left out.
    """
    taken = directions = least = 0.0
    for name, change in yardstick.matrices.items():
        metric = yardstick.measures.metric(name, tuple(change.shape)) if calibrated else Metric()
        if calibrated and metric.rows is None:
            continue
        distortion = metric.cost(decoded[name] - change) / metric.scale
        if 0 < distortion < metric.cost(change) / metric.scale:
            weighed = change if metric.rows is None else change * metric.rows.sqrt()[:, None]
            moments = None if metric.lower is None else metric.lower @ metric.lower.T
            bounds = bound_nbytes(weighed if moments is None else weighed.to(moments), moments, distortion)
            taken += sizes[name]
            directions, least = directions + bounds[0], least + min(bounds)
    return {"lossy_nbytes": taken, "directions_nbytes": directions, "bound_nbytes": least}


def _sources(rival: Rival) -> tuple[Path, ...]:
    own = _HERE / f"{rival.compress.__module__.split('.')[-1]}.py"
    return (own, _HERE / "codec_distill.py") if rival.distilled else (own,)


def _code(path: Path) -> str:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            body.pop(0)
    return ast.dump(tree)
