import math
from pathlib import Path

import pytest
import torch
from fusion_models import SIZES, SMALL
from fusion_report import _clusters, draw, table
from fusion_rows import Measurement, average
from transformers import AutoModelForCausalLM

SKILLS = ("sort", "next")


def row(sort: float, general: float, size: int = 1000, note: str = "") -> Measurement:
    return Measurement({"sort": sort, "next": 0.5, "general": general}, size, note)


def test_a_table_has_means_and_standard_errors_over_the_seeds_that_have_a_row() -> None:
    results = {0: {"base": row(0.0, 0.9), "ties": row(0.2, 0.6, note="scale 1")}, 1: {"base": row(0.1, 0.7)}}
    lines = table(results, SKILLS).splitlines()
    # sort 0 and 10: 5 with an error of 10 / 2 / ... = 5; averages 46.67 and 43.33.
    assert lines[2] == "| base | 45.0 ± 1.7 | 5.0 ± 5.0 | 50.0 ± 0.0 | 80.0 ± 10.0 | 1,000 | 2 |  |"
    assert lines[3] == "| ties | 43.3 | 20.0 | 50.0 | 60.0 | 1,000 | 1 | scale 1 |"


def test_each_skill_and_the_general_tasks_together_count_once() -> None:
    assert math.isclose(average({"sort": 0.3, "next": 0.6, "general": 0.9}, SKILLS), 0.6)


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    results = {seed: {"base": row(0.1, 0.9), "packs, routed": row(0.9, 0.9, 2000)} for seed in (0, 1)}
    draw(results, SKILLS, tmp_path / "bytes.png")
    assert (tmp_path / "bytes.png").stat().st_size > 5000


def test_the_zoo_has_six_skills_from_sources_of_six_architectures() -> None:
    assert len(SMALL.skills) == len(SMALL.members) - 1 == 6
    assert len({member.config(100, 0, 1).model_type for member in SMALL.members[1:]}) == 6


@pytest.mark.parametrize("member", SIZES["large"].members, ids=lambda member: member.name)
def test_models_of_the_large_zoo_have_100_to_300_million_parameters(member) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(member.config(400, 0, 1))
    assert 1e8 < model.num_parameters() < 3e8


def test_labels_that_would_overlap_are_one() -> None:
    points = [(1.0, 10.0, "a"), (9.0, 10.0, "b"), (1.5, 11.0, "c"), (2.4, 12.0, "d"), (1.0, 40.0, "e")]
    assert sorted(sorted(name for *_, name in near) for near in _clusters(points)) == [["a", "c", "d"], ["b"], ["e"]]
