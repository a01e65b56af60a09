import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from graftllm.checkpoint import INDEX, Checkpoint
from graftllm.cli import app
from graftllm.delta import Delta
from graftllm.errors import FusionError, GraftError, PackError, StorageError
from graftllm.fusion.applying import apply_packs
from graftllm.fusion.inputs import Tuned, open_tuned
from graftllm.fusion.merging import merge
from graftllm.fusion.methods.table import METHODS
from graftllm.fusion.search import answer_loss
from graftllm.loading import load_model, load_tokenizer
from graftllm.packer import compress
from graftllm.packing_options import PackOptions
from graftllm.records import write_rows
from graftllm.skillpack import SkillPack
from tests.models import perturb, rows, save_llama, with_vocabulary

PLAIN = {"density": 1.0, "scale": 1.0}


@pytest.fixture(scope="module")
def tuned_dirs(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("tuned")
    return {name: perturb(base_dir, home / name, seed=seed) for seed, name in enumerate(("code", "math"), start=11)}


@pytest.fixture(scope="module")
def models(base: Checkpoint, tuned_dirs: dict[str, Path]) -> list[Tuned]:
    return [open_tuned(base, path, name=name) for name, path in tuned_dirs.items()]


def knobs(name: str, **given: float):
    row = METHODS[name]
    return row.knobs({key: value for key, value in given.items() if key in row.defaults})


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["merge", *map(str, arguments)], catch_exceptions=True)
    if isinstance(result.exception, GraftError):
        return f"error: {result.exception}"
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize(("method", "place"), [("linear", "out"), ("emr", "out/math"), ("linear", "out.safetensors")])
def test_a_merge_replaces_no_model_that_was_trained(
    method: str, place: str, base: Checkpoint, models: list[Tuned], tuned_dirs: dict[str, Path], tmp_path: Path
) -> None:
    trained, there = tuned_dirs["code"], tmp_path / place
    if there.suffix:
        shutil.copy(trained / "model.safetensors", there)
    else:
        shutil.copytree(trained, there)
    with pytest.raises(StorageError, match="which would be lost; choose another place"):
        merge(base, models, METHODS[method], there if there.parent == tmp_path else there.parent)
    (left,) = tmp_path.rglob("*.safetensors")
    assert left.read_bytes() == (trained / "model.safetensors").read_bytes()


