"""A second reader, written from docs/skillpack-format.md with nothing but safetensors and NumPy."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from graftllm.checkpoint import Checkpoint
from graftllm.delta import Delta
from graftllm.recipe import PackOptions
from graftllm.records import Prompt
from graftllm.skillpack import SkillPack, compress


def _unpack(data: bytes, count: int, width: int) -> list[int]:
    stream = int.from_bytes(data, "little")
    return [stream >> i * width & (1 << width) - 1 for i in range(count)]


def _packed_size(count: int, width: int) -> int:
    return -(-count * width // 8)


def _bfloat16(data: bytes) -> np.ndarray:
    return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)


def _integers(data: bytes, count: int) -> tuple[list[int], bytes]:
    """Section "Coded integers"; one block, as these tensors are small."""
    size, data = data[0], data[1:]
    frequencies, data = [int(f) for f in np.frombuffer(data[: 2 * size], "<u2")], data[2 * size :]
    words, data = int.from_bytes(data[:4], "little"), data[4:]
    stack, data = [int(word) for word in np.frombuffer(data[: 4 * words], "<u4")], data[4 * words :]
    starts = np.concatenate([[0], np.cumsum(frequencies)]) * 256
    state = 0
    while stack and state < 1 << 32:
        state = state << 32 | stack.pop()
    classes = []
    for _ in range(count):
        low = state & (1 << 24) - 1
        symbol = int(np.searchsorted(starts, low, side="right")) - 1
        state = (state >> 24) * frequencies[symbol] * 256 + low - int(starts[symbol])
        if state < 1 << 32 and stack:
            state = state << 32 | stack.pop()
        classes.append(symbol)
    assert (state, stack) == (0, [])
    values = list(classes)
    for number in range(8, size):
        width, here = number // 4 - 1, [i for i, symbol in enumerate(classes) if symbol == number]
        taken = _packed_size(len(here), width)
        for i, low in zip(here, _unpack(data[:taken], len(here), width), strict=True):
            values[i] = (4 + number % 4) << width | low
        data = data[taken:]
    return values, data


def _factor(data: bytes, length: int, bands: list, group_size: int) -> tuple[np.ndarray, bytes]:
    """Section "Factors": shape (rank, length)."""
    groups, rank = -(-length // group_size), sum(rows for _, rows in bands)
    scales, data = _bfloat16(data[: 2 * rank * groups]).reshape(rank, groups), data[2 * rank * groups :]
    rows: list[np.ndarray] = []
    for bits, count in bands:
        size = _packed_size(count * groups, bits)
        zeros, data = np.array(_unpack(data[:size], count * groups, bits)).reshape(count, groups), data[size:]
        size = _packed_size(count * length, bits)
        codes, data = np.array(_unpack(data[:size], count * length, bits)).reshape(count, length), data[size:]
        rows.append((codes - zeros.repeat(group_size, axis=1)[:, :length]).astype(np.float32))
    return np.concatenate(rows) * scales.repeat(group_size, axis=1)[:, :length], data


def _ordered(bfloat16: np.ndarray) -> np.ndarray:
    signed = bfloat16.view(np.int16).astype(np.int64)
    return np.where(signed < 0, signed ^ 0x7FFF, signed)


def _tuned(entry: dict, payload: bytes, base: np.ndarray) -> np.ndarray:
    """The tuned bfloat16 patterns (u2) of one parameter from the base's."""
    how, shape = entry["how"], entry["shape"]
    values = _bfloat16(base.tobytes()).reshape(shape)
    if how["operator"] == "unchanged":
        return base
    if how["operator"] == "exact":
        if how["coding"] == "raw":
            return np.frombuffer(payload, "<u2").reshape(shape)
        folded, rest = _integers(payload, base.size)
        assert not rest
        steps = np.array([value >> 1 ^ -(value & 1) for value in folded])
        places = (_ordered(base.reshape(-1)) + steps).astype(np.int16)
        return np.where(places < 0, places ^ 0x7FFF, places).astype(np.int16).view(np.uint16).reshape(shape)
    if how["operator"] == "sparse":
        row, payload = _factor(payload, how["count"], [[8, 1]], how["group_size"])
        gaps, payload = _integers(payload, how["count"])
        delta = np.zeros(base.size, np.float32)
        delta[np.cumsum(np.array(gaps) + 1) - 1] = row[0]
        delta = delta.reshape(shape)
    else:
        right, payload = _factor(payload, shape[1], how["bands"], how["group_size"])
        left, payload = _factor(payload, shape[0], how["bands"], how["group_size"])
        delta = left.T @ right
    assert not payload
    return (values + delta).astype(np.float32)


@pytest.mark.parametrize("strategy", ["paper", "exact", "auto"])
def test_the_page_is_enough_to_read_a_pack(
    delta: Delta, base: Checkpoint, prompts: list[Prompt], tmp_path: Path, strategy: str
) -> None:
    path = tmp_path / "pack.safetensors"
    compress(delta, PackOptions(strategy=strategy), calibration=prompts).save(path)
    pack = SkillPack.load(path)
    with safe_open(path, framework="np") as file:
        header = json.loads(file.metadata()["skillpack"])
        for name, entry in header["tensors"].items():
            payload = file.get_tensor(name).tobytes() if entry["nbytes"] else b""
            bits = base.tensor(name).view(torch.int16).numpy().view(np.uint16)
            found = _tuned(entry, payload, bits)
            restored = pack.restore(name, base.tensor(name))
            if found.dtype == np.uint16:
                assert np.array_equal(found, restored.view(torch.int16).numpy().view(np.uint16))
            else:
                expected = base.tensor(name).float() + pack.delta(name, base.tensor(name))
                assert np.allclose(found, expected.numpy(), rtol=1e-5, atol=1e-6)
