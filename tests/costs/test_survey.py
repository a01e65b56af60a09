"""What is counted, what is read from configurations, and what is assumed."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import LlamaConfig

from graftllm.checkpoint import Checkpoint
from graftllm.costs.amounts import GENERAL, amounts
from graftllm.costs.hardware import hardware
from graftllm.costs.launching import Launch, fitting, read_launch
from graftllm.costs.models import shape_by_name, sized
from graftllm.costs.prompts import Assumed, count_prompts
from graftllm.costs.survey import numbers_per_rank, survey
from graftllm.costs.tables import assumptions, closing_lines, estimates, figures, hardware_grid, rows_grid, warnings
from graftllm.errors import RecipeError
from graftllm.loading import load_tokenizer
from graftllm.recipe import Recipe, load_recipe
from graftllm.records import write_rows
from graftllm.rendering import render
from graftllm.training.lora import lora_parameters_per_rank
from graftllm.transfer_options import PromptSet
from tests.models import rows

RECIPES = Path(__file__).parents[2] / "recipes"
LLAMA = RECIPES / "implicit-fusion-llama3.1-8b.yaml"
LAUNCHES = sorted((RECIPES / "accelerate").glob("*.yaml"))


def test_prompts_that_are_here_are_counted_once_each(tmp_path: Path, base_dir: Path) -> None:
    write_rows(tmp_path / "a.jsonl", rows(7, answered=False))
    write_rows(tmp_path / "b.jsonl", rows(9, answered=False))  # the first seven are the same
    sets = [PromptSet(files=(str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")))]
    tokenizer = load_tokenizer(base_dir)
    found = count_prompts(sets, Assumed(), tokenizer)
    assert (found.count, found.notes) == (9, ())
    lengths = [len(render(tokenizer, row.question, answer_next=True)) for row in rows(9)]
    assert found.tokens == pytest.approx(sum(lengths) / 9)
    assert count_prompts(sets, Assumed(), None).tokens == len("backward: ABCDE") // 4
    limited = count_prompts([PromptSet(files=(str(tmp_path / "b.jsonl"),), limit=3)], Assumed(), tokenizer)
    assert limited.count == 3


def test_prompts_that_are_not_here_are_assumed_and_said(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", rows(10, answered=False))
    here, gone = str(tmp_path / "a.jsonl"), str(tmp_path / "gone.jsonl")
    sets = [PromptSet(files=(here, gone)), PromptSet(dataset="org/set", limit=40)]
    found = count_prompts(sets, Assumed(prompts=50, prompt_tokens=100), None)
    assert found.count == 10 + 50 + 40
    assert found.tokens == (10 * 3 + 90 * 100) / 100
    assert found.notes == ("gone.jsonl: not here, 50 prompts (assumed)", "org/set: not here, 40 prompts (its limit)")
    assert count_prompts(sets[:1], Assumed(tests=5), None, tests=True).count == 15


def test_a_checkpoint_tells_its_size_by_its_files(base: Checkpoint) -> None:
    found = sized(str(base.path))
    assert found.known_by == "its files"
    assert found.shape.parameters == base.parameters
    assert (found.shape.layers, found.shape.width, found.shape.inner, found.shape.keys) == (2, 32, 64, 16)
    assert found.shape.tied
    assert numbers_per_rank(found.shape) == lora_parameters_per_rank(base.path)


def test_a_model_of_the_hub_tells_its_size_by_its_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    monkeypatch.setattr("graftllm.costs.models.download", lambda source, file: tmp_path / file)
    found = sized("meta-llama/Llama-3.1-8B-Instruct")
    assert (found.shape.parameters, found.known_by) == (8_030_261_248, "its configuration")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", 8e9),
        ("Qwen/Qwen2.5-0.5B", 0.5e9),
        ("google/gemma-2-27b-it", 27e9),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", 56e9),
        ("x/SmolLM-135M", 135e6),
    ],
)
def test_without_a_configuration_the_name_tells_the_size(name: str, parameters: float) -> None:
    assert sized(name).known_by == "its name alone"
    assert shape_by_name(name).parameters == parameters


def test_a_name_without_a_size_is_said() -> None:
    with pytest.raises(RecipeError, match="^openchat/openchat_3.5: cannot tell its size: its config.json is not here"):
        sized("openchat/openchat_3.5")


def _recipe(tmp_path: Path, base_dir: Path, more: str = "") -> Recipe:
    write_rows(tmp_path / "p.jsonl", rows(12, answered=False))
    text = f"""
