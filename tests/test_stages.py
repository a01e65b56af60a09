import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from graftllm.errors import StorageError
from graftllm.metering import Spent
from graftllm.stages import Stages
from graftllm.training_options import SftOptions


@pytest.fixture
def stages(tmp_path: Path) -> Stages:
    return Stages(tmp_path / "stages")


class Counter:
    """An action that counts how often it was done and leaves a file behind."""

    def __init__(self, makes: Path) -> None:
        self.makes, self.times = makes, 0

    def __call__(self) -> dict[str, int]:
        self.makes.touch()
        self.times += 1
        return {"times": self.times}


def test_a_step_is_done_once_and_its_result_remembered(stages: Stages, tmp_path: Path) -> None:
    action = Counter(tmp_path / "made")
    first = stages.run("step", ["x", 3, SftOptions()], [action.makes], action)
    again = Stages(stages.directory).run("step", ["x", 3, SftOptions()], [action.makes], action)
    assert action.times == 1
    assert again == first
    assert first.result == {"times": 1}
    assert first.peak_memory_bytes > 10**6


@pytest.mark.parametrize("inputs", [["y", 3], ["x", 4], ["x"], ["x", 3, None]])
def test_other_inputs_do_it_again(stages: Stages, tmp_path: Path, inputs: list) -> None:
    action = Counter(tmp_path / "made")
    stages.run("step", ["x", 3], [action.makes], action)
    stages.run("step", inputs, [action.makes], action)
    assert action.times == 2


def test_a_lost_artifact_is_made_again(stages: Stages, tmp_path: Path) -> None:
    action = Counter(tmp_path / "made")
    stages.run("step", [], [action.makes], action)
    action.makes.unlink()
    stages.run("step", [], [action.makes], action)
    assert action.times == 2


def test_a_changed_file_or_earlier_step_does_it_again(stages: Stages, tmp_path: Path) -> None:
    (tmp_path / "input").write_text("a")
    action, later = Counter(tmp_path / "made"), Counter(tmp_path / "later")
    for round in range(3):
        if round == 2:
            (tmp_path / "input").write_text("b")
            os.utime(tmp_path / "input", ns=(1, 1))
        first = stages.run("first", [tmp_path / "input"], [action.makes], action)
        stages.run("second", [first], [later.makes], later)
    assert (action.times, later.times) == (2, 2)


def test_a_failed_step_is_not_remembered(stages: Stages, tmp_path: Path) -> None:
    def fail() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stages.run("step", [], [], fail)
    action = Counter(tmp_path / "made")
    stages.run("step", [], [action.makes], action)
    assert action.times == 1


def test_a_stamp_that_cannot_be_deleted_is_a_place_that_cannot_be_written(
    stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_, **__) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    stages.run("step", ["a"], [], lambda: None)
    monkeypatch.setattr(Path, "unlink", refuse)
    for change in (lambda: stages.run("step", ["b"], [], lambda: None), lambda: stages.forget("step")):
        with pytest.raises(
            StorageError, match=r"step.json: cannot be written \(Read-only file system\); check the path"
        ):
            change()


def test_unfinished_files_survive_the_same_inputs_and_only_those(stages: Stages, tmp_path: Path) -> None:
    half = tmp_path / "half"

    def stop() -> None:
        half.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stages.run("step", ["a"], [], stop, unfinished=[half])
    seen = []
    stages.run("step", ["a"], [], lambda: seen.append(half.exists()), unfinished=[half])
    with pytest.raises(KeyboardInterrupt):
        stages.run("step", ["b"], [], stop, unfinished=[half])
    stages.run("step", ["c"], [], lambda: seen.append(half.exists()), unfinished=[half])
    assert seen == [True, False]


def _stop_after(stages: Stages, inputs: list[str], seconds: float) -> None:
    """Leave the marker of an attempt that was stopped after some seconds of two processors."""

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stages.run("step", inputs, [], stop)
    marker = stages.directory / "step.started"
    key = marker.read_text().splitlines()[0]
    spent = Spent(seconds, 2 * seconds, peak_memory_bytes=10**15)
    marker.write_text(f"{key}\n{json.dumps(asdict(spent))}")


