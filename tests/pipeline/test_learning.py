"""A second skill joins a grafted model that has one; everything old stays what it was."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from graftllm.checkpoint import Checkpoint
from graftllm.errors import FusionError, RecipeError
from graftllm.fusion.directory import add_packs, remove_pack, set_rules, write_grafted
from graftllm.fusion.fitting import fit_router
from graftllm.fusion.grafted import GraftedModel
from graftllm.fusion.manifest import MANIFEST, read_manifest
from graftllm.fusion.routes import BASE
from graftllm.fusion.routing import Router
from graftllm.fusion.rules import Rule
from graftllm.pipeline.learning import Learned, learn
from graftllm.pipeline.work import Work, open_work
from graftllm.recipe import SamplingOptions
from graftllm.records import Prompt, read_prompts
from graftllm.rendering import render
from graftllm.skillpack import SkillPack
from graftllm.stages import Stages
from tests.conftest import TinyRun

SHORT = SamplingOptions(samples=1, temperature=0, top_p=1, max_new_tokens=16)


@dataclass(frozen=True)
class Taught:
    """A shelf with `next` that has learnt `double`, and what it was before."""

    work: Work
    shelf: Path
    learned: Learned
    files: dict[str, bytes]
    answers: list[str]


def _files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def _some(work: Work) -> list[Prompt]:
    sets = (*work.recipe.skills["next"].test, *work.recipe.general.test)
    return [row for one in sets for row in read_prompts(one.files[0])[:8]]


def _answers(shelf: Path, work: Work) -> list[str]:
    return GraftedModel.load(shelf).generate([row.question for row in _some(work)], "auto", SHORT)


@pytest.fixture(scope="module")
def taught(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Taught:
    shelf = tmp_path_factory.mktemp("taught") / "grafted"
    work = open_work(tiny_run.recipe, tiny_run.directory)
    prompts = {
        BASE: read_prompts(work.recipe.general.prompts[0].files[0]),
        "next": read_prompts(work.skill("next") / "sft.jsonl"),
    }
    router = fit_router(work.target.path, prompts)
    write_grafted(shelf, str(work.target.path), {"next": work.pack("next")}, router)
    before, answers = _files(shelf), _answers(shelf, work)
    return Taught(work, shelf, learn(work, shelf), before, answers)


def test_nothing_old_changes_when_a_skill_is_learnt(taught: Taught) -> None:
    learned = taught.learned
    assert (learned.rows, learned.columns) == (["before", "after double"], ["next", "double", "general"])
    assert learned.old == ["next", "general"]
    assert learned.moved == {"next": 0, "general": 0}
    routed = taught.work.directory / "stages" / "routed.after.double.json"
    assert ["next", {"next": 1.0}] in json.loads(routed.read_text())["result"]["next"]
    assert learned.forgotten == {"next": 0.0, "general": 0.0}
    assert learned.packs_unchanged
    assert learned.drift["double"] <= taught.work.recipe.router.drift
    assert _answers(taught.shelf, taught.work) == taught.answers
    assert "Old scores: identical." in learned.sentences()


def test_the_new_skill_is_there(taught: Taught, tiny_run: TinyRun) -> None:
    before, after = taught.learned.scores
    assert after[1] > before[1] + 0.2
    assert after[1] == pytest.approx(tiny_run.report.skills["double"].routed, abs=0.05)


def test_old_files_are_the_same_bytes(taught: Taught) -> None:
    now = _files(taught.shelf)
    name = "packs/next.safetensors"
    assert now[name] == taught.files[name]


def test_the_matrix_is_written(taught: Taught) -> None:
    assert json.loads((taught.work.directory / "forgetting.json").read_text())["rows"] == taught.learned.rows
    assert "| after double |" in (taught.work.directory / "forgetting.md").read_text()


def test_learning_again_does_nothing(taught: Taught) -> None:
    before = _files(taught.shelf)
    assert learn(taught.work, taught.shelf) == taught.learned
    assert _files(taught.shelf) == before


def test_a_kill_between_adding_and_noting_it_is_mended(taught: Taught) -> None:
    before = _files(taught.shelf)
    (taught.work.directory / "stages" / "join.double.json").unlink()
    assert learn(taught.work, taught.shelf) == taught.learned  # the drift, too
    assert _files(taught.shelf) == before


def test_what_is_on_the_shelf_counts_not_what_was_put_there_once(taught: Taught) -> None:
    before = _files(taught.shelf)
    remove_pack(taught.shelf, "double")
    assert learn(taught.work, taught.shelf) == taught.learned
    assert _files(taught.shelf) == before
    remove_pack(taught.shelf, "double")
    add_packs(taught.shelf, {"double": taught.work.pack("next")})
    with pytest.raises(
        FusionError,
        match=r"grafted: expected the pack 'double' that this recipe makes, found another \(\w{12}\); remove it first "
        r"\(`graftllm remove .*grafted double`\), or give the skill another name.",
    ):
        learn(taught.work, taught.shelf)
    remove_pack(taught.shelf, "double")
    assert learn(taught.work, taught.shelf) == taught.learned
    assert _files(taught.shelf) == before


def test_the_last_row_is_of_the_shelf_as_it_is(taught: Taught) -> None:
    set_rules(taught.shelf, [Rule(pack="base", pattern="next letter")])
    found = learn(taught.work, taught.shelf)
    assert found.forgotten["next"] > 0.2 and found.moved["next"] > 0
    set_rules(taught.shelf, [])
    assert learn(taught.work, taught.shelf) == taught.learned


def test_the_recipe_says_how_many_old_prompts_a_new_pack_may_move(
    taught: Taught, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _files(taught.shelf)
    remove_pack(taught.shelf, "double")
    with monkeypatch.context() as patched:
        patched.setattr(Router, "drift", lambda *_: {"base": 0.0, "next": 0.5})
        with pytest.raises(FusionError, match="50.0% of the held-out prompts of 'next' .* and 1.0% of any"):
            learn(taught.work, taught.shelf)
        assert "double" not in read_manifest(taught.shelf).packs
        router = taught.work.recipe.router.model_copy(update={"drift": 0.6})
        lax = replace(taught.work, recipe=taught.work.recipe.model_copy(update={"router": router}))
        assert learn(lax, taught.shelf).drift == {"double": 0.5}
    remove_pack(taught.shelf, "double")
    assert learn(taught.work, taught.shelf) == taught.learned
    assert _files(taught.shelf) == before


def test_another_target_and_unknown_packs_are_refused(taught: Taught, tiny_run: TinyRun, tmp_path: Path) -> None:
    with pytest.raises(FusionError, match="pack: expected one of next, double; found 'law'"):
        learn(taught.work, taught.shelf, on=["law"])
    elsewhere = Work(taught.work.recipe, tmp_path / "elsewhere", Stages(tmp_path / "elsewhere" / "stages"))
    with pytest.raises(FusionError, match="found 'law'"):
        learn(elsewhere, taught.shelf, on=["law"])
    assert not elsewhere.directory.exists()  # nothing was measured first
    text = tiny_run.recipe.read_text().replace("{dir}", str(tiny_run.directory))
    (tmp_path / "r.yaml").write_text(text.replace('zoo/target"', 'skills/next/tuned"', 1))
    with pytest.raises(RecipeError, match="target: expected the base of .*grafted, .*, found .*tuned"):
        learn(open_work(tmp_path / "r.yaml", tmp_path / "run"), taught.shelf)


def test_a_skill_learnt_on_a_pack_holds_what_that_knows(taught: Taught, tiny_run: TinyRun, tmp_path: Path) -> None:
    text = tiny_run.recipe.read_text().replace("{dir}", str(tiny_run.directory))
    quick = {"epochs: 6": "epochs: 0.5", "dpo: {epochs: 1": "dpo: {epochs: 0.1", "samples: 2": "samples: 1"}
    for before, after in quick.items():
        assert before in text
        text = text.replace(before, after)
    (tmp_path / "r.yaml").write_text(text)
    work, packs = open_work(tmp_path / "r.yaml", tmp_path / "run"), {"next": taught.work.pack("next")}
    prompts = {
        BASE: read_prompts(work.recipe.general.prompts[0].files[0]),
        "next": read_prompts(taught.work.skill("next") / "sft.jsonl"),
    }
    write_grafted(tmp_path / "g", str(work.target.path), packs, fit_router(work.target.path, prompts))
    learn(work, tmp_path / "g", on=["next"])
    old, new = (SkillPack.load(path) for path in (packs["next"], work.pack("double")))
    deltas = [
        torch.cat([pack.delta(name, work.target.tensor(name)).flatten() for name in work.target.specs])
        for pack in (old, new)
    ]
    assert torch.cosine_similarity(*deltas, dim=0) > 0.5


@torch.inference_mode()
def test_a_pack_can_be_subtracted(taught: Taught) -> None:
    """Detox, as far as it goes here: what a pack adds at weight 1 it takes away from an answer at weight -1."""
    grafted = GraftedModel.load(taught.shelf)
    row = read_prompts(taught.work.recipe.skills["next"].test[0].files[0])[0]
    likelihood = {}
    for weight in (-0.5, 0.0, 0.5):
        with grafted.using({"next": weight}) as model:
            question = render(grafted.tokenizer, row.question, answer_next=True)
            ids = [*question, *grafted.tokenizer(row.reference)["input_ids"]]
            logits = model(input_ids=torch.tensor([ids])).logits[0, len(question) - 1 : -1].log_softmax(dim=1)
            likelihood[weight] = float(logits.gather(1, torch.tensor(ids[len(question) :])[:, None]).sum())
    assert likelihood[-0.5] < likelihood[0.0] < likelihood[0.5]


def test_unlearning_gives_the_old_model_back_bit_for_bit(taught: Taught) -> None:
    """The last test here: it takes the learnt pack away."""
    remove_pack(taught.shelf, "double")
    assert json.loads((taught.shelf / MANIFEST).read_bytes()) == json.loads(taught.files[MANIFEST])
    assert _files(taught.shelf) == taught.files
    assert _answers(taught.shelf, taught.work) == taught.answers
    add_packs(taught.shelf, {"double": taught.work.pack("double")})
    assert read_manifest(taught.shelf).unrouted() == ["double"]
    assert Checkpoint.open(taught.work.target.path).fingerprint == read_manifest(taught.shelf).fingerprint
