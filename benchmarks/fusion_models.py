"""The zoo that `fusion.py` measures on: six skills from six sources of six architectures, trained once and kept.

    python benchmarks/fusion_models.py [--dir runs/fusion] [--seeds 0 1 2] [--reuse DIR ...] [--size small|large]

It is the demo's zoo with three sources and three skills more, moved and packed by the pipeline's own stages with the
demo's recipe (the packs by the default strategy); `large_zoo.py` says what is otherwise in `large`. `--reuse` names
finished demos, one for each seed, whose models are copied instead of being trained again. A killed build goes on where
it was.
"""

import argparse
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from large_zoo import RECIPE as LARGE_RECIPE
from large_zoo import enlarged
from transformers import GPT2Config, Olmo2Config, PhiConfig, PreTrainedConfig

from graftllm.demo import DEMO, RECIPE, Member, WordTask, Zoo, build_zoo, byte_bpe, unigram
from graftllm.pipeline.measuring import measure_base, measure_source, measure_tuned
from graftllm.pipeline.packing import pack
from graftllm.pipeline.transfer import train
from graftllm.pipeline.work import Work
from graftllm.recipe import Recipe, load_recipe
from graftllm.stages import Stages, Stamp
from graftllm.storage import whole_directory
from graftllm.training_options import SftOptions

SEEDS = (0, 1, 2)
DOUBLE = WordTask("double", "double every letter: {word}", lambda word: "".join(letter * 2 for letter in word))
EVERY_SECOND = WordTask("second", "every second letter: {word}", lambda word: word[::2])
ROTATE = WordTask("rotate", "move the first letter to the end: {word}", lambda word: word[1:] + word[0])


@dataclass(frozen=True)
class Built:
    """One seed's zoo, its fine-tunes and its packs.

    Attributes:
        work: the recipe, and where everything lies.
        stamp: of all of it.
        packs: by skill, what the stage that packed it found, such as `file_bytes`.
        sources: by skill, the score of its source.
    """

    work: Work
    stamp: Stamp
    packs: Mapping[str, Mapping[str, Any]]
    sources: Mapping[str, float]

    @property
    def skills(self) -> list[str]:
        """The names of the skills."""
        return list(self.packs)


def build_models(
    directory: Path,
    seed: int,
    *,
    size: str = "small",
    reuse: Path | None = None,
    device: str = "auto",
) -> Built:
    """Train, move and pack the skills of one seed unless that is done.

    Args:
        directory: where the models of this seed lie or will lie.
        seed: of the zoo, the sampling and the training.
        size: a row of `SIZES`.
        reuse: directory of a finished demo of this seed.
        device: `auto` takes a GPU when there is one.
    """
    directory = directory.absolute()  # as the paths of a recipe that was read are
    zoo = SIZES[size]
    work = _open(directory, size, seed, device)

    def build() -> Any:
        if reuse is not None and not (directory / "zoo").exists():
            _copy_zoo(reuse, directory)
        build_zoo(directory / "zoo", work.stages, zoo, seed=seed, device=device)
        skills = work.recipe.skills
        trained = {name: _tuned(work, name, reuse) for name in skills}
        scores = {"base": measure_base(work)}
        for name in skills:
            scores[f"source.{name}"] = measure_source(work, name)
            scores[f"tuned.{name}"] = measure_tuned(work, name, trained[name])
        packs = {name: pack(work, name, trained[name], scores).result for name in skills}
        return {"packs": packs, "sources": {name: scores[f"source.{name}"][name].value for name in skills}}

    stamp = work.stages.run("built", [seed, size, None], [work.pack(name) for name in work.recipe.skills], build)
    found = cast(dict[str, Any], stamp.result)
    return Built(work, stamp, found["packs"], found["sources"])


def _open(directory: Path, size: str, seed: int, device: str) -> Work:
    """Return the demo's recipe for the skills of a size's zoo, at work in a directory."""
    zoo = SIZES[size]
    recipe, _ = load_recipe(RECIPE, directory)
    prompts = directory / "zoo" / "prompts"
    skills = {
        task.name: {
            "sources": [str(directory / "zoo" / source_of(zoo, task).name)],
            "prompts": str(prompts / f"{task.name}.jsonl"),
            "test": str(prompts / f"{task.name}.test.jsonl"),
        }
        for task, _ in zoo.skills
    }
    wanted = {"name": "fusion", "seed": seed, "skills": skills, "pack": {"budget": "14%"}, "compare": []}
    wanted |= RECIPES[size]
    whole = Recipe.model_validate(recipe.model_dump(mode="json") | wanted)
    return Work(whole, directory, Stages(directory / "stages"), device)


