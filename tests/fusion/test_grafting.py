import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from graftllm.checkpoint import Checkpoint
from graftllm.delta import Delta
from graftllm.errors import FusionError, PackError
from graftllm.fusion import grafting
from graftllm.fusion.applying import apply_packs
from graftllm.fusion.beside import Beside
from graftllm.fusion.branches import decode_branches
from graftllm.fusion.decoding import decode
from graftllm.fusion.grafting import plug
from graftllm.fusion.grafts import Graft, is_plugged
from graftllm.loading import load_model
from graftllm.packer import compress
from graftllm.packing_options import PackOptions, Strategy
from graftllm.skillpack import SkillPack
from graftllm.tensors import digest
from tests.models import perturb, save_llama, with_vocabulary


@pytest.fixture(autouse=True, params=["base kept", "written over"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every claim holds where memory is plenty and where it is short."""
    if request.param == "written over":
        monkeypatch.setattr(grafting, "room_bytes", lambda device: 0)
        monkeypatch.setattr(grafting, "backed_by_files", lambda addresses: set())
    return request.param


@pytest.fixture(scope="module")
def exact(delta: Delta) -> SkillPack:
    return compress(delta, PackOptions(strategy="exact"))


@pytest.fixture(scope="module")
def lossy(delta: Delta) -> SkillPack:
    return compress(delta, PackOptions(strategy="paper"))


def _digests(model: PreTrainedModel) -> dict[str, str]:
    return {name: digest(value) for name, value in model.state_dict().items()}


def _logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.arange(4, 30)[None]).logits.float()


_BF16, _F16, _F32, _F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        (_BF16, _BF16), (_BF16, _F32), (_F16, _F16), (_F16, _F32), (_F32, _F32), (_F32, _F64),
        (_F32, _BF16), (_F32, _F16), (_BF16, _F16),
    ],
)  # fmt: skip
@pytest.mark.parametrize("tied", [True, False])
def test_unplugging_gives_the_base_back_bit_for_bit(
    tmp_path: Path, stored: torch.dtype, dtype: torch.dtype, tied: bool
) -> None:
    base = save_llama(tmp_path / "base", dtype=stored, tie_word_embeddings=tied)
    delta = Delta(Checkpoint.open(base), Checkpoint.open(perturb(base, tmp_path / "tuned", seed=1)))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    before, logits = _digests(model), _logits(model)
    for strategy in ("paper", "exact"):
        with plug(model, compress(delta, PackOptions(strategy=strategy))):
            assert not torch.equal(_logits(model), logits)
        assert _digests(model) == before
        assert torch.equal(_logits(model), logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_exact_pack_makes_the_live_model_the_tuned_one(
    base: Checkpoint, tuned: Checkpoint, exact: SkillPack, dtype: torch.dtype
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=dtype)
    expected = AutoModelForCausalLM.from_pretrained(tuned.path, dtype=dtype)
    with plug(model, exact):
        assert _digests(model) == _digests(expected)
        assert torch.equal(_logits(model), _logits(expected))


def test_a_lossy_pack_comes_close_to_the_tuned_model(base: Checkpoint, tuned: Checkpoint, lossy: SkillPack) -> None:
    model, expected = load_model(base.path), load_model(tuned.path)
    before = (_logits(model) - _logits(expected)).norm()
    with plug(model, lossy):
        assert (_logits(model) - _logits(expected)).norm() < 0.5 * before


def test_a_block_that_fails_unplugs_as_well(base: Checkpoint, lossy: SkillPack) -> None:
    model = load_model(base.path)
    before = _digests(model)
    with pytest.raises(ZeroDivisionError), plug(model, lossy):
        _ = 1 / 0
    assert _digests(model) == before


def test_unplugging_by_hand_and_twice_is_fine(base: Checkpoint, lossy: SkillPack) -> None:
    model = load_model(base.path)
    before = _digests(model)
    graft = plug(model, lossy)
    assert _digests(model) != before
    graft.unplug()
    graft.unplug()
    assert _digests(model) == before


def test_weights_scale_the_delta_and_packs_add_up_in_any_order(
    base_dir: Path, base: Checkpoint, delta: Delta, exact: SkillPack, tmp_path: Path
) -> None:
    other_delta = Delta(base, Checkpoint.open(perturb(base_dir, tmp_path / "other", seed=5)))
    other = compress(other_delta, PackOptions(strategy="exact"))
    model = load_model(base.path)
    name = "model.layers.0.mlp.up_proj.weight"
    start = model.state_dict()[name].clone()
    with plug(model, (exact, 0.5), (other, -2.0)):
        first = model.state_dict()[name].clone()
    with plug(model, (other, -2.0), (exact, 0.5)):
        assert torch.equal(model.state_dict()[name], first)
    assert torch.allclose(first, start + 0.5 * delta[name] - 2 * other_delta[name], atol=1e-6)


def test_the_order_of_three_packs_does_not_change_a_bit(base_dir: Path, base: Checkpoint, tmp_path: Path) -> None:
    packs = []
    for seed in (5, 6, 7):
        tuned = Checkpoint.open(perturb(base_dir, tmp_path / str(seed), seed=seed))
        packs.append((compress(Delta(base, tuned), PackOptions(strategy="paper", energy=0.5)), 0.1 * seed))
    model = load_model(base.path)
    found = []
    for order in itertools.permutations(packs):
        with plug(model, *order):
            found.append(_digests(model))
    assert all(one == found[0] for one in found)


def test_factors_are_added_in_one_pass_as_if_they_were_multiplied_out(base: Checkpoint, lossy: SkillPack) -> None:
    model = load_model(base.path)
    name = "model.layers.1.mlp.down_proj.weight"
    start = base.tensor(name)
    assert lossy.header.tensors[name].how.operator == "lowrank"
    with plug(model, (lossy, -0.5)):
        torch.testing.assert_close(model.state_dict()[name], start.float() - 0.5 * lossy.delta(name, start))


def test_a_model_that_a_device_map_placed_takes_packs(base: Checkpoint, exact: SkillPack) -> None:
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32, device_map={"": "cpu"})
    before = _digests(model)
    with plug(model, exact):
        assert _digests(model) != before
    assert _digests(model) == before


def test_offloaded_weights_are_refused(base: Checkpoint, exact: SkillPack, tmp_path: Path) -> None:
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = AutoModelForCausalLM.from_pretrained(
        base.path, dtype=torch.float32, device_map=places, offload_folder=tmp_path
    )
    with pytest.raises(FusionError, match=r"keeps 'model.layers.1.* off its device until it runs \(offloaded by devi"):
        plug(model, exact)


def test_a_model_of_another_base_is_refused_and_left_as_it_was(tmp_path: Path, lossy: SkillPack) -> None:
    model = load_model(save_llama(tmp_path / "other", seed=7))
    before = _digests(model)
    with pytest.raises(PackError, match=r"of this base has digest \w+, but the pack was made for"):
        plug(model, lossy)
    assert _digests(model) == before


def test_a_second_pack_on_a_plugged_model_is_refused(base: Checkpoint, lossy: SkillPack) -> None:
    model = load_model(base.path)
    with (
        plug(model, lossy),
        pytest.raises(FusionError, match="as packs that are plugged in made it; unplug them first"),
    ):
        plug(model, lossy)


def test_weights_that_are_no_numbers_are_refused(base: Checkpoint, lossy: SkillPack) -> None:
    with pytest.raises(FusionError, match=r"expected packs, or \(pack, weight\) with a number as weight, found"):
        plug(load_model(base.path), (lossy, "2"))  # type: ignore[arg-type]


def test_a_model_that_was_wrapped_meanwhile_gets_its_weights_back(base: Checkpoint, exact: SkillPack) -> None:
    model = load_model(base.path)
    before = _digests(model)
    graft = plug(model, exact)
    mlp = model.model.layers[1].mlp
    model.model.layers[1].mlp = torch.nn.Sequential(mlp)  # as PEFT and torch.compile wrap layers
    graft.unplug()
    model.model.layers[1].mlp = mlp
    assert _digests(model) == before


def test_a_model_that_was_moved_meanwhile_gets_its_weights_back_where_it_is(base: Checkpoint, exact: SkillPack) -> None:
    model = load_model(base.path)
    graft = plug(model, exact)
    model.to(torch.float64)
    graft.unplug()
    assert _digests(model) == _digests(load_model(base.path).to(torch.float64))


def test_plugging_that_is_interrupted_leaves_the_base(base: Checkpoint, exact: SkillPack) -> None:
    class Interrupted(dict[str, torch.Tensor]):
        def items(self) -> Any:
            yield from list(super().items())[:6]
            raise KeyboardInterrupt

    model = load_model(base.path)
    before, made = _digests(model), decode(model, exact)
    with pytest.raises(KeyboardInterrupt):
        Graft(model).put(Interrupted(made.values))
    assert _digests(model) == before
    assert not is_plugged(model)


def test_packs_are_not_merged_while_others_run_beside(base: Checkpoint, delta: Delta, exact: SkillPack) -> None:
    model, thin = load_model(base.path), compress(delta, PackOptions(servable=4))
    with (
        Beside(model, {"a": thin}).rows(["a"]),
        pytest.raises(FusionError, match="packs run beside the weights of this"),
    ):
        plug(model, exact)
    with pytest.raises(FusionError, match="rows: expected a list with an entry for each row, found {'a': 0.5}"):
        with Beside(model, {"a": thin}).rows({"a": 0.5}):  # type: ignore[arg-type]
            pass
    plug(model, exact).unplug()


def test_a_model_without_a_touched_parameter_is_refused(tmp_path: Path, lossy: SkillPack) -> None:
    model = load_model(save_llama(tmp_path / "shallow", num_hidden_layers=1))
    with pytest.raises(
        FusionError, match=r"which the live model does not have under that name. Write a checkpoint with"
    ):
        plug(model, lossy)


def test_a_model_in_a_narrower_dtype_takes_its_base_values_from_where_it_was_loaded(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base", dtype=torch.float32)
    tuned = perturb(base, tmp_path / "tuned", seed=1)
    pack = compress(Delta(Checkpoint.open(base), Checkpoint.open(tuned)), PackOptions(strategy="exact"))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    with plug(model, pack):
        assert _digests(model) == _digests(AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.bfloat16))


def test_a_base_of_several_dtypes_takes_packs_in_any_of_them(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    save_file(
        {name: value.float() + 1e-4 if "norm" in name else value for name, value in weights.items()},
        base / "model.safetensors",
        {"format": "pt"},
    )
    tuned = perturb(base, tmp_path / "tuned", seed=1)
    pack = compress(Delta(Checkpoint.open(base), Checkpoint.open(tuned)), PackOptions(servable=4))
    assert {entry.dtype for entry in pack.header.tensors.values()} == {"BF16", "F32"}
    apply_packs(Checkpoint.open(base), [(pack, 1.0)], tmp_path / "made")
    for dtype in (torch.bfloat16, torch.float32):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        made = AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype=dtype)
        plain = _logits(model)
        with plug(model, pack):
            norms = {name: digest(value) for name, value in model.state_dict().items() if "norm" in name}
            assert norms.items() <= _digests(made).items()
            merged = _logits(model)
        with Beside(model, {"a": pack}).rows(["a"]):
            beside = _logits(model)
        assert (beside - merged).norm() < 0.2 * (merged - plain).norm()


@pytest.mark.parametrize("what", ["gone", "changed", "a module of its own"])
def test_a_model_in_a_narrower_dtype_is_refused_without_its_base(tmp_path: Path, what: str) -> None:
    base = save_llama(tmp_path / "base", dtype=torch.float32)
    delta = Delta(Checkpoint.open(base), Checkpoint.open(perturb(base, tmp_path / "tuned", seed=1)))
    pack = compress(delta, PackOptions(strategy="exact"))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    if what == "gone":
        base.rename(tmp_path / "elsewhere")
    elif what == "changed":
        model.model.norm.weight.data += 1
    before = _digests(model)
    with pytest.raises(FusionError, match=r"in torch.bfloat16, narrower than its base's torch.float32, and was not"):
        plug(torch.nn.ModuleDict({"model": model.model}) if what == "a module of its own" else model, pack)
    assert _digests(model) == before


@pytest.fixture(scope="module")
def grown(base_dir: Path, base: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Delta:
    return Delta(base, Checkpoint.open(with_vocabulary(base_dir, tmp_path_factory.mktemp("grown") / "tuned", 80)))


def _resized(place: Path, rows: int) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(place, dtype="auto")
    model.resize_token_embeddings(rows)
    return model


def test_a_pack_that_adds_vocabulary_rows_does_not_run_beside_the_weights(grown: Delta) -> None:
    pack, model = compress(grown, PackOptions(strategy="exact")), _resized(grown.base.path, 73)
    with pytest.raises(FusionError, match=r"'model.embed_tokens.weight', to which it adds vocabulary rows; this can"):
        decode_branches(model, pack)


@pytest.mark.parametrize("rows", [73, 76, 80])
@pytest.mark.parametrize("strategy", ["exact", "auto", "paper"])
def test_added_vocabulary_rows_plug_into_a_live_model_with_room_or_without(
    grown: Delta, tmp_path: Path, strategy: Strategy, rows: int
) -> None:
    pack, model = compress(grown, PackOptions(strategy=strategy)), _resized(grown.base.path, rows)
    apply_packs(Checkpoint.open(grown.base.path), [(pack, 1.0)], tmp_path / "applied")
    before, ids = _digests(model), torch.tensor([[1, 2, 3]])
    with plug(model, pack):
        assert _digests(model) == _digests(AutoModelForCausalLM.from_pretrained(tmp_path / "applied", dtype="auto"))
        assert model(input_ids=ids, labels=ids).logits.shape[-1] == model.config.vocab_size == 80
    assert _digests(model) == before
    assert model(input_ids=ids, labels=ids).logits.shape[-1] == model.config.vocab_size == rows


def test_rows_of_two_packs_do_not_meet_in_one_model(grown: Delta, lossy: SkillPack) -> None:
    pack, model = compress(grown, PackOptions(strategy="exact")), _resized(grown.base.path, 73)
    before = _digests(model)
    graft = plug(model, pack)
    for other in (pack, lossy):
        with pytest.raises(
            FusionError, match=r"as packs that are plugged in made it; unplug them first, or plug all in"
        ):
            plug(model, other, check=False)
    graft.unplug()
    with plug(model, pack), pytest.raises(RuntimeError, match="inside"):
        raise RuntimeError("inside")
    assert _digests(model) == before
    assert model.config.vocab_size == model.get_output_embeddings().out_features == 73


def test_rows_that_no_pack_knows_stay_as_they_are(base: Checkpoint, lossy: SkillPack, grown: Delta) -> None:
    model, alone = _resized(base.path, 81), _resized(base.path, 73)
    before = _words(model)
    with plug(model, lossy), plug(alone, lossy):
        assert _words(model)[:73].equal(_words(alone))
        assert _words(model)[73:].equal(before[73:])
    with plug(model, compress(grown, PackOptions(strategy="exact"))):
        assert _words(model)[:80].equal(grown.tuned.tensor("model.embed_tokens.weight"))
        assert _words(model)[80:].equal(before[80:])
    assert _words(model).equal(before)


def _words(model: PreTrainedModel) -> torch.Tensor:
    return model.state_dict()["model.embed_tokens.weight"].clone()


def test_a_resized_model_of_another_base_is_refused(tmp_path: Path, exact: SkillPack) -> None:
    model = _resized(save_llama(tmp_path / "other", seed=9), 80)
    with pytest.raises(PackError, match="made for"):
        plug(model, exact)


def test_a_pack_of_a_tuned_model_in_another_dtype_plugs_in(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base", dtype=torch.float32)
    tuned = save_llama(tmp_path / "tuned", seed=1, dtype=torch.bfloat16)
    pack = compress(Delta(Checkpoint.open(base), Checkpoint.open(tuned)), PackOptions(strategy="exact"))
    model, expected = load_model(base), load_model(tuned)
    with plug(model, pack):
        assert _digests(model) == _digests(expected)
