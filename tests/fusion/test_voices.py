import json
import shutil
from pathlib import Path

import pytest
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer

from graftllm.checkpoint import Checkpoint
from graftllm.companions import TOKENIZER
from graftllm.delta import Delta
from graftllm.errors import PackError
from graftllm.fusion.applying import apply_packs
from graftllm.fusion.directory import write_grafted
from graftllm.fusion.grafted import GraftedModel
from graftllm.fusion.routes import Route
from graftllm.fusion.voices import Voices
from graftllm.generation import generate
from graftllm.loading import load_model, load_tokenizer
from graftllm.packer import compress
from graftllm.packing_options import PackOptions
from graftllm.recipe import SamplingOptions
from graftllm.rendering import ends_of
from graftllm.skillpack import SkillPack
from tests.models import perturb, save_llama, with_vocabulary

SHORT = SamplingOptions(samples=1, temperature=0, top_p=1, max_new_tokens=8)
TEMPLATE = "{% for one in messages %}[{{ one.role }}] {{ one.content }} {% endfor %}>"
QUESTIONS = ["reverse abc", "sort 31", "what?", "b"]


def _tuned(base_dir: Path, home: Path, seed: int, **files: str) -> Checkpoint:
    out = perturb(base_dir, home / f"tuned{seed}", seed=seed)
    for name, content in files.items():
        (out / name.replace("__", ".")).write_text(content)
    return Checkpoint.open(out)