def build_target(directory: Path, size: str, *, seed: int, device: str) -> Path:
    """Train the target of a size's zoo alone, and write prompts beside it, unless that is done; return the zoo."""
    zoo, home = SIZES[size], directory / "zoo"
    alone = replace(zoo, members=zoo.members[:1])
    build_zoo(home, Stages(home.with_name("stages")), alone, seed=seed, device=device)
    return home


def source_of(zoo: Zoo, task: WordTask) -> Member:
    """Return the source that a skill is taken from."""
    return next(member for member in zoo.members[1:] if any(task == known for known, _ in member.lessons))


def _copy_zoo(reuse: Path, directory: Path) -> None:
    """Copy a finished demo's models with their stamps; the prompts are written anew, for six skills."""
    (directory / "stages").mkdir(parents=True, exist_ok=True)
    with whole_directory(directory / "zoo") as partial:
        for member in DEMO.members:
            stamp = reuse / "stages" / f"zoo.{member.name}.json"
            if stamp.exists() and (reuse / "zoo" / member.name).is_dir():
                shutil.copytree(reuse / "zoo" / member.name, partial / member.name)
                shutil.copyfile(stamp, directory / "stages" / stamp.name)


def _tuned(work: Work, skill: str, reuse: Path | None) -> Stamp:
    """Tune the target on a skill, or copy what a finished demo made of the same target."""
    kept = None if reuse is None else reuse / "skills" / skill

    def action() -> Any:
        if kept is None or not (kept / "tuned").is_dir():
            return train(work, skill).result
        with whole_directory(work.skill(skill)) as partial:
            shutil.copytree(kept / "tuned", partial / "tuned")
            for rows in ("sft.jsonl", "pairs.jsonl"):
                shutil.copyfile(kept / rows, partial / rows)
        return None

    inputs = [work.target.path, work.recipe.sft, work.recipe.dpo, work.recipe.seed]
    return work.stages.run(f"tuned.{skill}", inputs, [work.tuned(skill), work.skill(skill) / "sft.jsonl"], action)


def _gpt2(vocabulary: int, pad: int, end: int) -> PreTrainedConfig:
    return GPT2Config(
        vocab_size=vocabulary, pad_token_id=pad, bos_token_id=None, eos_token_id=end, n_positions=128,
        n_embd=128, n_layer=3, n_head=4, initializer_range=0.06, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip


def _phi(vocabulary: int, pad: int, end: int) -> PreTrainedConfig:
    return PhiConfig(
        vocab_size=vocabulary, pad_token_id=pad, bos_token_id=None, eos_token_id=end, max_position_embeddings=128,
        hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4, initializer_range=0.06,
    )  # fmt: skip


def _olmo2(vocabulary: int, pad: int, end: int) -> PreTrainedConfig:
    return Olmo2Config(
        vocab_size=vocabulary, pad_token_id=pad, bos_token_id=None, eos_token_id=end, max_position_embeddings=128,
        hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        tie_word_embeddings=True, initializer_range=0.06,
    )  # fmt: skip


_FROM_SCRATCH = SftOptions(epochs=3, batch_size=64, learning_rate=3e-3, max_length=64)
_MORE: tuple[tuple[str, Callable[[int, int, int], PreTrainedConfig], Any, WordTask], ...] = (
    ("gpt2-double", _gpt2, byte_bpe(310), DOUBLE),
    ("phi-second", _phi, byte_bpe(330), EVERY_SECOND),
    ("olmo2-rotate", _olmo2, unigram(115), ROTATE),
)
SMALL = Zoo(
    members=(
        *DEMO.members,
        *(
            Member(name, config, words, ("<pad>", "<user>", "<assistant>", "<end>"), ((task, 6400),), _FROM_SCRATCH)
            for name, config, words, task in _MORE
        ),
    ),
    skills=(*DEMO.skills, *((task, 1600) for *_, task in _MORE)),
    general=DEMO.general,
    test_prompts=DEMO.test_prompts,
)
SIZES = {"small": SMALL, "large": enlarged(SMALL)}
RECIPES: Mapping[str, dict[str, Any]] = {"small": {}, "large": LARGE_RECIPE}
"""By size, what is otherwise than in the demo's recipe."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Build everything that is asked for and not there yet; print the scores as they are ready."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("runs/fusion"))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--reuse", nargs="+", type=Path, default=[], help="finished demos, one for each seed")
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--device", default="auto")
    given = parser.parse_args(arguments)
    for i, seed in enumerate(given.seeds):
        reuse = given.reuse[i] if i < len(given.reuse) else None
        where = given.dir / (f"seed{seed}" if given.size == "small" else f"{given.size}-seed{seed}")
        built = build_models(where, seed, size=given.size, reuse=reuse, device=given.device)
        for name, found in built.packs.items():
            print(f"{where}: {name}, source {built.sources[name]:.3f}, pack {found['file_bytes']:,} bytes", flush=True)


if __name__ == "__main__":
    main()
