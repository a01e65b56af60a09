import gc
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    CLIPConfig,
    CLIPModel,
    CTRLConfig,
    CTRLLMHeadModel,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    SiglipConfig,
    SiglipModel,
    XLNetConfig,
    XLNetLMHeadModel,
)
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.pytorch_utils import Conv1D

from graftllm.checkpoint import Checkpoint
from graftllm.compression import calibration, sensitivity
from graftllm.compression.calibration import collect_moments
from graftllm.compression.sensitivity import measure_sensitivity
from graftllm.delta import Delta
from graftllm.errors import CheckpointError, CompressionError
from graftllm.live import bindings
from graftllm.loading import load_model, load_tokenizer
from graftllm.packer import compress
from graftllm.packing_options import PackOptions
from graftllm.records import Prompt
from graftllm.rendering import render_answered
from graftllm.streaming import WeightsAbsent, check_reads_text, is_language_model, stream_model
from tests.architectures import CONFIGS, load, save_base, save_tuned
from tests.models import perturb, rows, save_reward_model, tokenizer


def test_calibration_by_few_tokens_is_told(
    delta: Delta, prompts: list[Prompt], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GRAFTLLM_QUIET", raising=False)
    compress(delta, PackOptions(budget="40%"), calibration=prompts[:1], device="cpu")
    told = r"graftllm: calibration: \d+ tokens are few for layers of 32 inputs, .* give a few hundred rows"
    assert re.search(told, capsys.readouterr().err)
    compress(delta, PackOptions(budget="40%"), calibration=prompts, device="cpu")
    assert "are few" not in capsys.readouterr().err


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


TEXT = [name for name in CONFIGS if name not in ("t5", "vit")]


def _seen_by_modules(name: str, path: Path, rows: list[Prompt]) -> tuple[dict[str, torch.Tensor], int]:
    """What every linear module of the whole model sees when it reads the rows one by one; and how many tokens."""
    model, words = load(name, path, dtype=torch.float32), load_tokenizer(path)
    sums: dict[str, torch.Tensor] = {}

    def add(key: str, module: torch.nn.Module, inputs: tuple) -> None:
        x = inputs[0].flatten(0, -2)
        sums[key] = sums.get(key, 0) + x.T @ x

    for key, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D):
            module.register_forward_pre_hook(partial(add, f"{key}.weight"))
    tokens = 0
    with torch.inference_mode():
        for row in rows:
            ids = render_answered(words, row)[0]
            model(input_ids=torch.tensor([ids]))
            tokens += len(ids)
    return {key: total / tokens for key, total in sums.items()}, tokens


@pytest.mark.parametrize("name", TEXT)
def test_every_linear_layer_of_every_architecture_is_watched(name: str, tmp_path: Path) -> None:
    tuned = save_base(name, tmp_path / "tuned")
    rows = [*prompts_of_many_lengths()]
    found = collect_moments(tuned, rows)
    expected, tokens = _seen_by_modules(name, tuned, rows)
    assert found.tokens == tokens
    specs = Checkpoint.open(tuned).specs
    model = load(name, tuned)
    stored = {live: binding.stored[0] for binding in bindings(model, specs) for live in binding.live}
    tied = model.all_tied_weights_keys
    for live, mean in expected.items():
        key = stored[tied.get(live, live)]
        assert torch.allclose(found.moments[key], mean, rtol=1e-3, atol=1e-4 * float(mean.abs().max())), key
        side = 0 if key in found.transposed else 1
        assert found.moments[key].shape == (specs[key].shape[side],) * 2
    assert bool(found.transposed) == (name == "gpt2")
    experts = {key for key in found.moments if ".experts." in key}
    assert {key for key in found.moments if key not in experts} == {stored[tied.get(live, live)] for live in expected}
    told = experts | found.unseen
    stacks = {key for key in told if specs[key].shape[2:]}  # of which no token reached one expert
    assert told - stacks == {key for key in specs if re.search(r"experts\.\d", key)}
    assert all(".experts." in key for key in stacks)


def prompts_of_many_lengths() -> list[Prompt]:
    return [Prompt(str(i), ({"role": "user", "content": "Some words: " + "abc" * i},)) for i in range(1, 9)]


