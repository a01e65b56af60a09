import json
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from graftllm.checkpoint import Checkpoint
from graftllm.errors import TrainingError
from graftllm.generation import load_model
from graftllm.records import PreferencePair, Prompt
from graftllm.training import tuning
from graftllm.training.lora import lora_parameters_per_rank, with_adapter
from graftllm.training.tuning import Training, train_dpo, train_sft
from graftllm.training_options import DpoOptions, SftOptions

SFT = SftOptions(epochs=3, batch_size=8, learning_rate=3e-3, max_length=64)
DPO = DpoOptions(epochs=2, batch_size=8, learning_rate=1e-3, max_length=64)


class Stopped(Exception):
    pass


def _log_likelihood(path: Path, rows: list[Prompt]) -> float:
    from graftllm.generation import load_tokenizer, render_answered

    model, words = load_model(path), load_tokenizer(path)
    total = 0.0
    for row in rows:
        ids, start = render_answered(words, row)
        with torch.inference_mode():
            scores = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(1)
        total += sum(float(scores[i - 1, ids[i]]) for i in range(start, len(ids)))
    return total


def _pairs(prompts: list[Prompt]) -> list[PreferencePair]:
    return [PreferencePair(row.id, row.question, row.reference or "", "wrong") for row in prompts]


def test_sft_makes_the_answers_likelier_and_keeps_the_checkpoints_form(
    base: Checkpoint, prompts: list[Prompt], tmp_path: Path
) -> None:
    train_sft(Training(base.path, tmp_path / "out", 0, "x"), prompts, SFT)
    assert _log_likelihood(tmp_path / "out", prompts) > _log_likelihood(base.path, prompts) + 50
    out = Checkpoint.open(tmp_path / "out")
    assert out.specs == base.specs
    for file in ("config.json", "tokenizer.json", "chat_template.jinja"):
        assert (out.path / file).read_bytes() == (base.path / file).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_dpo_widens_the_margin(base: Checkpoint, prompts: list[Prompt], tmp_path: Path) -> None:
    train_dpo(Training(base.path, tmp_path / "out", 0, "x"), _pairs(prompts), DPO)
    worse = [Prompt(row.id, (*row.question, {"role": "assistant", "content": "wrong"})) for row in prompts]

    def margin(path: Path) -> float:
        return _log_likelihood(path, prompts) - _log_likelihood(path, worse)

    assert margin(tmp_path / "out") > margin(base.path) + 50


@pytest.mark.parametrize("stop_at", [3, 9])
def test_a_killed_training_ends_with_the_same_weights(
    base: Checkpoint, prompts: list[Prompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    train_sft(Training(base.path, tmp_path / "whole", 0, "x"), prompts, SFT)
    original = tuning._ShowSteps.on_step_end
    steps: list[int] = []

    def stopping(self, args, state, control, **kwargs) -> None:
        steps.append(state.global_step)
        if len(steps) == stop_at:
            raise Stopped
        original(self, args, state, control, **kwargs)

    monkeypatch.setattr(tuning._ShowSteps, "on_step_end", stopping)
    run = Training(base.path, tmp_path / "killed", 0, "x")
    with pytest.raises(Stopped):
        train_sft(run, prompts, SFT)
    assert not run.out.exists()
    train_sft(run, prompts, SFT)
    assert steps[stop_at] > 1  # it went on, and did not begin again
    assert Checkpoint.open(run.out).fingerprint == Checkpoint.open(tmp_path / "whole").fingerprint


def test_half_a_trainer_checkpoint_is_passed_over(tmp_path: Path) -> None:
    for step, state in ((2, "{}"), (10, '{"half'), (9, "{}")):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-11").mkdir()
    assert tuning._last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")


def test_checkpoints_of_another_training_are_not_gone_on_with(tmp_path: Path, base: Checkpoint) -> None:
    run = Training(base.path, tmp_path / "out", 0, "x")
    work = tuning._work_directory(run, [{"a": 1}], SFT)
    (work / "checkpoint-5").mkdir()
    assert (tuning._work_directory(run, [{"a": 1}], SFT) / "checkpoint-5").exists()
    other = SFT.model_copy(update={"learning_rate": 1.0})
    assert not (tuning._work_directory(run, [{"a": 1}], other) / "checkpoint-5").exists()


def test_a_lora_is_trained_by_sft_and_then_by_dpo(base: Checkpoint, prompts: list[Prompt], tmp_path: Path) -> None:
    sft = SFT.model_copy(update={"learning_rate": 1e-2})
    train_sft(Training(base.path, tmp_path / "sft", 0, "x", lora_rank=3), prompts, sft)
    train_dpo(Training(base.path, tmp_path / "dpo", 0, "x", adapter=tmp_path / "sft"), _pairs(prompts), DPO)
    weights = peft.PeftConfig.from_pretrained(tmp_path / "dpo")
    assert weights.r == 3
    merged = with_adapter(load_model(base.path), tmp_path / "sft")
    again = with_adapter(load_model(base.path), tmp_path / "dpo")
    before = load_model(base.path).state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert 0 < float((merged.state_dict()[name] - before[name]).norm())
    assert not torch.equal(again.state_dict()[name], merged.state_dict()[name])
    size = sum(value.numel() for key, value in _adapter_tensors(tmp_path / "sft").items() if "lora_" in key)
    assert size == 3 * lora_parameters_per_rank(base.path)


def _adapter_tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path / "adapter_model.safetensors")


def test_training_does_not_change_its_start(base: Checkpoint, prompts: list[Prompt], tmp_path: Path) -> None:
    before = Checkpoint.open(base.path).fingerprint
    train_sft(Training(base.path, tmp_path / "out", 0, "x"), prompts[:8], SFT)
    assert Checkpoint.open(base.path).fingerprint == before
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"


def test_nothing_to_learn_from_is_said(base: Checkpoint, tmp_path: Path) -> None:
    run = Training(base.path, tmp_path / "out", 0, "SFT sums")
    with pytest.raises(TrainingError, match="SFT sums: expected rows to train on, found none"):
        train_sft(run, [], SFT)
    question = Prompt("p", ({"role": "user", "content": "q"},))
    with pytest.raises(TrainingError, match="SFT sums: row 'p' has no assistant message to learn"):
        train_sft(run, [question], SFT)
    with pytest.raises(TrainingError, match="expected rows to train on, found none"):
        train_dpo(run, [], DPO)


def test_a_diverging_loss_is_said(base: Checkpoint, prompts: list[Prompt], tmp_path: Path) -> None:
    wild = SFT.model_copy(update={"learning_rate": 1e38, "warmup": 0.0})
    with pytest.raises(TrainingError, match="x: the loss became nan; lower the learning rate or check the rows"):
        train_sft(Training(base.path, tmp_path / "out", 0, "x"), prompts, wild)
    assert not (tmp_path / "out").exists()
