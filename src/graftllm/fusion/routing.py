"""The router: a prompt -> the pack that should answer it, or `base`.

A small feed-forward classifier on the base model's own hidden states of the prompt: Linear, GELU,
Linear, softmax, with the classes `base` and one for each pack. The base answers when it is not
probable enough that any pack is asked for, and when a prompt is unlike those of the pack that it
was taken for. Else the most probable pack does, also where others are nearly as probable.

A router keeps examples of each class and is nothing but a function of them, so that packs come and
go without their prompts, and one that went leaves the router that was there before it came.
"""

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from graftllm.errors import FusionError
from graftllm.fusion.classifier import Calibration, Classifier, classifier_of, judge, new_network, train_classifier
from graftllm.fusion.examples import WIDEST, Examples, keep_asked, keep_general, sampled
from graftllm.fusion.routes import BASE, Route, tenths
from graftllm.recipe import RouterOptions
from graftllm.tensors import DTYPE_NAMES, TensorSpec, raw_bytes, write_safetensors

_FORMAT = "graftllm/router 3"
_FEWEST = 8  # prompts of a class, so that each of four folds has two


@dataclass(frozen=True)
class Router:
    """A trained classifier, and the examples that it was trained on.

    Attributes:
        options: how it was trained.
        seed: of the examples' draw and the initial weights.
        examples: by class, `base` first, then packs by name.
        network: maps standardized features (prompts, width) to logits (prompts, classes).
        calibration: when the base answers.
        held_out: by class, where each example goes when the classifier has not seen it: numbers of classes, int16.
    """

    options: RouterOptions
    seed: int
    examples: Mapping[str, Examples]
    network: nn.Sequential
    calibration: Calibration
    held_out: Mapping[str, Tensor]

    @property
    def classes(self) -> tuple[str, ...]:
        """`base`, then the packs that the router was trained for."""
        return tuple(self.examples)

    @property
    def packs(self) -> tuple[str, ...]:
        """The packs that the router was trained for."""
        return self.classes[1:]

    @property
    def width(self) -> int:
        """How many features of a prompt the router reads."""
        return self.examples[BASE].codes.shape[1]

    @property
    def accuracy(self) -> float:
        """Share of examples that went where they belong when the classifier had not seen them."""
        right = torch.cat([self.held_out[name] == i for i, name in enumerate(self.classes)])
        return float(right.float().mean())

    @property
    def false_accept(self) -> float:
        """Share of fresh general prompts that packs answer, at most, on average over routers and prompts like these.

        (accepted + 1) / (examples + 1), of the held-out general examples that are a sample, and one more for the fresh
        prompt.
        """
        found = self.held_out[BASE][: sampled(self.options, len(self.examples[BASE]))]
        return (int((found > 0).sum()) + 1) / (len(found) + 1)

    def route(self, features: Tensor) -> list[Route]:
        """Return one route for each row of `prompt_features`.

        Raises:
            FusionError: the router was trained on features of another width.
        """
        if not len(features):
            return []
        if features.shape[1] != self.width:
            raise FusionError(
                f"router: expected a base that gives {self.width} features, as it was trained on, found "
                f"{features.shape[1]}; run `graftllm fuse` again."
            )
        verdict = judge(*self.classifier.read_likeliest(features), self.calibration)
        rows = zip(verdict.probabilities.tolist(), verdict.chosen.tolist(), verdict.strange.tolist(), strict=True)
        return [self._route(row, choice, strange) for row, choice, strange in rows]

    def with_pack(self, name: str, features: Tensor, *, drift: float | None = None) -> "Router":
        """Return a router that knows one more pack; the old packs' prompts are not needed.

        Args:
            name: of the pack.
            features: `prompt_features` of its prompts, after the layer `options.layer`.
            drift: share of each old class's held-out examples that may be sent elsewhere, and one may unless this is 0;
                `options.drift` by default.

        Raises:
            FusionError: the pack is known already or has too few prompts, or more of an old class's examples would be
                sent elsewhere than may be.
        """
        if name in self.examples:
            raise FusionError(f"router: knows the pack {name!r} already; remove it first, or choose another name.")
        check_enough(name, len(features))
        added = _kept(name, features, self.options, self.seed)
        changed = _trained({**self.examples, name: added}, self.options, self.seed)
        moved, allowed = self.drift(changed), self.options.drift if drift is None else drift
        if over := [old for old, share in moved.items() if share > _allowed(allowed, len(self.held_out[old]))]:
            most = max(over, key=moved.__getitem__)
            raise FusionError(
                f"router: with {name!r}, {moved[most]:.1%} of the held-out prompts of {most!r} would go elsewhere, and "
                f"{allowed:.1%} of any old class's may; they are too much like those of {name!r}, or were hard to tell "
                f"from others before. Leave out prompts of {name!r} that are like them, use a rule or name the pack "
                "instead, or allow more: --drift of `graftllm add`, router.drift in the recipe of `graftllm learn`."
            )
        return changed

    def without(self, name: str) -> "Router":
        """Return the router that was never trained for a pack; one of no packs leaves every prompt to the base.

        Raises:
            FusionError: the router does not know the pack.
        """
        if name not in self.packs:
            raise FusionError(f"router: expected one of {', '.join(self.packs) or 'none'} to remove, found {name!r}.")
        rest = {key: kept for key, kept in self.examples.items() if key != name}
        return _trained(rest, self.options, self.seed)

    def drift(self, changed: "Router") -> dict[str, float]:
        """Return, by class of this router, the share of its held-out examples that another router sends elsewhere."""
        found = {name: (self.held_out[name].tolist(), changed.held_out[name].tolist()) for name in self.classes}
        return {
            name: sum(self.classes[i] != changed.classes[j] for i, j in zip(old, new, strict=True)) / len(old)
            for name, (old, new) in found.items()
        }

    @cached_property
    def classifier(self) -> Classifier:
        """The network, and where the examples lie."""
        return classifier_of(self.network, [kept.features for kept in self.examples.values()])

    def save(self, path: Path) -> None:
        """Write the router as one safetensors file; it appears whole or not at all."""
        state = {f"network.{name}": value.half() for name, value in self.network.state_dict().items()}
        for name, kept in self.examples.items():
            state |= {f"codes.{name}": kept.codes, f"scales.{name}": kept.scales, f"found.{name}": self.held_out[name]}
        layout = {name: TensorSpec(DTYPE_NAMES[value.dtype], tuple(value.shape)) for name, value in state.items()}
        about = {
            "format": _FORMAT,
            "classes": self.classes,
            "options": self.options.model_dump(),
            "seed": self.seed,
            "calibration": asdict(self.calibration),
        }
        write_safetensors(path, layout, lambda name: raw_bytes(state[name]), metadata={"router": json.dumps(about)})

    @classmethod
    def load(cls, path: Path) -> "Router":
        """Read a router that `save` wrote.

        Raises:
            FusionError: the file is missing, damaged, no router, or of another version.
        """
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {}).get("router", "{}"))
                state = {name: file.get_tensor(name) for name in file.keys()}
            router = _restored(about, state)
            if not router.classifier.whitening.isfinite().all():
                raise ValueError("expected examples whose covariance is finite")
            return router
        except (
            SafetensorError,
            OSError,
            ValueError,
            KeyError,
            RuntimeError,
            IndexError,
            TypeError,
            OverflowError,
        ) as error:
            reason = " ".join(str(error).split())
            raise FusionError(
                f"{path}: not a router of this version ({reason}). Train it again with `graftllm fuse`."
            ) from error

    def _route(self, row: list[float], choice: int, strange: bool) -> Route:
        name = self.classes[choice]
        probabilities = dict(zip(self.classes, row, strict=True))
        if name == BASE:
            unsure = row[0] < 0.5
            return Route(BASE, probabilities, "unknown" if strange else "unsure" if unsure else "router", {})
        best = sorted(self.packs, key=lambda pack: (pack != name, -probabilities[pack]))[: self.options.soft]
        return Route(name, probabilities, "router", tenths({pack: probabilities[pack] for pack in best}))


