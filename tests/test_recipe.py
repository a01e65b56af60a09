from pathlib import Path

import pytest
import yaml

from graftllm.errors import RecipeError
from graftllm.packing_options import PackOptions, budget_bytes
from graftllm.pipeline.work import open_work
from graftllm.recipe import Recipe, dump_recipe, load_recipe, pack_options
from graftllm.transfer_options import PromptSet

SMALL = """
name: small
target: "{dir}/target"
skills:
  math:
    sources: [org/model, ./local]
    prompts: math.jsonl
    test: /data/math.test.jsonl
general: {prompts: general.jsonl, test: general.test.jsonl}
"""


def _write(tmp_path: Path, text: str) -> Path:
    (tmp_path / "recipe.yaml").write_text(text)
    return tmp_path / "recipe.yaml"


def test_paths_start_at_the_recipe_and_dir_is_the_runs_directory(tmp_path: Path) -> None:
    recipe, directory = load_recipe(_write(tmp_path, SMALL), tmp_path / "out")
    assert directory == tmp_path / "out"
    assert recipe.target == str(tmp_path / "out" / "target")
    skill = recipe.skills["math"]
    assert [(source.model, source.name) for source in skill.sources] == [
        ("org/model", "model"),
        (str(tmp_path / "local"), "local"),
    ]
    assert skill.prompts == (PromptSet(files=(str(tmp_path / "math.jsonl"),)),)
    assert skill.test == (PromptSet(files=("/data/math.test.jsonl",)),)


def test_a_chat_template_is_a_file_beside_the_recipe_or_text(tmp_path: Path) -> None:
    for given, expected in (("chat.jinja", str(tmp_path / "chat.jinja")), ("{{ bos }}{dir}", "{{ bos }}{dir}")):
        text = SMALL.replace("[org/model, ./local]", f"{{model: org/model, chat_template: '{given}'}}")
        assert load_recipe(_write(tmp_path, text))[0].skills["math"].sources[0].chat_template == expected


def test_the_runs_directory_is_named_after_the_recipe(tmp_path: Path) -> None:
    assert load_recipe(_write(tmp_path, SMALL))[1] == Path("runs/small")


def test_a_recipe_written_out_reads_the_same(tmp_path: Path) -> None:
    recipe, _ = load_recipe(_write(tmp_path, SMALL), tmp_path)
    assert Recipe.model_validate(yaml.safe_load(dump_recipe(recipe))) == recipe


