"""Seconds and peak memory to pack and to apply a Llama-3.1-8B-shaped model, beside what the machine allows.

    python benchmarks/scale.py [--size large|small] [--layers 2] [--vocabulary 128256] [--workers N] [--device auto]
        [--dir runs/scale]

`large`, the default, has that model's widths and vocabulary; `small` has an eighth of both, for a look in seconds.
Base and tuned checkpoints are synthetic, in bfloat16, a shard a layer; embedding and head are of real size,
and so are the matrices of each layer. They are drawn once: all layers hold the values of the first. Some
rows of the vocabulary moved, as training moves those it reads. Packing is uncalibrated, in the strategy
`auto`. Tensors stream by, so peak memory should not grow with the layers; two depths show whether that
is so. The real model has 32: 32 GB for the pair, and half as much again for what is applied.

Each step runs in a process of its own, whose memory at its largest is told (proportional set size, mapped files
included).

The bound is the time to read both checkpoints from disk, and the time that the range finders' products take at
the rate measured for such a product on the device (one core of a CPU), divided by the workers.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from bounds import bound
from pack_speed import SIZES

from graftllm.checkpoint import INDEX, Checkpoint
from graftllm.compression.crew import default_workers
from graftllm.delta import Delta
from graftllm.devices import resolve_device
from graftllm.fusion.applying import apply_packs
from graftllm.packer import compress_to
from graftllm.packing_options import PackOptions
from graftllm.skillpack import SkillPack
from graftllm.tensors import LARGE, TensorSpec, raw_bytes, write_safetensors

VOCABULARIES = {"small": 16032, "large": 128256}
_ROWS = 4096  # that are drawn at a time
_SAMPLING_S = 0.25
_MADE = ("base", "tuned", "pack.safetensors", ".pack.safetensors.packing", "applied")


def write_pair(directory: Path, shapes: Mapping[str, tuple[int, int]], layers: int, vocabulary: int) -> None:
    """Write a base and a tuned checkpoint, shard by shard."""
    config = {"architectures": ["LlamaForCausalLM"], "vocab_size": vocabulary, "torch_dtype": "bfloat16"}
    words = {"embed_tokens": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}
    for part in ("base", "tuned"):
        home, shards = directory / part, {}
        home.mkdir(parents=True, exist_ok=True)
        (home / "config.json").write_text(json.dumps(config))
        drawn = {f"{name}.weight": _values(name, shape, part == "tuned") for name, shape in shapes.items()}
        for i in range(layers):
            tensors = {f"model.layers.{i}.{name}": value for name, value in drawn.items()}
            shards |= _write_shard(home, f"model-{i:05}.safetensors", tensors)
        del drawn
        for shard, name in words.items():
            value = _values(name, (vocabulary, _width(shapes)), part == "tuned")
            shards |= _write_shard(home, f"model-{shard}.safetensors", {name: value})
        (home / INDEX).write_text(json.dumps({"weight_map": shards}))


def _width(shapes: Mapping[str, tuple[int, int]]) -> int:
    return shapes["self_attn.q_proj"][1]


def _write_shard(home: Path, shard: str, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Write tensors in bfloat16; return which shard each is in."""
    layout = {name: TensorSpec("BF16", tuple(value.shape)) for name, value in tensors.items()}
    write_safetensors(home / shard, layout, lambda name: raw_bytes(tensors[name]), metadata={"format": "pt"})
    return dict.fromkeys(tensors, shard)


def _values(name: str, shape: tuple[int, int], tuned: bool) -> torch.Tensor:
    """Return a matrix; a tuned one differs by directions of falling strength and by noise."""
    rows, columns = shape
    number = int.from_bytes(name.encode()[-7:], "little")
    steer = torch.Generator().manual_seed(number)
    strengths = torch.arange(1, 65).pow(-0.8)
    left = torch.randn(rows, len(strengths), generator=steer) * strengths / rows**0.5
    right = torch.randn(len(strengths), columns, generator=steer) / columns**0.5
    read = torch.rand(rows, 1, generator=steer) < (0.2 if rows * columns > LARGE else 1.0)
    values = torch.empty(shape, dtype=torch.bfloat16)
    for start in range(0, rows, _ROWS):
        draw = torch.Generator().manual_seed(number + start)
        some = slice(start, min(start + _ROWS, rows))
        part = (0.02 * torch.randn(some.stop - start, columns, generator=draw)).bfloat16().float()
        if tuned:
            part += read[some] * (left[some] @ right + 1e-5 * torch.randn(part.shape, generator=draw))
        values[some] = part
    return values