def _allowed(share: float, count: int) -> float:
    """Return the share of so many examples that may move: one of them at least, unless none may."""
    return max(share, 1 / count) if share else 0.0


def train_router(features: Mapping[str, Tensor], options: RouterOptions, *, seed: int) -> Router:
    """Train a router, and calibrate it on prompts that it has not seen: four-fold cross-validation.

    Args:
        features: class name (`base` or a pack) -> `prompt_features` of its prompts.
        options: how many examples are kept, and when the base answers.
        seed: of the draw of examples and the initial weights.

    Raises:
        FusionError: there are no general prompts for `base`, or no pack's, or too few of one.
    """
    check_classes(features)
    for name, rows in features.items():
        check_enough(name, len(rows))
    kept = {name: _kept(name, rows, options, seed) for name, rows in features.items()}
    return _trained(kept, options, seed)


def _trained(examples: Mapping[str, Examples], options: RouterOptions, seed: int) -> Router:
    """Return the router of these examples; their order does not matter."""
    examples = {name: examples[name] for name in (BASE, *sorted(set(examples) - {BASE}))}
    network, calibration, found = train_classifier(
        [kept.features for kept in examples.values()],
        options,
        sampled=sampled(options, len(examples[BASE])),
        seed=seed,
    )
    held_out = dict(zip(examples, found.split([len(kept) for kept in examples.values()]), strict=True))
    return Router(options, seed, examples, network, calibration, held_out)


