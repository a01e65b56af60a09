import json
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from graftllm.checkpoint import Checkpoint
from graftllm.delta import Delta
from graftllm.errors import FusionError, PackError
from graftllm.fusion import assembly, manifest
from graftllm.fusion.assembly import fuse_packs, join_packs
from graftllm.fusion.beside import mixed
from graftllm.fusion.chat import Chat
from graftllm.fusion.conversations import messages_of
from graftllm.fusion.directory import add_packs, remove_pack, set_router, write_grafted
from graftllm.fusion.grafted import GraftedModel
from graftllm.fusion.grafting import plug
from graftllm.fusion.manifest import Manifest, read_manifest
from graftllm.fusion.rules import Rule
from graftllm.generation import GREEDY, generate
from graftllm.loading import load_model, load_tokenizer
from graftllm.packer import compress
from graftllm.packing_options import PackOptions
from graftllm.recipe import RouterOptions, SamplingOptions
from graftllm.records import Message, Prompt, read_prompts, write_rows
from graftllm.skillpack import SkillPack
from graftllm.tensors import digest
from tests.models import perturb, quantize, rows, save_llama

SHORT = SamplingOptions(samples=1, temperature=0, top_p=1, max_new_tokens=8)


@pytest.fixture(scope="module")
def shelf(base_dir: Path, delta: Delta, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grafted model with the packs `one` and `two` and a router that tells digits from letters."""
    home = tmp_path_factory.mktemp("shelf")
    shutil.copytree(base_dir, home / "base")
    other = Delta(delta.base, Checkpoint.open(perturb(base_dir, home / "other", seed=6)))
    for name, change in (("one", delta), ("two", other)):
        compress(change, PackOptions(strategy="exact")).save(home / f"{name}.safetensors")
    digits = [Prompt(f"d{i}", (Message(role="user", content=f"{i * 7919} {i}"),), "one") for i in range(60)]
    marks = [Prompt(f"m{i}", (Message(role="user", content="?!" * (i % 9 + 1)),), "two") for i in range(60)]
    write_rows(home / "router.jsonl", [*digits, *marks, *rows(60, answered=False, task="general")])
    packs = {name: home / f"{name}.safetensors" for name in ("one", "two")}
    fuse_packs(home / "grafted", str(home / "base"), packs, router_data=home / "router.jsonl")
    return home / "grafted"


@pytest.fixture(scope="module")
def grafted(shelf: Path) -> GraftedModel:
    return GraftedModel.load(shelf)


def test_a_pack_answers_as_its_tuned_model_does(
    grafted: GraftedModel, tuned: Checkpoint, prompts: list[Prompt]
) -> None:
    questions = [prompt.question for prompt in prompts[:6]]
    model, words = load_model(tuned.path), load_tokenizer(tuned.path)
    expected = [texts[0] for texts in generate(model, words, questions, SHORT)]
    assert grafted.generate(questions, "one", SHORT) == expected


def test_base_answers_before_between_and_after_packs(grafted: GraftedModel, prompts: list[Prompt]) -> None:
    questions = [prompt.question for prompt in prompts[:6]]
    before = grafted.generate(questions, "base", SHORT)
    one = grafted.generate(questions, "one", SHORT)
    assert grafted.generate(questions, None, SHORT) == before
    assert one != before
    mixed = grafted.generate(questions, ["base", "one"] * 3, SHORT)
    assert mixed[::2] == before[::2]
    assert mixed[1::2] == one[1::2]


def test_a_grafted_model_is_shown_in_one_line(grafted: GraftedModel) -> None:
    shown = repr(grafted)
    assert shown.startswith("GraftedModel(LlamaForCausalLM '")
    assert shown.endswith("', packs ['one', 'two'], a router, 0 rules)")
    assert "\n" not in shown


def test_the_router_chooses_by_prompt(grafted: GraftedModel, prompts: list[Prompt]) -> None:
    assert [route.name for route in grafted.route(["31676 4", "?!?!"])] == ["one", "two"]
    assert grafted.route([prompts[0].question])[0].name == "base"
    assert grafted.generate(["31676 4"], "auto", SHORT) == grafted.generate(["31676 4"], "one", SHORT)


def test_streamed_pieces_make_the_whole_answer(grafted: GraftedModel) -> None:
    pieces = list(grafted.stream("31676 4", "one", SHORT))
    assert "".join(pieces) == grafted.generate(["31676 4"], "one", SHORT)[0]
    with pytest.raises(FusionError, match="found 'three'"):
        list(grafted.stream("hi", "three", SHORT))


def test_pieces_come_before_the_end(grafted: GraftedModel, prompts: list[Prompt]) -> None:
    long = SHORT.model_copy(update={"max_new_tokens": 60})
    found = [list(grafted.stream(prompt.question, "one", long)) for prompt in prompts[:8]]
    assert max(map(len, found)) > 2
    assert all(piece for pieces in found for piece in pieces)


def test_a_conversation_stays_with_the_pack_of_its_first_message(grafted: GraftedModel) -> None:
    chat = Chat(grafted, "auto", SHORT)
    first = "".join(chat.say("31676 4"))
    assert first.startswith("[one] ")
    assert "".join(chat.say("?!?!")) == grafted.generate([chat.messages[:3]], "one", SHORT)[0]
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    assert list(chat.say("/new")) == ["(new conversation)"]
    assert "".join(chat.say("?!?!")).startswith("[two] ")
    assert list(chat.say("/pack three")) == ["(expected /pack and one of base, auto, one, two)"]
    assert list(chat.say("/pack base")) == ["(new conversation with base)"]
    assert "".join(chat.say("31676 4")) == grafted.generate(["31676 4"], "base", SHORT)[0]
    assert list(chat.say("")) == []


def test_a_chat_offers_auto_only_where_somebody_chooses(grafted: GraftedModel) -> None:
    chat = Chat(GraftedModel(grafted.model, grafted.tokenizer, grafted.packs), "base", SHORT)
    assert list(chat.say("/pack auto")) == ["(expected /pack and one of base, one, two)"]


@pytest.fixture(scope="module")
def served(base_dir: Path, delta: Delta, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grafted model with the packs `one` and `two` in factors, and `three`, which can only be merged."""
    home = tmp_path_factory.mktemp("served")
    files: dict[str, Path] = {}
    for seed, name in enumerate(("one", "two", "three"), 11):
        change = Delta(delta.base, Checkpoint.open(perturb(base_dir, home / name, seed=seed)))
        files[name] = home / f"{name}.safetensors"
        compress(change, PackOptions(strategy="exact" if name == "three" else "paper")).save(files[name])
    write_grafted(home / "g", str(base_dir), files)
    return home / "g"


def test_a_mixed_batch_answers_as_packs_merged_one_by_one_do(served: Path) -> None:
    model = GraftedModel.load(served)
    questions = [f"question {i}" for i in range(6)]
    packs = ["one", None, {"one": 0.5, "two": 0.5}, "two", "base", "one"]
    merged = model.generate(questions, packs, SHORT, way="merged")
    assert model.beside.stacked == ()
    assert model.generate(questions, packs, SHORT) == merged  # in one batch, beside the weights
    assert model.beside.stacked == ("one", "two")
    in_twos = SHORT.model_copy(update={"batch_size": 2})
    assert model.generate(questions, packs, in_twos, way="beside") == merged
    assert len(set(merged)) > 2


def test_a_batch_with_a_pack_that_can_only_be_merged_is_answered_pack_by_pack(served: Path) -> None:
    model = GraftedModel.load(served)
    questions = ["question 1", "question 2"]
    assert model.generate(questions, ["one", "three"], SHORT) == [
        *model.generate(questions[:1], "one", SHORT),
        *model.generate(questions[1:], "three", SHORT),
    ]
    assert model.beside.stacked == ()
    with pytest.raises(
        FusionError,
        match=r"^'three': expected packs that can run beside the weights; .* by the operator 'exact', not in factors",
    ):
        model.generate(questions, ["one", "three"], SHORT, way="beside")


def test_packs_that_take_more_than_the_limit_together_are_answered_one_by_one(served: Path) -> None:
    model = GraftedModel.load(served, memory_bytes=1)
    expected = GraftedModel.load(served).generate(["a", "b"], ["one", "two"], SHORT)
    assert model.generate(["a", "b"], ["one", "two"], SHORT) == expected
    assert model.beside.stacked == ()
    assert model.generate(["a", "b"], ["one", "two"], SHORT, way="beside") == expected
    assert model.beside.nbytes == 0
    assert model.shelf is not None
    assert model.shelf.nbytes == 0


def test_a_quantized_base_answers_and_streams_with_any_pack_beside_it(served: Path, base_dir: Path) -> None:
    base = load_model(base_dir)
    quantize(base)
    model = GraftedModel.load(served, model=base)
    expected = model.generate(["a", "b"], ["one", None], SHORT, way="beside")
    assert model.generate(["a"], "one", SHORT) == expected[:1]
    assert "".join(model.stream("a", "one", SHORT)) == expected[0]
    with pytest.raises(FusionError, match=r"quantized \(Int8Tensor\)"):
        model.generate(["a"], "three", SHORT)


def test_what_is_no_list_of_conversations_is_refused(served: Path) -> None:
    model = GraftedModel.load(served)
    with pytest.raises(FusionError, match=r"conversations: .* found one str that is a conversation itself; put it in"):
        model.generate("hello", "one", SHORT)
    with pytest.raises(FusionError, match="found one list that is a conversation itself"):
        model.generate([Message(role="user", content="hello")], "one", SHORT)  # pyright: ignore[reportArgumentType]
    for pack in (3, [3]):
        with pytest.raises(FusionError, match="pack: expected a name, None, or names with weights, found 3."):
            model.generate(["hello"], pack, SHORT)  # pyright: ignore[reportArgumentType]


def test_one_pack_or_mapping_for_each_conversation_is_needed(served: Path) -> None:
    model = GraftedModel.load(served)
    with pytest.raises(FusionError, match="pack: expected one for each of 2 conversations, found 3."):
        model.generate(["a", "b"], ["one"] * 3, SHORT)
    for name, weight in (("four", 0.1), ("four", 0.0), ("auto", 1.0)):
        with pytest.raises(FusionError, match=f"pack: expected one of base, one, two, three; found '{name}'"):
            model.generate(["a"], {"one": 1, name: weight}, SHORT)


def test_what_cannot_be_asked_for_is_named_with_what_can(served: Path) -> None:
    model = GraftedModel.load(served)
    with pytest.raises(FusionError, match="pack: expected one of base, auto, one, two, three; found 'four'"):
        model.generate(["a"], "four", SHORT)
    with pytest.raises(FusionError, match="pack: expected one of base, one, two, three; found 'auto'"):
        model.using("auto").__enter__()
    with pytest.raises(FusionError, match="pack: expected one of one, two, three; found 'base'"):
        model.merged_only("base")
    with pytest.raises(FusionError, match="way: expected one of auto, merged, beside; found 'besides'"):
        model.generate(["a"], "one", SHORT, way="besides")  # type: ignore
    for ask in (lambda: model.generate([[]], "one", SHORT), lambda: list(model.stream([], "one", SHORT))):
        with pytest.raises(FusionError, match="conversation: expected a text, or at least one message"):
            ask()


def test_what_was_decoded_in_inference_mode_serves_a_pass_with_gradients(served: Path) -> None:
    model, ids = GraftedModel.load(served), torch.arange(4, 16).reshape(2, 6)
    with torch.inference_mode():
        model.generate(["a"], "one", SHORT)
    model.generate(["a", "b"], ["one", "two"], SHORT)
    with model.using("one") as live:
        assert live(input_ids=ids).logits.requires_grad
    with model.beside.rows(["one", "two"]) as live:
        assert live(input_ids=ids).logits.requires_grad


def test_inside_using_the_model_has_the_pack_and_afterwards_what_it_had(served: Path) -> None:
    model = GraftedModel.load(served)

    def state() -> dict[str, str]:
        return {name: digest(value) for name, value in model.model.state_dict().items()}

    base = state()
    with model.using("one"):
        one = state()
        with model.using({"one": 1.0, "two": -1.0}):
            assert state() not in (base, one)
            assert model.generate(["hi"], "base", SHORT) == GraftedModel.load(served).generate(["hi"], None, SHORT)
        assert state() == one != base
    assert state() == base


def test_a_block_inside_that_fails_gives_the_outer_one_its_pack_back(served: Path, tmp_path: Path) -> None:
    shutil.copytree(served, tmp_path / "g")
    manifest = json.loads((tmp_path / "g" / "manifest.json").read_text())
    base = str((served / manifest["base"]).resolve())
    (tmp_path / "g" / "manifest.json").write_text(json.dumps(manifest | {"base": base}))
    model = GraftedModel.load(tmp_path / "g")
    expected = model.generate(["hi"], "one", SHORT)
    with model.using("one"):
        before = {name: digest(value) for name, value in model.model.state_dict().items()}
        remove_pack(tmp_path / "g", "two")
        with pytest.raises(
            PackError, match=r"two.safetensors: '.*' cannot be read any more \(No such file.*put it back"
        ):
            model.generate(["hi"], "two", SHORT)
        assert {name: digest(value) for name, value in model.model.state_dict().items()} == before
    assert model.generate(["hi"], "one", SHORT) == expected


def test_a_pack_is_asked_whether_it_runs_beside_only_between_answers(served: Path) -> None:
    model = GraftedModel.load(served)
    with ThreadPoolExecutor(1) as threads:
        with model.using("three"):
            asked = threads.submit(model.merged_only, "one")
            with pytest.raises(TimeoutError):
                asked.result(timeout=0.05)
        assert asked.result() is None


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_refused(served: Path, weight: float) -> None:
    with pytest.raises(FusionError, match=f"pack: expected a finite weight for 'one', found {weight}."):
        GraftedModel.load(served).generate(["hi"], {"one": weight}, SHORT)


def test_one_answer_each_is_all_that_can_be_asked_for(served: Path) -> None:
    two = SHORT.model_copy(update={"samples": 2, "temperature": 1.0})
    with pytest.raises(FusionError, match="samples: expected 1, as each conversation gets one answer; found 2."):
        GraftedModel.load(served).generate(["hi"], "one", two)


def test_a_shelf_of_one_pack_decodes_again_what_it_let_go(served: Path) -> None:
    model = GraftedModel.load(served)
    with model.using("one"):
        size = model.shelf.nbytes
    small = GraftedModel.load(served, memory_bytes=size)
    held = []
    for name in ("one", "two", "one"):
        assert small.generate(["hi"], name, SHORT) == model.generate(["hi"], name, SHORT)
        assert [key[:2] for key in small.shelf.hot] == [("merged", ((name, 1.0),))]  # and of which dtype and device
        with small.using(name) as live, model.using(name) as expected:
            pairs = zip(live.parameters(), expected.parameters(), strict=True)
            held += [(mine.detach(), other.detach()) for mine, other in pairs]
    assert all(torch.equal(mine, other) for mine, other in held)  # memory that someone has is not lent again


def test_a_stream_that_is_closed_early_stops_and_leaves_the_base(served: Path) -> None:
    model = GraftedModel.load(served)
    before = model.generate(["hi"], "base", SHORT)
    pieces = model.stream("hi", "one", SHORT.model_copy(update={"max_new_tokens": 200}))
    next(pieces)
    with pytest.raises(FusionError, match="a stream of this model is still open; read it to its end, or close it"):
        model.generate(["hi"], "two", SHORT)
    pieces.close()
    assert model.generate(["hi"], "base", SHORT) == before


def test_a_stream_that_nobody_reads_to_its_end_does_not_trouble_the_end_of_the_program(served: Path) -> None:
    code = f"from graftllm import GraftedModel\nopen = GraftedModel.load({str(served)!r}).stream('31676 4', 'one')\n"
    done = subprocess.run([sys.executable, "-c", f"{code}next(open)"], capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr


def test_a_thread_that_goes_on_with_a_stream_of_another_is_told_that_it_is_open(served: Path) -> None:
    model, long = GraftedModel.load(served), SHORT.model_copy(update={"max_new_tokens": 60})
    asked = next(text for text in map(str, range(100)) if len(list(model.stream(text, "one", long))) > 2)
    stream = model.stream(asked, "one", long)
    next(stream)
    told: list[str] = []

    def go_on() -> None:
        next(stream)
        with pytest.raises(FusionError) as caught:
            model.generate(["hi"], "one", SHORT)
        told.append(str(caught.value))
        stream.close()

    other = threading.Thread(target=go_on, daemon=True)
    other.start()
    other.join(120)
    assert "a stream of this model is still open" in told[0]
    assert model.generate(["hi"], "one", SHORT)  # the turn was given back


def test_a_directory_that_changes_while_it_is_read_is_read_again(shelf: Path, tmp_path: Path) -> None:
    shutil.copytree(shelf.parent, tmp_path / "home")
    grafted, real = tmp_path / "home" / "grafted", manifest.open_packs

    def changed_first(directory: Path, found: Manifest) -> dict[str, SkillPack]:
        if "two" in read_manifest(directory).packs:
            remove_pack(directory, "two")
        return real(directory, found)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(manifest, "open_packs", changed_first)
        model = GraftedModel.load(grafted)
    assert list(model.packs) == ["one"]
    assert model.router is not None
    assert model.router.packs == ("one",)


def test_the_packs_of_a_model_stay_what_they_are(grafted: GraftedModel) -> None:
    with pytest.raises(TypeError, match="does not support item assignment"):
        cast(Any, grafted.packs)["one"] = grafted.packs["two"]


def test_a_thread_that_begins_waits_for_the_stream_of_one_that_ended(served: Path) -> None:
    """The system gives a new thread the number of one that ended, at once."""
    model, streams = GraftedModel.load(served), []
    expected = model.generate(["hi"], "two", SHORT)

    def open_stream() -> None:
        streams.append(model.stream("hi", "one", SHORT))
        next(streams[0])

    first = threading.Thread(target=open_stream)
    first.start()
    first.join()
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(model.generate, ["hi"], "two", SHORT)
        with pytest.raises(TimeoutError):
            asked.result(timeout=0.1)
        streams[0].close()
        assert asked.result() == expected


def test_threads_take_turns(served: Path) -> None:
    model = GraftedModel.load(served)
    names = ["one", "two", "base", "one", "three", "two"]
    expected = [model.generate(["hi"], name, SHORT) for name in names]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda name: model.generate(["hi"], name, SHORT), names)) == expected


