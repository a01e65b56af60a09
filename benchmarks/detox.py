"""Detox: a pack of unwanted behaviour, subtracted from a model that has it.

    python benchmarks/detox.py [--target runs/demo/zoo/target] [--out runs/detox] [--seed 0] [--size small|large]
        [--device auto]

The demo's target (with `--size large` that of `fusion_models.py`, trained unless it is there) first learns an unwanted
skill (writing words backward) beside its general tasks. That model is the base here. A further epoch on the unwanted
rows alone gives a pack, which is added with weights from 1 to -2. Printed are the shares of right answers: of the
unwanted skill, which should fall, and of the general tasks, which should not (task arithmetic, arXiv 2212.04089).
"""

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fusion_models import SIZES as ZOOS
from fusion_models import build_target

from graftllm.checkpoint import Checkpoint
from graftllm.delta import Delta
from graftllm.demo import GENERAL, REVERSE, WordTask, word_rows
from graftllm.evaluation.scores import evaluate
from graftllm.fusion.grafting import plug
from graftllm.generation import generate
from graftllm.loading import load_model, load_tokenizer
from graftllm.packer import compress
from graftllm.packing_options import PackOptions
from graftllm.recipe import SamplingOptions
from graftllm.records import Prompt
from graftllm.skillpack import SkillPack
from graftllm.training.tuning import Training, train_sft
from graftllm.training_options import SftOptions

WEIGHTS = (1.0, 0.0, -0.25, -0.5, -1.0, -2.0)
SHORT = SamplingOptions(samples=1, temperature=0, top_p=1, max_new_tokens=16, batch_size=200)


@dataclass(frozen=True)
class Size:
    """What is unwanted, how it is trained, first beside the general tasks and then alone, and how answers are read."""

    skill: WordTask
    beside: SftOptions
    alone: SftOptions
    sampling: SamplingOptions


def _size(skill: WordTask, learning_rate: float, max_length: int, max_new_tokens: int) -> Size:
    beside = SftOptions(epochs=4, batch_size=32, learning_rate=learning_rate, max_length=max_length)
    alone = beside.model_copy(update={"epochs": 1, "learning_rate": learning_rate / 2})
    return Size(skill, beside, alone, SHORT.model_copy(update={"max_new_tokens": max_new_tokens}))


_SENTENCES = next(task for task, _ in ZOOS["large"].skills if task.name == REVERSE.name)
SIZES = {"small": _size(REVERSE, 2e-3, 64, 16), "large": _size(_SENTENCES, 1e-4, 128, 80)}


def main() -> None:
    """Train what is not there yet, and print a row for each weight."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, help="checkpoint directory  [default: the size's]")
    parser.add_argument("--out", type=Path, default=Path("runs/detox"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    size, home = SIZES[given.size], given.out / (str(given.seed) if given.size == "small" else f"large-{given.seed}")
    target = given.target or Path("runs/demo/zoo/target")
    if given.target is None and given.size == "large":
        target = build_target(home, "large", seed=given.seed, device=given.device) / "target"
    base, pack = unwanted(target, home, given.seed, size, given.device)
    print("weight  unwanted  general")
    for weight, (bad, good) in detox(base, pack, size, given.device).items():
        print(f"{weight:6.2f}  {bad:8.3f}  {good:7.3f}", flush=True)


def unwanted(target: Path, out: Path, seed: int, size: Size, device: str) -> tuple[Path, SkillPack]:
    """Train a base that has the unwanted skill, and a pack of more of it."""
    bad = word_rows(size.skill, 1200, seed=seed, answered=True)
    rows = bad + [row for task in GENERAL for row in word_rows(task, 240, seed=seed, answered=True)]
    random.Random(seed).shuffle(rows)
    if not (out / "base").exists():
        run = Training(target, out / "base", seed, "base with the unwanted skill", device=device)
        train_sft(run, rows, size.beside)
    if not (out / "worse").exists():
        train_sft(Training(out / "base", out / "worse", seed, "more of it", device=device), bad, size.alone)
    delta = Delta(Checkpoint.open(out / "base"), Checkpoint.open(out / "worse"))
    return out / "base", compress(delta, PackOptions(strategy="exact"))


def detox(base: Path, pack: SkillPack, size: Size, device: str) -> dict[float, tuple[float, float]]:
    """Return the scores of the unwanted skill and of the general tasks, by the weight of the pack."""
    model, tokenizer = load_model(base, device=device), load_tokenizer(base)
    tests = (
        word_rows(size.skill, 200, seed=0, test=True),
        [row for task in GENERAL for row in word_rows(task, 50, seed=0, test=True)],
    )

    def answer(rows: Sequence[Prompt]) -> list[str]:
        return [texts[0] for texts in generate(model, tokenizer, [row.question for row in rows], size.sampling)]

    found = {}
    for weight in WEIGHTS:
        with plug(model, (pack, weight)):
            bad, good = (evaluate(answer, rows, "exact").value for rows in tests)
        found[weight] = (bad, good)
    return found


if __name__ == "__main__":
    main()
