from pathlib import Path

import pytest
from codec_measures import Yardstick
from codec_methods import methods
from codec_models import Subject

from graftllm.records import write_rows
from tests.models import perturb, rows, save_llama, with_vocabulary


@pytest.fixture
def yardstick(tmp_path: Path) -> Yardstick:
    """A fine-tune with rows for added tokens."""
    perturb(save_llama(tmp_path / "base"), tmp_path / "near", seed=1, scale=0.01)
    with_vocabulary(tmp_path / "near", tmp_path / "tuned", 80)
    write_rows(tmp_path / "rows.jsonl", rows(8))
    write_rows(tmp_path / "test.jsonl", rows(6, seed=1))
    files = {"rows": tmp_path / "rows.jsonl", "test": tmp_path / "test.jsonl"}
    return Yardstick(Subject("large", "alphabet", 0, tmp_path / "base", tmp_path / "tuned", **files))


def test_added_rows_are_part_of_what_is_measured(yardstick: Yardstick) -> None:
    assert yardstick.changes["model.embed_tokens.weight"].shape == (80, 32)
    assert yardstick.ends()["base_kl"] > 0
    whole = yardstick.measure(yardstick.changes)
    assert whole.relative_error == 0
    assert whole.top1_agreement == 1


@pytest.mark.parametrize("method", ["exact", "auto", "DeltaMix"])
def test_methods_compress_a_delta_with_added_rows(yardstick: Yardstick, method: str) -> None:
    chosen = methods([16.0])[method]
    found = chosen.measure(yardstick, chosen.settings[-1])
    assert found["nbytes"] > 0
    assert found.get("relative_error", 0.0) < 0.6
