"""Vocabulary rows that the base lacks have no delta: they are merged apart from the method."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from graftllm.checkpoint import Checkpoint
from graftllm.delta import Delta
from graftllm.fusion.inputs import Tuned, open_tuned
from graftllm.fusion.merging import merge
from graftllm.fusion.methods.table import METHODS
from graftllm.packer import compress
from graftllm.packing_options import PackOptions
from graftllm.skillpack import SkillPack
from tests.models import perturb, save_llama, with_vocabulary

WORDS, ROWS = "model.embed_tokens.weight", 80
NAMES = ("code", "math")
PLAIN = [name for name, row in METHODS.items() if row.rows is None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(save_llama(tmp_path_factory.mktemp("vocabulary") / "base", dtype=torch.float32))


@pytest.fixture(scope="module")
def tensors(base: Checkpoint) -> dict[str, dict[str, Tensor]]:
    """Two models near each other, whose added rows are as large as any."""
    home = base.path.parent
    shared = load_file(with_vocabulary(base.path, home / "grown", ROWS) / "model.safetensors")
    found = {}
    for seed, name in enumerate(NAMES):
        draw = torch.Generator().manual_seed(seed)
        found[name] = {key: value + 0.002 * torch.randn(value.shape, generator=draw) for key, value in shared.items()}
    return found


@pytest.fixture(scope="module")
def models(base: Checkpoint, tensors: dict[str, dict[str, Tensor]]) -> list[Tuned]:
    places = [with_vocabulary(base.path, base.path.parent / name, ROWS) for name in NAMES]
    return opened(base, dict(zip(NAMES, places, strict=True)), tensors)


def opened(base: Checkpoint, places: Mapping[str, Path], tensors: Mapping[str, Mapping[str, Tensor]]) -> list[Tuned]:
    for name, place in places.items():
        save_file(dict(tensors[name]), place / "model.safetensors", metadata={"format": "pt"})
    return [open_tuned(base, place, name=name) for name, place in places.items()]


def weighed(models: list[Tuned], *weights: float) -> list[Tuned]:
    return [Tuned(one.name, one.origin, weight) for one, weight in zip(models, weights, strict=True)]


def words(place: Path) -> Tensor:
    return Checkpoint.open(place).tensor(WORDS)


@pytest.mark.parametrize("name", PLAIN)
def test_added_rows_are_averaged_or_each_models_own_and_the_others_merge_as_if_there_were_none(
    name: str, base: Checkpoint, models: list[Tuned], tensors: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    known = len(base.tensor(WORDS))
    short = {task: own | {WORDS: own[WORDS][:known].clone()} for task, own in tensors.items()}
    places = {task: perturb(base.path, tmp_path / "short" / task, seed=0) for task in NAMES}
    without = merge(base, opened(base, places, short), METHODS[name], tmp_path / "without").outputs
    mean = (tensors["code"][WORDS][known:] + tensors["math"][WORDS][known:]) / 2
    for task, place in merge(base, models, METHODS[name], tmp_path / "out").outputs.items():
        found, expected = Checkpoint.open(place), Checkpoint.open(without[task])
        assert torch.equal(found.tensor(WORDS)[:known], expected.tensor(WORDS))
        assert all(torch.equal(found.tensor(key), expected.tensor(key)) for key in found.names() if key != WORDS)
        assert found.config["vocab_size"] == ROWS
        if task:
            assert torch.equal(found.tensor(WORDS)[known:], tensors[task][WORDS][known:])
        else:
            assert torch.allclose(found.tensor(WORDS)[known:], mean, atol=1e-6)


@pytest.mark.parametrize(("weights", "share"), [((3.0, 1.0), 0.75), ((0.5, -1.5), 0.25), ((2.0, 0.0), 1.0)])
def test_added_rows_count_by_the_size_of_the_weights_and_no_scale_shrinks_them(
    base: Checkpoint, models: list[Tuned], tmp_path: Path, weights: tuple[float, float], share: float
) -> None:
    known, (code, math) = len(base.tensor(WORDS)), (words(one.files[0]) for one in models)
    merge(base, weighed(models, *weights), METHODS["task-arithmetic"], tmp_path / "out")
    expected = share * code[known:] + (1 - share) * math[known:]
    assert torch.allclose(words(tmp_path / "out")[known:], expected, atol=1e-6)


@pytest.mark.parametrize("weight", [1.0, 0.3, -2.0])
def test_one_models_added_rows_are_its_own_whatever_its_weight(
    base: Checkpoint, models: list[Tuned], tmp_path: Path, weight: float
) -> None:
    known, own = len(base.tensor(WORDS)), words(models[0].files[0])
    merge(base, weighed(models[:1], weight), METHODS["ties"], tmp_path / "out")
    assert torch.equal(words(tmp_path / "out")[known:], own[known:])


def test_packs_in_and_out_have_the_same_added_rows(base: Checkpoint, models: list[Tuned], tmp_path: Path) -> None:
    exact, known = PackOptions(strategy="exact"), len(base.tensor(WORDS))
    merge(base, models, METHODS["sce"], tmp_path / "out")
    assert all(isinstance(one.origin, Delta) for one in models)
    packs = [Tuned(one.name, compress(one.origin, exact)) for one in models if isinstance(one.origin, Delta)]
    merge(base, packs, METHODS["sce"], tmp_path / "out.safetensors", pack=exact)
    restored = SkillPack.load(tmp_path / "out.safetensors").restore(WORDS, base.tensor(WORDS))
    assert len(restored) == ROWS > known and torch.equal(restored, words(tmp_path / "out"))


def test_added_rows_are_counted_once_or_for_each_task(base: Checkpoint, models: list[Tuned], tmp_path: Path) -> None:
    rows, width = base.specs[WORDS].shape
    added = 4 * (ROWS - rows) * width
    for name, times in (("ties", 1), ("emr", 2), ("routed-lora", 2)):
        row = METHODS[name]
        made = merge(base, models, row, tmp_path / name)
        plain = row.stored_bytes(base.specs.values(), 2, row.knobs({}).rank)
        assert added > 0 and made.stored_bytes == plain + times * added
