from pathlib import Path
from typing import Any

import pytest

from graftllm.fusion.directory import add_packs, remove_pack
from graftllm.fusion.grafted import GraftedModel
from graftllm.fusion.manifest import sha256_of
from graftllm.serving.shelves import Library


def test_a_directory_that_changes_while_it_is_read_is_served_as_it_then_is(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, load = own / "grafted", GraftedModel.load

    def changed_first(*given: Any, **named: Any) -> GraftedModel:
        remove_pack(directory, "whole")
        add_packs(directory, {"spare": own / "spare.safetensors"})
        return load(*given, **named)

    monkeypatch.setattr(GraftedModel, "load", changed_first)
    library, files = Library(directory), directory / "packs"
    assert library.digests == {name: sha256_of(files / f"{name}.safetensors") for name in ("one", "two", "spare")}
    assert library.models()["spare"]["bytes"] == (files / "spare.safetensors").stat().st_size
    assert {name for name, pack in library.models().items() if "bytes" in pack} == {"one", "two", "spare"}
