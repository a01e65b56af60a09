import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import APIStatusError, BadRequestError

from graftllm.checkpoint import Checkpoint
from graftllm.delta import Delta
from graftllm.fusion import voices
from graftllm.fusion.directory import add_packs, remove_pack, write_grafted
from graftllm.fusion.grafted import GraftedModel
from graftllm.fusion.manifest import sha256_of
from graftllm.fusion.rules import Rule
from graftllm.packer import compress
from graftllm.packing_options import PackOptions
from graftllm.recipe import SamplingOptions
from graftllm.records import Message
from graftllm.rendering import render
from graftllm.serving.app import build_app
from graftllm.serving.server import Local
from graftllm.serving.shelves import Library
from tests.models import perturb, save_llama, with_vocabulary
from tests.serving.running import client_of, served


def test_a_directory_that_changes_while_it_is_read_is_served_as_it_then_is(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, load = own / "grafted", GraftedModel.load

    def changed_first(*given: Any, **named: Any) -> GraftedModel:
        remove_pack(directory, "whole")
        add_packs(directory, {"spare": own / "spare.safetensors"})
        return load(*given, **named)

    monkeypatch.setattr(GraftedModel, "load", changed_first)
    library, files = Library(directory), directory / "packs"
    assert library.digests == {name: sha256_of(files / f"{name}.safetensors") for name in ("one", "two", "spare")}
    assert library.models()["spare"]["bytes"] == (files / "spare.safetensors").stat().st_size
    assert {name for name, pack in library.models().items() if "bytes" in pack} == {"one", "two", "spare"}


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[GraftedModel, str]]:
    """A grafted model whose pack `own` has a chat template and end token of its own and more words, and its server."""
    home = tmp_path_factory.mktemp("spoken")
    base = Checkpoint.open(save_llama(home / "base", dtype=torch.float32))
    tuned = {name: perturb(base.path, home / name, seed=seed, scale=0.4) for seed, name in enumerate(("plain", "own"))}
    tuned["wide"] = with_vocabulary(base.path, home / "wide", 80)
    for name in ("own", "wide"):
        (tuned[name] / "chat_template.jinja").write_text("{% for one in messages %}<{{ one.content }}>{% endfor %}")
    (tuned["own"] / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(3, 40))}))
    for name, one in tuned.items():
        options = PackOptions(strategy="exact") if name == "wide" else PackOptions(servable=4)
        compress(Delta(base, Checkpoint.open(one)), options).save(home / f"{name}.safetensors")
    rules = [Rule(pack="own", pattern="^to own"), Rule(pack="wide", pattern="^to wide")]
    write_grafted(home / "g", str(base.path), {name: home / f"{name}.safetensors" for name in tuned}, rules=rules)
    with served(build_app(Local(home / "g", device="cpu"))) as address:
        yield GraftedModel.load(home / "g", device="cpu"), address


@pytest.mark.parametrize("pack", ["base", "plain", "own", "wide"])
def test_each_pack_is_served_with_its_own_template_and_end_tokens(spoken: tuple[GraftedModel, str], pack: str) -> None:
    grafted, address = spoken
    questions = ["reverse abc", "b", f"to {pack} and more"]
    options = SamplingOptions(samples=1, temperature=0, top_p=1, max_new_tokens=12)
    expected = grafted.generate(questions, pack, options)
    with client_of(address) as client:
        for model in (pack, "auto") if pack in ("own", "wide") else (pack,):
            asked = questions if model == pack else questions[2:]
            answers = [
                client.chat.completions.create(
                    model=model, messages=[{"role": "user", "content": one}], max_tokens=12, temperature=0
                )
                for one in asked
            ]
            for one, text in zip(answers, expected[-len(asked) :], strict=True):
                ended = one.choices[0].finish_reason == "stop"  # by a letter, which the library shows
                assert one.choices[0].message.content == (text[:-1] if ended else text)
                assert not ended or pack == "own"
            words = grafted.voices[pack].tokenizer
            for one, answer in zip(asked, answers, strict=True):
                prompt = render(words, [Message(role="user", content=one)], answer_next=True)
                assert answer.usage is not None
                assert answer.usage.prompt_tokens == len(prompt)