def test_weights_that_lead_beyond_the_dtype_are_refused_and_nothing_is_left(
    base: Checkpoint, models: list[Tuned], tmp_path: Path
) -> None:
    told = "expected weights whose sum stays within BF16, found values beyond it; take smaller ones"
    with pytest.raises(FusionError, match=told):
        merge(base, [replace(model, weight=1e39) for model in models], METHODS["task-arithmetic"], tmp_path / "out")
    pack = compress(Delta(base, Checkpoint.open(models[0].origin.tuned.path)), PackOptions(strategy="exact"))
    with pytest.raises(FusionError, match=told):
        apply_packs(base, [(pack, 1e39)], tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["task-arithmetic", "ties", "sce", "emr"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_model_with_everything_kept_comes_back_bit_for_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = Checkpoint.open(save_llama(tmp_path / "base", dtype=dtype))
    tuned = Checkpoint.open(save_llama(tmp_path / "one", dtype=dtype, seed=1))
    for origin in (Delta(base, tuned), compress(Delta(base, tuned), PackOptions(strategy="exact"))):
        made = merge(base, [Tuned("one", origin)], METHODS[name], tmp_path / "out", knobs=knobs(name, **PLAIN))
        (place,) = made.outputs.values()
        assert Checkpoint.open(place).fingerprint == tuned.fingerprint


def test_a_merged_checkpoint_loads_with_its_tokenizer(
    base: Checkpoint, models: Sequence[Tuned], tmp_path: Path
) -> None:
    made = merge(base, models, METHODS["ties"], tmp_path / "out")
    assert made.outputs == {"": tmp_path / "out"} and made.stored_bytes == sum(s.nbytes for s in base.specs.values())
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("name", [name for name, row in METHODS.items() if row.rows is None])
def test_the_order_of_models_does_not_change_a_bit(
    name: str, base: Checkpoint, models: Sequence[Tuned], tmp_path: Path
) -> None:
    one = merge(base, models, METHODS[name], tmp_path / "one").outputs
    other = merge(base, models[::-1], METHODS[name], tmp_path / "other").outputs
    assert list(one) == list(other) == (["code", "math"] if METHODS[name].per_task else [""])
    for task, place in one.items():
        assert Checkpoint.open(place).fingerprint == Checkpoint.open(other[task]).fingerprint


def test_packs_and_checkpoints_merge_with_each_other(
    base: Checkpoint, tuned_dirs: dict[str, Path], models: Sequence[Tuned], tmp_path: Path
) -> None:
    pack = compress(Delta(base, Checkpoint.open(tuned_dirs["code"])), PackOptions(strategy="exact"))
    pack.save(tmp_path / "code.safetensors")
    mixed = [open_tuned(base, tmp_path / "code.safetensors", name="code"), models[1]]
    found = [merge(base, some, METHODS["dare-ties"], tmp_path / "out").outputs[""] for some in (models, mixed)]
    assert Checkpoint.open(found[0]).fingerprint == Checkpoint.open(found[1]).fingerprint


def test_a_merge_becomes_a_pack(base: Checkpoint, models: Sequence[Tuned], tmp_path: Path) -> None:
    whole = merge(base, models, METHODS["linear"], tmp_path / "whole").outputs[""]
    out = tmp_path / "out.safetensors"
    options = PackOptions(strategy="exact")
    assert merge(base, models, METHODS["linear"], out, pack=options).outputs == {"": out}
    pack = SkillPack.load(out)
    assert pack.header.card.name == "out"
    expected = Checkpoint.open(whole)
    assert all(torch.equal(pack.restore(n, base.tensor(n)), expected.tensor(n)) for n in base.names())
    each = merge(base, models, METHODS["emr"], out, pack=options).outputs
    assert each == {name: tmp_path / f"out-{name}.safetensors" for name in ("code", "math")}
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "out-code.safetensors", "out-math.safetensors", "out.safetensors", "whole",
    ]  # fmt: skip


@pytest.mark.parametrize("name", [row.name for row in METHODS.values() if row.rows is None])
def test_a_parameter_that_holds_nothing_stays_so(name: str, tmp_path: Path) -> None:
    dirs = [save_llama(tmp_path / str(seed), seed=seed) for seed in range(3)]
    for place in dirs:
        file = place / "model.safetensors"
        save_file({**load_file(file), "model.nothing": torch.zeros(0, 4)}, file, metadata={"format": "pt"})
    base = Checkpoint.open(dirs[0])
    tuned = [open_tuned(base, place, name=place.name) for place in dirs[1:]]
    for place in merge(base, tuned, METHODS[name], tmp_path / "out").outputs.values():
        assert Checkpoint.open(place).tensor("model.nothing").shape == (0, 4)


def test_regmean_leaves_one_model_as_it_is_and_draws_two_together(
    base: Checkpoint, models: Sequence[Tuned], tmp_path: Path
) -> None:
    prompts = {name: rows(6, seed=seed) for seed, name in enumerate(("code", "math"))}
    alone = merge(base, models[:1], METHODS["regmean"], tmp_path / "one", rows=prompts).outputs[""]
    both = merge(base, models, METHODS["regmean"], tmp_path / "both", rows=prompts).outputs[""]
    average = merge(base, models, METHODS["linear"], tmp_path / "average").outputs[""]
    name, vector = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"
    one, two, mean = (load_file(place / "model.safetensors") for place in (alone, both, average))
    assert isinstance(models[0].origin, Delta)
    assert torch.allclose(one[name].float(), models[0].origin.tuned.tensor(name).float(), atol=2e-3)
    assert torch.equal(two[vector], mean[vector]) and not torch.equal(two[name], mean[name])
    with pytest.raises(FusionError, match=r"merge: regmean needs answered prompts of every model; give rows of 'math'"):
        merge(base, models, METHODS["regmean"], tmp_path / "out", rows={"code": prompts["code"]})


def test_lorahub_finds_weights_that_answer_no_worse_than_the_base(
    base: Checkpoint, models: Sequence[Tuned], tmp_path: Path
) -> None:
    prompts = {name: rows(4, seed=seed) for seed, name in enumerate(("code", "math"))}
    few = [*prompts["code"], *prompts["math"]]
    made = merge(base, models, METHODS["lorahub"], tmp_path / "found", rows=prompts)
    assert set(made.weights) == {"code", "math"} and all(abs(weight) <= 1.5 for weight in made.weights.values())
    found, before = (
        answer_loss(load_model(place, device="cpu"), load_tokenizer(base.path), few)
        for place in (tmp_path / "found", base.path)
    )
    assert found + 0.05 * sum(map(abs, made.weights.values())) / 2 <= before + 1e-6


def test_lorahub_answers_rows_of_no_model_too(
    base: Checkpoint, models: Sequence[Tuned], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr("graftllm.fusion.merging.answer_loss", lambda live, words, few: seen.append(few) or 0.0)
    prompts = {name: rows(2, task=name) for name in ("math", "general", "code")}
    merge(base, models, METHODS["lorahub"], tmp_path / "out", rows=prompts)
    assert [row.task for row in seen[0]] == ["code", "code", "general", "general", "math", "math"]
    assert Checkpoint.open(tmp_path / "out").fingerprint == base.fingerprint  # nothing answers better than it


def test_rows_are_answered_by_their_references_or_refused(base: Checkpoint) -> None:
    live, words = load_model(base.path, device="cpu"), load_tokenizer(base.path)
    told, asked = rows(3), rows(3, answered=False)
    assert answer_loss(live, words, told) == answer_loss(live, words, asked)
    open_ended = replace(asked[1], reference=None)
    with pytest.raises(FusionError, match=r"--rows: row 'reverse-1' has neither an assistant message nor a reference"):
        answer_loss(live, words, [asked[0], open_ended])


def test_buffers_that_are_no_numbers_to_average_are_kept_where_models_agree(base_dir: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "one", "two")):
        perturb(base_dir, tmp_path / name, seed=seed)
        tensors = load_file(tmp_path / name / "model.safetensors")
        tensors["model.steps"] = torch.tensor([min(seed, 1), 5])
        tensors["model.disputed"] = torch.tensor(seed)
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    base = Checkpoint.open(tmp_path / "base")
    models = [open_tuned(base, tmp_path / name, name=name) for name in ("one", "two")]
    merge(base, models, METHODS["ties"], tmp_path / "out")
    out = Checkpoint.open(tmp_path / "out")
    assert out.tensor("model.steps").tolist() == [1, 5] and out.tensor("model.disputed").item() == 0


def test_settings_that_models_do_not_share_stay_the_bases(base_dir: Path, tmp_path: Path) -> None:
    def place(name: str, end: int, pad: int) -> Path:
        settings = json.loads((perturb(base_dir, tmp_path / name, seed=end) / "config.json").read_text())
        settings |= {"eos_token_id": end, "pad_token_id": pad}
        (tmp_path / name / "config.json").write_text(json.dumps(settings))
        return tmp_path / name

    base = Checkpoint.open(base_dir)
    end, pad = base.config["eos_token_id"], 9
    assert end not in (5, 7) and base.config["pad_token_id"] != pad
    one, two, plain = place("one", 5, pad), place("two", 7, pad), place("plain", end, pad)
    for first, second in ((one, two), (two, one), (one, plain), (plain, one)):
        both = [open_tuned(base, first, name="a"), open_tuned(base, second, name="b")]
        merge(base, both, METHODS["linear"], tmp_path / "out")
        packs = [
            compress(Delta(base, Checkpoint.open(tuned)), PackOptions(strategy="exact")) for tuned in (first, second)
        ]
        apply_packs(base, [(pack, 0.5) for pack in packs], tmp_path / "applied")
        for out in ("out", "applied"):
            found = Checkpoint.open(tmp_path / out).config
            assert (found["eos_token_id"], found["pad_token_id"]) == (end, pad)


@pytest.mark.parametrize("name", [n for n, r in METHODS.items() if r.weighted and not r.per_task and not r.rows])
def test_a_model_of_weight_zero_is_as_if_it_were_not_given(
    name: str, base: Checkpoint, models: Sequence[Tuned], tmp_path: Path
) -> None:
    alone = merge(base, models[:1], METHODS[name], tmp_path / "alone")
    made = merge(base, [models[0], replace(models[1], weight=0.0)], METHODS[name], tmp_path / "both")
    found = [Checkpoint.open(one.outputs[""]).fingerprint for one in (alone, made)]
    assert found[0] == found[1] != base.fingerprint
    assert made.weights == {"code": 1.0, "math": 0.0} and made.stored_bytes == alone.stored_bytes
    merge(base, [replace(one, weight=0.0) for one in models], METHODS[name], tmp_path / "none")
    assert Checkpoint.open(tmp_path / "none").fingerprint == base.fingerprint


def test_a_model_of_weight_zero_needs_no_rows_and_may_have_another_vocabulary(
    base: Checkpoint, models: Sequence[Tuned], tmp_path: Path
) -> None:
    grown = open_tuned(base, with_vocabulary(base.path, tmp_path / "grown", 80), name="grown", weight=0.0)
    merge(base, [models[0], grown], METHODS["regmean"], tmp_path / "out", rows={"code": rows(3)})
    assert Checkpoint.open(tmp_path / "out").specs == base.specs


def test_a_model_of_weight_zero_keeps_its_own_where_each_has_one(
    base: Checkpoint, models: Sequence[Tuned], tmp_path: Path
) -> None:
    idle = [models[0], replace(models[1], weight=0.0)]
    made = merge(base, idle, METHODS["twin"], tmp_path / "out", knobs=METHODS["twin"].knobs({"rank": 999}))
    assert list(made.outputs) == ["code", "math"]
    for one, place in zip(models, made.outputs.values(), strict=True):
        assert isinstance(one.origin, Delta)
        name = "model.layers.0.mlp.up_proj.weight"
        assert torch.allclose(Checkpoint.open(place).tensor(name), one.origin.tuned.tensor(name), atol=1e-2)


def test_shards_and_added_vocabulary_are_written(tmp_path: Path) -> None:
    save_llama(tmp_path / "whole")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype="auto")
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    base = Checkpoint.open(tmp_path / "base")
    grown = with_vocabulary(tmp_path / "whole", tmp_path / "grown", 80)
    merge(base, [open_tuned(base, grown, name="grown")], METHODS["task-arithmetic"], tmp_path / "out")
    out = Checkpoint.open(tmp_path / "out")
    assert out.config["vocab_size"] == 80 and out.specs == Checkpoint.open(grown).specs
    total = json.loads((out.path / INDEX).read_text())["metadata"]["total_size"]
    assert total == sum(spec.nbytes for spec in out.specs.values())
    same = open_tuned(base, tmp_path / "whole", name="same")
    with pytest.raises(FusionError, match=r"same vocabulary and dtype merge"):
        merge(base, [open_tuned(base, grown, name="grown"), same], METHODS["ties"], tmp_path / "no")


