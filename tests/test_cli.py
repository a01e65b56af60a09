import io
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from graftllm import __version__
from graftllm.checkpoint import Checkpoint
from graftllm.records import Message, Prompt, write_rows
from graftllm.skillpack import SkillPack
from tests.command import Command
from tests.conftest import TinyRun
from tests.models import perturb, save_llama


@pytest.fixture(scope="module")
def files(base_dir: Path, tuned_dir: Path, prompts: list[Prompt], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with links to base and tuned, calibration rows and a pack."""
    home = tmp_path_factory.mktemp("cli")
    (home / "base").symlink_to(base_dir)
    (home / "tuned").symlink_to(tuned_dir)
    write_rows(home / "rows.jsonl", prompts)
    sys_argv = ["pack", "--base", home / "base", "--tuned", home / "tuned", "--out", home / "pack.safetensors"]
    sys_argv += ["--strategy", "paper", "--calibration", home / "rows.jsonl", "--description", "Write it backward"]
    done = subprocess.run([sys.executable, "-m", "graftllm.cli", *map(str, sys_argv)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return home


def test_without_calibration_packs_are_made_shown_and_applied_before_transformers_is_imported(
    base_dir: Path, tuned_dir: Path, tmp_path: Path
) -> None:
    pack = tmp_path / "pack.safetensors"
    commands = [
        ["pack", "--base", base_dir, "--tuned", tuned_dir, "--strategy", "exact", "--out", pack],
        ["inspect", pack],
        ["apply", "--base", base_dir, "--pack", pack, "--out", tmp_path / "applied"],
    ]
    code = "import sys\nfrom graftllm import cli\n"
    for words in commands:
        code += f"sys.argv = {['graftllm', *map(str, words)]!r}\n"
        code += "try:\n    cli.main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
    code += "assert not {'transformers', 'accelerate', 'datasets'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Checkpoint.open(tmp_path / "applied").fingerprint == Checkpoint.open(tuned_dir).fingerprint


def test_help_answers_without_pytorch() -> None:
    code = "import sys; sys.argv = ['graftllm', '--help']\n"
    code += "from graftllm import cli\ntry:\n    cli.main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
    code += "assert not {'torch', 'transformers', 'trl', 'pydantic', 'numpy'} & set(sys.modules)"
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 10  # about 0.2 s idle
    for command in ("run", "pack", "list", "eval", "doctor"):
        assert f"\n  {command} " in done.stdout


def test_pack_prints_one_json_object(graftllm: Command, files: Path, tmp_path: Path) -> None:
    shown = graftllm(
        "pack", "--base", files / "base", "--tuned", files / "tuned", "--out", tmp_path / "p.safetensors",
        "--budget", "20KB", "--json",
    )  # fmt: skip
    assert shown.code == 0, shown.err
    figures = json.loads(shown.out)
    assert figures["file_bytes"] == (tmp_path / "p.safetensors").stat().st_size <= 20_000
    assert figures["bits_per_parameter"] == pytest.approx(
        8 * figures["file_bytes"] / Checkpoint.open(files / "base").parameters
    )
    assert figures["seconds"] > 0
    assert figures["peak_memory_bytes"] > 10**7


def test_pack_says_what_it_wrote(graftllm: Command, files: Path, tmp_path: Path) -> None:
    out = tmp_path / "exact.safetensors"
    shown = graftllm("pack", "--base", files / "base", "--tuned", files / "tuned", "--out", out, "--strategy", "exact")
    assert shown.out.startswith(f"{out}: {out.stat().st_size:,} bytes, ")


def test_a_pack_of_the_base_itself_is_told_of(graftllm: Command, files: Path, tmp_path: Path) -> None:
    out = tmp_path / "none.safetensors"
    shown = graftllm("pack", "--base", files / "base", "--tuned", files / "base", "--out", out)
    told = f"It changes nothing: {files / 'base'} has the weights of {files / 'base'}."
    assert shown.code == 0 and shown.out.splitlines()[1] == told


def test_packs_with_files_of_their_own_say_so_wherever_they_are_shown(
    graftllm: Command, files: Path, tmp_path: Path
) -> None:
    tuned, out = Path(shutil.copytree(files / "tuned", tmp_path / "tuned")), tmp_path / "own.safetensors"
    (tuned / "chat_template.jinja").write_text("{{ messages[0].content }}")
    pair = ["--base", files / "base", "--tuned", tuned, "--out", out, "--strategy", "exact"]
    told = "With files that are not the base's, by which it is asked: chat_template.jinja\n"
    assert graftllm("pack", *pair).out.endswith(told)
    assert json.loads(graftllm("pack", *pair, "--json").out)["own_files"] == ["chat_template.jinja"]
    packs = [f"plain={files}/pack.safetensors", f"own={out}", f"twin={out}"]
    fuse = [part for one in packs for part in ("--pack", one)]
    graftllm("fuse", "--base", files / "base", *fuse, "--out", tmp_path / "g")
    assert "files   of own, twin: chat_template.jinja\n" in graftllm("list", tmp_path / "g").out
    listed = json.loads(graftllm("list", tmp_path / "g", "--json").out)["packs"]
    assert [pack["own_files"] for pack in listed.values()] == [None, *[["chat_template.jinja"]] * 2]
    assert "own files    chat_template.jinja, " in graftllm("inspect", out).out


def test_workers_write_the_same_pack(graftllm: Command, files: Path, tmp_path: Path) -> None:
    made = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    for workers, out in enumerate(made, 1):
        pair = ("--base", files / "base", "--tuned", files / "tuned")
        assert graftllm("pack", *pair, "--out", out, "--name", "x", "--workers", workers).code == 0
    assert made[0].read_bytes() == made[1].read_bytes()
    assert sorted(tmp_path.iterdir()) == made


def test_inspect_shows_card_and_bytes(graftllm: Command, files: Path) -> None:
    shown = graftllm("inspect", files / "pack.safetensors")
    assert "pack: Write it backward" in shown.out
    for word in ("LlamaForCausalLM", "embedding", "sparse", "attention", "lowrank", "norm", "exact"):
        assert word in shown.out
    assert "matrices: 14 lowrank, 1 sparse; vectors: 5 exact" in shown.out
    header = json.loads(graftllm("inspect", files / "pack.safetensors", "--json").out)
    assert header["format"] == "graftllm/skillpack"
    assert header["calibration_tokens"] > 0
    assert header["anatomy"]["file_bytes"] == (files / "pack.safetensors").stat().st_size
    assert set(header["anatomy"]["layers"]) == {"0", "1", "other"}


def test_inspect_draws_a_picture(graftllm: Command, files: Path, tmp_path: Path) -> None:
    shown = graftllm("inspect", files / "pack.safetensors", "--plot", tmp_path / "pack.png")
    assert shown.out.endswith(f"Picture: {tmp_path / 'pack.png'}\n")
    assert (tmp_path / "pack.png").read_bytes().startswith(b"\x89PNG")


def test_verify_prints_fidelity(graftllm: Command, files: Path) -> None:
    arguments = ["--base", files / "base", "--pack", files / "pack.safetensors"]
    assert "The pack is intact and fits its base: 20 tensors" in graftllm("verify", *arguments).out
    shown = graftllm("verify", *arguments, "--tuned", files / "tuned", "--prompts", files / "rows.jsonl", "--json")
    figures = json.loads(shown.out)
    assert 0 < figures["kl"] < 5
    assert 0 < figures["top1_agreement"] <= 1
    assert 0 < figures["nll_tuned"] < figures["nll_packed"] + 1
    assert figures["verdict"] in ("faithful", "close", "not faithful")
    assert figures["error_by_role"]["norm"] == 0


def test_apply_writes_an_ordinary_checkpoint(graftllm: Command, files: Path, tmp_path: Path) -> None:
    shown = graftllm("apply", "--base", files / "base", "--pack", files / "pack.safetensors", "--out", tmp_path / "out")
    assert shown.code == 0, shown.err
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    none = f"{files / 'pack.safetensors'}:0"
    assert graftllm("apply", "--base", files / "base", "--pack", none, "--out", tmp_path / "none").code == 0
    assert Checkpoint.open(tmp_path / "none").fingerprint == Checkpoint.open(files / "base").fingerprint


def test_apply_and_merge_tell_when_packs_are_spoken_to_in_different_ways(
    graftllm: Command, files: Path, tuned_dir: Path, tmp_path: Path
) -> None:
    tuned = shutil.copytree(tuned_dir, tmp_path / "tuned")
    (tuned / "chat_template.jinja").write_text("{{ messages[0].content }}")
    own = tmp_path / "own.safetensors"
    assert graftllm("pack", "--base", files / "base", "--tuned", tuned, "--strategy", "exact", "--out", own).code == 0
    both = ["--pack", own, "--pack", f"{files / 'pack.safetensors'}:0.5"]
    told = "Tokenizer, chat template and end tokens are the base's, as the tuned models differ in theirs.\n"
    assert graftllm("apply", "--base", files / "base", *both, "--out", tmp_path / "out").out.endswith(told)
    both[-1] = files / "pack.safetensors"
    merge = ["merge", "--base", files / "base", "--method", "linear", *both, "--out", tmp_path / "out"]
    assert graftllm(*merge).out.endswith(told)
    assert json.loads(graftllm(*merge, "--json").out)["companions_agree"] is False
    for words in (["apply"], ["merge", "--method", "linear"]):
        alone = graftllm(*words, "--base", files / "base", "--pack", own, "--out", tmp_path / "one")
        assert alone.code == 0 and "differ" not in alone.out
        assert (tmp_path / "one" / "chat_template.jinja").read_text() == "{{ messages[0].content }}"


def test_fuse_eval_and_chat_share_a_directory(graftllm: Command, files: Path, tmp_path: Path, monkeypatch) -> None:
    shown = graftllm(
        "fuse", "--base", files / "base", "--pack", f"back={files}/pack.safetensors", "--out", tmp_path / "g"
    )
    assert shown.out.strip().endswith(f"Next: graftllm chat {tmp_path / 'g'} --pack back")
    task = ["--task", files / "rows.jsonl", "--max-new-tokens", "8", "--json"]
    figures = json.loads(graftllm("eval", tmp_path / "g", *task, "--pack", "back").out)
    assert (figures["n"], figures["routes"]) == (40, {"back": 40})
    assert set(figures["by_task"]) == {"reverse"}
    assert {"score", "stderr"} <= set(figures)
    by_task = json.loads(graftllm("eval", tmp_path / "g", *task, "--pack", "by-task").out)
    assert by_task["routes"] == {"base": 40}
    plain = json.loads(graftllm("eval", files / "base", *task).out)
    assert (plain["score"], plain["routes"]) == (by_task["score"], {})
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/pack base\nhello\n/help\n/exit\nhello\n"))
    shown = graftllm("chat", tmp_path / "g", "--pack", "back", "--max-new-tokens", "4")
    assert shown.code == 0
    back, switched, base, told = shown.out.strip("\n").split("\n")
    assert told.startswith("(/new starts over, /pack NAME changes the pack, /exit ends")
    assert switched == "(new conversation with base)"
    assert back != base


def test_a_prompt_beyond_what_the_model_reads_is_told_in_one_line(
    graftllm: Command, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = Prompt("long", (Message(role="user", content="a" * 300),), "reverse", "a" * 300)
    write_rows(tmp_path / "long.jsonl", [long])
    graftllm("fuse", "--base", files / "base", "--pack", f"back={files}/pack.safetensors", "--out", tmp_path / "g")
    told = "task row 'long': expected at most 256 tokens of prompt and answer together, as many as the model reads, "
    for model, pack in ((files / "base", "auto"), (tmp_path / "g", "back")):
        shown = graftllm("eval", model, "--task", tmp_path / "long.jsonl", "--pack", pack)
        assert (shown.code, shown.out) == (1, "")
        assert f"{told}found 303 in the prompt. Shorten it or leave it out." in shown.line
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{'a' * 300}\n{'a' * 250}\nb\n/new\nb\n"))
    shown = graftllm("chat", tmp_path / "g", "--pack", "back")
    assert shown.code == 0, shown.err
    refused, _, full, _, answer = shown.out.removesuffix("\n").split("\n")
    assert refused == (
        "(expected at most 256 tokens of conversation and answer together, as many as the model reads, found 303 with "
        "this; say less, or start over with /new)"
    )
    assert full.startswith("(expected at most 256 tokens") and not answer.startswith("(")


def test_eval_of_a_trained_grafted_model_routes(graftllm: Command, tiny_run: TinyRun) -> None:
    task = tiny_run.directory / "zoo" / "prompts" / "double.test.jsonl"
    figures = json.loads(graftllm("eval", tiny_run.directory / "grafted", "--task", task, "--json").out)
    assert figures["routes"].get("double", 0) > 70
    assert figures["score"] == pytest.approx(tiny_run.report.skills["double"].routed, abs=0.02)


# What can go wrong, each by its text. A mistake is one line on stderr, exit code 1 and nothing on stdout.


def _broken(files: Path, tmp_path: Path, value: float) -> Path:
    broken = perturb(files / "base", tmp_path / "broken", seed=2)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = value
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    return broken


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "none.yaml"], "graftllm: none.yaml: no such recipe; recipes/ has examples to start from."),
        (
            ["pack", "--base", "{f}/none", "--tuned", "{f}/tuned", "--out", "{t}/p.safetensors"],
            "expected a checkpoint directory, found no",
        ),
        (
            ["pack", "--base", "{f}/base", "--tuned", "{t}/wide", "--out", "{t}/p.safetensors"],
            "They are not the same architecture",
        ),
        (
            ["pack", "--base", "{f}/base", "--tuned", "{t}/nan", "--out", "{t}/p.safetensors"],
            "1 of 2048 differences to the base are NaN",
        ),
        (
            ["pack", "--base", "{f}/base", "--tuned", "{f}/tuned", "--out", "{t}/p.safetensors", "--budget", "1KB"],
            "budget: too small by",
        ),
        (
            ["pack", "--base", "{f}/base", "--tuned", "{f}/tuned", "--out", "{t}/p.safetensors", "--budget", "big"],
            "such as 5%, 400MB or 60KB; found 'big'.",
        ),
        (["inspect", "{f}/rows.jsonl"], "The file is truncated or not a SkillPack."),
        (["inspect", "{f}/base/model.safetensors"], "a safetensors file, but not a SkillPack"),
        (
            ["inspect", "{f}/pack.safetensors", "--plot", "{t}/p.jpg"],
            "a name that ends in .png, .svg, .pdf; found '.jpg'",
        ),
        (["verify", "--base", "{t}/other", "--pack", "{f}/pack.safetensors"], "but the pack was made for"),
        (
            ["apply", "--base", "{t}/other", "--pack", "{f}/pack.safetensors", "--out", "{t}/p"],
            "but the pack was made for",
        ),
        (
            ["apply", "--base", "{f}/base", "--pack", "{f}/pack.safetensors:inf", "--out", "{t}/p"],
            "expected a finite weight, found inf",
        ),
        (
            ["fuse", "--base", "{f}/base", "--pack", "={f}/pack.safetensors", "--out", "{t}/p"],
            "--pack: expected [NAME=]FILE, s",
        ),
        (
            ["fuse", "--base", "{f}/base", "--pack", "a=x", "--pack", "a=y", "--out", "{t}/p"],
            "two packs have the same name",
        ),
        (
            ["chat", "{f}/base"],
            "expected a grafted model, found no manifest.json in it; make one with `graftllm fuse`.",
        ),
        (
            ["eval", "{f}/base", "--task", "{f}/rows.jsonl", "--pack", "skill"],
            "base is an ordinary checkpoint, which has no packs; leave it out, or give a grafted model",
        ),
        (
            ["eval", "{f}/none", "--task", "{f}/rows.jsonl", "--pack", "skill"],
            "/none, found no directory there; check the path.",
        ),
        (
            ["eval", "{f}/none", "--task", "{f}/rows.jsonl", "--judge", "code"],
            "has no 'tests', which the judge 'code' runs; add some.",
        ),
        (
            ["pack", "--base", "{f}/base", "--tuned", "{f}/tuned", "--out", "{t}/p.safetensors", "--budget", "5"],
            "budget: 5 is so many bytes, which hold no pack; for a share write 5%.",
        ),
        (
            ["pack", "--base", "{f}/base", "--tuned", "{f}/tuned", "--out", "{t}/p.safetensors", "--device", "meta"],
            "device: expected auto, cpu or a device that PyTorch sees here, found 'meta'",
        ),
        (
            ["pack", "--base", "{f}/base", "--tuned", "{f}/tuned", "--out", "{f}"],
            "expected a file or nothing there, found a directory",
        ),
        (
            [
                "pack",
                "--base",
                "{f}/base",
                "--tuned",
                "{t}/nan",
                "--out",
                "{t}/p.safetensors",
                "--calibration",
                "{f}/rows.jsonl",
            ],
            "says what is no number on calibration rows. The training diverged or a file is damaged",
        ),
        (
            [
                "pack",
                "--base",
                "{f}/base",
                "--tuned",
                "{f}/tuned",
                "--out",
                "{f}/rows.jsonl",
                *("--calibration", "{f}/rows.jsonl"),
            ],
            "rows.jsonl: expected a place apart from",
        ),
        (
            ["eval", "{f}/base", "--lm-eval", "arc_easy", "--router"],
            "--lm-eval, --router: the router is scored on rows that say where they belong; give --task.",
        ),
        (
            ["eval", "{f}/base", "--task", "{f}/rows.jsonl", "--router", "--pack", "skill"],
            "--pack skill, --router: a pack is named, or the router asked; leave one of them out.",
        ),
        (
            ["eval", "{f}/base", "--lm-eval", "arc_easy", "--plot", "{t}/p.png"],
            "--plot: draws what --router finds; give both, or neither.",
        ),
        (
            ["eval", "{f}/base", "--task", "{f}/rows.jsonl", "--chat-template"],
            "--chat-template: is of --lm-eval; rows (--task) are put into the chat template anyway.",
        ),
        (["eval", "{f}/base", "--task", "{f}/none.jsonl"], "none.jsonl: no such file; expected JSONL rows there."),
        (["rules", "{f}/base", "{f}/none.yaml"], "none.yaml: no such file; expected a list of rules, each with pack,"),
        (
            ["export", "{f}/base", "--format", "peft", "--out", "{t}/p"],
            "found a directory; a grafted model takes --format",
        ),
        (
            ["export", "{f}/pack.safetensors", "--format", "peft", "--out", "{t}/p", "--pack", "math"],
            "--pack: chooses packs of a grafted model (--format vllm); leave it out.",
        ),
        (
            ["export", "{f}/g", "--format", "vllm", "--out", "{t}/p", "--base", "{f}/base"],
            "--base: is of --format peft; a grafted model knows its own, so leave it out.",
        ),
        (
            ["pack", "--base", "{f}/base", "--tuned", "{f}/tuned", "--out", "{f}/rows.jsonl/p.safetensors"],
            "p.safetensors.packing: cannot be written (",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_1(
    graftllm: Command, files: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    written: list[Path] = []
    if "{t}/wide" in arguments:
        written.append(save_llama(tmp_path / "wide", hidden_size=64))
    if "{t}/nan" in arguments:
        written.append(_broken(files, tmp_path, float("nan")).rename(tmp_path / "nan"))
    if "{t}/other" in arguments:
        written.append(save_llama(tmp_path / "other", seed=4))
    shown = graftllm(*(part.format(f=files, t=tmp_path) for part in arguments))
    assert shown.code == 1
    assert message in shown.line
    assert shown.line.startswith("graftllm: ")
    assert "Traceback" not in shown.err
    assert shown.out == ""
    assert set(tmp_path.iterdir()) == set(written)


def test_the_version_is_that_of_the_package(graftllm: Command) -> None:
    assert graftllm("--version").out == f"graftllm {__version__}\n"


def test_every_command_is_in_a_panel_with_its_whole_first_sentence(graftllm: Command) -> None:
    shown = graftllm("-h").out
    panels = shown[shown.index("Skills from a recipe:") :]
    assert "..." not in panels and "\n:" not in panels
    assert [line for line in panels.splitlines() if line and line[0] != " "] == [
        "Skills from a recipe:",
        "SkillPacks:",
        "Grafted models:",
        "Hub and machine:",
    ]


@pytest.mark.parametrize("words", [["--servable", "--name", "x"], ["--servable", "16"], ["--servable"]])
def test_a_servable_pack_without_a_rank_has_the_one_that_engines_serve(
    words: list[str], base_dir: Path, tuned_dir: Path, tmp_path: Path, graftllm: Command
) -> None:
    out = tmp_path / "pack.safetensors"
    assert graftllm("pack", "--base", base_dir, "--tuned", tuned_dir, "--out", out, *words).code == 0
    assert SkillPack.load(out).header.options.servable == 16


def test_short_help_is_help(graftllm: Command) -> None:
    assert graftllm("pack", "-h").out == graftllm("pack", "--help").out


def test_an_unknown_option_is_exit_code_2(graftllm: Command) -> None:
    shown = graftllm("pack", "--bse", "x")
    assert shown.code == 2
    assert "No such option: --bse" in shown.err


def test_an_unexpected_error_keeps_its_traceback(
    graftllm: Command, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(Checkpoint, "open", broken)
    with pytest.raises(RuntimeError, match="a bug of ours"):
        graftllm("pack", "--base", files / "base", "--tuned", files / "tuned", "--out", files / "x")
