from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from graftllm.checkpoint import Checkpoint
from graftllm.cli_packs import verify
from graftllm.delta import Delta
from graftllm.errors import CheckpointError, PackError
from graftllm.evaluation import fidelity
from graftllm.evaluation.fidelity import (
    CLOSE_KL,
    FAITHFUL_KL,
    FAITHFUL_TOP1,
    Fidelity,
    Verification,
    divergence_on,
    error_by_role,
    measure_fidelity,
    verify_pack,
)
from graftllm.loading import load_model, load_tokenizer
from graftllm.packer import compress
from graftllm.packing_options import PackOptions
from graftllm.records import Prompt, write_rows
from graftllm.rendering import learned_positions, render_answered
from graftllm.skillpack import SkillPack
from tests.architectures import save_base, save_tuned
from tests.models import perturb


def test_an_exact_pack_has_no_divergence(delta: Delta, prompts: list[Prompt]) -> None:
    found = measure_fidelity(delta.base, compress(delta, PackOptions(strategy="exact")), delta.tuned, prompts)
    assert found.kl == pytest.approx(0, abs=1e-9)
    assert found.top1_agreement == 1
    # Five letters and the end of the turn.
    assert found.tokens == 6 * len(prompts)


def test_divergence_is_that_of_the_definition(delta: Delta, prompts: list[Prompt], tmp_path: Path) -> None:
    """A pack of weight nothing is the base, whose divergence is computed here row by row."""
    pack = compress(Delta(delta.base, delta.base), PackOptions(strategy="exact"))
    found = measure_fidelity(delta.base, pack, delta.tuned, prompts[:5])
    models, words = [load_model(delta.tuned.path), load_model(delta.base.path)], load_tokenizer(delta.base.path)
    total, same, count = 0.0, 0, 0
    surprise = [0.0, 0.0]
    for prompt in prompts[:5]:
        ids, start = render_answered(words, prompt)
        with torch.inference_mode():
            p, q = (model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1].double() for model in models)
        total += float(torch.nn.functional.kl_div(q.log_softmax(1), p.log_softmax(1), log_target=True, reduction="sum"))
        same += int((p.argmax(1) == q.argmax(1)).sum())
        surprise[0] -= sum(float(row.log_softmax(0)[token]) for row, token in zip(p, ids[start:], strict=True))
        surprise[1] -= sum(float(row.log_softmax(0)[token]) for row, token in zip(q, ids[start:], strict=True))
        count += len(p)
    assert found.tokens == count
    assert found.kl == pytest.approx(total / count, rel=1e-4)
    assert found.top1_agreement == pytest.approx(same / count)
    assert found.nll_tuned == pytest.approx(surprise[0] / count, rel=1e-4)
    assert found.nll_packed == pytest.approx(surprise[1] / count, rel=1e-4)


@pytest.mark.parametrize(
    ("kl", "agreement", "sentence"),
    [
        (0.001, 1.0, "faithful; KL divergence at most 0.01, agreement at least 99%."),
        (
            0.0092,
            0.9167,
            "close, but not faithful; agreement is 91.67%, not at least 99%. A larger budget brings it nearer.",
        ),
        (
            0.02,
            0.99,
            "close, but not faithful; KL divergence is 0.02000, not at most 0.01. A larger budget brings it nearer.",
        ),
        (
            0.02,
            0.9,
            "close, but not faithful; KL divergence is 0.02000, not at most 0.01, and agreement is 90.00%, "
            "not at least 99%. A larger budget brings it nearer.",
        ),
        (
            0.2,
            0.9,
            "not faithful; KL divergence is 0.20000, not at most 0.1. If it was made of this model, pack again with a "
            "larger budget, calibrated on the skill's own rows.",
        ),
    ],
)
def test_the_verdict_names_what_was_missed(kl: float, agreement: float, sentence: str) -> None:
    found = Fidelity(kl=kl, top1_agreement=agreement, nll_tuned=0.1, nll_packed=0.2, tokens=10)
    assert Verification(1, {}, found).sentences()[-1] == f"Verdict: {sentence}"


@pytest.mark.parametrize(
    ("kl", "agreement", "verdict"),
    [
        (0.0, 1.0, "faithful"),
        (0.01, 0.99, "faithful"),
        (0.011, 1.0, "close"),
        (0.001, 0.98, "close"),
        (0.1, 0.9, "close"),
        (0.11, 1.0, "not faithful"),
        (float("nan"), 1.0, "not faithful"),
    ],
)
def test_the_verdict_goes_by_divergence_and_agreement(kl: float, agreement: float, verdict: str) -> None:
    found = Fidelity(kl=kl, top1_agreement=agreement, nll_tuned=0.1, nll_packed=0.2, tokens=10)
    assert found.verdict == verdict
    figures, sentences = Verification(1, {}, found).figures(), Verification(1, {}, found).sentences()
    assert figures["verdict"] == verdict
    assert sentences[-1].startswith(f"Verdict: {verdict}")
    assert "0.10000 nats per token under the tuned model, 0.20000 under the packed one." in sentences[-2]


