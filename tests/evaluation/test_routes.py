from dataclasses import replace
from pathlib import Path

import pytest
import torch

from graftllm.checkpoint import Checkpoint
from graftllm.delta import Delta
from graftllm.errors import FusionError, StorageError
from graftllm.evaluation.routes import Choice, RouterResult, draw_router, evaluate_router, unknown_accepted
from graftllm.evaluation.tasks import evaluate_tasks
from graftllm.fusion.directory import set_rules, write_grafted
from graftllm.fusion.fitting import fit_router
from graftllm.fusion.routing import train_router
from graftllm.fusion.rules import Rule
from graftllm.packer import compress
from graftllm.packing_options import PackOptions
from graftllm.recipe import RouterOptions
from graftllm.records import Message, Prompt, write_rows
from graftllm.storage import check_picture
from tests.models import perturb, rows

RESULT = RouterResult(
    classes=["base", "math"],
    confusion={"base": {"base": 2, "math": 1}, "math": {"math": 1}},
    reasons={"router": 3, "unknown": 1},
    choices=[Choice(0.99, True), Choice(0.95, True), Choice(0.9, False), Choice(0.5, True)],
    tasks={"": 2, "maths": 1},
    unknown={"math": 0.25},
    stated={},
)


def test_accuracy_risk_and_calibration_are_as_computed_by_hand() -> None:
    assert (RESULT.accuracy.value, RESULT.accuracy.n) == (0.75, 4)
    assert RESULT.risk(0.5) == (0.95, 0.0)
    assert RESULT.risk(0.51) == (0.9, pytest.approx(1 / 3))
    assert RESULT.risk(1.0) == (0.5, 0.25)
    # bins [0.9, 1]: |0.99 + 0.95 + 0.9 - 2| = 0.84; [0.5, 0.6): |0.5 - 1|
    assert RESULT.calibration_error == pytest.approx((0.84 + 0.5) / 4)


def test_calibration_is_of_choices_by_probability_alone() -> None:
    others = [Choice(1.0, True, likely=False), *RESULT.choices, Choice(0.1, True, likely=False)]
    assert replace(RESULT, choices=others).calibration_error == pytest.approx(RESULT.calibration_error)
    assert replace(RESULT, choices=others[:1]).calibration_error == 0


@pytest.mark.parametrize("order", [1, -1])
def test_the_order_of_equally_confident_choices_does_not_matter(order: int) -> None:
    tied = [Choice(1.0, True), Choice(1.0, True), Choice(1.0, False), Choice(1.0, False)][::order]
    found = replace(RESULT, choices=[*tied, Choice(0.5, True)])
    assert [found.risk(coverage) for coverage in (0.2, 0.4, 0.8, 1)] == [(1, 0.5), (1, 0.5), (1, 0.5), (0.5, 0.4)]


def test_the_tables_hold_every_class() -> None:
    confusion, coverage = RESULT.grids()
    assert confusion.rows == [["base", "2", "1"], ["math", "0", "1"]]
    assert coverage.rows[0] == ["100%", "0.500", "25.00%"]
    assert RESULT.sentences()[0].startswith("75.00% ± 21.65% of 4 prompts went where they belong")
    assert "math 25.0%" in RESULT.sentences()[-1]
    assert "no pack has the name of their task: no task 2, maths 1" in RESULT.sentences()[2]


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    draw_router(RESULT, tmp_path / "r.png")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_counted_is_given_once_and_the_picture_spares_it(tmp_path: Path) -> None:
    file = tmp_path / "test.jsonl"
    write_rows(file, rows(2))
    (tmp_path / "same.jsonl").symlink_to(file)
    with pytest.raises(FusionError, match=r"--task .*same.jsonl: is given twice, so its rows would count twice"):
        evaluate_router(tmp_path / "g", [file, tmp_path / "same.jsonl"])
    for name, message in (("r.xyz", "expected a name that ends in .png, .svg, .pdf; found '.xyz'"), ("a.png", "apart")):
        (tmp_path / "a.png").touch()
        with pytest.raises(StorageError, match=message):
            check_picture(tmp_path / name, read=[tmp_path / "a.png"])


