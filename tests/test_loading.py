import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from graftllm.checkpoint import Checkpoint, copy_companions
from graftllm.errors import CheckpointError
from graftllm.loading import load_model, load_tokenizer
from graftllm.records import Message
from graftllm.rendering import render
from graftllm.streaming import is_language_model
from tests.models import save_llama, save_reward_model


def test_a_given_chat_template_stands_in_for_the_tokenizers_own(base: Checkpoint, tmp_path: Path) -> None:
    template = "{% for m in messages %}<user>{{ m.content }}{% endfor %}{% if add_generation_prompt %}?{% endif %}"
    (tmp_path / "chat.jinja").write_text(template)
    for given in (template, str(tmp_path / "chat.jinja")):
        words = load_tokenizer(base.path, chat_template=given)
        assert words.decode(render(words, [Message(role="user", content="ab")], answer_next=True)) == "<user>ab?"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("no/chat.jinja", r"chat_template: expected a Jinja template or a file that holds one, found 'no/chat.jinja'"),
        ("{% for m in messages %}", r"chat_template: expected a Jinja template that renders a user's message \(Unexp"),
        ("{{ raise_exception('no users') }}", r"that renders a user's message \(no users\)\.$"),
    ],
)
def test_what_is_no_chat_template_is_refused(base: Checkpoint, given: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(base.path, chat_template=given)


@pytest.mark.parametrize("load", [load_model, load_tokenizer, lambda path: is_language_model(Checkpoint.open(path))])
def test_code_beside_a_model_is_not_run_whatever_stands_on_stdin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Callable[[Path], object]
) -> None:
    place, ran = save_llama(tmp_path / "model"), tmp_path / "ran"
    classes = "class C(LlamaConfig):\n    model_type = 'theirs'\nclass T(PreTrainedTokenizerFast):\n    pass\n"
    (place / "theirs.py").write_text(
        f"from transformers import LlamaConfig, PreTrainedTokenizerFast\nopen({str(ran)!r}, 'w')\n{classes}"
    )
    for file, auto_map in (
        ("config", {"AutoConfig": "theirs.C"}),
        ("tokenizer_config", {"AutoTokenizer": ["theirs.T"] * 2}),
    ):
        told = json.loads((place / f"{file}.json").read_text())
        told |= {"auto_map": auto_map, "model_type": "theirs", "tokenizer_class": "T"}
        (place / f"{file}.json").write_text(json.dumps(told))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(CheckpointError, match="transformers cannot"):
        load(place)
    assert not ran.exists()


@pytest.mark.parametrize(("key", "value"), [("vocab_size", [1]), ("hidden_size", "wide")])
def test_a_config_of_wrong_types_is_one_line(tmp_path: Path, key: str, value: object) -> None:
    place = save_llama(tmp_path / "model")
    (place / "config.json").write_text(json.dumps(json.loads((place / "config.json").read_text()) | {key: value}))
    for load in (load_model, lambda path: is_language_model(Checkpoint.open(path))):
        with pytest.raises(CheckpointError, match="transformers cannot") as raised:
            load(place)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("named", [5, "LlamaForCausalLM", [], ["pipeline"], [1]])
def test_a_config_that_names_no_class_of_a_model_is_refused(tmp_path: Path, named: object) -> None:
    place = save_llama(tmp_path / "model")
    told = json.loads((place / "config.json").read_text()) | {"architectures": named}
    (place / "config.json").write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match="has no model class"):
        is_language_model(Checkpoint.open(place))


def test_models_are_loaded_in_float32_on_cpu(base: Checkpoint) -> None:
    assert load_model(base.path).dtype == torch.float32


def test_what_is_no_language_model_is_named(tmp_path: Path, base_dir: Path) -> None:
    with pytest.raises(CheckpointError, match="found nothing"):
        load_model(tmp_path / "none")
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    (tmp_path / "model.safetensors").write_bytes((base_dir / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="transformers cannot load it as a causal language model"):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match="transformers cannot load its tokenizer"):
        load_tokenizer(tmp_path)


def test_a_parameter_that_the_checkpoint_lacks_is_not_drawn_at_random(tmp_path: Path) -> None:
    save_reward_model(tmp_path)
    with pytest.raises(
        CheckpointError,
        match=r"has no tensor for 'lm_head.weight' of LlamaForCausalLM, which .* config.json names another class",
    ):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}}'),
        ("tokenizer_config.json", '{"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": 5}'),
    ],
)
def test_a_damaged_tokenizer_is_one_line(base: Checkpoint, tmp_path: Path, name: str, told: str) -> None:
    copy_companions(base, tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / name).write_text(told)
    with pytest.raises(CheckpointError, match=r"transformers cannot load its tokenizer \([^\n]+\)\.$"):
        load_tokenizer(tmp_path)
