"""What making a pack took, in its header."""

import json
import random
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from graftllm.checkpoint import Checkpoint
from graftllm.evaluation.scores import Measured, Score, merged
from graftllm.evaluation.tables import OVERHEADS, overhead_grids, overhead_rows
from graftllm.header import Card, Overhead
from graftllm.loading import load_tokenizer
from graftllm.metering import Spent
from graftllm.packfile import file_bytes
from graftllm.pipeline import overheads
from graftllm.pipeline.overheads import tokens_trained, with_room
from graftllm.pipeline.packing import pack
from graftllm.pipeline.work import Work, open_work
from graftllm.records import PreferencePair, Response, write_rows
from graftllm.rendering import render_answered
from graftllm.skillpack import SkillPack
from graftllm.stages import Stamp
from graftllm.training_options import SftOptions
from tests.evaluation.test_anatomy import header_of
from tests.models import rows

RECIPE = """
name: small
target: {target}
skills: {{reverse: {{sources: [one/strong, two/strange], prompts: p.jsonl, test: p.jsonl}}}}
general: {{prompts: p.jsonl, test: p.jsonl}}
sft: {{epochs: 2, max_length: 20}}
dpo: {{epochs: 1}}
pack: {{strategy: paper, budget: 60%}}
"""
_KINDS = ("sample", "score", "sft", "own", "dpo")


@pytest.fixture
def work(base_dir: Path, tuned_dir: Path, tmp_path: Path) -> Work:
    """A run that is done up to packing; its stages took 2 s each, and 1 GB and more from one to the next."""
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(target=base_dir))
    work = open_work(tmp_path / "recipe.yaml", tmp_path / "run")
    shutil.copytree(tuned_dir, work.tuned("reverse"))
    home = work.skill("reverse")
    write_rows(home / "sft.jsonl", rows(8))
    pairs = [PreferencePair(row.id, row.question, row.answer or "", "no") for row in rows(3)]
    write_rows(home / "pairs.jsonl", pairs)
    write_rows(home / "responses.jsonl", [Response(row.id, "strong", 0, "", output_tokens=7) for row in rows(4)])
    names = ("sample.reverse.strong", "sample.reverse.strange", "sample.reverse", "score.reverse", "sft.reverse")
    for i, name in enumerate((*names, "dpo.reverse", "sample.reverse.gone", "sft.other")):
        work.stages.used[name] = Stamp(name, "", None, 2.0, (i + 1) * 10**9, cpu_seconds=1.5)
    return work


def _pack(work: Work) -> SkillPack:
    known: Measured = {"reverse": merged({"": Score(0.5, 4)})}
    scores = dict.fromkeys(("base", "source.reverse", "tuned.reverse"), known)
    pack(work, "reverse", work.stages.used["dpo.reverse"], scores)
    return SkillPack.load(work.pack("reverse"))


def test_a_pack_tells_what_each_of_its_stages_took(work: Work) -> None:
    found = _pack(work).header.card.overheads
    assert list(found) == ["sample", "score", "sft", "dpo", "pack"]
    assert found["sample"] == Overhead(seconds=6, cpu_seconds=4.5, peak_memory_bytes=3 * 10**9, tokens=28)
    assert found["score"] == Overhead(seconds=2, cpu_seconds=1.5, peak_memory_bytes=4 * 10**9)
    tokenizer = load_tokenizer(work.target.path)
    assert all(len(render_answered(tokenizer, row)[0]) > 20 for row in rows(8))
    assert found["sft"].tokens == 2 * 8 * 20  # epochs, rows, cut length
    whole = sum(len(render_answered(tokenizer, row)[0]) for row in rows(3))
    assert found["dpo"].tokens == 2 * whole - 3 * 3  # `no` has three letters less than the answers
    assert found["pack"].seconds > 0
    assert found["pack"].peak_memory_bytes > 10**7