def test_an_experts_moments_are_of_the_tokens_that_reach_it(tmp_path: Path) -> None:
    tuned = save_base("qwen3_moe", tmp_path / "tuned")
    rows = prompts_of_many_lengths()
    found = collect_moments(tuned, rows)
    model, words = load("qwen3_moe", tuned, dtype=torch.float32), load_tokenizer(tuned)
    experts = model.model.layers[1].mlp.experts
    outer, inner = torch.zeros(4, 16, 16), torch.zeros(4, 16, 16)

    def add(module: torch.nn.Module, inputs: tuple) -> None:
        x, chosen, _ = inputs
        for expert in range(4):
            mine = x[(chosen == expert).any(1)]
            outer[expert] += mine.T @ mine
            gate, up = (mine @ experts.gate_up_proj[expert].T).chunk(2, dim=1)
            product = torch.nn.functional.silu(gate) * up
            inner[expert] += product.T @ product

    experts.register_forward_pre_hook(add)
    with torch.inference_mode():
        for row in rows:
            model(input_ids=torch.tensor([render_answered(words, row)[0]]))
    for expert in range(4):
        name = f"model.layers.1.mlp.experts.{expert}"
        for part, sums in (("gate_proj", outer), ("up_proj", outer), ("down_proj", inner)):
            if outer[expert].any():
                expected = sums[expert] / found.tokens
                assert torch.allclose(found.moments[f"{name}.{part}.weight"], expected, rtol=1e-3, atol=1e-5)
            else:
                assert f"{name}.{part}.weight" in found.unseen


def test_an_expert_that_no_token_reaches_has_no_moments(tmp_path: Path) -> None:
    tuned = save_base("mixtral", tmp_path / "tuned")
    tensors = load_file(tuned / "model.safetensors")
    for layer in range(2):  # the inputs of the router are made positive, so that expert 3 is never chosen
        tensors[f"model.layers.{layer}.post_attention_layernorm.weight"][:] = 0
    tensors["model.layers.0.block_sparse_moe.gate.weight"][3] = -9
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    found = collect_moments(tuned, prompts_of_many_lengths())
    # All inputs of the experts are zero now: none of them has seen anything.
    assert len(found.unseen) == 2 * 4 * 3
    assert not any(".experts." in name for name in found.moments)


