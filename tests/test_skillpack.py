import base64
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from graftllm import packfile
from graftllm.checkpoint import Checkpoint
from graftllm.compression.encoded import payload_digest
from graftllm.delta import Delta
from graftllm.errors import PackError, StorageError
from graftllm.header import Card, Provenance
from graftllm.packer import compress, compress_to
from graftllm.packfile import check_place
from graftllm.packing_options import PackOptions
from graftllm.records import Prompt
from graftllm.skillpack import SkillPack
from graftllm.tensors import raw_bytes
from tests.models import perturb, save_llama, with_head


@pytest.fixture(scope="module")
def pack_file(delta: Delta, prompts: list[Prompt], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packs") / "pack.safetensors"
    card = Card(name="reverse", description="Write a word backward", scores={"tuned": 0.5})
    compress(delta, PackOptions(strategy="paper"), calibration=prompts, card=card).save(path)
    return path


def _decode_all(path: Path, base: Checkpoint) -> dict[str, torch.Tensor]:
    pack = SkillPack.load(path)
    pack.check_base(base)
    values = {}
    for name in pack:
        pack.check_tensor(name, base.tensor(name))
        values[name] = pack.restore(name, base.tensor(name))
    return values


def test_a_loaded_pack_decodes_as_the_one_that_was_saved(delta: Delta, prompts: list[Prompt], tmp_path: Path) -> None:
    made = compress(delta, PackOptions(strategy="paper"), calibration=prompts)
    made.save(tmp_path / "p.safetensors")
    loaded = SkillPack.load(tmp_path / "p.safetensors")
    assert loaded.header == made.header
    for name in delta:
        base = delta.base.tensor(name)
        assert torch.equal(loaded.delta(name, base), made.delta(name, base))


def test_the_same_input_gives_the_same_bytes(
    delta: Delta, prompts: list[Prompt], pack_file: Path, tmp_path: Path
) -> None:
    card = Card(name="reverse", description="Write a word backward", scores={"tuned": 0.5})
    compress(delta, PackOptions(strategy="paper"), calibration=prompts, card=card).save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == pack_file.read_bytes()
    SkillPack.load(pack_file).save(tmp_path / "copied.safetensors")
    assert (tmp_path / "copied.safetensors").read_bytes() == pack_file.read_bytes()


def test_an_exact_pack_gives_the_tuned_model_back_bit_for_bit(delta: Delta, tmp_path: Path) -> None:
    compress(delta, PackOptions(strategy="exact")).save(tmp_path / "exact.safetensors")
    for name, value in _decode_all(tmp_path / "exact.safetensors", delta.base).items():
        assert torch.equal(value.view(torch.int16), delta.tuned.tensor(name).view(torch.int16))
    assert (tmp_path / "exact.safetensors").stat().st_size < delta.tuned.nbytes


def test_every_parameter_is_accounted_for(delta: Delta, pack_file: Path) -> None:
    pack = SkillPack.load(pack_file)
    assert list(pack) == delta.base.names()
    size = pack_file.stat().st_size
    assert pack.payload_bytes < size < pack.payload_bytes + 12_000
    assert sum(pack.bytes_by_role().values()) == pack.payload_bytes


@pytest.fixture(scope="module")
def saved_twice(base_dir: Path, tuned_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Delta:
    """The delta of two checkpoints that hold the head, too, which is the embedding."""
    home = tmp_path_factory.mktemp("twice")
    return Delta(*(Checkpoint.open(with_head(path, home / path.name)) for path in (base_dir, tuned_dir)))


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize(
    "options",
    [
        PackOptions(strategy="exact"),
        PackOptions(strategy="paper"),
        PackOptions(budget="12KB"),
        PackOptions(strategy="exact", budget="12KB"),
    ],
    ids=["exact", "paper", "auto", "layers"],
)
def test_a_head_that_is_saved_besides_its_embedding_is_stored_once(
    delta: Delta, saved_twice: Delta, prompts: list[Prompt], tmp_path: Path, options: PackOptions
) -> None:
    compress(saved_twice, options, calibration=prompts).save(tmp_path / "p.safetensors")
    pack = SkillPack.load(tmp_path / "p.safetensors")
    head, embedding = (pack.header.tensors[name] for name in (HEAD, EMBEDDING))
    assert head == embedding.model_copy(update={"role": "head", "same_as": EMBEDDING})
    assert embedding.stored_bytes
    if options.budget is None:
        assert pack.payload_bytes == compress(delta, options, calibration=prompts).payload_bytes
    elif options.strategy == "auto":
        assert 11_700 < (tmp_path / "p.safetensors").stat().st_size <= 12_000
    values = _decode_all(tmp_path / "p.safetensors", saved_twice.base)
    assert torch.equal(values[HEAD], values[EMBEDDING])
    assert torch.equal(values[HEAD], saved_twice.tuned.tensor(HEAD)) == (options.strategy == "exact")
    pack.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "p.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("name", "change"),
    [(HEAD, {"same_as": "model.norm.weight"}), (HEAD, {"same_as": "none"}), (EMBEDDING, {"same_as": HEAD})]
    + [(HEAD, {key: value}) for key, value in [("error", 0.5), ("nbytes", 1), ("base_digest", "0" * 16)]],
)
def test_what_is_said_to_repeat_another_tensor_and_does_not_is_refused(
    saved_twice: Delta, tmp_path: Path, name: str, change: dict
) -> None:
    compress(saved_twice, PackOptions(strategy="exact")).save(tmp_path / "p.safetensors")

    def lie(header: dict) -> None:
        header["tensors"][name] |= change

    with pytest.raises(PackError, match=r"expected '.*' to have an entry like that of '.*', which it repeats"):
        SkillPack.load(_rewritten(tmp_path / "p.safetensors", tmp_path / "x.safetensors", lie))


@pytest.mark.parametrize("budget", ["30%", "14KB"])
def test_a_budget_counts_the_whole_file(delta: Delta, tmp_path: Path, budget: str) -> None:
    compress(delta, PackOptions(strategy="paper", budget=budget)).save(tmp_path / "p.safetensors")
    allowed = 14_000 if budget == "14KB" else int(0.3 * delta.tuned.nbytes)
    assert 0.9 * allowed < (tmp_path / "p.safetensors").stat().st_size <= allowed


def test_a_budget_beyond_what_factors_need_harms_no_servable_pack(delta: Delta) -> None:
    norms = []
    for budget in ("40%", "95%"):
        pack = compress(delta, PackOptions(servable=4, budget=budget))
        norms.append(sum(float(pack.delta(name, delta.base.tensor(name)).square().sum()) for name in delta) ** 0.5)
    assert norms[0] > 1
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


def test_a_pack_says_where_it_came_from_but_not_which_machine_made_it(delta: Delta, tmp_path: Path) -> None:
    card = Card(name="x", provenance=Provenance(sources=("qwen",), sft_rows=7))
    compress(delta, PackOptions(strategy="paper"), card=card).save(tmp_path / "p.safetensors")
    header = SkillPack.load(tmp_path / "p.safetensors").header
    assert header.card.provenance.sources == ("qwen",)
    assert (header.base.name, header.base.architecture) == ("base", "LlamaForCausalLM")
    assert header.base.fingerprint == delta.base.fingerprint
    assert os.fsencode(delta.base.path.parent) not in (tmp_path / "p.safetensors").read_bytes()


def test_a_pack_refuses_a_base_with_one_changed_bit(base: Checkpoint, pack_file: Path, tmp_path: Path) -> None:
    shutil.copytree(base.path, tmp_path / "other")
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    tensors["model.norm.weight"].view(torch.int16)[0] ^= 1
    save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        PackError, match=r"tensor 'model.norm.weight' of this base has digest \w+, but the pack was made"
    ):
        _decode_all(pack_file, Checkpoint.open(tmp_path / "other"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 1}, r"but .*other lacks the tensor 'model.layers.1"),
        ({"num_hidden_layers": 3}, r"but .*other also has the tensor 'model.layers.2"),
        ({"intermediate_size": 32}, r"has shape \[32, 64\] and dtype BF16, but the base model has \[32, 32\] and BF16"),
    ],
)
def test_a_pack_refuses_another_model(pack_file: Path, tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(PackError, match=message):
        SkillPack.load(pack_file).check_base(Checkpoint.open(save_llama(tmp_path / "other", **change)))


def test_nothing_is_left_when_there_is_no_room(
    pack_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="no space left to write it"):
        SkillPack.load(pack_file).save(tmp_path / "p.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["p.bin", "p", "p.safetensors.old"])
def test_a_pack_has_the_name_of_a_safetensors_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(StorageError, match=f"{name}: expected a name that ends in .safetensors, as a SkillPack's does"):
        check_place(tmp_path / name)


# Files from strangers.


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PackError, match=r"none.safetensors: cannot be read \(No such file or directory\)"):
        SkillPack.load(tmp_path / "none.safetensors")


def test_a_layer_of_no_known_name_is_refused(pack_file: Path) -> None:
    with pytest.raises(PackError, match="layer: expected one of lossy, exact; found 'losy'"):
        SkillPack.load(pack_file, layer=cast(Any, "losy"))


def test_another_safetensors_file_is_no_pack(base: Checkpoint) -> None:
    with pytest.raises(PackError, match="a safetensors file, but not a SkillPack"):
        SkillPack.load(base.path / "model.safetensors")


@pytest.mark.parametrize("content", [b"", b"x", b"just some text that is no pack at all", b"\xff" * 100])
def test_another_file_is_no_pack(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(PackError, match="The file is truncated or not a SkillPack"):
        SkillPack.load(tmp_path / "x")


@pytest.mark.parametrize("size", [1 << 26, (1 << 26) + 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1])
def test_an_oversized_header_is_refused_before_it_is_read(pack_file: Path, tmp_path: Path, size: int) -> None:
    (tmp_path / "x").write_bytes(size.to_bytes(8, "little") + pack_file.read_bytes()[8:])
    with pytest.raises(PackError, match=rf"found a length of {size:,}. The file is truncated or not a SkillPack"):
        SkillPack.load(tmp_path / "x")


def _header_text(outer: dict) -> str:
    return zlib.decompress(base64.b85decode(outer["__metadata__"]["skillpack"])).decode()


def _told(text: str) -> dict[str, str]:
    """Return the metadata of a header's JSON text."""
    packed = base64.b85encode(zlib.compress(text.encode())).decode()
    return {"skillpack": packed, "skillpack_sha256": hashlib.sha256(text.encode()).hexdigest()}


def test_a_header_that_swells_without_end_is_refused(pack_file: Path, tmp_path: Path) -> None:
    data = pack_file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    outer = json.loads(data[8 : 8 + size]) | {"__metadata__": _told(" " * ((1 << 26) + 1))}
    encoded = json.dumps(outer).encode()
    (tmp_path / "x").write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[8 + size :])
    with pytest.raises(PackError, match="the header does not match its digest"):
        SkillPack.load(tmp_path / "x")


def _rewritten(pack_file: Path, out: Path, change: Callable[[dict], None], *, sign: bool = True) -> Path:
    """Write a pack whose header JSON was changed, with a digest that fits (`sign`) or does not."""
    data = pack_file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    outer = json.loads(data[8 : 8 + size])
    inner = json.loads(_header_text(outer))
    change(inner)
    told = _told(json.dumps(inner))
    outer["__metadata__"] = told if sign else outer["__metadata__"] | {"skillpack": told["skillpack"]}
    encoded = json.dumps(outer).encode()
    out.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[8 + size :])
    return out


