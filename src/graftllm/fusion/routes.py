"""Where a prompt goes, and why: what a router, a rule or a label decided. Nothing here decides it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

BASE = "base"
_GRAIN = 10  # soft weights are tenths, so that few mixtures have to be decoded

Reason = Literal["router", "unsure", "unknown", "rule", "no rule"]


@dataclass(frozen=True)
class Route:
    """Where a prompt goes, and why.

    Attributes:
        name: a pack's name or `base`.
        probabilities: of each class, as the classifier sees it.
        reason: `router` decided; `base` although packs together were more probable, because that was not enough
            (`unsure`), or because the prompt is unlike the pack's own (`unknown`); or a user's `rule`; or `base` where
            there are rules alone and none fits (`no rule`).
        weights: packs that answer together; none for the base.
    """

    name: str
    probabilities: Mapping[str, float]
    reason: Reason
    weights: Mapping[str, float]


def tenths(shares: Mapping[str, float]) -> dict[str, float]:
    """Return shares in tenths that sum to 1, by largest remainders; without those that get none.

    >>> tenths({"a": 0.5, "b": 0.3, "c": 0.3, "d": 0.01})
    {'a': 0.4, 'b': 0.3, 'c': 0.3}
    """
    exact = {name: _GRAIN * share / sum(shares.values()) for name, share in shares.items()}
    whole = {name: int(share) for name, share in exact.items()}
    for name in sorted(exact, key=lambda name: whole[name] - exact[name])[: _GRAIN - sum(whole.values())]:
        whole[name] += 1
    return {name: count / _GRAIN for name, count in whole.items() if count}


def ruled(name: str) -> Route:
    """Return the route to a pack, or to `base`, that a user's rule asks for."""
    return Route(name, {}, "rule", {} if name == BASE else {name: 1.0})


UNRULED = Route(BASE, {}, "no rule", {})
