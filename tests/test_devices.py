from pathlib import Path

import pytest
import torch

from graftllm.devices import _told, free_bytes, memory_bytes


def test_no_more_memory_is_free_than_the_machine_has() -> None:
    assert 0 < free_bytes(torch.device("cpu")) <= memory_bytes()
    assert free_bytes(torch.device("meta")) == memory_bytes()


def test_a_file_of_the_system_without_the_number_is_told_from_one_with_nought(tmp_path: Path) -> None:
    file = tmp_path / "stat"
    file.write_text("anon 0\nfile 12 kB\n", encoding="ascii")
    assert (_told(str(file), "anon "), _told(str(file), "file ")) == (0, 12)
    with pytest.raises(ValueError, match="no 'shmem '"):
        _told(str(file), "shmem ")
