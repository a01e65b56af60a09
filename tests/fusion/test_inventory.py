import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    JetMoeConfig,
    Llama4TextConfig,
    ModernBertDecoderConfig,
    PreTrainedConfig,
)

from graftllm.checkpoint import Checkpoint
from graftllm.delta import Delta
from graftllm.errors import CheckpointError
from graftllm.fusion.branches import why_merged_only
from graftllm.fusion.directory import add_packs, remove_pack, set_router, set_rules, write_grafted
from graftllm.fusion.inventory import take_inventory
from graftllm.fusion.rules import Rule
from graftllm.loading import load_model
from graftllm.packer import compress
from graftllm.packing_options import PackOptions
from graftllm.skillpack import SkillPack
from tests.architectures import CONFIGS, save_base, save_tuned
from tests.models import RouterFile, tokenizer

IN_FACTORS = PackOptions(strategy="paper", energy=0.7)
_SHAPE = {
    "vocab_size": 73, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 3,
}  # fmt: skip
_GATED = _SHAPE | {"intermediate_size": 24}
ODD: Mapping[str, tuple[PreTrainedConfig, str]] = {  # with a word for some parameters, which names and shapes mistake
    "falcon": (FalconConfig(**_SHAPE), "dense"),
    "llama4": (
        Llama4TextConfig(
            **_GATED, intermediate_size_mlp=24, num_key_value_heads=1, head_dim=8, num_local_experts=2,
            interleave_moe_layer_step=2,
        ),
        "shared_expert|q_proj",
    ),
    "llama4's router": (Llama4TextConfig(**_GATED, num_key_value_heads=1, head_dim=8, num_local_experts=2), "router"),
    "jetmoe": (
        JetMoeConfig(**_GATED, num_key_value_heads=1, kv_channels=8, num_local_experts=2, num_experts_per_tok=2),
        "router.layer",
    ),
    "modernbert": (ModernBertDecoderConfig(**_GATED, cls_token_id=1, sep_token_id=3), "lm_head.dense"),
}  # fmt: skip


def test_the_inventory_tells_what_each_pack_can_do(grafted: Path) -> None:
    set_router(grafted, RouterFile("one"))  # type: ignore
    set_rules(grafted, [Rule(pack="one", tag="TAG")])
    found = take_inventory(grafted)
    figures = json.loads(json.dumps(found.figures()))
    assert figures["packs"]["one"] | {"sha256": ""} == {
        "file_bytes": (grafted / "packs" / "one.safetensors").stat().st_size,
        "sha256": "", "description": "Skill one", "beside": False, "routed": True, "own_files": None,
    }  # fmt: skip
    assert figures["rules"] == [{"pack": "one", "tag": "TAG"}]
    assert [row[3:5] for row in found.rows()] == [("merged", "yes"), ("merged, beside", "no")]
    assert "router  older than two" in found.sentences()


@pytest.mark.parametrize("back", [False, True])
def test_a_shelf_that_changes_while_it_is_listed_is_listed_as_it_then_is(
    grafted: Path, monkeypatch: pytest.MonkeyPatch, back: bool
) -> None:
    load, spare = SkillPack.load, grafted / "spare.safetensors"
    shutil.copy(grafted / "packs" / "one.safetensors", spare)

    def changed_first(file: Path) -> SkillPack:
        monkeypatch.setattr(SkillPack, "load", load)
        remove_pack(grafted, "two")
        if back:
            add_packs(grafted, {"two": spare})
        return load(file)

    monkeypatch.setattr(SkillPack, "load", changed_first)
    found = take_inventory(grafted)
    assert list(found.packs) == (["one", "two"] if back else ["one"])
    if back:
        assert found.packs["two"] == found.packs["one"]


def _shelved(base: Path, packs: Mapping[str, SkillPack], out: Path) -> Path:
    for name, pack in packs.items():
        pack.save(out / f"{name}.safetensors")
    write_grafted(out / "g", str(base), {name: out / f"{name}.safetensors" for name in packs})
    return out / "g"


@pytest.mark.parametrize("name", CONFIGS)
def test_the_inventory_says_of_each_architecture_what_the_live_model_says(name: str, tmp_path: Path) -> None:
    base = save_base(name, tmp_path / "base")
    delta = Delta(Checkpoint.open(base), Checkpoint.open(save_tuned(base, tmp_path / "tuned")))
    options = {"paper": IN_FACTORS, "served": PackOptions(servable=4), "exact": PackOptions(strategy="exact")}
    packs = {kind: compress(delta, how) for kind, how in options.items()}
    found = take_inventory(_shelved(base, packs, tmp_path))
    try:
        model = load_model(base)
    except CheckpointError:  # no causal language model: nothing can run beside it
        assert {item.beside for item in found.packs.values()} == {None}
        assert f"{base}: transformers cannot load it as a causal language model" in found.unknown
        return
    expected = {kind: why_merged_only(model, pack) is None for kind, pack in packs.items()}
    assert {kind: item.beside for kind, item in found.packs.items()} == expected


@pytest.mark.parametrize("name", ODD)
def test_neither_names_nor_shapes_mislead_the_inventory(name: str, tmp_path: Path) -> None:
    config, words = ODD[name]
    torch.manual_seed(0)
    base = tmp_path / "base"
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    tokenizer().save_pretrained(base)
    tuned = save_tuned(base, tmp_path / "tuned")
    part = shutil.copytree(base, tmp_path / "part")
    before, after = load_file(base / "model.safetensors"), load_file(tuned / "model.safetensors")
    kept = {key: (after if re.search(words, key) else before)[key] for key in after}
    save_file(kept, part / "model.safetensors", metadata={"format": "pt"})
    packs = {
        "all": compress(Delta(Checkpoint.open(base), Checkpoint.open(tuned)), IN_FACTORS),
        "part": compress(Delta(Checkpoint.open(base), Checkpoint.open(part)), IN_FACTORS),
    }
    found, model = take_inventory(_shelved(base, packs, tmp_path)), load_model(base)
    expected = {kind: why_merged_only(model, pack) is None for kind, pack in packs.items()}
    assert {kind: item.beside for kind, item in found.packs.items()} == expected


def test_without_the_base_the_inventory_says_what_it_does_not_know(grafted: Path) -> None:
    for base, text in (
        ("../gone", f"its base, ../gone as seen from there, is not at {grafted.parent}/gone. Put it there, or correct"),
        ("org/base", "its base org/base is no directory, and not in the Hub's cache, where loading it puts it."),
        ("/gone", "its base /gone is no directory"),
    ):
        manifest = json.loads((grafted / "manifest.json").read_text())
        (grafted / "manifest.json").write_text(json.dumps(manifest | {"base": base}))
        found = take_inventory(grafted)
        assert [row[3] for row in found.rows()] == ["merged, beside?", "merged, beside?"]
        assert found.figures()["packs"]["two"]["beside"] is None
        assert f"beside  not known: {grafted}: {text}" in "\n".join(found.sentences())


def test_of_a_base_on_the_hub_the_inventory_reads_what_is_cached(
    home: Path, grafted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    model, commit = tmp_path / "cache" / "models--org--base", "0" * 40
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(commit)
    (model / "snapshots" / commit).mkdir(parents=True)
    shutil.copy(home / "base" / "config.json", model / "snapshots" / commit)
    manifest = json.loads((grafted / "manifest.json").read_text())
    (grafted / "manifest.json").write_text(json.dumps(manifest | {"base": "org/base"}))
    assert [item.beside for item in take_inventory(grafted).packs.values()] == [False, True]
