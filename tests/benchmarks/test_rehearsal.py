from pathlib import Path

from codec_models import LARGE
from fusion_models import SIZES
from rehearsal import rehearse

from tests.zoo import TINY


def test_a_rehearsal_takes_its_steps_and_leaves_nothing(tmp_path: Path) -> None:
    lines = list(rehearse(tmp_path, TINY, 3))
    assert [line.split(":")[0] for line in lines] == ["target", "qwen3-next", "mistral-double", "next-tuned"]
    assert all(", 3 steps, loss " in line for line in lines)
    assert not list(tmp_path.iterdir())


def test_the_codec_is_measured_on_the_large_target_of_fusion() -> None:
    assert LARGE.members == SIZES["large"].members[:1]
    assert [task.name for task, _ in LARGE.skills] == ["reverse", "sort", "next"]
