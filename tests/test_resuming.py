"""Packing that is killed, for real, and started again."""

import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from graftllm.checkpoint import Checkpoint
from graftllm.compression.workspace import packing_key
from graftllm.delta import Delta
from graftllm.errors import GraftError, StorageError
from graftllm.packer import compress, compress_to
from graftllm.packing_options import PackOptions
from graftllm.skillpack import SkillPack
from tests.models import rows

_BUDGET = "40%"
_PACK = """
import os
import sys
from pathlib import Path
from graftllm.checkpoint import Checkpoint
from graftllm.compression import crew
from graftllm.delta import Delta
from graftllm.packing_options import PackOptions
from graftllm.packer import compress_to

base, tuned, out, strategy, budget, units, calibrated, workers = sys.argv[1:]
done, carry_out, follow = [], crew.carry_out, crew._follow

def stop():
    os.write(1, b"stopped\\n")  # whole, whoever else writes
    sys.stdin.read()  # until killed

def counted(job, unit):
    if len(done) == int(units):
        stop()
    carry_out(job, unit)
    done.append(unit)

def watched(finished, count, label):
    next(finished)
    stop()

crew.carry_out = counted
if workers != "1":
    crew._follow = watched
options = PackOptions(strategy=strategy, budget=budget or None)
delta = Delta(Checkpoint.open(base), Checkpoint.open(tuned))
given = ()
if calibrated == "yes":
    from tests.models import rows  # and transformers, which takes seconds to import

    given = rows(6)
compress_to(Path(out), delta, options, calibration=given, device="cpu", workers=int(workers))
"""


def _kill_after(
    units: int, delta: Delta, out: Path, options: PackOptions, *, calibrated: bool = False, workers: int = 1
) -> None:
    """Pack in another process and kill it when it has done some units."""
    told = [options.strategy, options.budget or "", str(units), "yes" if calibrated else "no", str(workers)]
    command = [sys.executable, "-c", _PACK, str(delta.base.path), str(delta.tuned.path), str(out), *told]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]) as one:
        assert one.stdout is not None
        assert one.stdout.readline() == b"stopped\n"
        one.send_signal(signal.SIGKILL)
        assert set(one.stdout.read().splitlines()) <= {b"stopped"}  # another worker may have got there, too
        assert one.wait(60) == -signal.SIGKILL


def _results(out: Path) -> dict[str, tuple[int, bytes]]:
    """Return the finished units, and when each was written."""
    spool = out.with_name(f".{out.name}.packing")
    kept = [path for path in spool.iterdir() if path.suffix not in (".key", ".zero")]  # nor what leaving out costs
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in kept}


@pytest.mark.parametrize(("units", "calibrated"), [(5, False), (30, True)])
def test_a_killed_packing_goes_on_and_gives_the_same_bytes(
    delta: Delta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, units: int, calibrated: bool
) -> None:
    options, calibration = PackOptions(budget=_BUDGET), rows(6) if calibrated else ()
    out, undisturbed = tmp_path / "killed.safetensors", tmp_path / "undisturbed.safetensors"
    _kill_after(units, delta, out, options, calibrated=calibrated)
    kept = _results(out)
    assert len(kept) == units + calibrated  # and what calibration measured
    assert not out.exists()
    if calibrated:
        monkeypatch.setattr("graftllm.compression.calibration.collect_moments", pytest.fail)
    last: dict[str, tuple[int, bytes]] = {}
    monkeypatch.setattr("graftllm.compression.workspace._empty", lambda _: last.update(_results(out)))
    compress_to(out, delta, options, calibration=calibration, device="cpu")
    assert kept.items() <= last.items()
    monkeypatch.undo()
    compress_to(undisturbed, delta, options, calibration=calibration, device="cpu")
    assert out.read_bytes() == undisturbed.read_bytes()
    assert not undisturbed.with_name(f".{undisturbed.name}.packing").exists()


@pytest.mark.parametrize("strategy", ["paper", "exact"])
def test_the_other_strategies_go_on_too(delta: Delta, tmp_path: Path, strategy: str) -> None:
    options = PackOptions(strategy=strategy)
    _kill_after(3, delta, tmp_path / "killed.safetensors", options)
    assert len(_results(tmp_path / "killed.safetensors")) == 3
    for name in ("killed", "undisturbed"):
        compress_to(tmp_path / f"{name}.safetensors", delta, options, device="cpu")
    assert (tmp_path / "killed.safetensors").read_bytes() == (tmp_path / "undisturbed.safetensors").read_bytes()


def test_a_packing_by_some_workers_goes_on_too(delta: Delta, tmp_path: Path) -> None:
    _kill_after(0, delta, tmp_path / "killed.safetensors", PackOptions(budget=_BUDGET), workers=2)
    for name in ("killed", "undisturbed"):
        compress_to(tmp_path / f"{name}.safetensors", delta, PackOptions(budget=_BUDGET), device="cpu")
    assert (tmp_path / "killed.safetensors").read_bytes() == (tmp_path / "undisturbed.safetensors").read_bytes()


