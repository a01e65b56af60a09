import json
import lzma
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from graftllm import companions
from graftllm.checkpoint import Checkpoint
from graftllm.companions import Companion, agreed_companions, changed_companions, compressed, decompressed
from graftllm.delta import Delta
from graftllm.errors import CheckpointError, PackError
from graftllm.evaluation.fidelity import verify_pack
from graftllm.fusion.applying import apply_packs
from graftllm.fusion.inputs import Tuned
from graftllm.fusion.merging import merge
from graftllm.fusion.methods.table import METHODS
from graftllm.fusion.search import EVALUATIONS
from graftllm.header import Header
from graftllm.packer import compress
from graftllm.packfile import file_bytes
from graftllm.packing_options import PackOptions
from graftllm.skillpack import SkillPack
from tests.models import perturb, rows, with_vocabulary


@pytest.fixture
def pair(base_dir: Path, tmp_path: Path) -> Delta:
    """A base, and a tuned model with another chat template and end token."""
    tuned = perturb(base_dir, tmp_path / "tuned", seed=3)
    (tuned / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (tuned / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    return Delta(Checkpoint.open(shutil.copytree(base_dir, tmp_path / "base")), Checkpoint.open(tuned))


def test_a_pack_holds_what_is_not_the_bases_and_apply_writes_it(pair: Delta, tmp_path: Path) -> None:
    compress(pair, PackOptions(strategy="exact")).save(tmp_path / "p.safetensors")
    pack = SkillPack.load(tmp_path / "p.safetensors")
    held = {name for name, content in pack.companions().items() if content is not None}
    assert held == {"chat_template.jinja", "generation_config.json"}
    apply_packs(pair.base, [pack], tmp_path / "out")
    for file in pair.tuned.companions:
        assert file.name == "config.json" or (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_what_differs_between_packs_stays_the_bases(pair: Delta, tmp_path: Path) -> None:
    other = perturb(pair.base.path, tmp_path / "other", seed=4)
    shutil.copy(pair.tuned.path / "chat_template.jinja", other)
    packs = [compress(one, PackOptions(strategy="exact")) for one in (pair, Delta(pair.base, Checkpoint.open(other)))]
    apply_packs(pair.base, [(pack, 0.5) for pack in packs], tmp_path / "sum")
    models = [Tuned(str(i), pack) for i, pack in enumerate(packs)]
    assert not merge(pair.base, models, METHODS["linear"], tmp_path / "merged").agree
    for out in ("sum", "merged"):
        for file in pair.base.companions:
            assert (tmp_path / out / file.name).read_bytes() == file.read_bytes()


def test_a_pack_of_weight_0_is_as_if_it_were_not_given(pair: Delta, tmp_path: Path) -> None:
    other = Delta(pair.base, Checkpoint.open(with_vocabulary(pair.base.path, tmp_path / "other", 80)))
    pack, ignored = (compress(one, PackOptions(strategy="exact")) for one in (pair, other))
    assert apply_packs(pair.base, [(pack, 1.0), (ignored, 0.0)], tmp_path / "out")
    made = Checkpoint.open(tmp_path / "out")
    assert made.fingerprint == pair.tuned.fingerprint
    assert (made.path / "chat_template.jinja").exists()


def test_a_merge_of_models_that_agree_has_their_files(pair: Delta, tmp_path: Path) -> None:
    pack = compress(pair, PackOptions(strategy="exact"))
    assert merge(pair.base, [Tuned("a", pack), Tuned("b", pair)], METHODS["linear"], tmp_path / "merged").agree
    found = (tmp_path / "merged" / "chat_template.jinja").read_text()
    assert found == "{{ messages[0].content }}"


def test_where_a_merge_gives_one_model_a_task_each_has_its_own_files(pair: Delta, tmp_path: Path) -> None:
    settings = json.loads((pair.tuned.path / "config.json").read_text()) | {"eos_token_id": 5}
    (pair.tuned.path / "config.json").write_text(json.dumps(settings))
    own = Delta(pair.base, Checkpoint.open(pair.tuned.path))
    other = Delta(pair.base, Checkpoint.open(perturb(pair.base.path, tmp_path / "other", seed=4)))
    made = merge(pair.base, [Tuned("own", own), Tuned("other", other)], METHODS["emr"], tmp_path / "merged")
    assert made.agree
    for name, delta in (("own", own), ("other", other)):
        assert Checkpoint.open(made.outputs[name]).config["eos_token_id"] == delta.tuned.config["eos_token_id"]
        for file in delta.tuned.companions:
            assert file.name == "config.json" or (made.outputs[name] / file.name).read_bytes() == file.read_bytes()


def test_a_search_reads_the_files_once_and_asks_by_them(
    pair: Delta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    asked: list[str | None] = []
    whole = SkillPack.companion

    def companion(pack: SkillPack, name: Companion) -> bytes | None:
        read.append(name)
        return whole(pack, name)

    def loss(_: object, words: PreTrainedTokenizerBase, __: object) -> float:
        asked.append(words.chat_template)
        return 0.0

    monkeypatch.setattr(SkillPack, "companion", companion)
    monkeypatch.setattr("graftllm.fusion.merging.answer_loss", loss)
    models = [Tuned("one", compress(pair, PackOptions(strategy="exact")))]
    merge(pair.base, models, METHODS["lorahub"], tmp_path / "out", rows={"one": rows(2)})
    assert len(read) == len(set(read))
    assert len(asked) == EVALUATIONS and set(asked) == {"{{ messages[0].content }}"}


def test_a_file_of_the_bases_tokenizer_that_the_tuned_one_does_without_goes(pair: Delta, tmp_path: Path) -> None:
    (pair.base.path / "special_tokens_map.json").write_text("{}")
    pack = compress(pair, PackOptions(strategy="exact"))
    assert pack.companions()["special_tokens_map.json"] is None
    apply_packs(pair.base, [pack], tmp_path / "out")
    assert not (tmp_path / "out" / "special_tokens_map.json").exists()


def test_a_checkpoint_without_a_tokenizer_says_nothing_of_it(pair: Delta) -> None:
    for file in pair.tuned.companions:
        if file.name != "config.json":
            file.unlink()
    assert pair.companions() == {}


def test_which_library_saved_a_config_is_no_difference(tmp_path: Path) -> None:
    for name, version in (("base", "4.51"), ("tuned", "5.23")):
        (tmp_path / name).mkdir()
        said = '{"eos_token_id": 2, "transformers_version": "%s"}'
        (tmp_path / name / "generation_config.json").write_text(said % version)
    assert changed_companions(tmp_path / "base", tmp_path / "tuned") == {}
    (tmp_path / "base" / "generation_config.json").write_text("[]")
    assert list(changed_companions(tmp_path / "base", tmp_path / "tuned")) == ["generation_config.json"]


def test_a_file_that_is_no_companion_by_its_size_or_kind_is_refused(
    pair: Delta, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(companions, "LARGEST", 10)
    with pytest.raises(CheckpointError, match=r"chat_template.jinja: expected at most 10 bytes, found more; is it"):
        pair.companions()
    (pair.tuned.path / "chat_template.jinja").unlink()
    (pair.tuned.path / "chat_template.jinja").mkdir()
    with pytest.raises(CheckpointError, match=r"chat_template.jinja: cannot be read \(Is a directory\).$"):
        pair.companions()


def test_a_budget_counts_them(pair: Delta) -> None:
    budget = 12_000
    pack = compress(pair, PackOptions(budget=str(budget)))
    assert pack.header.companion_bytes > 0
    assert 0.9 * budget < file_bytes(pack.header) <= budget


@given(st.binary(max_size=2000))
def test_what_is_stored_comes_back(content: bytes) -> None:
    assert decompressed(compressed(content), len(content)) == content


@given(st.binary(min_size=1, max_size=500), st.integers(-3, 3), st.binary(max_size=3))
def test_another_size_or_more_bytes_are_refused(content: bytes, off: int, behind: bytes) -> None:
    stored = compressed(content) + behind
    if off == 0 and not behind:
        return
    with pytest.raises(ValueError, match="expected an .xz stream of"):
        decompressed(stored, max(0, len(content) + off))


@pytest.mark.parametrize(
    "stored",
    [b"", b"no stream", compressed(bytes(1 << 24)), compressed(b"abc")[:-5], lzma.compress(b"abc", preset=9)],
    ids=["empty", "none", "bomb", "cut", "greedy"],
)
def test_streams_of_strangers_are_refused(stored: bytes) -> None:
    with pytest.raises(ValueError, match=r"expected an .xz stream of 3 bytes|Memory usage limit|format not supported"):
        decompressed(stored, 3)


def test_a_damaged_one_is_told(pair: Delta, tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    compress(pair, PackOptions(strategy="exact")).save(path)
    content, stored = bytearray(path.read_bytes()), SkillPack.load(path).header.companion_bytes
    told = r"p.safetensors: (chat_template.jinja|generation_config.json) (cannot be read|does not match)"
    for place in range(len(content) - stored, len(content), 7):
        content[place] ^= 16
        path.write_bytes(content)
        with pytest.raises(PackError, match=told):
            SkillPack.load(path).check_payloads()
        content[place] ^= 16


def test_only_files_that_all_have_alike_are_agreed_on() -> None:
    assert agreed_companions([]) == {}
    assert agreed_companions([{"vocab.txt": b"a"}, {"vocab.txt": b"a"}]) == {"vocab.txt": b"a"}
    assert agreed_companions([{"vocab.txt": b"a"}, {}]) is None


def test_verify_notices_a_damaged_one(pair: Delta, tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    compress(pair, PackOptions(strategy="exact")).save(path)
    verify_pack(pair.base.path, path, None, None)
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    with pytest.raises(PackError, match="is damaged"):
        verify_pack(pair.base.path, path, None, None)


def test_many_of_them_are_not_decompressed_at_once(pair: Delta, tmp_path: Path) -> None:
    pack = compress(pair, PackOptions(strategy="exact"))
    told = {name: one and one.model_copy(update={"size": 40 << 20}) for name, one in pack.header.companions.items()}
    with pytest.raises(ValueError, match="expected companions of at most 67,108,864 bytes together, found more"):
        Header.model_validate(pack.header.model_copy(update={"companions": told}).model_dump())
