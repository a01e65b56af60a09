"""What packing cannot be faster than on a machine: reading the files, and the range finders' products."""

import os
import time
from pathlib import Path

import torch

from graftllm.compression.matrix import matrix_shape
from graftllm.compression.outlook import directions_for
from graftllm.delta import Delta
from graftllm.tensors import LARGE

_PRODUCTS = 6  # with the whole matrix in a range finder: a sketch, two power iterations of two, the rest
_SHARE = 8  # the largest rank that is looked at is the smaller side divided by this


def bound(delta: Delta, rate: float, width: int, workers: int, device: str) -> dict[str, float]:
    """Return what reading both checkpoints and the range finders' products of a first look take at the least.

    Args:
        delta: of the pair.
        rate: bits a parameter that the pack takes.
        width: of the square matrix whose product with a range finder's sketch is timed.
        workers: threads of one core each that share the products.
        device: where they are.
    """
    shards = [path for part in (delta.base, delta.tuned) for path in part.files if path.suffix == ".safetensors"]
    size, disk = sum(path.stat().st_size for path in shards), _read_rate(shards[0])
    products = _product_rate(width, device)
    flops = sum(
        2 * _PRODUCTS * spec.parameters * (directions_for(matrix_shape(spec.shape), rate) or min(spec.shape) // _SHARE)
        for spec in delta.base.specs.values()
        if spec.parameters <= LARGE  # larger ones are coded by rows alone
    )
    return {
        "bytes_read": size,
        "disk_bytes_per_second": round(disk),
        "reading_seconds": round(size / disk, 1),
        "range_finder_flops": flops,
        "flops_per_second_and_core": round(products),
        "range_finder_seconds": round(flops / products / workers, 1),
    }


def _read_rate(path: Path) -> float:
    """Return bytes per second of reading a file that is not in the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        started, size = time.monotonic(), 0
        while found := len(os.read(descriptor, 1 << 24)):
            size += found
        return size / (time.monotonic() - started)
    finally:
        os.close(descriptor)


def _product_rate(width: int, device: str) -> float:
    """Return floating-point operations per second of a range finder's product, on a GPU or one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    matrix, sketch = (torch.randn(width, columns, device=device) for columns in (width, width // _SHARE))
    seconds = []
    for _ in range(4):
        started = time.monotonic()
        float((matrix @ sketch)[0, 0])  # waits for a GPU
        seconds.append(time.monotonic() - started)
    torch.set_num_threads(threads)
    return 2 * matrix.numel() * sketch.shape[1] / min(seconds)