def test_another_description_reaches_the_pack(work: Work) -> None:
    assert _pack(work).header.card.description == ""
    skill = work.recipe.skills["reverse"].model_copy(update={"description": "words backward"})
    told = replace(work, recipe=work.recipe.model_copy(update={"skills": {"reverse": skill}}))
    assert _pack(told).header.card.description == "words backward"
    again = told.pack("reverse").read_bytes()
    _pack(told)
    assert told.pack("reverse").read_bytes() == again  # times would differ


def test_a_pack_with_its_overheads_fits_its_budget(work: Work) -> None:
    _pack(work)
    tuned = Checkpoint.open(work.tuned("reverse"))
    assert work.pack("reverse").stat().st_size <= 0.6 * tuned.nbytes


def test_what_a_killed_packing_took_counts(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("graftllm.pipeline.packing.sign", stop)
        _pack(work)
    marker = work.stages.directory / "pack.reverse.started"
    key = marker.read_text().splitlines()[0]
    marker.write_text(f"{key}\n{json.dumps(asdict(Spent(5000, 6000)))}")
    found = _pack(work).header.card.overheads["pack"]
    assert found.seconds >= 5000
    assert found.cpu_seconds >= 6000


def test_overheads_never_take_more_room_than_was_left_for_them(work: Work) -> None:
    header = header_of([f"h.{i}.w" for i in range(30)])
    held = file_bytes(header.model_copy(update={"card": with_room(work, "reverse", Card())}))
    draw = random.Random(0)

    def some() -> Overhead:
        figures = [10 ** draw.uniform(-2, 7.9) for _ in range(3)], [int(10 ** draw.uniform(0, 12.5)) for _ in range(2)]
        return overheads._rounded(Spent(*figures[0], *figures[1]), int(10 ** draw.uniform(0, 13)))

    for _ in range(300):
        card = Card(overheads={kind: some() for kind in (*overheads._stages(work, "reverse"), "pack")})
        assert file_bytes(header.model_copy(update={"card": card})) <= held


@given(st.integers(0, 10**15), st.floats(0, 1e9))
def test_figures_are_rounded_to_what_they_are_worth(number: int, seconds: float) -> None:
    found = overheads._rounded(Spent(seconds, 0, 0, number, 0), number)
    assert found.seconds == pytest.approx(seconds, rel=5e-3)
    assert found.peak_memory_bytes == pytest.approx(number, rel=5e-3)
    assert found.tokens == pytest.approx(number, rel=5e-4)


def test_tokens_are_those_of_all_epochs(base_dir: Path) -> None:
    options = SftOptions(epochs=0.5, max_length=2048)
    lengths = [len(render_answered(load_tokenizer(base_dir), row)[0]) for row in rows(4)]
    assert tokens_trained(base_dir, rows(4), options) == sum(lengths) / 2


def test_a_card_without_overheads_is_written_as_ever() -> None:
    assert set(json.loads(Card(name="x").model_dump_json())) == {
        "name",
        "description",
        "license",
        "provenance",
        "scores",
    }
    told = Card(overheads={"sft": Overhead(seconds=2.5)}).model_dump_json()
    assert json.loads(told)["overheads"] == {"sft": {"seconds": 2.5}}
    assert Card.model_validate_json(told).overheads == {"sft": Overhead(seconds=2.5)}


@pytest.mark.parametrize("figures", ['{"seconds": -1}', '{"seconds": NaN}', '{"tokens": 1.5}', '{"joules": 3}'])
def test_figures_that_cannot_be_are_refused(figures: str) -> None:
    with pytest.raises(ValidationError):
        Card.model_validate_json(f'{{"overheads": {{"sft": {figures}}}}}')


def test_overheads_are_a_table() -> None:
    took = Overhead(seconds=1234.5, gpu_seconds=9, peak_memory_bytes=2_600_000_000, tokens=12_000)
    assert overhead_rows({"sft": took}) == [["sft", "1,234.5", "0", "9", "2,600", "0", "12,000"]]
    header = header_of(["w"])
    assert overhead_grids(header) == []
    told = header.model_copy(update={"card": Card(overheads={"sft": took})})
    assert [grid.columns for grid in overhead_grids(told)] == [OVERHEADS]
