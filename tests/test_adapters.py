import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from graftllm import adapters, cli
from graftllm.adapter_settings import is_quick, read_settings
from graftllm.adapters import AdaptedCheckpoint, open_adapter, open_tuned, origin, tuned_model
from graftllm.checkpoint import Checkpoint
from graftllm.compression.workspace import packing_key
from graftllm.delta import Delta
from graftllm.errors import CheckpointError
from graftllm.packer import compress
from graftllm.packing_options import PackOptions
from graftllm.records import write_rows
from graftllm.skillpack import SkillPack
from tests.architectures import save_base
from tests.models import rows, save_llama

# PEFT 0.21 asks transformers by a name that 5.23 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning", "ignore::UserWarning:peft")

ATTENTION = ["q_proj", "v_proj"]
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": "all-linear"},
    "rslora": {"target_modules": ATTENTION, "use_rslora": True},
    "dora": {"target_modules": [*ATTENTION, "down_proj"], "use_dora": True},
    "patterns": {
        "target_modules": ATTENTION,
        "rank_pattern": {"layers.1.self_attn.q_proj": 5},
        "alpha_pattern": {"v_proj": 3, r"^model.layers.1.self_attn.q_proj": 7},
    },
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "dora embedding": {"target_modules": ["embed_tokens"], "use_dora": True},
    "saved whole": {"target_modules": ATTENTION, "modules_to_save": ["lm_head", "norm"]},
    "biases": {"target_modules": ATTENTION, "bias": "all"},
    "lora bias": {"target_modules": ATTENTION, "lora_bias": True},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("adapters") / "base"
    return Checkpoint.open(save_llama(path, dtype=torch.float32, tie_word_embeddings=False, attention_bias=True))


