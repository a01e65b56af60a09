"""The fine-tunes that `codec.py` measures on, trained once and kept: real deltas of two sizes.

    python benchmarks/codec_models.py [--dir runs/codec] [--reuse runs/demo] [--size small|large] [--seeds 0 1 2]

`demo` is the demo's zoo whole: for each seed a target and three sources from scratch, and three
skills moved by sampling, SFT and DPO. `wide` is a Llama of 11.7 M parameters with an untied head
that knows the general tasks, fine-tuned on one skill from the verified rows of the demo of the same
seed. `mixture` is a Qwen3-MoE of 1.4 M parameters, most of them in eight experts a layer of which two
read a token, fine-tuned so on two. Their bases are trained once, so their three seeds are three
fine-tunes of one base. `large` is the target of 219 M parameters of `fusion_models.py`, fine-tuned on
three skills from rows that are right; one of these fine-tunes adds 26 tokens to the vocabulary. A
killed build goes on where it was.
"""

import argparse
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fusion_models import SIZES as FUSION_SIZES
from large_zoo import ADDED_TOKENS
from transformers import LlamaConfig, PreTrainedConfig, Qwen3MoeConfig

from graftllm.demo import GENERAL, RECIPE, REVERSE, Member, WordTask, Zoo, build_zoo, byte_bpe, word_rows
from graftllm.pipeline.transfer import train
from graftllm.pipeline.work import Work
from graftllm.recipe import load_recipe
from graftllm.records import read_prompts, write_rows
from graftllm.stages import Stages
from graftllm.storage import whole_directory
from graftllm.training.tuning import Training, train_sft
from graftllm.training_options import SftOptions

SKILLS = {
    "demo": ("reverse", "sort", "next"),
    "wide": ("reverse",),
    "mixture": ("reverse", "next"),
    "large": ("reverse", "sum", "alphabet"),
}
SIZES = {"small": ("demo", "wide"), "large": ("large",)}
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Subject:
    """One fine-tune to compress, and what it is measured with.

    Attributes:
        target: a row of `SKILLS`.
        skill: what it was tuned on.
        seed: of the zoo, the sampling and the training.
        base: checkpoint directory of the base.
        tuned: checkpoint directory of the fine-tune.
        rows: JSONL of the rows that it was tuned on, to calibrate with.
        test: JSONL of prompts with references, none of them seen in training.
    """

    target: str
    skill: str
    seed: int
    base: Path
    tuned: Path
    rows: Path
    test: Path

    @property
    def name(self) -> str:
        """A short name, such as `demo.sort.0`."""
        return f"{self.target}.{self.skill}.{self.seed}"


def build_subjects(
    directory: Path, targets: Sequence[str], seeds: Sequence[int], reuse: Path | None = None, device: str = "auto"
) -> Iterator[Subject]:
    """Yield the subjects, seed by seed; those that are not built yet are built first.

    Args:
        directory: where the models lie or will lie.
        targets: rows of `SKILLS`.
        seeds: which fine-tunes of each target.
        reuse: directory of a finished demo with seed 0, to copy instead of training it again.
        device: where they are trained; `auto` takes a GPU when there is one.
    """
    stages = Stages(directory / "stages")
    for seed in seeds:
        if "large" in targets:
            yield from _large_subjects(stages, directory / "large" / str(seed), seed, device)
        if not {"demo", *_BASES} & set(targets):
            continue
        demo = directory / "demo" / str(seed)
        stages.run(f"demo.{seed}", [seed], [demo], lambda seed=seed, demo=demo: _build_demo(demo, seed, reuse, device))
        if "demo" in targets:
            yield from (_demo_subject(demo, skill, seed) for skill in SKILLS["demo"])
        for target in (name for name in _BASES if name in targets):
            base = build_base(directory, target, device)
            for skill in SKILLS[target]:
                yield _fine_tuned(stages, directory, target, base, demo, skill, seed, device)


def build_base(directory: Path, target: str, device: str = "auto") -> Path:
    """Train the base of `wide` or `mixture` on the general tasks unless it is there; return its directory."""
    home, zoo = directory / target / "zoo", _BASES[target]
    build_zoo(home, Stages(directory / "stages"), zoo, seed=0, device=device)
    return home / zoo.members[0].name


def _build_demo(directory: Path, seed: int, reuse: Path | None, device: str) -> None:
    """Copy the base, the fine-tunes and the rows of a finished demo, or do what the demo does up to there."""
    if seed == 0 and reuse is not None and (reuse / "report.json").exists():
        with whole_directory(directory) as partial:
            for part in ("zoo/target", "zoo/prompts", *(f"skills/{skill}/tuned" for skill in SKILLS["demo"])):
                shutil.copytree(reuse / part, partial / part)
            for skill in SKILLS["demo"]:
                shutil.copyfile(reuse / "skills" / skill / "sft.jsonl", partial / "skills" / skill / "sft.jsonl")
        return
    recipe, directory = load_recipe(RECIPE, directory)
    work = Work(recipe.model_copy(update={"seed": seed}), directory, Stages(directory / "stages"), device)
    build_zoo(directory / "zoo", work.stages, seed=seed, device=device)
    for skill in SKILLS["demo"]:
        train(work, skill)


