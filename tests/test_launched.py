"""Several processes that were launched together, on one run's directory."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from graftllm.launched import leads, processes, sharded
from graftllm.stages import Stages
from graftllm.storage import only_writer
from tests.models import save_llama

_STAGES = """
import sys
from pathlib import Path
from graftllm.launched import leads, wait_until
from graftllm.stages import Stages

home = Path(sys.argv[1])
stages = Stages(home / "stages")

def alone():
    (home / "alone").write_text("x")
    with open(home / "log", "a") as log:
        log.write(f"alone {leads()}\\n")
    return 7

def together():
    with open(home / "log", "a") as log:
        log.write(f"together {leads()}\\n")
    wait_until(lambda: (home / "log").read_text().count("together") == 3)  # as a collective call does
    if leads():
        (home / "both").write_text("x")
    return 9

for _ in range(2):
    first = stages.run("alone", ["a"], [home / "alone"], alone)
    both = stages.run("both", [first], [home / "both"], together, together=True)
print(first.result, both.result, len(stages.running))
"""


def _start(program: str, home: Path, rank: int, size: int = 3) -> subprocess.Popen[str]:
    code = f"import os\nos.environ |= {{'RANK': '{rank}', 'WORLD_SIZE': '{size}'}}\n{program}"
    return subprocess.Popen([sys.executable, "-c", code, str(home)], stdout=subprocess.PIPE, text=True)


def test_the_first_process_works_for_all_and_all_train_together(tmp_path: Path) -> None:
    started = [_start(_STAGES, tmp_path, rank) for rank in (2, 1, 0)]
    assert [one.communicate(timeout=60)[0] for one in started] == ["7 9 0\n"] * 3
    assert sorted((tmp_path / "log").read_text().splitlines()) == [
        "alone True",
        "together False",
        "together False",
        "together True",
    ]
    assert sorted(path.name for path in (tmp_path / "stages").iterdir()) == ["alone.json", "both.json"]


def test_those_that_follow_take_what_is_done_from_the_stamp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = Stages(tmp_path)
    done = stages.run("step", ["a"], [], lambda: 5)
    monkeypatch.setenv("RANK", "1")
    assert stages.run("step", ["a"], [], lambda: 6) == done
    assert stages.run("step", ["a"], [], lambda: 6, together=True) == done


def test_a_launch_is_one_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with only_writer(tmp_path):
        monkeypatch.setenv("RANK", "1")
        with only_writer(tmp_path):
            assert not leads()


def test_without_a_launcher_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert (leads(), processes(), sharded()) == (True, 1, False)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert sharded()


_TRAINING = """
import sys
from pathlib import Path
from graftllm.records import PreferencePair
from graftllm.training.tuning import Training, train_dpo, train_sft
from graftllm.training_options import DpoOptions, SftOptions
from tests.models import rows

base, out = Path(sys.argv[1]), Path(sys.argv[2])
knobs = {"batch_size": 8, "learning_rate": 1e-3, "max_length": 64}
train_sft(Training(base, out / "sft", 0, "SFT", device="cpu"), rows(16), SftOptions(epochs=2, **knobs))
pairs = [PreferencePair(row.id, row.question, row.answer, "no") for row in rows(8)]
options = DpoOptions(epochs=1, loss="sigmoid", beta=0.1, **knobs)
train_dpo(Training(out / "sft", out / "dpo", 0, "DPO", device="cpu"), pairs, options)
"""


def test_sft_and_dpo_in_two_processes_end_as_in_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, program = save_llama(tmp_path / "base", dtype=torch.float32), tmp_path / "training.py"
    program.write_text(_TRAINING)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--main_process_port", "0", "--mixed_precision", "no", "--num_machines", "1", "--dynamo_backend", "no"]
    launch += [str(program), str(base), str(tmp_path / "two")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(sys, "argv", [str(program), str(base), str(tmp_path / "one")])
    runpy.run_path(str(program))
    found = {}
    for name in ("one", "two"):
        found[name] = [load_file(tmp_path / name / stage / "model.safetensors") for stage in ("sft", "dpo")]
        left = [path.name for path in (tmp_path / name).iterdir() if not path.name.startswith(("sft", "dpo"))]
        assert left == []
    before = load_file(base / "model.safetensors")
    for alone, together in zip(found["one"], found["two"], strict=True):
        for key, value in alone.items():
            torch.testing.assert_close(together[key], value, rtol=1e-5, atol=1e-6)
        assert any((value - before[key]).abs().max() > 1e-3 for key, value in alone.items())