def save_adapter(base: Checkpoint, out: Path, **settings: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    """Save an adapter with random values; return its directory and the weights that PEFT merges it into."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **settings))
    for value in adapted.parameters():
        if value.requires_grad:
            value.data += 0.2 * torch.randn_like(value)
    adapted.save_pretrained(out)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32), out)
    merged: Any = again.merge_and_unload()
    return out, {name: value.detach() for name, value in merged.state_dict().items()}


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_merged_weights_are_those_of_peft(base: Checkpoint, tmp_path: Path, kind: str) -> None:
    directory, merged = save_adapter(base, tmp_path / "adapter", **SETTINGS[kind])
    adapted = open_tuned(directory, base)
    assert isinstance(adapted, AdaptedCheckpoint)
    changed = [name for name in base.names() if not torch.equal(base.tensor(name), adapted.tensor(name))]
    assert changed
    for name in base.names():
        torch.testing.assert_close(adapted.tensor(name), merged[name], rtol=1e-5, atol=1e-6)


def test_rows_have_the_bits_of_the_whole(base: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, _ = save_adapter(base, tmp_path / "adapter", **SETTINGS["dora embedding"])
    monkeypatch.setattr(
        adapters, "row_blocks", lambda shape: [(i, min(i + 7, shape[0])) for i in range(0, shape[0], 7)]
    )
    adapted = open_adapter(directory, base)
    whole = adapted.tensor("model.embed_tokens.weight")
    for start, stop in ((0, 3), (5, 20), (7, 14), (60, len(whole)), (4, 4)):
        assert torch.equal(adapted.rows("model.embed_tokens.weight", start, stop), whole[start:stop])


def test_layers_that_are_stored_turned_are_merged_turned(tmp_path: Path) -> None:
    base = Checkpoint.open(save_base("gpt2", tmp_path / "base", dtype=torch.float32))
    for use_dora in (False, True):
        settings = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": use_dora}
        directory, merged = save_adapter(base, tmp_path / f"adapter-{use_dora}", **settings)
        adapted = open_tuned(directory, base)
        for name in base.names():
            torch.testing.assert_close(adapted.tensor(name), merged[name], rtol=1e-5, atol=1e-6)


def test_names_of_the_live_model_are_found_under_those_of_the_checkpoint(tmp_path: Path) -> None:
    saved = save_base("gpt2", tmp_path / "base", dtype=torch.float32)
    tensors = load_file(saved / "model.safetensors")
    bare = {name.removeprefix("transformer."): value for name, value in tensors.items()}  # as the Hub's gpt2 has them
    save_file(bare, saved / "model.safetensors", metadata={"format": "pt"})
    base = Checkpoint.open(saved)
    directory, merged = save_adapter(base, tmp_path / "adapter", target_modules=["c_attn"], fan_in_fan_out=True)
    adapted = open_tuned(directory, base)
    name = "h.1.attn.c_attn.weight"
    assert not torch.equal(adapted.tensor(name), base.tensor(name))
    torch.testing.assert_close(adapted.tensor(name), merged[f"transformer.{name}"], rtol=1e-5, atol=1e-6)


def test_an_adapter_becomes_a_pack_that_gives_its_merged_weights(base: Checkpoint, tmp_path: Path) -> None:
    directory, merged = save_adapter(base, tmp_path / "adapter", **SETTINGS["rslora"])
    delta = Delta(base, open_tuned(directory, base))
    assert delta.tuned.nbytes == base.parameters * 4
    pack = compress(delta, PackOptions(strategy="exact"))
    for name in base.names():
        torch.testing.assert_close(pack.restore(name, base.tensor(name)), merged[name], rtol=1e-5, atol=1e-6)


def test_a_loadable_copy_gives_the_adapters_answers(base: Checkpoint, tmp_path: Path) -> None:
    directory, merged = save_adapter(base, tmp_path / "adapter", **SETTINGS["dora"])
    with tuned_model(directory, base, live=True) as checkpoint:
        model = AutoModelForCausalLM.from_pretrained(checkpoint.path)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, merged[name], rtol=1e-5, atol=1e-6)
    assert not checkpoint.path.exists()
    with tuned_model(directory, base, live=False) as lazy:
        assert isinstance(lazy, AdaptedCheckpoint)


@pytest.mark.parametrize("tied", [False, True])
def test_added_tokens_come_along(tmp_path: Path, tied: bool) -> None:
    base = Checkpoint.open(save_llama(tmp_path / "base", dtype=torch.float32, tie_word_embeddings=tied))
    model = AutoModelForCausalLM.from_pretrained(base.path)
    rows = base.specs["model.embed_tokens.weight"].shape[0]
    model.resize_token_embeddings(rows + 3, mean_resizing=False)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=ATTENTION, task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    opened = open_tuned(tmp_path / "adapter", base)
    assert torch.equal(opened.tensor("model.embed_tokens.weight"), model.get_input_embeddings().weight)
    assert Delta(base, opened).config_changes() == {"vocab_size": rows + 3}
    with tuned_model(tmp_path / "adapter", base, live=True) as checkpoint:
        assert AutoModelForCausalLM.from_pretrained(checkpoint.path).config.vocab_size == rows + 3


def test_the_card_says_that_an_adapter_was_merged(base: Checkpoint, tmp_path: Path) -> None:
    save_adapter(base, tmp_path / "adapter", target_modules=ATTENTION, use_dora=True)
    assert origin(tmp_path / "adapter") == ("the PEFT adapter adapter (DoRA of rank 4), merged",)
    assert origin(base.path) == ()


# What it cannot take, each by its text.


def _with_config(directory: Path, **changes: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _with_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, directory / "adapter_model.safetensors")


_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (lambda d: _with_config(d, peft_type="IA3"), "expected peft_type LORA .* found IA3. Merge it with PEFT"),
        (lambda d: _with_config(d, trainable_token_indices=[1]), "found the setting trainable_token_indices. Merge it"),
        (lambda d: _with_config(d, target_parameters=["experts"]), "found the setting target_parameters"),
        (lambda d: _with_config(d, some_new_formula={"a": 1}), "found the setting some_new_formula"),
        (lambda d: _with_config(d, init_lora_weights="pissa"), "is 'pissa', which changes the base's own weights"),
        (lambda d: _with_config(d, alpha_pattern={"q_[z-a]": 1}), "'q_.z-a.' is no pattern of names .bad char"),
        (lambda d: _with_config(d, r="many"), "not an adapter's config .r: Input should be a valid integer"),
        (lambda d: _with_config(d, r=3), "q_proj.lora_A.weight': expected factors of rank 3, found shapes .4, 32."),
        (lambda d: _with_config(d, use_dora=True), "expected lora_A and lora_B and a magnitude for 'model.layers.0"),
        (lambda d: (d / "adapter_config.json").write_text("{"), "not an adapter's config"),
        (
            lambda d: (d / "adapter_model.safetensors").rename(d / "adapter_model.bin"),
            "expected adapter_model.safetensors, found adapter_model.bin. Only safetensors is read",
        ),
        (lambda d: (d / "adapter_model.safetensors").write_bytes(b"x" * 40), "not a whole safetensors file"),
        (lambda d: _with_tensors(d, lambda t: t.pop(_A)), "for 'model.layers.0.self_attn.q_proj', found lora_B"),
        (
            lambda d: _with_tensors(d, lambda t: t.update({_A: torch.zeros(4, 30)})),
            "expected a layer of shape .32, 32., found one of .32, 30..* trained on another model",
        ),
        (
            lambda d: _with_tensors(d, lambda t: t.update({_A.replace("layers.0", "layers.9"): torch.zeros(4, 32)})),
            "is for 'model.layers.9.self_attn.q_proj.weight', but .* stores no such tensor. Give the base",
        ),
        (
            lambda d: _with_tensors(d, lambda t: t.update({"model.norm.weight": torch.zeros(31)})),
            "'model.norm.weight': expected .32., found .31.",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_merged_is_refused(
    base: Checkpoint, tmp_path: Path, breaks: Callable[[Path], object], message: str
) -> None:
    directory, _ = save_adapter(base, tmp_path / "adapter", target_modules=ATTENTION)
    breaks(directory)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_tuned(directory, base)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "XLORA"])
def test_an_adapter_that_changes_no_weights_is_told_apart_from_one_to_merge(tmp_path: Path, kind: str) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "num_virtual_tokens": 8}))
    with pytest.raises(CheckpointError, match=f"found {kind}, which changes no weights .* Train a LoRA or") as caught:
        read_settings(tmp_path)
    assert "merge_and_unload" not in str(caught.value)


def test_patterns_of_names_are_those_that_peft_writes_and_people_do() -> None:
    for pattern in (
        "q_proj",
        "model.layers.1.self_attn.q_proj",
        r"^model\.layers\.10\.mlp",
        r".*\." + re.escape("up-proj"),
        r"layers\.\d+\.(?:self_attn|mlp)\..*?_proj$",
        "layers.[0-9]+.(q_proj|v_proj)",
        "q_proj|v_proj",
    ):
        assert is_quick(pattern), pattern


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj(",
        "(" * 100_000,
        "(.*)*x",
        "(a|aa)+$",
        "(.|.)" * 30,
        ".*.*.*.*x",
        "a?" * 40,
        r"(\w+\.?)+$",
        "(?=a)",
        ".{1,9}",
        r"(a)\1",
        "(a|a)b",
    ],
)
def test_a_pattern_of_names_that_could_be_matched_for_ever_is_refused(tmp_path: Path, pattern: str) -> None:
    for key in ("rank_pattern", "alpha_pattern"):
        config = {"peft_type": "LORA", key: {pattern: 4}}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(
            CheckpointError, match=r"expected patterns of names with at most 3 parts such as \.\* or"
        ) as e:
            read_settings(tmp_path)
        assert "\n" not in str(e.value) and "could take for ever to match" in str(e.value)


def test_an_adapter_of_a_tied_embedding_alone_is_refused(tmp_path: Path) -> None:
    base = Checkpoint.open(save_llama(tmp_path / "base", dtype=torch.float32))
    directory, _ = save_adapter(base, tmp_path / "adapter", target_modules=["embed_tokens"])
    with pytest.raises(CheckpointError, match="uses as the output head as well, so no checkpoint of this base does"):
        open_tuned(directory, base)


def test_a_packing_of_an_adapter_is_known_again(base: Checkpoint, tmp_path: Path) -> None:
    """It is merged anew, to another place, each time."""
    adapter, _ = save_adapter(base, tmp_path / "adapter")
    keys = set()
    for _ in range(2):
        with tuned_model(adapter, base, live=True) as tuned:
            keys.add(packing_key(Delta(base, tuned), PackOptions(), [], "cpu"))
    assert len(keys) == 1
    os.utime(adapter / "adapter_model.safetensors", (1, 1))
    with tuned_model(adapter, base, live=True) as tuned:
        assert packing_key(Delta(base, tuned), PackOptions(), [], "cpu") not in keys


def test_the_command_packs_and_verifies_an_adapter(base: Checkpoint, tmp_path: Path) -> None:
    save_adapter(base, tmp_path / "adapter", target_modules=ATTENTION)
    write_rows(tmp_path / "rows.jsonl", rows(8))
    common = ["--base", str(base.path), "--tuned", str(tmp_path / "adapter")]
    runner, out = CliRunner(), str(tmp_path / "pack.safetensors")
    calibrated = ["--calibration", str(tmp_path / "rows.jsonl")]
    packed = runner.invoke(cli.app, ["pack", *common, "--out", out, "--budget", "60KB", *calibrated])
    assert packed.exit_code == 0, packed.output
    assert SkillPack.load(out).header.card.provenance.sources == ("the PEFT adapter adapter (LoRA of rank 4), merged",)
    prompts = ["--prompts", str(tmp_path / "rows.jsonl"), "--json"]
    verified = runner.invoke(cli.app, ["verify", *common, "--pack", out, *prompts])
    assert json.loads(verified.output.splitlines()[-1])["kl"] < 0.1
