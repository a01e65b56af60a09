from pathlib import Path

import pytest

from graftllm.checkpoint import Checkpoint
from graftllm.delta import Delta
from graftllm.fusion.directory import write_grafted
from graftllm.header import Card
from graftllm.packer import compress
from graftllm.packing_options import PackOptions
from tests.models import perturb, save_llama, with_vocabulary


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and packs of it: `one` and `three` exact, `two` in factors, `wide` with added vocabulary rows.

    `other` is for another base.
    """
    home = tmp_path_factory.mktemp("home")
    base = save_llama(home / "base")
    for seed, name in enumerate(("one", "two", "three"), 1):
        delta = Delta(Checkpoint.open(base), Checkpoint.open(perturb(base, home / f"{name}-tuned", seed=seed)))
        options = PackOptions(strategy="paper" if name == "two" else "exact")
        compress(delta, options, card=Card(name=name, description=f"Skill {name}")).save(home / f"{name}.safetensors")
    wide = with_vocabulary(base, home / "wide-tuned", 80)
    compress(Delta(Checkpoint.open(base), Checkpoint.open(wide)), PackOptions()).save(home / "wide.safetensors")
    other = save_llama(home / "other", seed=8)
    delta = Delta(Checkpoint.open(other), Checkpoint.open(perturb(other, home / "other-tuned", seed=1)))
    compress(delta, PackOptions(strategy="exact")).save(home / "other.safetensors")
    return home


@pytest.fixture
def grafted(home: Path, tmp_path: Path) -> Path:
    """A grafted model with the packs `one` and `two`."""
    write_grafted(tmp_path / "g", str(home / "base"), {name: home / f"{name}.safetensors" for name in ("one", "two")})
    return tmp_path / "g"