def _at(*path: str | int, value: object) -> Callable[[dict], None]:
    def change(header: dict) -> None:
        for key in path[:-1]:
            header = header[key]
        header[path[-1]] = value

    return change


def _exactly(coding: str) -> Callable[[dict], None]:
    """Say that a low-rank payload is an exact one."""

    def change(header: dict) -> None:
        header["tensors"][UP] |= {"how": {"operator": "exact", "coding": coding}, "tuned_digest": "0" * 16}

    return change


def _twice_exact(header: dict) -> None:
    """Put an exact layer over exact values."""
    entry = header["tensors"][NORM]
    entry["refinement"] = {"weight": 0, "how": entry["how"], "nbytes": 8, "payload_digest": "0" * 16}


NORM, UP = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_at("version", value=2), r"format version 2; this graftllm reads 1. Upgrade graftllm or rebuild the pack"),
        (_at("format", value="zip"), "the header is not one of format version 1"),
        (_at("surprise", value=1), "the header is not one of format version 1"),
        (
            _at("tensors", NORM, "shape", value=[1 << 50, 1 << 50]),
            r"claims dtype BF16 and shape \[1125899906842624, 112",
        ),
        (_at("tensors", NORM, "shape", value=[-1]), "which cannot be"),
        (_at("tensors", NORM, "dtype", value="F4"), "claims dtype F4"),
        (
            _at("tensors", NORM, "nbytes", value=1 << 60),
            "the header and the stored payloads disagree on 'payloads'",
        ),
        (_at("tensors", NORM, "nbytes", value=-5), "the header is not one of format version 1"),
        (_at("tensors", "extra", value=None), "the header is not one of format version 1"),
        (_at("tensors", NORM, "how", value={"operator": "pickle"}), "the header is not one of format version 1"),
        (_at("tensors", NORM, "role", value="boss"), "the header is not one of format version 1"),
        (lambda header: header["tensors"].pop(NORM), "disagree on 'payloads'"),
        (
            _at("tensors", UP, "tuned_shape", value=[1 << 40, 32]),
            r"to become BF16 of shape \[1099511627776, 32\] from BF",
        ),
        (_at("tensors", UP, "tuned_shape", value=[64, 33]), r"from BF16 of shape \[64, 32\], which cannot be"),
        (_at("tensors", UP, "tuned_dtype", value="I64"), r"to become I64 of shape \[64, 32\] from BF16"),
        (_at("config", value={"vocab_size": 10**12}), r"change the config's 'vocab_size' to 1000000000000, which its"),
        (_at("config", value={"auto_map": 1}), r"change the config's 'auto_map' to 1, which its tensors do not"),
        (_at("config", value={"eos_token_id": "x"}), "the header is not one of format version 1"),
        (_at("tensors", UP, "how", "bands", value=[[8, 10**12]]), f"the payload of '{UP}' cannot be decoded"),
        (_at("tensors", UP, "how", "bands", value=[[70, 1]]), f"the payload of '{UP}' cannot be decoded"),
        (
            _at("tensors", UP, "how", value={"operator": "sparse", "count": 10**9, "group_size": 128}),
            "cannot be decoded",
        ),
        (_exactly("difference"), "cannot be decoded"),
        (_exactly("raw"), "cannot be decoded"),
        (
            _at("tensors", UP, "tuned_digest", value="0" * 16),
            "expected a digest of the tuned bits where they are coded",
        ),
        (_at("tensors", NORM, "tuned_digest", value=None), "expected a digest of the tuned bits where they are coded"),
        (_at("options", "bit_bands", value=[[8, 1]] * 9999), "hold more lists and values than headers do"),
        (_at("tensors", UP, "how", value={"operator": "unchanged"}), "cannot be decoded"),
        (
            _at("card", "provenance", "sources", value=[1] * 4097),
            "expected whole numbers of 64 bits and lists of at most 4096 members, found others",
        ),
        (_at("card", "overheads", value={"SFT": {"peak_memory_bytes": 10**400}}), "expected whole numbers of 64 bits"),
        (_at("tensors", UP, "error", value="nan"), "Input should be a finite number"),
        (_at("card", "scores", value={"sort": "inf"}), "Input should be a finite number"),
        (_at("options", "budget", value="9" * 400), r"budget: expected less than 2 \*\* 63 bytes, found '9999"),
        (_twice_exact, "expected an exact layer over a lossy operator, found it over exact"),
        (_at("tensors", UP, "payload_digest", value="0" * 16), f"the payload of '{UP}' does not match its digest"),
    ],
)
def test_a_hostile_header_is_refused(
    pack_file: Path, base: Checkpoint, tmp_path: Path, change: Callable[[dict], None], message: str
) -> None:
    with pytest.raises(PackError, match=message):
        _decode_all(_rewritten(pack_file, tmp_path / "x.safetensors", change), base)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_scales_that_are_no_numbers_are_refused(pack_file: Path, base: Checkpoint, scale: float) -> None:
    pack = SkillPack.load(pack_file)
    payload = pack.encoded(UP).payload.copy()
    payload[:2] = raw_bytes(torch.tensor([scale]).bfloat16())  # of the first run of the first singular vector
    entry = pack.header.tensors[UP].model_copy(update={"payload_digest": payload_digest(payload)})
    header = pack.header.model_copy(update={"tensors": pack.header.tensors | {UP: entry}})
    changed = SkillPack(header, "x", lambda *_: payload)
    for decode in (changed.factors, lambda name: changed.restore(name, base.tensor(name))):
        with pytest.raises(PackError, match=f"the payload of '{UP}' cannot be decoded .expected finite values"):
            decode(UP)