def test_bad_input_is_refused_and_nothing_is_written(base: Checkpoint, models: Sequence[Tuned], tmp_path: Path) -> None:
    with pytest.raises(FusionError, match="two models are called 'code'"):
        merge(base, [models[0], models[0]], METHODS["ties"], tmp_path / "out")
    with pytest.raises(FusionError, match="expected at least one pack or tuned model"):
        merge(base, [], METHODS["ties"], tmp_path / "out")
    other = Checkpoint.open(save_llama(tmp_path / "other", seed=9))
    foreign = compress(Delta(other, base), PackOptions(strategy="exact"))
    with pytest.raises(PackError, match="but the pack was made for"):
        merge(base, [Tuned("foreign", foreign)], METHODS["ties"], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]


def _contents(place: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(place.rglob("*")) if file.is_file()}


@pytest.mark.parametrize(
    ("method", "out"),
    [
        ("emr", "runs"),  # writes runs/code, which is read
        ("ties", "runs/code"),
        ("ties", "runs/code/merged"),
        ("ties", "runs"),
        ("ties", "runs/pack.safetensors"),
        ("ties", "runs/code/model.safetensors"),
        ("ties", "base/merged"),
        ("ties", "link"),
    ],
)
def test_a_merge_spares_what_it_reads(
    base_dir: Path, tuned_dirs: dict[str, Path], tmp_path: Path, method: str, out: str
) -> None:
    shutil.copytree(base_dir, tmp_path / "base")
    for name, place in tuned_dirs.items():
        shutil.copytree(place, tmp_path / "runs" / name)
    shutil.copy(base_dir / "config.json", tmp_path / "runs")  # so that a checkpoint may stand there
    base, runs = Checkpoint.open(tmp_path / "base"), tmp_path / "runs"
    compress(Delta(base, Checkpoint.open(runs / "code")), PackOptions(strategy="exact")).save(runs / "pack.safetensors")
    (tmp_path / "link").symlink_to(runs)
    before, inputs = _contents(tmp_path), ["--tuned", runs / "code", "--tuned", runs / "math"]
    inputs += ["--pack", runs / "pack.safetensors"]
    said = run("--base", base.path, "--method", method, *inputs, "--out", tmp_path / out)
    assert said.startswith(f"error: {tmp_path / out}") and ": expected a place apart from " in said
    assert said.endswith(", which is read; choose another one.")
    assert _contents(tmp_path) == before


