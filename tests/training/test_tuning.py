import json
import math
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainingArguments, modeling_utils
from transformers.integrations import integration_utils

from graftllm.checkpoint import Checkpoint
from graftllm.errors import CheckpointError, TrainingError
from graftllm.loading import load_model
from graftllm.records import PreferencePair, Prompt
from graftllm.training import tuning
from graftllm.training.curves import curves_beside
from graftllm.training.lora import lora_parameters_per_rank, merge_adapter, with_adapter
from graftllm.training.memory import Batching
from graftllm.training.tuning import Training, train_dpo, train_sft
from graftllm.training.watching import ShowSteps
from graftllm.training_options import DpoOptions, PreferenceLoss, Reporter, SftOptions
from tests.models import rows, save_llama, save_reward_model

SFT = SftOptions(epochs=3, batch_size=8, learning_rate=3e-3, max_length=64)
DPO = DpoOptions(epochs=2, batch_size=8, learning_rate=1e-3, max_length=64)


class Stopped(Exception):
    pass


def _log_likelihood(path: Path, rows: list[Prompt]) -> float:
    from graftllm.loading import load_tokenizer
    from graftllm.rendering import render_answered

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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.curves.jsonl", "out.curves.png"]


def test_dpo_widens_the_margin(base: Checkpoint, prompts: list[Prompt], tmp_path: Path) -> None:
    train_dpo(Training(base.path, tmp_path / "out", 0, "x"), _pairs(prompts), DPO)
    worse = [Prompt(row.id, (*row.question, {"role": "assistant", "content": "wrong"})) for row in prompts]

    def margin(path: Path) -> float:
        return _log_likelihood(path, prompts) - _log_likelihood(path, worse)

    assert margin(tmp_path / "out") > margin(base.path) + 50


def _sft(run: Training, rows: list[Prompt], options: SftOptions = SFT) -> None:
    train_sft(run, rows, options)


def _stopped_early(run: Training, rows: list[Prompt]) -> None:
    train_sft(run, rows, SFT.model_copy(update={"epochs": 9, "learning_rate": 2e-2, "held_out": 0.2, "early_stop": 2}))


def _lora(run: Training, rows: list[Prompt]) -> None:
    train_sft(replace(run, lora_rank=2), rows, SFT)


def _dpo(run: Training, rows: list[Prompt]) -> None:
    train_dpo(run, _pairs(rows), DPO)


