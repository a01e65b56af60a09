import os
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from graftllm.checkpoint import Checkpoint
from graftllm.compression import crew
from graftllm.compression.crew import default_workers, open_crew
from graftllm.compression.jobs import Job, Unit
from graftllm.compression.units import carry_out
from graftllm.compression.workspace import Workspace
from graftllm.delta import Delta
from graftllm.devices import memory_bytes
from graftllm.errors import CheckpointError, CompressionError, WorkerError
from graftllm.packer import compress
from graftllm.packing_options import PackOptions
from graftllm.records import Prompt
from graftllm.tensors import TensorSpec
from tests.models import perturb


@pytest.mark.parametrize(
    ("options", "calibrated"),
    [(PackOptions(budget="40%"), True), (PackOptions(strategy="paper"), False)],
)
def test_any_number_of_workers_gives_the_same_bytes(
    delta: Delta, prompts: list[Prompt], tmp_path: Path, options: PackOptions, calibrated: bool
) -> None:
    threads = torch.get_num_threads()
    for workers in (1, 2):
        made = compress(delta, options, calibration=prompts[:6] if calibrated else (), workers=workers)
        made.save(tmp_path / f"{workers}.safetensors")
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()
    assert torch.get_num_threads() == threads


def test_an_error_in_a_worker_is_told_as_it_is(base_dir: Path, base: Checkpoint, tmp_path: Path) -> None:
    tuned = perturb(base_dir, tmp_path / "tuned", seed=3)
    tensors = load_file(tuned / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="'model.layers.0.mlp.up_proj.weight': 1 of 2048 differences"):
        compress(Delta(base, Checkpoint.open(tuned)), workers=2)
    assert not _workers()


def _workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("packing")]


def test_an_interrupt_does_not_wait_and_begins_nothing_more(delta: Delta, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    go_on = threading.Event()

    def slow(job: Job, unit: Unit) -> None:
        begun.append(unit.name)
        if len(begun) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        go_on.wait()
        carry_out(job, unit)

    monkeypatch.setattr(crew, "carry_out", slow)
    with pytest.raises(KeyboardInterrupt):
        compress(delta, workers=2)
    left = _workers()
    assert len(left) == 2
    go_on.set()
    for thread in left:
        thread.join(60)
        assert not thread.is_alive()
    assert len(begun) == 2


def test_large_models_have_a_worker_for_each_core_with_memory(delta: Delta, monkeypatch: pytest.MonkeyPatch) -> None:
    large = _large(delta)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(3), raising=False)
    for memory, expected in ((1 << 40, 3), (5 << 30, 2), (1 << 30, 1)):
        monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": memory, "SC_PAGE_SIZE": 1}.__getitem__)
        assert default_workers(large, "cpu") == expected
        assert default_workers(delta, "cpu") == 1


def test_memory_is_the_containers_where_that_has_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 8 << 30, "SC_PAGE_SIZE": 1}.__getitem__)
    for limit, expected in (("3221225472\n", 3 << 30), ("max\n", 8 << 30), ("99999999999\n", 8 << 30)):
        monkeypatch.setattr(Path, "read_text", lambda self, encoding, limit=limit: limit)
        assert memory_bytes() == expected


def test_each_worker_has_a_gpu_of_its_own_while_there_are_any(delta: Delta, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are none here: that a thread's `cuda` is its own GPU is PyTorch's promise."""
    taken: dict[str, int] = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda number: taken.update({threading.current_thread().name: number})
    )
    met = threading.Barrier(3)
    monkeypatch.setattr(crew, "carry_out", lambda job, unit: met.wait(60))
    units = [Unit(name, "look") for name in list(delta)[:3]]
    with open_crew(Job(delta, PackOptions(), "auto", Workspace(Path("nowhere"))), 3) as do:
        do(units, "looking")
    assert taken == {"packing-0": 0, "packing-1": 1, "packing-2": 0}
    assert default_workers(_large(delta), "auto") == 2
    assert default_workers(delta, "auto") == 1


def _large(delta: Delta) -> Delta:
    grown = replace(delta.tuned, specs={**delta.tuned.specs, "more": TensorSpec("BF16", (60_000, 1_000))})
    large = object.__new__(Delta)
    object.__setattr__(large, "tuned", grown)
    return large


@pytest.mark.filterwarnings("ignore")
def test_a_ray_cluster_gives_the_same_bytes(delta: Delta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="needs graftllm[ray]")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # by default, 15, other tests leave its workers no processor
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    compress(delta, PackOptions(budget="40%"), workers=1).save(tmp_path / "here.safetensors")
    compress(delta, PackOptions(budget="40%"), workers=2, engine="ray").save(tmp_path / "ray.safetensors")
    assert (tmp_path / "here.safetensors").read_bytes() == (tmp_path / "ray.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("address", "reason"), [("nowhere", "Invalid address format"), ("127.0.0.1:1", ".*[Cc]onnection refused")]
)
def test_a_cluster_that_is_not_there_is_told_in_one_line(
    delta: Delta, monkeypatch: pytest.MonkeyPatch, address: str, reason: str
) -> None:
    pytest.importorskip("ray", reason="needs graftllm[ray]")
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(WorkerError, match=rf"engine: Ray gives no cluster at {address} \({reason}") as caught:
        compress(delta, engine="ray")
    assert "Correct RAY_ADDRESS, start the cluster, or leave it out; or use local." in str(caught.value)


def test_a_cluster_that_cannot_be_started_is_told_in_one_line(delta: Delta, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        raise RuntimeError("no room in /dev/shm\nand more")

    toy = SimpleNamespace(is_initialized=lambda: False, init=init)
    monkeypatch.setitem(sys.modules, "ray", toy)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(
        WorkerError, match=r"Ray gives no cluster here \(no room in /dev/shm\). Try again; or use local"
    ):
        compress(delta, engine="ray")


def test_without_ray_its_engine_says_how_to_get_it(delta: Delta, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(CompressionError, match=r"ray is not installed; pip install 'graftllm\[ray\]'"):
        compress(delta, engine="ray")
