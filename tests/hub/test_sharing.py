import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, constants

from graftllm.adapters import open_tuned
from graftllm.checkpoint import Checkpoint
from graftllm.delta import Delta
from graftllm.errors import CheckpointError, FusionError, GraftError, HubError, PackError, StorageError
from graftllm.fusion import manifest
from graftllm.fusion.directory import remove_pack, set_rules, write_grafted
from graftllm.fusion.grafted import GraftedModel
from graftllm.fusion.manifest import MANIFEST, read_manifest, sha256_of
from graftllm.fusion.rules import Rule
from graftllm.hub.sharing import pull, push
from graftllm.packer import compress
from graftllm.packing_options import PackOptions
from graftllm.skillpack import PACK_FILE, SkillPack
from graftllm.storage import only_writer
from tests.hub.standin import READER, Hub
from tests.models import save_llama

# huggingface_hub 2.4 uploads by a parameter that httpx2 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope="module")
def grafted(base_dir: Path, tuned_dir: Path, pack_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("grafted")
    out, exact = home / "g", home / "exact.safetensors"
    delta = Delta(Checkpoint.open(base_dir), Checkpoint.open(tuned_dir))
    compress(delta, PackOptions(strategy="exact")).save(exact)
    write_grafted(out, str(base_dir), {"reverse": pack_file, "again": exact}, rules=[Rule(pack="again", tag="x")])
    return out


def test_a_pack_comes_back_as_the_same_bytes(hub: Hub, pack_file: Path, base_dir: Path, tmp_path: Path) -> None:
    pushed = push(pack_file, "user/reverse", base="org/base", private=True)
    assert hub.repositories["user/reverse"].private
    assert pushed.files == (PACK_FILE, "README.md")
    pulled = pull("user/reverse", tmp_path / "p.safetensors", base=base_dir)
    assert pulled.path.read_bytes() == pack_file.read_bytes()
    assert pulled.commit == pushed.commit == hub.repositories["user/reverse"].branches["main"]


def test_what_is_pulled_spares_the_base(hub: Hub, pack_file: Path, base_dir: Path) -> None:
    push(pack_file, "user/reverse", base="org/base")
    before = (base_dir / "model.safetensors").read_bytes()
    with pytest.raises(StorageError, match="expected a place apart from"):
        pull("user/reverse", base_dir / "model.safetensors", base=base_dir)
    assert (base_dir / "model.safetensors").read_bytes() == before


def test_a_pack_is_loaded_by_its_name_at_a_revision(hub: Hub, pack_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = push(pack_file, "user/reverse", base="org/base").commit
    hub.put("user/reverse", {PACK_FILE: b"something else"})
    original = SkillPack.load(pack_file)
    assert SkillPack.load(f"user/reverse@{first}").header == original.header
    assert SkillPack.load("user/reverse", revision=first).header == original.header
    with pytest.raises(PackError, match="The file is truncated or not a SkillPack"):
        SkillPack.load("user/reverse")
    with pytest.raises(HubError, match="expected one revision, found main and other; give one"):
        SkillPack.load("user/reverse@main", revision="other")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # what is in the cache needs no network
    assert SkillPack.load(f"user/reverse@{first}").header == original.header


def test_a_pulled_pack_takes_the_place_of_a_pack_alone(hub: Hub, pack_file: Path, tmp_path: Path) -> None:
    push(pack_file, "user/reverse", base="org/base")
    (tmp_path / "rows.jsonl").write_text("{}")
    with pytest.raises(StorageError, match="rows.jsonl: expected nothing or a SkillPack there, found something else"):
        pull("user/reverse", tmp_path / "rows.jsonl")
    assert (tmp_path / "rows.jsonl").read_text() == "{}"
    for _ in range(2):
        pull("user/reverse", tmp_path / "p.safetensors")


def test_the_card_says_what_the_hub_reads(hub: Hub, pack_file: Path) -> None:
    push(pack_file, "user/reverse", base="org/base")
    text = hub.files("user/reverse")["README.md"].decode()
    data = ModelCard(text).data.to_dict()
    assert data["base_model"] == "org/base"
    assert data["base_model_relation"] == "adapter"
    assert data["library_name"] == "graftllm"
    assert data["license"] == "apache-2.0"
    (scored,) = data["model-index"][0]["results"]
    assert scored["dataset"] == {"type": "reverse", "name": "reverse"}
    assert scored["metrics"][0]["value"] == 0.97
    assert yaml.safe_load(text.split("---")[1])["tags"] == ["graftllm", "skillpack", "delta-compression"]
    assert "# Reverse --- it\n\nWrites | words backward\n" in text
    assert f"{pack_file.stat().st_size:,} bytes" in text
    assert 'SkillPack.load("user/reverse")' in text


def test_a_card_of_ones_own_is_left_alone(hub: Hub, pack_file: Path) -> None:
    hub.put("user/reverse", {"README.md": b"My own words."})
    push(pack_file, "user/reverse", base="org/base")
    assert hub.files("user/reverse")["README.md"] == b"My own words."
    push(pack_file, "user/other", base="org/base")
    push(pack_file, "user/other", base="org/another")
    assert b"base_model: org/another" in hub.files("user/other")["README.md"]


def test_what_the_hub_has_is_not_sent_again(hub: Hub, pack_file: Path) -> None:
    push(pack_file, "user/reverse", base="org/base")
    hub.asked.clear()
    push(pack_file, "user/reverse", base="org/base", revision="next")
    assert not [one for one in hub.asked if one.startswith("PUT")]
    assert hub.files("user/reverse", "next")[PACK_FILE] == pack_file.read_bytes()


def test_a_directory_that_changes_while_it_is_read_is_pushed_as_it_then_is(
    hub: Hub, grafted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = shutil.copytree(grafted, tmp_path / "g")
    set_rules(own, [])

    def changed_first(file: Path) -> str:
        if "again" in read_manifest(own).packs:
            remove_pack(own, "again")
        return sha256_of(file)

    monkeypatch.setattr(manifest, "sha256_of", changed_first)
    pushed = push(own, "user/skills", base="org/base")
    assert list(pushed.files) == [MANIFEST, "packs/reverse.safetensors", "README.md"]
    assert list(json.loads(hub.files("user/skills")[MANIFEST])["packs"]) == ["reverse"]


def test_a_grafted_directory_comes_back_whole(hub: Hub, grafted: Path, base_dir: Path, tmp_path: Path) -> None:
    hub.put("user/skills", {"packs/old.safetensors": b"x", "notes.txt": b"kept"})
    push(grafted, "user/skills", base="org/base")
    assert set(hub.files("user/skills")) == {
        MANIFEST, "packs/reverse.safetensors", "packs/again.safetensors", "README.md", "notes.txt",
    }  # fmt: skip
    pulled = pull("user/skills", tmp_path / "g", base=base_dir)
    assert pulled.packs == ("reverse", "again")
    there, here = read_manifest(tmp_path / "g"), read_manifest(grafted)
    assert (there.packs, there.rules, there.fingerprint) == (here.packs, here.rules, here.fingerprint)
    assert len(GraftedModel.load(tmp_path / "g").generate(["abc"], "reverse")) == 1
    assert read_manifest(pull("user/skills", tmp_path / "h").path).base == "org/base"
    remove_pack(tmp_path / "g", "reverse")
    assert pull("user/skills", tmp_path / "g", base=base_dir).packs == ("reverse", "again")
    assert read_manifest(tmp_path / "g") == there


@pytest.mark.parametrize(
    ("kept", "error", "text"),
    [
        (
            {"thesis.tex": "mine"},
            StorageError,
            "mine: expected nothing there, or a directory with manifest.json, f",
        ),
        ({MANIFEST: '{"name": "my web app"}', "src/app.js": "mine"}, FusionError, "mine/manifest.json: "),
        ({MANIFEST: None, "src/app.js": "mine"}, StorageError, "found src/app.js as well, which would be lost"),
    ],
)
def test_files_of_others_are_not_lost_by_pulling(
    hub: Hub,
    grafted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kept: dict[str, str | None],
    error: type[GraftError],
    text: str,
) -> None:
    push(grafted, "stranger/mine", base="org/base")
    monkeypatch.chdir(tmp_path)
    contents = {Path("mine", name): said or (grafted / MANIFEST).read_text() for name, said in kept.items()}
    for path, said in contents.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(said)
    with pytest.raises(error, match=text):
        pull("stranger/mine")
    assert {path: path.read_text() for path in Path("mine").rglob("*") if path.is_file()} == contents


def test_packs_of_another_grafted_model_are_not_lost_by_pulling(
    hub: Hub, grafted: Path, pack_file: Path, base_dir: Path, tmp_path: Path
) -> None:
    push(grafted, "user/skills", base="org/base")
    own = tmp_path / "own"
    write_grafted(own, str(base_dir), {"mine": pack_file, "again": pack_file})
    before = (own / MANIFEST).read_bytes()
    hub.asked.clear()
    with pytest.raises(FusionError, match=r"own: is a grafted model with the pack 'mine' as well, which .* be lost"):
        pull("user/skills", own)
    assert (own / MANIFEST).read_bytes() == before and (own / "packs/mine.safetensors").exists()
    assert not [one for one in hub.asked if one.startswith("GET") and "packs/" in one]
    remove_pack(own, "mine")
    with only_writer(own), pytest.raises(StorageError, match="own: another process is writing here now"):
        pull("user/skills", own)
    pull("user/skills", own)  # what has no other names may be an older state of the same


def test_a_cut_download_goes_on_where_it_was(
    hub: Hub, pack_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(pack_file, "user/reverse", base="org/base")
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    hub.cuts[PACK_FILE] = [1000]
    assert pull("user/reverse", tmp_path / "p.safetensors").path.read_bytes() == pack_file.read_bytes()
    assert f"GET /user/reverse/resolve/main/{PACK_FILE} bytes=1000-" in hub.asked


def test_a_download_that_stays_cut_leaves_nothing_and_can_be_run_again(
    hub: Hub, grafted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(grafted, "user/skills", base="org/base")
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    hub.cuts["again.safetensors"] = [0] * 6
    with pytest.raises(HubError, match="was left in the middle .RemoteProtocolError.* Run the same command again"):
        pull("user/skills", tmp_path / "g")
    assert not list(tmp_path.iterdir())
    hub.asked.clear()
    pull("user/skills", tmp_path / "g")
    assert not [one for one in hub.asked if one.startswith("GET") and "reverse.safetensors" in one]


# What can go wrong, each by its text.


def test_names_revisions_and_files_that_are_not_there_are_told(hub: Hub, pack_file: Path, tmp_path: Path) -> None:
    push(pack_file, "user/reverse", base="org/base")
    hub.put("user/other", {"model.safetensors": b"x"})
    for source, message in (
        ("user/none", "user/none: the Hub has no such repository, or none that you may see. Check the name"),
        ("user/reverse@v9", "user/reverse@v9: the repository has no such revision; expected a branch, tag or commit"),
        ("user/other", "user/other: expected skillpack.safetensors or manifest.json in the repository, found neither"),
        ("reverse", "reverse: not a name of a repository; expected user/repo or user/repo@revision"),
    ):
        with pytest.raises(HubError, match=message) as caught:
            pull(source, tmp_path / "p")
        assert "\n" not in str(caught.value)
    with pytest.raises(
        HubError, match="the repository has no skillpack.safetensors. Expected one that `graftllm push`"
    ):
        SkillPack.load("user/other")
    assert not list(tmp_path.iterdir())


def test_a_push_needs_a_token_that_may_write(hub: Hub, pack_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", READER)
    with pytest.raises(HubError, match="user/reverse: this token may not do that there. .* take a token with write"):
        push(pack_file, "user/reverse", base="org/base")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent")
    with pytest.raises(HubError, match="user/reverse: the Hub wants a token, or does not accept .* `hf auth login`"):
        push(pack_file, "user/reverse", base="org/base")
    assert not hub.repositories


def test_a_private_repository_is_not_seen_without_a_token(
    hub: Hub, pack_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(pack_file, "user/reverse", base="org/base", private=True)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent")
    with pytest.raises(HubError, match="or none that you may see. Check the name; for a private one, log in with"):
        pull("user/reverse", tmp_path / "p")


def test_without_network_the_cache_is_all_there_is(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="not in the cache, and the Hub cannot be reached. .* HF_HUB_OFFLINE is not set"):
        pull("user/reverse", tmp_path / "p")


def test_a_base_that_others_cannot_find_must_be_named(hub: Hub, pack_file: Path, grafted: Path) -> None:
    for source in (pack_file, grafted):
        with pytest.raises(
            HubError, match=r"its base is known as '.*base', which others cannot find. Give .* --base org"
        ):
            push(source, "user/x")
    assert not hub.repositories


def test_a_pack_for_another_base_is_refused(hub: Hub, pack_file: Path, grafted: Path, tmp_path: Path) -> None:
    push(pack_file, "user/reverse", base="org/base")
    push(grafted, "user/skills", base="org/base")
    other = save_llama(tmp_path / "other", seed=9)
    for source, out in (("user/reverse", "p.safetensors"), ("user/skills", "p")):
        with pytest.raises(PackError, match="made for the base base .* but .*other is .* Give that base, or leave"):
            pull(source, tmp_path / out, base=other)
        assert not (tmp_path / out).exists()


def test_a_damaged_pack_is_neither_pushed_nor_pulled(hub: Hub, pack_file: Path, tmp_path: Path) -> None:
    content = bytearray(pack_file.read_bytes())
    content[-1] ^= 1
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(PackError, match="does not match its digest"):
        push(tmp_path / "bad.safetensors", "user/bad", base="org/base")
    assert not hub.repositories
    hub.put("user/bad", {PACK_FILE: bytes(content)})
    with pytest.raises(PackError, match="does not match its digest"):
        pull("user/bad", tmp_path / "p.safetensors")
    assert not (tmp_path / "p.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m["packs"]["reverse"].update(file="../../escaped.safetensors"),
            r"packs.reverse.file: String should match pattern '\^packs/",
        ),
        (
            lambda m: m["packs"]["reverse"].update(file="/etc/passwd"),
            r"packs.reverse.file: String should match pattern '\^packs/",
        ),
        (lambda m: m.update(base="../../../home/victim/model"), "names '../../../home/victim/model'; expected"),
        (lambda m: m.update(fingerprint="0" * 64), "but the manifest says 000000000000"),
        (lambda m: m["packs"]["reverse"].update(sha256="0" * 64), "expected SHA-256 000000000000"),
        (
            lambda m: m.update(router={"file": "packs/reverse.safetensors", "packs": {}}),
            r"router.file: String should match pattern '\^router-",
        ),
        (lambda m: m.update(code="print()"), "manifest.json: code: Extra inputs are not permitted"),
    ],
)
def test_a_strangers_manifest_reaches_nothing_outside(
    hub: Hub, grafted: Path, tmp_path: Path, change: Callable[[dict], object], message: str
) -> None:
    push(grafted, "user/skills", base="org/base")
    files = hub.files("user/skills")
    manifest = json.loads(files[MANIFEST])
    change(manifest)
    hub.put("user/skills", files | {MANIFEST: json.dumps(manifest).encode()})
    with pytest.raises((HubError, PackError, FusionError), match=message) as caught:
        pull("user/skills", tmp_path / "g")
    assert isinstance(caught.value, GraftError)
    assert not list(tmp_path.iterdir())


def test_checkpoints_and_adapters_come_from_the_hub(hub: Hub, base_dir: Path) -> None:
    files = {path.name: path.read_bytes() for path in base_dir.iterdir()}
    commit = hub.put("org/base", files)
    hub.put("org/base", {"config.json": b"{}"})
    assert Checkpoint.open(f"org/base@{commit}").fingerprint == Checkpoint.open(base_dir).fingerprint
    hub.put("org/adapter", {"adapter_config.json": b'{"peft_type": "IA3"}', "adapter_model.safetensors": b"x"})
    with pytest.raises(CheckpointError, match="expected peft_type LORA .* found IA3"):
        open_tuned("org/adapter", Checkpoint.open(Path("org/base@" + commit)))
    assert type(open_tuned(f"org/base@{commit}", Checkpoint.open(base_dir))) is Checkpoint
