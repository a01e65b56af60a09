"""What people would do instead of packs: one model tuned in sequence, deltas summed, LoRAs."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

from graftllm.evaluation.scores import Measured
from graftllm.fusion.applying import apply_packs
from graftllm.pipeline.continual import grafting, replay
from graftllm.pipeline.measuring import GENERAL, answering, measure
from graftllm.pipeline.transfer import tune
from graftllm.pipeline.work import Work
from graftllm.skillpack import SkillPack
from graftllm.stages import Stamp
from graftllm.training.lora import lora_parameters_per_rank, merge_adapter


def sequential(work: Work, trained: Mapping[str, Stamp], packed: Mapping[str, Stamp]) -> dict[str, Measured]:
    """Fine-tune one model on skill after skill, and score it on everything after each."""
    names = list(work.recipe.skills)
    stamp, model = trained[names[0]], work.tuned(names[0])
    measured = {}
    for step, name in enumerate(names):
        if step > 0:
            out = work.directory / "baselines" / "sequential" / f"{step}-{name}"
            stamp = tune(work, name, model, out, name=f"sequential.{name}")
            model = out
        measured[f"sequential.{step}"] = measure(
            work, f"sequential.{name}", [stamp], [*names, GENERAL], partial(answering, work, model)
        )
    return measured


def summed(work: Work, trained: Mapping[str, Stamp], packed: Mapping[str, Stamp]) -> dict[str, Measured]:
    """Add all packs to the base at once, with weight 1 each."""
    out = work.directory / "baselines" / "summed"

    def action() -> None:
        apply_packs(work.target, [SkillPack.load(work.pack(name)) for name in packed], out)

    stamp = work.stages.run("sum", list(packed.values()), [out], action)
    return {"summed": measure(work, "summed", [stamp], [*packed, GENERAL], partial(answering, work, out))}


def lora(work: Work, trained: Mapping[str, Stamp], packed: Mapping[str, Stamp]) -> dict[str, Measured]:
    """Train for each skill a LoRA on the same rows and pairs, of the largest rank that its pack's bytes allow.

    Or of the rank that the recipe names.
    """
    measured = {}
    for name, stamp in packed.items():
        adapter, tuned = _adapter(work, name, stamp)
        adapted = partial(answering, work, work.target.path, adapter=adapter)
        measured[f"lora.{name}"] = measure(work, f"lora.{name}", [tuned], [name, GENERAL], adapted)
    return measured


def sequential_lora(work: Work, trained: Mapping[str, Stamp], packed: Mapping[str, Stamp]) -> dict[str, Measured]:
    """Train a LoRA on skill after skill, each on the model that those before are merged into; ranks as for `lora`."""
    names, here = list(work.recipe.skills), work.directory / "baselines" / "sequential_lora"
    model, measured = Path(work.target.path), {}
    for step, name in enumerate(names):
        if step == 0:
            adapter, stamp = _adapter(work, name, packed[name])
        else:
            adapter, rank = here / f"{step}-{name}.lora", _rank(work, packed[name])
            stamp = tune(work, name, model, adapter, name=f"sequential_lora.{name}", lora_rank=rank)
        out = here / f"{step}-{name}"
        stamp = work.stages.run(
            f"merge.sequential_lora.{name}", [stamp, model], [out], partial(merge_adapter, model, adapter, out)
        )
        model = out
        measured[f"sequential_lora.{step}"] = measure(
            work, f"sequential_lora.{name}", [stamp], [*names, GENERAL], partial(answering, work, model)
        )
    return measured


def _adapter(work: Work, name: str, packed: Stamp) -> tuple[Path, Stamp]:
    """Train a LoRA of the bare target on a skill unless it is there."""
    out = work.directory / "baselines" / "lora" / name
    return out, tune(work, name, work.target.path, out, name=f"lora.{name}", lora_rank=_rank(work, packed))


def _rank(work: Work, packed: Stamp) -> int:
    """Return the recipe's rank, or the largest at which a LoRA takes no more bytes than a pack."""
    per_rank = 2 * lora_parameters_per_rank(work.target.path)  # bfloat16
    return work.recipe.lora.rank or max(1, cast(dict[str, Any], packed.result)["file_bytes"] // per_rank)


BASELINES = {
    "sequential": sequential,
    "sequential_lora": sequential_lora,
    "summed": summed,
    "lora": lora,
    "replay": replay,
    "grafting": grafting,
}
