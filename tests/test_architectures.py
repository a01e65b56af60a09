"""Every architecture goes the whole way: two checkpoints, a pack, a checkpoint again, a live model."""

from pathlib import Path

import pytest
import torch

from graftllm.checkpoint import Checkpoint
from graftllm.compression.calibration import collect_moments
from graftllm.delta import Delta
from graftllm.errors import CheckpointError
from graftllm.fusion import grafting
from graftllm.fusion.applying import apply_packs
from graftllm.fusion.grafting import plug
from graftllm.live import bindings
from graftllm.packer import compress
from graftllm.packing_options import PackOptions
from graftllm.records import Prompt
from graftllm.skillpack import SkillPack
from graftllm.tensors import digest
from tests.architectures import CONFIGS, load, outputs, save_base, save_tuned
from tests.models import with_head

Pair = tuple[str, Path, Path]


@pytest.fixture(scope="module", params=list(CONFIGS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    base = save_base(request.param, tmp_path_factory.mktemp(request.param) / "base")
    return request.param, base, save_tuned(base, base.with_name("tuned"))


@pytest.fixture(scope="module")
def delta(pair: Pair) -> Delta:
    return Delta(Checkpoint.open(pair[1]), Checkpoint.open(pair[2]))


@pytest.fixture(scope="module")
def exact(delta: Delta) -> SkillPack:
    return compress(delta, PackOptions(strategy="exact"))


@pytest.fixture(scope="module")
def lossy(delta: Delta) -> SkillPack:
    return compress(delta, PackOptions(budget="60%"), device="cpu")


def _digests(model: torch.nn.Module) -> dict[str, str]:
    return {name: digest(value) for name, value in model.state_dict().items()}


def _be_short_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let packs be written over the model's weights, also where transformers has mapped them from its files."""
    monkeypatch.setattr(grafting, "room_bytes", lambda device: 0)
    monkeypatch.setattr(grafting, "backed_by_files", lambda addresses: set())


def _places(model: torch.nn.Module) -> dict[str, int]:
    return {name: value.data_ptr() for name, value in model.named_parameters()}


def test_every_tensor_of_the_checkpoint_is_in_the_pack(delta: Delta, exact: SkillPack, lossy: SkillPack) -> None:
    for pack in (exact, lossy):
        assert list(pack) == delta.base.names()
        for name in pack:
            assert pack.header.tensors[name].spec == delta.base.specs[name]
            assert pack.header.tensors[name].nbytes


def test_an_exact_pack_gives_the_tuned_bits(delta: Delta, exact: SkillPack, tmp_path: Path) -> None:
    apply_packs(delta.base, [(exact, 1.0)], tmp_path / "out")
    assert Checkpoint.open(tmp_path / "out").fingerprint == delta.tuned.fingerprint


def test_a_lossy_pack_gives_a_checkpoint_that_loads(pair: Pair, delta: Delta, lossy: SkillPack, tmp_path: Path) -> None:
    name, base, tuned = pair
    apply_packs(delta.base, [(lossy, 1.0)], tmp_path / "out")
    wanted = outputs(load(name, tuned))
    left = (outputs(load(name, tmp_path / "out")) - wanted).norm()
    assert left < (outputs(load(name, base)) - wanted).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("over", [False, True])
def test_an_exact_pack_makes_the_live_model_the_tuned_one(
    pair: Pair, exact: SkillPack, dtype: torch.dtype, over: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, base, tuned = pair
    model, expected = load(name, base, dtype=dtype), load(name, tuned, dtype=dtype)
    before, places = _digests(model), _places(model)
    if over:
        _be_short_of_memory(monkeypatch)
    with plug(model, exact):
        assert _digests(model) == _digests(expected)
        assert torch.equal(outputs(model), outputs(expected))
        assert (_places(model) == places) == over
    assert _digests(model) == before


def test_a_lossy_pack_gives_the_live_model_what_apply_writes(
    pair: Pair, delta: Delta, lossy: SkillPack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, base, _ = pair
    apply_packs(delta.base, [(lossy, 1.0)], tmp_path / "out")
    model, expected = load(name, base), load(name, tmp_path / "out")
    before = _digests(model)
    with plug(model, lossy):
        assert _digests(model) == _digests(expected)
    assert _digests(model) == before
    _be_short_of_memory(monkeypatch)
    with plug(model, lossy):
        assert _digests(model) == _digests(expected)
    assert _digests(model) == before


def test_a_head_that_is_saved_besides_its_embedding_stays_tied_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_base("gemma3", tmp_path / "base")
    pair = [with_head(path, tmp_path / f"both-{path.name}") for path in (base, save_tuned(base, tmp_path / "tuned"))]
    delta = Delta(*map(Checkpoint.open, pair))
    rows = [Prompt("0", ({"role": "user", "content": "Some words"},))]
    lossy = compress(delta, PackOptions(budget="40%"), calibration=rows, device="cpu")
    apply_packs(delta.base, [(lossy, 1.0)], tmp_path / "out")
    model, expected = load("gemma3", pair[0]), load("gemma3", tmp_path / "out")
    assert expected.lm_head.weight is expected.model.embed_tokens.weight
    before = _digests(model)
    with plug(model, lossy):
        assert _digests(model) == _digests(expected)
    assert _digests(model) == before
    _be_short_of_memory(monkeypatch)
    with plug(model, lossy):
        assert _digests(model) == _digests(expected)
    assert _digests(model) == before


def test_a_model_without_head_takes_the_pack_of_the_one_with_it(tmp_path: Path) -> None:
    base = save_base("mixtral", tmp_path / "base")
    tuned = save_tuned(base, tmp_path / "tuned")
    model, expected = load("mixtral", base), load("mixtral", tuned)
    model.model.save_pretrained(tmp_path / "bare")  # no `model.` before any name
    expected.model.save_pretrained(tmp_path / "bare-tuned")
    bare = Delta(Checkpoint.open(tmp_path / "bare"), Checkpoint.open(tmp_path / "bare-tuned"))
    assert "norm.weight" in bare.base.specs
    with plug(model.model, compress(bare, PackOptions(strategy="exact"))):
        assert _digests(model.model) == _digests(expected.model)


def test_stacked_experts_and_their_files_are_found_in_each_other(tmp_path: Path) -> None:
    base = Checkpoint.open(save_base("qwen3_moe", tmp_path / "base"))
    model = load("qwen3_moe", base.path)
    found = {binding.live: binding for binding in bindings(model, base.specs)}
    binding = found["model.layers.1.mlp.experts.gate_up_proj",]
    assert len(binding.stored) == 8
    stored = {name: base.tensor(name) for name in binding.stored}
    live = binding.to_live(stored)
    assert torch.equal(live[binding.live[0]], model.state_dict()[binding.live[0]])
    assert all(torch.equal(value, stored[name]) for name, value in binding.to_stored(live).items())


def test_experts_of_which_one_is_missing_are_refused(tmp_path: Path) -> None:
    base = Checkpoint.open(save_base("qwen3_moe", tmp_path / "base"))
    model = load("qwen3_moe", base.path)
    specs = {name: spec for name, spec in base.specs.items() if name != "model.layers.0.mlp.experts.2.up_proj.weight"}
    with pytest.raises(CheckpointError, match=r"transformers cannot make 'model.layers.0.mlp.experts.gate_up_proj' of"):
        bindings(model, specs)


@pytest.mark.parametrize("options", [PackOptions(strategy="paper"), PackOptions(budget="40%")], ids=["paper", "auto"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_experts_that_calibration_did_not_reach_are_noted_in_the_header(
    name: str, options: PackOptions, tmp_path: Path
) -> None:
    base = save_base(name, tmp_path / "base")
    tuned = save_tuned(base, tmp_path / "tuned")
    rows = [Prompt("0", ({"role": "user", "content": ""},))]  # three tokens, two of four experts each
    delta = Delta(Checkpoint.open(base), Checkpoint.open(tuned))
    compress(delta, options, calibration=rows).save(tmp_path / "pack.safetensors")
    entries = SkillPack.load(tmp_path / "pack.safetensors").header.tensors
    unseen = {name for name, entry in entries.items() if entry.unseen}
    assert unseen == collect_moments(tuned, rows).unseen
    assert unseen


@pytest.mark.parametrize("options", [PackOptions(strategy="paper"), PackOptions(budget="40%")], ids=["paper", "auto"])
def test_stacked_experts_are_coded_as_a_matrix_and_their_biases_exactly(options: PackOptions, tmp_path: Path) -> None:
    base = save_base("gpt_oss", tmp_path / "base")
    delta = Delta(Checkpoint.open(base), Checkpoint.open(save_tuned(base, tmp_path / "tuned")))
    pack = compress(delta, options)
    entries = pack.header.tensors
    stacks = [name for name in entries if name.endswith("experts.gate_up_proj")]
    assert len(stacks) == 2
    for name in stacks:
        assert entries[name].operator in ("lowrank", "factored", "hybrid", "elementwise")
        error = pack.delta(name, delta.base.tensor(name)) - delta[name]
        assert 0 < error.norm() < 0.9 * delta[name].norm()
    biases = [entry for name, entry in entries.items() if name.endswith("_proj_bias")]
    assert len(biases) == 4
    assert all(entry.operator == "exact" for entry in biases)