def test_a_model_that_the_pack_was_not_made_of_is_told_by_what_the_pack_keeps_bit_for_bit(
    delta: Delta, base_dir: Path, tuned_dir: Path, prompts: list[Prompt], tmp_path: Path
) -> None:
    compress(delta, PackOptions(strategy="exact")).save(tmp_path / "p.safetensors")
    write_rows(tmp_path / "rows.jsonl", prompts)
    assert verify_pack(base_dir, tmp_path / "p.safetensors", tuned_dir, None).foreign is None
    other = verify_pack(base_dir, tmp_path / "p.safetensors", base_dir, tmp_path / "rows.jsonl")
    assert other.foreign is not None and other.figures()["foreign"] == other.foreign
    told = f"another tuned model: it keeps every bit of {other.foreign}, and this one has others. Give --tuned that"
    assert told in " ".join(other.sentences())
    assert "budget" not in " ".join(other.sentences())


def test_help_and_docs_state_the_thresholds() -> None:
    page = (Path(__file__).parents[2] / "docs" / "method.md").read_text(encoding="utf-8")
    for text in (" ".join((verify.__doc__ or "").replace("%", " %").split()), " ".join(page.split())):
        assert f"at most {FAITHFUL_KL} nats per token" in text
        assert f"at least {100 * FAITHFUL_TOP1:g} % of tokens" in text
        assert f"at most {CLOSE_KL}" in text


def test_prompts_without_answers_are_compared_as_they_are(delta: Delta, prompts: list[Prompt]) -> None:
    bare = [Prompt(prompt.id, prompt.question) for prompt in prompts[:4]]
    found = measure_fidelity(delta.base, compress(delta, PackOptions(strategy="exact")), delta.tuned, bare)
    assert found.tokens > 4 * 10


def test_prompts_without_a_token_to_compare_are_refused(delta: Delta) -> None:
    pack = compress(delta, PackOptions(strategy="exact"))
    with pytest.raises(CheckpointError, match="tokens to compare, found none in 0. Give prompts with text in them"):
        measure_fidelity(delta.base, pack, delta.tuned, [])


def test_errors_by_role_are_relative_to_the_delta(delta: Delta) -> None:
    errors = error_by_role(delta, compress(delta, PackOptions(strategy="paper", energy=0.9)))
    assert errors["norm"] == 0
    assert 0 < errors["embedding"] < 0.2
    # Energy 0.9 alone leaves sqrt(0.1); rounding adds to it.
    assert 0.25 < errors["mlp"] < 0.9


def test_buffers_that_are_infinite_or_large_whole_numbers_have_no_error(base_dir: Path, tmp_path: Path) -> None:
    checkpoints = []
    for number in (1, 2):
        home = perturb(base_dir, tmp_path / str(number), seed=number)
        tensors = load_file(home / "model.safetensors")
        tensors |= {"mask.bias": torch.full((8, 8), -torch.inf), "count.weight": torch.tensor([1 << 61, number << 60])}
        save_file(tensors, home / "model.safetensors", metadata={"format": "pt"})
        checkpoints.append(Checkpoint.open(home))
    delta = Delta(*checkpoints)
    errors = error_by_role(delta, compress(delta, PackOptions(strategy="exact")))
    assert set(errors.values()) == {0.0}


def test_verify_checks_what_it_is_given(
    base_dir: Path, tuned_dir: Path, delta: Delta, prompts: list[Prompt], tmp_path: Path
) -> None:
    compress(delta, PackOptions(strategy="paper")).save(tmp_path / "p.safetensors")
    write_rows(tmp_path / "rows.jsonl", prompts)
    alone = verify_pack(base_dir, tmp_path / "p.safetensors", None, None)
    assert alone.figures() == {"intact": True, "parameters": 20}
    full = verify_pack(base_dir, tmp_path / "p.safetensors", tuned_dir, tmp_path / "rows.jsonl")
    measured = {"kl", "top1_agreement", "nll_tuned", "nll_packed", "tokens", "verdict", "error_by_role"}
    assert measured <= set(full.figures())
    assert len(full.sentences()) == 5
    for kind in (full, alone):
        assert kind.sentences()[0].startswith("The pack is intact and fits its base: 20 tensors checked")
    with pytest.raises(CheckpointError, match="--prompts: the answers are compared with those of a tuned model"):
        verify_pack(base_dir, tmp_path / "p.safetensors", None, tmp_path / "rows.jsonl")


