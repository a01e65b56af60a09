import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from graftllm.checkpoint import Checkpoint
from graftllm.delta import Delta, difference, growable
from graftllm.errors import CheckpointError
from tests.models import perturb, save_llama, with_head, with_vocabulary


def test_delta_is_tuned_minus_base_in_float32(base: Checkpoint, tuned: Checkpoint) -> None:
    delta = Delta(base, tuned)
    assert list(delta) == base.names()
    assert len(delta) == len(base.specs)
    for name, change in delta.items():
        assert change.dtype == torch.float32
        assert torch.equal(change, tuned.tensor(name).float() - base.tensor(name).float())


def test_a_delta_is_shown_in_one_line_by_the_places_of_its_sides(delta: Delta) -> None:
    sides = (f"Checkpoint(path={side.path!r}, name={side.name!r})" for side in (delta.base, delta.tuned))
    assert repr(delta) == "Delta(base={}, tuned={})".format(*sides)


def test_only_more_rows_of_the_same_width_are_added_vocabulary() -> None:
    assert growable((64,), (65,)) and growable((64, 2), (512, 2))
    for tuned in ((), (64,), (63,), (513,), (65, 1), (65, 2)):
        assert not growable((64,), tuned)
    assert not growable((), ()) and not growable((), (3,))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_diverged_tuned_model_is_refused(base_dir: Path, tmp_path: Path, value: float) -> None:
    broken = perturb(base_dir, tmp_path / "broken", seed=2)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][3] = value
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    delta = Delta(Checkpoint.open(base_dir), Checkpoint.open(broken))
    with pytest.raises(
        CheckpointError, match=r"tensor 'model.norm.weight': 1 of 32 differences to the base are NaN, infinite"
    ):
        delta["model.norm.weight"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 64}, r"not the same architecture; check that one was trained from the other"),
        ({"num_hidden_layers": 3}, r"has no tensor 'model.layers.2.input_layernorm.weight', which .*other has"),
        ({"tie_word_embeddings": False}, r"base: ties the output head to its embedding, but .*other has its own"),
    ],
)
def test_models_of_different_shape_or_tying_are_refused(
    base: Checkpoint, tmp_path: Path, change: dict, message: str
) -> None:
    other = Checkpoint.open(save_llama(tmp_path / "other", **change))
    with pytest.raises(CheckpointError, match=message):
        Delta(base, other)


@pytest.mark.parametrize(("rows", "config"), [(75, 73), (72, 72), (73 * 9, 73 * 9)])
def test_vocabularies_that_did_not_grow_by_adding_tokens_are_refused(
    base_dir: Path, base: Checkpoint, tmp_path: Path, rows: int, config: int
) -> None:
    other = Checkpoint.open(with_vocabulary(base_dir, tmp_path / "other", rows, config=config))
    with pytest.raises(
        CheckpointError,
        match=rf"has shape \[{rows}, 32\], but .* has \[73, 32\]. Their vocabularies differ \(73 and {config} tokens",
    ):
        Delta(base, other)


def test_added_vocabulary_rows_are_a_delta_to_zero_rows(base_dir: Path, base: Checkpoint, tmp_path: Path) -> None:
    tuned = Checkpoint.open(with_vocabulary(base_dir, tmp_path / "tuned", 80))
    delta = Delta(base, tuned)
    name = "model.embed_tokens.weight"
    before, after = delta.pair(name)
    assert before.shape == after.shape == (80, 32)
    assert torch.equal(before[:73], base.tensor(name))
    assert not before[73:].any()
    assert torch.equal(delta[name][73:], tuned.tensor(name)[73:].float())
    assert delta.config_changes() == {"vocab_size": 80}


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "bfloat16")])
def test_a_base_in_another_dtype_is_brought_to_the_tuned_one(tmp_path: Path, dtypes: tuple[str, str]) -> None:
    base, tuned = (
        Checkpoint.open(save_llama(tmp_path / name, seed=seed, dtype=getattr(torch, dtype)))
        for seed, (name, dtype) in enumerate(zip(("base", "tuned"), dtypes, strict=True))
    )
    delta = Delta(base, tuned)
    for name in delta:
        before, after = delta.pair(name)
        assert before.dtype == after.dtype == getattr(torch, dtypes[1])
        assert torch.equal(before, base.tensor(name).to(after.dtype))


def test_numbers_of_another_kind_are_refused(base_dir: Path, base: Checkpoint, tmp_path: Path) -> None:
    other = perturb(base_dir, tmp_path / "other", seed=0)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' is I8, but .*base has BF16. Save both in the same"):
        Delta(base, Checkpoint.open(other))


def test_shards_may_be_cut_elsewhere(base_dir: Path, tuned_dir: Path, delta: Delta, tmp_path: Path) -> None:
    for name, directory, size in (("base", base_dir, "20KB"), ("tuned", tuned_dir, "9KB")):
        AutoModelForCausalLM.from_pretrained(directory).save_pretrained(tmp_path / name, max_shard_size=size)
    sharded = Delta(Checkpoint.open(tmp_path / "base"), Checkpoint.open(tmp_path / "tuned"))
    assert len(set(sharded.base.shards.values())) != len(set(sharded.tuned.shards.values()))
    assert all(torch.equal(sharded[name], delta[name]) for name in delta)


def _with_config(directory: Path, out: Path, **changes: object) -> Path:
    perturb(directory, out, seed=1)
    settings = json.loads((out / "config.json").read_text()) | changes
    (out / "config.json").write_text(json.dumps(settings))
    return out


