import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from graftllm.checkpoint import Checkpoint
from graftllm.delta import Delta
from graftllm.errors import FusionError, PackError
from graftllm.fusion.beside import Beside, mixed
from graftllm.fusion.branches import decode_branches, why_merged_only
from graftllm.fusion.grafting import plug
from graftllm.fusion.shelf import Shelf
from graftllm.loading import load_model
from graftllm.packer import compress
from graftllm.packing_options import PackOptions
from graftllm.skillpack import SkillPack
from graftllm.tensors import digest
from tests.architectures import load, save_base, save_tuned
from tests.models import perturb, quantize, save_llama, tokenizer

SERVED = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "gpt2")
MERGED_ONLY = ("qwen3_moe", "mixtral", "gpt_oss", "mamba", "bamba", "t5", "bert", "vit", "opt", "phimoe")
IN_FACTORS = PackOptions(strategy="paper", energy=0.7)
Loaded = tuple[PreTrainedModel, dict[str, SkillPack]]


def _pack(base: Path, tuned: Path, options: PackOptions = IN_FACTORS) -> SkillPack:
    return compress(Delta(Checkpoint.open(base), Checkpoint.open(tuned)), options)


def _logits(model: nn.Module, rows: int = 4) -> torch.Tensor:
    ids = torch.arange(4, 4 + 12 * rows).remainder(60).add(4).reshape(rows, 12)
    with torch.inference_mode():
        return model(input_ids=ids).logits.clone()