def test_the_demo_recipe_is_valid() -> None:
    recipe, _ = load_recipe(Path(__file__).parents[1] / "recipes" / "demo.yaml")
    assert list(recipe.skills) == ["reverse", "sort", "next"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("targt: x", "unknown key 'targt'; the nearest known one is 'target'"),
        ("sampling: {temprature: 1}", "unknown key 'sampling.temprature'; the nearest known one is 'temperature'"),
        ("dpo: {bta: 1}", "unknown key 'dpo.bta'; the nearest known one is 'beta'"),
        ("skills: {a: {sorces: [x]}}", "unknown key 'skills.a.sorces'; the nearest known one is 'sources'"),
        ("skills: {a: {prompts: x}}", "key 'skills.a.sources' is missing"),
        ("skills: {a: {sources: [x], prompts: p, test: t, juge: exact}}", "the nearest known one is 'judge'"),
        ("skills: {test: {sources: [x], prompts: p, test: t, juge: exact}}", "the nearest known one is 'judge'"),
        (
            "skills: {a: {sources: {model: m, url: 'http://x/v1', chat_template: c.jinja}, prompts: p, test: t}}",
            "skills.a.sources.0: chat_template: a model behind a URL has its server's own; leave it out, or the url",
        ),
        ("skills: {base: {sources: [x], prompts: p, test: t}}", "skills: 'base' is a reserved name; choose another"),
        ("skills: {a/b: {sources: [x], prompts: p, test: t}}", "skills.a/b"),
        ("sampling: {samples: 0}", "sampling.samples: Input should be greater than or equal to 1; found 0"),
        ("sampling: {temperature: 0}", "sampling: samples: at temperature 0 every answer is the same; ask for 1"),
        ("pack: {strategy: zip}", "pack.strategy: Input should be 'auto', 'paper' or 'exact'; found 'zip'"),
        ("pack: {bit_bands: [[2, 0.5]]}", "pack: bit_bands: expected shares that sum to 1"),
        (
            "pack: {strategy: paper, bit_bands: [[8, .nan]]}",
            "pack: bit_bands: expected pairs of 1 to 8 bits and a share",
        ),
        ("pack: {energy: 0.5}", "pack: energy: is an option of the strategy paper, found auto; leave it out"),
        (
            "pack: {strategy: exact, servable: 4}",
            "pack: servable: bounds the ranks of the strategy auto, found exact; leave it out, or give a budget for a",
        ),
        (
            "pack: {strategy: paper, group_size: 2000000}",
            "pack.group_size: Input should be less than or equal to 10485",
        ),
        (
            f"pack: {{strategy: paper, bit_bands: {[[bits, 0.1] for bits in range(10)]}}}",
            "pack.bit_bands: Tuple should have at most 8 items after validation",
        ),
        ("pack: {budget: 99999999999GB}", "pack: budget: expected less than 2 ** 63 bytes, found '99999999999GB'"),
        ("pack: {budget: small}", "pack: budget: expected a share or a size above 0, such as 5%, 400MB or 60KB"),
        ("name: 3", "name: Input should be a valid string; found 3"),
        (
            "general: {prompts: /p, test: /t, judge: {kind: reward_model, model: m}}",
            "general: judge: a reward model cannot tell right from wrong; name another judge.",
        ),
    ],
)
def test_a_bad_recipe_is_one_clear_line(tmp_path: Path, change: str, message: str) -> None:
    content = yaml.safe_load(SMALL) | yaml.safe_load(change)
    with pytest.raises(RecipeError) as raised:
        load_recipe(_write(tmp_path, yaml.safe_dump(content)))
    assert str(raised.value).startswith(f"{tmp_path / 'recipe.yaml'}: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert "me:pw" not in str(raised.value)


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ("judge: mathh", "skills.a.judge.0: expected a kind among 'exact', 'math', {others}; found 'mathh'."),
        ("judge: [math, {kind: bad, model: m}]", "skills.a.judge.1: expected a kind among {others}; found 'bad'."),
        ("test_judge: mathh", "skills.a.test_judge: expected a kind among 'exact', {others}; found 'mathh'."),
        ("judge: {model: m}", "key 'skills.a.judge.0.kind' is missing, and it has no default."),
        (
            "judge: [{kind: reward_model, model: a}, {kind: reward_model, model: b}]",
            "skills.a: judge: expected at most one that grades (reward_model or judge), found reward_model and "
            "reward_model.",
        ),
        (
            "judge: {kind: reward_model, model: m}",
            "skills.a: test_judge: a reward model cannot tell right from wrong; name another judge for the test.",
        ),
        ("judge: {kind: judge, model: m, rubric: r}", "judge.0.judge: url: expected the endpoint of the judge, "),
        ("sampling: {stop: %s}" % ("x" * 500), "; found 'xxx"),
    ],
)  # fmt: skip
def test_a_wrong_judge_is_told_in_one_short_line(tmp_path: Path, judge: str, message: str) -> None:
    text = SMALL.replace("  math:", "  a:").replace("    test: /data", f"    {judge}\n    test: /data")
    if judge.startswith("sampling"):
        text = f"{SMALL}{judge}\n"
    with pytest.raises(RecipeError) as raised:
        load_recipe(_write(tmp_path, text))
    said = str(raised.value).removeprefix(f"{tmp_path}/")
    for part in message.split("{others}"):
        assert part in said
    assert len(said) < 250
    assert "found {" not in said


def test_a_run_goes_into_no_models_directory(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(
        RecipeError, match=r"model: expected a directory for a run's files, found a model there; choose"
    ):
        open_work(_write(tmp_path, SMALL), tmp_path / "model")
    assert open_work(_write(tmp_path, SMALL), tmp_path / "run").directory == tmp_path / "run"


def test_every_section_knows_its_own_keys(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="known here: samples, temperature, top_p, max_new_tokens, batch_size"):
        load_recipe(_write(tmp_path, SMALL + "sampling: {x: 1}\n"))


def test_a_misspelt_key_is_told_before_the_one_that_is_missing_for_it(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="unknown key 'skils'; the nearest known one is 'skills'"):
        load_recipe(_write(tmp_path, SMALL.replace("skills:", "skils:")))


def test_a_key_written_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    line = SMALL.count("\n") + 1
    with pytest.raises(RecipeError, match=rf"key 'name' stands twice, the second time in line {line}\)"):
        load_recipe(_write(tmp_path, SMALL + "name: other\n"))
    with pytest.raises(RecipeError, match=rf"key 'steps' stands twice, the second time in line {line + 3}\)"):
        load_recipe(_write(tmp_path, SMALL + "router:\n  steps: 1\n  soft: 1\n  steps: 2\n"))


def test_many_keys_are_read_in_linear_time(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="unknown key"):
        load_recipe(_write(tmp_path, SMALL + "".join(f"k{i}: 1\n" for i in range(20_000))))


@pytest.mark.parametrize(
    ("several", "message"),
    [
        ("<<: [*a{0}, *a{0}]", "line 2: expected '<<' once, with one mapping; found several"),
        ("<<: *a{0}, <<: *a{0}", "line 2: expected '<<' once, with one mapping; found several"),
        ("<<: *a{0}, k{0}: 1", "expected mappings of at most 100000 keys by '<<', found more"),
    ],
)
def test_merges_that_would_fill_the_memory_are_refused(tmp_path: Path, several: str, message: str) -> None:
    merges = [f"a{i + 1}: &a{i + 1} {{{several.format(i)}}}" for i in range(500)]
    with pytest.raises(RecipeError, match=message):
        load_recipe(_write(tmp_path, "\n".join(["a0: &a0 {x: 1}", *merges])))


@pytest.mark.parametrize(
    ("text", "message"),
    [("- a", "found list"), ("a: [", "not readable as YAML"), ("? [a]\n: 1", "not readable as YAML .*unhashable")],
)
def test_what_is_no_recipe_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(_write(tmp_path, text))


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="none.yaml: no such recipe"):
        load_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize("budget", ["500", "5 %", "0.5%", "12B", "3gb"])
