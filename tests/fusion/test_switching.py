"""Packs that give their place to others, where the shelf has room for merged weights and where it has none."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from graftllm.checkpoint import Checkpoint
from graftllm.delta import Delta
from graftllm.errors import GraftError, PackError
from graftllm.fusion import grafting
from graftllm.fusion.grafting import plug, plug_in_place
from graftllm.fusion.grafts import is_plugged
from graftllm.fusion.shelf import Shelf
from graftllm.fusion.stacks import Mix
from graftllm.fusion.switching import Switch
from graftllm.loading import load_model
from graftllm.packer import compress
from graftllm.packing_options import PackOptions
from graftllm.skillpack import SkillPack
from graftllm.tensors import digest
from tests.models import perturb, save_llama, with_vocabulary

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
        plug_in_place(model, packs["two"])
    assert _digests(model) == before
    with plug_in_place(model, packs["two"], check=False):
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


def test_a_damaged_pack_leaves_the_base(
    model: PreTrainedModel, packs: dict[str, SkillPack], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, switch = _digests(model), Switch(model, packs, Shelf(0))
    switch.to(ONE)
    whole, seen = grafting.combined, []

    def damaged(name: str, *given: Any, **more: Any) -> torch.Tensor:
        seen.append(name)
        if len(seen) > 5:
            raise PackError("two: damaged")
        return whole(name, *given, **more)

    monkeypatch.setattr(grafting, "combined", damaged)
    with pytest.raises(PackError, match="damaged"):
        switch.to(TWO)
    assert len(seen) == 6
    assert _digests(model) == before
    monkeypatch.undo()
    switch.to(ONE)
    switch.to(())
    assert _digests(model) == before


@pytest.mark.parametrize("what", ["values", "names", "gone", "touched"])
def test_files_that_changed_give_nothing_back_until_they_are_the_bases_again(
    model: PreTrainedModel, packs: dict[str, SkillPack], what: str
) -> None:
    before, file = _digests(model), Path(model.name_or_path) / "model.safetensors"
    graft, whole = plug_in_place(model, packs["one"]), file.read_bytes()
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
    with plug_in_place(model, packs["one"]):
        monkeypatch.chdir(tmp_path / "base")
    assert _digests(model) == before
