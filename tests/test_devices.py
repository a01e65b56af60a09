from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from graftllm import devices
from graftllm.devices import backed_by_files, free_bytes, memory_bytes


def test_no_more_memory_is_free_than_the_machine_has() -> None:
    assert 0 < free_bytes(torch.device("cpu")) <= memory_bytes()
    assert free_bytes(torch.device("meta")) == memory_bytes()


@pytest.mark.parametrize("version", [1, 2])
def test_a_containers_limit_counts_without_caches_of_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    place, limit, used, cache = devices._GROUPS[2 - version]
    monkeypatch.setattr(devices, "_GROUPS", [(tmp_path / place.name, limit, used, cache), (tmp_path, "no", "no", "")])
    (tmp_path / place.name).mkdir()
    (tmp_path / place.name / limit).write_text("5000000\n")
    (tmp_path / place.name / used).write_text("3000000\n")
    told = f"anon 7\n{cache.format('in')} 400000\n{cache.format('')} 600000\n"
    (tmp_path / place.name / "memory.stat").write_text(told)
    assert memory_bytes() == 5_000_000
    assert free_bytes(torch.device("cpu")) == 3_000_000
    (tmp_path / place.name / limit).write_text("max\n")
    assert memory_bytes() > 5_000_000


def test_memory_that_is_a_files_is_told_from_other(tmp_path: Path) -> None:
    save_file({"x": torch.ones(4096)}, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        mapped = file.get_tensor("x")
    own = mapped.clone()
    found = backed_by_files([mapped.data_ptr(), own.data_ptr(), 0])
    assert found in (set(), {mapped.data_ptr()})  # nothing where the system does not tell
    if Path("/proc/self/maps").exists():
        assert found
