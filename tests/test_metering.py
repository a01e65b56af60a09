"""Metering: seconds, processors and memory of a block, told while it runs."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftllm import metering
from graftllm.errors import StorageError
from graftllm.metering import Spent, metered, peak_memory_bytes

_SECONDS = st.integers(0, 10**6).map(lambda cents: cents / 100)
_BYTES = st.integers(0, 10**12)
_SPENT = st.builds(Spent, _SECONDS, _SECONDS, _SECONDS, _BYTES, _BYTES)


@given(_SPENT, _SPENT, _SPENT)
def test_times_add_up_and_peaks_do_not(one: Spent, two: Spent, three: Spent) -> None:
    assert (one + two) + three == one + (two + three)
    assert one + two == two + one
    assert one + Spent() == one
    assert (one + two).seconds == pytest.approx(one.seconds + two.seconds)
    assert (one + two).peak_memory_bytes == max(one.peak_memory_bytes, two.peak_memory_bytes)


def test_work_counts_by_the_clock_and_by_the_processor() -> None:
    with metered(lambda spent: None) as spent:
        until = time.process_time() + 0.2
        while time.process_time() < until:
            pass
        worked = spent()
        time.sleep(0.2)
        waited = spent()
    assert worked.cpu_seconds >= 0.2
    assert waited.seconds >= worked.seconds + 0.19
    assert waited.cpu_seconds < worked.cpu_seconds + 0.19
    assert waited.gpu_seconds == waited.peak_gpu_bytes == 0


def test_the_processors_of_a_child_that_ended_count() -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    with metered(lambda spent: None) as spent:
        subprocess.run([sys.executable, "-c", burn], check=True)
    assert spent().cpu_seconds >= 0.3


def test_the_peak_is_that_of_the_block_not_of_the_process() -> None:
    size = 200_000_000
    with metered(lambda spent: None) as before:
        held = np.ones(size, np.uint8)
        large = before().peak_memory_bytes
    del held
    with metered(lambda spent: None) as after:
        assert after().peak_memory_bytes < large - size // 2


def test_the_peak_is_not_that_of_the_process_that_started_this_one() -> None:
    held = np.ones(300_000_000, np.uint8)
    tell = "from graftllm.metering import peak_memory_bytes\nprint(peak_memory_bytes())"
    told = subprocess.run([sys.executable, "-c", tell], check=True, capture_output=True)
    assert 10**6 < int(told.stdout) < held.nbytes < peak_memory_bytes()


def test_a_launch_counts_the_processors_of_all_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    end = time.process_time() + 0.3  # long beside the hundredths of a second that are told
    with metered(lambda spent: None) as spent:
        while time.process_time() < end:
            pass
        one = spent().cpu_seconds
        monkeypatch.setenv("WORLD_SIZE", "8")
        assert spent().cpu_seconds >= 7 * one > 0


def test_what_was_spent_is_told_while_the_block_runs_and_when_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metering, "_TELL_S", 0.0)
    told: list[Spent] = []
    with pytest.raises(KeyboardInterrupt), metered(told.append):
        while len(told) < 2:
            time.sleep(0.01)
        raise KeyboardInterrupt
    assert len(told) >= 3
    assert [one.seconds for one in told] == sorted(one.seconds for one in told)


def test_a_place_that_cannot_be_written_is_raised_when_the_block_ends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(metering, "_TELL_S", 0.0)
    tries = []

    def tell(spent: Spent) -> None:
        tries.append(spent)
        raise StorageError("full")

    with pytest.raises(StorageError, match="full"), metered(tell):
        while not tries:
            time.sleep(0.01)
    assert len(tries) == 2
