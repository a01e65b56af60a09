from dataclasses import replace
from pathlib import Path

import pytest
from codec_models import LARGE, SKILLS
from fusion_models import SIZES
from large_zoo import ALPHABET, CODE_WORDS
from rehearsal import rehearse

from tests.zoo import TINY


def test_a_rehearsal_takes_its_steps_and_leaves_lines_alone(tmp_path: Path) -> None:
    lines = list(rehearse(tmp_path, TINY, 3))
    assert [line.split(":")[0] for line in lines] == ["target", "qwen3-next", "mistral-double", "next-tuned"]
    assert all(", 3 steps of 2 rows, loss " in line for line in lines)
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".json"}
    assert list(rehearse(tmp_path, TINY, 3)) == lines  # with the old seconds: nothing was trained again


def test_a_rehearsal_of_one_model_is_of_that_alone(tmp_path: Path) -> None:
    lines = list(rehearse(tmp_path, TINY, 2, members=["qwen3-next"]))
    assert [line.split(":")[0] for line in lines] == ["qwen3-next"]


def test_tuning_that_was_not_reached_is_rehearsed_on_the_target_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alphabet = replace(TINY, members=TINY.members[:1], skills=((ALPHABET, 1),))
    monkeypatch.setattr("rehearsal.ADDED_TOKENS", {})
    list(rehearse(tmp_path, alphabet, 2))
    monkeypatch.setattr("rehearsal.ADDED_TOKENS", {"alphabet": CODE_WORDS})
    assert list(rehearse(tmp_path, alphabet, 2))[-1].endswith(", 26 tokens added")


def test_the_codec_is_measured_on_the_large_target_of_fusion() -> None:
    assert LARGE.members == SIZES["large"].members[:1]
    assert tuple(task.name for task, _ in LARGE.skills) == SKILLS["large"]
