from pathlib import Path

import pytest
import torch

from graftllm.delta import Delta
from graftllm.errors import CheckpointError
from graftllm.evaluation.fidelity import error_by_role, measure_fidelity, verify_pack
from graftllm.generation import load_model, load_tokenizer, render_answered
from graftllm.recipe import PackOptions
from graftllm.records import Prompt, write_rows
from graftllm.skillpack import compress


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
    for prompt in prompts[:5]:
        ids, start = render_answered(words, prompt)
        with torch.inference_mode():
            p, q = (model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1].double() for model in models)
        total += float(torch.nn.functional.kl_div(q.log_softmax(1), p.log_softmax(1), log_target=True, reduction="sum"))
        same += int((p.argmax(1) == q.argmax(1)).sum())
        count += len(p)
    assert found.tokens == count
    assert found.kl == pytest.approx(total / count, rel=1e-4)
    assert found.top1_agreement == pytest.approx(same / count)


def test_prompts_without_answers_are_compared_as_they_are(delta: Delta, prompts: list[Prompt]) -> None:
    bare = [Prompt(prompt.id, prompt.question) for prompt in prompts[:4]]
    found = measure_fidelity(delta.base, compress(delta, PackOptions(strategy="exact")), delta.tuned, bare)
    assert found.tokens > 4 * 10


def test_errors_by_role_are_relative_to_the_delta(delta: Delta) -> None:
    errors = error_by_role(delta, compress(delta, PackOptions(strategy="paper", energy=0.9)))
    assert errors["norm"] == 0
    assert 0 < errors["embedding"] < 0.2
    # Energy 0.9 alone leaves sqrt(0.1); rounding adds to it.
    assert 0.25 < errors["mlp"] < 0.9


def test_verify_checks_what_it_is_given(
    base_dir: Path, tuned_dir: Path, delta: Delta, prompts: list[Prompt], tmp_path: Path
) -> None:
    compress(delta, PackOptions(strategy="paper")).save(tmp_path / "p.safetensors")
    write_rows(tmp_path / "rows.jsonl", prompts)
    alone = verify_pack(base_dir, tmp_path / "p.safetensors", None, None)
    assert alone.figures() == {"intact": True, "parameters": 20}
    full = verify_pack(base_dir, tmp_path / "p.safetensors", tuned_dir, tmp_path / "rows.jsonl")
    assert {"kl", "top1_agreement", "tokens", "error_by_role"} <= set(full.figures())
    assert len(full.sentences()) == 3
    with pytest.raises(CheckpointError, match="--prompts: the answers are compared with those of a tuned model"):
        verify_pack(base_dir, tmp_path / "p.safetensors", None, tmp_path / "rows.jsonl")