def test_auto_needs_a_router_that_knows_every_pack(shelf: Path, tmp_path: Path) -> None:
    shutil.copytree(shelf.parent, tmp_path / "home")
    directory = tmp_path / "home" / "grafted"
    add_packs(directory, {"late": directory / "packs" / "one.safetensors"})
    with pytest.raises(FusionError, match="a router that knows every pack, and this one is older than late; name a"):
        GraftedModel.load(directory).generate(["hi"])
    remove_pack(directory, "late")
    assert GraftedModel.load(directory).generate(["31676 4"]) == GraftedModel.load(directory).generate(
        ["31676 4"], "one"
    )


def test_a_pack_can_join_when_all_others_have_left(shelf: Path, tmp_path: Path) -> None:
    shutil.copytree(shelf.parent, tmp_path / "home")
    directory = tmp_path / "home" / "grafted"
    remove_pack(directory, "two")
    only_one = read_manifest(directory).router
    remove_pack(directory, "one")
    assert [route.name for route in GraftedModel.load(directory).route(["31676 4", "?!?!"])] == ["base"] * 2
    one = [row for row in read_prompts(tmp_path / "home" / "router.jsonl") if row.task == "one"]
    write_rows(tmp_path / "rows.jsonl", one)
    again = {"one": tmp_path / "home" / "one.safetensors"}
    assert join_packs(directory, again, router_data=tmp_path / "rows.jsonl").router == only_one
    assert GraftedModel.load(directory).route(["31676 4"])[0].name == "one"


