from pathlib import Path

import pytest
from codec_methods import code_digest
from codec_report import draw, tables
from codec_results import REFERENCE, Point, curve, kl_at, mean_curve, nbytes_at, ratios


def _point(method: str, nbytes: int, kl: float, *, skill: str = "sort", seed: int = 0) -> Point:
    found = {"kl": kl, "score": 0.9, "relative_error": 0.5, "calibrated_error": 0.1}
    return Point("demo", skill, seed, 8000, method, "", nbytes, found)


def _line(method: str, share: float, *, skill: str = "sort", seed: int = 0) -> list[Point]:
    """A method that needs `share` of the bytes of one with KL = 100 / bytes ** 2."""
    return [
        _point(method, round(share * size), 100 / size**2, skill=skill, seed=seed) for size in (100, 400, 1600, 6400)
    ]


def test_curve_leaves_out_what_a_smaller_file_beats() -> None:
    points = [_point("x", 300, 0.5), _point("x", 100, 1.0), _point("x", 200, 0.4), _point("x", 200, 0.6)]
    assert [(point.nbytes, point.kl) for point in curve(points)] == [(100, 1.0), (200, 0.4)]


def test_interpolation_is_exact_on_a_power_law() -> None:
    points = curve(_line("x", 1.0))
    assert kl_at(points, 800) == pytest.approx(100 / 800**2)
    assert nbytes_at(points, 100 / 800**2) == (pytest.approx(800), "")


def test_beyond_its_ends_a_curve_gives_the_end_and_says_so() -> None:
    points = curve(_line("x", 1.0))
    assert kl_at(points, 50) is None
    assert nbytes_at(points, 1.0) == (pytest.approx(100), "≤")
    assert nbytes_at(points, 1e-9) == (pytest.approx(6400), "≥")


def test_ratio_is_the_share_of_bytes_averaged_over_seeds() -> None:
    points = [*_line(REFERENCE, 1.0), *_line(REFERENCE, 1.0, seed=1)]
    points += [*_line("x", 0.4), *_line("x", 0.6, seed=1)]
    found = ratios(points, "demo")["x"][1.0]
    assert found is not None
    assert (found.value, found.stderr, found.sign) == (pytest.approx(0.5), pytest.approx(0.1), "")


def test_skills_of_a_seed_count_as_one() -> None:
    points = [*_line(REFERENCE, 1.0), *_line(REFERENCE, 1.0, skill="next")]
    points += [*_line("x", 0.4), *_line("x", 0.6, skill="next")]
    found = ratios(points, "demo")["x"][1.0]
    assert found is not None and found.value == pytest.approx(0.5)
    assert "| x | 0.50 | 0.50 | 0.50 | 0.50 |" in tables(points, {})


def test_mean_curve_is_the_geometric_mean_where_all_curves_go() -> None:
    sizes, kls = mean_curve([*_line("x", 1.0), *_line("x", 4.0, seed=1)], "x")
    assert (sizes[0], sizes[-1]) == (pytest.approx(400), pytest.approx(6400))
    assert kls[0] == pytest.approx(100 / 400**2 * 4)  # between KL at 400 and at 400 / 4


def test_every_method_is_named_in_the_plot() -> None:
    figure = draw([*_line(REFERENCE, 1.0), *_line("x", 0.5)])
    assert {" x", f" {REFERENCE}"} <= {text.get_text() for text in figure.axes[0].texts}


def test_comments_and_docstrings_do_not_ask_for_new_measurements(tmp_path: Path) -> None:
    first, second, third = (tmp_path / f"{i}.py" for i in range(3))
    first.write_text('"""One."""\n\n\ndef f():\n    """A."""\n    return 1\n')
    second.write_text('"""Two."""\ndef f():\n    return 1  # why\n')
    third.write_text("def f():\n    return 2\n")
    assert code_digest([first]) == code_digest([second]) != code_digest([third])
