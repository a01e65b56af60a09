"""The router: which layer and pooling, how it scales from 1 to 64 packs, what a kind never seen does, what it costs.

    python benchmarks/routing.py [--base runs/demo/zoo/target] [--prompts runs/demo/zoo/prompts] [--seeds 0 1 2]
        [--size small|large] [--device auto] [--image docs/images/routing.png]

Sixty-four packs are the two-step skills of eight word operations, each asked in three wordings: "sort its
letters, then double every letter" is another pack than the same in the other order. The base's own prompts are
the demo's general ones. No pack is needed, since a router knows prompts alone. With `--size large` the base is the
target of `fusion_models.py`, trained unless it is there, and the model whose prefill is timed is eight times as wide.
"""

import argparse
import itertools
import json
import random
import string
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median, stdev

import torch
from fusion_models import build_target
from matplotlib.figure import Figure
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

from graftllm.evaluation.routes import unknown_accepted
from graftllm.fusion.features import WIDEST, prompt_features
from graftllm.fusion.routes import BASE
from graftllm.fusion.routing import Router, train_router
from graftllm.loading import load_model, load_tokenizer
from graftllm.recipe import RouterOptions
from graftllm.records import Message, read_prompts
from graftllm.rendering import render
from graftllm.storage import whole_file

STEPS = (
    "write it backward", "sort its letters", "take the next letter for each", "double every letter",
    "keep every second letter", "rotate it by one", "drop the vowels", "write it in small letters",
)  # fmt: skip
WORDINGS = ("{a}, then {b}: {word}", "take {word} and {a}, then {b}", "first {a} and after that {b}: {word}")
TRAINED, TESTED = 128, 40
COUNTS = (1, 2, 4, 8, 16, 32, 64)
WIDTHS = {"small": 256, "large": 2048}  # of the model whose prefill is timed
Features = Mapping[str, Tensor]


