"""What packs cost while a model runs: tokens a second of mixed batches, memory, and switching merged packs.

    python benchmarks/plugging.py [--size small] [--device auto] [--parts ...] [--plot docs/images/plugging.png]
    OMP_NUM_THREADS=1 python benchmarks/plugging.py --size large --device cpu --parts switching

Mixed batches: every row of a batch has one of 1, 2, 8, 32 or 64 packs of rank 16 on all linear layers. The same
factors run as PEFT's adapters with `adapter_names=`, and the bare base runs the same batches; all in one process,
in turns, and the fastest of the runs counts; on one thread of a CPU by the time that the
processor spends on this process, so that others disturb less. Eight different packs stand under sixty-four names.

Steps: the server's batch of 1, 8 or 32 rows writes a token each, on a Llama of width 256 and 4 layers, with packs that
change every parameter, norms and vocabulary too: all rows have one pack, or eight by turns. One step in five is faster
than what is printed.

Switching: a merged pack takes the place of another. The floor is reading the pack's bytes and copying the
touched weights once, to new memory; `copy` is that copy to memory at hand. `cold` decodes the pack from its file, as a
shelf has room for one of two; `hot` takes it from a shelf that has both, unless memory has no room for that. `in
place` has a shelf without room, and a model that is not mapped from its files: weights are written over, and the files
read again.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from graftllm.checkpoint import Checkpoint
from graftllm.compression.encoded import payload_digest
from graftllm.compression.factored import Factored, encode_factored
from graftllm.compression.metric import Metric
from graftllm.delta import Delta
from graftllm.devices import resolve_device, room_bytes
from graftllm.fusion.beside import Beside
from graftllm.fusion.branches import decode_branches
from graftllm.fusion.shelf import Shelf
from graftllm.fusion.switching import Switch
from graftllm.metering import peak_memory_bytes
from graftllm.packer import compress
from graftllm.packing_options import PackOptions
from graftllm.serving.batch import Batch
from graftllm.skillpack import SkillPack

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.models import perturb, save_llama  # the tokenizer and the model that tests use

PARTS = ("batches", "steps", "switching")
PACKS = (1, 2, 8, 32, 64)
DIFFERENT = 8
RANK = 16


@dataclass(frozen=True)
class Size:
    """Shapes of the models, and how much is run."""

    width: int
    layers: int
    vocabulary: int
    rows: int
    prompt: int
    tokens: int
    repeats: int
    switched_width: int
    switched_layers: int


SIZES = {
    "small": Size(384, 3, 1024, 64, 16, 8, 4, 2048, 1),
    "large": Size(4096, 8, 32768, 64, 128, 64, 5, 4096, 4),  # layers of 8 B parameters; for a GPU
}


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--layers", type=int, help="of the model that is switched; 32 of the large one take 17 GB")
    parser.add_argument("--plot", type=Path, help="picture of the mixed batches to draw")
    given = parser.parse_args()
    size, device = SIZES[given.size], resolve_device(given.device)
    size = replace(size, switched_layers=given.layers or size.switched_layers)
    with tempfile.TemporaryDirectory() as home:
        found: dict[str, Any] = {"size": given.size, "device": str(device), "threads": torch.get_num_threads()}
        if "batches" in given.parts:
            found["batches"] = batches(size, Path(home) / "batches", device)
        if "steps" in given.parts:
            found["steps"] = steps(Path(home) / "steps", device)
        if "switching" in given.parts:
            found["switching"] = switching(size, Path(home) / "switching", device)
    print(json.dumps(found, indent=1))
    if given.plot and "batches" in found:
        draw(found["batches"]["rows"], given.plot)


def batches(size: Size, home: Path, device: torch.device) -> dict[str, Any]:
    """Compare mixed batches beside the weights with the bare base and with PEFT's."""
    config = _config(size.width, size.layers, size.vocabulary)
    base, files = _models(config, home, DIFFERENT)
    packs = {f"p{i:02}": SkillPack.load(files[i % DIFFERENT]) for i in range(max(PACKS))}
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model: Any = _live(base, dtype, device)
    rival = _live(base, dtype, device)
    shelf = Shelf(1 << 62)
    beside = Beside(model, packs, shelf)
    adapted, adapter_bytes = _with_adapters(rival, model, packs)
    ids = torch.randint(3, size.vocabulary, (size.rows, size.prompt), device=device)
    settings: dict[str, Any] = {
        "max_new_tokens": size.tokens, "min_new_tokens": size.tokens, "do_sample": False, "pad_token_id": 0,
    }  # fmt: skip
    _same_answers(beside, adapted, ids, list(packs))
    rows = []
    for count in PACKS:
        names = [f"p{i % count:02}" for i in range(size.rows)]

        def ours(names: list[str] = names) -> Any:
            with beside.rows(names):
                return model.generate(ids, **settings)

        seconds = _in_turns(
            {
                "base": lambda: model.generate(ids, **settings),
                "beside": ours,
                "PEFT": lambda names=names: adapted.generate(input_ids=ids, adapter_names=names, **settings),
            },
            size.repeats,
            device,
        )
        speed = {way: size.rows * size.tokens / time for way, time in seconds.items()}
        rows.append(
            {
                "packs": count,
                **{f"{way}, tokens/s": round(value, 1) for way, value in speed.items()},
                "beside / base": round(speed["beside"] / speed["base"], 3),
                "beside / PEFT": round(speed["beside"] / speed["PEFT"], 2),
            }
        )
    return {
        "model_bytes": sum(value.nbytes for value in model.parameters()),
        "bytes of a further pack": {
            "file": files[0].stat().st_size,
            "decoded, on the shelf": shelf.nbytes // len(packs),
            "in a batch": beside.nbytes // len(packs),
            "PEFT adapter": adapter_bytes // len(packs),
        },
        "rows": rows,
    }


