"""From prompt sets to a tuned target, with a source behind a URL, a reward model and on-policy pairs."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from graftllm.checkpoint import Checkpoint
from graftllm.compression.lowrank import LowRank
from graftllm.delta import Delta
from graftllm.errors import CheckpointError, RecipeError, RecordError, SamplingError
from graftllm.packer import compress
from graftllm.packing_options import PackOptions
from graftllm.pipeline import river, transfer
from graftllm.pipeline.measuring import measure_source
from graftllm.pipeline.packing import check_budget
from graftllm.pipeline.preparing import prepare, prompts_of
from graftllm.pipeline.work import GENERAL, Work, open_work
from graftllm.records import read_pairs, read_prompts, read_responses, write_rows
from tests.chat_server import ChatServer, chat_server
from tests.command import Command
from tests.models import rows, save_llama, save_reward_model


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with chat_server() as told:
        told.answering = lambda body: body["messages"][0]["content"].split()[-1][:: -1 if body["seed"] % 2 else 1]
        yield told


@pytest.fixture
def content(tmp_path: Path, server: ChatServer) -> dict[str, Any]:
    """A recipe for words to write backward."""
    write_rows(tmp_path / "prompts.jsonl", [*rows(16, answered=False), *rows(2, task="again", answered=False)])
    write_rows(tmp_path / "test.jsonl", rows(4, seed=1, answered=False))
    write_rows(tmp_path / "general.jsonl", rows(3, seed=2, answered=False))
    save_llama(tmp_path / "target", seed=3)
    return {
        "name": "small",
        "target": "./target",
        "skills": {
            "reverse": {
                "sources": [{"model": "org/big", "url": server.url, "price": {"input": 1, "output": 2}}],
                "prompts": "prompts.jsonl",
                "test": "test.jsonl",
            }
        },
        "general": {"prompts": "general.jsonl", "test": "general.jsonl"},
        "sampling": {"samples": 4, "temperature": 1.0, "max_new_tokens": 8},
        "sft": {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "max_length": 64},
        "dpo": {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "max_length": 64},
    }


def _work(tmp_path: Path, content: dict[str, Any]) -> Work:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    return open_work(tmp_path / "recipe.yaml", tmp_path / "run", device="cpu")


def test_the_data_card_says_what_the_rows_are_made_of(tmp_path: Path, content: dict[str, Any]) -> None:
    work = _work(tmp_path, content)
    transfer.score(work, "reverse")
    home = work.skill("reverse")
    card = json.loads((home / "data-card.json").read_text())
    assert card["prompts"]["read"] == 18
    assert card["prompts"]["duplicates"] == 2
    big = card["sources"]["big"]
    assert (big["responses"], big["input_tokens"], big["output_tokens"]) == (64, 640, 320)
    assert big["dollars"] == pytest.approx((640 + 2 * 320) / 1e6)
    assert big["right"] + card["not_learnt_from"]["wrong"] == 64
    assert big["sft_rows"] == card["sft"]["rows"] == len(read_prompts(home / "sft.jsonl"))
    assert big["pairs"] == card["preference"]["pairs"] == len(read_pairs(home / "pairs.jsonl"))
    assert card["judges"][0]["judge"] == "exact"
    page = (home / "data-card.md").read_text()
    assert f"{card['sft']['rows']} rows to fine-tune on and {card['preference']['pairs']} preference pairs" in page
    assert "18 read, 2 duplicates left out. 0 share words with the 7 test prompts" in page


def test_a_source_behind_a_url_is_measured_on_the_test(tmp_path: Path, content: dict[str, Any]) -> None:
    found = measure_source(_work(tmp_path, content), "reverse")["reverse"]
    assert found.overall.n == 4


def test_a_source_that_is_added_leaves_the_others_answers(
    tmp_path: Path, content: dict[str, Any], server: ChatServer
) -> None:
    transfer.sample(_work(tmp_path, content), "reverse")
    asked = len(server.seen)
    first = content["skills"]["reverse"]["sources"][0]
    content["skills"]["reverse"]["sources"] = [first | {"retries": 3}, first | {"name": "other"}]
    write_rows(tmp_path / "test.jsonl", rows(5, seed=1, answered=False))
    transfer.sample(_work(tmp_path, content), "reverse")
    assert len(server.seen) == 2 * asked
    responses = read_responses(tmp_path / "run" / "skills" / "reverse" / "responses.jsonl")
    assert [row.source for row in responses] == ["big"] * asked + ["other"] * asked


def test_only_what_is_not_answered_yet_is_asked(tmp_path: Path, content: dict[str, Any], server: ChatServer) -> None:
    def asked() -> list[str]:
        before = len(server.seen)
        transfer.sample(_work(tmp_path, content), "reverse")
        return [body["messages"][-1]["content"] for body in server.seen[before:]]

    def filed() -> dict[tuple[str, int], str]:
        found = read_responses(tmp_path / "run" / "skills" / "reverse" / "responses.jsonl")
        return {(row.prompt_id, row.sample): row.text for row in found}

    prompts = read_prompts(tmp_path / "prompts.jsonl")
    unique = {prompt.question[-1]["content"] for prompt in prompts}
    assert sorted(asked()) == sorted([*unique] * 4)
    first = filed()
    new = rows(2, seed=77, answered=False)
    write_rows(tmp_path / "prompts.jsonl", [*prompts, *(replace(row, id=f"new-{row.id}") for row in new)])
    assert sorted(asked()) == sorted([row.question[-1]["content"] for row in new] * 4)
    assert filed().items() >= first.items()
    content["sampling"]["samples"] = 5
    assert len(asked()) == len(unique) + 2
    changed = replace(prompts[9], messages=({"role": "user", "content": "backward: other"},))
    write_rows(tmp_path / "prompts.jsonl", [*prompts[:9], changed, *prompts[10:]])
    assert asked() == ["backward: other"] * 5
    assert asked() == []
    content["sampling"]["temperature"] = 0.5
    assert len(asked()) == 5 * len(unique)


def test_on_policy_pairs_are_of_the_tuned_model_itself(tmp_path: Path, content: dict[str, Any]) -> None:
    reward_model = save_reward_model(tmp_path / "reward")
    content["skills"]["reverse"] |= {
        "judge": [{"kind": "reward_model", "model": str(reward_model)}],
        "test_judge": "exact",
    }
    content["pairs"] = {"preference": "on_policy", "sft_share": 0.5}
    content["dpo"]["batch_size"] = 2
    content["sampling"]["max_new_tokens"] = 80  # so that some answers of a random model end
    work = _work(tmp_path, content)
    transfer.train(work, "reverse")
    home = work.skill("reverse")
    pairs = read_pairs(home / "pairs.jsonl")
    said = read_responses(home / "pairs.responses.jsonl")
    own = {(row.prompt_id, row.text) for row in said if not row.truncated}
    assert pairs
    assert len(own) < len(said)
    assert {pair.source for pair in pairs} == {"own"}
    assert all({(pair.prompt_id, pair.chosen), (pair.prompt_id, pair.rejected)} <= own for pair in pairs)
    assert {row.id for row in read_prompts(home / "sft.jsonl")}.isdisjoint(pair.prompt_id for pair in pairs)
    assert Checkpoint.open(work.tuned("reverse")).fingerprint != Checkpoint.open(home / "tuned.sft").fingerprint


def test_a_skill_that_is_added_leaves_the_others_as_they_were_trained(tmp_path: Path, content: dict[str, Any]) -> None:
    before = transfer.train(_work(tmp_path, content), "reverse")
    write_rows(tmp_path / "other.jsonl", rows(4, seed=5, answered=False))
    content["skills"]["other"] = content["skills"]["reverse"] | {"test": "other.jsonl"}
    work = _work(tmp_path, content)
    scored = transfer.score(work, "reverse")
    assert json.loads((work.skill("reverse") / "data-card.json").read_text())["prompts"]["compared_with"] == 11
    assert scored.result
    assert transfer.train(work, "reverse") == before


def test_a_target_without_a_chat_template_is_refused_before_anything_is_asked(
    tmp_path: Path, content: dict[str, Any], server: ChatServer
) -> None:
    (tmp_path / "target" / "chat_template.jinja").unlink()
    told = f"{tmp_path / 'target'}: expected a tokenizer with a chat template, .* save one as chat_template.jinja"
    with pytest.raises(CheckpointError, match=told):
        transfer.train(_work(tmp_path, content), "reverse")
    assert not server.seen


@pytest.mark.parametrize("command", ["sample", "score"])
def test_commands_that_stop_before_training_look_at_the_target_first(
    tmp_path: Path, content: dict[str, Any], server: ChatServer, graftllm: Command, command: str
) -> None:
    words = [command, tmp_path / "recipe.yaml", "--dir", tmp_path / "run", "--device", "cpu"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content | {"target": "./targte"}))
    shown = graftllm(*words)
    assert shown.code == 1 and f"{tmp_path / 'targte'}: expected a checkpoint directory, found no" in shown.line
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "target" / "chat_template.jinja").unlink()
    shown = graftllm(*words)
    assert shown.code == 1 and f"{tmp_path / 'target'}: expected a tokenizer with a chat template" in shown.line
    assert not server.seen
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content | {"target": "org/elsewhere"}))
    assert graftllm(*words).code == 0  # another machine has it


def test_a_budget_that_no_pack_can_meet_is_told_before_anything_is_asked(
    tmp_path: Path, content: dict[str, Any], server: ChatServer
) -> None:
    with pytest.raises(
        RecipeError, match=r"pack.budget: 1KB is 1,000 bytes, but the header alone .* at least"
    ) as caught:
        river.run(_work(tmp_path, content | {"pack": {"budget": "1KB"}}))
    assert not server.seen
    least = int(str(caught.value).rsplit(" at least ", 1)[1].split(".")[0].replace(",", ""))
    base = Checkpoint.open(tmp_path / "target")
    nothing = compress(Delta(base, base), PackOptions(budget="1MB"))
    nothing.save(tmp_path / "nothing.safetensors")
    assert 0.9 * (size := (tmp_path / "nothing.safetensors").stat().st_size) < least <= size
    check_budget(_work(tmp_path, content | {"pack": {"budget": str(least)}}))
    check_budget(_work(tmp_path, content | {"pack": {"budget": "kl=0.01"}}))


def test_other_pairs_train_the_preference_again_but_not_what_it_starts_from(
    tmp_path: Path, content: dict[str, Any]
) -> None:
    work = _work(tmp_path, content)
    preferred = transfer.train(work, "reverse")
    supervised = work.stages.used["sft.reverse"]
    file = work.skill("reverse") / "pairs.jsonl"
    write_rows(file, read_pairs(file)[1:])
    again = transfer.tune(work, "reverse", work.target.path, work.tuned("reverse"), name="reverse")
    assert again.name == preferred.name == "dpo.reverse"
    assert again != preferred
    assert work.stages.used["sft.reverse"] == supervised


def test_without_dpo_the_tuned_model_is_that_of_sft_again(tmp_path: Path, content: dict[str, Any]) -> None:
    work = _work(tmp_path, content)
    transfer.train(work, "reverse")
    home = work.skill("reverse")
    preferred, supervised = (Checkpoint.open(home / name).fingerprint for name in ("tuned", "tuned.sft"))
    transfer.train(_work(tmp_path, content | {"dpo": None}), "reverse")
    assert Checkpoint.open(home / "tuned").fingerprint == supervised != preferred


def test_without_on_policy_pairs_the_model_stays_as_sft_left_it(tmp_path: Path, content: dict[str, Any]) -> None:
    content["pairs"] = {"preference": "on_policy"}  # judged by `exact`, where a random model is never right
    work = _work(tmp_path, content)
    transfer.train(work, "reverse")
    assert read_pairs(work.skill("reverse") / "pairs.jsonl") == []
    assert Checkpoint.open(work.tuned("reverse")) != Checkpoint.open(work.target.path)
    assert (work.tuned("reverse") / "model.safetensors").exists()


def test_a_lora_is_merged_and_its_pack_is_as_small_as_its_rank(tmp_path: Path, content: dict[str, Any]) -> None:
    save_llama(tmp_path / "target", seed=3, dtype=torch.float32)
    content |= {"method": "lora", "lora": {"rank": 3, "learning_rate": 1e-2, "dpo_learning_rate": 1e-3}}
    work = _work(tmp_path, content)
    transfer.train(work, "reverse")
    home = work.skill("reverse")
    assert json.loads((home / "tuned.lora" / "adapter_config.json").read_text())["r"] == 3
    assert {path.name for path in home.glob("*.curves.png")} == {"tuned.lora.curves.png", "tuned.lora.sft.curves.png"}
    delta = Delta(work.target, Checkpoint.open(work.tuned("reverse")))
    header = compress(delta, PackOptions(strategy="paper", energy=0.9999)).header
    entries = [entry for name, entry in header.tensors.items() if "proj" in name]
    assert entries
    assert all(isinstance(entry.how, LowRank) and entry.how.rank <= 3 for entry in entries)
    assert all(entry.operator == "unchanged" for name, entry in header.tensors.items() if "proj" not in name)


@pytest.mark.parametrize(("budget", "rank"), [("3%", 1), ("40%", 8), (None, 1)])
def test_a_lora_without_a_rank_takes_the_bytes_that_packs_may_have(
    tmp_path: Path, content: dict[str, Any], budget: str | None, rank: int
) -> None:
    work = _work(tmp_path, content | {"method": "lora", "pack": {"budget": budget}})
    assert transfer._lora_rank(work) == rank  # a rank takes 2,048 bytes; the target has 43,896


def test_a_lora_needs_a_rank_where_the_budget_is_a_divergence(tmp_path: Path, content: dict[str, Any]) -> None:
    wrong = content | {"method": "lora", "pack": {"budget": "kl=0.01"}}
    with pytest.raises(RecipeError, match="lora: pack.budget says nothing of its bytes; add a `rank`, such as 16"):
        _work(tmp_path, wrong)
    assert transfer._lora_rank(_work(tmp_path, wrong | {"lora": {"rank": 5}})) == 5


def test_what_a_recipe_leaves_open_is_chosen_for_the_target_in_every_stage(
    tmp_path: Path, content: dict[str, Any]
) -> None:
    content["sft"] = content["dpo"] = {"epochs": 1}
    sft, dpo = _work(tmp_path, content).training(lora=False)
    assert dpo is not None
    assert (sft.learning_rate, dpo.learning_rate, dpo.loss) == (2e-3, 2e-5, "length_normalised")
    sft, dpo = _work(tmp_path, content | {"lora": {"learning_rate": 0.1}}).training(lora=True)
    assert dpo is not None
    assert (sft.learning_rate, dpo.learning_rate, dpo.loss) == (0.1, 5e-6, "length_normalised")


@pytest.mark.parametrize("action", ["warn", "drop"])
def test_prompts_that_occur_in_the_tests_are_told_or_dropped(
    tmp_path: Path, content: dict[str, Any], action: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "test.jsonl", [*rows(2, answered=False)])
    content["contamination"] = {"action": action}
    work = _work(tmp_path, content)
    result = prepare(work, "reverse").result
    assert isinstance(result, dict)
    assert (result["contaminated"], result["compared_with"]) == (2, 5)
    assert len(read_prompts(prompts_of(work, "reverse"))) == (16 if action == "warn" else 14)
    told = capsys.readouterr().err
    assert told.startswith("graftllm: reverse: 2 of 16 prompts occur in the tests; 'reverse-0' shares 'backward: ")
    assert "with test prompt 'reverse-0'" in told


def test_contamination_is_an_error_when_the_recipe_says_so(tmp_path: Path, content: dict[str, Any]) -> None:
    content["contamination"] = {"action": "error", "against": "seen.jsonl"}
    write_rows(tmp_path / "seen.jsonl", rows(1, answered=False))
    with pytest.raises(SamplingError, match="reverse: 1 of 16 prompts occur in the tests; .* Leave them out, or set"):
        prepare(_work(tmp_path, content), "reverse")


def test_a_recipe_in_the_runs_own_directory_stays_as_it_was_written(tmp_path: Path, content: dict[str, Any]) -> None:
    _work(tmp_path, content)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("# my own\n" + recipe.read_text())
    river._keep_recipe(open_work(recipe, tmp_path))
    assert recipe.read_text().startswith("# my own\n")
    river._keep_recipe(open_work(recipe, tmp_path / "run"))
    assert "learning_rate: 0.001" in (tmp_path / "run" / "recipe.yaml").read_text()


def test_general_prompts_are_prepared_too(tmp_path: Path, content: dict[str, Any]) -> None:
    work = _work(tmp_path, content)
    assert len(read_prompts(prompts_of(work, GENERAL))) == 3


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prompts": "nope.jsonl"}, RecordError, "nope.jsonl: no such file"),
        ({"prompts": "bare.jsonl"}, SamplingError, "prompt '1' has no 'reference', which the judge 'exact'"),
        ({"test": "bare.jsonl"}, SamplingError, "prompt '1' has no 'reference', which the judge 'exact'"),
        ({"sources": ["./empty"]}, CheckpointError, "expected a model directory, found no config.json in it"),
    ],
)
def test_what_is_wrong_with_a_later_skill_is_found_before_anything_is_asked(
    tmp_path: Path,
    content: dict[str, Any],
    server: ChatServer,
    change: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    (tmp_path / "bare.jsonl").write_text('{"id": "1", "prompt": "a"}\n')
    (tmp_path / "empty").mkdir()
    content["skills"]["later"] = content["skills"]["reverse"] | change
    with pytest.raises(error, match=message):
        river.run(_work(tmp_path, content))
    assert not server.seen
