"""From prompt sets to a tuned target, with a source behind a URL, a reward model and on-policy pairs."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from graftllm.checkpoint import Checkpoint
from graftllm.errors import SamplingError
from graftllm.pipeline import transfer
from graftllm.pipeline.measuring import measure_source
from graftllm.pipeline.preparing import prepare, prompts_of
from graftllm.pipeline.work import GENERAL, Work, open_work
from graftllm.records import read_pairs, read_prompts, read_responses, write_rows
from tests.chat_server import ChatServer, chat_server
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


def test_on_policy_pairs_are_of_the_tuned_model_itself(tmp_path: Path, content: dict[str, Any]) -> None:
    reward_model = save_reward_model(tmp_path / "reward")
    content["skills"]["reverse"] |= {
        "judge": [{"kind": "reward_model", "model": str(reward_model)}],
        "test_judge": "exact",
    }
    content["pairs"] = {"preference": "on_policy", "sft_share": 0.5}
    content["dpo"]["batch_size"] = 2
    work = _work(tmp_path, content)
    transfer.train(work, "reverse")
    home = work.skill("reverse")
    pairs = read_pairs(home / "pairs.jsonl")
    own = {(row.prompt_id, row.text) for row in read_responses(home / "pairs.responses.jsonl")}
    assert pairs
    assert {pair.source for pair in pairs} == {"own"}
    assert all({(pair.prompt_id, pair.chosen), (pair.prompt_id, pair.rejected)} <= own for pair in pairs)
    assert {row.id for row in read_prompts(home / "sft.jsonl")}.isdisjoint(pair.prompt_id for pair in pairs)
    assert Checkpoint.open(work.tuned("reverse")).fingerprint != Checkpoint.open(home / "tuned.sft").fingerprint


def test_without_on_policy_pairs_the_model_stays_as_sft_left_it(tmp_path: Path, content: dict[str, Any]) -> None:
    content["pairs"] = {"preference": "on_policy"}  # judged by `exact`, where a random model is never right
    work = _work(tmp_path, content)
    transfer.train(work, "reverse")
    assert read_pairs(work.skill("reverse") / "pairs.jsonl") == []
    assert Checkpoint.open(work.tuned("reverse")) != Checkpoint.open(work.target.path)
    assert (work.tuned("reverse") / "model.safetensors").exists()


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


def test_general_prompts_are_prepared_too(tmp_path: Path, content: dict[str, Any]) -> None:
    work = _work(tmp_path, content)
    assert len(read_prompts(prompts_of(work, GENERAL))) == 3