def test_of_two_that_teach_a_router_at_once_one_is_told_to_come_again(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(shelf.parent, tmp_path / "home")
    directory = tmp_path / "home" / "grafted"
    marks = {"early": "((", "late": ",,"}
    for name, mark in marks.items():
        asked = [mark + "x" * (i % 30 + 1) for i in range(60)]
        prompts = [Prompt(f"p{i}", (Message(role="user", content=text),), name) for i, text in enumerate(asked)]
        write_rows(tmp_path / f"{name}.jsonl", prompts)

    def join(name: str) -> Manifest:
        pack = {name: directory / "packs" / "one.safetensors"}
        return join_packs(directory, pack, router_data=tmp_path / f"{name}.jsonl")

    def meanwhile(*given: Any, **named: Any) -> Manifest:
        monkeypatch.setattr(assembly, "add_packs", add_packs)
        join("early")
        return add_packs(*given, **named)

    monkeypatch.setattr(assembly, "add_packs", meanwhile)
    with pytest.raises(
        FusionError, match="expected the router that learnt of late, found another; it was changed mean"
    ):
        join("late")
    assert join("late").unrouted() == []
    assert [route.name for route in GraftedModel.load(directory).route(["((xxx", ",,xxx"])] == ["early", "late"]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"router_data": Path("none.jsonl")}, "pack 'one': this grafted model has one of that name"),
        ({"drift": 0.5}, "--drift: is of the router, which learns from --router-data; give both, or neither."),
        ({"drift": 2.0, "router_data": Path("none.jsonl")}, "--drift: expected a share from 0 to 1, found 2."),
    ],
)
def test_what_cannot_join_is_refused_before_any_model_is_loaded(shelf: Path, given: dict[str, Any], text: str) -> None:
    name = "new" if "drift" in given else "one"
    with pytest.raises(FusionError, match=text):
        join_packs(shelf, {name: shelf.parent / "one.safetensors"}, **given)


