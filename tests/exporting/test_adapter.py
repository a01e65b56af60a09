import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file

from graftllm.checkpoint import Checkpoint, copy_companions
from graftllm.delta import Delta
from graftllm.errors import FusionError, ServingError, StorageError
from graftllm.exporting.adapter import LEGAL_RANKS, export_adapter, legal_rank
from graftllm.exporting.launch import export_shelf
from graftllm.fusion.directory import remove_pack, write_grafted
from graftllm.fusion.grafting import plug
from graftllm.fusion.manifest import Manifest, open_packs
from graftllm.loading import load_model, load_tokenizer
from graftllm.packer import compress
from graftllm.packing_options import PackOptions
from graftllm.skillpack import SkillPack
from tests.architectures import save_base
from tests.command import Command
from tests.models import perturb, save_llama, with_vocabulary

# PEFT 0.21 asks transformers by a name that 5.23 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
IDS = torch.tensor([[5, 6, 7, 8, 9, 30, 40]])


def _layers_alone(base: Path, tuned: Path, out: Path) -> Path:
    """Save a tuned checkpoint that differs from its base in matrices of layers alone."""
    tensors, changed = load_file(base / "model.safetensors"), load_file(tuned / "model.safetensors")
    for name, value in changed.items():
        if value.ndim == 2 and (".layers." in name or ".h." in name):
            tensors[name] = value
    out.mkdir()
    copy_companions(Checkpoint.open(base), out)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def _pack(base: Path, tuned: Path, file: Path, options: PackOptions) -> Path:
    compress(Delta(Checkpoint.open(base), Checkpoint.open(tuned)), options).save(file)
    return file


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base; packs of its layers alone, in factors (`thin`) and exactly (`exact`), and of all of it (`all`)."""
    home = tmp_path_factory.mktemp("export")
    base = save_llama(home / "base", dtype=torch.float32)
    tuned = perturb(base, home / "tuned", seed=1, scale=0.3)
    layers = _layers_alone(base, tuned, home / "layers")
    _pack(base, layers, home / "thin.safetensors", PackOptions(servable=4))
    _pack(base, layers, home / "exact.safetensors", PackOptions(strategy="exact"))
    _pack(base, tuned, home / "all.safetensors", PackOptions(servable=4))
    return home


@torch.inference_mode()
def _adapted(base: Path, adapter: Path) -> torch.Tensor:
    return PeftModel.from_pretrained(load_model(base), str(adapter)).eval()(input_ids=IDS).logits


@torch.inference_mode()
def _packed(base: Path, pack: Path) -> torch.Tensor:
    model = load_model(base)
    with plug(model, SkillPack.load(pack)):
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("name", ["thin", "exact"])
def test_peft_gives_the_logits_of_the_pack(home: Path, tmp_path: Path, name: str) -> None:
    adapter = export_adapter(SkillPack.load(home / f"{name}.safetensors"), home / "base", tmp_path / "out")
    expected = _packed(home / "base", home / f"{name}.safetensors")
    torch.testing.assert_close(_adapted(home / "base", tmp_path / "out"), expected, rtol=1e-4, atol=1e-4)
    assert adapter.losses == []
    assert adapter.kl < 1e-6
    assert adapter.energy == pytest.approx(1)


def test_an_export_spares_what_it_reads(home: Path, tmp_path: Path) -> None:
    shutil.copy(home / "thin.safetensors", tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(StorageError, match="expected a place apart from .*thin.safetensors, which is read"):
        export_adapter(SkillPack.load(tmp_path / "thin.safetensors"), home / "base", tmp_path)
    assert (tmp_path / "thin.safetensors").exists()


def test_an_adapter_that_was_trained_is_not_replaced_by_one_that_is_exported(home: Path, tmp_path: Path) -> None:
    pack = SkillPack.load(home / "thin.safetensors")
    for _ in range(2):  # what it wrote itself it may replace
        export_adapter(pack, home / "base", tmp_path / "out")
    trained = tmp_path / "out" / "adapter_model.safetensors"
    save_file(load_file(trained), trained, metadata={"format": "pt"})
    with pytest.raises(StorageError, match="found another one, which would be lost; choose another place"):
        export_adapter(pack, home / "base", tmp_path / "out")


def test_a_tokenizer_of_the_packs_own_stands_beside_the_adapter(home: Path, tmp_path: Path) -> None:
    tuned = shutil.copytree(home / "layers", tmp_path / "layers")
    (tuned / "chat_template.jinja").write_text("{{ messages[0].content }}")
    pack = _pack(home / "base", tuned, tmp_path / "own.safetensors", PackOptions(servable=4))
    for _ in range(2):  # what is there is replaced
        told = export_adapter(SkillPack.load(pack), home / "base", tmp_path / "out").sentences()
    assert any(line.startswith("The pack has a tokenizer, chat template or end tokens of its own") for line in told)
    assert load_tokenizer(tmp_path / "out").chat_template == "{{ messages[0].content }}"
    assert load_tokenizer(tmp_path / "out").get_vocab() == load_tokenizer(home / "base").get_vocab()
    export_adapter(SkillPack.load(home / "thin.safetensors"), home / "base", tmp_path / "plain")
    assert {file.name for file in (tmp_path / "plain").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_added_vocabulary_rows_are_no_adapters(home: Path, tmp_path: Path) -> None:
    wide = with_vocabulary(home / "base", tmp_path / "wide", 80)
    pack = _pack(home / "base", wide, tmp_path / "wide.safetensors", PackOptions(strategy="exact"))
    told = r"wide.safetensors: adds vocabulary rows to 'model.embed_tokens.weight', which no adapter holds. Write a"
    with pytest.raises(ServingError, match=told):
        export_adapter(SkillPack.load(pack), home / "base", tmp_path / "out", allow_drop=True)
    assert not (tmp_path / "out").exists()


def test_alpha_is_the_rank_of_every_module_and_patterns_are_anchored(home: Path, tmp_path: Path) -> None:
    export_adapter(SkillPack.load(home / "exact.safetensors"), home / "base", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"]
    assert config["alpha_pattern"] == config["rank_pattern"]
    for pattern, rank in config["rank_pattern"].items():
        assert pattern.startswith(r"^model\.layers\.")
        assert rank < config["r"]
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, value in tensors.items():
        module = name.removeprefix("base_model.model.").rpartition(".lora_")[0]
        rank = next(
            (r for p, r in config["rank_pattern"].items() if p == "^" + module.replace(".", r"\.")), config["r"]
        )
        assert value.shape[0 if "lora_A" in name else 1] == rank


def test_what_cannot_travel_is_refused_with_its_measured_effect(home: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ServingError,
        match=r"an adapter cannot hold all of it: embedding \(1 tensors, KL [\d.e-]+ nats per token\); norm \(5 "
        r"tensors, KL [\d.e-]+ nats per token\); together KL [\d.e-]+. Give --allow-drop",
    ):
        export_adapter(SkillPack.load(home / "all.safetensors"), home / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    adapter = export_adapter(SkillPack.load(home / "all.safetensors"), home / "base", tmp_path / "out", allow_drop=True)
    assert [(loss.what, loss.tensors) for loss in adapter.losses] == [("embedding", 1), ("norm", 5)]
    assert adapter.kl > 1e-4
    assert all(loss.kl > 0 for loss in adapter.losses)
    assert replace(adapter, kl=0.11).sentences()[-1].startswith("The skill is damaged: KL divergence is 0.11,")
    assert replace(adapter, kl=0.1).sentences()[-1].startswith("Left out: norm")


def test_a_rank_that_is_too_small_is_refused_with_its_measured_effect(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ServingError, match=r"truncation \(14 tensors, KL [\d.e-]+ nats per token\)"):
        export_adapter(SkillPack.load(home / "exact.safetensors"), home / "base", tmp_path / "out", max_rank=5)
    adapter = export_adapter(
        SkillPack.load(home / "exact.safetensors"), home / "base", tmp_path / "out", max_rank=5, allow_drop=True
    )
    assert adapter.rank == 8  # the next that vLLM takes
    assert adapter.energy < 1
    assert adapter.losses[0].kl == pytest.approx(adapter.kl, rel=1e-3)


def test_modules_that_store_inputs_by_outputs_travel_too(tmp_path: Path) -> None:
    base = save_base("gpt2", tmp_path / "base", dtype=torch.float32)
    layers = _layers_alone(base, perturb(base, tmp_path / "tuned", seed=1, scale=0.3), tmp_path / "layers")
    pack = _pack(base, layers, tmp_path / "pack.safetensors", PackOptions(strategy="exact"))
    export_adapter(SkillPack.load(pack), base, tmp_path / "out")
    torch.testing.assert_close(_adapted(base, tmp_path / "out"), _packed(base, pack), rtol=1e-4, atol=1e-4)


@given(st.integers(1, 512))
def test_ranks_are_raised_to_the_next_legal_one(rank: int) -> None:
    found = legal_rank(rank)
    assert found in LEGAL_RANKS
    assert rank <= found
    assert not any(rank <= one < found for one in LEGAL_RANKS)


def test_a_rank_beyond_what_engines_take_is_refused() -> None:
    with pytest.raises(ServingError, match="--max-rank: expected 1 to 512, which engines take at most; found 513"):
        legal_rank(513)


def test_a_shelf_becomes_adapters_and_a_command_that_serves_them(home: Path, tmp_path: Path) -> None:
    packs = {name: home / f"{name}.safetensors" for name in ("thin", "exact")}
    write_grafted(tmp_path / "grafted", str(home / "base"), packs)
    launch = export_shelf(tmp_path / "grafted", tmp_path / "out")
    here = (tmp_path / "out").resolve()
    assert launch.command == (
        f"vllm serve {(home / 'base').resolve()} --served-model-name base --enable-lora --max-lora-rank 32 "
        f"--max-loras 2 --lora-modules thin={here}/thin exact={here}/exact"
    )
    assert (tmp_path / "out" / "launch.sh").read_text() == f"#!/bin/sh\nexec {launch.command}\n"
    for name in packs:
        expected = _packed(home / "base", home / f"{name}.safetensors")
        torch.testing.assert_close(_adapted(home / "base", tmp_path / "out" / name), expected, rtol=1e-4, atol=1e-4)


def test_packs_that_no_adapter_can_hold_are_all_named_and_the_others_go_alone(
    home: Path, tmp_path: Path, graftllm: Command
) -> None:
    wide = with_vocabulary(home / "base", tmp_path / "wide", 80)
    _pack(home / "base", wide, tmp_path / "wide.safetensors", PackOptions(strategy="exact"))
    packs = {name: home / f"{name}.safetensors" for name in ("thin", "all", "exact")}
    write_grafted(tmp_path / "g", str(home / "base"), packs | {"wide": tmp_path / "wide.safetensors"})
    export = ["export", tmp_path / "g", "--format", "vllm", "--out", tmp_path / "out"]
    shown = graftllm(*export)
    assert (shown.code, shown.out) == (1, "") and not (tmp_path / "out").exists()
    assert f"{tmp_path / 'g'}: packs that no adapter can hold: all (an adapter cannot hold all of it: " in shown.line
    assert "; wide (adds vocabulary rows to 'model.embed_tokens.weight', which no adapter holds). " in shown.line
    assert "Export the others alone with --pack thin --pack exact. Give --allow-drop to leave this out" in shown.line
    shown = graftllm(*export, "--pack", "thin", "--pack", "exact")
    assert shown.code == 0 and f"--lora-modules thin={tmp_path}/out/thin exact={tmp_path}/out/exact" in shown.out
    assert {place.name for place in (tmp_path / "out").iterdir()} == {"thin", "exact", "launch.sh"}
    shown = graftllm(*export, "--pack", "wide")
    assert "packs that no adapter can hold: wide (adds" in shown.line and "Export the others" not in shown.line
    with pytest.raises(FusionError, match="pack: expected one of thin, all, exact, wide; found 'math'"):
        export_shelf(tmp_path / "g", tmp_path / "out", names=["math"])


def test_a_shelf_that_changes_while_it_is_opened_is_exported_as_it_is_then(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packs = {name: home / f"{name}.safetensors" for name in ("thin", "exact")}
    write_grafted(tmp_path / "g", str(home / "base"), packs)

    def opened(directory: Path, found: Manifest) -> dict[str, SkillPack]:
        if "exact" in found.packs:
            remove_pack(directory, "exact")
        return open_packs(directory, found)

    monkeypatch.setattr("graftllm.exporting.launch.open_packs", opened)
    assert list(export_shelf(tmp_path / "g", tmp_path / "out").adapters) == ["thin"]


def test_a_pack_of_a_shelf_that_was_changed_is_not_exported(home: Path, tmp_path: Path) -> None:
    write_grafted(tmp_path / "g", str(home / "base"), {"thin": home / "thin.safetensors"})
    (tmp_path / "g" / "packs" / "thin.safetensors").unlink()
    shutil.copy(home / "exact.safetensors", tmp_path / "g" / "packs" / "thin.safetensors")
    with pytest.raises(FusionError, match="the file was changed"):
        export_shelf(tmp_path / "g", tmp_path / "out")
