import hashlib
import json

import numpy as np
import pytest
import torch

from graftllm.compression.elementwise import Elementwise
from graftllm.compression.factored import Factored, Hybrid, encode_factored, encode_hybrid, weighted_svd
from graftllm.compression.lowrank import LowRank
from graftllm.compression.metric import Metric
from graftllm.delta import Delta
from graftllm.errors import PackError
from graftllm.evaluation.anatomy import by_layer, by_role, figures, portion, strengths
from graftllm.evaluation.tables import pack_lines
from graftllm.header import BaseInfo, Card, Header, TensorEntry
from graftllm.packer import compress
from graftllm.packing_options import PackOptions
from graftllm.skillpack import SkillPack

MATRIX = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def pack(delta: Delta) -> SkillPack:
    return compress(delta, PackOptions(strategy="paper"))


def header_of(names: list[str]) -> Header:
    """A header of parameters, 10 values and 5 bytes each."""
    how = Elementwise(step=1, slope=0, height=1)
    entry = TensorEntry(
        role="mlp", dtype="BF16", shape=(2, 5), base_digest="0", how=how, nbytes=5, payload_digest="0", error=0.5
    )
    base = BaseInfo(name="base", architecture="Toy", fingerprint="0" * 64, parameters=10 * len(names))
    tensors = dict.fromkeys(names, entry)
    return Header(card=Card(), base=base, tuned_bytes=1, options=PackOptions(), calibration_tokens=0, tensors=tensors)


def test_roles_and_layers_share_out_every_parameter(pack: SkillPack) -> None:
    header = pack.header
    whole = portion(header.tensors.values())
    assert whole.nbytes == pack.payload_bytes
    assert whole.parameters == header.base.parameters
    for groups in (by_role(header.tensors.values()), by_layer(header)):
        parts = [portion(entries) for entries in groups.values()]
        assert sum(part.nbytes for part in parts) == whole.nbytes
        assert sum(part.parameters for part in parts) == whole.parameters
        assert sum(part.tensors for part in parts) == len(header.tensors)


def test_rate_and_errors_are_those_of_the_entries() -> None:
    found = portion(header_of(["a", "b", "c"]).tensors.values())
    assert (found.rate, found.median_error, found.max_error) == (4.0, 0.5, 0.5)
    assert found.operators == {"elementwise": 3}
    assert portion([]).rate == 0


def test_layers_are_in_order_and_others_last() -> None:
    names = ["embed.weight", "h.10.w", "h.2.w", "h.2.mlp.experts.7.w", "norm.weight"]
    layers = by_layer(header_of(names))
    assert {layer: len(entries) for layer, entries in layers.items()} == {"2": 2, "10": 1, "other": 2}
    assert list(layers) == ["2", "10", "other"]


def test_neighbors_share_a_key_where_layers_are_many() -> None:
    layers = by_layer(header_of([f"h.{i}.w" for i in range(10)]), at_most=4)
    assert {layer: len(entries) for layer, entries in layers.items()} == {"0-2": 3, "3-5": 3, "6-8": 3, "9": 1}


def test_stacks_of_layers_are_told_apart() -> None:
    layers = by_layer(header_of(["m.encoder.block.0.w", "m.encoder.block.1.w", "m.decoder.block.0.w"]))
    assert list(layers) == ["encoder.block 0", "encoder.block 1", "decoder.block 0"]


def test_figures_are_json_and_hold_the_whole_header(pack: SkillPack) -> None:
    found = json.loads(json.dumps(figures(pack.header, 20_000)))
    anatomy = found.pop("anatomy")
    assert found == json.loads(pack.header.model_dump_json())
    assert anatomy["bytes"] == pack.payload_bytes
    assert anatomy["file_bits_per_parameter"] == pytest.approx(160_000 / pack.header.base.parameters)
    assert anatomy["roles"]["mlp"]["operators"] == {"lowrank": 6}
    attention = anatomy["layers"]["1"]["roles"]["attention"]
    assert attention["bits_per_parameter"] == pytest.approx(8 * attention["bytes"] / attention["parameters"])