@torch.inference_mode()
def steps(home: Path, device: torch.device) -> list[dict[str, Any]]:
    """Compare steps of the server's batch with packs on every parameter and without packs."""
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8}
    base = Checkpoint.open(save_llama(home / "base", dtype=torch.float32, num_key_value_heads=4, **shape))
    packs = {}
    for i in range(DIFFERENT):
        tuned = Checkpoint.open(perturb(base.path, home / f"{i}", seed=i + 1, scale=0.1))
        packs[f"p{i}"] = compress(Delta(base, tuned), PackOptions(servable=RANK), workers=1)
    model: Any = _live(base.path, torch.float32, device)
    beside = Beside(model, packs)
    rows = []
    for count in (1, 8, 32):
        ways = {"base": [None] * count, "one pack": ["p0"] * count, "eight packs": [f"p{i % 8}" for i in range(count)]}
        milliseconds: dict[str, list[float]] = {way: [] for way in ways}
        for run in range(5):
            for way, wanted in ways.items():
                batch = Batch(model)
                with beside.rows(wanted):
                    batch.read([[5 + i] * 14 for i in range(count)])
                for _ in range(40):
                    started = _clock(device)()
                    with beside.rows(wanted):
                        batch.step([7] * count)[0, 0].item()  # waits for a GPU
                    if run:
                        milliseconds[way].append(1000 * (_clock(device)() - started))
        fast = {way: sorted(found)[len(found) // 5] for way, found in milliseconds.items()}
        rows.append(
            {"rows": count}
            | {f"{way}, ms": round(value, 2) for way, value in fast.items()}
            | {f"{way} / base, speed": round(fast["base"] / fast[way], 2) for way in ways if way != "base"}
        )
    return rows


def switching(size: Size, home: Path, device: torch.device) -> dict[str, Any]:
    """Compare switching a merged pack with reading its bytes and copying the touched weights once."""
    config = _config(size.switched_width, size.switched_layers, 256)
    base, files = _models(config, home, 2)
    dtype = torch.bfloat16
    model = _live(base, dtype, device)
    packs = {file.name: SkillPack.load(file) for file in files}
    touched = [value.data for name, value in model.named_parameters() if "proj" in name]
    nbytes, repeats = sum(value.nbytes for value in touched), 2 * size.repeats + 1

    def floor() -> None:
        files[0].read_bytes()
        for value in touched:
            value.clone()

    seconds = _in_turns({"floor": floor, "copy": _copying(touched)}, repeats, device)
    by_clock = {"floor": _by_clock(floor)}
    limits = {"cold": nbytes, "hot": 1 << 62, "in place": 0}
    if 2 * nbytes > room_bytes(device):
        del limits["hot"]
    for name, limit in limits.items():  # one after the other: what one frees is its own
        if name == "in place":
            for value in model.parameters():
                value.data = value.data.clone()
        switch, turns = Switch(model, packs, Shelf(limit)), itertools.cycle(packs)
        way = partial(_to_next, switch, turns)
        for _ in packs:
            way()
        seconds |= _in_turns({name: way}, repeats, device)
        by_clock[name] = _by_clock(way)
        switch.to(())
        del switch, way
    return {
        "touched_bytes": nbytes,
        "pack_bytes": files[0].stat().st_size,
        "peak_memory_bytes": peak_memory_bytes(),  # mapped files included
        **{f"{way}, ms": round(1000 * value, 2) for way, value in seconds.items()},
        **{f"{way}, ms by the clock": round(1000 * value, 2) for way, value in by_clock.items()},
        **{f"{way} / floor": round(seconds[way] / seconds["floor"], 4) for way in limits},
        **{f"{way} / copy": round(seconds[way] / seconds["copy"], 2) for way in limits},
    }


def _to_next(switch: Switch, turns: Iterator[str]) -> None:
    switch.to(((next(turns), 1.0),))


def _copying(values: list[torch.Tensor]) -> Callable[[], None]:
    """Return what copies values, one after the other, to memory that is at hand."""
    place = torch.empty(max(value.numel() for value in values), dtype=values[0].dtype, device=values[0].device)

    def copy() -> None:
        for value in values:
            place[: value.numel()].view_as(value).copy_(value)

    return copy


def draw(rows: list[dict[str, float]], file: Path) -> None:
    """Draw tokens a second over the number of packs, as shares of the bare base's."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    counts = [row["packs"] for row in rows]
    for way, color in (("beside", "#1b6ca8"), ("PEFT", "#c05a2e")):
        shares = [row[f"{way}, tokens/s"] / row["base, tokens/s"] for row in rows]
        axes.plot(counts, shares, marker="o", color=color, label={"beside": "packs beside the weights"}.get(way, way))
    axes.axhline(1, color="gray", linewidth=1, label="bare base")
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(int(count)) for count in counts])
    axes.set(xlabel="packs in a batch of 64 rows", ylabel="tokens/s, base = 1", ylim=(0, 1.1))
    axes.legend(frameon=False, loc="lower left")
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _config(width: int, layers: int, vocabulary: int) -> LlamaConfig:
    """Return a Llama of the proportions of Llama-3.1-8B."""
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=width * 7 // 2, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=max(1, width // 256), tie_word_embeddings=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.02,
    )  # fmt: skip


def _models(config: LlamaConfig, home: Path, count: int) -> tuple[Path, list[Path]]:
    """Write a base and packs of it, as `--servable 16` stores deltas of rank 16 in every linear layer."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)  # no number takes more memory than it needs
    LlamaForCausalLM(config).save_pretrained(home / "base")
    torch.set_default_dtype(torch.float32)
    base = Checkpoint.open(home / "base")
    empty = compress(Delta(base, base), PackOptions(strategy="exact"), workers=1).header
    files = []
    for seed in range(count):
        draw = torch.Generator().manual_seed(seed)
        entries, payloads = dict(empty.tensors), {}
        for name, spec in base.specs.items():
            if "proj" in name:
                left, right = (torch.linalg.qr(torch.randn(side, RANK, generator=draw)).Q for side in spec.shape)
                strengths = torch.linspace(2, 0.5, RANK) * 0.02 * spec.shape[1] ** 0.5
                step = float(strengths[-1]) / spec.shape[1] ** 0.5 / 4
                made = encode_factored(left * strengths @ right.T, step, Metric(), (strengths, right.T))
                operator, payloads[name] = cast(tuple[Factored, np.ndarray], made)
                found = {
                    "how": operator,
                    "nbytes": payloads[name].nbytes,
                    "payload_digest": payload_digest(payloads[name]),
                }
                entries[name] = entries[name].model_copy(update=found)
        files.append(home / f"{seed}.safetensors")
        header = empty.model_copy(update={"tensors": entries})
        SkillPack(header, "a new pack", lambda _, name, stored=payloads: stored[name]).save(files[-1])
    return home / "base", files


def _live(base: Path, dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    return cast(Any, LlamaForCausalLM.from_pretrained(base, dtype=dtype)).to(device).eval()


def _with_adapters(rival: nn.Module, model: nn.Module, packs: dict[str, SkillPack]) -> tuple[Any, int]:
    """Return a PEFT model with the packs' own factors as adapters, and how many bytes these take."""
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", init_lora_weights=False)
    adapted: Any = None
    for name, pack in packs.items():
        if adapted is None:
            adapted = get_peft_model(cast(Any, rival), lora, adapter_name=name)
        else:
            adapted.add_adapter(name, lora)
        for key, branch in decode_branches(model, pack, check=False).modules.items():
            layer = adapted.get_submodule(f"base_model.model.{key}")
            left, right = cast(tuple[torch.Tensor, torch.Tensor], branch.weight)
            for side, value in ((layer.lora_A[name], right), (layer.lora_B[name], left)):
                side.weight.data.zero_()
                side.weight.data[tuple(slice(length) for length in value.shape)] = value.to(side.weight.device)
    adapters = [value for name, value in adapted.named_parameters() if "lora_" in name]
    return adapted.eval(), sum(value.nbytes for value in adapters)


@torch.inference_mode()
def _same_answers(beside: Beside, adapted: Any, ids: torch.Tensor, names: list[str]) -> None:
    """Stop when the two ways do not compute the same."""
    rows = [names[i % len(names)] for i in range(len(ids))]
    with beside.rows(rows):
        ours = beside.model(input_ids=ids).logits
    theirs = adapted(input_ids=ids, adapter_names=rows).logits
    if float((ours - theirs).norm() / theirs.norm()) > 0.02:
        raise SystemExit("the two ways give different logits; nothing is compared")


def _in_turns(ways: dict[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, float]:
    """Return the fewest seconds that each way takes, after one run that is not counted."""
    clock = _clock(device)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for run in range(repeats + 1):
        for name, way in ways.items():
            started = clock()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if run:
                seconds[name].append(clock() - started)
    return {name: min(found) for name, found in seconds.items()}


def _by_clock(way: Callable[[], Any]) -> float:
    """Return the fewest seconds of three that pass, waiting for disks and other processes included."""
    found = []
    for _ in range(3):
        started = time.perf_counter()
        way()
        found.append(time.perf_counter() - started)
    return min(found)


def _clock(device: torch.device) -> Callable[[], float]:
    return time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


if __name__ == "__main__":
    main()