def test_each_layer_of_a_pack_with_two_is_verified(
    base_dir: Path, tuned_dir: Path, delta: Delta, prompts: list[Prompt], tmp_path: Path
) -> None:
    file, rows = tmp_path / "p.safetensors", tmp_path / "rows.jsonl"
    compress(delta, PackOptions(strategy="exact", budget="25%")).save(file)
    write_rows(rows, prompts)
    lossy = verify_pack(base_dir, file, tuned_dir, rows, layer="lossy")
    exact = verify_pack(base_dir, file, tuned_dir, rows, layer="exact")
    assert lossy.fidelity is not None and exact.fidelity is not None
    assert lossy.fidelity.kl > 1e-4 > exact.fidelity.kl
    assert lossy.error_by_role is not None and lossy.error_by_role["mlp"] > 0
    assert set(exact.error_by_role or [1]) == set(lossy.error_by_role)
    assert set((exact.error_by_role or {}).values()) == {0.0}
    assert lossy.sentences()[0].startswith("The lossy layer is intact and fits its base: 20 tensors")
    assert verify_pack(base_dir, file, None, None, layer="lossy").sentences() == lossy.sentences()[:1]
    SkillPack.load(file, "lossy").save(tmp_path / "lossy.safetensors")
    with pytest.raises(PackError, match="expected a pack with an exact layer"):
        verify_pack(base_dir, tmp_path / "lossy.safetensors", None, None, layer="exact")


@pytest.mark.parametrize(
    ("name", "kind", "named"),
    [
        ("t5", None, "T5ForConditionalGeneration"),
        ("vit", None, "ViTForImageClassification"),
        ("gemma2", AutoModelForSequenceClassification, "Gemma2ForSequenceClassification"),
    ],
)
def test_answers_of_what_is_no_language_model_are_not_compared(
    name: str, kind: Any, named: str, prompts: list[Prompt], tmp_path: Path
) -> None:
    base = save_base(name, tmp_path / "base", kind=kind)
    tuned = save_tuned(base, tmp_path / "tuned")
    delta = Delta(Checkpoint.open(base), Checkpoint.open(tuned))
    compress(delta, PackOptions(strategy="exact")).save(tmp_path / "p.safetensors")
    write_rows(tmp_path / "rows.jsonl", prompts)
    told = f"compares next tokens, which takes a language model, but .*base is a {named}"
    with pytest.raises(
        CheckpointError, match=f"--prompts: {told}. Leave it out to compare the weights alone; .* apply"
    ):
        verify_pack(base, tmp_path / "p.safetensors", tuned, tmp_path / "rows.jsonl")
    assert verify_pack(base, tmp_path / "p.safetensors", tuned, None).error_by_role
    with pytest.raises(CheckpointError, match=f"budget: kl=0.1: {told}. Give a size, such as 5%"):
        divergence_on(delta, prompts, PackOptions(budget="kl=0.1"), device="cpu")


def test_nothing_is_measured_where_a_size_is_asked_for(delta: Delta, prompts: list[Prompt]) -> None:
    assert divergence_on(delta, prompts, PackOptions(budget="5%"), device="cpu") is None
    assert divergence_on(delta, [], PackOptions(budget="kl=0.1"), device="cpu") is None
    assert divergence_on(delta, prompts, PackOptions(budget="kl=0.1"), device="cpu") is not None


def test_a_model_of_few_positions_is_compared_on_the_beginnings_of_long_rows(tmp_path: Path) -> None:
    base = save_base("gpt2", tmp_path / "base")
    tuned = save_tuned(base, tmp_path / "tuned")
    delta = Delta(Checkpoint.open(base), Checkpoint.open(tuned))
    most = learned_positions(load_model(base))
    assert most is not None
    long = [Prompt("long", ({"role": "user", "content": "much to read " * most},))]
    pack = compress(delta, PackOptions(), calibration=long)
    assert 1 < measure_fidelity(delta.base, pack, delta.tuned, long).tokens < most
    assert most < pack.header.calibration_tokens  # which reads all of it, in parts


def test_prompts_beyond_the_room_for_logits_are_left_out(
    delta: Delta, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = compress(delta, PackOptions(strategy="exact"))
    vocabulary = load_model(delta.base.path).config.vocab_size
    monkeypatch.setattr(fidelity, "_LOGITS", 4 * vocabulary * 6 * 3)  # of three answers
    assert measure_fidelity(delta.base, pack, delta.tuned, prompts).tokens == 18
    monkeypatch.setattr(fidelity, "_LOGITS", 1)
    assert measure_fidelity(delta.base, pack, delta.tuned, prompts).tokens == 6


def test_a_pack_of_what_the_tuned_model_does_not_change_has_an_infinite_error(delta: Delta) -> None:
    found = Verification(3, error_by_role(Delta(delta.base, delta.base), compress(delta, PackOptions())))
    assert "attention infinite (this tuned model does not change it)" in " ".join(found.sentences())
    assert found.figures()["error_by_role"]["attention"] is None


def test_the_verdict_says_when_ranks_are_what_is_short(delta: Delta) -> None:
    found = Verification(3, {}, Fidelity(0.05, 1.0, 0, 0, 9), rank=16)
    assert found.sentences()[-1].endswith(
        "Its ranks end at 16: a larger --servable and a larger budget together bring it nearer."
    )