def test_a_pack_of_two_layers_shows_both(delta: Delta, pack: SkillPack) -> None:
    two = compress(delta, PackOptions(strategy="exact", budget="25%"))
    found = figures(two.header, 20_000)["anatomy"]
    lossy = portion(two.header.lossy_layer().tensors.values())
    assert found["lossy_layer"] == lossy.figures()
    assert found["lossy_layer"]["median_error"] > 0 == found["median_error"]
    assert lossy.nbytes + found["exact_layer"]["bytes"] == found["bytes"]
    lines = pack_lines(two.header, 20_000)
    errors = f"median error of the delta {lossy.median_error:.1%}, worst {lossy.max_error:.1%}"
    assert f"lossy layer  {lossy.nbytes:,} bytes, {errors}" in lines
    assert f"exact layer  {found['exact_layer']['bytes']:,} bytes more, no error" in lines
    assert not {"lossy_layer", "exact_layer"} & set(figures(pack.header, 20_000)["anatomy"])
    assert not any(line.startswith(("lossy", "exact")) for line in pack_lines(pack.header, 20_000))


def test_strengths_of_a_lowrank_delta_are_near_its_singular_values(pack: SkillPack, delta: Delta) -> None:
    """Near, as rounding makes the factors a little oblique."""
    found = strengths(pack, MATRIX)
    assert found is not None
    expected = torch.linalg.svdvals(pack.delta(MATRIX, delta.base.tensor(MATRIX)))[: len(found)]
    assert torch.equal(found, found.sort(descending=True).values)
    torch.testing.assert_close(found[:4], expected[:4], rtol=0.2, atol=0)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("hybrid", [False, True])
def test_strengths_are_norms_of_the_outer_products(hybrid: bool, transposed: bool) -> None:
    u, v = torch.linalg.qr(torch.randn(24, 3)).Q, torch.linalg.qr(torch.randn(16, 3)).Q
    matrix = (u * torch.tensor([4.0, 2.0, 1.0]) @ v.T).double()
    encode = encode_hybrid if hybrid else encode_factored
    made = encode(matrix, 1e-3, Metric(), weighted_svd(matrix, Metric(), 3)[1:])
    assert made is not None
    operator, payload = made
    shape = (16, 24) if transposed else (24, 16)
    pack = one_tensor(operator.model_copy(update={"transposed": transposed}), payload, shape)
    found = strengths(pack, "w")
    assert found is not None
    torch.testing.assert_close(found, torch.tensor([4.0, 2.0, 1.0]), rtol=1e-2, atol=0)


def test_other_operators_have_no_directions(pack: SkillPack) -> None:
    assert strengths(pack, "model.norm.weight") is None
    assert strengths(pack, "model.embed_tokens.weight") is None


def test_factors_that_do_not_fit_are_refused() -> None:
    wrong = one_tensor(LowRank(bands=((8, 3),), group_size=8), np.zeros(5, np.uint8), (24, 16))
    with pytest.raises(PackError, match="toy: the payload of 'w' cannot be decoded .* The file is damaged."):
        strengths(wrong, "w")
    hostile = one_tensor(Factored(rank=1 << 10, step=1.0), np.zeros(5, np.uint8), (1 << 20, 1 << 20))
    with pytest.raises(PackError, match="expected factors of at most 4,194,304 values in 5 bytes, found 2,147,483,648"):
        strengths(hostile, "w")


def one_tensor(how: LowRank | Factored | Hybrid, payload: np.ndarray, shape: tuple[int, int]) -> SkillPack:
    header = header_of(["w"])
    digest = hashlib.sha256(payload.data).hexdigest()[:16]
    entry = header.tensors["w"].model_copy(
        update={"how": how, "shape": shape, "nbytes": payload.nbytes, "payload_digest": digest}
    )
    return SkillPack(header.model_copy(update={"tensors": {"w": entry}}), "toy", lambda *_: payload)