def pack(directory: Path, workers: int, device: str) -> None:
    """Pack the pair, from files to a file."""
    delta = Delta(Checkpoint.open(directory / "base"), Checkpoint.open(directory / "tuned"))
    compress_to(directory / "pack.safetensors", delta, PackOptions(), device=device, workers=workers)


def apply(directory: Path) -> None:
    """Write base + pack."""
    opened = SkillPack.load(directory / "pack.safetensors")
    apply_packs(Checkpoint.open(directory / "base"), [(opened, 1.0)], directory / "applied")


def measured(step: str, directory: Path, workers: int, device: str) -> dict[str, float]:
    """Run a step in a process of its own; return its seconds, those of the cores, and its peak memory."""
    started, used, peak = time.monotonic(), _core_seconds(), 0
    command = [sys.executable, __file__, "--step", step, "--dir", str(directory), "--workers", str(workers)]
    command += ["--device", device]
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            peak = max(peak, _memory_bytes(process.pid, peak))
            with suppress(subprocess.TimeoutExpired):
                process.wait(_SAMPLING_S)
    if process.returncode:
        raise SystemExit(f"{step}: ended with {process.returncode}")
    return {
        "seconds": round(time.monotonic() - started, 1),
        "core_seconds": round(_core_seconds() - used, 1),
        "peak_memory_bytes": peak,
    }


def _core_seconds() -> float:
    """Return the seconds that processes which have ended had of all cores."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _memory_bytes(pid: int, least: int) -> int:
    """Return the memory of a process; 0 where that is surely not above `least`."""
    try:
        process = psutil.Process(pid)
        return process.memory_full_info().pss if process.memory_info().rss > least else 0  # the latter is quick
    except psutil.Error:  # it has just ended
        return 0


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2, help="32 in the real model")
    parser.add_argument("--size", choices=list(SIZES), default="large", help="of each layer and of the vocabulary")
    parser.add_argument("--vocabulary", type=int, help="instead of the size's")
    parser.add_argument("--device", default="auto", help="where it is packed")
    parser.add_argument("--workers", type=int, default=0, help="threads that pack  [default: what the library takes]")
    parser.add_argument(
        "--dir", type=Path, default=Path("runs/scale"), help="scratch; what is made in it goes at the end"
    )
    parser.add_argument("--step", choices=["pack", "apply"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        return pack(given.dir, given.workers, given.device) if given.step == "pack" else apply(given.dir)
    shapes, device = SIZES[given.size], str(resolve_device(given.device))
    write_pair(given.dir, shapes, given.layers, given.vocabulary or VOCABULARIES[given.size])
    try:
        delta = Delta(Checkpoint.open(given.dir / "base"), Checkpoint.open(given.dir / "tuned"))
        workers = given.workers or default_workers(delta, device)
        found: dict[str, object] = {"size": given.size, "device": device, "layers": given.layers}
        found |= {"parameters": delta.tuned.parameters, "workers": workers}
        found["pack"] = measured("pack", given.dir, workers, device)
        found["file_bytes"] = (given.dir / "pack.safetensors").stat().st_size
        found["apply"] = measured("apply", given.dir, workers, device)
        rate = 8 * found["file_bytes"] / delta.tuned.parameters
        found["bound"] = bound(delta, rate, _width(shapes), workers, device)
    finally:
        for made in (given.dir / name for name in _MADE):
            shutil.rmtree(made) if made.is_dir() else made.unlink(missing_ok=True)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