def _demo_subject(demo: Path, skill: str, seed: int) -> Subject:
    home = demo / "skills" / skill
    test = demo / "zoo" / "prompts" / f"{skill}.test.jsonl"
    return Subject("demo", skill, seed, demo / "zoo" / "target", home / "tuned", home / "sft.jsonl", test)


def _fine_tuned(
    stages: Stages, directory: Path, target: str, base: Path, demo: Path, skill: str, seed: int, device: str
) -> Subject:
    """Return a fine-tune of a base on rows of the demo; it is trained unless it is there."""
    source = _demo_subject(demo, skill, seed)
    out = directory / target / str(seed) / skill
    run = Training(base, out, seed, f"SFT {target} {skill} {seed}", device=device)
    stages.run(
        f"{target}.{skill}.{seed}", [base, source.rows, _TUNING], [out],
        lambda: train_sft(run, read_prompts(source.rows), _TUNING),
    )  # fmt: skip
    return Subject(target, skill, seed, base, out, source.rows, source.test)


def _large_subjects(stages: Stages, home: Path, seed: int, device: str) -> Iterator[Subject]:
    """Yield the fine-tunes of a seed's large target; what is not there is trained first."""
    build_zoo(home / "zoo", Stages(home / "stages"), LARGE, seed=seed, device=device)
    base, prompts = home / "zoo" / LARGE.members[0].name, home / "zoo" / "prompts"
    for task, count in LARGE.skills:
        rows, out = home / f"{task.name}.jsonl", home / task.name
        added = ADDED_TOKENS.get(task.name, ())
        run = Training(base, out, seed, f"SFT large {task.name} {seed}", added_tokens=added, device=device)

        def tune(task: WordTask = task, count: int = count, rows: Path = rows, run: Training = run) -> None:
            write_rows(rows, word_rows(task, count, seed=seed + 1, answered=True))
            train_sft(run, read_prompts(rows), _LARGE_TUNING)

        stages.run(f"large.{task.name}.{seed}", [base, _LARGE_TUNING, *added], [out, rows], tune)
        yield Subject("large", task.name, seed, base, out, rows, prompts / f"{task.name}.test.jsonl")


def _wide_llama(vocabulary: int, pad: int, end: int) -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=vocabulary, pad_token_id=pad, bos_token_id=None, eos_token_id=end, max_position_embeddings=128,
        hidden_size=384, intermediate_size=896, num_hidden_layers=8, num_attention_heads=6, num_key_value_heads=2,
        tie_word_embeddings=False, initializer_range=0.04,
    )  # fmt: skip


def _mixture(vocabulary: int, pad: int, end: int) -> PreTrainedConfig:
    return Qwen3MoeConfig(
        vocab_size=vocabulary, pad_token_id=pad, bos_token_id=None, eos_token_id=end, max_position_embeddings=128,
        hidden_size=128, moe_intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
        num_experts=8, num_experts_per_tok=2, tie_word_embeddings=True, initializer_range=0.06,
    )  # fmt: skip


_TUNING = SftOptions(epochs=4, batch_size=32, learning_rate=1e-3, max_length=64)
_LARGE_TUNING = _TUNING.model_copy(update={"learning_rate": 1e-4, "max_length": 128})
_FUSION = FUSION_SIZES["large"]
LARGE = replace(
    _FUSION,
    members=_FUSION.members[:1],
    skills=tuple((task, count) for task, count in _FUSION.skills if task.name in SKILLS["large"]),
)
WIDE = Zoo(
    members=(
        Member(
            "base", _wide_llama, byte_bpe(336), ("<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"),
            tuple(zip(GENERAL, (4800, 400, 800, 800, 3200), strict=True)),
            SftOptions(epochs=2, batch_size=64, learning_rate=1.5e-3, max_length=64),
        ),
    ),
    skills=((REVERSE, 1),),
    general=tuple((task, 1) for task in GENERAL),
    test_prompts=400,
)  # fmt: skip
MIXTURE = replace(
    WIDE,
    members=(
        replace(
            WIDE.members[0],
            name="mixture",
            config=_mixture,
            training=SftOptions(epochs=4, batch_size=32, learning_rate=4e-3, max_length=64),
        ),
    ),
)
_BASES = {"wide": WIDE, "mixture": MIXTURE}


def main() -> None:
    """Build everything that is asked for and not there yet; print the names as they are ready."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("runs/codec"))
    parser.add_argument("--reuse", type=Path, help="directory of a finished demo with seed 0")
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    given = parser.parse_args()
    for subject in build_subjects(given.dir / "models", SIZES[given.size], given.seeds, given.reuse, given.device):
        print(subject.name, flush=True)


if __name__ == "__main__":
    main()
