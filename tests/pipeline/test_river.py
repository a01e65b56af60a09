"""The whole river on a zoo that is trained on the spot."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from graftllm.checkpoint import Checkpoint
from graftllm.evaluation.plots import PLOTS
from graftllm.fusion.grafted import GraftedModel
from graftllm.fusion.manifest import read_manifest
from graftllm.header import Card
from graftllm.pipeline import packing, river, transfer
from graftllm.pipeline.work import open_work
from graftllm.records import read_pairs, read_prompts, read_responses, write_rows
from graftllm.skillpack import SkillPack
from tests.conftest import TinyRun


def _command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "graftllm.cli", *map(str, arguments)]


def test_skills_move_from_foreign_sources_into_the_target(tiny_run: TinyRun) -> None:
    for skill, found in tiny_run.report.skills.items():
        assert found.source > found.base + 0.5, skill
        assert found.tuned > found.base + 0.2, skill


def test_packs_keep_the_skills_and_the_router_finds_them(tiny_run: TinyRun) -> None:
    for skill, found in tiny_run.report.skills.items():
        assert found.pack - found.base > 0.75 * (found.tuned - found.base), skill
        assert abs(found.routed - found.pack) <= 0.05, skill
    assert tiny_run.report.router.accuracy > 0.95


def test_the_grafted_model_forgets_nothing_where_tuning_does(tiny_run: TinyRun) -> None:
    report = tiny_run.report
    for found in report.general.values():
        assert abs(found.routed - found.base) <= 0.05
        assert found.tuned_mean < found.base - 0.3
    first = next(iter(report.skills))
    assert report.sequential[first] < report.skills[first].routed - 0.2
    assert all(report.summed[skill] < found.routed - 0.2 for skill, found in report.skills.items())
    assert report.forgetting.rows == ["base", "fine-tuned after next", "fine-tuned after double", "grafted, routed"]
    assert report.unplug_bit_exact


def test_packs_are_small_and_their_figures_those_of_the_files(tiny_run: TinyRun) -> None:
    for name, found in tiny_run.report.packs.items():
        file = tiny_run.directory / "packs" / f"{name}.safetensors"
        assert found.file_bytes == file.stat().st_size
        assert found.file_bytes <= 0.18 * found.tuned_bytes
        assert found.bits_per_parameter == pytest.approx(8 * found.file_bytes / _tuned(tiny_run, name).parameters)
        assert found.kl_to_tuned < 0.2
        card = SkillPack.load(file).header.card
        assert card.scores["tuned"] == tiny_run.report.skills[name].tuned
        assert card.provenance.sft_rows == len(read_prompts(tiny_run.directory / "skills" / name / "sft.jsonl"))


def _tuned(tiny_run: TinyRun, skill: str) -> Checkpoint:
    return Checkpoint.open(tiny_run.directory / "skills" / skill / "tuned")


def test_rows_hold_only_what_the_judge_found_right(tiny_run: TinyRun) -> None:
    home = tiny_run.directory / "skills" / "next"
    references = {p.id: p.reference for p in read_prompts(tiny_run.directory / "zoo" / "prompts" / "next.jsonl")}
    assert all(row.answer == references[row.id] for row in read_prompts(home / "sft.jsonl"))
    for pair in read_pairs(home / "pairs.jsonl"):
        assert pair.chosen.strip() == references[pair.prompt_id] != pair.rejected.strip()
    assert len(read_responses(home / "responses.jsonl")) == 2 * len(references)


def test_test_words_are_in_no_training_row(tiny_run: TinyRun) -> None:
    prompts = tiny_run.directory / "zoo" / "prompts"
    tested = {
        row.messages[0]["content"].split()[-1] for path in prompts.glob("*.test.jsonl") for row in read_prompts(path)
    }
    trained = {
        row.messages[0]["content"].split()[-1]
        for path in prompts.glob("*.jsonl")
        if not path.name.endswith(".test.jsonl")
        for row in read_prompts(path)
    }
    assert tested
    assert not tested & trained


def test_the_report_has_its_fixed_keys(tiny_run: TinyRun) -> None:
    report = json.loads((tiny_run.directory / "report.json").read_text())
    assert {"source", "base", "tuned", "pack", "routed", "n"} <= set(report["skills"]["next"])
    assert {"base", "tuned_mean", "routed", "n"} <= set(report["general"]["copy"])
    assert {"file_bytes", "tuned_bytes", "bits_per_parameter", "kl_to_tuned"} <= set(report["packs"]["next"])
    assert {"accuracy", "n"} <= set(report["router"])
    for baseline in ("sequential", "summed", "lora"):
        assert set(report[baseline]) == {"next", "double"}
        assert all(isinstance(score, float) for score in report[baseline].values())
    assert report["unplug_bit_exact"] is True
    assert {"zoo", "sample", "score", "sft", "dpo", "pack", "verify", "fuse", "evaluate"} <= set(report["seconds"])
    assert report["peak_memory_bytes"] > 10**8
    assert report["seed"] == 0


def test_the_report_is_shown_with_its_plots(tiny_run: TinyRun) -> None:
    text = (tiny_run.directory / "report.md").read_text()
    for file in PLOTS:
        assert f"(plots/{file})" in text
        assert (tiny_run.directory / "plots" / file).read_bytes().startswith(b"\x89PNG")
    assert f"{100 * tiny_run.report.skills['next'].tuned:.1f} ± " in text


@pytest.mark.parametrize("moved", [False, True], ids=["there", "moved"])
def test_a_finished_run_does_nothing_again(tiny_run: TinyRun, tmp_path: Path, moved: bool) -> None:
    directory = shutil.copytree(tiny_run.directory, tmp_path / "moved") if moved else tiny_run.directory
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}
    again = river.run(open_work(tiny_run.recipe, directory))
    assert again.model_copy(update={"seconds": {}, "peak_memory_bytes": 0}) == tiny_run.report.model_copy(
        update={"seconds": {}, "peak_memory_bytes": 0}
    )
    after = {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}
    written = {path.name for path, changed in after.items() if before.get(path) != changed}
    assert written <= {"report.json", "report.md", "recipe.yaml", "files.sha256", *PLOTS}


def test_a_damaged_shelf_is_made_anew_without_training(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = shutil.copytree(tiny_run.directory, tmp_path / "run")
    with open(directory / "grafted" / "packs" / "next.safetensors", "ab") as file:
        file.write(b"x")
    monkeypatch.setattr(packing, "compress_to", lambda *_, **__: pytest.fail("it was packed again"))
    monkeypatch.setattr(transfer, "train_sft", lambda *_, **__: pytest.fail("it was trained again"))
    river.run(open_work(tiny_run.recipe, directory))
    assert GraftedModel.load(directory / "grafted").packs


def test_the_grafted_model_answers(tiny_run: TinyRun) -> None:
    grafted = GraftedModel.load(tiny_run.directory / "grafted")
    row = read_prompts(tiny_run.directory / "zoo" / "prompts" / "next.test.jsonl")[0]
    assert grafted.route([row.question])[0].name == "next"
    assert len(grafted.generate([row.question])) == 1


SHORT = """
name: short
target: {zoo}/target
skills:
  next: {{sources: [{zoo}/qwen3-next], prompts: {home}/some.jsonl, test: {zoo}/prompts/next.test.jsonl}}