def _digests(model: PreTrainedModel) -> dict[str, str]:
    return {name: digest(value) for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """A tied Llama in float32 and three packs: two in low rank of other ranks, one in entropy-coded factors."""
    home = tmp_path_factory.mktemp("beside")
    base = save_llama(home / "base", dtype=torch.float32)
    packs = {}
    for seed, (name, energy) in enumerate((("one", 0.4), ("two", 0.95)), 1):
        tuned = perturb(base, home / name, seed=seed)
        packs[name] = _pack(base, tuned, PackOptions(strategy="paper", energy=energy))
    packs["three"] = _pack(base, perturb(base, home / "three", seed=3), PackOptions(servable=4, budget="40%"))
    return load_model(base), packs


@pytest.mark.parametrize("name", SERVED)
def test_rows_of_one_batch_answer_as_merged_weights_do(name: str, tmp_path: Path) -> None:
    base = save_base(name, tmp_path / "base", dtype=torch.float32)
    pack = _pack(base, save_tuned(base, tmp_path / "tuned"))
    model = load(name, base)
    plain, before = _logits(model), _digests(model)
    with plug(model, pack):
        whole = _logits(model)
    with plug(model, (pack, 0.5)):
        half = _logits(model)
    beside = Beside(model, {"a": pack})
    with beside.rows(["a", None, {"a": 0.5}, "base"]):
        found = _logits(model)
    expected = torch.stack([whole[0], plain[1], half[2], plain[3]])
    assert (whole - plain).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(_logits(model), plain)
    beside.close()
    assert _digests(model) == before
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", SERVED)
def test_in_half_precision_rows_without_a_pack_keep_every_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = save_base(name, tmp_path / "base", dtype=dtype)
    pack = _pack(base, save_tuned(base, tmp_path / "tuned"))
    model = load(name, base)
    plain = _logits(model)
    with plug(model, pack):
        merged = _logits(model)
    with Beside(model, {"a": pack}).rows(["a", None, "a", None]):
        found = _logits(model)
    assert torch.equal(found[1::2], plain[1::2])
    assert (found - merged)[::2].norm() < 0.5 * (merged - plain)[::2].norm()  # what is merged is rounded, too


@pytest.mark.parametrize("name", MERGED_ONLY)
def test_what_cannot_run_beside_the_weights_says_so(name: str, tmp_path: Path) -> None:
    base = save_base(name, tmp_path / "base")
    pack = _pack(base, save_tuned(base, tmp_path / "tuned"), PackOptions(strategy="paper", energy=0.3))
    model = load(name, base)
    assert "Use this pack merged, one pack for a batch." in (why_merged_only(model, pack) or "")
    with pytest.raises(FusionError, match="cannot run beside"), Beside(model, {"a": pack}).rows(["a"]):
        pass


@settings(max_examples=20)
@given(data=st.data())
def test_any_rows_with_any_packs_are_as_if_each_were_alone(loaded: Loaded, data: st.DataObject) -> None:
    model, packs = loaded
    weight = st.sampled_from([-1.0, 0.5, 1.0])
    kind = st.one_of(st.none(), st.sampled_from([*packs]), st.dictionaries(st.sampled_from([*packs]), weight))
    wanted = data.draw(st.lists(kind, min_size=1, max_size=5))
    beside = Beside(model, packs)
    with beside.rows(wanted):
        found = _logits(model, len(wanted))
    for row, one in enumerate(wanted):
        with plug(model, *((packs[name], weight) for name, weight in mixed(one, packs))):
            expected = _logits(model, len(wanted))[row]
        torch.testing.assert_close(found[row], expected, rtol=1e-3, atol=1e-3)
    beside.close()


def test_generated_texts_are_those_of_merged_weights(loaded: Loaded) -> None:
    model, packs = loaded
    ids = torch.arange(4, 28).reshape(4, 6)
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = []
    for row, name in enumerate((*packs, None)):
        with plug(model, *([packs[name]] if name else [])):
            expected.append(model.generate(ids, **settings)[row])
    with Beside(model, packs).rows([*packs, None]):
        assert torch.equal(model.generate(ids, **settings), torch.stack(expected))


def test_a_batch_of_few_of_the_packs_keeps_the_others_until_most_are_idle(loaded: Loaded) -> None:
    model, packs = loaded
    beside = Beside(model, packs)
    stacks = []
    for wanted in (["one", "two", "three"], ["one", "two"], ["one"], ["two"]):
        with beside.rows(wanted):
            stacks.append(beside.stacked)
    assert stacks == [("one", "three", "two"), ("one", "three", "two"), ("one",), ("two",)]


def test_a_pack_is_decoded_once_while_the_shelf_has_room(loaded: Loaded) -> None:
    model, packs = loaded
    sizes = {name: decode_branches(model, pack).nbytes for name, pack in packs.items()}
    shelf = Shelf(sizes["one"] + sizes["three"])
    beside = Beside(model, packs, shelf)
    for name in ("one", "three", "one"):
        with beside.rows([name]):
            pass
    assert shelf.hot == [("beside", "three"), ("beside", "one")]
    with beside.rows(["two"]):
        pass
    assert ("beside", "three") not in shelf.hot
    assert shelf.nbytes <= shelf.limit_bytes


def test_a_tied_embedding_is_held_once(loaded: Loaded) -> None:
    model, packs = loaded
    found = decode_branches(model, packs["two"])
    embedding, head = (found.modules[name].weight for name in ("model.embed_tokens", "lm_head"))
    assert embedding is head
    without = {key: branch for key, branch in found.modules.items() if key != "lm_head"}
    assert found.nbytes == type(found)(without, found.pack).nbytes


def test_a_batch_of_another_size_is_refused(loaded: Loaded) -> None:
    model, packs = loaded
    beside = Beside(model, packs)
    with (
        pytest.raises(FusionError, match="expected 2 rows, as packs were given for, and found 4. Give one pack for"),
        beside.rows(["one", None]),
    ):
        _logits(model)
    beside.close()


def test_elementwise_and_exact_packs_are_merged_only_and_say_how_to_change_that(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base")
    tuned = perturb(base, tmp_path / "tuned", seed=1)
    model = load_model(base)
    exact = _pack(base, tuned, PackOptions(strategy="exact"))
    coded = _pack(base, tuned, PackOptions(budget="40%"))
    for pack in (exact, coded):
        with (
            pytest.raises(
                FusionError,
                match=r"stores 'model.layers.\d.*' by the operator '(exact|elementwise|hybrid)', not in factors, so it "
                r"can only be merged. Rebuild it with `graftllm pack --servable RANK`",
            ),
            Beside(model, {"a": pack}).rows(["a"]),
        ):
            pass


def test_a_pack_of_another_base_is_refused(loaded: Loaded, tmp_path: Path) -> None:
    other = load_model(save_llama(tmp_path / "other", seed=9, dtype=torch.float32))
    beside = Beside(other, loaded[1])
    with pytest.raises(PackError, match="of this base has digest"), beside.rows(["one"]):
        pass
    with pytest.raises(FusionError, match="pack: expected one of base, one, two, three; found 'four'"):
        beside.rows(["four"]).__enter__()


def test_a_name_may_come_to_mean_another_pack_or_none(loaded: Loaded) -> None:
    model, packs = loaded
    mine = {"skill": packs["one"], "other": packs["three"]}
    beside = Beside(model, mine)
    for pack in ("one", "two", "one"):
        mine["skill"] = packs[pack]
        with beside.rows(["skill", None, "other", None]):
            found = _logits(model)
        with plug(model, packs[pack]):
            torch.testing.assert_close(found[0], _logits(model)[0], rtol=1e-3, atol=1e-3)
    assert len(beside.shelf.hot) == 2  # nothing is kept of what a name meant before
    del mine["skill"]
    with pytest.raises(FusionError, match="pack: expected one of base, other; found 'skill'"):
        beside.rows(["skill"]).__enter__()
    beside.close()


def test_rows_with_weights_that_are_no_numbers_or_of_no_pack_are_refused(loaded: Loaded) -> None:
    beside = Beside(*loaded)
    with pytest.raises(FusionError, match="pack: expected one of base, one, two, three; found 'four'"):
        beside.rows([{"four": 0.0}]).__enter__()
    with pytest.raises(FusionError, match="pack: expected a finite weight for 'one', found nan"):
        beside.rows([{"one": float("nan")}]).__enter__()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_was_stacked_in_inference_mode_serves_a_batch_with_gradients(name: str, tmp_path: Path) -> None:
    base = save_base(name, tmp_path / "base", dtype=torch.float32)
    packs = {"a": _pack(base, save_tuned(base, tmp_path / "tuned"))}
    model, ids = load(name, base), torch.arange(4, 16).reshape(2, 6)
    beside = Beside(model, packs)
    with torch.inference_mode(), beside.rows(["a", None]):
        expected = model(input_ids=ids).logits.clone()
    with beside.rows(["a", None]):
        found = model(input_ids=ids).logits
    torch.testing.assert_close(found.detach(), expected)
    found.sum().backward()
    assert model.get_output_embeddings().weight.grad is not None


def test_a_model_that_reads_weights_without_their_module_is_found_out(loaded: Loaded) -> None:
    model, packs = loaded
    layer = model.get_submodule("model.layers.0.mlp")
    plain: Callable[..., torch.Tensor] = layer.forward
    layer.forward = lambda x: nn.functional.linear(x, layer.down_proj.weight @ layer.up_proj.weight)
    try:
        with (
            pytest.raises(FusionError, match=r"reads the weights of 'model.layers.0.mlp.\w+' without calling it"),
            Beside(model, packs).rows(["one"]),
        ):
            _logits(model, 1)
    finally:
        layer.forward = plain
        for module in model.modules():
            module._forward_hooks.clear()


def test_positions_that_look_up_by_more_than_their_input_are_only_merged(tmp_path: Path) -> None:
    shape = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24, "num_hidden_layers": 1, "vocab_size": 73}
    OPTForCausalLM(OPTConfig(**shape, num_attention_heads=2)).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    pack = _pack(tmp_path / "base", save_tuned(tmp_path / "base", tmp_path / "tuned"))
    model = load_model(tmp_path / "base")
    assert "embed_positions.weight', of OPTLearnedPositionalEmbedding" in (why_merged_only(model, pack) or "")


def test_packs_are_either_merged_or_beside(loaded: Loaded) -> None:
    model, packs = loaded
    beside = Beside(model, packs)
    with beside.rows(["one"]), pytest.raises(FusionError, match="rows: packs are beside the weights of this model alr"):
        beside.rows(["two"]).__enter__()
    with plug(model, packs["one"]), pytest.raises(FusionError, match="rows: packs are merged into this model already"):
        beside.rows(["two"]).__enter__()
    with beside.rows(["two"]):
        pass


class _OneDevice(TorchDispatchMode):
    """Refuses what a second device would refuse: to calculate with tensors of both."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        used = {one.device for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor) and one.dim()}
        assert len(used) < 2 or "copy" in str(func), f"{func} mixes {used}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("first", ["lm_head", "model.norm", "model.layers.1"])
def test_rows_follow_a_model_from_device_to_device(first: str, tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base", dtype=torch.float32, tie_word_embeddings=False)
    packs = {"a": _pack(base, perturb(base, tmp_path / "tuned", seed=1))}
    model, ids = load_model(base), torch.arange(4, 16).reshape(2, 6)
    beside = Beside(model, packs)
    with beside.rows(["a"]):  # decoded before a part of the model goes where nothing can be read
        pass
    beside.close()
    parts = ["model.layers.1", "model.norm", "lm_head"]
    for name in parts[parts.index(first) :]:  # as a device map does it: inputs are moved inside `forward`
        part = model.get_submodule(name).to("meta")
        add_hook_to_module(part, AlignDevicesHook(execution_device="meta", place_submodules=True))
    with torch.no_grad(), _OneDevice(), beside.rows(["a", None]):
        assert model(input_ids=ids).logits.is_meta


def test_packs_run_beside_a_base_of_quantized_tensors(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base", hidden_size=64, intermediate_size=128)
    pack = _pack(base, perturb(base, tmp_path / "tuned", seed=1))
    model, whole = load_model(base), load_model(base)
    quantize(model)
    plain, bare = _logits(model), _logits(whole)
    with plug(whole, pack):
        moved = _logits(whole) - bare
    with Beside(model, {"a": pack}).rows(["a", None, "a", None]):
        found = _logits(model)
    assert torch.equal(found[1::2], plain[1::2])
    assert (found - plain - moved)[::2].norm() < 0.5 * moved[::2].norm()
    with pytest.raises(FusionError, match=r"quantized \(Int8Tensor\), and a merged pack replaces whole weights"):
        plug(model, pack)


class _Quantized(nn.Linear):
    """A linear layer with a weight of 8 bits and a step, as quantization libraries have it."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False)
        step = plain.weight.detach().abs().max() / 127
        self.weight = nn.Parameter((plain.weight / step).round().to(torch.int8), requires_grad=False)
        self.step = step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.float() * self.step)


