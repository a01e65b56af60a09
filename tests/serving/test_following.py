"""A served directory that others change, and packs with tokenizers of their own in it."""

import json
import logging
import re
import shutil
from pathlib import Path
from threading import Event, Thread

import httpx2
import pytest
import torch
from openai import BadRequestError, NotFoundError
from transformers import PreTrainedTokenizerBase

from graftllm.checkpoint import Checkpoint
from graftllm.delta import Delta
from graftllm.fusion import voices
from graftllm.fusion.directory import add_packs, remove_pack, set_rules, write_grafted
from graftllm.fusion.grafted import GraftedModel
from graftllm.fusion.rules import Rule
from graftllm.loading import load_tokenizer
from graftllm.packer import compress
from graftllm.packing_options import PackOptions
from graftllm.serving.app import build_app
from graftllm.serving.desk import Desk
from graftllm.serving.engine import Engine
from graftllm.serving.protocol import ChatRequest
from graftllm.serving.server import Local
from graftllm.serving.shelves import Library
from tests.models import perturb, save_llama
from tests.serving.conftest import Expected
from tests.serving.running import PATIENCE_S, Asked, client_of, plain_client, served

ADMIN = {"authorization": "Bearer sesame"}


@pytest.fixture(scope="module")
def speaking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grafted model whose packs `begins` and `turned` have tokenizers of their own, and the file of `spare`.

    `begins` and `spare` put a token before every text; `turned` has the base's letters in the other order. Rules name
    the packs.
    """
    home = tmp_path_factory.mktemp("speaking")
    base = Checkpoint.open(save_llama(home / "base", dtype=torch.float32))
    words = json.loads((base.path / "tokenizer.json").read_text())
    start, rest = {"SpecialToken": {"id": "<user>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    begun = {
        "type": "TemplateProcessing", "single": [start, rest], "pair": [start, rest],
        "special_tokens": {"<user>": {"id": "<user>", "ids": [1], "tokens": ["<user>"]}},
    }  # fmt: skip
    marks, letters = list(words["model"]["vocab"])[:5], list(words["model"]["vocab"])[5:]
    turned = {word: i for i, word in enumerate([*marks, *reversed(letters)])}
    files = {
        "plain": None,
        "begins": words | {"post_processor": begun},
        "turned": words | {"model": words["model"] | {"vocab": turned}},
        "spare": words | {"post_processor": begun},
    }
    for seed, (name, own) in enumerate(files.items()):
        tuned = perturb(base.path, home / f"tuned-{name}", seed=seed, scale=0.4)
        if own is not None:
            (tuned / "tokenizer.json").write_text(json.dumps(own))
        compress(Delta(base, Checkpoint.open(tuned)), PackOptions(servable=4)).save(home / f"{name}.safetensors")
    packs = {name: home / f"{name}.safetensors" for name in ("plain", "begins", "turned")}
    write_grafted(home / "g", str(base.path), packs, rules=[Rule(pack=name, pattern=f"^{name}") for name in packs])
    return home


@pytest.fixture
def own_speaking(speaking: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(speaking, tmp_path / "home"))


def test_tokens_for_auto_are_read_as_they_are_by_every_pack_of_the_same_vocabulary(speaking: Path) -> None:
    words = load_tokenizer(speaking / "base")
    with served(build_app(Local(speaking / "g", device="cpu"))) as address, client_of(address) as client:
        for pack in ("plain", "begins", "base"):
            ids = words(f"{pack} abc")["input_ids"]
            answers = [
                client.completions.create(model=model, prompt=ids, max_tokens=6, temperature=0)
                for model in (pack, "auto")[: 1 if pack == "base" else 2]
            ]
            for one in answers:
                assert one.choices == answers[0].choices
                assert one.usage is not None and one.usage.prompt_tokens == len(ids)
        text = client.completions.create(model="auto", prompt="begins abc", max_tokens=6, temperature=0)
        assert text.usage is not None and text.usage.prompt_tokens == len("begins abc") + 1
        ids = words("turned abc")["input_ids"]
        with pytest.raises(BadRequestError, match="prompt: auto chose a pack of another vocabulary than the base's"):
            client.completions.create(model="auto", prompt=ids, max_tokens=6)
        assert client.completions.create(model="turned", prompt=ids, max_tokens=6).usage is not None
        raw = client.completions.with_raw_response.create(model="auto", prompt="no rule fits", max_tokens=6)
        assert (raw.headers["x-graftllm-pack"], raw.headers["x-graftllm-reason"]) == ("base", "no rule")


def test_what_other_processes_change_counts_from_the_next_request_on(own: Path, expected: Expected) -> None:
    directory = own / "grafted"
    with (
        served(build_app(Local(directory, device="cpu"), admin_key="sesame")) as address,
        client_of(address) as client,
        plain_client(address) as plain,
    ):

        def ask(model: str, text: str = "b") -> str | None:
            turn = {"role": "user", "content": text}
            answer = client.chat.completions.create(model=model, messages=[turn], max_tokens=8, temperature=0)  # type: ignore[list-item]
            return answer.choices[0].message.content

        assert ask("one") == expected("b", "one", 8)
        remove_pack(directory, "one")  # was decoded
        remove_pack(directory, "two")  # was not
        for name in ("one", "two"):
            with pytest.raises(NotFoundError, match=f"pack: expected one of base, auto, whole; found '{name}'"):
                ask(name)
            assert plain.get(f"/packs/{name}/card").status_code == 404
            assert plain.delete(f"/v1/packs/{name}", headers=ADMIN).status_code == 404
        assert [model.id for model in client.models.list()] == ["base", "whole", "auto"]
        assert ask("auto", "31676 4") == expected("31676 4", "base", 8)
        add_packs(directory, {"one": own / "spare.safetensors"})  # another file under the old name
        set_rules(directory, [Rule(pack="one", pattern="^b")])
        spare = Expected(GraftedModel.load(directory))("b", "one", 8)
        assert ask("one") == ask("auto") == spare != expected("b", "one", 8)
        assert ask("whole") == expected("b", "whole", 8)


def test_a_pack_that_goes_while_a_request_waits_for_it_is_not_found(own: Path) -> None:
    local, found, go_on = Local(own / "grafted", device="cpu"), list[httpx2.Response](), Event()
    with served(build_app(local)) as address, plain_client(address) as plain:
        local._engine.between_steps(go_on.wait)
        body = {"model": "two", "prompt": "abc", "max_tokens": 9}
        asking = Thread(target=lambda: found.append(plain.post("/v1/completions", json=body)))
        asking.start()
        while "graftllm_waiting_choices 1.0" not in plain.get("/metrics").text:
            pass
        remove_pack(own / "grafted", "two")
        go_on.set()
        asking.join(PATIENCE_S)
    assert found[0].status_code == 404
    assert "pack: it was removed while this waited for it; ask again" in found[0].json()["error"]["message"]


@pytest.mark.parametrize("replaced", ["base", "manifest"])
def test_a_directory_that_cannot_be_followed_is_served_as_it_was(
    own: Path, expected: Expected, caplog: pytest.LogCaptureFixture, replaced: str
) -> None:
    directory = own / "grafted"
    with served(build_app(Local(directory, device="cpu"))) as address, client_of(address) as client:
        if replaced == "base":
            shutil.rmtree(directory)
            write_grafted(directory, str(save_llama(own / "other", dtype=torch.float32, seed=5)), {})
            told = r"expected the base that is served \(\w{12}\), found packs for another \(\w{12}\); start the server"
        else:
            (directory / "manifest.json").write_text("{}")
            told = "manifest.json: base: Field required"
        with caplog.at_level(logging.ERROR):
            assert [model.id for model in client.models.list()] == ["base", "one", "two", "whole", "auto"]
            assert len(caplog.records) == 1
            assert caplog.records[0].getMessage().startswith(f"{directory} was changed, but is served as it was: ")
            assert re.search(told, caplog.text)
            answer = client.chat.completions.create(
                model="base", messages=[{"role": "user", "content": "b"}], max_tokens=8, temperature=0
            )
        assert answer.choices[0].message.content == expected("b", "base", 8)
        assert len(caplog.records) == 1


def test_a_tokenizer_is_loaded_once_while_a_pack_of_it_stays(
    own_speaking: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    load = voices._own_tokenizer

    def counted(*given: object) -> PreTrainedTokenizerBase:
        loaded.append(Path(given[2].source).stem)  # type: ignore[attr-defined]
        return load(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(voices, "_own_tokenizer", counted)
    library = Library(own_speaking / "g", device="cpu")
    engine = library.engine = Engine(library.grafted, library.digests, memory_bytes=1 << 30)
    first, turned, base = library.voices["begins"], library.voices["turned"], library.voices["base"]
    loaded.clear()
    library.add("spare", own_speaking / "spare.safetensors")
    loaded.clear()  # what is added is tried
    assert library.voices["spare"] is library.voices["begins"] is first
    assert (library.voices["turned"], library.voices["base"]) == (turned, base)
    set_rules(own_speaking / "g", [])
    library.remove("begins")
    assert library.voices["begins"] is base
    assert library.voices["spare"] is first
    assert loaded == []
    library.remove("spare")
    library.add("begins", own_speaking / "begins.safetensors")
    assert library.voices["begins"] is not first
    engine.stop()


def test_auto_speaks_to_a_pack_that_came_meanwhile_in_its_own_way(own_speaking: Path) -> None:
    library = Library(own_speaking / "g", device="cpu")
    engine = library.engine = Engine(library.grafted, library.digests, memory_bytes=1 << 30)
    desk = Desk(engine, lambda: library.voices, 256)
    turn = {"role": "user", "content": "late abc"}
    asked = {"model": "auto", "messages": [turn], "max_tokens": 6, "temperature": 0}
    order = desk._orders(ChatRequest.model_validate(asked))[0]
    library.add("late", own_speaking / "turned.safetensors")
    set_rules(own_speaking / "g", [Rule(pack="late", pattern="^late")])
    library.models()
    text = Asked(engine, order).texts()[0][0]
    named = desk._orders(ChatRequest.model_validate(asked | {"model": "late"}))[0]
    assert text == Asked(engine, named).texts()[0][0]
    assert list(order.reading("late").ids) == list(named.reading("late").ids) != list(order.reading("auto").ids)
    engine.stop()
