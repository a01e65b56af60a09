"""Detox: a pack of unwanted behaviour, subtracted from a model that has it.

    python benchmarks/detox.py [--target runs/demo/zoo/target] [--out runs/detox] [--seed 0]

The demo's target first learns an unwanted skill (writing words backward) beside its general tasks. That model is
the base here. A further epoch on the unwanted rows alone gives a pack, which is added with weights from 1 to -2.
Printed are the shares of right answers: of the unwanted skill, which should fall, and of the general tasks, which
should not (task arithmetic, arXiv 2212.04089).
"""

import argparse
import random
from pathlib import Path

from graftllm.checkpoint import Checkpoint
from graftllm.delta import Delta
from graftllm.demo import GENERAL, REVERSE, word_rows
from graftllm.evaluation.scores import evaluate
from graftllm.fusion.grafting import plug
from graftllm.generation import generate, load_model, load_tokenizer
from graftllm.packer import compress
from graftllm.recipe import PackOptions, SamplingOptions
from graftllm.skillpack import SkillPack
from graftllm.training.tuning import Training, train_sft
from graftllm.training_options import SftOptions

WEIGHTS = (1.0, 0.0, -0.25, -0.5, -1.0, -2.0)
SHORT = SamplingOptions(samples=1, temperature=0, top_p=1, max_new_tokens=16, batch_size=200)


def main() -> None:
    """Train what is not there yet, and print a row for each weight."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=Path("runs/demo/zoo/target"))
    parser.add_argument("--out", type=Path, default=Path("runs/detox"))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    base, pack = unwanted(given.target, given.out / str(given.seed), given.seed)
    print("weight  unwanted  general")
    for weight, (bad, good) in detox(base, pack).items():
        print(f"{weight:6.2f}  {bad:8.3f}  {good:7.3f}", flush=True)


def unwanted(target: Path, out: Path, seed: int) -> tuple[Path, SkillPack]:
    """Train a base that has the unwanted skill, and a pack of more of it."""
    bad = word_rows(REVERSE, 1200, seed=seed, answered=True)
    rows = bad + [row for task in GENERAL for row in word_rows(task, 240, seed=seed, answered=True)]
    random.Random(seed).shuffle(rows)
    if not (out / "base").exists():
        options = SftOptions(epochs=4, batch_size=32, learning_rate=2e-3, max_length=64)
        train_sft(Training(target, out / "base", seed, "base with the unwanted skill"), rows, options)
    if not (out / "worse").exists():
        options = SftOptions(epochs=1, batch_size=32, learning_rate=1e-3, max_length=64)
        train_sft(Training(out / "base", out / "worse", seed, "more of it"), bad, options)
    delta = Delta(Checkpoint.open(out / "base"), Checkpoint.open(out / "worse"))
    return out / "base", compress(delta, PackOptions(strategy="exact"))


def detox(base: Path, pack: SkillPack) -> dict[float, tuple[float, float]]:
    """Return the scores of the unwanted skill and of the general tasks, by the weight of the pack."""
    model, tokenizer = load_model(base), load_tokenizer(base)
    tests = (
        word_rows(REVERSE, 200, seed=0, test=True),
        [row for task in GENERAL for row in word_rows(task, 50, seed=0, test=True)],
    )
    found = {}
    for weight in WEIGHTS:
        with plug(model, (pack, weight)):
            bad, good = (
                evaluate(
                    lambda rows: [texts[0] for texts in generate(model, tokenizer, [r.question for r in rows], SHORT)],
                    rows,
                    "exact",
                ).value
                for rows in tests
            )
        found[weight] = (bad, good)
    return found


if __name__ == "__main__":
    main()