def test_packs_are_spared_when_they_are_applied(base: Checkpoint, models: Sequence[Tuned], tmp_path: Path) -> None:
    assert isinstance(models[0].origin, Delta)
    merge(base, models, METHODS["linear"], tmp_path / "out")
    compress(models[0].origin, PackOptions(strategy="exact")).save(tmp_path / "out" / "code.safetensors")
    before, pack = _contents(tmp_path), SkillPack.load(tmp_path / "out" / "code.safetensors")
    with pytest.raises(StorageError, match=r"out: expected a place apart from .*code.safetensors, which is read; choo"):
        apply_packs(base, [(pack, 1.0)], tmp_path / "out")
    assert _contents(tmp_path) == before


def test_a_path_with_an_equals_sign_or_a_colon_is_a_path_where_it_is_there(
    base_dir: Path, tuned_dirs: dict[str, Path], tmp_path: Path
) -> None:
    places = [tmp_path / "lr=1e-5" / "tuned", tmp_path / "run:2"]
    for place in places:
        shutil.copytree(tuned_dirs["code"], place)
    common = ["--base", base_dir, "--method", "linear", "--out", tmp_path / "out", "--json"]
    found = run(*common, "--tuned", f"{places[0]}:0.5", "--tuned", places[1], "--tuned", f"x={places[0]}")
    assert json.loads(found)["weights"] == {"run:2": 1.0, "tuned": 0.5, "x": 1.0}


