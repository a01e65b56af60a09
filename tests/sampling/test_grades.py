"""Judges that grade: a reward model built on the spot, and a model behind a URL."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaModel

from graftllm.errors import CheckpointError, RecipeError
from graftllm.records import Message, Prompt, Response
from graftllm.sampling import grades
from graftllm.sampling.grades import grade, reward
from graftllm.sampling.scoring import Agreement, score_responses
from graftllm.transfer_options import LlmJudge, Price, RewardJudge, RuleJudge
from tests.chat_server import ChatServer, chat_server
from tests.models import save_reward_model, tokenizer

PROMPTS = [Prompt(str(i), (Message(role="user", content="q" * i),), reference="4") for i in (1, 9, 4)]


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reward_model(tmp_path_factory.mktemp("reward") / "model")


def test_a_grade_does_not_depend_on_the_batch(reward_model: Path, tmp_path: Path) -> None:
    answers = ["4", "a much longer answer", ""]
    judge = RewardJudge(kind="reward_model", model=str(reward_model))
    together = reward(PROMPTS, answers, judge, tmp_path / "together.jsonl", device="cpu")
    one_by_one = judge.model_copy(update={"batch_size": 1})
    alone = reward(PROMPTS, answers, one_by_one, tmp_path / "alone.jsonl", device="cpu")
    assert together.values == pytest.approx(alone.values, abs=1e-5)
    assert len(set(together.values)) == 3
    assert together.input_tokens > 0


def test_what_was_graded_before_a_kill_is_not_graded_again(
    reward_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = RewardJudge(kind="reward_model", model=str(reward_model), batch_size=2)
    prompts, answers = [*PROMPTS, *PROMPTS], ["a", "b", "c", "a", "e" * 30, "f" * 40]
    whole = reward(prompts, answers, judge, tmp_path / "whole.jsonl", device="cpu")
    monkeypatch.setattr(grades, "track", lambda batches, label: iter(batches[:1]))
    with pytest.raises(KeyError):
        reward(prompts, answers, judge, tmp_path / "killed.jsonl", device="cpu")
    graded = []
    monkeypatch.setattr(grades, "track", lambda batches, label: graded.extend(batches) or batches)
    assert reward(prompts, answers, judge, tmp_path / "killed.jsonl", device="cpu") == whole
    assert [len(batch) for batch in graded] == [2, 1]  # of five different answers


def test_a_reward_model_without_a_template_reads_a_pair(tmp_path: Path) -> None:
    judge = RewardJudge(kind="reward_model", model=str(save_reward_model(tmp_path / "plain", template=False)))
    assert len(set(reward(PROMPTS, ["4", "5", "6"], judge, tmp_path / "judged.jsonl", device="cpu").values)) == 3


def test_long_conversations_are_cut_on_the_left(reward_model: Path, tmp_path: Path) -> None:
    judge = RewardJudge(kind="reward_model", model=str(reward_model), max_length=3)
    one = reward(PROMPTS[:2], ["answer", "answer"], judge, tmp_path / "judged.jsonl", device="cpu")
    assert one.values[0] == pytest.approx(one.values[1])  # both end alike


def test_a_model_with_several_outputs_is_no_reward_model(tmp_path: Path, base_dir: Path) -> None:
    two = save_reward_model(tmp_path / "two", labels=2)
    with pytest.raises(CheckpointError, match="two: expected a reward model with one output, found 2; choose another"):
        reward(
            PROMPTS,
            ["", "", ""],
            RewardJudge(kind="reward_model", model=str(two)),
            tmp_path / "judged.jsonl",
            device="cpu",
        )


def test_objectives_are_weighed_by_the_prompt(tmp_path: Path) -> None:
    body = LlamaModel.from_pretrained(save_reward_model(tmp_path / "plain")).eval()
    words, draw = tokenizer(), torch.Generator().manual_seed(0)
    head = {
        "regression_layer.weight": torch.randn(3, 16, generator=draw),
        "reward_transform_matrix": torch.randn(3, 3, generator=draw),
        "gating.layers.0.weight": torch.randn(8, 16, generator=draw),
        "gating.layers.0.bias": torch.randn(8, generator=draw),
        "gating.layers.1.weight": torch.randn(3, 8, generator=draw),
        "gating.layers.1.bias": torch.randn(3, generator=draw),
        "gating.logit_scale": torch.tensor([0.5]),
    }
    body.config.gating_temperature = 2.0
    body.save_pretrained(tmp_path / "gated")
    words.save_pretrained(tmp_path / "gated")
    tensors = {f"model.{name}": value for name, value in load_file(tmp_path / "gated" / "model.safetensors").items()}
    save_file(tensors | head, tmp_path / "gated" / "model.safetensors", metadata={"format": "pt"})

    def by_hand(prompt: Prompt, answer: str) -> float:
        text = f"<user>{prompt.messages[0]['content']}<end>"
        ids = words(f"{text}<assistant>{answer}<end>", return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            states = body(ids).last_hidden_state[0]
        asked = states[len(words(text)["input_ids"]) - 1]
        hidden = torch.relu(head["gating.layers.0.weight"] @ asked + head["gating.layers.0.bias"])
        logits = head["gating.layers.1.weight"] @ hidden + head["gating.layers.1.bias"]
        rewards = (head["regression_layer.weight"] @ states[-1]) @ head["reward_transform_matrix"]
        return float((0.5 * torch.softmax(logits / 2, 0) * rewards).sum())

    answers = ["4", "a much longer answer", ""]
    judge = RewardJudge(kind="reward_model", model=str(tmp_path / "gated"))
    assert reward(PROMPTS, answers, judge, tmp_path / "judged.jsonl", device="cpu").values == pytest.approx(
        [by_hand(prompt, answer) for prompt, answer in zip(PROMPTS, answers, strict=True)], abs=1e-4
    )


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with chat_server() as told:
        yield told


def _judge(server: ChatServer) -> LlmJudge:
    price = Price(input=1e5, output=1e6)
    return LlmJudge(kind="judge", model="j", url=server.url, rubric="Right is good.", retries=0, price=price)


def test_a_judge_is_asked_with_rubric_question_reference_and_answer(server: ChatServer, tmp_path: Path) -> None:
    server.answering = lambda body: "It is fine.\nGrade: 7" if "so 4" in body["messages"][0]["content"] else "Hm."
    found = grade(PROMPTS[:2], ["so 4", "5"], _judge(server), tmp_path / "judged.jsonl")
    assert found.values == [0.7, None]
    assert (found.input_tokens, found.output_tokens) == (20, 10)
    asked = next(body for body in server.seen if "so 4" in body["messages"][0]["content"])
    assert asked["temperature"] == 0
    for part in ("Rubric:\nRight is good.", "user: q\n", "Reference answer:\n4", "Answer to grade:\nso 4", "10 (best)"):
        assert part in asked["messages"][0]["content"]


@pytest.mark.parametrize(
    ("said", "value"),
    [("Grade: 10", 1.0), ("Grade: 3\nno, **Grade:** 4", 0.4), ("grade: 7.5", 0.75), ("Grade: 11", None), ("ten", None)],
)
def test_the_last_grade_counts(server: ChatServer, tmp_path: Path, said: str, value: float | None) -> None:
    server.answering = lambda body: said
    assert grade(PROMPTS[:1], ["4"], _judge(server), tmp_path / "judged.jsonl").values == [value]


def test_equal_answers_are_judged_once_and_never_again(server: ChatServer, tmp_path: Path) -> None:
    server.answering = lambda body: "Grade: 5"
    prompts = [PROMPTS[0], PROMPTS[0], PROMPTS[1]]
    for _ in range(2):
        assert grade(prompts, ["4", "4", "4"], _judge(server), tmp_path / "judged.jsonl").values == [0.5] * 3
    assert len(server.seen) == 2


def test_rules_come_first_and_the_grade_agrees_with_them_or_not(server: ChatServer, tmp_path: Path) -> None:
    server.answering = lambda body: f"Grade: {len(body['messages'][0]['content'].split('grade:')[1].split()[0])}"
    texts = ["4", "55", "666", "4"]  # graded by their lengths: 1, 2, 3, 1
    responses = [Response("1", "s", i, text) for i, text in enumerate(texts)]
    scored = score_responses(PROMPTS, responses, [RuleJudge(kind="exact"), _judge(server)], directory=tmp_path)
    assert [(row.score, row.grade) for row in scored.responses] == [(1, 0.1), (0, 0.2), (0, 0.3), (1, 0.1)]
    assert scored.agreement == Agreement(0.0, 4, "exact")
    assert scored.costs[1].dollars == pytest.approx(3 * (10 * 0.1 + 5 * 1.0))
    alone = score_responses(PROMPTS, responses, [_judge(server)], directory=tmp_path)
    assert [row.score for row in alone.responses] == [None] * 4
    assert alone.agreement == Agreement(0.0, 4, "exact")


def test_a_judge_without_its_key_says_so(server: ChatServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    judge = _judge(server).model_copy(update={"api_key_env": "JUDGE_KEY"})
    with pytest.raises(RecipeError, match="environment variable 'JUDGE_KEY'"):
        grade(PROMPTS[:1], ["4"], judge, tmp_path / "judged.jsonl")