def test_a_pack_that_came_without_prompts_is_taught_to_the_router_later(shelf: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(shelf.parent, tmp_path / "home")) / "grafted"
    late = {"late": directory.parent / "two.safetensors"}
    prompts = [Prompt(f"p{i}", (Message(role="user", content="((" + "x" * i),), "late") for i in range(40)]
    write_rows(tmp_path / "late.jsonl", prompts)
    assert join_packs(directory, late).unrouted() == ["late"]
    with pytest.raises(FusionError, match="older than late; name a pack, or `graftllm add` these once more"):
        GraftedModel.load(directory).route(["((xxx"])
    with pytest.raises(FusionError, match="pack 'late': this grafted model has one of that name"):
        other = {"late": directory.parent / "one.safetensors"}
        join_packs(directory, other, router_data=tmp_path / "late.jsonl")
    assert join_packs(directory, late, router_data=tmp_path / "late.jsonl").unrouted() == []
    assert [route.name for route in GraftedModel.load(directory).route(["((xxx", "31676 4"])] == ["late", "one"]


def test_a_soft_router_mixes_packs_in_a_chat_as_in_a_batch(shelf: Path, tmp_path: Path) -> None:
    digits = [Prompt(f"d{i}", (Message(role="user", content=f"{i * 7919} {i}"),), "one") for i in range(60)]
    twins = [Prompt(f"t{i}", (Message(role="user", content=f"{i * 7909} {i}"),), "two") for i in range(60)]
    write_rows(tmp_path / "rows.jsonl", [*digits, *twins, *rows(60, answered=False, task="general")])
    packs, base = {name: shelf.parent / f"{name}.safetensors" for name in ("one", "two")}, str(shelf.parent / "base")
    options = RouterOptions(soft=2)
    fuse_packs(tmp_path / "g", base, packs, router_data=tmp_path / "rows.jsonl", options=options)
    grafted = GraftedModel.load(tmp_path / "g")
    weights = grafted.route(["31676 4"])[0].weights
    assert set(weights) == {"one", "two"}
    answer = grafted.generate(["31676 4"], weights, SHORT)[0]
    chat = Chat(grafted, "auto", SHORT)
    told = ", ".join(f"{name} {weight:g}" for name, weight in weights.items())
    assert "".join(chat.say("31676 4")) == f"[{told}] {answer}"
    assert grafted.generate(["31676 4"], "auto", SHORT) == [answer]
    with pytest.raises(FusionError, match=r"router: expected prompt rows \(--router-data\) to train it on, found none"):
        fuse_packs(tmp_path / "h", base, packs, options=options)


