"""Points of a comparison -> curves, bytes at equal KL, tables.

A method's curve is what is best of its settings: points that no smaller file beats. Between them
log KL is linear in log bytes.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

REFERENCE = "ladder + GPTQ"
LEVELS = (0.5, 1.0, 1.5, 2.0)  # bits per parameter of the reference, whose KL is the level
_LEAST_KL = 1e-9  # below the noise of float32 logits


@dataclass(frozen=True)
class Point:
    """One measured file.

    Attributes:
        target: `demo`, `wide`, `mixture` or `large`.
        skill: what was tuned.
        seed: of the fine-tune.
        parameters: of the model.
        method: a row of the comparison.
        setting: the method's setting, as text.
        nbytes: size of the file.
        found: everything else that was measured: `kl`, `score`, errors, seconds and, of ours, the bound.
    """

    target: str
    skill: str
    seed: int
    parameters: int
    method: str
    setting: str
    nbytes: int
    found: Mapping[str, float]

    @property
    def kl(self) -> float:
        """KL divergence to the tuned model, nats per token."""
        return max(self.found["kl"], _LEAST_KL)

    @property
    def rate(self) -> float:
        """Bits of the file per parameter."""
        return 8 * self.nbytes / self.parameters


@dataclass(frozen=True)
class Ratio:
    """Bytes relative to the reference's at equal KL: mean and standard error over seeds.

    Attributes:
        value: the mean.
        stderr: over seeds; NaN for one.
        sign: `≤` where the method's smallest file is better than the level on some subject, `≥` where
            even its largest is worse (both count with that file's bytes), empty where the curve gets there.
    """

    value: float
    stderr: float
    sign: str


def curve(points: Iterable[Point]) -> list[Point]:
    """Return the points that no smaller or equal file beats, smallest first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.nbytes, point.kl)):
        if not best or point.kl < best[-1].kl:
            best.append(point)
    return best


def kl_at(points: Sequence[Point], nbytes: float) -> float | None:
    """Return a curve's KL at a size, or None where the curve does not go."""
    sizes = [math.log(point.nbytes) for point in points]
    if not points or not sizes[0] <= math.log(nbytes) <= sizes[-1]:
        return None
    return math.exp(np.interp(math.log(nbytes), sizes, [math.log(point.kl) for point in points]))


def nbytes_at(points: Sequence[Point], kl: float) -> tuple[float, str]:
    """Return the bytes that a curve needs for a KL, and `≤` or `≥` where only its first or last file tells."""
    losses = [-math.log(point.kl) for point in points]  # ascending
    wanted = -math.log(kl)
    sign = "≤" if wanted < losses[0] else "≥" if wanted > losses[-1] else ""
    return math.exp(np.interp(wanted, losses, [math.log(point.nbytes) for point in points])), sign


def ratios(points: Sequence[Point], target: str) -> dict[str, dict[float, Ratio | None]]:
    """Return for each method and level the bytes relative to the reference's; None where nothing can be said."""
    curves = curves_of([point for point in points if point.target == target])
    subjects = sorted({(skill, seed) for _, skill, seed in curves if (REFERENCE, skill, seed) in curves})
    found: dict[str, dict[float, Ratio | None]] = {}
    for method in dict.fromkeys(method for method, _, _ in curves):
        found[method] = {}
        for level in LEVELS:
            by_seed: dict[int, list[float]] = {}
            signs = set()
            for skill, seed in subjects:
                reference, mine = curves[REFERENCE, skill, seed], curves.get((method, skill, seed))
                size = level * reference[0].parameters / 8
                kl = kl_at(reference, size)
                if mine is None or kl is None:
                    continue
                needed, sign = nbytes_at(mine, kl)
                by_seed.setdefault(seed, []).append(needed / size)
                signs.add(sign)
            found[method][level] = _ratio(by_seed, signs - {""})
    return found


def curves_of(points: Iterable[Point]) -> dict[tuple[str, str, int], list[Point]]:
    """Return the curves of one target by method, skill and seed."""
    groups: dict[tuple[str, str, int], list[Point]] = {}
    for point in points:
        groups.setdefault((point.method, point.skill, point.seed), []).append(point)
    return {key: curve(group) for key, group in groups.items()}


def mean_curve(points: Sequence[Point], method: str) -> tuple[np.ndarray, np.ndarray]:
    """Return sizes and geometric mean KL over all subjects of one target, where every subject's curve goes."""
    curves = [found for (name, _, _), found in curves_of(points).items() if name == method]
    if not curves:
        return np.empty(0), np.empty(0)
    low, high = max(found[0].nbytes for found in curves), min(found[-1].nbytes for found in curves)
    if low > high:
        return np.empty(0), np.empty(0)
    sizes = np.unique(np.clip(np.geomspace(low, high, 40), low, high))
    logs = [
        np.interp(
            np.log(sizes), np.log([point.nbytes for point in found]), np.log([point.kl for point in found])
        )
        for found in curves
    ]  # fmt: skip
    return sizes, np.exp(np.mean(logs, axis=0))


def _ratio(by_seed: Mapping[int, Sequence[float]], signs: set[str]) -> Ratio | None:
    if not by_seed or len(signs) > 1:
        return None
    means = [float(np.mean(values)) for values in by_seed.values()]
    stderr = float(np.std(means, ddof=1) / math.sqrt(len(means))) if len(means) > 1 else math.nan
    return Ratio(float(np.mean(means)), stderr, "".join(signs))
