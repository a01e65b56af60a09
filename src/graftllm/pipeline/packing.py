"""From tuned checkpoints to a grafted model: pack, verify, fuse."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from graftllm.checkpoint import Checkpoint
from graftllm.compression.encoded import Unchanged
from graftllm.compression.roles import role_of
from graftllm.delta import Delta
from graftllm.errors import GraftError, RecipeError
from graftllm.evaluation.fidelity import divergence_on, measure_fidelity
from graftllm.evaluation.scores import Measured
from graftllm.fusion.directory import write_grafted
from graftllm.fusion.fitting import fit_router
from graftllm.fusion.manifest import open_base, open_packs, read_manifest, sha256_of
from graftllm.fusion.routes import BASE
from graftllm.header import BaseInfo, Card, Header, Provenance, TensorEntry
from graftllm.packer import compress_to
from graftllm.packfile import opening
from graftllm.packing_options import PackOptions, budget_bytes
from graftllm.pipeline.overheads import sign, with_room
from graftllm.pipeline.preparing import prompts_of, test_of
from graftllm.pipeline.work import GENERAL, Work
from graftllm.records import read_pairs, read_prompts
from graftllm.skillpack import SkillPack
from graftllm.stages import Stamp


def pack(work: Work, skill: str, trained: Stamp, scores: Mapping[str, Measured]) -> Stamp:
    """Compress a skill's delta into its SkillPack, calibrated on the skill's own SFT rows.

    The pack's header also tells what making it took, stage by stage.
    """
    recipe, home = work.recipe, work.skill(skill)
    sft, dpo = work.training(lora=recipe.method == "lora")
    known = {
        "base": scores["base"][skill].value,
        "source": scores[f"source.{skill}"][skill].value,
        "tuned": scores[f"tuned.{skill}"][skill].value,
    }

    def action() -> dict[str, Any]:
        tuned = Checkpoint.open(work.tuned(skill))
        rows = read_prompts(home / "sft.jsonl")
        pairs = read_pairs(home / "pairs.jsonl") if recipe.dpo else []
        provenance = Provenance(
            sources=tuple(source.name for source in recipe.skills[skill].sources),
            sft_rows=len(rows),
            preference_pairs=len(pairs),
            sft=sft,
            dpo=dpo,
        )
        card = Card(name=skill, description=recipe.skills[skill].description, provenance=provenance, scores=known)
        delta = Delta(work.target, tuned)
        made = compress_to(
            work.pack(skill),
            delta,
            recipe.pack,
            calibration=rows,
            card=with_room(work, skill, card),
            measure=divergence_on(delta, rows, recipe.pack, device=work.device),
            device=work.device,
        )
        signed = sign(work, skill, made, work.pack(skill))
        size = work.pack(skill).stat().st_size
        return {
            "file_bytes": size,
            "tuned_bytes": tuned.nbytes,
            "bits_per_parameter": 8 * size / tuned.parameters,
            "bytes_by_role": signed.bytes_by_role(),
            "overheads": {kind: took.model_dump() for kind, took in signed.header.card.overheads.items()},
        }

    inputs = [trained, recipe.pack, known, recipe.skills[skill].description]
    return work.stages.run(f"pack.{skill}", inputs, [work.pack(skill)], action)


def check_budget(work: Work) -> None:
    """Stop before a training of which no pack could be as small as the recipe wants it.

    Raises:
        RecipeError: the budget is below the header's bytes, which are known beforehand.
    """
    budget, target = work.recipe.pack.budget, work.target
    if budget is None or work.recipe.pack.divergence is not None:
        return
    if (wanted := budget_bytes(budget, target.nbytes)) < (least := _header_bytes(target, work.recipe.pack)):
        raise RecipeError(
            f"pack.budget: {budget} is {wanted:,} bytes, but the header alone of a pack of {target.path}, which tells "
            f"of {len(target.specs)} parameters, takes at least {least:,}. Raise it."
        )


def _header_bytes(target: Checkpoint, options: PackOptions) -> int:
    """Return how many bytes a pack's header has at least: with an empty card, and every parameter left as it is."""
    header = Header(
        card=Card(),
        base=BaseInfo(
            name=target.name, architecture=target.architecture, fingerprint="0" * 64, parameters=target.parameters
        ),
        tuned_bytes=target.nbytes,
        options=options,
        calibration_tokens=0,
        tensors={
            name: TensorEntry(
                role=role_of(name, spec.shape),
                dtype=spec.dtype,
                shape=spec.shape,
                base_digest=hashlib.sha256(name.encode()).hexdigest()[:16],  # as hard to compress as the real one
                how=Unchanged(),
                nbytes=0,
                payload_digest="0" * 16,
                error=0,
            )
            for name, spec in target.specs.items()
        },
    )
    return len(opening(header))


def verify(work: Work, skill: str, packed: Stamp) -> Stamp:
    """Measure how far the packed model is from the tuned one, on the skill's test prompts."""
    test = test_of(work, skill)

    def action() -> dict[str, Any]:
        tuned = Checkpoint.open(work.tuned(skill))
        packed_skill = SkillPack.load(work.pack(skill))
        return asdict(measure_fidelity(work.target, packed_skill, tuned, read_prompts(test), device=work.device))

    return work.stages.run(f"verify.{skill}", [packed, test], [], action)


def fuse(work: Work, packed: Sequence[Stamp]) -> Stamp:
    """Train the router on the skills' SFT prompts and the general ones; write the grafted model."""
    recipe, general = work.recipe, prompts_of(work, GENERAL)

    def action() -> None:
        prompts = {BASE: read_prompts(general)}
        prompts |= {name: read_prompts(work.skill(name) / "sft.jsonl") for name in recipe.skills}
        router = fit_router(work.target.path, prompts, recipe.router, seed=recipe.seed, device=work.device)
        write_grafted(work.grafted, recipe.target, {name: work.pack(name) for name in recipe.skills}, router)

    if not _is_whole(work):
        work.stages.forget("fuse")
    inputs = [*packed, recipe.router, recipe.seed, general]
    return work.stages.run("fuse", inputs, [work.grafted], action)


def _is_whole(work: Work) -> bool:
    """Return whether the grafted model has the packs as they are, and the target as its base."""
    try:
        manifest = read_manifest(work.grafted)
        open_packs(work.grafted, manifest)
        made = {name: sha256_of(work.pack(name)) for name in work.recipe.skills}
        if made != {name: shelved.sha256 for name, shelved in manifest.packs.items()}:
            return False
        return open_base(work.grafted, manifest, check=False).path.resolve() == work.target.path.resolve()
    except GraftError:
        return False
