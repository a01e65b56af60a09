"""The page docs/skillpack-format.md is enough to read packs: `reader`, written from it alone, gives what we give."""

import base64
import hashlib
import json
import lzma
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from graftllm.checkpoint import Checkpoint
from graftllm.compression import elementwise
from graftllm.compression.codes import CodeWriter
from graftllm.compression.elementwise import encode_elementwise
from graftllm.compression.exact import encode_exact
from graftllm.compression.factored import encode_factored, encode_hybrid, weighted_svd
from graftllm.compression.metric import Metric
from graftllm.compression.published import encode_published
from graftllm.delta import Delta
from graftllm.packer import compress
from graftllm.packing_options import PackOptions, Strategy
from graftllm.records import Prompt
from graftllm.skillpack import SkillPack
from tests.models import with_head
from tests.reader import Codes, cut, matrix_delta, prediction, tuned_patterns


@pytest.mark.parametrize("head", [False, True], ids=["", "saved twice"])
@pytest.mark.parametrize(("strategy", "budget"), [("paper", None), ("exact", None), ("auto", None), ("exact", "25%")])
def test_the_page_is_enough_to_read_a_pack(
    delta: Delta, prompts: list[Prompt], tmp_path: Path, strategy: Strategy, budget: str | None, head: bool
) -> None:
    path = tmp_path / "pack.safetensors"
    if head:
        delta = Delta(*(Checkpoint.open(with_head(one.path, tmp_path / one.name)) for one in (delta.base, delta.tuned)))
        (delta.tuned.path / "chat_template.jinja").write_text("{{ messages }}")
        (delta.tuned.path / "generation_config.json").write_text('{"eos_token_id": 5}')
    base = delta.base
    compress(delta, PackOptions(strategy=strategy, budget=budget), calibration=prompts).save(path)
    pack = SkillPack.load(path)
    with safe_open(path, framework="np") as file:
        header = json.loads(zlib.decompress(base64.b85decode(file.metadata()["skillpack"])))
        payloads, exact_layers, companions = (
            file.get_tensor(run).tobytes() if run in file.keys() else b""
            for run in ("payloads", "exact_layers", "companions")
        )
        for name, one in header["companions"].items():
            if one is None:
                assert not (delta.tuned.path / name).exists()
                continue
            content, companions = lzma.decompress(companions[: one["nbytes"]]), companions[one["nbytes"] :]
            assert content == (delta.tuned.path / name).read_bytes()
            assert (one["size"], one["digest"]) == (len(content), hashlib.sha256(content).hexdigest()[:16])
        assert bool(header["companions"]) == head
        stored = {}
        for name, entry in header["tensors"].items():
            if "same_as" not in entry:
                sizes = entry["nbytes"], entry.get("refinement", {}).get("nbytes", 0)
                stored[name] = payloads[: sizes[0]], exact_layers[: sizes[1]]
                payloads, exact_layers = payloads[sizes[0] :], exact_layers[sizes[1] :]
        assert head == (len(stored) < len(header["tensors"]))
        for name, entry in header["tensors"].items():
            payload, exact_layer = stored[entry.get("same_as", name)]
            bits = base.tensor(name).view(torch.int16).numpy().view(np.uint16)
            if on_top := entry.get("refinement"):
                bits = prediction(entry["how"], payload, bits, on_top["weight"])
                entry = entry | {"how": on_top["how"]}
                payload = exact_layer
            tuned_digest = entry.get("tuned_digest")
            found = tuned_patterns(entry, payload, bits)
            if tuned_digest is not None:
                assert hashlib.sha256(found.tobytes()).hexdigest()[:16] == tuned_digest
            restored = pack.restore(name, base.tensor(name))
            if found.dtype == np.uint16:
                assert np.array_equal(found, restored.view(torch.int16).numpy().view(np.uint16))
            else:
                expected = base.tensor(name).float() + pack.delta(name, base.tensor(name))
                assert np.allclose(found, expected.numpy(), rtol=1e-5, atol=1e-6)
    assert not payloads
    assert not exact_layers
    assert not companions