def test_ctrl_c_in_the_middle_of_decompositions_is_one_line(tmp_path: Path) -> None:
    for seed, part in enumerate(("base", "tuned")):
        draw = torch.Generator().manual_seed(seed)
        home = tmp_path / part
        home.mkdir()
        (home / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
        values = {f"layers.{i}.weight": torch.randn(1200, 1200, generator=draw) for i in range(12)}
        save_file(values, home / "model.safetensors", metadata={"format": "pt"})
    command = [sys.executable, "-m", "graftllm", "pack", "--base", tmp_path / "base", "--tuned", tmp_path / "tuned"]
    command += ["--out", tmp_path / "pack.safetensors", "--workers", "2"]
    spool = tmp_path / ".pack.safetensors.packing"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as packing:
        while packing.poll() is None and not (spool.exists() and list(spool.glob("*.look"))):
            with suppress(subprocess.TimeoutExpired):
                packing.wait(timeout=0.02)
        packing.send_signal(signal.SIGINT)
        _, stderr = packing.communicate(timeout=300)
    assert packing.returncode == 130, stderr
    assert stderr.endswith("graftllm: interrupted; run the same command again to go on where it was.\n")


def test_work_for_other_options_or_another_model_is_not_taken(delta: Delta, base: Checkpoint, tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    compress(delta, PackOptions(strategy="exact"), spool=spool)
    first = {path.name for path in spool.iterdir()}
    compress(Delta(base, base), PackOptions(strategy="exact"), spool=spool)
    assert {path.name for path in spool.iterdir()} == first
    assert "unchanged" in (spool / sorted(first)[0]).read_bytes().decode(errors="replace")
    compress(delta, PackOptions(budget=_BUDGET), spool=spool)
    assert not first & {path.name for path in spool.iterdir()} - {"packing.key"}


def test_another_budget_looks_no_second_time(delta: Delta, tmp_path: Path) -> None:
    compress(delta, PackOptions(budget=_BUDGET), spool=tmp_path / "spool")
    looks = {path: path.stat().st_mtime_ns for path in (tmp_path / "spool").glob("*.look")}
    compress(delta, PackOptions(budget="60%"), spool=tmp_path / "spool")
    assert len(looks) == len(delta)
    assert looks == {path: path.stat().st_mtime_ns for path in (tmp_path / "spool").glob("*.look")}


def test_a_directory_of_something_else_is_left_alone(delta: Delta, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("ten years")
    with pytest.raises(StorageError, match="expected nothing or an unfinished packing there, found thesis.tex"):
        compress(delta, PackOptions(), spool=tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "ten years"


@pytest.mark.parametrize("deleted", [0, 3])
def test_work_that_was_being_cleared_when_a_kill_came_is_cleared_by_the_next(
    delta: Delta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deleted: int
) -> None:
    options, left = PackOptions(strategy="exact"), [None] * deleted

    def unlinked(self: Path, **_: bool) -> None:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        os.unlink(self)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "unlink", unlinked)
        compress_to(tmp_path / "pack.safetensors", delta, options, device="cpu")
    assert len(_results(tmp_path / "pack.safetensors")) == len(delta) - deleted
    compress_to(tmp_path / "pack.safetensors", Delta(delta.base, delta.base), options, device="cpu")
    assert not (tmp_path / ".pack.safetensors.packing").exists()


def test_a_full_disk_tells_where_finished_work_waits(
    delta: Delta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(pack: SkillPack, out: Path) -> None:
        raise StorageError(f"{out}: no space left to write it.")

    out = tmp_path / "pack.safetensors"
    with monkeypatch.context() as patched:
        patched.setattr(SkillPack, "save", full)
        with pytest.raises(StorageError, match=r"no space left .* waits in .*/\.pack\.safetensors\.packing; delete it"):
            compress_to(out, delta, PackOptions(budget=_BUDGET), device="cpu")
    assert _results(out)
    compress_to(out, delta, PackOptions(budget=_BUDGET), device="cpu")
    assert list(tmp_path.iterdir()) == [out]


def test_a_place_that_cannot_be_cleared_up_loses_no_pack(
    delta: Delta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(directory: Path) -> None:
        if (directory / "packing.key").exists():
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("graftllm.compression.workspace._empty", fail)
    out, options = tmp_path / "pack.safetensors", PackOptions(budget=_BUDGET)
    assert set(compress_to(out, delta, options, device="cpu")) == set(delta)
    place = tmp_path / ".pack.safetensors.packing"
    place.mkdir()
    (place / "packing.key").write_text("another packing")
    with pytest.raises(StorageError, match=r"packing: cannot be cleared up \(Permission denied\). Delete it"):
        compress_to(out, delta, options, device="cpu")


def test_a_kill_before_the_first_work_does_not_block_the_place(delta: Delta, tmp_path: Path) -> None:
    (tmp_path / ".packing.key.partial").write_text("half a k")
    assert list(compress(delta, PackOptions(strategy="exact"), spool=tmp_path)) == list(delta)


def test_work_of_another_tokenizer_is_not_taken(delta: Delta, tmp_path: Path) -> None:
    tuned = shutil.copytree(delta.tuned.path, tmp_path / "tuned")
    keys = []
    for template in ("{{ messages }}", "{{ messages[0] }}"):
        (tuned / "chat_template.jinja").write_text(template)
        keys.append(packing_key(Delta(delta.base, Checkpoint.open(tuned)), PackOptions(), (), "cpu"))
    assert keys[0] != keys[1]


def test_a_call_that_cannot_start_keeps_what_an_earlier_one_finished(
    delta: Delta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / ".pack.safetensors.packing" / "finished"
    kept.parent.mkdir()
    kept.touch()
    with pytest.raises(GraftError, match="cuda:7"):
        compress_to(tmp_path / "pack.safetensors", delta, device="cuda:7")
    assert kept.exists()
