from pathlib import Path

import pytest
import torch

from graftllm.checkpoint import Checkpoint
from graftllm.compression.calibration import collect_moments, read_calibration
from graftllm.errors import CompressionError, RecordError
from graftllm.generation import load_model, load_tokenizer, render_answered
from graftllm.records import Prompt


def test_moments_are_those_of_single_unpadded_rows(tuned: Checkpoint, prompts: list[Prompt]) -> None:
    rows = [*prompts[:9], Prompt("long", ({"role": "user", "content": "a rather longer question?" * 3},))]
    found = collect_moments(tuned.path, rows)
    model, words = load_model(tuned.path), load_tokenizer(tuned.path)
    seen: dict[str, torch.Tensor] = {}
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        sums = torch.zeros(())

        def add(module: torch.nn.Module, inputs: tuple) -> None:
            nonlocal sums
            sums = sums + inputs[0][0].T @ inputs[0][0]

        hook = model.get_submodule(name).register_forward_pre_hook(add)
        with torch.inference_mode():
            for row in rows:
                model(input_ids=torch.tensor([render_answered(words, row)[0]]))
        hook.remove()
        seen[f"{name}.weight"] = sums / found.tokens
    assert found.tokens == sum(len(render_answered(words, row)[0]) for row in rows)
    for name, expected in seen.items():
        assert torch.allclose(found.moments[name], expected, rtol=1e-3, atol=1e-4)


def test_layers_with_the_same_input_share_one_matrix(tuned: Checkpoint, prompts: list[Prompt]) -> None:
    moments = collect_moments(tuned.path, prompts[:4]).moments
    layer = "model.layers.1."
    q, k, v, o = (moments[f"{layer}self_attn.{part}_proj.weight"] for part in "qkvo")
    assert q is k is v
    assert q is not o
    assert moments[f"{layer}mlp.gate_proj.weight"] is moments[f"{layer}mlp.up_proj.weight"]
    assert moments[f"{layer}mlp.down_proj.weight"].shape == (64, 64)


def test_paragraphs_calibrate_as_well(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("first\nparagraph\n\n\n\nsecond\n")
    found = read_calibration(tmp_path / "text.txt")
    assert [prompt.messages[0]["content"] for prompt in found] == ["first\nparagraph", "second"]


def test_text_without_paragraphs_and_missing_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(CompressionError, match="expected paragraphs of text or JSONL rows, found an empty file"):
        read_calibration(tmp_path / "empty.txt")
    with pytest.raises(RecordError, match="no such file"):
        read_calibration(tmp_path / "none.txt")
