from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from graftllm.errors import FusionError, PackError
from graftllm.fusion.directory import set_router
from graftllm.fusion.grafted import GraftedModel
from graftllm.fusion.manifest import read_manifest
from graftllm.loading import load_tokenizer
from graftllm.serving.batch import Batch, check_servable
from graftllm.serving.desk import Desk
from graftllm.serving.engine import Engine
from graftllm.serving.lanes import Lanes
from graftllm.serving.orders import Refused
from graftllm.serving.protocol import ChatRequest
from graftllm.serving.shelves import Library
from graftllm.serving.writing import Draw
from tests.architectures import CONFIGS
from tests.serving.conftest import Expected
from tests.serving.running import Asked, order

SERVABLE = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "gpt2", "mixtral", "gpt_oss")


@pytest.mark.parametrize("name", SERVABLE)
def test_logits_of_rows_that_come_and_go_are_those_of_the_row_alone(name: str) -> None:
    config = type(CONFIGS[name]).from_dict(CONFIGS[name].to_dict() | {"sliding_window": 6})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    check_servable(model)
    prompts = [torch.randint(5, 40, (length,)).tolist() for length in (3, 30, 9)]

    def alone(prompt: list[int], written: list[int]) -> torch.Tensor:
        batch = Batch(model)
        return torch.cat([batch.read([prompt]), *(batch.step([token]) for token in written)])

    with torch.inference_mode():
        batch, found = Batch(model), {}
        found[0], found[1] = (row[None] for row in batch.read(prompts[:2]))
        for tokens in ([7, 8], [9, 10]):
            for row, logits in enumerate(batch.step(tokens)):
                found[row] = torch.cat([found[row], logits[None]])
        found[2] = batch.read(prompts[2:])
        batch.keep([0, 2])  # the longest leaves, and its padding with it
        for row, logits in zip((0, 2), batch.step([11, 12]), strict=True):
            found[row] = torch.cat([found[row], logits[None]])
        for row, written in enumerate(([7, 9, 11], [8, 10], [12])):
            torch.testing.assert_close(found[row], alone(prompts[row], written), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mamba", "bamba"])
def test_a_model_with_a_recurrent_state_is_refused(name: str) -> None:
    with pytest.raises(FusionError, match="than the keys and values of every token, so its rows cannot join"):
        check_servable(AutoModelForCausalLM.from_config(CONFIGS[name]))


@pytest.fixture
def library(fused: Path) -> Library:
    return Library(fused / "grafted", device="cpu")  # a model has one engine


def _engine(library: Library, **limits: int) -> Engine:
    return Engine(library.grafted, library.digests, **{"memory_bytes": 1 << 30, **limits})


@pytest.fixture(scope="module")
def engine(fused: Path) -> Iterator[Engine]:
    engine = _engine(Library(fused / "grafted", device="cpu"), max_batch=5)
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def words(fused: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(fused / "base")


@settings(max_examples=15)
@given(data=st.data())
def test_company_changes_no_answer(
    engine: Engine, words: PreTrainedTokenizerBase, expected: Expected, data: st.DataObject
) -> None:
    packs, questions = st.sampled_from(["base", "one", "two", "whole"]), st.sampled_from(["b", "31676 4", "x" * 40])
    wanted = data.draw(st.lists(st.tuples(questions, packs, st.integers(1, 9)), min_size=1, max_size=12))
    asked = [Asked(engine, order(words, question, pack, max_tokens=n)) for question, pack, n in wanted]
    assert [one.texts()[0][0] for one in asked] == [expected(*one) for one in wanted]


def test_packs_beyond_the_memory_wait_for_each_other(
    library: Library, words: PreTrainedTokenizerBase, expected: Expected
) -> None:
    engine = _engine(library, memory_bytes=1)
    wanted = [("b", pack, 5) for pack in ("one", "two", "whole", "base") * 3]
    asked = [Asked(engine, order(words, question, pack, max_tokens=n)) for question, pack, n in wanted]
    assert [one.texts()[0][0] for one in asked] == [expected(*one) for one in wanted]
    engine.stop()
    assert b"graftllm_pack_memory_bytes 0.0" in engine.measured()


def test_a_full_queue_refuses_and_what_was_taken_is_finished_when_the_engine_stops(
    library: Library, words: PreTrainedTokenizerBase
) -> None:
    engine = _engine(library, max_queue=4, max_batch=1)
    with pytest.raises(Refused, match="the queue is full: 0 of at most 4 choices wait; ask again later") as info:
        engine.submit(order(words, "b", "one", choices=5), print)
    assert info.value.status == 429
    asked = Asked(engine, order(words, "b", "one", choices=4, max_tokens=20))
    engine.stop()
    assert len(asked.texts()) == 4
    with pytest.raises(Refused, match="the server is stopping"):
        engine.submit(order(words, "b", "one"), print)


def test_more_than_the_queue_holds_is_refused_for_good(library: Library, words: PreTrainedTokenizerBase) -> None:
    engine = _engine(library, max_queue=4)
    asked = ChatRequest.model_validate({"model": "one", "n": 5, "messages": [{"role": "user", "content": "b"}]})
    with pytest.raises(Refused, match="n: expected at most 4 texts in all, as many as may wait; found 5") as info:
        Desk(engine, words, 256)._orders(asked)
    assert info.value.status == 400
    engine.stop()


def test_an_order_that_fails_harms_no_other(own: Path, words: PreTrainedTokenizerBase, expected: Expected) -> None:
    library = Library(own / "grafted", device="cpu")
    damaged = own / "grafted" / "packs" / "two.safetensors"
    data = damaged.read_bytes()
    damaged.write_bytes(data[:-400] + bytes(400))
    engine = _engine(library)
    asked = {pack: Asked(engine, order(words, "b", pack, max_tokens=8)) for pack in ("one", "two", "base", "whole")}
    with pytest.raises(PackError, match="two.safetensors: the payload of .* does not match its digest"):
        asked["two"].texts()
    for pack in ("one", "base", "whole"):
        assert asked[pack].texts()[0][0] == expected("b", pack, 8)
    engine.stop()


def test_logits_that_are_no_numbers_harm_no_other_row(
    engine: Engine, words: PreTrainedTokenizerBase, expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = Draw.token
    monkeypatch.setattr(Draw, "token", lambda draw, logits: drawn(draw, logits * torch.nan))
    broken = Asked(engine, order(words, "b", "one", max_tokens=5, temperature=1.0))
    others = [Asked(engine, order(words, "b", pack, max_tokens=5)) for pack in ("one", "base")]
    with pytest.raises(RuntimeError, match="probability tensor contains"):
        broken.texts()
    assert [one.texts()[0][0] for one in others] == [expected("b", pack, 5) for pack in ("one", "base")]


def test_an_engine_without_memory_tells_who_waits_and_goes_on(
    library: Library, words: PreTrainedTokenizerBase, expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(lanes: Lanes) -> None:
        monkeypatch.undo()
        raise MemoryError("no room to drop rows")

    monkeypatch.setattr(Lanes, "drop_cancelled", full)
    engine = _engine(library)
    with pytest.raises(MemoryError, match="no room to drop rows"):
        Asked(engine, order(words, "b", "one", max_tokens=5)).texts()
    assert Asked(engine, order(words, "b", "one", max_tokens=5)).texts()[0][0] == expected("b", "one", 5)
    engine.stop()


def test_packs_come_and_go_while_others_are_asked(
    own: Path, words: PreTrainedTokenizerBase, expected: Expected
) -> None:
    library = Library(own / "grafted", device="cpu")
    engine = library.engine = _engine(library, max_batch=2)
    before = [Asked(engine, order(words, "b", pack, max_tokens=30)) for pack in ("one", "two", "whole", "auto") * 2]
    library.add("spare", own / "spare.safetensors")
    during = Asked(engine, order(words, "b", "spare", max_tokens=10))
    library.remove("two")
    with pytest.raises(Refused, match="pack: expected one of base, auto, one, whole, spare; found 'two'"):
        engine.submit(order(words, "b", "two"), print)
    routed = Asked(engine, order(words, "?!?!", "auto", max_tokens=8))
    text = routed.texts()[0][0]
    assert routed.chosen is not None
    assert routed.chosen.pack in ("base", "one", "whole")  # the router would have chosen the pack that went
    assert text == expected("?!?!", routed.chosen.pack, 8)
    for one in before:
        text = one.texts()[0][0]
        assert one.chosen is not None
        assert text == expected("b", one.chosen.pack, 30)
    spare = Expected(GraftedModel.load(own / "grafted"))("b", "spare", 10)
    assert during.texts()[0][0] == spare
    assert list(read_manifest(own / "grafted").packs) == ["one", "whole", "spare"]
    library.add("two", own / "spare.safetensors")  # another file under the old name
    assert Asked(engine, order(words, "b", "two", max_tokens=10)).texts()[0][0] == spare
    engine.stop()


def test_auto_without_router_and_rules_is_no_model(own: Path, words: PreTrainedTokenizerBase) -> None:
    set_router(own / "grafted", None)
    engine = _engine(Library(own / "grafted", device="cpu"))
    told = "'auto' needs a router, and this grafted model has none; name one of base, one, two, whole, or fuse with"
    with pytest.raises(Refused, match=told) as info:
        engine.submit(order(words, "b", "auto"), print)
    assert info.value.status == 404
    engine.stop()


def test_a_pack_whose_file_is_taken_away_is_still_told_of(own: Path) -> None:
    library = Library(own / "grafted", device="cpu")
    file = own / "grafted" / "packs" / "one.safetensors"
    size = file.stat().st_size
    file.unlink()
    assert library.models()["one"]["bytes"] == library.card("one")["anatomy"]["file_bytes"] == size
