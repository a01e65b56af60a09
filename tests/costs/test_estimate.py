"""Hours, memory and disk on hardware, against sums done by hand."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftllm.costs.amounts import Amount, amounts
from graftllm.costs.estimate import PACKING_S, disk_bytes, estimate, pack_bytes
from graftllm.costs.hardware import CHIPS, ROWS, Hardware, hardware
from graftllm.costs.models import Sized
from graftllm.errors import RecipeError
from graftllm.packing_options import PackOptions
from graftllm.training.memory import Shape, activation_bytes
from graftllm.training_options import SftOptions
from tests.costs.test_amounts import _asked

LLAMA = Sized("llama", Shape(8_000_000_000, 32, 4096, 14336, 1024, 128256), "its files")
TRAINED = Amount(
    "sft", "math", "train", 1000, 1e6, flops=6 * 8e9 * 1e6, model=LLAMA, options=SftOptions(batch_size=128),
    longest=2048, trained=8_000_000_000,
)  # fmt: skip
H100 = hardware("1xh100")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("1xh100", Hardware("1xh100", CHIPS["h100"])),
        ("2x8xh200", Hardware("2x8xh200", CHIPS["h200"], 8, 2)),
        ("8x4090", Hardware("8x4090", CHIPS["4090"], 8)),
    ],
)
def test_a_name_stands_for_hardware(name: str, expected: Hardware) -> None:
    assert hardware(name) == expected


def test_cores_are_one_device() -> None:
    found = hardware("cpu-4")
    assert (found.count, found.chip.memory_bytes, found.chip.peak_flops, found.chip.gpu) == (1, 32e9, 384e9, False)
    assert [hardware(name).name for name in ROWS] == list(ROWS)


@pytest.mark.parametrize("name", ["h100", "0xh100", "8xh999", "cpu", "cpu-0", "2x2x2xh100", "", "-1xh100"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="--hardware: expected cpu-CORES, COUNTxGPU or MACHINESxCOUNTxGPU"):
        hardware(name)


def test_hours_are_operations_over_what_the_devices_reach() -> None:
    found = estimate(TRAINED, hardware("8xh100"), sharded=True)
    assert found.hours == pytest.approx(6 * 8e9 * 1e6 / (0.4 * 989e12 * 8) / 3600)
    assert found.device_hours == pytest.approx(8 * found.hours)


def test_eight_billion_parameters_do_not_fit_on_one_gpu_and_do_on_eight() -> None:
    alone, shared = estimate(TRAINED, H100, sharded=False), estimate(TRAINED, hardware("8xh100"), sharded=True)
    row = activation_bytes(LLAMA.shape, 2048, checkpointing=True, number=2)
    assert alone.memory_bytes == 16 * 8e9 + row
    assert (alone.fits, shared.fits) == (False, True)
    outer = 2 * 128256 * 4096
    held = 16 * 8e9 / 8 + 6 * (outer + 2 * (8e9 - outer) / 32)
    rows = next(rows for rows in (16, 8, 4, 2, 1) if held + rows * row <= 0.9 * 80e9)
    assert shared.memory_bytes == pytest.approx(held + rows * row)
    assert shared.how == f"{rows} of 16 rows at once, activations twice"


def test_a_batch_that_the_devices_cannot_share_evenly_does_not_fit() -> None:
    found = estimate(TRAINED, hardware("3xh200"), sharded=True)
    assert (found.fits, found.rows_left) == (False, 2)
    assert found.how == "batch_size 128 cannot be divided by 3"


def test_a_model_that_answers_holds_its_weights_and_what_it_has_read() -> None:
    answers = Amount("sample", "s", "generate", 1, 1, 1, 1e15, LLAMA, sequences=10, longest=1000)
    found = estimate(answers, H100, sharded=False)
    assert found.memory_bytes == 2 * 8e9 + 10 * (2 * 2 * 32 * 1024 * 1000 + 4 * 128256)
    assert found.hours == pytest.approx(1e15 / (0.05 * 989e12) / 3600)
    assert estimate(answers, hardware("cpu-8"), sharded=False).memory_bytes > 4 * 8e9
    assert estimate(answers, hardware("8xh100"), sharded=True).devices == 1


def test_packing_takes_core_seconds_by_the_parameter() -> None:
    found = estimate(Amount("pack", "s", "pack", 1, 1, flops=0, model=LLAMA), H100, sharded=False)
    assert found.hours == pytest.approx(PACKING_S * 8e9 / 3600)


def test_what_endpoints_do_takes_nothing_here() -> None:
    found = estimate(Amount("sample", "s", "endpoint", 1, 1), H100, sharded=False)
    assert (found.hours, found.devices, found.memory_bytes, found.fits) == (None, 0, 0, True)


@given(st.integers(1, 7))
def test_more_devices_never_hold_more_or_take_longer(power: int) -> None:
    few, many = (estimate(TRAINED, hardware(f"{2**n}xh100"), sharded=True) for n in (power - 1, power))
    assert (many.hours or 0) < (few.hours or 0)
    assert many.fits or not few.fits


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (PackOptions(), 50_000),
        (PackOptions(budget="3%"), 30_000),
        (PackOptions(budget="2KB"), 2000),
        (PackOptions(budget="kl=0.01"), None),
        (PackOptions(strategy="paper"), None),
        (PackOptions(strategy="exact"), None),
        (PackOptions(strategy="exact", budget="5%"), None),
    ],
)
def test_packs_are_as_large_as_their_options_say(options: PackOptions, expected: int | None) -> None:
    assert pack_bytes(options, 1e6) == expected


def test_disk_holds_answers_checkpoints_the_trainer_and_packs() -> None:
    asked = _asked()
    written = sum(one.tokens_out for one in amounts(asked))
    expected = 15 * written + 2 * 1000 * 2 + 2 * 12 * 1000 + 2 * 100
    assert disk_bytes(asked, amounts(asked)) == expected
    by_lora = replace(asked, recipe=asked.recipe.model_copy(update={"method": "lora"}), lora_parameters=10)
    assert disk_bytes(by_lora, []) < disk_bytes(asked, [])