general: {{prompts: {zoo}/prompts/general.jsonl, test: {zoo}/prompts/general.test.jsonl}}
sampling: {{samples: 1, temperature: 1.0, top_p: 1.0, max_new_tokens: 16, batch_size: 50}}
sft: {{epochs: 2, batch_size: 32, learning_rate: 2.0e-3, max_length: 64}}
dpo: null
pack: {{strategy: auto, budget: 30%}}
"""


def _short(tiny_run: TinyRun, home: Path) -> Path:
    """Write a recipe of one skill and few prompts."""
    zoo = tiny_run.directory / "zoo"
    write_rows(home / "some.jsonl", read_prompts(zoo / "prompts" / "next.jsonl")[:300])
    (home / "short.yaml").write_text(SHORT.format(zoo=zoo, home=home))
    return home / "short.yaml"


def _killed_when(path: Path, command: list[str], how: signal.Signals) -> tuple[int, str]:
    """Run a command until `path` exists, then send it a signal; return its exit code and stderr."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not path.exists() and process.poll() is None:
        try:
            process.wait(timeout=0.02)
        except subprocess.TimeoutExpired:
            continue
    process.send_signal(how)
    return process.wait(timeout=300), process.communicate()[1]


def _but_for_overheads(path: Path) -> tuple[Card, object, dict[str, bytes]]:
    """Return what a pack holds but for what making it took."""
    pack = SkillPack.load(path)
    card, tensors = pack.header.card.model_copy(update={"overheads": {}}), pack.header.tensors
    return card, tensors, {name: pack.encoded(name).payload.tobytes() for name in tensors}


def test_a_run_killed_again_and_again_ends_as_one_never_killed(tiny_run: TinyRun, tmp_path: Path) -> None:
    recipe = _short(tiny_run, tmp_path)
    expected = river.run(open_work(recipe, tmp_path / "whole"))
    killed, pack = tmp_path / "killed", "packs/next.safetensors"
    command = _command("run", recipe, "--dir", killed, "--json")
    for moment in ("skills/next/responses.jsonl", "skills/next/.tuned.training", "stages/pack.next.started"):
        code, _ = _killed_when(killed / moment, command, signal.SIGKILL)
        assert code == -signal.SIGKILL, f"finished before {moment} appeared"
    finished = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stderr
    report = json.loads(finished.stdout)
    assert report["skills"] == json.loads(expected.model_dump_json())["skills"]
    router = read_manifest(tmp_path / "whole" / "grafted").router
    assert router is not None
    for artifact in ("skills/next/tuned/model.safetensors", f"grafted/{router.file}"):
        assert (killed / artifact).read_bytes() == (tmp_path / "whole" / artifact).read_bytes(), artifact
    assert _but_for_overheads(killed / pack) == _but_for_overheads(tmp_path / "whole" / pack)
    assert not list(killed.rglob("*.partial"))
    assert not list(killed.rglob("*.training"))


def test_ctrl_c_is_exit_code_130_and_says_how_to_go_on(tiny_run: TinyRun, tmp_path: Path) -> None:
    recipe = _short(tiny_run, tmp_path)
    command = _command("run", recipe, "--dir", tmp_path / "run")
    code, stderr = _killed_when(tmp_path / "run" / "stages" / "sft.next.started", command, signal.SIGINT)
    assert code == 130, stderr
    assert stderr.strip().endswith("graftllm: interrupted; run the same command again to go on where it was.")
    assert "Traceback" not in stderr


def test_a_source_without_the_skill_is_shown(tiny_run: TinyRun, tmp_path: Path) -> None:
    recipe = _short(tiny_run, tmp_path)
    recipe.write_text(recipe.read_text().replace("qwen3-next]", "mistral-double]"))
    done = subprocess.run(
        _command("run", recipe, "--dir", tmp_path / "run"), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "graftllm: skill 'next': none of 300 responses of mistral-double is right. For example: 'next "
    )
    assert last.endswith("Check the judge and the references, or choose a source that has the skill.")
