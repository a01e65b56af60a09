"""Packs from strangers, changed in every way that keeps their digests true: each is a PackError or a tensor."""

import base64
import hashlib
import json
import random
import resource
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graftllm.compression.elementwise import encode_elementwise
from graftllm.compression.encoded import Operator, Refinement, Unchanged
from graftllm.compression.exact import Exact, encode_exact
from graftllm.compression.factored import encode_factored, encode_hybrid, weighted_svd
from graftllm.compression.lowrank import encode_lowrank, truncated_svd
from graftllm.compression.metric import Metric
from graftllm.compression.prediction import predicted
from graftllm.compression.pruning import encode_sparse
from graftllm.errors import PackError
from graftllm.header import BaseInfo, Card, Header, TensorEntry
from graftllm.packing_options import PackOptions
from graftllm.skillpack import SkillPack
from graftllm.tensors import DTYPE_NAMES, digest, raw_bytes

KINDS = (
    *("unchanged", "raw", "difference", "predicted", "predicted float", "sparse", "lowrank"),
    *("elementwise", "convolution", "factored", "hybrid", "transposed", "product", "layered"),
)


_MOST = 256 << 20  # bytes that a test may take beyond what the process has; a tensor here has a few hundred


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """Let no damaged pack take much memory: beyond the limit it would be an error that is no PackError."""
    pages = Path("/proc/self/statm")
    if not pages.exists():
        yield  # not Linux
        return
    _samples()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    now = int(pages.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + _MOST, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_the_limit_on_memory_holds() -> None:
    with pytest.raises((MemoryError, RuntimeError)):
        torch.ones(2 * _MOST, dtype=torch.uint8)


@dataclass(frozen=True)
class Sample:
    """A tensor as it is stored, and the tuned value; with `lossy`, operator and payload are of an exact layer on it."""

    how: Operator
    payload: bytes
    base: torch.Tensor
    tuned: torch.Tensor
    lossy: tuple[Operator, bytes] | None = None


@cache
def _samples() -> dict[str, Sample]:
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    base, change = random(6, 8).bfloat16(), 0.1 * (random(6, 8) + 3 * random(6, 1) * random(8))
    tuned, infinite = (base.float() + change).bfloat16(), base.clone()
    infinite[0, 0] = float("inf")
    inputs = random(20, 8) * torch.logspace(-1, 1, 8)
    metric, matrix = Metric(right=(inputs.T @ inputs).double()), change.double()
    directions, few = (weighted_svd(matrix, metric, rank)[1:] for rank in (6, 2))
    by_entry = encode_elementwise(lambda start, stop: matrix[start:stop], (6, 8), 0.3, metric)
    product, both = (
        encode_factored(matrix, 0.1, metric, directions),
        encode_hybrid(matrix, 0.3, metric, few),
    )
    assert product is not None
    assert both is not None
    on_its_side = both[0].model_copy(update={"transposed": True})
    exact, rest = encode_exact(predicted(*product, base), tuned)
    over = exact.model_copy(update={"product": product[0], "split": len(product[1])})
    found = {
        "unchanged": ((Unchanged(), np.empty(0, np.uint8)), base),
        "raw": ((Exact(coding="raw"), raw_bytes(tuned)), base),
        "difference": (encode_exact(infinite, infinite * 1.01), infinite),
        "predicted": (encode_exact(base, tuned), base),
        "predicted float": (encode_exact(base.float(), base.float() + change), base.float()),
        "sparse": (encode_sparse(change, 0.5, 8), base),
        "lowrank": (encode_lowrank(truncated_svd(change, 3), ((8, 0.4), (2, 0.6)), 4, None), base),
        "elementwise": (by_entry, base),
        "convolution": (by_entry, base.reshape(2, 3, 2, 4)),
        "factored": (product, base),
        "hybrid": (both, base),
        "transposed": ((on_its_side, both[1]), base.T.contiguous()),
        "product": ((over, np.concatenate([product[1], rest])), base),
        "layered": (encode_exact(predicted(*both, base), tuned), base),
    }
    codings = [pair[0][0].coding for pair in (found["difference"], found["predicted"], found["predicted float"])]
    assert codings == ["difference", "predicted", "predicted"]
    of = {"difference": infinite * 1.01, "predicted float": base.float() + change}
    samples = {
        name: Sample(how, payload.tobytes(), value, of.get(name, tuned))
        for name, ((how, payload), value) in found.items()
    }
    return samples | {"layered": replace(samples["layered"], lossy=(both[0], both[1].tobytes()))}


def _tiny_pack(samples: dict[str, Sample]) -> SkillPack:
    stored: dict[str, dict[str, bytes]] = {"payloads": {}, "exact_layers": {}}
    payloads, tensors = stored["payloads"], {}
    for name, sample in samples.items():
        how, payloads[name], on_top = sample.how, sample.payload, None
        if sample.lossy is not None:
            assert isinstance(how, Exact)
            on_top = Refinement(
                weight=1,
                how=how,
                nbytes=len(sample.payload),
                payload_digest=_digest(sample.payload),
            )
            stored["exact_layers"][name] = sample.payload
            how, payloads[name] = sample.lossy
        tensors[name] = TensorEntry(
            role="other",
            dtype=DTYPE_NAMES[sample.base.dtype],
            shape=tuple(sample.base.shape),
            base_digest=digest(sample.base),
            how=how,
            nbytes=len(payloads[name]),
            payload_digest=_digest(payloads[name]),
            error=0.1,
            refinement=on_top,
            tuned_digest=digest(sample.tuned) if isinstance(sample.how, Exact) else None,
        )
    about = BaseInfo(name="base", architecture="X", fingerprint="0" * 64, parameters=1)
    header = Header(
        card=Card(), base=about, tuned_bytes=1, options=PackOptions(), calibration_tokens=0, tensors=tensors
    )
    return SkillPack(header, "tiny", lambda run, name: np.frombuffer(stored[run][name], np.uint8))


def _digest(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()[:16]


def _refused(pack: SkillPack, name: str) -> bool:
    """Whether a tensor is refused as it must be; else it has the right shape and dtype. Nothing else may happen."""
    base, entry = _samples()[name].base, pack.header.tensors[name]
    try:
        delta, restored = pack.delta(name, base), pack.restore(name, base)
    except PackError:
        return True
    assert delta.dtype == torch.float32
    assert tuple(delta.shape) == tuple(restored.shape) == entry.tuned_spec.shape
    assert DTYPE_NAMES[restored.dtype] == entry.tuned_spec.dtype
    return False


def _mutated(payload: bytes, draw: random.Random) -> bytes:
    data = bytearray(payload)
    place = draw.randrange(len(data) + 1)
    way = draw.randrange(8)
    if way == 0:
        del data[place:]
    elif way == 1:
        data[place:place] = draw.randbytes(draw.choice((1, 2, 4, 40)))
    elif way == 2:
        data[place : place + 4] = draw.choice((b"\0" * 4, b"\xff" * 4, (1 << 31).to_bytes(4, "little")))
    elif way == 3:
        data[place:] = draw.randbytes(len(data) - place)
    elif way == 4:
        data += data[place:]
    else:  # most often a bit or a few, mostly in front, where tables and lengths are
        for _ in range(draw.choice((1, 1, 2, 5))):
            if data:
                data[int(len(data) * draw.random() ** 2)] ^= 1 << draw.randrange(8)
    return bytes(data)


@pytest.mark.parametrize("name", KINDS)
def test_600_mutated_payloads_are_tensors_or_are_refused(name: str) -> None:
    assert not _refused(_tiny_pack(_samples()), name)
    draw, refused = random.Random(name), 0
    for _ in range(600):
        sample = replace(_samples()[name], payload=_mutated(_samples()[name].payload, draw))
        refused += _refused(_tiny_pack({name: sample}), name)
    assert refused > 50


ODD = (
    *(None, True, "", "x", "\ud800", "F4", "BF16", "F32", "I64", [], [[]], {}, {"operator": "factored"}, [3], [[8, 1]]),
    *(-1, 0, 1, 2, 6, 7, 8, 48, 255, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 64, 10**40),
    *(0.5, -0.0, 1e-320, 1e-46, 1e39, 1e300, float("nan"), float("inf"), float("-inf")),
)


def _oddly(tree: dict, draw: random.Random) -> tuple:
    """Change a random leaf or branch of a JSON tree; return the keys on the way to it."""
    way: list = []
    here: Any = tree
    while True:
        key = draw.choice(list(here)) if isinstance(here, dict) else draw.randrange(len(here))
        way.append(key)
        if isinstance(here[key], dict | list) and here[key] and draw.random() < 0.95:
            here = here[key]
            continue
        change = draw.randrange(10)
        if change == 0:
            del here[key]
        elif change == 1 and isinstance(here, dict):
            here[draw.choice(("surprise", "transposed", "tuned_shape", "split", "tensors"))] = here.pop(key)
        else:
            here[key] = draw.choice(ODD)
        return tuple(way)


def _split(data: bytes) -> tuple[dict, bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def _joined(outer: dict | str, rest: bytes) -> bytes:
    encoded = (outer if isinstance(outer, str) else json.dumps(outer)).encode()
    return len(encoded).to_bytes(8, "little") + encoded + rest


def _header_text(outer: dict) -> str:
    return zlib.decompress(base64.b85decode(outer["__metadata__"]["skillpack"])).decode()


def _told(text: str) -> dict:
    """Return the metadata of a header's JSON text."""
    packed = base64.b85encode(zlib.compress(text.encode())).decode()
    return {"__metadata__": {"skillpack": packed, "skillpack_sha256": hashlib.sha256(text.encode()).hexdigest()}}


def _read(path: Path, data: bytes, names: Iterable[str]) -> bool:
    """Whether a file or any of the named tensors is refused."""
    path.write_bytes(data)
    try:
        pack = SkillPack.load(path)
    except PackError:
        return True
    return any([_refused(pack, name) for name in names if name in pack.header.tensors])


@pytest.fixture(scope="module")
def tiny_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("tiny") / "pack.safetensors"
    _tiny_pack(_samples()).save(path)
    assert not _read(path, path.read_bytes(), KINDS)
    return path.read_bytes()


@pytest.fixture(scope="module")
def single_bytes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A pack of one tensor, by its kind."""
    path = tmp_path_factory.mktemp("single") / "pack.safetensors"
    found = {}
    for name, sample in _samples().items():
        _tiny_pack({name: sample}).save(path)
        found[name] = path.read_bytes()
    return found


def _leaves(tree: dict, *way: str) -> Iterator[tuple[str, ...]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, *way, key)
        yield (*way, key)


@pytest.mark.parametrize("name", KINDS)
def test_every_field_with_every_odd_value_is_a_tensor_or_is_refused(
    name: str, single_bytes: dict[str, bytes], tmp_path: Path
) -> None:
    outer, rest = _split(single_bytes[name])
    text = _header_text(outer)
    for way in _leaves(json.loads(text)["tensors"][name]["how"]):
        for value in ODD:
            inner = json.loads(text)
            here = inner["tensors"][name]["how"]
            for key in way[:-1]:
                here = here[key]
            here[way[-1]] = value
            _read(tmp_path / "x", _joined(outer | _told(json.dumps(inner)), rest), [name])


def test_1200_headers_that_lie_are_tensors_or_are_refused(single_bytes: dict[str, bytes], tmp_path: Path) -> None:
    draw, refused = random.Random(1), 0
    for i in range(1200):
        name = KINDS[i % len(KINDS)]
        outer, rest = _split(single_bytes[name])
        inner = json.loads(_header_text(outer))
        entry = inner["tensors"][name]
        _oddly(draw.choice((inner, entry, entry, entry["how"])), draw)
        refused += _read(tmp_path / "x", _joined(outer | _told(json.dumps(inner)), rest), [name])
    assert refused > 600


def test_600_containers_that_lie_are_tensors_or_are_refused(tiny_bytes: bytes, tmp_path: Path) -> None:
    draw, refused = random.Random(2), 0
    for _ in range(600):
        outer, rest = _split(tiny_bytes)
        _oddly(outer, draw)
        refused += _read(tmp_path / "x", _joined(outer, rest), ["hybrid", "layered"])
    assert refused > 500


def test_600_damaged_files_are_refused(tiny_bytes: bytes, tmp_path: Path) -> None:
    draw = random.Random(3)
    for i in range(600):
        damaged = _mutated(tiny_bytes, draw)
        assert damaged == tiny_bytes or _read(tmp_path / "x", damaged, KINDS), i


@pytest.mark.parametrize("run", ["payloads", "exact_layers"])
def test_runs_that_come_twice_are_refused_or_are_the_same_bytes(run: str, tiny_bytes: bytes, tmp_path: Path) -> None:
    outer, rest = _split(tiny_bytes)
    text, others = json.dumps(outer), [outer[other] for other in ("payloads", "exact_layers")]
    key = f"{json.dumps(run)}: {json.dumps(outer[run])}"
    assert text.count(key) == 1
    for second in ({"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}, *others, 7):
        doubled = text.replace(key, f"{key}, {json.dumps(run)}: {json.dumps(second)}")
        _read(tmp_path / "x", _joined(doubled, rest), KINDS)


@pytest.mark.parametrize("name", ["elementwise", "hybrid"])
def test_names_that_come_twice_are_refused_or_are_the_same_tensor(name: str, tiny_bytes: bytes, tmp_path: Path) -> None:
    outer, rest = _split(tiny_bytes)
    inner = _header_text(outer)
    entry = json.dumps(json.loads(inner)["tensors"]["raw"])
    doubled = inner.replace(f'"{name}":{{', f'"{name}":{entry},"{name}":{{')
    assert doubled != inner
    _read(tmp_path / "x", _joined(outer | _told(doubled), rest), [name])