def test_a_pack_joins_with_its_own_prompts_alone(shelf: Path, tmp_path: Path) -> None:
    shutil.copytree(shelf.parent, tmp_path / "home")
    directory = tmp_path / "home" / "grafted"
    write_rows(
        tmp_path / "rows.jsonl",
        [Prompt(f"p{i}", (Message(role="user", content="((" + "x" * (i % 30 + 1)),), "late") for i in range(60)],
    )
    late = {"late": directory / "packs" / "one.safetensors"}
    manifest = join_packs(directory, late, router_data=tmp_path / "rows.jsonl")
    assert manifest.unrouted() == []
    model = GraftedModel.load(directory)
    assert [route.name for route in model.route(["31676 4", "((xxxxxx"])] == ["one", "late"]
    with pytest.raises(FusionError, match="rows.jsonl: no row has the task 'other'; the router needs prompts of every"):
        join_packs(directory, {"other": late["late"]}, router_data=tmp_path / "rows.jsonl")
    same = [Prompt(f"p{i}", (Message(role="user", content="))" + "x" * (i % 3)),), "other") for i in range(60)]
    write_rows(tmp_path / "same.jsonl", same)
    with pytest.raises(FusionError, match="at least 8 different prompts of 'other', found 3 in 60 rows; add some"):
        join_packs(directory, {"other": late["late"]}, router_data=tmp_path / "same.jsonl")
    set_router(directory, None)
    with pytest.raises(FusionError, match="has no router that could learn of a pack; write it anew with"):
        join_packs(directory, {"other": late["late"]}, router_data=tmp_path / "rows.jsonl")