@pytest.fixture(scope="module")
def tuned(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """Three fine-tunes: `plain` is spoken to as the base, `own` and `twin` by a chat template of their own."""
    home = tmp_path_factory.mktemp("voices")
    return {
        "plain": _tuned(base_dir, home, 5),
        "own": _tuned(base_dir, home, 6, chat_template__jinja=TEMPLATE),
        "twin": _tuned(base_dir, home, 7, chat_template__jinja=TEMPLATE),
    }


@pytest.fixture(scope="module", params=["merged", "beside"])
def grafted(
    base_dir: Path,
    tuned: dict[str, Checkpoint],
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> GraftedModel:
    home, base = tmp_path_factory.mktemp("grafted"), Checkpoint.open(base_dir)
    options = PackOptions(strategy="exact") if request.param == "merged" else PackOptions(budget="40%", servable=8)
    for name, one in tuned.items():
        compress(Delta(base, one), options).save(home / f"{name}.safetensors")
    write_grafted(home / "g", str(base_dir), {name: home / f"{name}.safetensors" for name in tuned})
    return GraftedModel.load(home / "g", device="cpu")


def test_each_pack_is_asked_as_its_own_tuned_model_is(grafted: GraftedModel, tuned: dict[str, Checkpoint]) -> None:
    for name, checkpoint in tuned.items():
        with grafted.using(name) as model:
            words = load_tokenizer(checkpoint.path)
            expected = [one[0] for one in generate(model, words, _messages(), SHORT)]
        assert grafted.generate(QUESTIONS, name, SHORT) == expected
        assert "".join(grafted.stream(QUESTIONS[0], name, SHORT)) == expected[0]
    with grafted.using("own") as model:
        other = [one[0] for one in generate(model, grafted.tokenizer, _messages(), SHORT)]
    assert grafted.generate(QUESTIONS, "own", SHORT) != other


def test_packs_of_several_voices_answer_side_by_side(grafted: GraftedModel) -> None:
    names = ["own", "base", "plain", "twin"]
    alone = [grafted.generate([question], name, SHORT)[0] for question, name in zip(QUESTIONS, names, strict=True)]
    assert grafted.generate(QUESTIONS, names, SHORT) == alone


def test_packs_with_equal_files_share_a_voice(grafted: GraftedModel) -> None:
    voices = grafted.voices
    assert voices["own"] is voices["twin"] is voices.of({"plain": 0.3, "own": -0.7})
    assert voices["plain"] is voices["base"] is voices.of({}) is voices.base
    assert voices["own"].tokenizer.chat_template == TEMPLATE
    assert voices["own"].tokenizer.name_or_path.endswith("own.safetensors")


def _messages() -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": question}] for question in QUESTIONS]


def _voice_of(base_dir: Path, tmp_path: Path, **files: str) -> Voices:
    base = Checkpoint.open(base_dir)
    pack = compress(Delta(base, _tuned(base_dir, tmp_path, 8, **files)), PackOptions(strategy="exact"))
    return Voices(load_model(base_dir, device="cpu"), load_tokenizer(base_dir), {"x": pack})


@pytest.mark.parametrize(
    ("told", "ends"), [('{"eos_token_id": 7}', (7,)), ('{"eos_token_id": [7, 9]}', (7, 9)), ("{}", None)]
)
def test_end_tokens_are_those_of_the_packs_generation_config(
    base_dir: Path, tmp_path: Path, told: str, ends: tuple[int, ...] | None
) -> None:
    voices = _voice_of(base_dir, tmp_path, generation_config__json=told)
    assert voices["x"].ends == (ends or (voices.base.tokenizer.eos_token_id,))
    assert voices["x"].tokenizer is voices.base.tokenizer


def test_end_tokens_of_a_config_alone_count_where_the_base_has_no_generation_config(
    base_dir: Path, tmp_path: Path
) -> None:
    home = shutil.copytree(base_dir, tmp_path / "base")
    (home / "generation_config.json").unlink()
    tuned = perturb(home, tmp_path / "tuned", seed=9)
    config = json.loads((tuned / "config.json").read_text()) | {"eos_token_id": 11}
    (tuned / "config.json").write_text(json.dumps(config))
    pack = compress(Delta(Checkpoint.open(home), Checkpoint.open(tuned)), PackOptions(strategy="exact"))
    voices = Voices(load_model(home, device="cpu"), load_tokenizer(home), {"x": pack})
    assert voices["x"].ends == (11,) != voices.base.ends


@pytest.mark.parametrize("told", ["[]", '{"eos_token_id": "2"}', '{"eos_token_id": [true]}', "{", "[" * 100_000])
def test_a_generation_config_that_is_none_is_told(base_dir: Path, tmp_path: Path, told: str) -> None:
    with pytest.raises(PackError, match=r"expected generation_config.json to hold end tokens by number, found others;"):
        _voice_of(base_dir, tmp_path, generation_config__json=told)["x"]


@pytest.mark.parametrize(
    "told", ["{", "[]", '{"model": 5}', '{"added_tokens": 5, "model": {"type": "BPE", "vocab": {}}}']
)
def test_a_tokenizer_that_does_not_load_is_told(base_dir: Path, tmp_path: Path, told: str) -> None:
    with pytest.raises(PackError, match=r"^an unsaved pack: its tokenizer does not load \("):
        _voice_of(base_dir, tmp_path, tokenizer__json=told)["x"]


def test_a_pack_with_a_voice_of_its_own_reads_as_before_when_saved_and_loaded(
    grafted: GraftedModel, tmp_path: Path
) -> None:
    grafted.packs["own"].save(tmp_path / "again.safetensors")
    again = SkillPack.load(tmp_path / "again.safetensors")
    assert again.companions() == grafted.packs["own"].companions()
    assert again.companion("chat_template.jinja") == TEMPLATE.encode()


TEMPLATES = {"one": "{% for one in messages %}1{{ one.content }}{% endfor %}", "two": "{{ messages[0].content }}2"}
ALPHABET = sorted(ByteLevel.alphabet())


def _write_tokenizer(home: Path, layout: str, *, reverse: bool, template: str | None) -> None:
    """Put a tokenizer beside a model as it was saved by transformers 5, by 4, or by one without `tokenizer.json`."""
    for name in TOKENIZER:
        (home / name).unlink(missing_ok=True)
    words = ["<|endoftext|>", *(ALPHABET[::-1] if reverse else ALPHABET)]
    (home / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (home / "merges.txt").write_text("#version: 0.2\n")
    ends = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    config = {"tokenizer_class": "GPT2Tokenizer", **ends}
    embedded = config if template is None else config | {"chat_template": TEMPLATES[template]}
    (home / "tokenizer_config.json").write_text(json.dumps(embedded))
    if layout != "slow":
        saved = AutoTokenizer.from_pretrained(home)
        saved.save_pretrained(home)
    if layout == "5":
        (home / "vocab.json").unlink()
        (home / "merges.txt").unlink()
    else:
        (home / "chat_template.jinja").unlink(missing_ok=True)
        (home / "tokenizer_config.json").write_text(json.dumps(embedded))
        (home / "special_tokens_map.json").write_text(json.dumps(ends))


@pytest.mark.parametrize("before", ["5", "4", "slow"])
@pytest.mark.parametrize("after", ["5", "4", "slow"])
def test_a_voice_is_the_tuned_models_tokenizer_however_both_were_saved(tmp_path: Path, before: str, after: str) -> None:
    base = save_llama(tmp_path / "base")  # whose vocabulary is smaller, and is not asked
    tuned = perturb(base, tmp_path / "tuned", seed=1)
    _write_tokenizer(base, before, reverse=False, template="one")
    model = load_model(base, device="cpu")
    for reverse, template in ((False, "one"), (False, "two"), (False, None), (True, "one")):
        _write_tokenizer(tuned, after, reverse=reverse, template=template)
        pack = compress(Delta(Checkpoint.open(base), Checkpoint.open(tuned)), PackOptions(strategy="exact"))
        apply_packs(Checkpoint.open(base), [pack], tmp_path / "out")
        wanted, applied = load_tokenizer(tuned), load_tokenizer(tmp_path / "out")
        found = Voices(model, load_tokenizer(base), {"x": pack})["x"].tokenizer
        for one in (applied, found):
            assert (one.chat_template, one.eos_token) == (wanted.chat_template, wanted.eos_token)
            assert one("abc d!")["input_ids"] == wanted("abc d!")["input_ids"]


def test_a_tokenizer_that_was_saved_again_is_the_bases(base_dir: Path, tmp_path: Path) -> None:
    tuned = perturb(base_dir, tmp_path / "tuned", seed=2)
    words = AutoTokenizer.from_pretrained(base_dir)
    words(["a", "abc"], padding=True, truncation=True, max_length=2)  # as a trainer may have used it last
    words.save_pretrained(tuned)
    (tuned / "generation_config.json").write_text(
        json.dumps(json.loads((base_dir / "generation_config.json").read_text()) | {"temperature": 0.6})
    )
    pack = compress(Delta(Checkpoint.open(base_dir), Checkpoint.open(tuned)), PackOptions(strategy="exact"))
    assert list(pack.companions()) == ["generation_config.json"]
    voices = Voices(load_model(base_dir, device="cpu"), load_tokenizer(base_dir), {"x": pack})
    assert voices["x"] is voices.base


def test_a_config_names_the_end_where_the_tuned_model_has_no_generation_config(base_dir: Path, tmp_path: Path) -> None:
    tuned = perturb(base_dir, tmp_path / "tuned", seed=9)
    config = json.loads((tuned / "config.json").read_text()) | {"eos_token_id": 11}
    (tuned / "config.json").write_text(json.dumps(config))
    (tuned / "generation_config.json").unlink()
    base = Checkpoint.open(base_dir)
    pack = compress(Delta(base, Checkpoint.open(tuned)), PackOptions(strategy="exact"))
    assert pack.companions() == {"generation_config.json": None}
    voices = Voices(load_model(base_dir, device="cpu"), load_tokenizer(base_dir), {"x": pack})
    apply_packs(base, [pack], tmp_path / "out")
    assert voices["x"].ends == (11,) == ends_of(load_model(tmp_path / "out", device="cpu"), voices.base.tokenizer)


def test_a_pad_token_that_the_model_has_no_row_for_fills_no_rows(base_dir: Path, tmp_path: Path) -> None:
    tuned = perturb(base_dir, tmp_path / "tuned", seed=3)
    words = load_tokenizer(base_dir)
    words.add_special_tokens({"pad_token": "<more>"})
    words.save_pretrained(tuned)
    base = Checkpoint.open(base_dir)
    pack = compress(Delta(base, Checkpoint.open(tuned)), PackOptions(strategy="exact"))
    grafted = GraftedModel(load_model(base_dir, device="cpu"), load_tokenizer(base_dir), {"x": pack})
    assert grafted.voices["x"].tokenizer.pad_token_id == grafted.voices["x"].rows
    alone = [grafted.generate([one], "x", SHORT)[0] for one in QUESTIONS]
    assert grafted.generate(QUESTIONS, "x", SHORT) == alone


def test_a_tokenizer_whose_library_panics_is_told(
    base_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = json.loads((base_dir / "tokenizer.json").read_text())
    words["pre_tokenizer"] = {"type": "FixedLength", "length": 0}
    with pytest.raises(PackError, match=r"its tokenizer does not load \(chunk size must be non-zero\)\.$"):
        _voice_of(base_dir, tmp_path, tokenizer__json=json.dumps(words))["x"]
    assert "panicked" in capfd.readouterr().err


def test_packs_that_have_no_sum_are_not_routed_to_together(base_dir: Path, tmp_path: Path) -> None:
    base = Checkpoint.open(base_dir)
    tuned = {
        "wide": with_vocabulary(base_dir, tmp_path / "wide", 80),
        "plain": perturb(base_dir, tmp_path / "p", seed=5),
    }
    packs = {
        name: compress(Delta(base, Checkpoint.open(one)), PackOptions(strategy="exact")) for name, one in tuned.items()
    }
    grafted = GraftedModel(load_model(base_dir, device="cpu"), load_tokenizer(base_dir), packs)
    soft = Route("wide", {"wide": 0.6, "plain": 0.4}, "router", {"wide": 0.6, "plain": 0.4})
    assert grafted._alone(soft).weights == {"wide": 1.0}
    assert grafted._alone(Route("plain", {}, "router", {"plain": 1.0})).weights == {"plain": 1.0}
