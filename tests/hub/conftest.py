from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from graftllm.checkpoint import Checkpoint
from graftllm.delta import Delta
from graftllm.header import Card
from graftllm.packer import compress
from tests.hub.standin import TOKEN, Hub, standing_in


@pytest.fixture(scope="session")
def server() -> Iterator[Hub]:
    with standing_in() as hub:
        yield hub


@pytest.fixture
def hub(server: Hub, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """An empty Hub, an empty cache, and a token that may write."""
    for kept in (server.repositories, server.blobs, server.cuts, server.asked):
        kept.clear()
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return server


@pytest.fixture(scope="session")
def pack_file(base_dir: Path, tuned_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    card = Card(
        name="Reverse --- it", description="Writes | words\nbackward", license="Apache-2.0", scores={"reverse": 0.97}
    )
    made = compress(Delta(Checkpoint.open(base_dir), Checkpoint.open(tuned_dir)), card=card)
    path = tmp_path_factory.mktemp("packs") / "reverse.safetensors"
    made.save(path)
    return path
