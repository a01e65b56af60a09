"""`graftllm cost`, from the command line."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from graftllm.cli import app
from graftllm.errors import RecipeError

ROOT = Path(__file__).parents[2]
LLAMA = ROOT / "recipes" / "implicit-fusion-llama3.1-8b.yaml"


def _cost(*arguments: str | Path) -> str:
    done = CliRunner().invoke(app, ["cost", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


def test_cost_says_what_is_asked_for_what_fits_and_what_it_assumes() -> None:
    shown = _cost(LLAMA)
    for words in ("What is asked for (at most)", "2x8xh100", "NO: sft, dpo", "Disk: at most", "Assumed:", "its name"):
        assert words in shown
    alone = _cost(LLAMA, "--hardware", "1xh100", "--answer-tokens", 400, "--prompts", 100)
    assert "Does not fit: sft of math:" in alone
    assert "an answer has 400 tokens" in alone
    assert "nvidia/HelpSteer2: not here, 100 prompts (assumed)" in alone


def test_cost_shows_how_accelerate_shares_a_training_out() -> None:
    launch = ROOT / "recipes" / "accelerate" / "fsdp2-2x8gpu.yaml"
    shown = _cost(LLAMA, "--accelerate", launch)
    assert "On 2x8xh100: 2 machines with 8 x NVIDIA H100 SXM" in shown
    assert "Launch: FSDP2, 16 processes on 2 machine(s), precision bf16; each holds 0.5 B of 8 B parameters" in shown
    found = json.loads(_cost(LLAMA, "--accelerate", launch, "--json"))
    assert found["launch"]["sharded"]
    assert [one["devices"] for one in found["hardware"]["2x8xh100"] if one["stage"] == "sft"] == [16] * 4


def test_a_mistake_is_one_line() -> None:
    with pytest.raises(RecipeError, match="--hardware: expected .*, found '8xabacus'; GPUs are 4090,"):
        _cost(LLAMA, "--hardware", "8xabacus")
