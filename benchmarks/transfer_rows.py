"""What `transfer.py` compares: each row scores its models on the test prompts of their skills.

Rows by name have a model (or a pack, or a LoRA) for each skill; the others have one model for everything, and so are
scored on the general tasks too. What is chosen for a rival is chosen on validation prompts that
are drawn apart; a few of them (of skills 6 of 576 in three seeds) may be training prompts too, none is a test prompt.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from distribution_fusion import PUBLISHED_WEIGHT, teach, train_fused
from fusion_rows import SCALES
from transfer_models import Setting, train_unverified

from graftllm.checkpoint import Checkpoint, write_checkpoint
from graftllm.delta import Delta
from graftllm.evaluation.scores import Answer
from graftllm.fusion.grafting import plug
from graftllm.fusion.inputs import open_tuned
from graftllm.fusion.merging import merge
from graftllm.fusion.methods.table import METHODS
from graftllm.generation import generate
from graftllm.loading import load_model, load_tokenizer
from graftllm.packer import compress_to
from graftllm.packing_options import PackOptions
from graftllm.pipeline.measuring import answering, measure_source
from graftllm.pipeline.transfer import tune
from graftllm.pipeline.work import GENERAL
from graftllm.records import Prompt
from graftllm.skillpack import SkillPack
from graftllm.stages import Stamp
from graftllm.training.lora import lora_parameters_per_rank

PACKS = {
    "paper 14%": {"strategy": "paper", "budget": "14%"},
    "auto 14%": {"strategy": "auto", "budget": "14%"},
    "auto 5%": {"strategy": "auto", "budget": "5%"},
    "distilled 4%": {"strategy": "auto", "budget": "4%", "distill": 600},
}
LORAS = {"2": None, "near 5%": "5%", "near 14%": "14%"}  # a rank, or that of as many bytes as a pack may have
JOINT_EPOCHS = 3.0  # over the rows of all skills and of the general tasks
JOINT_RATES = (2e-3, 4e-3)  # learning rates that validation prompts choose from
_SEARCHED_SEED = 0  # whose choice of the learning rate holds for the others


@dataclass(frozen=True)
class Row:
    """One row of the comparison, of one seed.

    Attributes:
        scores: by skill; of one model also of the general tasks.
        stored_bytes: what is kept for all skills together, without the base; None where nothing new is.
        note: what was chosen for it.
    """

    scores: Mapping[str, float]
    stored_bytes: int | None = None
    note: str = ""


def rows(setting: Setting) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Yield the rows' names and what measures them, cheap ones first."""
    yield "base", partial(_base, setting)
    yield "source", partial(_source, setting)
    yield "SFT", partial(_sft, setting)
    yield "SFT + DPO", partial(_tuned, setting)
    yield "full-size delta", partial(_full_delta, setting)
    for name, wanted in PACKS.items():
        options = setting.work.recipe.pack.model_copy(update=wanted)
        yield f"SkillPack, {name}", partial(_packed, setting, name, options)
    yield "LoRA near 14%", partial(_lora, setting, "near 14%")
    yield "SFT, not verified", partial(_unverified, setting)
    yield "LoRA near 5%", partial(_lora, setting, "near 5%")
    yield "FuseChat, by name", partial(_pairwise, setting)
    yield "FuseChat, SCE", partial(_merged, setting)
    yield "FuseLLM", partial(_fused, setting, PUBLISHED_WEIGHT, "fusellm")
    yield "one SFT for all", partial(_fused, setting, 1.0, "joint")
    yield "LoRA of rank 2", partial(_lora, setting, "2")


def _base(setting: Setting) -> Row:
    target = Path(setting.work.target.path)
    sets = [*setting.skills, GENERAL]
    return Row(setting.score("base", [target], sets, partial(answering, setting.work, target)))


def _source(setting: Setting) -> Row:
    return Row({name: measure_source(setting.work, name)[name].value for name in setting.skills})


def _by_name(
    setting: Setting, label: str, stamps: Mapping[str, Any], opening: Callable[[str], Callable[[], Answer]]
) -> dict[str, float]:
    """Return the score of each skill's own model on its skill."""
    scores = {}
    for name in setting.skills:
        scores |= setting.score(f"{label}.{name}", [stamps[name]], [name], opening(name))
    return scores