def _kept(name: str, features: Tensor, options: RouterOptions, seed: int) -> Examples:
    return (keep_general if name == BASE else keep_asked)(features, options, seed=seed)


def _restored(about: object, state: Mapping[str, Tensor]) -> Router:
    """Return the router of a file's metadata and tensors; what does not fit raises ValueError, KeyError, TypeError."""
    if not isinstance(about, dict) or about.get("format") != _FORMAT:
        found = about.get("format") if isinstance(about, dict) else type(about).__name__
        raise ValueError(f"expected the format {_FORMAT}, found {found}")
    classes, width = list(about["classes"]), state["network.0.weight"].shape[1]
    if classes[:1] != [BASE] or len(set(classes)) < len(classes):
        raise ValueError(f"expected base and then different packs as classes, found {classes}")
    if width > WIDEST:
        raise ValueError(f"expected at most {WIDEST} features, found {width}")
    with torch.device("meta"):  # which takes no memory before the shapes are compared
        network = new_network(width, len(classes), seed=0)
    weights = {name: state[f"network.{name}"].float() for name in network.state_dict()}
    if not all(bool(value.isfinite().all()) for value in weights.values()):
        raise ValueError("expected finite weights")
    network.load_state_dict(weights, assign=True)
    examples = {name: Examples(state[f"codes.{name}"], state[f"scales.{name}"]) for name in classes}
    held_out = {name: state[f"found.{name}"] for name in classes}
    for name, kept in examples.items():
        rows = len(kept.codes)
        shapes = [tuple(part.shape) for part in (kept.codes, kept.scales, held_out[name])]
        if shapes != [(rows, width), (rows, 1), (rows,)] or not rows:
            raise ValueError(f"the examples of {name!r} have shapes {shapes}")
        dtypes = [part.dtype for part in (kept.codes, kept.scales, held_out[name])]
        if dtypes != [torch.int8, torch.float32, torch.int16] or not kept.scales.isfinite().all():
            raise ValueError(f"the examples of {name!r} are {dtypes}, or not finite")
        if not set(held_out[name].tolist()) <= set(range(len(classes))):
            raise ValueError(f"the examples of {name!r} go to classes that are not there")
    calibration = _calibration(about["calibration"], len(classes))
    options = RouterOptions.model_validate(about["options"])
    return Router(options, int(about["seed"]), examples, network.requires_grad_(False).eval(), calibration, held_out)


def _calibration(told: Mapping[str, Any], classes: int) -> Calibration:
    """Return the calibration of a file's metadata, if it is one for so many classes."""
    limits = tuple(map(float, told["limits"]))
    rest = {name: float(told[name]) for name in ("temperature", "threshold")}
    if len(limits) != classes or not all(map(math.isfinite, (*limits, *rest.values()))) or rest["temperature"] <= 0:
        raise ValueError(f"expected a calibration of finite numbers, with {classes} limits; found {dict(told)}")
    return Calibration(limits=limits, **rest)


def check_classes(found: Collection[str]) -> None:
    """Refuse what no router can be trained of.

    Raises:
        FusionError: there is no class `base`, or no other.
    """
    if BASE not in found or len(found) < 2:
        raise FusionError(
            f"router: expected prompts of 'base' and of at least one pack, found {', '.join(found) or 'none'}. "
            "Add rows of general prompts, and rows whose task is a pack's name."
        )


def check_enough(name: str, different: int, rows: int | None = None) -> None:
    """Refuse too few prompts of a class; `rows` is how many there are with those that say the same.

    Raises:
        FusionError: fewer than 8 are different.
    """
    if different < _FEWEST:
        among = "" if rows is None else f" in {rows} row{'' if rows == 1 else 's'}"
        raise FusionError(
            f"router: expected at least {_FEWEST} different prompts of {name!r}, found {different}{among}; add some."
        )