def main() -> None:
    """Measure, print tables and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="checkpoint directory  [default: the size's]")
    parser.add_argument("--prompts", type=Path, help="directory with the general prompts  [default: the size's]")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--size", choices=list(WIDTHS), default="small")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--image", type=Path, help="[default: docs/images/routing.png, or runs/routing/large.png]")
    given = parser.parse_args()
    zoo, image = Path("runs/demo/zoo"), Path("docs/images/routing.png")
    if given.size == "large":
        zoo, image = Path("runs/routing/large/zoo"), Path("runs/routing/large.png")
        if given.base is None or given.prompts is None:
            build_target(zoo.parent, "large", seed=0, device=given.device)
    base, prompts = given.base or zoo / "target", given.prompts or zoo / "prompts"
    model, tokenizer = load_model(base, device=given.device), load_tokenizer(base)
    train, test = questions(prompts, TRAINED, seed=0), questions(prompts, TESTED, seed=1, test=True)
    by_layer = layers(model, tokenizer, train, test)
    general = {BASE: [list(row.question) for row in read_prompts(prompts / "general.test.jsonl")]}
    first, second, fresh = (read(model, tokenizer, rows, 1) for rows in (train, test, general))
    scaling = []
    for count in COUNTS:
        scaling.append(scale(first, second, fresh[BASE], count, given.seeds))
        print(json.dumps(scaling[-1]), flush=True)
    print("share of a prefill:", json.dumps(cost(tokenizer, WIDTHS[given.size], model.device)))
    draw(by_layer, scaling, given.image or image)


def questions(prompts: Path, count: int, *, seed: int, test: bool = False) -> dict[str, list[list[Message]]]:
    """Return prompts of the base and of 64 two-step skills."""
    general = read_prompts(prompts / ("general.test.jsonl" if test else "general.jsonl"))
    found = {BASE: [list(row.question) for row in random.Random(seed).sample(general, count)]}
    draw = random.Random(f"{seed} {test}")
    for a, b in itertools.product(range(len(STEPS)), repeat=2):
        rows = []
        for _ in range(count):
            word = "".join(draw.choices(string.ascii_uppercase, k=draw.randint(3, 6)))
            rows.append([_asked(draw.choice(WORDINGS).format(a=STEPS[a], b=STEPS[b], word=word))])
        found[f"skill-{a}{b}"] = rows
    return found


def read(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Mapping[str, Sequence[Sequence[Message]]],
    layer: int,
) -> dict[str, Tensor]:
    """Return the features of prompts by class."""
    every = prompt_features(model, tokenizer, [row for part in rows.values() for row in part], layer=layer)
    return dict(zip(rows, every.split([len(part) for part in rows.values()]), strict=True))


def layers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Mapping[str, Sequence[Sequence[Message]]],
    test: Mapping[str, Sequence[Sequence[Message]]],
) -> dict[str, list[float]]:
    """Return the accuracy over 64 packs after each layer, by what is pooled; one seed."""
    width = model.config.hidden_size
    parts = {
        "embeddings": [(0, width)],
        "mean": [(width, 2 * width)],
        "last": [(2 * width, 3 * width)],
        "mean, last": [(width, 3 * width)],
        "embeddings, mean, last": [(0, 3 * width)],
    }
    if 3 * width > WIDEST:
        parts = {"embeddings, mean, last": [(0, 3 * width)]}  # folded: no part stands by itself
    found: dict[str, list[float]] = {name: [] for name in parts}
    for layer in range(1, model.config.num_hidden_layers + 1):
        features = [read(model, tokenizer, rows, layer) for rows in (train, test)]
        for name, ((start, stop),) in parts.items():
            cut = [{key: value[:, start:stop] for key, value in one.items()} for one in features]
            router = train_router(cut[0], RouterOptions(), seed=0)
            found[name].append(_accuracy(router, cut[1]))
            print(f"layer {layer}, {name}: {found[name][-1]:.4f}", flush=True)
    return found


def scale(train: Features, test: Features, general: Tensor, count: int, seeds: Sequence[int]) -> dict[str, float | int]:
    """Return what a router of `count` packs does: means over seeds (and draws of packs), and their standard errors.

    False accepts are of `general`, shape (prompts, width), all general test prompts there are.
    """
    found: dict[str, list[float]] = {}
    for seed in seeds:
        names = random.Random(seed).sample([name for name in train if name != BASE], min(count, 64))
        few = {name: train[name] for name in (BASE, *names)}
        started = time.perf_counter()
        router = train_router(few, RouterOptions(), seed=seed)
        one = {"seconds": time.perf_counter() - started, "accuracy": _accuracy(router, test)}
        one["held out"] = router.accuracy
        one |= baselines(few, test)
        one["false accept"] = mean(route.name != BASE for route in router.route(general))
        one["stated false accept"] = router.false_accept
        one["bytes"] = _bytes(router)
        if count > 1:
            smaller = router.without(names[-1])
            one["moved by the last pack"] = _moved(smaller, router, {n: test[n] for n in (BASE, *names[:-1])})
            one["drift"] = max(smaller.drift(router).values())
            if count <= 8:
                one["unknown accepted"] = mean(unknown_accepted(router).values())
        for key, value in one.items():
            found.setdefault(key, []).append(value)
    row: dict[str, float | int] = {"packs": count}
    for key, values in found.items():
        row[key] = round(mean(values), 5)
        if len(values) > 1:
            row[f"{key} ±"] = round(stdev(values) / len(values) ** 0.5, 5)
    return row


def baselines(train: Features, test: Features) -> dict[str, float]:
    """Return the share of test prompts that simpler choosers send where they belong.

    They choose the class with the nearest mean, the one with the most training prompts (of several the first),
    and any with equal probability, of which it is the expectation.
    """
    counts = {name: len(test[name]) for name in train}
    most = max(train, key=lambda name: len(train[name]))
    majority = counts[most] / sum(counts.values())
    return {"nearest mean": _nearest_mean(train, test), "majority": majority, "random": 1 / len(train)}


def cost(tokenizer: PreTrainedTokenizerBase, width: int, device: torch.device) -> dict[str, float]:
    """Return the router's time over that of a prefill, both of a 32-layer model; medians of 7."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_hidden_layers=32, hidden_size=width, intermediate_size=width * 7 // 2,
        num_attention_heads=8, num_key_value_heads=4,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).to(device).eval()
    draw = torch.Generator().manual_seed(0)
    clouds = {f"p{i}": torch.randn(1, 512, generator=draw) + torch.randn(128, 512, generator=draw) for i in range(64)}
    router = train_router({BASE: torch.randn(128, 512, generator=draw), **clouds}, RouterOptions(steps=20), seed=0)
    found = {}
    for words in (4, 16, 64, 256, 1024):
        asked = [[_asked("ab " * words)]]
        ids = torch.full((1, prompt_length(tokenizer, asked[0])), 5, device=device)
        routing, prefill = [], []
        for _ in range(7):
            started = time.perf_counter()
            features = prompt_features(model, tokenizer, asked)
            router.route(features)
            routing.append(time.perf_counter() - started)
            started = time.perf_counter()
            with torch.inference_mode():
                model(input_ids=ids, logits_to_keep=1).logits.cpu()  # waits for a GPU
            prefill.append(time.perf_counter() - started)
        found[f"{ids.shape[1]} tokens"] = round(median(routing) / median(prefill), 4)
    return found


