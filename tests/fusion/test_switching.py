"""Packs that give their place to others, where the shelf has room for merged weights and where it has none."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from graftllm.checkpoint import Checkpoint
from graftllm.delta import Delta
from graftllm.devices import backed_by_files
from graftllm.errors import CheckpointError, GraftError, PackError
from graftllm.fusion import decoding, grafting
from graftllm.fusion.applying import with_weights
from graftllm.fusion.decoding import summed
from graftllm.fusion.grafting import plug, write_over
from graftllm.fusion.grafts import Graft, is_plugged
from graftllm.fusion.shelf import Shelf
from graftllm.fusion.stacks import Mix
from graftllm.fusion.switching import Switch
from graftllm.loading import load_model
from graftllm.packer import compress
from graftllm.packing_options import PackOptions
from graftllm.skillpack import SkillPack
from graftllm.tensors import digest
from tests.models import perturb, save_llama, with_head, with_vocabulary

ONE, TWO, BOTH = (("one", 1.0),), (("two", 1.0),), (("few", -0.5), ("one", 1.0))
TURNS: tuple[Mix, ...] = (ONE, TWO, (), (("few", 1.0),), ONE, (("grown", 1.0),), BOTH, TWO, (("grown", 1.0),), ())


@pytest.fixture(scope="module")
def packs(base_dir: Path, delta: Delta, tmp_path_factory: pytest.TempPathFactory) -> dict[str, SkillPack]:
    """Packs that touch everything, one that touches one layer, and one that adds vocabulary rows."""
    home = tmp_path_factory.mktemp("packs")
    tuned = [perturb(base_dir, home / "two", seed=6), shutil.copytree(base_dir, home / "few")]
    weights = load_file(base_dir / "model.safetensors")
    own = {name: value * 2 if "layers.1." in name else value for name, value in weights.items()}
    save_file(own, tuned[1] / "model.safetensors", {"format": "pt"})
    tuned.append(with_vocabulary(base_dir, home / "grown", 80))
    two, few, grown = (Delta(delta.base, Checkpoint.open(place)) for place in tuned)
    return {
        "one": compress(delta, PackOptions(strategy="exact")),
        "two": compress(two, PackOptions(strategy="paper")),
        "few": compress(few, PackOptions(strategy="exact")),
        "grown": compress(grown, PackOptions(strategy="exact")),
    }


def _digests(model: PreTrainedModel) -> dict[str, str]:
    return {name: digest(value) for name, value in model.state_dict().items()}


def _over(model: PreTrainedModel, *packs: SkillPack | tuple[SkillPack, float], check: bool = True) -> Graft:
    graft = Graft(model)
    write_over(graft, with_weights(packs), check=check)
    return graft


@pytest.fixture
def model(base_dir: Path, tmp_path: Path) -> PreTrainedModel:
    """A model whose files may be changed."""
    return load_model(shutil.copytree(base_dir, tmp_path / "base"))


@pytest.mark.parametrize("limit", [0, 40_000, 1 << 30])
def test_whatever_was_merged_before_the_weights_are_those_of_the_packs_asked_for(
    model: PreTrainedModel, packs: dict[str, SkillPack], limit: int
) -> None:
    switch, shelf_less = Switch(model, packs, Shelf(limit)), load_model(model.name_or_path)
    for mix in TURNS:
        switch.to(mix)
        with plug(shelf_less, *((packs[name], weight) for name, weight in mix)):
            assert _digests(model) == _digests(shelf_less)
        assert is_plugged(model) == bool(mix)


def test_what_the_shelf_has_no_room_for_takes_no_memory_but_the_models_own(
    model: PreTrainedModel, packs: dict[str, SkillPack]
) -> None:
    places = {name: value.data_ptr() for name, value in model.named_parameters()}
    switch = Switch(model, packs, Shelf(0))
    for mix in (ONE, TWO, BOTH, ()):
        switch.to(mix)
        assert {name: value.data_ptr() for name, value in model.named_parameters()} == places


def test_values_that_are_not_in_the_files_are_kept(model: PreTrainedModel, packs: dict[str, SkillPack]) -> None:
    model.model.layers[0].mlp.up_proj.weight.data += 1
    before = _digests(model)
    with pytest.raises(PackError, match="'model.layers.0.mlp.up_proj.weight' of this base has digest"):
        _over(model, packs["two"])
    assert _digests(model) == before
    with _over(model, packs["two"], check=False):
        assert _digests(model) != before
    assert _digests(model) == before


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_shares_its_memory_is_the_bases_again(tmp_path: Path, tied: bool) -> None:
    base = save_llama(tmp_path / "base", tie_word_embeddings=tied)
    tuned = perturb(base, tmp_path / "tuned", seed=1)
    model, expected = load_model(base), load_model(tuned)
    before = _digests(model)
    pack = compress(Delta(Checkpoint.open(base), Checkpoint.open(tuned)), PackOptions(strategy="exact"))
    switch = Switch(model, {"one": pack, "two": pack}, Shelf(0))
    for mix in (ONE, TWO):
        switch.to(mix)
        assert _digests(model) == _digests(expected)
    switch.to(())
    assert _digests(model) == before


@pytest.fixture
def damaged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the sixth parameter that is decoded be damaged; the names of those that were are told."""
    whole, seen = decoding.combined, list[str]()

    def combined(name: str, *given: Any, **more: Any) -> torch.Tensor:
        seen.append(name)
        if len(seen) == 6:
            raise PackError("two: damaged")
        return whole(name, *given, **more)

    monkeypatch.setattr(decoding, "combined", combined)
    return seen