def test_a_changed_header_does_not_match_its_digest(pack_file: Path, tmp_path: Path) -> None:
    changed = _rewritten(pack_file, tmp_path / "x", _at("card", "name", value="better"), sign=False)
    with pytest.raises(PackError, match="the header does not match its digest. The file is damaged"):
        SkillPack.load(changed)


def _with_text(pack_file: Path, out: Path, text: str) -> Path:
    """Write a pack with this text as its header's JSON."""
    data = pack_file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    outer = json.loads(data[8 : 8 + size])
    outer["__metadata__"] = _told(text)
    encoded = json.dumps(outer).encode()
    out.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[8 + size :])
    return out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"version": 1, "a": ' + "[" * 1000 + "]" * 1000 + "}", "the header is not one of format version 1"),
        (r'{"\\": [' + "[]," * 99999 + "[]]}", "hold more lists and values than headers do"),
        (r'{"\\": [' + '"",' * 99999 + '""]}', "hold more lists and values than headers do"),
        ('{"version": 1, "a": "' + r"\\" * 99999, "the header is not one of format version 1"),
        ('{"version": true, "tensors": {}}', "format version True; this graftllm reads 1"),
        ('{"version": 1.0, "tensors": {}}', "format version 1.0; this graftllm reads 1"),
        ('{"version": 1, "tensors": []}', "version 1 .expected an object under 'tensors'"),
        ('{"version": 1}', "version 1 .expected an object under 'tensors'"),
        ('{"version": 1, "tensors": {}, "config": {"a": NaN}}', "the header is not one of format version 1"),
        (r'{"version": 1, "tensors": {}, "a": "\ud800"}', "the header is not one of format version 1"),
    ],
)
def test_a_text_that_is_no_header_is_refused(pack_file: Path, tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(PackError, match=message):
        SkillPack.load(_with_text(pack_file, tmp_path / "x", text))


@pytest.mark.parametrize("crowd", ['"x":"",' * 100_000, '"a":[' + "0," * 100_000 + "0],"])
def test_a_crowd_of_values_before_the_header_is_refused_unread(
    pack_file: Path, tmp_path: Path, crowd: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packfile, "safe_open", lambda *_, **__: pytest.fail("the table was read"))
    data = pack_file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    opening = b'{"__metadata__":{' + crowd.encode() + data[8 + len(b'{"__metadata__":{') : 8 + size]
    (tmp_path / "x").write_bytes(len(opening).to_bytes(8, "little") + opening + data[8 + size :])
    with pytest.raises(PackError, match=r"not a SkillPack \(it lists more than a pack's three tensors\)"):
        SkillPack.load(tmp_path / "x")


def test_a_pack_is_not_written_over_a_model_that_it_is_made_of(base_dir: Path, delta: Delta, tmp_path: Path) -> None:
    home = Path(shutil.copytree(delta.tuned.path, tmp_path / "tuned"))
    before = {file: file.read_bytes() for file in home.iterdir()}
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        with pytest.raises(StorageError, match=f"{file}: expected a place apart from .*{file}, which is read"):
            compress_to(home / file, Delta(Checkpoint.open(base_dir), Checkpoint.open(home)), PackOptions())
    assert {file: file.read_bytes() for file in home.iterdir()} == before


def test_a_pack_in_the_place_of_a_directory_is_refused_at_once(delta: Delta, tmp_path: Path) -> None:
    (tmp_path / "p.safetensors").mkdir()
    with pytest.raises(StorageError, match="expected a file or nothing there, found a directory"):
        compress_to(tmp_path / "p.safetensors", delta, PackOptions())
    assert [file.name for file in tmp_path.iterdir()] == ["p.safetensors"]


@pytest.mark.parametrize("kind", ["text", "weights", "pipe"])
def test_a_pack_takes_the_place_of_a_pack_alone(delta: Delta, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "p.safetensors"
    if kind == "pipe":
        os.mkfifo(out)
    else:
        out.write_bytes(b"mine" if kind == "text" else (delta.base.path / "model.safetensors").read_bytes())
    before = out.stat()
    with pytest.raises(StorageError, match="expected nothing or a SkillPack there, found something else, which would"):
        compress_to(out, delta, PackOptions())
    assert (out.stat().st_mtime_ns, out.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


def test_a_pack_is_shown_in_one_line(pack_file: Path) -> None:
    shown = repr(SkillPack.load(pack_file))
    assert shown.startswith("SkillPack(")
    assert str(pack_file) in shown
    assert len(shown) < 400 + len(str(pack_file))


def test_what_is_written_in_a_string_does_not_crowd_a_header(pack_file: Path, tmp_path: Path) -> None:
    said = 'a "quoted" word,\n' + "[{,:" * 20000 + "\\"
    told = _rewritten(pack_file, tmp_path / "x", _at("card", "description", value=said))
    assert SkillPack.load(told).header.card.description == said


def test_packs_of_many_small_matrices_in_many_bands_can_be_read(tmp_path: Path) -> None:
    home = save_llama(tmp_path / "base")
    tensors = {**load_file(home / "model.safetensors"), **{f"x.{i}.weight": torch.zeros(24, 24) for i in range(400)}}
    save_file(tensors, home / "model.safetensors", metadata={"format": "pt"})
    tuned = perturb(home, tmp_path / "tuned", seed=1)
    options = PackOptions(strategy="paper", bit_bands=tuple((bits, 1 / 8) for bits in range(8, 0, -1)))
    out = tmp_path / "x.safetensors"
    compress_to(out, Delta(Checkpoint.open(home), Checkpoint.open(tuned)), options, device="cpu", workers=1)
    assert list(SkillPack.load(out)) == Checkpoint.open(home).names()


@given(st.floats(0, 1))
def test_a_truncated_pack_is_refused(tmp_path_factory: pytest.TempPathFactory, pack_file: Path, share: float) -> None:
    data = pack_file.read_bytes()
    path = tmp_path_factory.mktemp("cut") / "x"
    path.write_bytes(data[: min(int(share * len(data)), len(data) - 1)])
    with pytest.raises(PackError):
        SkillPack.load(path)


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(0, 1, exclude_max=True), st.integers(0, 7))
def test_a_flipped_bit_is_found(tmp_path: Path, pack_file: Path, base: Checkpoint, share: float, bit: int) -> None:
    data = bytearray(pack_file.read_bytes())
    place = int(share * len(data))
    data[place] ^= 1 << bit
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(PackError):
        _decode_all(tmp_path / "x", base)