def test_removing_a_pack_leaves_the_others_answers(shelf: Path, tmp_path: Path) -> None:
    shutil.copytree(shelf.parent, tmp_path / "home")
    directory = tmp_path / "home" / "grafted"
    before = GraftedModel.load(directory).generate(["31676 4", "hello"], ["one", "base"], SHORT)
    remove_pack(directory, "two")
    after = GraftedModel.load(directory)
    assert after.generate(["31676 4", "hello"], ["one", "base"], SHORT) == before
    assert after.route(["?!?!"])[0].name != "two"


def test_a_moved_run_directory_still_loads(shelf: Path, tmp_path: Path) -> None:
    shutil.copytree(shelf.parent, tmp_path / "moved")
    assert set(GraftedModel.load(tmp_path / "moved" / "grafted").packs) == {"one", "two"}


def test_a_base_that_was_replaced_is_refused_before_it_answers_or_teaches(shelf: Path, tmp_path: Path) -> None:
    shutil.copytree(shelf.parent, tmp_path / "home")
    directory, weights = tmp_path / "home" / "grafted", tmp_path / "home" / "base" / "model.safetensors"
    before, asked = GraftedModel.load(directory), ["31676 4", "hello"]
    answers, routes = before.generate(asked, "base", SHORT), before.route(asked)
    write_rows(tmp_path / "late.jsonl", rows(5, answered=False, task="late"))
    kept = weights.rename(tmp_path / "kept.safetensors")
    shutil.copy(save_llama(tmp_path / "seed", seed=8) / "model.safetensors", weights)
    told = (
        r"base: expected the base of .*grafted \(\w{12}\), found other weights \(\w{12}\): they were changed or "
        r"replaced. Put the old ones back, or make packs of this base and run `graftllm fuse` again.$"
    )
    with pytest.raises(FusionError, match=told):
        GraftedModel.load(directory)
    with pytest.raises(FusionError, match=told):
        join_packs(directory, {"late": tmp_path / "home" / "one.safetensors"}, router_data=tmp_path / "late.jsonl")
    GraftedModel.load(directory, check=False)
    shutil.copy(kept, weights)  # another file with the same bytes
    after = GraftedModel.load(directory)
    assert after.generate(asked, "base", SHORT) == answers
    assert after.route(asked) == routes