def test_moments_beyond_the_bound_are_the_same_and_wait_in_files(
    tuned: Checkpoint, prompts: list[Prompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = collect_moments(tuned.path, prompts[:5])
    monkeypatch.setattr(calibration, "MEMORY_BYTES", 3 * 32 * 32 * 4)
    spooled = collect_moments(tuned.path, prompts[:5], spool=tmp_path)
    files = list(tmp_path.glob("moments-*/*.f32"))
    assert len(files) == len(set(whole.shared.values())) - 3
    assert spooled.shared == whole.shared
    for name, mean in whole.moments.items():
        assert torch.equal(spooled.moments[name], mean)
    del spooled
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_no_weight_stays_in_memory(tuned: Checkpoint) -> None:
    streamed = stream_model(tuned, device=torch.device("cpu"))
    seen: list[bool] = []
    layers = streamed.model.model.layers
    layers[1].register_forward_pre_hook(lambda *_: seen.extend(map(_is_there, layers[0].parameters())))
    layers[1].register_forward_pre_hook(lambda *_: seen.extend(map(_is_there, layers[1].parameters())))
    with torch.inference_mode():
        logits = streamed.model(input_ids=torch.arange(4, 30)[None]).logits
        expected = load_model(tuned.path, device="cpu")(input_ids=torch.arange(4, 30)[None]).logits
    assert torch.equal(logits, expected)
    count = len(list(layers[0].parameters()))
    assert seen == [False] * count + [True] * count
    assert not any(map(_is_there, streamed.model.parameters()))


def _is_there(value: torch.Tensor) -> bool:
    try:
        value.sum()
    except WeightsAbsent:
        return False
    return True


def test_a_weight_that_is_not_in_memory_tells_its_device_and_dtype(tuned: Checkpoint) -> None:
    model = stream_model(tuned, device=torch.device("cpu")).model
    assert {(value.device.type, value.dtype) for value in model.parameters()} == {("cpu", torch.float32)}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit", r"reads input_ids alone, but ViTForImageClassification reads pixel_values. Pack it without"),
        ("t5", r"but T5ForConditionalGeneration reads one text and writes another. Pack it without calibration"),
    ],
)
def test_models_that_do_not_read_one_text_are_refused(name: str, message: str, tmp_path: Path) -> None:
    base = save_base(name, tmp_path / "base")
    with pytest.raises(CompressionError, match=message):
        collect_moments(base, prompts_of_many_lengths())
    delta = Delta(Checkpoint.open(base), Checkpoint.open(save_tuned(base, tmp_path / "tuned")))
    for options in (PackOptions(), PackOptions(strategy="paper"), PackOptions(strategy="exact", budget="20%")):
        with pytest.raises(CompressionError, match=message):
            compress(delta, options, calibration=prompts_of_many_lengths())


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_a_classifier_is_calibrated_by_what_its_layers_see_and_packs_alike_twice(name: str, tmp_path: Path) -> None:
    base = save_base(name, tmp_path / "base", kind=AutoModelForSequenceClassification)
    delta = Delta(Checkpoint.open(base), Checkpoint.open(save_tuned(base, tmp_path / "tuned")))
    files = []
    for seed, given in enumerate((prompts_of_many_lengths(), prompts_of_many_lengths(), [])):
        torch.manual_seed(seed)
        pack = compress(delta, PackOptions(budget="40%"), calibration=given)
        pack.save(tmp_path / "pack.safetensors")
        assert bool(pack.header.calibration_tokens) == bool(given)
        files.append((tmp_path / "pack.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


def test_a_classifier_without_a_token_for_padding_is_calibrated(tmp_path: Path) -> None:
    tuned = save_base("llama", tmp_path / "tuned", kind=AutoModelForSequenceClassification)
    config = json.loads((tuned / "config.json").read_text())
    found = []
    for pad in (3, None):
        (tuned / "config.json").write_text(json.dumps(config | {"pad_token_id": pad}))
        found.append(collect_moments(tuned, prompts_of_many_lengths()))
    assert found[0].tokens == found[1].tokens
    assert set(found[0].moments) == set(found[1].moments)
    assert "score.weight" in found[1].moments
    assert all(torch.equal(value, found[1].moments[name]) for name, value in found[0].moments.items())


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("llama", None, True),
        ("gemma2", None, True),
        ("bert", None, True),
        ("t5", None, False),
        ("vit", None, False),
        ("llama", AutoModelForSequenceClassification, False),
        ("gemma2", AutoModelForSequenceClassification, False),  # though the tied embedding could be its head
        ("bert", AutoModelForTokenClassification, False),
        ("llama", AutoModel, False),
    ],
)
def test_a_language_model_has_a_head_for_words(name: str, kind: Any, expected: bool, tmp_path: Path) -> None:
    assert is_language_model(Checkpoint.open(save_base(name, tmp_path, kind=kind))) == expected


def test_a_checkpoint_that_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    tuned = save_base("llama", tmp_path / "tuned")
    tensors = load_file(tuned / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"has no tensor for 'model.layers.1.mlp.up_proj.weight' of LlamaForCausa"
    ):
        collect_moments(tuned, prompts_of_many_lengths())


def test_a_class_that_transformers_does_not_know_is_named(tmp_path: Path) -> None:
    tuned = save_base("llama", tmp_path / "tuned")
    config = (tuned / "config.json").read_text().replace("LlamaForCausalLM", "TomorrowForCausalLM")
    (tuned / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=r"has no model class 'TomorrowForCausalLM', which config.json names"):
        collect_moments(tuned, prompts_of_many_lengths())


def test_a_model_that_cannot_be_streamed_is_refused(tuned: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: LlamaModel, input_ids: torch.Tensor, **_: object) -> None:
        print(input_ids.float() @ self.embed_tokens.weight)

    monkeypatch.setattr(LlamaModel, "forward", forward)
    with pytest.raises(
        CompressionError, match=r"LlamaForCausalLM uses weights of a module without running it, so they"
    ):
        collect_moments(tuned.path, prompts_of_many_lengths())


def test_a_model_that_scales_its_own_weights_is_refused(tmp_path: Path) -> None:
    config = RwkvConfig(vocab_size=len(tokenizer()), hidden_size=16, context_length=64, num_hidden_layers=2)
    RwkvForCausalLM(config).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(CompressionError, match=r"RwkvForCausalLM uses weights of a module without .* \(aten.div_"):
        collect_moments(tmp_path, prompts_of_many_lengths())