def test_what_stopped_attempts_took_is_added_up(stages: Stages) -> None:
    _stop_after(stages, ["a"], 1000)

    def stop() -> float:
        assert stages.spent_on("step").seconds >= 1000
        time.sleep(0.1)  # is what the attempt takes
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stages.run("step", ["a"], [], stop)
    assert not stages.running
    stamp = stages.run("step", ["a"], [], lambda: None)
    assert stamp.seconds >= 1000.1
    assert stamp.cpu_seconds >= 2000
    assert stamp.peak_memory_bytes == 10**15


def test_what_attempts_with_other_inputs_took_does_not_count(stages: Stages) -> None:
    _stop_after(stages, ["a"], 1000)
    assert stages.run("step", ["b"], [], lambda: None).seconds < 500


def test_what_a_killed_process_took_is_added_up(stages: Stages) -> None:
    program = f"""
import os, signal, time
from pathlib import Path
from graftllm import metering
from graftllm.stages import Stages

metering._TELL_S = 0.0
marker = Path({str(stages.directory)!r}) / "step.started"

def work():
    while '"seconds": 0.0,' in marker.read_text():
        time.sleep(0.01)  # until some time is told
    os.kill(os.getpid(), signal.SIGKILL)

Stages(marker.parent).run("step", ["a"], [], work)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGKILL
    assert stages.run("step", ["a"], [], lambda: None).seconds >= 0.05


def test_a_marker_without_figures_is_of_an_attempt_that_took_nothing(stages: Stages) -> None:
    _stop_after(stages, ["a"], 1000)
    marker = stages.directory / "step.started"
    marker.write_text(marker.read_text().splitlines()[0])
    assert stages.run("step", ["a"], [], lambda: None).seconds < 500


def test_the_content_of_an_input_counts_not_where_it_lies_nor_when_it_was_written(
    stages: Stages, tmp_path: Path
) -> None:
    model = tmp_path / "here" / "model"
    model.mkdir(parents=True)
    (model / "weights.safetensors").write_text("a")
    (tmp_path / "rows.jsonl").write_text("{}")
    action = Counter(tmp_path / "made")
    stages.run("step", [model, tmp_path / "rows.jsonl"], [action.makes], action)
    (tmp_path / "here").rename(tmp_path / "there")
    moved = (tmp_path / "rows.jsonl").rename(tmp_path / "there" / "rows.jsonl")
    stages.run("step", [tmp_path / "there" / "model", moved], [action.makes], action)
    assert action.times == 1
    os.utime(moved, ns=(1, 1))
    (tmp_path / "there" / "model" / ".DS_Store").touch()
    (tmp_path / "there" / "model" / "README.md").touch()
    stages.run("step", [tmp_path / "there" / "model", moved], [action.makes], action)
    assert action.times == 1
    (tmp_path / "there" / "model" / "weights.safetensors").rename(tmp_path / "there" / "model" / "other.safetensors")
    stages.run("step", [tmp_path / "there" / "model", moved], [action.makes], action)
    assert action.times == 2


@pytest.mark.parametrize("damage", ["", "{}", "[", '{"name": "step"}'])
def test_a_damaged_stamp_is_none(stages: Stages, tmp_path: Path, damage: str) -> None:
    action = Counter(tmp_path / "made")
    stages.run("step", ["x"], [action.makes], action)
    (stages.directory / "step.json").write_text(damage)
    (stages.directory / "files.sha256").write_text("{")
    (stages.directory / "step.started").write_text(f"key\n{damage}")
    Stages(stages.directory).run("step", ["x"], [action.makes], action)
    assert action.times == 2


def test_a_file_is_hashed_once(stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "input").write_text("a")
    first = stages.run("step", [tmp_path / "input"], [], lambda: 1)
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("it was read again"))
    assert Stages(stages.directory).run("step", [tmp_path / "input"], [], lambda: 2) == first