@pytest.mark.parametrize(
    "arguments", [["merge", "--list", "--json"], ["merge", "--json", "--list"], ["--json", "merge", "--list"]]
)
def test_the_methods_are_one_json_object_wherever_that_is_asked_for(arguments: list[str]) -> None:
    found = json.loads(CliRunner().invoke(app, arguments).stdout)
    assert list(found) == list(METHODS)
    assert found["ties"]["defaults"] == METHODS["ties"].defaults


def test_the_command_merges_and_lists(base_dir: Path, tuned_dirs: dict[str, Path], tmp_path: Path) -> None:
    listed = run("--list")
    assert all(name in listed for name in METHODS) and "2306.01708" in listed
    common = ["--base", base_dir, "--out", tmp_path / "out"]
    models = ["--tuned", tuned_dirs["code"], "--tuned", f"prose={tuned_dirs['math']}:0.5"]
    said = run(*common, *models, "--method", "ties", "--density", "0.4")
    assert f"{tmp_path / 'out'}: {base_dir} with code, prose by ties" in said
    found = json.loads(run(*common, *models, "--method", "linear", "--json"))
    assert found["outputs"] == {"merged": str(tmp_path / "out")}
    assert found["weights"] == {"code": 1.0, "prose": 0.5}
    write_rows(tmp_path / "rows.jsonl", [*rows(4, task="code"), *rows(4, task="prose")])
    run(*common, *models, "--method", "regmean", "--rows", tmp_path / "rows.jsonl")
    said = run(
        "--base", base_dir, "--out", tmp_path / "a.safetensors", *models, "--method", "linear", "--budget", "40%"
    )
    assert f"a.safetensors ({(tmp_path / 'a.safetensors').stat().st_size:,} bytes): {base_dir} with" in said
    run("--base", base_dir, "--out", tmp_path / "b", "--pack", f"{tmp_path / 'a.safetensors'}:2", "--method", "linear")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "tie"], "error: --method: expected one of linear"),
        (["--method", "ties", "--rank", "4"], "error: --rank: ties has no such knob"),
        (
            ["--method", "sce", "--pack", "p.safetensors:2"],
            "error: weight: sce takes none, found 2; leave it out.",
        ),
        (["--method", "ties", "--pack", "=p.safetensors"], "error: merge: expected [NAME=]PLACE[:WEIGHT]"),
        (["--method", "ties"], "error: merge: expected at least one pack or tuned model, found none."),
        (["--method", "ties", "--pack", "absent.safetensors"], "error: absent.safetensors: "),
        (["--method", "emr", "--tuned", "../evil={t}"], "error: pack '../evil': expected a plain name other than base"),
        (
            ["--method", "ties", "--tuned", "{t}", "--budget", "5%"],
            "error: --budget: is of a SkillPack, and out would be a checkpoint; end --out in .safetensors, or leave",
        ),
        (["--method", "ties", "--tuned", "{t}", "--budget", "foo"], "error: budget: expected "),
        (
            ["--method", "linear", "--tuned", "a={t}:1", "--tuned", "b={t}:-1"],
            "error: merge: expected weights (FILE:WEIGHT) whose sum is not 0, because an average divides by it; found",
        ),
    ],
)
def test_the_command_says_what_is_wrong(
    arguments: list[str], message: str, base_dir: Path, tuned_dirs: dict[str, Path], tmp_path: Path
) -> None:
    arguments = [one.format(t=tuned_dirs["code"]) for one in arguments]
    assert run("--base", base_dir, "--out", tmp_path / "out", *arguments).startswith(message)
    assert list(tmp_path.iterdir()) == []
