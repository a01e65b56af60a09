import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graftllm.compression.elementwise import encode_elementwise
from graftllm.compression.encoded import EncodedTensor, ExactLayer
from graftllm.compression.exact import encode_exact
from graftllm.compression.factored import encode_hybrid, weighted_svd
from graftllm.compression.layered import encode_closest, refine
from graftllm.compression.lowrank import encode_lowrank, truncated_svd
from graftllm.compression.metric import Metric
from graftllm.compression.products import steady_product
from graftllm.tensors import digest

CPU = torch.device("cpu")


def _pair(rank: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(96, 80, generator=draw).bfloat16()
    strong = torch.randn(96, rank, generator=draw) @ torch.randn(rank, 80, generator=draw)
    return base, (base.float() + 0.1 * strong + noise * torch.randn(96, 80, generator=draw)).bfloat16()


def _lossy(base: torch.Tensor, tuned: torch.Tensor, step: float) -> EncodedTensor:
    delta = (tuned.double() - base.double()).double()
    return EncodedTensor(*encode_elementwise(lambda start, stop: delta[start:stop], (96, 80), step, Metric()))


@given(st.integers(0, 1000), st.integers(1, 40), st.integers(-30, 30))
def test_steady_products_are_the_products_of_whole_numbers(seed: int, rank: int, octaves: int) -> None:
    draw = np.random.default_rng(seed)
    left, right = draw.integers(-1000, 1000, (5, rank)), draw.integers(-1000, 1000, (rank, 7))
    found = steady_product(torch.from_numpy(left).float() * 2.0**octaves, torch.from_numpy(right).float())
    assert torch.equal(found, torch.from_numpy(left @ right).float() * 2.0**octaves)


def test_factors_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="expected finite factors"):
        steady_product(torch.full((2, 1), float("inf")), torch.ones(1, 2))


def test_a_product_is_added_where_strong_directions_are() -> None:
    base, tuned = _pair(3, 0.002)
    exact, payload = encode_closest(base, tuned, CPU)
    assert exact.product is not None
    assert len(payload) < 0.95 * len(encode_exact(base, tuned)[1])
    assert torch.equal(exact.restore(payload, base), tuned)


def test_noise_has_no_product() -> None:
    base, tuned = _pair(1, 3.0)
    assert encode_closest(base, tuned, CPU)[0].product is None


@pytest.mark.parametrize("step", [0.05, 3.0])
def test_a_lossy_layer_and_the_exact_one_give_every_bit(step: float) -> None:
    base, tuned = _pair(2, 0.05)
    lossy = _lossy(base, tuned, step)
    both = refine(lossy, base, tuned, CPU)
    assert both.refinement is not None
    assert torch.equal(both.restore(base), tuned)
    assert torch.equal(both.decode(base), tuned.float() - base.float())
    assert (both.operator, both.nbytes) == (lossy.operator, len(lossy.payload) + len(both.refinement.payload))


def test_an_exact_layer_starts_from_a_lossy_one_that_predicts() -> None:
    base, tuned = _pair(2, 0.05)
    both = refine(_lossy(base, tuned, 0.02), base, tuned, CPU)
    assert both.refinement is not None
    assert both.refinement.weight == 1.0
    assert len(both.refinement.payload) < 0.8 * len(encode_closest(base, tuned, CPU)[1])


def test_only_operators_that_decode_alike_everywhere_predict() -> None:
    base, tuned = _pair(2, 0.05)
    change = tuned.float() - base.float()
    lossy = encode_lowrank(truncated_svd(change, 3), ((8, 1.0),), 16, None)
    layer = ExactLayer(1.0, *encode_exact(base, tuned))
    with pytest.raises(ValueError, match="expected an exact layer of weight 0 over lowrank, found 1.0"):
        EncodedTensor(*lossy, layer).restore(base)


_DECODE = """
import sys
import numpy as np
import torch
from graftllm.tensors import digest
from graftllm.compression.encoded import EncodedTensor
from graftllm.compression.factored import Hybrid
torch.set_num_threads(int(sys.argv[1]))
how = Hybrid.model_validate_json(open(sys.argv[2] + ".json").read())
print(digest(EncodedTensor(how, np.load(sys.argv[2] + ".npy")).prediction(torch.ones(257, 300), 0.75)))
"""


def test_predictions_have_the_same_bits_in_any_number_of_threads(tmp_path: Path) -> None:
    delta = torch.randn(257, 40, dtype=torch.float64) @ torch.randn(40, 300, dtype=torch.float64)
    delta += torch.randn(257, 300)
    found = encode_hybrid(delta, 0.5, Metric(), weighted_svd(delta, Metric(), 30)[1:])
    assert found is not None
    np.save(tmp_path / "hybrid.npy", found[1])
    (tmp_path / "hybrid.json").write_text(found[0].model_dump_json())

    def elsewhere(threads: int) -> str:
        command = [sys.executable, "-c", _DECODE, str(threads), str(tmp_path / "hybrid")]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    here = digest(EncodedTensor(*found).prediction(torch.ones(257, 300), 0.75))
    assert elsewhere(1) == elsewhere(3) == here