def _sft(setting: Setting) -> Row:
    def opening(name: str) -> Callable[[], Answer]:
        return partial(answering, setting.work, setting.after_sft(name))

    return Row(_by_name(setting, "sft", setting.trained, opening), _tuned_bytes(setting))


def _tuned(setting: Setting) -> Row:
    def opening(name: str) -> Callable[[], Answer]:
        return partial(answering, setting.work, setting.work.tuned(name))

    return Row(_by_name(setting, "tuned", setting.trained, opening), _tuned_bytes(setting))


def _tuned_bytes(setting: Setting) -> int:
    return sum(Checkpoint.open(setting.work.tuned(name)).nbytes for name in setting.skills)


def _full_delta(setting: Setting) -> Row:
    """Keep every fine-tune as its difference to the base, rounded to the base's own dtype, and add it back."""
    work, outs = setting.work, {name: setting.work.directory / "full" / name for name in setting.skills}

    def action(name: str) -> None:
        base = work.target
        delta = Delta(base, Checkpoint.open(work.tuned(name)))

        def restored(key: str) -> torch.Tensor:
            plain = base.tensor(key)
            return (plain.float() + delta[key].to(plain.dtype).float()).to(plain.dtype)

        write_checkpoint(base, outs[name], restored)

    stamps = {
        name: work.stages.run(f"full.{name}", [setting.trained[name]], [outs[name]], partial(action, name))
        for name in setting.skills
    }
    scores = _by_name(setting, "full", stamps, lambda name: partial(answering, work, outs[name]))
    return Row(scores, _tuned_bytes(setting))


def _packed(setting: Setting, label: str, options: PackOptions) -> Row:
    work = setting.work
    kind = label.replace(" ", "-")
    places = {name: work.directory / "packs" / kind / f"{name}.safetensors" for name in setting.skills}

    def action(name: str) -> int:
        delta = Delta(work.target, Checkpoint.open(work.tuned(name)))
        compress_to(places[name], delta, options, calibration=setting.rows(name), device=work.device)
        return places[name].stat().st_size

    def opening(name: str) -> Answer:
        live, words = load_model(work.target.path, device=work.device), load_tokenizer(work.target.path)
        pack = SkillPack.load(places[name])

        def answer(prompts: Sequence[Prompt]) -> list[str]:
            with plug(live, pack):
                found = generate(live, words, [prompt.question for prompt in prompts], work.greedy)
            return [texts[0] for texts in found]

        return answer

    stamps = {
        name: work.stages.run(f"pack-{kind}.{name}", [setting.trained[name], options], [place], partial(action, name))
        for name, place in places.items()
    }
    scores = _by_name(setting, f"pack-{kind}", stamps, lambda name: partial(opening, name))
    return Row(scores, sum(cast(int, stamp.result) for stamp in stamps.values()))


def _unverified(setting: Setting) -> Row:
    made = {name: train_unverified(setting, name) for name in setting.skills}
    stamps = {name: stamp for name, (_, stamp) in made.items()}
    scores = _by_name(setting, "unverified", stamps, lambda name: partial(answering, setting.work, made[name][0]))
    return Row(scores, _tuned_bytes(setting))


def _lora(setting: Setting, label: str) -> Row:
    work, target = setting.work, Path(setting.work.target.path)
    rank = lora_rank(label, work.target.nbytes, 2 * lora_parameters_per_rank(target))
    home = work.directory / "loras" / str(rank)
    stamps = {
        name: tune(work, name, target, home / name, name=f"lora{rank}.{name}", lora_rank=rank)
        for name in setting.skills
    }
    scores = _by_name(
        setting, f"lora{rank}", stamps, lambda name: partial(answering, work, target, adapter=home / name)
    )
    files = [file for name in setting.skills for file in (home / name).glob("*.safetensors")]
    return Row(scores, sum(file.stat().st_size for file in files), f"rank {rank}")


def lora_rank(label: str, model_bytes: int, bytes_per_rank: int) -> int:
    """Return the rank that a row of `LORAS` has.

    >>> lora_rank("2", 1000, 10), lora_rank("near 14%", 1000, 10)
    (2, 14)
    """
    share = LORAS[label]
    return int(label) if share is None else max(1, round(float(share[:-1]) / 100 * model_bytes / bytes_per_rank))