def test_a_damaged_pack_leaves_the_base(
    model: PreTrainedModel, packs: dict[str, SkillPack], damaged: list[str]
) -> None:
    before, switch = _digests(model), Switch(model, packs, Shelf(0))
    with pytest.raises(PackError, match="damaged"):
        switch.to(TWO)
    assert len(damaged) == 6
    assert _digests(model) == before
    switch.to(ONE)
    switch.to(())
    assert _digests(model) == before


def test_what_cannot_be_given_back_at_once_is_given_back_later(
    model: PreTrainedModel, packs: dict[str, SkillPack], damaged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, switch = _digests(model), Switch(model, packs, Shelf(0))
    file = Path(model.name_or_path) / "model.safetensors"
    monkeypatch.setattr(grafting, "summed", lambda *given, **more: _gone(file, damaged) or summed(*given, **more))
    with pytest.raises(CheckpointError, match="found neither"):
        switch.to(ONE)
    assert switch.mix is None
    assert _digests(model) != before
    file.with_suffix(".gone").rename(file)
    switch.to(())
    assert _digests(model) == before


def _gone(file: Path, seen: list[str]) -> None:
    if len(seen) == 5:
        file.rename(file.with_suffix(".gone"))


@pytest.mark.parametrize("what", ["values", "names", "gone", "touched"])
def test_files_that_changed_give_nothing_back_until_they_are_the_bases_again(
    model: PreTrainedModel, packs: dict[str, SkillPack], what: str
) -> None:
    before, file = _digests(model), Path(model.name_or_path) / "model.safetensors"
    graft, whole = _over(model, packs["one"]), file.read_bytes()
    own, texts = load_file(file), {
        "values": r"whose '.*' it has to get back now, found other values. Put the files back",
        "names": "whose '.*' it has to get back now, found",
        "gone": "expected model.safetensors or model.safetensors.index.json, found neither",
    }  # fmt: skip
    if what == "values":
        save_file({name: value + 1 for name, value in own.items()}, file, {"format": "pt"})
    elif what == "names":
        save_file({f"{name}.other": value for name, value in own.items()}, file, {"format": "pt"})
    file.unlink() if what == "gone" else file.touch()
    if what != "touched":
        with pytest.raises(GraftError, match=texts[what]):
            graft.unplug()
        assert is_plugged(model)
        file.write_bytes(whole)
    graft.unplug()
    assert _digests(model) == before
    assert not is_plugged(model)


def test_the_working_directory_may_change_while_packs_are_plugged_in(
    model: PreTrainedModel, packs: dict[str, SkillPack], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _digests(model)
    monkeypatch.chdir(tmp_path)
    model.name_or_path = "base"
    with _over(model, packs["one"]):
        monkeypatch.chdir(tmp_path / "base")
    assert _digests(model) == before


def test_a_zero_with_a_sign_stays_one(model: PreTrainedModel, packs: dict[str, SkillPack]) -> None:
    weight = model.model.layers[0].mlp.up_proj.weight.data
    weight[0] = 0.0
    model.save_pretrained(model.name_or_path)
    weight[0] = -0.0
    before = _digests(model)
    with _over(model, packs["two"], check=False):
        assert _digests(model) != before
    assert _digests(model) == before


@pytest.mark.parametrize("case", ["no files", "no head in the files", "other values in the files", "more rows"])
def test_parameters_that_share_memory_are_written_over_together_or_kept(tmp_path: Path, case: str) -> None:
    plain = save_llama(tmp_path / "plain", tie_word_embeddings=True)
    base = with_head(plain, tmp_path / "base")
    tuned = with_head(perturb(plain, tmp_path / "tied", seed=1), tmp_path / "tuned")
    pack = compress(Delta(Checkpoint.open(base), Checkpoint.open(tuned)), PackOptions(strategy="paper"))
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(pack)
    model, other = load_model(base), load_model(base)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    if case == "no files":
        model.name_or_path = ""
    elif case == "no head in the files":
        model.name_or_path = str(plain)
    elif case == "other values in the files":
        own = load_file(base / "model.safetensors")
        own["lm_head.weight"] = own["lm_head.weight"] + 1
        save_file(own, base / "model.safetensors", {"format": "pt"})
    else:
        for one in (model, other):
            one.resize_token_embeddings(80)
        other.load_state_dict(model.state_dict())  # new rows are drawn at random
    before = _digests(model)
    for check in (True, False):
        with plug(other, pack, check=check), _over(model, pack, check=check):
            assert _digests(model) == _digests(other)
        assert _digests(model) == before


@pytest.mark.parametrize(("files", "packed"), [("F32", "BF16"), ("BF16", "F32")])
def test_files_in_another_dtype_than_the_packs_base_are_not_written_over(
    tmp_path: Path, files: str, packed: str
) -> None:
    kinds = {"F32": torch.float32, "BF16": torch.bfloat16}
    base = {name: save_llama(tmp_path / name, dtype=dtype) for name, dtype in kinds.items()}
    load_model(base["BF16"]).save_pretrained(base["F32"])
    tuned = perturb(base[packed], tmp_path / "tuned", seed=1)
    pack = compress(Delta(Checkpoint.open(base[packed]), Checkpoint.open(tuned)), PackOptions(strategy="exact"))
    model = load_model(base[files])
    before = _digests(model)
    with _over(model, pack):
        assert _digests(model) == _digests(load_model(tuned))
    assert _digests(model) == before


def test_a_model_that_was_widened_meanwhile_has_the_values_that_it_had(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base", dtype=torch.float32)
    tuned = perturb(base, tmp_path / "tuned", seed=1)
    pack = compress(Delta(Checkpoint.open(base), Checkpoint.open(tuned)), PackOptions(strategy="exact"))
    model, expected = load_model(base).to(torch.bfloat16), load_model(base).to(torch.bfloat16)
    graft = _over(model, pack)
    model.to(torch.float32)
    graft.unplug()
    assert _digests(model) == _digests(expected.to(torch.float32))


def test_a_model_that_was_resized_meanwhile_has_its_own_rows_again(
    model: PreTrainedModel, packs: dict[str, SkillPack]
) -> None:
    before, graft = _digests(model), _over(model, packs["one"])
    model.resize_token_embeddings(90)
    graft.unplug()
    assert _digests(model) == before


def test_values_of_other_packs_are_never_written_over(model: PreTrainedModel, packs: dict[str, SkillPack]) -> None:
    before, shelf = _digests(model), Shelf(1 << 30)
    switch = Switch(model, packs, shelf)
    nothing = (("few", 0.0),)
    switch.to(nothing)
    kept = {name: digest(value) for name, value in shelf._hot[shelf.hot[0]].values.items()}
    graft = _over(model, packs["one"], check=False)
    switch.to(())
    assert {name: digest(value) for name, value in shelf._hot[shelf.hot[0]].values.items()} == kept
    graft.unplug()
    assert _digests(model) == before


def test_memory_that_is_a_files_is_not_written_over(base: Checkpoint, packs: dict[str, SkillPack]) -> None:
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype="auto")
    mapped = backed_by_files(value.data_ptr() for value in model.parameters())
    if not mapped:
        pytest.skip("this system does not tell, or transformers has not mapped the files")
    places = {name: value.data_ptr() for name, value in model.named_parameters()}
    with _over(model, packs["one"]):
        assert not {value.data_ptr() for value in model.parameters()} & mapped
    assert {name: value.data_ptr() for name, value in model.named_parameters()} == places


def test_a_link_to_the_base_may_be_led_elsewhere(
    model: PreTrainedModel, packs: dict[str, SkillPack], tmp_path: Path
) -> None:
    before, link = _digests(model), tmp_path / "current"
    link.symlink_to(model.name_or_path)
    model.name_or_path = str(link)
    with _over(model, packs["one"]):
        link.unlink()
    assert _digests(model) == before