def test_packs_far_from_each_other_do_not_take_each_others_prompts() -> None:
    draw = torch.Generator().manual_seed(0)
    features = {
        name: 3 * torch.randn(24, generator=draw) + torch.randn(40, 24, generator=draw) / 3
        for name in ("base", "a", "b", "c")
    }
    found = unknown_accepted(train_router(features, RouterOptions(steps=60), seed=0))
    assert set(found) == {"a", "b", "c"}
    assert max(found.values()) < 0.1
    assert unknown_accepted(train_router({k: features[k] for k in ("base", "a")}, RouterOptions(steps=9), seed=0)) == {}


def test_a_grafted_model_is_compared_with_where_prompts_belong(base_dir: Path, delta: Delta, tmp_path: Path) -> None:
    compress(delta, PackOptions(strategy="exact")).save(tmp_path / "digits.safetensors")
    digits = [Prompt(f"d{i}", (Message(role="user", content=f"{i * 7919} {i}"),), "digits") for i in range(60)]
    router = fit_router(base_dir, {"base": rows(40, answered=False, task="general"), "digits": digits[:40]})
    write_grafted(tmp_path / "g", str(base_dir), {"digits": tmp_path / "digits.safetensors"}, router)
    write_rows(tmp_path / "test.jsonl", [*digits[40:], *rows(20, seed=1, answered=False, task="general")])
    found = evaluate_router(tmp_path / "g", [tmp_path / "test.jsonl"])
    assert found.accuracy.n == 40
    assert found.accuracy.value > 0.9
    assert found.figures()["router"]["packs"] == ["digits"]
    assert "at most 2.44% of fresh general prompts expected to go to a pack (1.00% asked for)" in found.sentences()[3]
    assert found.figures()["base_tasks"] == {"general": 20}
    set_rules(tmp_path / "g", [Rule(pack="base", pattern=r"^\d"), Rule(pack="digits", pattern="backward")])
    wrong = evaluate_router(tmp_path / "g", [tmp_path / "test.jsonl"])
    assert wrong.confusion == {"base": {"digits": 20}, "digits": {"base": 20}}
    assert wrong.reasons == {"rule": 40}
    with pytest.raises(FusionError, match="expected a grafted model"):
        evaluate_router(base_dir, [tmp_path / "test.jsonl"])


def test_soft_routes_answer_with_several_packs(base: Checkpoint, base_dir: Path, delta: Delta, tmp_path: Path) -> None:
    other = Delta(base, Checkpoint.open(perturb(base_dir, tmp_path / "other", seed=6)))
    for name, change in (("one", delta), ("two", other)):
        compress(change, PackOptions(strategy="exact")).save(tmp_path / f"{name}.safetensors")
    words = {"base": [f"?!{i}" for i in range(40)], "one": [f"ab{i}" for i in range(40)]}
    prompts = {
        name: [Prompt(f"{name}{i}", (Message(role="user", content=text),)) for i, text in enumerate(texts)]
        for name, texts in (words | {"two": [f"ab{i}." for i in range(40)]}).items()
    }
    router = fit_router(base.path, prompts, RouterOptions(soft=2, steps=30, threshold=0.0, false_accept=0.5))
    packs = {name: tmp_path / f"{name}.safetensors" for name in ("one", "two")}
    write_grafted(tmp_path / "g", str(base_dir), packs, router)
    write_rows(tmp_path / "t.jsonl", [Prompt("a", (Message(role="user", content="ab3"),), "one", "x")])
    assert sum(evaluate_tasks(tmp_path / "g", [tmp_path / "t.jsonl"]).routes.values()) == 1
