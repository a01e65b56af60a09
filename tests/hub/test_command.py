import json
import sys
from pathlib import Path

import pytest

from graftllm import cli
from graftllm.checkpoint import Checkpoint
from tests.hub.standin import Hub

# huggingface_hub 2.4 uploads by a parameter that httpx2 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def test_the_commands_share_a_pack_that_others_use_by_name(
    hub: Hub,
    pack_file: Path,
    base_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def graftllm(*arguments: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", ["graftllm", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as stop:
            assert stop.code in (0, None), capsys.readouterr().err
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    commit = json.loads(graftllm("push", pack_file, "user/reverse", "--base", "org/base", "--json"))["commit"]
    pulled = graftllm("pull", f"user/reverse@{commit}")
    assert pulled == f"reverse.safetensors: user/reverse at commit {commit}, reverse\n"
    assert (tmp_path / "reverse.safetensors").read_bytes() == pack_file.read_bytes()
    graftllm("apply", "--base", base_dir, "--pack", "user/reverse", "--out", "tuned")
    assert Checkpoint.open(tmp_path / "tuned").specs == Checkpoint.open(base_dir).specs
    graftllm("fuse", "--base", base_dir, "--pack", "back=user/reverse", "--out", "g")
    assert "back" in json.loads(graftllm("list", "g", "--json"))["packs"]
    assert (
        json.loads(graftllm("inspect", "user/reverse", "--json"))["anatomy"]["file_bytes"] == pack_file.stat().st_size
    )
