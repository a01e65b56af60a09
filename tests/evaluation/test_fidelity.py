from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from graftllm.checkpoint import Checkpoint
from graftllm.cli_packs import verify
from graftllm.delta import Delta
from graftllm.errors import CheckpointError
from graftllm.evaluation.fidelity import (
    CLOSE_KL,
    FAITHFUL_KL,
    FAITHFUL_TOP1,
    Fidelity,
    Verification,
    error_by_role,
    measure_fidelity,
    verify_pack,
)
from graftllm.generation import load_model, load_tokenizer, render_answered
from graftllm.packer import compress
from graftllm.packing_options import PackOptions
from graftllm.records import Prompt, write_rows
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
    with pytest.raises(CheckpointError, match="--prompts: the answers are compared with those of a tuned model"):
        verify_pack(base_dir, tmp_path / "p.safetensors", None, tmp_path / "rows.jsonl")