def test_the_list_of_models_names_files_of_a_packs_own(spoken: tuple[GraftedModel, str]) -> None:
    with client_of(spoken[1]) as client:
        about = {one.id: one.model_dump()["graftllm"].get("own_files") for one in client.models.list()}
    assert about["own"] == ["chat_template.jinja", "generation_config.json"]
    assert about["plain"] is about["base"] is None


def test_tokens_of_a_longer_vocabulary_are_for_its_pack_alone(spoken: tuple[GraftedModel, str]) -> None:
    grafted, address = spoken
    with client_of(address) as client:
        for model in ("own", "auto", "base"):
            with pytest.raises(BadRequestError, match=r"prompt: expected tokens from 0 to \d+, found 79"):
                client.completions.create(model=model, prompt=[5, 79], max_tokens=2)
        text = client.completions.create(model="auto", prompt="to own: ab", max_tokens=6, temperature=0)
        assert (
            text.choices
            == client.completions.create(model="own", prompt="to own: ab", max_tokens=6, temperature=0).choices
        )
    assert grafted.merged_only("wide") is not None


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Local, str]]:
    """A server of a good pack and of some whose tokenizers or templates do not do; rules send each what names it."""
    home = tmp_path_factory.mktemp("odd")
    base = Checkpoint.open(save_llama(home / "base", dtype=torch.float32))
    words = json.loads((base.path / "tokenizer.json").read_text())
    strips = [{"type": "Strip", "content": word, "start": 0, "stop": 9} for word in words["model"]["vocab"]]
    last = max(words["model"]["vocab"].values())
    no = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    more = [*words["added_tokens"], {"id": last + 1, "content": "~~", **no}]
    files = {
        "good": {},
        "broken": {"tokenizer.json": "{"},
        "panics": {"tokenizer.json": json.dumps(words | {"decoder": {"type": "Sequence", "decoders": strips}})},
        "refuses": {"chat_template.jinja": "{{ raise_exception('never') }}"},
        "beyond": {"tokenizer.json": json.dumps(words | {"added_tokens": more})},
    }
    for seed, (name, own) in enumerate(files.items()):
        tuned = perturb(base.path, home / name, seed=seed, scale=0.4)
        for file, content in own.items():
            (tuned / file).write_text(content)
        compress(Delta(base, Checkpoint.open(tuned)), PackOptions(servable=4)).save(home / f"{name}.safetensors")
    rules = [Rule(pack=name, pattern=f"^{name}") for name in files]
    with pytest.MonkeyPatch.context() as patched:  # as packs get in whose files a library reads otherwise later
        patched.setattr(voices, "check_voice", lambda base, pack: None)
        write_grafted(home / "g", str(base.path), {name: home / f"{name}.safetensors" for name in files}, rules=rules)
    local = Local(home / "g", device="cpu")
    with served(build_app(local)) as address:
        yield local, address


@pytest.mark.parametrize(
    ("name", "text", "status", "told"),
    [
        ("broken", "broken", 500, "its tokenizer does not load"),
        ("panics", "panics", 500, "its tokenizer does not load|its log says where"),
        ("refuses", "refuses", 400, "refuses a conversation of user .never"),
        ("beyond", "beyond ~~", 400, "messages: the tokenizer makes it token 73, and the model knows 73"),
    ],
)
def test_what_is_wrong_with_a_packs_tokenizer_is_told_to_those_who_ask_it_alone(
    odd: tuple[Local, str], name: str, text: str, status: int, told: str
) -> None:
    local, address = odd

    def ask(model: str, text: str) -> Any:
        with client_of(address) as client:
            turn = [{"role": "user", "content": text}]
            return client.chat.completions.create(model=model, messages=turn, max_tokens=4, temperature=0)  # type: ignore[arg-type]

    expected = ask("good", "good").choices
    for model in (name, "auto"):
        with ThreadPoolExecutor(4) as crowd:
            others = [crowd.submit(ask, one, "good") for one in ("good", "auto", "good")]
            with pytest.raises(APIStatusError, match=told) as failed:
                ask(model, text)
            assert failed.value.status_code == status
            assert [other.result().choices for other in others] == [expected] * 3
    assert local.alive
