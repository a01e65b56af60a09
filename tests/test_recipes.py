"""The recipes that come with the project: each is whole, says what it needs, and holds the published settings."""

import re
from pathlib import Path

import pytest
import yaml

from graftllm.recipe import Recipe, load_recipe
from graftllm.transfer_options import LlmJudge, RewardJudge, Skill

RECIPES = Path(__file__).parents[1] / "recipes"
FILES = sorted(RECIPES.glob("*.yaml"))


def _recipe(name: str) -> Recipe:
    return load_recipe(RECIPES / f"{name}.yaml")[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_says_what_it_needs(path: Path) -> None:
    recipe, directory = load_recipe(path)
    assert recipe.name == path.stem
    assert directory == Path("runs") / path.stem
    if path.stem != "demo":
        opening = path.read_text().split("\nname:")[0]
        assert "\n# Needs\n" in opening
        for section in (*recipe.skills.values(), recipe.general):
            for one in (*section.prompts, *section.test):
                for file in one.files:
                    assert Path(file).is_relative_to(RECIPES)
                    assert str(Path(file).relative_to(RECIPES)) in opening, file


def _keys(text: str) -> list[str]:
    """Return what looks like a key: by its prefix, by the name that it stands behind, or by being long and random."""
    known = re.findall(r"\b(?:sk|pk|rk|hf|gsk|ghp|glpat|xai|AKIA|AIza)[-_]?[A-Za-z0-9_-]{12,}", text)
    named = re.findall(
        r"(?i)\b(?:(?:api_?key|token|secret|password)['\"]?\s*[:=]|bearer\s)\s*['\"]?([^\s'\",}]+)", text
    )
    env = re.findall(r"api_key_env:\s*(?![A-Z][A-Z0-9_]{0,40}\s)(\S+)", text)  # a variable is not its value
    random = [
        word
        for word in re.findall(r"[A-Za-z0-9_+]{24,}", text)
        if re.search(r"[0-9]", word) and re.search(r"[a-z]", word) and re.search(r"[A-Z]", word)
    ]
    return [*known, *named, *env, *random, *re.findall(r"https?://[^\s/]*@\S*|https?://\S*[?&]\S*=\S*", text)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_recipe_holds_a_key(path: Path) -> None:
    assert _keys(path.read_text()) == []
    recipe, _ = load_recipe(path)
    for skill in recipe.skills.values():
        for asked in (*skill.sources, *(judge for judge in (skill.tested_by,) if isinstance(judge, LlmJudge))):
            assert asked.url is None or asked.url.startswith("http://") or asked.api_key_env


@pytest.mark.parametrize(
    "held",
    [
        "api_key_env: sk-" + "abcdef0123456789" * 2, "model: m # sk-proj-" + "x1Y2" * 5, "x: hf_" + "aBcD" * 8,
        "api_key: 12345", "API_KEY=abc", "Authorization: Bearer abc", "note: " + "a1B2c3D4" * 5,
        "url: https://me:pw@host/v1", "url: https://host/v1?key=abc", "api_key_env: lowercase1value ",
    ],
)  # fmt: skip
def test_a_key_would_be_found(held: str) -> None:
    text = (RECIPES / "implicit-fusion-llama3.1-8b.yaml").read_text()
    assert _keys(f"{text}\n{held}\n") != []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_single_refused_requests_do_not_stop_a_recipe_that_asks_many(path: Path) -> None:
    for skill in load_recipe(path)[0].skills.values():
        assert all(10 <= source.max_failures <= 100 for source in skill.sources if source.url)


def test_implicit_fusion_has_the_published_samples_judges_and_gaps() -> None:
    recipe = _recipe("implicit-fusion-llama3.1-8b")
    skills = recipe.skills
    names = ["gemma-2-27b-it", "Mistral-Large-Instruct-2407", "Qwen2.5-72B-Instruct", "Llama-3.1-70B-Instruct"]
    for skill, samples in (("instruction", 5), ("code", 8)):
        assert [source.name for source in skills[skill].sources] == names
        for source in skills[skill].sources:
            drawn = source.sampling
            assert drawn is not None
            assert drawn.samples == samples
            expected = (0.7, 0.8, 1.05) if "Qwen" in source.name else (0.8, 0.95, 1.0)
            assert (drawn.temperature, drawn.top_p, drawn.repetition_penalty) == expected
    assert [source.name for source in skills["chinese"].sources] == ["Qwen2.5-72B-Instruct"]
    assert [[judge.kind for judge in skill.judge] for skill in skills.values()] == [
        ["reward_model"], ["math", "reward_model"], ["code", "reward_model"], ["reward_model"],
    ]  # fmt: skip
    models = {judge.model for skill in skills.values() for judge in skill.judge if isinstance(judge, RewardJudge)}
    assert models == {"RLHFlow/ArmoRM-Llama3-8B-v0.1"}
    for name in ("instruction", "math", "code"):
        pairs = skills[name].pairs
        assert pairs is not None
        assert (pairs.preference, pairs.min_gap, pairs.max_gap) == ("same_source", 0.01, 0.1)
    assert [skill.pairs and skill.pairs.sft_share for skill in skills.values()] == [0.4, 0.77, 0.75, 1.0]


def test_the_two_targets_of_implicit_fusion_differ_in_training_alone() -> None:
    llama, qwen = _recipe("implicit-fusion-llama3.1-8b"), _recipe("implicit-fusion-qwen2.5-7b")
    same = {"name": "", "target": "", "sft": llama.sft, "dpo": llama.dpo}
    assert llama.model_copy(update=same) == qwen.model_copy(update=same)
    for recipe, sft, dpo in ((llama, 5e-6, 8e-7), (qwen, 2e-6, 3e-7)):
        assert recipe.dpo is not None
        assert (recipe.sft.learning_rate, recipe.dpo.learning_rate) == (sft, dpo)
        assert (recipe.sft.epochs, recipe.dpo.epochs) == (3, 1)
        for training in (recipe.sft, recipe.dpo):
            assert (training.batch_size, training.max_length, training.warmup) == (128, 2048, 0.1)
    assert qwen.dpo is not None
    assert (qwen.dpo.loss, qwen.dpo.beta) == ("sigmoid", 0.01)
    for name in ("implicit-fusion-llama3.1-8b", "continual-math-code-8b"):
        dpo = _recipe(name).dpo
        assert dpo is not None
        assert (dpo.loss, dpo.beta) == ("length_normalised", 10)


def test_explicit_fusion_has_the_published_models_and_training() -> None:
    recipe = _recipe("explicit-fusion-openchat-7b")
    assert recipe.target == "openchat/openchat_3.5"
    assert [skill.sources[0].model for skill in recipe.skills.values()] == [
        "berkeley-nest/Starling-LM-7B-alpha",
        "NousResearch/Nous-Hermes-2-SOLAR-10.7B",
        "internlm/internlm2-chat-20b",
        "mistralai/Mixtral-8x7B-Instruct-v0.1",
        "Qwen/Qwen1.5-72B-Chat",
    ]
    assert (recipe.sft.epochs, recipe.sft.batch_size, recipe.sft.learning_rate, recipe.sft.warmup) == (
        3,
        128,
        5e-6,
        0.03,
    )
    assert recipe.dpo is None


def test_continual_learning_goes_from_mathematics_to_code() -> None:
    recipe = _recipe("continual-math-code-8b")
    assert list(recipe.skills) == ["math", "code"]
    assert "sequential" in recipe.compare


def test_the_recipe_of_the_page_on_transfer_is_valid(tmp_path: Path) -> None:
    page = (RECIPES.parent / "docs" / "transfer.md").read_text()
    blocks = [block.split("```")[0] for block in page.split("```yaml\n")[1:]]
    (tmp_path / "sort.yaml").write_text(blocks[0])
    recipe, _ = load_recipe(tmp_path / "sort.yaml")
    skill = next(iter(recipe.skills.values())).model_dump()
    for block in blocks[1:]:  # parts of a skill
        Skill.model_validate(skill | yaml.safe_load(block))