@pytest.mark.parametrize(("train", "stop_at"), [(_sft, 3), (_stopped_early, 20), (_lora, 9), (_dpo, 7)])
def test_a_killed_training_ends_with_the_same_weights_and_curves(
    base: Checkpoint, prompts: list[Prompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: Any, stop_at: int
) -> None:
    whole, run = (Training(base.path, tmp_path / name, 0, "x") for name in ("whole", "killed"))
    train(whole, prompts)
    original = ShowSteps.on_step_end
    steps: list[int] = []

    def stopping(self, args, state, control, **kwargs) -> None:
        steps.append(state.global_step)
        if len(steps) == stop_at:
            raise Stopped
        original(self, args, state, control, **kwargs)

    monkeypatch.setattr(ShowSteps, "on_step_end", stopping)
    with pytest.raises(Stopped):
        train(run, prompts)
    assert not run.out.exists()
    train(run, prompts)
    assert steps[stop_at] > 1  # it went on, and did not begin again
    file = "adapter_model.safetensors" if train is _lora else "model.safetensors"
    assert (run.out / file).read_bytes() == (whole.out / file).read_bytes()
    assert _curves(run) == _curves(whole)


def _curves(run: Training) -> list[dict[str, float]]:
    """The rows of a training's curves, to a tolerance of sums that were added in another order."""
    rows, picture = curves_beside(run.out)
    assert picture.read_bytes().startswith(b"\x89PNG")
    return [
        {key: float(f"{value:.4g}") for key, value in json.loads(line).items()}
        for line in rows.read_text().splitlines()
    ]


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


def test_a_training_of_a_model_that_changed_is_another_one(tmp_path: Path, base: Checkpoint) -> None:
    shutil.copytree(base.path, tmp_path / "base")
    run = Training(tmp_path / "base", tmp_path / "out", 0, "x")
    (tuning._work_directory(run, [{"a": 1}], SFT) / "checkpoint-5").mkdir()
    os.utime(tmp_path / "base" / "model.safetensors", (1, 1))
    assert not (tuning._work_directory(run, [{"a": 1}], SFT) / "checkpoint-5").exists()


def test_a_process_alone_trains_on_one_gpu() -> None:
    args: Any = TrainingArguments(output_dir="x", report_to="none")
    args._n_gpu = 8
    assert tuning._alone(args).n_gpu == 1


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


def test_a_loss_that_is_no_number_ends_the_training_at_once(
    base: Checkpoint, prompts: list[Prompt], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wild = SFT.model_copy(update={"learning_rate": 1e38, "warmup": 0.0})
    said = r"x: the loss became nan in step 2 of 15, at a learning rate of \d.*e\+37; lower `learning_rate` \(1e\+38 at"
    with pytest.raises(TrainingError, match=said) as raised:
        train_sft(Training(base.path, tmp_path / "out", 0, "x"), prompts, wild)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(TrainingError, match=r"x: the loss became nan in step 2 of 10"):
        train_dpo(Training(base.path, tmp_path / "out", 0, "x"), _pairs(prompts), DPO.model_copy(update=WILD))


WILD = {"learning_rate": 1e38, "warmup": 0.0}


@pytest.fixture(scope="session")
def precise_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in float32, so that what is saved is what was trained."""
    return save_llama(tmp_path_factory.mktemp("precise") / "base", dtype=torch.float32)


@pytest.mark.parametrize(("loss", "beta"), [("sigmoid", 0.1), ("length_normalised", 10.0)])
def test_the_losses_of_dpo_are_those_of_the_papers(
    precise_dir: Path, tmp_path: Path, loss: PreferenceLoss, beta: float
) -> None:
    run = Training(precise_dir, tmp_path / "out", 0, "x")
    options = DpoOptions(epochs=1, batch_size=8, learning_rate=1e-3, warmup=0, loss=loss, held_out=0.25)
    pairs = [
        PreferencePair(row.id, row.question, row.reference or "", "far too long a wrong answer"[: 4 + i])
        for i, row in enumerate(rows(10))
    ]
    train_dpo(run, pairs, options)
    held_out = _held_out(run, pairs, options)
    assert len(held_out) == 2
    by_hand = []
    for pair in held_out:
        ratios = []
        for text in (pair.chosen, pair.rejected):
            row = Prompt(pair.prompt_id, (*pair.messages, {"role": "assistant", "content": text}))
            ratio = _log_likelihood(run.out, [row]) - _log_likelihood(run.model, [row])
            tokens = len(text) + 1  # a character is a token; then the end of the turn
            ratios.append(ratio / tokens if loss == "length_normalised" else ratio)
        by_hand.append(math.log1p(math.exp(-beta * (ratios[0] - ratios[1]))))
    told = _curves(run)[-1]["held_out_loss"]
    assert told == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-3)
    assert abs(told - math.log(2)) > 0.01


def _held_out(run: Training, rows: list, options: SftOptions | DpoOptions) -> list:
    held_out = random.Random(run.seed).sample(range(len(rows)), round(options.held_out * len(rows)))
    return [rows[i] for i in held_out]


def test_rows_held_out_are_not_learnt_and_the_best_model_is_kept(precise_dir: Path, tmp_path: Path) -> None:
    # References are drawn at random: learning them by heart makes others less likely.
    asked = [
        Prompt(row.id, (*row.question, {"role": "assistant", "content": drawn.reference or ""}))
        for row, drawn in zip(rows(24), rows(24, seed=9), strict=True)
    ]
    options = SftOptions(epochs=30, batch_size=6, learning_rate=1e-2, warmup=0, held_out=0.25, early_stop=2)
    run = Training(precise_dir, tmp_path / "out", 0, "x")
    train_sft(run, asked, options)
    curves = _curves(run)
    measured = [row["held_out_loss"] for row in curves if "held_out_loss" in row]
    assert curves[-1]["step"] < 90  # of 18 rows, 6 at a time, 30 times
    assert len(measured) == measured.index(min(measured)) + 3
    held_out = _held_out(run, asked, options)
    kept = -_log_likelihood(run.out, held_out) / (6 * len(held_out))  # tokens: five letters and the end
    assert kept == pytest.approx(min(measured), rel=1e-3)


def test_a_parameter_that_the_checkpoint_lacks_is_neither_trained_nor_merged(base: Checkpoint, tmp_path: Path) -> None:
    incomplete = save_reward_model(tmp_path / "judge")  # no head of words
    with pytest.raises(CheckpointError, match="has no tensor for 'lm_head.weight'"):
        train_sft(Training(incomplete, tmp_path / "out", 0, "x"), rows(8), SFT)
    train_sft(Training(base.path, tmp_path / "lora", 0, "x", lora_rank=2), rows(8), SFT)
    with pytest.raises(CheckpointError, match="has no tensor for 'lm_head.weight'"):
        merge_adapter(incomplete, tmp_path / "lora", tmp_path / "merged")
    assert not (tmp_path / "out").exists() and not (tmp_path / "merged").exists()


def test_held_out_of_one_row_is_refused(base: Checkpoint, tmp_path: Path) -> None:
    options = SFT.model_copy(update={"held_out": 0.5})
    with pytest.raises(TrainingError, match="x: held_out needs at least 2 rows, found 1; leave it out"):
        train_sft(Training(base.path, tmp_path / "out", 0, "x"), rows(1), options)


@pytest.mark.parametrize("train", [_sft, _dpo])
def test_a_batch_in_pieces_trains_the_same(precise_dir: Path, tmp_path: Path, train: Any) -> None:
    for micro in (8, 2):
        run = Training(precise_dir, tmp_path / str(micro), 0, "x")
        changes = {"micro_batch": micro, "epochs": 1}
        if train is _sft:
            train_sft(run, rows(16), SFT.model_copy(update=changes))
        else:
            train_dpo(run, _pairs(rows(16)), DPO.model_copy(update=changes))
    one, other = (load_file(tmp_path / micro / "model.safetensors") for micro in ("8", "2"))
    before = load_file(precise_dir / "model.safetensors")
    moved = sum(float((one[name] - before[name]).norm()) for name in one)
    assert sum(float((one[name] - other[name]).norm()) for name in one) < 0.02 * moved


def test_packed_rows_do_not_see_each_other(precise_dir: Path, tmp_path: Path) -> None:
    for name, packing in (("apart", False), ("packed", True)):
        options = SftOptions(epochs=1, batch_size=12, learning_rate=1e-5, warmup=0, max_length=100, packing=packing)
        train_sft(Training(precise_dir, tmp_path / name, 0, "x"), rows(12), options)
    apart, packed = (_curves(Training(precise_dir, tmp_path / name, 0, "x")) for name in ("apart", "packed"))
    assert packed[0]["loss"] == pytest.approx(apart[0]["loss"], rel=1e-3)


def test_activations_computed_twice_change_nothing(
    precise_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_sft(Training(precise_dir, tmp_path / "kept", 0, "x"), rows(8), SFT)
    assert "8 rows a step, 8 at once\n" in capsys.readouterr().err
    monkeypatch.setattr(tuning, "batching_for", lambda *args, **kwargs: Batching(4, 2, True))
    layers, checkpoint = [], modeling_utils.checkpoint
    monkeypatch.setattr(
        modeling_utils, "checkpoint", lambda run, *a, **k: layers.append(run) or checkpoint(run, *a, **k)
    )
    train_sft(Training(precise_dir, tmp_path / "twice", 0, "x"), rows(8), SFT)
    assert "8 rows a step, 4 at once, activations computed twice\n" in capsys.readouterr().err
    assert layers
    kept, twice = (_curves(Training(precise_dir, tmp_path / name, 0, "x")) for name in ("kept", "twice"))
    assert [row["loss"] for row in twice] == pytest.approx([row["loss"] for row in kept], rel=1e-3)


def test_a_merged_lora_differs_by_matrices_of_its_rank(precise_dir: Path, tmp_path: Path) -> None:
    train_sft(Training(precise_dir, tmp_path / "lora", 0, "x", lora_rank=2), rows(8), SFT)
    merge_adapter(precise_dir, tmp_path / "lora", tmp_path / "merged")
    before, merged = Checkpoint.open(precise_dir), Checkpoint.open(tmp_path / "merged")
    assert merged.specs == before.specs
    ranks = {}
    for name in before.names():
        delta = (merged.tensor(name) - before.tensor(name)).double()
        ranks[name] = int(torch.linalg.matrix_rank(delta, atol=1e-5)) if delta.ndim == 2 else int(delta.any())
    assert {ranks[name] for name in ranks if "proj" in name} == {2}
    assert {ranks[name] for name in ranks if "proj" not in name} == {0}


def test_tensorboard_is_told_beside_the_model(precise_dir: Path, tmp_path: Path) -> None:
    run = Training(precise_dir, tmp_path / "out", 0, "x", report_to="tensorboard")
    train_sft(run, rows(8), SFT)
    (events,) = (tmp_path / "out.tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()


@pytest.mark.parametrize("reporter", ["tensorboard", "wandb"])
def test_a_reporter_that_is_not_installed_is_said_before_anything_is_trained(
    base: Checkpoint, prompts: list[Prompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reporter: Reporter
) -> None:
    monkeypatch.setattr(integration_utils, f"is_{reporter}_available", lambda: False)
    run = Training(base.path, tmp_path / "out", 0, "SFT sums", report_to=reporter)
    with pytest.raises(
        TrainingError, match=f"SFT sums: report_to asks for {reporter}, which is not installed here; `pip"
    ):
        train_sft(run, prompts, SFT)


@pytest.mark.parametrize("train", [train_sft, train_dpo])
def test_rows_that_are_cut_are_told_and_refused_where_nothing_is_left(
    base: Checkpoint, tmp_path: Path, train: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    data = rows(6)  # a prompt of 18 tokens, an answer of 6
    if train is train_dpo:
        data = _pairs(data)
    options = (SFT if train is train_sft else DPO).model_copy(update={"epochs": 1, "max_length": 20})
    train(Training(base.path, tmp_path / "out", 0, "some"), data, options)
    told = "some: 6 of 6 rows have more than max_length 20 tokens; the ends of their answers are not learnt"
    assert told in capsys.readouterr().err
    with pytest.raises(TrainingError, match="some: max_length 10 ends every row before its answer"):
        train(Training(base.path, tmp_path / "none", 0, "some"), data, options.model_copy(update={"max_length": 10}))
