"""What a recipe asks for, against sums done by hand."""

from typing import Any

import pytest

from graftllm.costs.amounts import GENERAL, Amount, Asked, amounts
from graftllm.costs.models import Sized
from graftllm.costs.prompts import Assumed, Prompts
from graftllm.recipe import Recipe
from graftllm.training.memory import Shape

N, SOURCE, REWARD = 1_000, 70_000, 300  # parameters
TARGET = Sized("target", Shape(N, 2, 10, 20, 5, 7), "its files")
URL = {"model": "far", "url": "http://localhost:8000/v1", "price": {"input": 1, "output": 4}}


def _asked(lora: int = 0, **changes: Any) -> Asked:
    skill = {"sources": ["near"], "prompts": "p.jsonl", "test": "t.jsonl", **changes.pop("skill", {})}
    told = {
        "name": "r", "target": "target", "skills": {"math": skill}, "general": {"prompts": "p", "test": "t"},
        "sampling": {"samples": 4, "max_new_tokens": 50, "batch_size": 8},
        "sft": {"epochs": 3, "max_length": 100}, "dpo": {"epochs": 2, "max_length": 100},
    }  # fmt: skip
    models = {
        "target": TARGET,
        "near": Sized("near", Shape(SOURCE, 2, 10, 20, 5, 7), "its files"),
        "judge": Sized("judge", Shape(REWARD, 2, 10, 20, 5, 7), "its files"),
    }
    prompts, tests = {"math": Prompts(10, 30), GENERAL: Prompts(5, 8)}, {"math": Prompts(6, 40), GENERAL: Prompts(4, 8)}
    return Asked(Recipe.model_validate(told | changes), models, prompts, tests, Assumed(answer_tokens=20), lora)


def _found(stage: str, **changes: Any) -> list[Amount]:
    return [one for one in amounts(_asked(**changes)) if one.stage == stage]


def test_a_source_here_reads_and_writes_every_sample() -> None:
    (one,) = _found("sample")
    assert (one.rows, one.tokens_in, one.tokens_out) == (40, 40 * 30, 40 * 20)
    assert one.flops == 2 * SOURCE * (1200 + 800)
    assert (one.sequences, one.longest) == (32, 80)


def test_an_endpoint_bills_a_prompt_for_each_request() -> None:
    (one,) = _found("sample", skill={"sources": [URL]})
    assert (one.tokens_in, one.tokens_out, one.flops) == (1200, 800, 0)
    assert one.dollars == (1200 + 4 * 800) / 1e6
    (several,) = _found("sample", skill={"sources": [URL | {"samples_per_request": 4}]})
    assert several.tokens_in == 300


def test_training_takes_six_operations_a_parameter_and_token() -> None:
    (sft,) = _found("sft")
    assert (sft.rows, sft.tokens) == (10, 3 * 10 * 50)
    assert sft.flops == 6 * N * 3 * 10 * 50
    (dpo,) = _found("dpo")
    assert (dpo.rows, dpo.tokens) == (10, 2 * 10 * 2 * 50)
    assert dpo.flops == 6 * N * 2 * 10 * 2 * 50 + 2 * N * 10 * 2 * 50  # and the reference once


def test_longer_rows_are_cut() -> None:
    (sft,) = _found("sft", sft={"epochs": 1, "max_length": 40})
    assert sft.tokens == 10 * 40


def test_a_lora_spares_the_gradients_of_what_is_not_trained() -> None:
    flops = (4 * N + 2 * 100) * 3 * 10 * 50
    (sft,) = _found("sft", lora=100, method="lora")
    assert (sft.flops, sft.trained) == (flops, 100)
    baseline, _ = _found("baselines", lora=100, compare=("lora",))
    assert (baseline.about, baseline.flops, baseline.trained) == ("math, lora sft", flops, 100)
    (beside,) = _found("sft", lora=100, compare=("lora",))
    assert (beside.flops, beside.trained) == (6 * N * 3 * 10 * 50, N)


def test_a_share_of_the_prompts_is_for_sft_and_the_rest_for_pairs() -> None:
    two = {"sources": ["near", URL]}
    share = {"sft_share": 0.4}
    assert [one.rows for one in _found("sft", skill=two, pairs=share)] == [4]
    assert [one.rows for one in _found("dpo", skill=two, pairs=share)] == [6 * 2]  # a pair of each source
    assert [one.rows for one in _found("dpo", skill=two, pairs=share | {"preference": "any_source"})] == [6]
    assert [one.rows for one in _found("sft", skill=two, pairs={"sft": "each"})] == [20]
    assert _found("dpo", pairs={"sft_share": 1.0}) == _found("dpo", dpo=None) == []


def test_pairs_of_the_target_itself_are_sampled_and_judged_again() -> None:
    judged = {"judge": ["exact", {"kind": "reward_model", "model": "judge", "max_length": 45}]}
    sampled, graded = _found("own", skill=judged, pairs={"preference": "on_policy"})
    assert sampled.flops == 2 * N * 40 * 50
    assert graded.flops == 2 * REWARD * 40 * 45
    assert [one.rows for one in _found("dpo", skill=judged, pairs={"preference": "on_policy"})] == [10]


def test_rules_take_nothing_and_models_that_judge_read_every_answer() -> None:
    assert _found("judge") == []
    rubric = {"kind": "judge", "rubric": "good", "max_new_tokens": 10, **URL}
    (one,) = _found("judge", skill={"judge": rubric})
    assert (one.rows, one.tokens_in, one.tokens_out) == (40, 40 * (30 + 20 + 200), 40 * 5)
    assert one.dollars == (one.tokens_in + 4 * one.tokens_out) / 1e6


def test_evaluation_answers_each_test_four_times_and_the_general_ones_three_times() -> None:
    target, source = _found("evaluate")
    assert target.rows == 4 * 6 + 3 * 4  # base, tuned, pack, routed; base, tuned, routed
    assert target.tokens_in == 4 * 6 * 40 + 3 * 4 * 8
    assert source.rows == 6


@pytest.mark.parametrize(
    ("compare", "trainings"),
    [((), 0), (("lora", "summed"), 2), (("sequential", "replay"), 2), (("lora", "sequential_lora"), 2)],
)
def test_baselines_are_trained_too(compare: tuple[str, ...], trainings: int) -> None:
    assert len(_found("baselines", compare=compare)) == trainings