name: small
target: {base_dir}
skills: {{reverse: {{sources: [{base_dir}], prompts: p.jsonl, test: p.jsonl}}}}
general: {{prompts: p.jsonl, test: p.jsonl}}
sft: {{batch_size: 4}}
{more}
"""
    (tmp_path / "recipe.yaml").write_text(text)
    return load_recipe(tmp_path / "recipe.yaml")[0]


def test_a_recipe_whose_files_are_here_assumes_no_sizes(tmp_path: Path, base_dir: Path) -> None:
    asked = survey(_recipe(tmp_path, base_dir), Assumed())
    assert asked.prompts["reverse"].count == asked.tests[GENERAL].count == 12
    assert not any("not here," in line for line in assumptions(asked))
    found = estimates(asked, hardware("cpu-2"))
    assert all(one.fits for one in found)
    assert warnings(found, hardware("cpu-2")) == []


def test_a_lora_has_the_rank_of_the_recipe_or_its_packs_bytes(tmp_path: Path, base_dir: Path) -> None:
    per_rank = lora_parameters_per_rank(base_dir)
    named = survey(_recipe(tmp_path, base_dir, "method: lora\nlora: {rank: 3}"), Assumed())
    assert named.lora_parameters == 3 * per_rank
    sized_by_pack = survey(_recipe(tmp_path, base_dir, f"method: lora\npack: {{budget: '{9 * per_rank}'}}"), Assumed())
    assert sized_by_pack.lora_parameters == 4 * per_rank  # two bytes each


@pytest.fixture(scope="module")
def published():
    return survey(load_recipe(LLAMA)[0], Assumed())


def test_the_published_recipe_fits_on_eight_gpus_and_not_on_one(published) -> None:
    one, eight = (estimates(published, hardware(name)) for name in ("1xh100", "8xh100"))
    assert {part.amount.stage for part in one if not part.fits} == {"sft", "dpo"}
    assert all(part.fits for part in eight)
    told = warnings(one, hardware("1xh100"))
    assert told[0].startswith("Does not fit: sft of instruction: ")
    assert told[0].endswith(" GB on each device, more than is to be had of 80 GB; take more devices, or method: lora.")


def test_tables_have_a_cell_for_each_column(published) -> None:
    eight = hardware("8xh100")
    for grid in (hardware_grid(estimates(published, eight), eight), rows_grid(published, [eight, hardware("cpu-2")])):
        assert grid.rows
        assert {len(row) for row in grid.rows} == {len(grid.columns)}
    lines = closing_lines(published)
    assert "Assumed:" in lines
    assert any("Llama-3.1-8B-Instruct: 8 B parameters" in line for line in lines)


def test_figures_are_json(published) -> None:
    found = json.loads(json.dumps(figures(published, [hardware("1xh100")])))
    assert len(found["hardware"]["1xh100"]) == len(found["amounts"]) == len(amounts(published))


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda path: path.stem)
def test_accelerate_reads_the_configurations_and_they_say_what_they_are_for(path: Path, published) -> None:
    launch = read_launch(path)
    assert f"recipes/accelerate/{path.name}" in path.read_text()
    assert launch.sharded == path.stem.startswith(("fsdp2", "zero3"))
    gpus = {"8gpu": (8, 1), "2x8gpu": (16, 2), "1gpu": (1, 1), "2cpu": (2, 1)}[path.stem.split("-")[-1]]
    assert (launch.processes, launch.machines) == gpus
    plan = next(line for line in closing_lines(published, launch) if line.startswith("Launch: "))
    each = 8 / launch.processes if launch.sharded else 8
    assert f"each holds {each:.3g} B of 8 B parameters" in plan


def test_a_launch_runs_on_as_many_devices_as_it_has_processes() -> None:
    launch = Launch("FSDP2", 16, 2, True, "bf16")
    assert fitting(launch, None) == hardware("2x8xh100")
    assert fitting(launch, hardware("2x8xh200")) == hardware("2x8xh200")
    with pytest.raises(RecipeError, match="--hardware: expected 16 devices on 2 machines, as the .*, found 8xh100"):
        fitting(launch, hardware("8xh100"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("fsdp_version: 2", "fsdp_version: 1"), "expected fsdp_version 2, found 1"),
        (("num_machines: 2", "num_machines: 3"), "to be a multiple of num_machines 3, found 16"),
        (("distributed_type: FSDP", "distributed_type: CLUSTER"), "accelerate cannot read it"),
        (("use_cpu: false", "use_gpus: 3"), "accelerate cannot read it"),
        (("distributed_type: FSDP", "distributed_type: ["), "accelerate cannot read it"),
    ],
)
def test_a_configuration_that_cannot_be_is_said(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = tmp_path / "launch.yaml"
    path.write_text((RECIPES / "accelerate" / "fsdp2-2x8gpu.yaml").read_text().replace(*change))
    with pytest.raises(RecipeError) as caught:
        read_launch(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    shutil.rmtree(tmp_path)
    with pytest.raises(RecipeError, match="no such accelerate configuration; recipes/accelerate/ has some"):
        read_launch(path)
