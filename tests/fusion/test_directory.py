import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest
from pydantic import ValidationError

from graftllm.checkpoint import Checkpoint
from graftllm.delta import Delta
from graftllm.errors import FusionError, PackError, StorageError
from graftllm.fusion import directory
from graftllm.fusion.directory import add_packs, remove_pack, set_router, set_rules, write_grafted
from graftllm.fusion.manifest import MANIFEST, open_base, open_packs, read_manifest
from graftllm.fusion.rules import Rule
from graftllm.packer import compress
from graftllm.packing_options import PackOptions
from graftllm.storage import only_writer
from tests.models import RouterFile, perturb


def _contents(directory: Path) -> dict[str, tuple[int, bytes]]:
    files = [file for file in sorted(directory.rglob("*")) if file.is_file()]
    return {str(file.relative_to(directory)): (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


def _fail(*_: object) -> None:
    raise OSError("not on this file system")


def test_a_damaged_pack_comes_to_no_shelf(home: Path, grafted: Path, tmp_path: Path) -> None:
    content = bytearray((home / "three.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "bad.safetensors").write_bytes(content)
    before = _contents(grafted)
    for change in (
        lambda packs: add_packs(grafted, packs),
        lambda packs: write_grafted(tmp_path / "new", str(home / "base"), packs),
    ):
        with pytest.raises(PackError, match="bad.safetensors: .* does not match its digest"):
            change({"bad": tmp_path / "bad.safetensors"})
    assert _contents(grafted) == before and not (tmp_path / "new").exists()


def test_adding_touches_nothing_but_the_manifest(home: Path, grafted: Path) -> None:
    before = _contents(grafted)
    add_packs(grafted, {"three": home / "three.safetensors"})
    after = _contents(grafted)
    assert set(after) - set(before) == {"packs/three.safetensors"}
    assert [name for name in before if before[name] != after[name]] == ["manifest.json"]
    assert (grafted / "packs" / "three.safetensors").samefile(home / "three.safetensors")
    assert list(read_manifest(grafted).packs) == ["one", "two", "three"]


def test_adding_and_removing_again_gives_the_old_directory_back(home: Path, grafted: Path) -> None:
    before = {name: data for name, (_, data) in _contents(grafted).items()}
    add_packs(grafted, {"three": home / "three.safetensors"})
    remove_pack(grafted, "three")
    assert {name: data for name, (_, data) in _contents(grafted).items()} == before


def test_where_files_cannot_be_linked_they_are_copied(home: Path, grafted: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "link", _fail)
    add_packs(grafted, {"three": home / "three.safetensors"})
    assert not (grafted / "packs" / "three.safetensors").samefile(home / "three.safetensors")
    assert list(open_packs(grafted, read_manifest(grafted))) == ["one", "two", "three"]


def test_removing_every_pack_leaves_the_base(grafted: Path) -> None:
    for name in ("one", "two"):
        remove_pack(grafted, name)
    assert read_manifest(grafted).packs == {}
    assert list((grafted / "packs").iterdir()) == []


_KILLED = """
import os, sys
from pathlib import Path
from graftllm.fusion.directory import add_packs, remove_pack
from graftllm.fusion.manifest import open_packs, read_manifest, MANIFEST
directory, pack, change = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
steps = {"os.rename", "os.link", "os.remove", "os.mkdir", "os.truncate"}

def child(last):
    seen = 0
    def watch(event, arguments):
        nonlocal seen
        if event in steps or (event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT):
            seen += 1
            if seen > last:
                os._exit(9)
    sys.addaudithook(watch)
    if change == "add":
        add_packs(directory, {"three": pack})
    else:
        remove_pack(directory, "two")
    os._exit(0)

states = []
for last in range(100):
    process = os.fork()
    if not process:
        child(last)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    packs = list(open_packs(directory, read_manifest(directory)))
    states.append(packs)
    if code == 0:
        break
    if packs != states[0] and change == "add":
        remove_pack(directory, "three")
    elif packs != states[0]:
        add_packs(directory, {"two": pack})
print(len(states), states[0], states[-1], all(one in (states[0], states[-1]) for one in states))
"""


@pytest.mark.parametrize(
    ("change", "file", "left"), [("add", "three", "['one', 'two', 'three']"), ("remove", "two", "['one']")]
)
def test_a_process_killed_at_any_step_leaves_the_old_model_or_the_new(
    home: Path, grafted: Path, change: str, file: str, left: str
) -> None:
    shutil.copy(home / f"{file}.safetensors", grafted.parent / "pack.safetensors")
    arguments = [sys.executable, "-W", "ignore", "-c", _KILLED, grafted, grafted.parent / "pack.safetensors", change]
    done = subprocess.run([*map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    steps, rest = done.stdout.split(" ", 1)
    assert int(steps) > 3
    assert rest.strip() == f"['one', 'two'] {left} True"


def test_two_writers_do_not_mix(home: Path, grafted: Path) -> None:
    with only_writer(grafted), pytest.raises(StorageError, match="another process is writing here now"):
        add_packs(grafted, {"three": home / "three.safetensors"})


def test_bad_changes_change_nothing(home: Path, grafted: Path, tmp_path: Path) -> None:
    set_rules(grafted, [Rule(pack="one", tag="TAG"), Rule(pack="two", pattern="x")])
    before = _contents(grafted)
    for name, file, error, message in (
        ("one", "three", FusionError, r"pack 'one': this grafted model has one of that name; choose another name, or"),
        (
            "base",
            "three",
            FusionError,
            r"pack 'base': expected a plain name other than base, auto, by-task and general",
        ),
        ("x²", "three", FusionError, r"pack 'x²': expected a plain name"),
        ("x" * 65, "three", FusionError, r"pack 'x{65}': expected a plain name .* .at most 64 of a-z, A-Z, 0-9,"),
        ("a/b", "three", FusionError, r"pack 'a/b': expected a plain name"),
        (
            "three",
            "other",
            FusionError,
            r"other.safetensors: made for the base other \(\w{12}\), but .*base is \w{12}. Use that",
        ),
        ("three", "none", PackError, r"cannot be read"),
    ):
        with pytest.raises(error, match=message):
            add_packs(grafted, {name: home / f"{file}.safetensors"})
    for name in ("three", "base"):
        with pytest.raises(FusionError, match=f"pack: expected one of one, two; found '{name}'"):
            remove_pack(grafted, name)
    with pytest.raises(
        FusionError, match=r"rule 2 of 2 sends prompts to the pack 'two'; take the rule out first \(`graftllm rules"
    ):
        remove_pack(grafted, "two")
    with pytest.raises(
        FusionError, match=r"rule 1 names the pack 'three', which is not there; expected base or one, t"
    ):
        set_rules(grafted, [Rule(pack="three", tag="x")])
    with pytest.raises(FusionError, match="router: knows the pack 'three', which is not there; expected one, two."):
        set_router(grafted, RouterFile("one", "three"))  # type: ignore
    with pytest.raises(FusionError, match="expected a grafted model, found no manifest.json in it"):
        add_packs(tmp_path / "nothing", {"three": home / "three.safetensors"})
    assert not (tmp_path / "nothing").exists()
    assert _contents(grafted) == before


@pytest.mark.parametrize("bad", ["other", "none"])
def test_of_several_packs_none_comes_when_one_does_not_fit(home: Path, grafted: Path, tmp_path: Path, bad: str) -> None:
    packs = {name: home / f"{name}.safetensors" for name in ("three", bad)}
    before = _contents(grafted)
    with pytest.raises((FusionError, PackError), match=f"{bad}.safetensors: "):
        add_packs(grafted, packs)
    assert _contents(grafted) == before
    for out in (grafted, tmp_path / "new"):
        with pytest.raises((FusionError, PackError), match=f"{bad}.safetensors: "):
            write_grafted(out, str(home / "base"), packs)
    assert _contents(tmp_path) == {f"g/{name}": content for name, content in before.items()}
    assert [file.name for file in tmp_path.iterdir()] == ["g"]


def test_a_pack_whose_tokenizer_does_not_load_is_refused(home: Path, grafted: Path, tmp_path: Path) -> None:
    before = _contents(grafted)
    for name, file, told, message in (
        ("odd", "tokenizer.json", "{", "its tokenizer does not load"),
        ("endless", "generation_config.json", '{"eos_token_id": "x"}', "to hold end tokens by number"),
    ):
        tuned = perturb(home / "base", tmp_path / name, seed=8)
        (tuned / file).write_text(told)
        pack = compress(Delta(Checkpoint.open(home / "base"), Checkpoint.open(tuned)), PackOptions(strategy="exact"))
        pack.save(tmp_path / f"{name}.safetensors")
        with pytest.raises(PackError, match=rf"{name}.safetensors: .*{message}"):
            add_packs(grafted, {name: tmp_path / f"{name}.safetensors"})
        assert _contents(grafted) == before


def _full_after(number: int, copy: Callable[..., None]) -> Callable[..., None]:
    """Return a copy of files to a disk that is full after so many."""
    done: list[object] = []

    def copying(source: BinaryIO, place: BinaryIO) -> None:
        if len(done) == number:
            place.write(source.read(100))
            raise OSError(errno.ENOSPC, "No space left on device")
        done.append(copy(source, place))

    return copying


@pytest.mark.parametrize("number", [0, 1])
def test_a_disk_that_is_full_in_the_middle_keeps_no_pack(
    home: Path, grafted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    packs = {name: home / f"{name}.safetensors" for name in ("three", "again")}
    shutil.copy(packs["three"], packs["again"])
    before = _contents(grafted)
    monkeypatch.setattr(os, "link", _fail)
    for change in (
        lambda: add_packs(grafted, packs),
        lambda: write_grafted(tmp_path / "new", str(home / "base"), packs),
    ):
        with monkeypatch.context() as disk:
            disk.setattr(shutil, "copyfileobj", _full_after(number, shutil.copyfileobj))
            with pytest.raises(StorageError, match="no space left to write it; nothing half-written was kept"):
                change()
    assert _contents(grafted) == before
    assert [file.name for file in tmp_path.iterdir()] == ["g"]
    add_packs(grafted, packs)
    assert list(open_packs(grafted, read_manifest(grafted))) == ["one", "two", "three", "again"]


def test_what_a_failed_change_put_goes_but_nothing_that_was_there(
    home: Path, grafted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_router(grafted, RouterFile("one"))  # type: ignore
    shutil.copy(home / "three.safetensors", grafted / "packs")  # the only one of its name, or one that a kill left
    before = _contents(grafted)
    packs = {"three": grafted / "packs" / "three.safetensors", "again": home / "three.safetensors"}
    with pytest.raises(FusionError, match="router: knows the pack 'four', which is not there"):
        add_packs(grafted, packs, router=RouterFile("one", "four"))  # type: ignore

    changes = (
        lambda: add_packs(grafted, packs, router=RouterFile("one", "again")),  # type: ignore
        lambda: set_router(grafted, RouterFile("two")),  # type: ignore
    )
    for place, name in ((directory, "write_text"), (os, "replace")):  # of the manifest, and of the router
        for change in changes:
            with monkeypatch.context() as disk, pytest.raises(OSError, match="not on this file system"):
                disk.setattr(place, name, _fail)
                change()
    assert _contents(grafted) == before


def test_a_new_directory_spares_what_it_is_made_of_and_what_is_not_one(
    home: Path, grafted: Path, tmp_path: Path
) -> None:
    shutil.copy(home / "three.safetensors", grafted)
    other = tmp_path / "app"
    other.mkdir()
    (other / MANIFEST).write_text('{"name": "my web app"}')
    before = _contents(grafted) | _contents(other)
    with pytest.raises(StorageError, match="expected a place apart from .*three.safetensors, which is read"):
        write_grafted(grafted, str(home / "base"), {"three": grafted / "three.safetensors"})
    with pytest.raises(FusionError, match="manifest.json"):
        write_grafted(other, str(home / "base"), {"three": home / "three.safetensors"})
    assert _contents(grafted) | _contents(other) == before
    (grafted / "three.safetensors").unlink()
    write_grafted(grafted, str(home / "base"), {"two": grafted / "packs" / "two.safetensors"})
    assert list(read_manifest(grafted).packs) == ["two"]


def test_a_router_that_is_older_than_a_pack_is_known_as_such(home: Path, grafted: Path) -> None:
    assert set_router(grafted, RouterFile("one", "two")).unrouted() == []  # type: ignore
    added = add_packs(grafted, {"three": home / "three.safetensors"})
    assert added.unrouted() == ["three"]
    assert set_router(grafted, RouterFile("one", "two", "three")).unrouted() == []  # type: ignore
    assert len(list(grafted.glob("router-*"))) == 1


def test_a_router_comes_with_the_packs_that_it_knows(home: Path, grafted: Path) -> None:
    set_router(grafted, RouterFile("one", "two"))  # type: ignore
    manifest = add_packs(grafted, {"three": home / "three.safetensors"}, router=RouterFile("one", "two", "three"))  # type: ignore
    assert manifest.unrouted() == []
    assert [file.name for file in grafted.glob("router-*")] == [manifest.router.file]


def test_a_router_that_was_made_of_another_than_is_there_does_not_come(home: Path, grafted: Path) -> None:
    taught = read_manifest(grafted)
    set_router(grafted, RouterFile("one", "two"))  # type: ignore
    before = _contents(grafted)
    with pytest.raises(
        FusionError, match="g: expected the router that learnt of three, found another; it was changed meanwhile. Noth"
    ):
        add_packs(grafted, {"three": home / "three.safetensors"}, router=RouterFile("three"), taught=taught)  # type: ignore
    assert _contents(grafted) == before


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        ("evil", "/abs/victim", r"manifest.json: packs.evil.file: String should match pattern '\^packs/.*'. Run `graf"),
        ("evil", "packs/../../victim.safetensors", r"packs.evil.file: String should match pattern"),
        ("../../up", "packs/up.safetensors", r"packs.*up.*: expected a plain name other than base, auto, by-task and"),
        ("base", "packs/b.safetensors", r"packs.base.*: expected a plain name other than base, auto"),
        ("auto", "packs/a.safetensors", r"packs.auto.*: expected a plain name other than base, auto"),
    ],
)
def test_a_manifest_names_no_files_of_others(grafted: Path, name: str, file: str, message: str) -> None:
    text = json.loads((grafted / "manifest.json").read_text())
    text["packs"][name] = {"file": file, "sha256": "0"}
    (grafted / "manifest.json").write_text(json.dumps(text))
    before = _contents(grafted)
    with pytest.raises(FusionError, match=message):
        remove_pack(grafted, name)
    assert _contents(grafted) == before


@pytest.mark.parametrize("file", ["/abs/victim", "../victim", "packs/one.safetensors", "manifest.json"])
def test_a_manifest_names_no_router_of_others(grafted: Path, file: str) -> None:
    text = json.loads((grafted / "manifest.json").read_text()) | {"router": {"file": file, "packs": {}}}
    (grafted / "manifest.json").write_text(json.dumps(text))
    with pytest.raises(FusionError, match=r"manifest.json: router.file: String should match pattern '\^router-"):
        read_manifest(grafted)


def test_a_manifest_longer_than_a_mebibyte_is_refused_unread(grafted: Path) -> None:
    (grafted / "manifest.json").unlink()
    (grafted / "manifest.json").symlink_to("/dev/zero")
    with pytest.raises(FusionError, match="manifest.json: expected at most 1,048,576 bytes, found more. Run"):
        read_manifest(grafted)


def test_a_manifest_that_would_be_longer_than_a_mebibyte_is_not_written(
    home: Path, grafted: Path, tmp_path: Path
) -> None:
    before, rules = _contents(grafted), [Rule(pack="one", tag="x" * (1 << 20))]
    told = r"manifest.json: expected at most 1,048,576 bytes, found 1,04[\d,]+ \(packs: {}, rules: 1\). Take fewer, or"
    with pytest.raises(FusionError, match=told.format(2)):
        set_rules(grafted, rules)
    packs = {"one": home / "one.safetensors"}
    for out in (tmp_path / "new", grafted):
        with pytest.raises(FusionError, match=f"{out}/{told.format(1)}"):
            write_grafted(out, str(home / "base"), packs, rules=rules)
    assert _contents(grafted) == before and not (tmp_path / "new").exists()


def test_of_many_wrong_rules_the_first_is_told(grafted: Path) -> None:
    text = json.loads((grafted / "manifest.json").read_text()) | {"rules": [0] * 9}
    (grafted / "manifest.json").write_text(json.dumps(text))
    with pytest.raises(FusionError, match=r"manifest.json: rules.0: Input should be an object") as caught:
        read_manifest(grafted)
    assert isinstance(cause := caught.value.__cause__, ValidationError)
    assert cause.error_count() == 1


def test_a_directory_that_is_being_changed_is_not_replaced(home: Path, grafted: Path) -> None:
    with only_writer(grafted), pytest.raises(StorageError, match="another process is writing here now"):
        write_grafted(grafted, str(home / "base"), {"one": home / "one.safetensors"})
    assert list(read_manifest(grafted).packs) == ["one", "two"]


def test_a_link_to_a_directory_stays_one(home: Path, grafted: Path, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "link").symlink_to(grafted)
    write_grafted(tmp_path / "deep" / "link", str(home / "base"), {"three": home / "three.safetensors"})
    assert (tmp_path / "deep" / "link").is_symlink()
    assert list(read_manifest(grafted).packs) == ["three"]
    assert open_base(grafted, read_manifest(grafted)).path.samefile(home / "base")


def test_files_of_others_are_not_lost_with_a_directory_that_is_replaced(home: Path, grafted: Path) -> None:
    (grafted / "packs" / "notes.md").write_text("mine")
    with pytest.raises(StorageError, match="found packs/notes.md as well, which would be lost; choose another place"):
        write_grafted(grafted, str(home / "base"), {"one": home / "one.safetensors"})
    assert (grafted / "packs" / "notes.md").read_text() == "mine"


def test_a_base_that_is_not_where_it_was_is_asked_for(grafted: Path, tmp_path: Path) -> None:
    (tmp_path / "far" / "away").mkdir(parents=True)
    moved = grafted.rename(tmp_path / "far" / "away" / "g")
    with pytest.raises(FusionError, match=r"its base, \.\./.* as seen from there, is not at .* or correct `base` in"):
        open_base(moved, read_manifest(moved))
