from dataclasses import replace
from pathlib import Path

import pytest

from graftllm.checkpoint import Checkpoint, copy_companions
from graftllm.delta import Delta
from graftllm.errors import TrainingError
from graftllm.fusion.applying import apply_packs
from graftllm.fusion.directory import write_grafted
from graftllm.fusion.grafted import GraftedModel
from graftllm.fusion.rules import Rule
from graftllm.fusion.voices import Voices
from graftllm.generation import generate
from graftllm.loading import load_model, load_tokenizer
from graftllm.packer import compress
from graftllm.packing_options import PackOptions, Strategy
from graftllm.pipeline.transfer import tune
from graftllm.pipeline.work import Work
from graftllm.recipe import Recipe
from graftllm.records import Message, PreferencePair, Prompt, write_rows
from graftllm.skillpack import SkillPack
from graftllm.stages import Stages
from graftllm.training.tuning import Training, train_dpo, train_sft
from graftllm.training_options import DpoOptions, SftOptions
from tests.models import save_llama

WORDS = ("alfa", "bravo")
SFT = SftOptions(epochs=20, batch_size=8, learning_rate=3e-3, max_length=64)


def _row(letter: str, word: str) -> Prompt:
    messages = (Message(role="user", content=f"say {letter}"), Message(role="assistant", content=f"{word} {word}"))
    return Prompt(letter, messages, reference=f"{word} {word}")


ROWS = [replace(_row(*pair), id=f"{i}{pair[0]}") for i in range(20) for pair in (("A", "alfa"), ("B", "bravo"))]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(save_llama(tmp_path_factory.mktemp("added") / "base"))


@pytest.fixture(scope="module")
def tuned(base: Checkpoint) -> Checkpoint:
    out = base.path.with_name("tuned")
    train_sft(Training(base.path, out, 0, "x", added_tokens=WORDS), ROWS, SFT)
    return Checkpoint.open(out)


def _answers(model: Path, tokenizer: Path) -> list[str]:
    live, words = load_model(model, device="cpu"), load_tokenizer(tokenizer)
    return [texts[0] for texts in generate(live, words, [row.question for row in ROWS[:2]])]


def test_a_fine_tune_has_a_token_and_an_embedding_row_for_each(base: Checkpoint, tuned: Checkpoint) -> None:
    words, known = load_tokenizer(tuned.path), len(load_tokenizer(base.path))
    assert [words.convert_tokens_to_ids(word) for word in WORDS] == [known, known + 1]
    assert tuned.specs["model.embed_tokens.weight"].shape == (known + 2, 32)
    assert _answers(tuned.path, tuned.path) == ["alfa alfa", "bravo bravo"]
    delta = Delta(base, tuned)
    assert delta.config_changes() == {"vocab_size": known + 2}
    assert delta.companions()["tokenizer.json"] == (tuned.path / "tokenizer.json").read_bytes()
    changed = {key for key, value in base.config.items() if tuned.config[key] != value}
    assert changed <= {"vocab_size", "transformers_version"}


@pytest.mark.parametrize("strategy", ["exact", "auto", "paper"])
def test_a_pack_of_it_applies_with_the_tuned_tokenizer(
    base: Checkpoint, tuned: Checkpoint, tmp_path: Path, strategy: Strategy
) -> None:
    compress(Delta(base, tuned), PackOptions(strategy=strategy), calibration=ROWS).save(tmp_path / "p.safetensors")
    pack = SkillPack.load(tmp_path / "p.safetensors")
    apply_packs(base, [(pack, 1.0)], tmp_path / "out")
    assert Checkpoint.open(tmp_path / "out").specs == tuned.specs
    assert _answers(tmp_path / "out", tmp_path / "out") == ["alfa alfa", "bravo bravo"]


def test_a_grafted_model_answers_with_them_and_has_its_own_rows_afterwards(
    base: Checkpoint, tuned: Checkpoint, tmp_path: Path
) -> None:
    compress(Delta(base, tuned), PackOptions(strategy="exact")).save(tmp_path / "p.safetensors")
    rule = Rule(pack="say", pattern="^say")
    write_grafted(tmp_path / "g", str(base.path), {"say": tmp_path / "p.safetensors"}, rules=[rule])
    grafted = GraftedModel.load(tmp_path / "g", device="cpu")
    questions, known = [row.question for row in ROWS[:2]], base.specs["model.embed_tokens.weight"].shape[0]
    before = grafted.generate(questions, "base")
    assert grafted.generate(questions, "say") == ["alfa alfa", "bravo bravo"]
    assert grafted.generate(questions, ["say", "base"]) == ["alfa alfa", before[1]]
    assert "".join(grafted.stream(questions[0], "say")) == "alfa alfa"
    assert grafted.generate(questions[:1]) == ["alfa alfa"]
    with grafted.using("say") as model:
        assert Voices(model, grafted.tokenizer, grafted.packs).base.rows == grafted.voices.base.rows == known
        assert model.get_output_embeddings().out_features == model.config.vocab_size == known + 2
    assert model.get_input_embeddings().weight.shape[0] == model.get_input_embeddings().num_embeddings == known
    assert model.get_output_embeddings().out_features == model.config.vocab_size == known
    assert model.get_input_embeddings().weight.equal(load_model(base.path, device="cpu").get_input_embeddings().weight)
    assert grafted.generate(questions, "base") == before