def test_packs_are_shared_with_the_files_they_came_from(shelf: Path) -> None:
    assert (shelf / "packs" / "one.safetensors").samefile(shelf.parent / "one.safetensors")


def test_unknown_packs_are_named_with_the_known_ones(grafted: GraftedModel) -> None:
    with pytest.raises(FusionError, match="pack: expected one of base, auto, one, two; found 'three'"):
        grafted.generate(["hi"], "three")


def test_auto_needs_a_router(shelf: Path, tmp_path: Path) -> None:
    write_grafted(tmp_path / "plain", str(shelf.parent / "base"), {"one": shelf.parent / "one.safetensors"})
    plain = GraftedModel.load(tmp_path / "plain")
    with pytest.raises(FusionError, match="'auto' needs a router, and this grafted model has none"):
        plain.generate(["hi"])
    plain.generate(["hi"], "one", SHORT)


def test_with_rules_alone_the_base_answers_what_none_fits(shelf: Path, tmp_path: Path) -> None:
    packs, rules = {"one": shelf.parent / "one.safetensors"}, [Rule(pack="one", pattern="[0-9]")]
    write_grafted(tmp_path / "ruled", str(shelf.parent / "base"), packs, rules=rules)
    ruled = GraftedModel.load(tmp_path / "ruled")
    assert [(route.name, route.reason) for route in ruled.route(["1", "x"])] == [("one", "rule"), ("base", "no rule")]
    assert ruled.generate(["1", "x"], "auto", SHORT) == ruled.generate(["1", "x"], ["one", "base"], SHORT)


@pytest.mark.parametrize(("pack", "told"), [("three", ""), ("auto", " auto needs a router or rules")])
def test_a_chat_names_the_packs_before_anything_is_said(grafted: GraftedModel, pack: str, told: str) -> None:
    with pytest.raises(FusionError, match=f"pack: expected one of base, one, two; found '{pack}'.{told}"):
        Chat(GraftedModel(grafted.model, grafted.tokenizer, grafted.packs), pack, SHORT)


def test_a_changed_pack_is_refused(shelf: Path, tmp_path: Path) -> None:
    shutil.copytree(shelf.parent, tmp_path / "home")
    pack = tmp_path / "home" / "grafted" / "packs" / "one.safetensors"
    data = pack.read_bytes()
    pack.unlink()
    pack.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    told = r"one.safetensors: expected SHA-256 .*the file was changed, as by a copy.* `graftllm remove .*grafted one`"
    with pytest.raises(FusionError, match=told):
        GraftedModel.load(tmp_path / "home" / "grafted")
    pack.unlink()
    with pytest.raises(FusionError, match="the manifest names packs/one.safetensors, which is not there"):
        GraftedModel.load(tmp_path / "home" / "grafted")


def test_a_changed_router_is_refused(shelf: Path, tmp_path: Path) -> None:
    shutil.copytree(shelf.parent, tmp_path / "home")
    grafted = tmp_path / "home" / "grafted"
    (router,) = grafted.glob("router-*")
    data = router.read_bytes()
    router.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(FusionError, match=r"router-\w{12}.safetensors: expected what its name says, found \w{12}: it"):
        GraftedModel.load(grafted)
    router.unlink()
    router.mkdir()
    with pytest.raises(FusionError, match=r"router-\w{12}.safetensors: not a router of this version"):
        GraftedModel.load(grafted)