def test_packs_run_beside_a_quantized_base_but_are_not_merged_into_it(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base", dtype=torch.float32)
    pack = _pack(base, perturb(base, tmp_path / "tuned", seed=1))
    model, expected = load_model(base), load_model(base)
    plug(expected, pack)
    for i in range(2):
        mlp = model.get_submodule(f"model.layers.{i}.mlp")
        quantized = mlp.up_proj = _Quantized(mlp.up_proj)
        delta = pack.delta(f"model.layers.{i}.mlp.up_proj.weight", torch.zeros(64, 32))
        merged = expected.get_parameter(f"model.layers.{i}.mlp.up_proj.weight")
        merged.data = quantized.weight.float() * quantized.step + delta
    plain = _logits(model)
    with Beside(model, {"a": pack}).rows(["a", None, "a", None]):
        found = _logits(model)
    torch.testing.assert_close(found[::2], _logits(expected)[::2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1::2], plain[1::2])
    with pytest.raises(FusionError, match=r"holds '.*up_proj.weight' quantized \(torch.int8\), and a merged pack"):
        plug(model, pack)


def test_a_compiled_model_runs_packs_beside_its_weights(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base", dtype=torch.float32)
    pack = _pack(base, perturb(base, tmp_path / "tuned", seed=3))
    model = load_model(base)
    compiled = torch.compile(model.model, backend="eager")
    ids = torch.arange(4, 28).reshape(2, 12)
    with torch.inference_mode():
        plain = compiled(input_ids=ids, use_cache=False).last_hidden_state.clone()
        with plug(model, pack):
            expected = model.model(input_ids=ids, use_cache=False).last_hidden_state.clone()
        with Beside(model, {"one": pack}).rows(["one", None]):
            found = compiled(input_ids=ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(found[0], expected[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[1], plain[1], rtol=1e-3, atol=1e-4)


def _with_only(words: str, base: Path, tuned: Path) -> Path:
    """Undo what a fine-tune changed but for the parameters whose names have one of these words."""
    before, after = load_file(base / "model.safetensors"), load_file(tuned / "model.safetensors")
    kept = {name: after[name] if re.search(words, name) else before[name] for name in after}
    save_file(kept, tuned / "model.safetensors", metadata={"format": "pt"})
    return tuned


def test_a_router_that_flattens_its_rows_is_merged_only(tmp_path: Path) -> None:
    base = save_base("phimoe", tmp_path / "base", dtype=torch.float32)
    tuned = _with_only("q_proj|gate.weight", base, save_tuned(base, tmp_path / "tuned"))
    model = load("phimoe", base)
    assert "a parameter of PhimoeTopKRouter; this cannot run beside" in str(why_merged_only(model, _pack(base, tuned)))
    attention = _with_only("q_proj", base, tuned)
    assert why_merged_only(model, _pack(base, attention)) is None