@pytest.mark.parametrize("shape", [(24, 40), (8, 3, 5, 4), (40,), ()])
@pytest.mark.parametrize("step", [1e-4, 0.3])
@pytest.mark.parametrize("kind", ["elementwise", "factored", "hybrid"])
def test_the_page_is_enough_to_read_every_matrix(shape: tuple[int, ...], step: float, kind: str) -> None:
    delta = torch.randn(shape, dtype=torch.float64)
    rows, columns = sides = cut(list(shape))
    moments = torch.randn(200, columns).double() @ torch.randn(columns, columns).double()
    right = moments.T @ moments
    metric = Metric(3.0, torch.rand(rows).double() + 0.5, right / right.diagonal().mean())
    matrix = delta.reshape(sides)
    if kind == "elementwise":
        operator, payload = encode_elementwise(lambda start, stop: matrix[start:stop], sides, step, metric)
    else:
        encode = encode_factored if kind == "factored" else encode_hybrid
        operator, payload = encode(matrix, step, metric, weighted_svd(matrix, metric, min(sides))[1:])
    found = matrix_delta(json.loads(operator.model_dump_json()), payload.tobytes(), rows, columns).reshape(shape)
    expected = operator.delta(payload, torch.zeros(shape)).numpy()
    if kind == "elementwise":
        assert np.array_equal(found, expected)
    else:  # products of float32, whose last bits depend on the processor
        assert np.allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_the_page_is_enough_to_read_blocks_and_transposes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "BLOCK", 33)
    delta, metric = torch.randn(7, 11), Metric(right=torch.diag(torch.logspace(-2, 2, 11)))
    operator, payload = encode_elementwise(lambda start, stop: delta[start:stop], (7, 11), 0.1, metric)
    assert operator.height == 3
    found = matrix_delta(operator.model_dump(), payload.tobytes(), 7, 11)
    assert np.array_equal(found, operator.matrix(payload, (7, 11)))
    turned = operator.model_copy(update={"transposed": True})
    assert json.loads(turned.model_dump_json())["transposed"] is True
    assert np.array_equal(turned.delta(payload, torch.zeros(11, 7)), found.T)


def test_the_page_is_enough_to_read_low_ranks_of_transposes() -> None:
    delta = torch.randn(6, 4) @ torch.randn(4, 20)
    options = PackOptions(strategy="paper", energy=1.0, bit_bands=((8, 1.0),))
    operator, payload = encode_published(delta, delta, delta, "mlp", options, 4, None, transposed=True)
    entry = {"how": operator.model_dump(), "shape": [6, 20]}
    found = tuned_patterns(entry, payload.tobytes(), np.zeros((6, 20), np.uint16))
    assert np.allclose(found, operator.delta(payload, delta).numpy(), atol=1e-5)
    assert np.allclose(found, delta.numpy(), atol=0.1)


def test_the_page_is_enough_to_read_every_kind_of_codes() -> None:
    draw, writer = np.random.default_rng(0), CodeWriter()
    alone, off = draw.integers(-2, 3, 300), draw.normal(0, 0.6, 300).round().astype(np.int32)
    line, steps = off + np.rint(np.linspace(-9, 12, 300)).astype(np.int32), np.cumsum(off)
    own = draw.choice([-3, 0, 2], 2000)
    loud = 2.0 ** np.linspace(-1, 9, 200) * 2.0 ** np.linspace(2, -2, 23)[:, None]
    followed = (draw.normal(0, 1, loud.shape) * loud).round().astype(np.int32)
    followed[[4, 11]] = 0
    for vector in (alone, line, steps, own):
        writer.vector(vector.astype(np.int32))
    writer.matrix(followed)
    writer.matrix(followed, np.arange(200) - 100)
    codes = Codes(writer.payload().tobytes())
    kinds = []
    for vector in (alone, line, steps, own):
        kinds.append(divmod(codes.head[0], 4))
        assert np.array_equal(codes.vector(len(vector)), vector)
    assert [kind for kind, _ in kinds] == [0, 1, 2, 0]
    assert kinds[-1] == (0, 2)
    assert codes.head[0] // 4 == 1
    assert np.array_equal(codes.matrix(*followed.shape), followed)
    assert np.array_equal(codes.matrix(*followed.shape, np.arange(200) - 100), followed)
    codes.end()


def test_the_page_is_enough_to_read_bounded_numbers() -> None:
    draw = np.random.default_rng(0)
    limits = np.concatenate(
        [[1, 2, 3, 1000, (1 << 16) - 1, 1 << 16, (1 << 16) + 1, 1 << 31], 10 ** draw.integers(0, 9, 40)]
    )
    numbers, writer = draw.integers(0, limits), CodeWriter()
    writer.below(numbers, limits)
    codes = Codes(writer.payload().tobytes())
    assert np.array_equal(codes.bounded(limits), numbers)
    codes.end()


@pytest.mark.parametrize(
    ("first", "coding"), [(0.5, "predicted"), (0.0, "predicted"), (float("inf"), "difference"), (float("nan"), "raw")]
)
def test_the_page_is_enough_to_read_every_exact_coding(first: float, coding: str) -> None:
    base = torch.randn(500) * torch.logspace(-6, 0, 500)
    tuned = base + 0.01 * torch.randn(500)
    base[0] = first
    if coding == "raw":
        tuned = torch.randint(-(1 << 15), 1 << 15, (500,), dtype=torch.int16).view(torch.bfloat16)
    base, tuned = base.bfloat16(), tuned.bfloat16()
    operator, payload = encode_exact(base, tuned)
    assert operator.coding == coding
    entry = {"how": operator.model_dump(), "shape": [500]}
    found = tuned_patterns(entry, payload.tobytes(), base.view(torch.int16).numpy().view(np.uint16))
    assert np.array_equal(found, tuned.view(torch.int16).numpy().view(np.uint16))