def test_budgets_may_be_shares_or_sizes(budget: str) -> None:
    assert budget_bytes(budget, 1000) == {"500": 500, "5 %": 50, "0.5%": 5, "12B": 12, "3gb": 3_000_000_000}[budget]


def test_bytes_and_switches_need_no_quotes() -> None:
    assert PackOptions(budget=400_000).budget == "400000"  # pyright: ignore[reportArgumentType]
    assert (PackOptions(servable=True).servable, PackOptions(servable=False).servable) == (16, None)


@pytest.mark.parametrize("budget", ["", "0", "-5%", "5 percent", "%", "1e3"])
def test_other_budgets_are_refused(budget: str) -> None:
    with pytest.raises(RecipeError, match="expected a share or a size above 0"):
        budget_bytes(budget, 1000)


NOTHING = {"budget": None, "energy": None, "density": None, "bit_bands": None, "group_size": None}


def test_flags_of_pack_are_read_like_a_recipe() -> None:
    assert pack_options(strategy="auto", **NOTHING) == PackOptions()
    flags = NOTHING | {"bit_bands": "8:0.1,3:0.9", "energy": 0.5}
    assert pack_options(strategy="paper", **flags) == PackOptions(
        strategy="paper", energy=0.5, bit_bands=((8, 0.1), (3, 0.9))
    )


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ({"energy": 2.0}, "energy: Input should be less than or equal to 1; found 2.0"),
        ({"bit_bands": "8"}, "key 'bit_bands.0.1' is missing, and it has no default"),
        ({"bit_bands": "8:1,2:1"}, "bit_bands: expected shares that sum to 1"),
        ({"bit_bands": "nine:1"}, "bit_bands.0.0: Input should be a valid integer"),
    ],
)
def test_flags_of_pack_are_checked_like_a_recipe(flag: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        pack_options(strategy="paper", **(NOTHING | flag))


FULL = """
name: full
target: org/target
skills:
  math:
    sources:
      - &big {model: org/big, url: "https://example.org/v1", api_key_env: BIG_KEY, price: {input: 1, output: 2}}
      - <<: *big
        name: bigger
    prompts: [{dataset: org/set, columns: {prompt: problem}}, {files: [a.jsonl, b.parquet]}]
    test: t.jsonl
    judge: [math, {kind: reward_model, model: ./reward}]
general: {prompts: g.jsonl, test: g.jsonl}
"""


def test_sources_and_judges_may_be_written_out(tmp_path: Path) -> None:
    recipe, _ = load_recipe(_write(tmp_path, FULL), tmp_path)
    skill = recipe.skills["math"]
    assert [source.name for source in skill.sources] == ["big", "bigger"]
    assert {source.api_key_env for source in skill.sources} == {"BIG_KEY"}
    assert skill.prompts[1].files == (str(tmp_path / "a.jsonl"), str(tmp_path / "b.parquet"))
    assert skill.prompts[0].dataset == "org/set"
    assert skill.judge[1].model_dump()["model"] == str(tmp_path / "reward")
    assert skill.tested_by.kind == "math"
    assert Recipe.model_validate(yaml.safe_load(dump_recipe(recipe))) == recipe


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("api_key_env: BIG_KEY", "api_key: sk-1", "unknown key 'skills.math.sources.0.api_key'; the nearest known one"),
        ("https://example.org", "https://me:pw@example.org", "expected no user, password or query; put the key into"),
        ("https://example.org", "ftp://example.org", "expected http:// or https://"),
        ("name: bigger", "concurrency: 2", "sources: two have the same name; give each its own `name`"),
        ("kind: reward_model", "kind: reward", "skills.math.judge.1"),
        ("model: ./reward", "model: m, max_len: 3", "reward_model.max_len'; the nearest known one is 'max_length'"),
        ("[math, {kind: reward_model, model: ./reward}]", "{kind: reward_model, model: x}", "name another judge for"),
        ("judge: [math,", "judge: [{kind: judge, model: m, url: 'http://x', rubric: r},", "at most one that grades"),
        ("{kind: reward_model, model: ./reward}", "{kind: judge, model: m, rubric: r}", "expected the endpoint of the"),
        ("dataset: org/set", "split: train", "expected either files or a dataset"),
        ("prompt: problem", "promt: problem", "columns: 'promt' is no key of a prompt row"),
        ("output: 2", "output: -2", "skills.math.sources.0.price.output: Input should be greater than or equal to 0"),
    ],
)  # fmt: skip
def test_bad_sources_prompts_and_judges_are_one_clear_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in FULL
    with pytest.raises(RecipeError) as raised:
        load_recipe(_write(tmp_path, FULL.replace(old, new)))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert "me:pw" not in str(raised.value)
