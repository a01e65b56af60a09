import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from graftllm.checkpoint import Checkpoint
from graftllm.delta import Delta
from graftllm.header import Card
from graftllm.packer import compress
from graftllm.packing_options import PackOptions
from graftllm.skillpack import SkillPack
from tests.command import Command
from tests.models import perturb


@pytest.fixture(scope="module")
def packs(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("packs")
    for seed, name in enumerate(("one", "two"), 1):
        delta = Delta(Checkpoint.open(base_dir), Checkpoint.open(perturb(base_dir, home / name, seed=seed)))
        compress(delta, PackOptions(strategy="exact" if name == "one" else "paper")).save(home / f"{name}.safetensors")
    return home


def test_packs_come_to_a_shelf_are_listed_and_go(
    graftllm: Command, base_dir: Path, packs: Path, tmp_path: Path
) -> None:
    shelf = tmp_path / "g"
    assert graftllm("fuse", "--base", base_dir, "--pack", f"one={packs}/one.safetensors", "--out", shelf)[0] == 0
    code, out, _ = graftllm("add", shelf, f"two={packs}/two.safetensors", f"three={packs}/one.safetensors")
    assert (code, out) == (0, f"{shelf}: two, three added; 3 packs. Next: graftllm list {shelf}\n")
    listed = json.loads(graftllm("list", shelf, "--json")[1])
    assert list(listed["packs"]) == ["one", "two", "three"]
    assert [pack["beside"] for pack in listed["packs"].values()] == [False, True, False]
    assert listed["packs"]["one"]["sha256"] == listed["packs"]["three"]["sha256"]
    shown = graftllm("list", shelf)[1]
    for words in ("merged, beside", "packs   3, ", "router  none", listed["fingerprint"][:12]):
        assert words in shown
    code, out, _ = graftllm("remove", shelf, "three")
    assert (code, out) == (0, f"{shelf}: three removed; left: one, two\n")


def test_fusing_over_a_shelf_loses_none_of_its_packs(
    graftllm: Command, base_dir: Path, packs: Path, tmp_path: Path
) -> None:
    shelf, one, two = tmp_path / "g", f"one={packs}/one.safetensors", f"two={packs}/two.safetensors"
    assert graftllm("fuse", "--base", base_dir, "--pack", one, "--pack", two, "--out", shelf)[0] == 0
    code, _, error = graftllm("fuse", "--base", base_dir, "--pack", one, "--out", shelf)
    assert code == 1 and "is a grafted model with the pack 'two' as well, which would be lost. `graftllm add`" in error
    assert list(json.loads(graftllm("list", shelf, "--json")[1])["packs"]) == ["one", "two"]
    assert graftllm("fuse", "--base", base_dir, "--pack", two, "--pack", one, "--out", shelf)[0] == 0


def test_a_description_with_brackets_is_shown_as_it_is(
    graftllm: Command, base_dir: Path, packs: Path, tmp_path: Path
) -> None:
    pack = SkillPack.load(packs / "one.safetensors")
    header = pack.header.model_copy(update={"card": Card(description="x [/b] [red]y")})
    replace(pack, header=header).save(tmp_path / "odd.safetensors")
    shelf = tmp_path / "g"
    assert graftllm("fuse", "--base", base_dir, "--pack", f"odd={tmp_path}/odd.safetensors", "--out", shelf)[0] == 0
    code, out, error = graftllm("list", shelf)
    assert (code, error) == (0, "")
    assert "x [/b] [red]y" in out


def test_rules_are_read_and_shown_and_hold_their_pack(
    graftllm: Command, base_dir: Path, packs: Path, tmp_path: Path
) -> None:
    shelf, rules = tmp_path / "g", tmp_path / "rules.yaml"
    rules.write_text("- {pack: one, pattern: '^sum '}\n")
    made = ["fuse", "--base", base_dir, "--pack", f"one={packs}/one.safetensors", "--out", shelf, "--rules", rules]
    assert graftllm(*made)[0] == 0
    assert '"pattern":"^sum "' in graftllm("list", shelf)[1]
    line = f"rule 1 of 1 sends prompts to the pack 'one'; take the rule out first (`graftllm rules {shelf} FILE`)."
    assert line in graftllm("remove", shelf, "one")[2]
    rules.write_text("[]")
    assert graftllm("rules", shelf, rules)[:2] == (0, f"{shelf}: 0 rules. Next: graftllm list {shelf}\n")
    assert graftllm("remove", shelf, "one")[1] == f"{shelf}: one removed; left: the base alone\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["add", "{s}", "one={p}/two.safetensors"], "pack 'one': this grafted model has one of that name; choose"),
        (["add", "{s}", "x={p}/two.safetensors", "x=b"], "[NAME=]FILE: two packs have the same name, 'x'; give each"),
        (
            ["add", "{s}", "={p}/two.safetensors"],
            "[NAME=]FILE: expected [NAME=]FILE, such as math=packs/math.safetensors",
        ),
        (["add", "{p}", "x={p}/two.safetensors"], "expected a grafted model, found no manifest.json in it"),
        (["remove", "{s}", "two"], "pack: expected one of one; found 'two'."),
        (["remove", "{s}", "base"], "pack: expected one of one; found 'base'."),
        (
            ["add", "{s}", "x²={p}/two.safetensors"],
            "pack 'x²': expected a plain name other than base, auto, by-task and",
        ),
        (["add", "{s}", "x={p}/two.safetensors", "--drift", "0.1"], "--drift: is of the router, which learns from"),
        (["fuse", "--base", "b", "--pack", "x=y", "--out", "{s}", "--soft", "0"], "soft: Input should be greater than"),
        (
            ["fuse", "--base", "b", "--pack", "x=y", "--out", "{s}", "--soft", "2"],
            "router: expected prompt rows (--rou",
        ),
        (
            ["chat", "{s}", "--temperature", "-1"],
            "temperature: Input should be greater than or equal to 0; found -1.0.",
        ),
        (
            ["chat", "{s}", "--max-new-tokens", "0"],
            "max_new_tokens: Input should be greater than or equal to 1; found 0",
        ),
        (["eval", "{s}", "--task", "t", "--max-new-tokens", "0"], "max_new_tokens: Input should be greater than or eq"),
        (["list", "{p}"], "expected a grafted model, found no manifest.json in it; make one with `graftllm fuse`."),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_1(
    graftllm: Command, base_dir: Path, packs: Path, tmp_path: Path, arguments: list[str], line: str
) -> None:
    graftllm("fuse", "--base", base_dir, "--pack", f"one={packs}/one.safetensors", "--out", tmp_path / "g")
    code, out, err = graftllm(*(one.format(s=tmp_path / "g", p=packs) for one in arguments))
    assert (code, out) == (1, "")
    assert line in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_what_is_typed_in_another_encoding_is_one_line(
    graftllm: Command, base_dir: Path, packs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, errors: str
) -> None:
    graftllm("fuse", "--base", base_dir, "--pack", f"one={packs}/one.safetensors", "--out", tmp_path / "g")
    typed = io.TextIOWrapper(io.BytesIO("grüß".encode("latin-1")), encoding="utf-8", errors=errors)
    monkeypatch.setattr(sys, "stdin", typed)
    code, out, err = graftllm("chat", tmp_path / "g", "--pack", "one")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "stdin: expected UTF-8 text, found other bytes ('utf-8' codec can't " in err
