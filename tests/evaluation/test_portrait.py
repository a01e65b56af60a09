from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from matplotlib import rc_context

from graftllm.compression.factored import Factored
from graftllm.compression.roles import Role
from graftllm.delta import Delta
from graftllm.errors import StorageError
from graftllm.evaluation.portrait import COLORS, draw_portrait
from graftllm.packer import compress
from graftllm.packing_options import PackOptions
from graftllm.skillpack import SkillPack
from tests.evaluation.test_anatomy import header_of


@pytest.mark.parametrize("strategy", ["paper", "exact"])
@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_a_picture_is_drawn(delta: Delta, tmp_path: Path, strategy, suffix: str, start: bytes) -> None:
    pack = compress(delta, PackOptions(strategy=strategy))
    draw_portrait(pack, tmp_path / f"picture{suffix}")
    assert (tmp_path / f"picture{suffix}").read_bytes().startswith(start)


def test_a_picture_needs_no_payload_of_other_operators(tmp_path: Path) -> None:
    """Many layers in two stacks, names that are no mathematics and no text for a terminal."""
    names = [f"{stack}.{i}.w" for stack in ("a$\\frac$", "b\x1b[31m") for i in range(40)]
    header = header_of([*names, "norm.weight"])
    header = header.model_copy(update={"card": header.card.model_copy(update={"name": "$\\x$\x1b"})})
    draw_portrait(SkillPack(header, "toy", unread), tmp_path / "picture.png")


def test_a_pack_of_nothing_can_be_drawn(delta: Delta, tmp_path: Path) -> None:
    draw_portrait(compress(Delta(delta.base, delta.base), PackOptions(strategy="exact")), tmp_path / "picture.png")


def test_factors_far_larger_than_their_bytes_are_told_and_not_read(tmp_path: Path) -> None:
    header = header_of(["a", "b"])
    large = {"shape": (1 << 14, 1 << 14), "how": Factored(rank=1 << 10, step=1.0)}
    header = header.model_copy(update={"tensors": {"a": header.tensors["a"].model_copy(update=large)}})
    with rc_context({"svg.fonttype": "none"}):
        draw_portrait(SkillPack(header, "toy", unread), tmp_path / "picture.svg")
    drawn = (tmp_path / "picture.svg").read_text()
    assert "Directions of the factors; 1 left out, far larger than their bytes" in drawn
    assert "no other tensor is stored as factors" in drawn


def test_unknown_kinds_of_pictures_are_refused(delta: Delta, tmp_path: Path) -> None:
    pack = SkillPack(header_of(["w"]), "toy", unread)
    with pytest.raises(StorageError, match="picture: expected a name that ends in .png, .svg, .pdf; found ''."):
        draw_portrait(pack, tmp_path / "picture")
    assert not list(tmp_path.iterdir())


def test_roles_have_colors_of_their_own() -> None:
    assert set(COLORS) == set(get_args(Role))
    assert len(set(COLORS.values())) == len(COLORS)


def unread(name: str) -> np.ndarray:
    raise AssertionError(f"the payload of {name} was read")
