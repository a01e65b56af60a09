"""Seconds and peak memory to pack one Llama-3.1-8B-shaped layer, against the plain way, in one run.

    python benchmarks/pack_speed.py [--size large|small] [--device auto] [--dir runs/pack_speed] [--skip-plain]

`large`, the default, is the layer of that model; `small` is an eighth as wide, for a look in seconds.

The plain way is what research scripts do: all matrices of the delta in memory, a full SVD of each,
the rank cut at 90 % of the energy, factors rounded to the published bits, nothing written. The strategy `paper` keeps
the same energy at the same bits, and `auto` fills a file of the same size. Each way runs in
a process of its own, so that its peak memory is its own. The deltas are synthetic: singular values
fall like a power of their index, as those of fine-tunes do, and some noise lies under them. The error is
||decoded - delta|| / ||delta|| over the whole layer. The bound is what reading the files and the range finders'
products of `auto` take at the rates that are measured here.
"""

import argparse
import json
import math
import multiprocessing
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from bounds import bound

from graftllm.checkpoint import Checkpoint
from graftllm.compression.crew import default_workers
from graftllm.compression.lowrank import rank_for_energy, whole_bands
from graftllm.compression.metric import frobenius
from graftllm.compression.quantization import factor_nbytes, quantize_factor
from graftllm.delta import Delta
from graftllm.devices import resolve_device
from graftllm.metering import peak_memory_bytes
from graftllm.packer import compress
from graftllm.packing_options import PackOptions
from graftllm.tensors import TensorSpec, raw_bytes, write_safetensors

_LAYER = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
SIZES = {
    "small": {name: (d_out // 8, d_in // 8) for name, (d_out, d_in) in _LAYER.items()},
    "large": _LAYER,
}
PAPER = PackOptions(strategy="paper", energy=0.9)
_WIDTH = "self_attn.q_proj"


def write_layer(directory: Path, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Write base and tuned checkpoints of one layer in bfloat16."""
    draw = torch.Generator().manual_seed(0)
    for part in ("base", "tuned"):
        (directory / part).mkdir(parents=True, exist_ok=True)
        (directory / part / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    values: dict[str, dict[str, torch.Tensor]] = {"base": {}, "tuned": {}}
    for name, (d_out, d_in) in shapes.items():
        base = 0.02 * torch.randn(d_out, d_in, generator=draw)
        rank = min(512, d_out, d_in)
        u = torch.linalg.qr(torch.randn(d_out, rank, generator=draw)).Q
        v = torch.linalg.qr(torch.randn(d_in, rank, generator=draw)).Q
        change = u * torch.arange(1, rank + 1).pow(-0.8) @ v.T + 1e-5 * torch.randn(d_out, d_in, generator=draw)
        parameter = f"model.layers.0.{name}.weight"
        values["base"][parameter] = base.bfloat16()
        values["tuned"][parameter] = (base.bfloat16().float() + change).bfloat16()
    for part, tensors in values.items():
        layout = {name: TensorSpec("BF16", tuple(value.shape)) for name, value in tensors.items()}
        data = {name: raw_bytes(value) for name, value in tensors.items()}
        write_safetensors(directory / part / "model.safetensors", layout, data.__getitem__, metadata={"format": "pt"})


def pack(directory: Path, device: str, options: PackOptions) -> dict[str, float]:
    """Pack the layer with the library, from files to a file."""
    started = time.monotonic()
    delta = open_pair(directory)
    made = compress(delta, options, device=device)
    made.save(directory / "layer.safetensors")
    found = {"seconds": time.monotonic() - started, "peak_memory_bytes": peak_memory_bytes()}
    norms = {name: frobenius(delta[name]) for name in delta}
    missed = math.hypot(*(entry.error * norms[name] for name, entry in made.header.tensors.items()))
    return found | {
        "bytes": (directory / "layer.safetensors").stat().st_size,
        "error": missed / math.hypot(*norms.values()),
    }


def open_pair(directory: Path) -> Delta:
    """Return the delta of the layer."""
    return Delta(Checkpoint.open(directory / "base"), Checkpoint.open(directory / "tuned"))


def plain(directory: Path, device: str) -> dict[str, float]:
    """Take a full SVD of each matrix, all in memory, and round the factors to the same bits."""
    started = time.monotonic()
    delta = open_pair(directory)
    changes = {name: delta[name].to(device) for name in delta}
    kept = {}
    for name, change in changes.items():
        u, s, vh = torch.linalg.svd(change, full_matrices=False)
        rank = rank_for_energy(s.cpu(), PAPER.energy)
        bands = whole_bands(rank, PAPER.bit_bands)
        right = quantize_factor(vh[:rank], bands, PAPER.group_size)
        left = quantize_factor((u[:, :rank] * s[:rank]).T, bands, PAPER.group_size)
        kept[name] = (left, right, bands)
    found = {"seconds": time.monotonic() - started, "peak_memory_bytes": peak_memory_bytes(), "bytes": 0}
    missed = []
    for name, (left, right, bands) in kept.items():
        found["bytes"] += sum(factor_nbytes(side.codes.shape[1], bands, PAPER.group_size) for side in (left, right))
        missed.append(frobenius(left.values().T @ right.values() - changes[name]))
    return found | {"error": math.hypot(*missed) / math.hypot(*map(frobenius, changes.values()))}


def _apart(way: Callable[..., dict[str, float]], *given: Any) -> dict[str, float]:
    """Run one way in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(way, *given).result()


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="large")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dir", type=Path, default=Path("runs/pack_speed"))
    parser.add_argument("--skip-plain", action="store_true", help="measure the library alone")
    given = parser.parse_args()
    home, device = given.dir / given.size, str(resolve_device(given.device))
    if not (home / "tuned" / "model.safetensors").exists():
        write_layer(home, SIZES[given.size])
    found: dict[str, Any] = {"size": given.size, "device": device, "threads": torch.get_num_threads()}
    found["paper"] = _apart(pack, home, device, PAPER)
    found["auto"] = _apart(pack, home, device, PackOptions(budget=str(int(found["paper"]["bytes"]))))
    if not given.skip_plain:
        found["plain"] = _apart(plain, home, device)
        for way in ("paper", "auto"):
            ratios = {figure: found["plain"][figure] / found[way][figure] for figure in found["plain"]}
            found[f"plain / {way}"] = ratios
    delta = open_pair(home)
    rate = 8 * found["auto"]["bytes"] / delta.tuned.parameters
    found["bound"] = bound(delta, rate, SIZES[given.size][_WIDTH][1], default_workers(delta, device), device)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
