"""Router accuracy, memory and tokens a second with 1 to 64 packs on one base.

The packs are of rank 32, so that they run beside the weights. Those beyond the trained ones are the same files
under other names, with other prompts of the same skill to train the router on; a prompt is routed right when it
goes to any pack of its skill.
"""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from fusion_rows import Bench

from graftllm.checkpoint import Checkpoint
from graftllm.delta import Delta
from graftllm.fusion.assembly import fuse_packs
from graftllm.fusion.grafted import GraftedModel
from graftllm.packer import compress_to
from graftllm.packing_options import PackOptions
from graftllm.pipeline.work import GENERAL
from graftllm.records import Prompt, read_prompts, write_rows
from graftllm.rendering import pad, render
from graftllm.storage import write_text

_EACH = 48  # prompts that the router learns a pack from
_BATCH = 64  # conversations in the batch that is timed
_REPEATS = 9
_RANK = 32  # of the packs that are timed


def measure_scaling(bench: Bench, directory: Path, counts: Sequence[int]) -> list[dict[str, Any]]:
    """Measure each number of packs that is not kept in `directory` yet."""
    found = []
    for count in counts:
        path = directory / f"{count}.json"
        if not path.exists():
            write_text(path, json.dumps(_measure(bench, directory / "grafted", count)))
        found.append(json.loads(path.read_text(encoding="utf-8")))
        print(f"{count} packs: {found[-1]}", flush=True)
    return found


def _measure(bench: Bench, place: Path, count: int) -> dict[str, Any]:
    work, skills = bench.built.work, bench.built.skills
    copies = {f"{skills[i % len(skills)]}-{i // len(skills)}": skills[i % len(skills)] for i in range(count)}
    data = list(read_prompts(work.directory / "zoo" / "prompts" / "general.jsonl"))
    for i, (name, skill) in enumerate(copies.items()):
        start = i // len(skills) * _EACH
        rows = read_prompts(work.skill(skill) / "sft.jsonl")
        some = [rows[j % len(rows)] for j in range(start, start + _EACH)]
        data += [Prompt(row.id, row.question, name, row.reference) for row in some]
    write_rows(place.with_name("rows.jsonl"), data)
    shutil.rmtree(place, ignore_errors=True)
    packs = {name: _servable(bench, skill, place.with_name(f"{skill}.safetensors")) for name, skill in copies.items()}
    started = time.monotonic()
    fuse_packs(place, str(bench.base.path), packs, router_data=place.with_name("rows.jsonl"), device=work.device)
    fused_s = time.monotonic() - started
    grafted = GraftedModel.load(place, device=work.device)
    return {
        "packs": count,
        "routed right, %": 100 * _accuracy(bench, grafted, copies),
        "fused in s": fused_s,
        **_speed(bench, grafted, copies),
        "decoded packs, MB": (grafted.shelf.nbytes if grafted.shelf else 0) / 1e6,
    }


def _servable(bench: Bench, skill: str, out: Path) -> Path:
    """Pack a fine-tune so that it can run beside the weights, unless that is done."""
    if not out.exists():
        delta = Delta(bench.base, Checkpoint.open(bench.built.work.tuned(skill)))
        compress_to(out, delta, PackOptions(servable=_RANK), device=bench.built.work.device)
    return out


def _accuracy(bench: Bench, grafted: GraftedModel, copies: Mapping[str, str]) -> float:
    """Return the share of test prompts that go to a pack of their skill, or the base if they are general."""
    right = total = 0
    for test in {*copies.values(), GENERAL}:
        for route in grafted.route([prompt.question for prompt in bench.tests[test]]):
            right += copies.get(route.name, GENERAL) == test
            total += 1
    return right / total


def _speed(bench: Bench, grafted: GraftedModel, copies: Mapping[str, str]) -> dict[str, float]:
    """Time one forward pass of a batch over all packs, beside the weights, against the same batch on the base."""
    names = [list(copies)[i % len(copies)] for i in range(_BATCH)]
    questions = [bench.tests[copies[name]][i].question for i, name in enumerate(names)]
    rendered = [render(bench.tokenizer, question, answer_next=True) for question in questions]
    ids, mask = pad(rendered, bench.tokenizer, grafted.model, "left")

    @torch.inference_mode()
    def seconds(around: AbstractContextManager[Any]) -> float:
        started = time.monotonic()
        with around:
            cast(Any, grafted.model)(input_ids=ids, attention_mask=mask)
            float(torch.zeros(1, device=ids.device))  # waits for a GPU
        return time.monotonic() - started

    wanted = [{name: 1.0} for name in names]
    rounds = [(seconds(nullcontext()), seconds(grafted.beside.rows(wanted))) for _ in range(_REPEATS + 1)]
    bare, mixed = (min(times) for times in zip(*rounds[1:], strict=True))  # the first round decodes
    return {"tokens/s": int(mask.sum()) / mixed, "share of the base's tokens/s": bare / mixed}