def test_moments_that_are_no_numbers_end_in_an_error(tmp_path: Path) -> None:
    path = save_reward_model(tmp_path / "base")
    tuned = perturb(path, tmp_path / "tuned", seed=1)
    tensors = load_file(tuned / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"][0] = float("nan")
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    delta = Delta(Checkpoint.open(path), Checkpoint.open(tuned))
    with pytest.raises(CompressionError, match="calibration: what reaches '.* is not finite on these rows"):
        compress(delta, PackOptions(), calibration=rows(4))


def test_rows_without_a_token_to_predict_are_refused(tuned: Checkpoint, delta: Delta) -> None:
    words = load_tokenizer(tuned.path)
    assert words.chat_template
    single = [Prompt("one", ({"role": "user", "content": ""},))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sensitivity, "render_answered", lambda *_: ([5], 1))
        with pytest.raises(CompressionError, match="calibration: expected rows of two tokens or more"):
            compress(delta, PackOptions(), calibration=single)


def test_quantized_weights_are_refused_before_anything_runs(tmp_path: Path) -> None:
    base = save_base("llama", tmp_path / "base")
    tuned = save_tuned(base, tmp_path / "tuned")
    config = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    delta = Delta(Checkpoint.open(base), Checkpoint.open(tuned))
    with pytest.raises(CompressionError, match=r"its weights are quantized \(fp8\), so calibration text cannot run"):
        compress(delta, PackOptions(strategy="paper"), calibration=prompts_of_many_lengths())
    assert compress(delta, PackOptions(strategy="exact")).header.tensors


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        (CLIPModel, CLIPConfig(projection_dim=8), "reads something else"),
        (SiglipModel, SiglipConfig(), "reads pictures, too"),
    ],
)
def test_models_of_text_and_pictures_are_refused(kind: Any, config: Any, message: str, tmp_path: Path) -> None:
    for part in (config.text_config, config.vision_config):
        part.hidden_size, part.intermediate_size, part.num_hidden_layers, part.num_attention_heads = 16, 24, 1, 2
    config.text_config.vocab_size, config.text_config.projection_size = len(tokenizer()), 16
    config.vision_config.image_size, config.vision_config.patch_size = 8, 4
    kind(config).save_pretrained(tmp_path)
    with pytest.raises(CompressionError, match=message):
        check_reads_text(Checkpoint.open(tmp_path))


@pytest.mark.parametrize("name", ["recurrent_gemma", "xlnet"])
def test_stacks_that_are_no_experts_are_not_called_unreached(name: str, tmp_path: Path) -> None:
    words = len(tokenizer())
    config = {
        "recurrent_gemma": RecurrentGemmaConfig(
            vocab_size=words, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
            lru_width=16, attention_window_size=32, pad_token_id=0, bos_token_id=1, eos_token_id=3,
        ),
        "xlnet": XLNetConfig(vocab_size=words, d_model=16, n_layer=1, n_head=2, d_inner=24, pad_token_id=0),
    }[name]  # fmt: skip
    kind = {"recurrent_gemma": RecurrentGemmaForCausalLM, "xlnet": XLNetLMHeadModel}[name]
    torch.manual_seed(0)
    kind(config).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    stacks = {name for name, spec in Checkpoint.open(tmp_path).specs.items() if len(spec.shape) == 3}
    assert not collect_moments(tmp_path, prompts_of_many_lengths()).unseen
    sensitivity, _ = measure_sensitivity(tmp_path, prompts_of_many_lengths(), device="cpu")
    priced = {name for name in stacks if "conv" not in name and sensitivity.metric(name, None) is not None}
    assert len(priced) >= 2, stacks


def test_a_model_that_changes_its_embeddings_in_place_is_priced(tmp_path: Path) -> None:
    torch.manual_seed(0)
    CTRLLMHeadModel(
        CTRLConfig(vocab_size=len(tokenizer()), n_positions=64, n_embd=16, dff=24, n_layer=1, n_head=2)
    ).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    assert "transformer.w.weight" in measure_sensitivity(tmp_path, prompts_of_many_lengths(), device="cpu")[0].reads