def test_packs_of_another_base_are_refused_and_nothing_is_written(shelf: Path, tmp_path: Path) -> None:
    other = save_llama(tmp_path / "other", intermediate_size=32)
    with pytest.raises(PackError, match="but the base model has"):
        write_grafted(tmp_path / "out", str(other), {"one": shelf.parent / "one.safetensors"})
    assert not (tmp_path / "out").exists()
    same_shape = Checkpoint.open(save_llama(tmp_path / "same", seed=8))
    delta = Delta(same_shape, Checkpoint.open(perturb(same_shape.path, tmp_path / "tuned", seed=1)))
    compress(delta, PackOptions(strategy="exact")).save(tmp_path / "third.safetensors")
    packs = {"third": tmp_path / "third.safetensors", "one": shelf.parent / "one.safetensors"}
    with pytest.raises(FusionError, match=r"one.safetensors: made for the base base \(\w{12}\), but .*same is \w{12}"):
        write_grafted(tmp_path / "out", str(same_shape.path), packs)


@pytest.mark.parametrize("name", ["base", "auto", "by-task", "general", "../x", ".x", "-x", "x²", "x" * 260])
def test_reserved_names_are_refused(shelf: Path, tmp_path: Path, name: str) -> None:
    for router_data in (None, shelf.parent / "router.jsonl"):
        with pytest.raises(
            FusionError, match=f"pack '{name}': expected a plain name other than base, auto, by-task an"
        ):
            fuse_packs(
                tmp_path / "out",
                str(shelf.parent / "base"),
                {name: shelf.parent / "one.safetensors"},
                router_data=router_data,
            )
    assert not (tmp_path / "out").exists()


def test_router_data_must_have_prompts_of_every_pack(shelf: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", rows(5, task="two"))
    packs = {name: shelf.parent / f"{name}.safetensors" for name in ("one", "two")}
    with pytest.raises(
        FusionError, match="rows.jsonl: no row has the task 'one'; the router needs prompts of every pack"
    ):
        fuse_packs(tmp_path / "out", str(shelf.parent / "base"), packs, router_data=tmp_path / "rows.jsonl")


def test_another_directory_is_no_grafted_model(base_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(FusionError, match="expected a grafted model, found no manifest.json in it"):
        GraftedModel.load(base_dir)
    (tmp_path / "manifest.json").write_text('{"base": 3}')
    with pytest.raises(FusionError, match=r"manifest.json: base: Input should be a valid string"):
        GraftedModel.load(tmp_path)


def test_default_decoding_is_greedy() -> None:
    assert (GREEDY.temperature, GREEDY.samples) == (0, 1)


def test_a_stream_that_outlives_its_block_goes_on_and_leaves_the_base(shelf: Path) -> None:
    grafted = GraftedModel.load(shelf)
    before = {name: digest(value) for name, value in grafted.model.state_dict().items()}
    whole = grafted.generate(["31676 4"], "one", SHORT)[0]
    with grafted.using("two"), grafted.using("one"):
        stream = grafted.stream("31676 4", "one", SHORT)
        begun = next(stream)
    assert begun + "".join(stream) == whole
    assert {name: digest(value) for name, value in grafted.model.state_dict().items()} == before


def test_conversations_may_come_one_by_one(grafted: GraftedModel) -> None:
    questions = ["31676 4", "?!?!"]
    assert grafted.generate(iter(questions), "one", SHORT) == grafted.generate(questions, "one", SHORT)


@pytest.mark.parametrize("odd", [5, ["hi"], [{"role": "user"}], [{"content": "x"}], []])
def test_what_is_no_conversation_is_refused(grafted: GraftedModel, odd: Any) -> None:
    with pytest.raises(FusionError, match="conversation: expected a text, or at least one message with `role` and"):
        grafted.generate([odd], "one", SHORT)


def test_what_else_a_message_says_is_kept_and_any_real_number_is_a_weight() -> None:
    conversation = [{"role": "user", "content": "hi", "name": "Ada"}]
    assert messages_of(conversation) is conversation  # type: ignore[arg-type]
    assert mixed({"one": np.float32(0.5)}, ["one"]) == (("one", 0.5),)


def test_a_model_that_is_moved_to_another_dtype_keeps_it(shelf: Path) -> None:
    grafted = GraftedModel.load(shelf)
    with grafted.using("one"):
        pass
    grafted.model.to(torch.float64)
    with grafted.using("one") as model:
        assert {value.dtype for value in model.parameters()} == {torch.float64}


def test_weights_beyond_what_a_dtype_holds_are_refused(grafted: GraftedModel) -> None:
    with pytest.raises(FusionError, match="expected weights whose sum stays within F32"):
        plug(grafted.model, (grafted.packs["one"], 1e300))
    with pytest.raises(FusionError, match="expected a finite weight for 'one', found 1e"):
        grafted.generate(["hi"], {"one": 1e39}, SHORT, way="beside")
    with pytest.raises(FusionError, match="expected a finite weight for 'one', found 'much'"):
        grafted.generate(["hi"], {"one": "much"}, SHORT)  # type: ignore[dict-item]