def prompt_length(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> int:
    """Return how many tokens a conversation has."""
    return len(render(tokenizer, messages, answer_next=True))


def draw(by_layer: Mapping[str, Sequence[float]], scaling: Sequence[Mapping[str, float]], image: Path) -> None:
    """Draw accuracy by layer and pooling, and errors by the number of packs."""
    figure = Figure(figsize=(9, 3.2))
    left, right = figure.subplots(1, 2)
    for name, values in by_layer.items():
        left.plot(range(1, len(values) + 1), [100 * value for value in values], marker="o", label=name)
    layers = max(map(len, by_layer.values()))
    every = range(1, layers + 1, max(1, layers // 4))
    left.set(xlabel=f"states after this layer of {layers}", ylabel="64 packs: right, %", xticks=every, ylim=(0, 104))
    left.legend(frameon=False, fontsize=8, loc="lower left")
    counts = [row["packs"] for row in scaling]
    for key, label in (("accuracy", "router"), ("nearest mean", "nearest class mean")):
        errors = [100 * row.get(f"{key} ±", 0) for row in scaling]
        right.errorbar(counts, [100 * row[key] for row in scaling], errors, marker="o", label=label)
    right.set(xlabel="packs", ylabel="right, %", xscale="log", xticks=counts)
    right.set_xticks(counts, [str(count) for count in counts])
    right.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    with whole_file(image) as out:
        figure.savefig(out, format="png", dpi=100)


def _asked(text: str) -> Message:
    return Message(role="user", content=text)


def _accuracy(router: Router, features: Features) -> float:
    """Return the share of prompts of the router's classes that go where they belong."""
    return mean(route.name == name for name in router.classes for route in router.route(features[name]))


def _moved(first: Router, second: Router, features: Features) -> float:
    pairs = (pair for rows in features.values() for pair in zip(first.route(rows), second.route(rows), strict=True))
    return mean(old.name != new.name for old, new in pairs)


def _nearest_mean(train: Features, test: Features) -> float:
    centers = torch.stack([rows.mean(dim=0) for rows in train.values()])
    right = [torch.cdist(test[name], centers).argmin(dim=1) == i for i, name in enumerate(train)]
    return float(torch.cat(right).float().mean())


def _bytes(router: Router) -> int:
    with tempfile.TemporaryDirectory() as directory:
        router.save(Path(directory) / "r")
        return (Path(directory) / "r").stat().st_size


if __name__ == "__main__":
    main()