def test_tokens_that_are_there_already_add_no_row(tuned: Checkpoint, tmp_path: Path) -> None:
    options = SFT.model_copy(update={"epochs": 1})
    train_sft(Training(tuned.path, tmp_path / "out", 0, "x", added_tokens=WORDS), ROWS, options)
    out = Checkpoint.open(tmp_path / "out")
    assert out.specs == tuned.specs
    assert load_tokenizer(out.path).get_vocab() == load_tokenizer(tuned.path).get_vocab()


def test_preference_tuning_goes_on_with_them(tuned: Checkpoint, tmp_path: Path) -> None:
    pairs = [PreferencePair(row.id, row.question, row.reference or "", "alfa") for row in ROWS[:8]]
    options = DpoOptions(epochs=1, batch_size=8, learning_rate=1e-4, max_length=64)
    train_dpo(Training(tuned.path, tmp_path / "out", 0, "x"), pairs, options)
    assert Checkpoint.open(tmp_path / "out").specs == tuned.specs
    assert _answers(tmp_path / "out", tmp_path / "out") == ["alfa alfa", "bravo bravo"]


def test_spare_rows_are_used_first(base: Checkpoint, tmp_path: Path) -> None:
    roomy, known = load_model(base.path, device="cpu"), len(load_tokenizer(base.path))
    roomy.resize_token_embeddings(known + 5)
    copy_companions(base, tmp_path)
    roomy.save_pretrained(tmp_path)
    options = SFT.model_copy(update={"epochs": 1})
    train_sft(Training(tmp_path, tmp_path / "out", 0, "x", added_tokens=WORDS), ROWS, options)
    assert not Delta(Checkpoint.open(tmp_path), Checkpoint.open(tmp_path / "out")).config_changes()
    assert len(load_tokenizer(tmp_path / "out")) == known + 2


def test_a_lora_adds_none(base: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"^x: added_tokens need new embedding rows, which a LoRA does not train;"):
        train_sft(Training(base.path, tmp_path / "out", 0, "x", lora_rank=2, added_tokens=WORDS), ROWS, SFT)
    assert not (tmp_path / "out").exists()


def _work(base: Checkpoint, directory: Path, **changes: object) -> Work:
    rows = {"prompts": str(directory / "prompts.jsonl"), "test": str(directory / "prompts.jsonl")}
    skill = {"sources": [str(base.path)], "added_tokens": list(WORDS), **rows}
    sft = {"epochs": 1, "batch_size": 8, "learning_rate": 3e-3, "max_length": 64}
    content = {
        "name": "x",
        "target": str(base.path),
        "skills": {"say": skill},
        "general": rows,
        "sft": sft,
        "dpo": None,
    }
    return Work(Recipe.model_validate(content | changes), directory, Stages(directory / "stages"), "cpu")


def test_a_recipe_names_them_for_a_skill(base: Checkpoint, tmp_path: Path) -> None:
    work = _work(base, tmp_path)
    write_rows(work.skill("say") / "sft.jsonl", ROWS)
    tune(work, "say", base.path, work.tuned("say"), name="say")
    assert len(load_tokenizer(work.tuned("say"))) == len(load_tokenizer(base.path)) + 2
    adapter = work.tuned("say").with_name("lora")
    tune(work, "say", base.path, adapter, name="lora", lora_rank=2)  # learns the words by their letters
    assert (adapter / "adapter_model.safetensors").exists()


def test_a_recipe_for_loras_refuses_them(base: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="added_tokens: a LoRA trains no embedding rows; take `method: full`"):
        _work(base, tmp_path, method="lora", lora={"rank": 2})


def test_a_sum_of_packs_of_different_vocabularies_is_refused_before_a_run(base: Checkpoint, tmp_path: Path) -> None:
    recipe = _work(base, tmp_path).recipe.model_dump(mode="json")
    recipe["skills"]["other"] = recipe["skills"]["say"] | {"added_tokens": []}
    Recipe.model_validate(recipe)
    with pytest.raises(ValueError, match=r"added_tokens: packs of different vocabularies have no sum; give all skills"):
        Recipe.model_validate(recipe | {"compare": ["summed"]})
