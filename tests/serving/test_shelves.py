import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import BadRequestError

from graftllm.checkpoint import Checkpoint
from graftllm.delta import Delta
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