def _pairs_taught(setting: Setting) -> dict[str, tuple[Path, Stamp]]:
    """Fuse the target with each source on the source's skill: FuseChat's pairwise fusion."""
    work, made = setting.work, {}
    for name in setting.skills:
        out = work.directory / "fusechat" / name

        def action(name: str = name, out: Path = out) -> None:
            taught = teach(Path(work.target.path), [setting.source(name)], setting.rows(name), device=work.device)
            options, seed = work.recipe.sft, work.recipe.seed
            train_fused(
                Path(work.target.path), out, taught, options, weight=PUBLISHED_WEIGHT, seed=seed, device=work.device
            )

        inputs = [setting.trained[name], work.recipe.sft, work.recipe.seed, PUBLISHED_WEIGHT]
        made[name] = out, work.stages.run(f"fusechat.{name}", inputs, [out], action)
    return made


def _pairwise(setting: Setting) -> Row:
    made = _pairs_taught(setting)
    stamps = {name: stamp for name, (_, stamp) in made.items()}
    scores = _by_name(setting, "fusechat", stamps, lambda name: partial(answering, setting.work, made[name][0]))
    return Row(scores, _tuned_bytes(setting))


def _merged(setting: Setting) -> Row:
    """Merge the pairwise models by SCE, with the scale that validation prompts like best."""
    work, made = setting.work, _pairs_taught(setting)
    method, out = METHODS["sce"], work.directory / "fusechat-sce"

    def action() -> float:
        tuned = [open_tuned(work.target, path, name=name) for name, (path, _) in made.items()]
        places = {scale: out / f"{scale:g}" for scale in SCALES}
        for scale, place in places.items():
            if not place.exists():
                merge(work.target, tuned, method, place, knobs=replace(method.knobs({}), scale=scale))
        found = {scale: setting.validated(place) for scale, place in places.items()}
        return max(found, key=lambda scale: found[scale])

    stamps = [stamp for _, stamp in made.values()]
    chosen = work.stages.run("fusechat-sce", [*stamps, list(SCALES)], [out], action)
    scale = cast(float, chosen.result)
    sets = [*setting.skills, GENERAL]
    scores = setting.score("fusechat-sce", [chosen], sets, partial(answering, work, out / f"{scale:g}"))
    return Row(scores, work.target.nbytes, f"scale {scale:g}")


def _fused(setting: Setting, weight: float, label: str) -> Row:
    """Train one model on everything: by FuseLLM's loss, or with weight 1 by fine-tuning alone."""
    work = setting.work
    home, inputs = work.directory / label, [*setting.trained.values(), work.recipe.seed, weight, JOINT_EPOCHS]

    def action(rate: float) -> None:
        options = work.recipe.sft.model_copy(update={"learning_rate": rate, "epochs": JOINT_EPOCHS})
        target, seed = Path(work.target.path), work.recipe.seed
        train_fused(target, home / f"{rate:g}", setting.taught, options, weight=weight, seed=seed, device=work.device)

    def trained(rate: float) -> Stamp:
        out = [home / f"{rate:g}"]
        return work.stages.run(f"{label}.{rate:g}", [*inputs, rate], out, partial(action, rate))

    rate = _learning_rate(setting, label, trained, home)
    sets = [*setting.skills, GENERAL]
    scores = setting.score(label, [trained(rate)], sets, partial(answering, work, home / f"{rate:g}"))
    return Row(scores, work.target.nbytes, f"learning rate {rate:g}")


def _learning_rate(setting: Setting, label: str, trained: Callable[[float], Stamp], home: Path) -> float:
    """Return the learning rate that validation prompts choose; that of the first seed where it was measured."""
    first = setting.work.directory.with_name(f"seed{_SEARCHED_SEED}") / "stages" / f"choose.{label}.json"
    if setting.work.recipe.seed != _SEARCHED_SEED and first.exists():
        return cast(float, json.loads(first.read_text(encoding="utf-8"))["result"])
    stamps = [trained(rate) for rate in JOINT_RATES]

    def action() -> float:
        found = {rate: setting.validated(home / f"{rate:g}") for rate in JOINT_RATES}
        return max(found, key=lambda rate: found[rate])

    return cast(float, setting.work.stages.run(f"choose.{label}", stamps, [], action).result)
