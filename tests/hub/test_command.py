import json
from pathlib import Path

import pytest

from graftllm.checkpoint import Checkpoint
from tests.command import Command
from tests.hub.standin import Hub

# huggingface_hub 2.4 uploads by a parameter that httpx2 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def test_the_commands_share_a_pack_that_others_use_by_name(
    hub: Hub, graftllm: Command, pack_file: Path, base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out(*arguments: str | Path) -> str:
        shown = graftllm(*arguments)
        assert shown.code == 0, shown.err
        return shown.out

    monkeypatch.chdir(tmp_path)
    commit = json.loads(out("push", pack_file, "user/reverse", "--base", "org/base", "--json"))["commit"]
    pulled = out("pull", f"user/reverse@{commit}")
    assert pulled == f"reverse.safetensors: user/reverse at commit {commit}, reverse\n"
    assert (tmp_path / "reverse.safetensors").read_bytes() == pack_file.read_bytes()
    out("apply", "--base", base_dir, "--pack", "user/reverse", "--out", "tuned")
    assert Checkpoint.open(tmp_path / "tuned").specs == Checkpoint.open(base_dir).specs
    out("merge", "--base", base_dir, "--method", "linear", "--pack", f"back=user/reverse@{commit}:1", "--out", "merged")
    assert Checkpoint.open(tmp_path / "merged").fingerprint == Checkpoint.open(tmp_path / "tuned").fingerprint
    out("fuse", "--base", base_dir, "--pack", "back=user/reverse", "--out", "g")
    assert "back" in json.loads(out("list", "g", "--json"))["packs"]
    assert json.loads(out("inspect", "user/reverse", "--json"))["anatomy"]["file_bytes"] == pack_file.stat().st_size