def test_a_vocabulary_that_only_the_config_calls_another_is_none(
    base_dir: Path, base: Checkpoint, tmp_path: Path
) -> None:
    delta = Delta(base, Checkpoint.open(_with_config(base_dir, tmp_path / "tuned", vocab_size=80, eos_token_id=[3, 4])))
    assert delta.config_changes() == {"eos_token_id": [3, 4]}


@pytest.mark.parametrize("value", ["<end>", 3.5, [3, "x"], True])
def test_token_ids_that_are_none_are_refused(base_dir: Path, base: Checkpoint, tmp_path: Path, value: object) -> None:
    delta = Delta(base, Checkpoint.open(_with_config(base_dir, tmp_path / "tuned", eos_token_id=value)))
    with pytest.raises(
        CheckpointError, match=r"config.json: expected an integer of 64 bits, .* for 'eos_token_id', found"
    ):
        delta.config_changes()


def _with_another(base: Path, out: Path, name: str, *, like: str, changed: bool = False) -> Checkpoint:
    """Save a perturbed checkpoint that has one of its tensors under another name, too, or that with one other value."""
    tensors = load_file(perturb(base, out, seed=1) / "model.safetensors")
    tensors[name] = tensors[like].clone()
    tensors[name][0, 0] += changed
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint.open(out)


def test_a_tied_head_that_the_tuned_checkpoint_saved_as_well_is_no_parameter_of_its_own(
    base_dir: Path, base: Checkpoint, tmp_path: Path
) -> None:
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    assert list(Delta(base, _with_another(base_dir, tmp_path / "tuned", head, like=embedding))) == base.names()
    with pytest.raises(
        CheckpointError, match="tuned: saves its embedding once more as 'lm_head.weight', to which it is"
    ):
        Delta(Checkpoint.open(tmp_path / "tuned"), base)
    other = _with_another(base_dir, tmp_path / "other", head, like=embedding, changed=True)
    with pytest.raises(CheckpointError, match="base: ties the output head to its embedding, but .*other has its own"):
        Delta(base, other)


def test_a_head_that_both_checkpoints_saved_is_tied_where_it_is_the_embedding_on_both_sides(
    base_dir: Path, tuned_dir: Path, tmp_path: Path
) -> None:
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    base, tuned = (with_head(path, tmp_path / path.name) for path in (base_dir, tuned_dir))
    delta = Delta(Checkpoint.open(base), Checkpoint.open(tuned))
    assert delta.tied == {head: embedding}
    assert [*delta.distinct, head] == sorted(delta, key=head.__eq__)
    own = _with_another(base_dir, tmp_path / "own", head, like=embedding, changed=True)
    assert not Delta(Checkpoint.open(base), own).tied
    assert not Delta(own, Checkpoint.open(tuned)).tied


def test_a_tensor_that_only_the_tuned_checkpoint_has_is_named_whatever_it_equals(
    base_dir: Path, base: Checkpoint, tmp_path: Path
) -> None:
    name = "model.layers.0.output_layer.weight"
    tuned = _with_another(base_dir, tmp_path / "tuned", name, like="model.layers.0.mlp.up_proj.weight")
    with pytest.raises(CheckpointError, match=f"'{name}'"):
        Delta(base, tuned)


def test_differences_whose_squares_overflow_are_refused() -> None:
    with pytest.raises(
        CheckpointError, match=r"here: 1 of 2 differences to the base are NaN, infinite or above 2 \*\* 48"
    ):
        difference(torch.zeros(2), torch.tensor([1e36, 1.0]), where="here")


def test_a_changed_chat_template_is_noticed(base_dir: Path, base: Checkpoint, tmp_path: Path) -> None:
    other = perturb(base_dir, tmp_path / "other", seed=0)
    assert not Delta(base, Checkpoint.open(other)).companions()
    (other / "chat_template.jinja").write_text("{{ messages }}")
    found = {name: one for name, one in Delta(base, Checkpoint.open(other)).companions().items() if one is not None}
    assert found == {"chat_template.jinja": b"{{ messages }}"}


def test_one_of_several_vocabularies_may_grow(base_dir: Path, tmp_path: Path) -> None:
    tuned = with_vocabulary(base_dir, tmp_path / "tuned", 80)
    base = Path(shutil.copytree(base_dir, tmp_path / "base"))
    for home, size in ((base, 73), (tuned, 80)):
        config = json.loads((home / "config.json").read_text())
        config = {"audio_config": {"vocab_size": 128}, "text_config": {"vocab_size": config.pop("vocab_size")}} | config
        assert config["text_config"]["vocab_size"] == size
        (home / "config.json").write_text(json.dumps(config))
    delta = Delta(Checkpoint.open(base), Checkpoint.open(tuned))
    assert delta.config_changes() == {"text_config.vocab_size": 80}


@pytest.mark.parametrize("ids", [2**70, list(range(5000))])
def test_token_ids_that_no_pack_holds_are_refused(base_dir: Path, tuned_dir: Path, tmp_path: Path, ids: object) -> None:
    tuned = Path(shutil.copytree(tuned_dir, tmp_path / "tuned"))
    config = json.loads((tuned / "config.json").read_text()) | {"eos_token_id": ids}
    (tuned / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="expected an integer of 64 bits, a list of at most 4096 or null for"):
        Delta(Checkpoint.open(base_dir), Checkpoint.open(tuned)).config_changes()
