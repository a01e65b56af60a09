import json
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from graftllm import doctor
from graftllm.doctor import Examination, Finding, examine
from tests.command import Command


@pytest.fixture
def declared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What graftllm says that it needs, to be changed by a test."""
    needed = ["rich>=14.1", "numpy<1", "no-such-package>=2", "torch; extra == 'some'", "lacking>=1; extra == 'other'"]
    monkeypatch.setattr(doctor, "_requirements", lambda: [Requirement(one) for one in needed])
    return needed


def test_packages_are_held_against_their_ranges(declared: list[str]) -> None:
    found = {one.name: one for one in examine().findings if one.group == "packages"}
    assert set(found) == {"graftllm", "rich", "numpy", "no-such-package"}
    assert (found["rich"].found, found["rich"].problem) == (metadata.version("rich"), "")
    assert found["numpy"].problem == "expected <1; pip install 'numpy<1'"
    assert found["no-such-package"].found == "absent"
    assert found["no-such-package"].problem == "expected >=2; pip install 'no-such-package>=2'"


def test_an_extra_that_is_not_there_is_no_problem(declared: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Told:
        @staticmethod
        def get_all(name: str) -> list[str]:
            return {"Provides-Extra": ["some", "other"]}[name]

    monkeypatch.setattr(doctor.metadata, "metadata", lambda name: Told)
    found = {one.name: one for one in doctor._extras()}
    assert found["some"].found == "installed"
    assert found["other"].found == "lacks lacking: pip install 'graftllm[other]'"
    assert not found["other"].problem


def test_few_open_files_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda which: (256, 4096))
    found = Examination(list(doctor._limits()))
    assert found.problems == ["open files: raise it: ulimit -n 1024"]
    assert found.figures()["fit"] is False
    assert found.rows[0] == ["limits", "open files", "256  (raise it: ulimit -n 1024)"]


def test_the_command_shows_everything_and_fails_where_something_has_to_be_mended(
    graftllm: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    figures = json.loads(graftllm("doctor", "--json").out)
    assert {"fit", "problems", "system", "packages", "extras", "devices", "room", "hub", "sandbox", "limits"} == set(
        figures
    )
    assert figures["hub"]["offline"] == "yes, by HF_HUB_OFFLINE"
    monkeypatch.setattr(
        doctor, "examine", lambda: Examination([Finding("packages", "rich", "absent", "pip install it")])
    )
    code, shown, _ = graftllm("doctor")
    assert code == 1
    assert shown.endswith("rich: pip install it\n")
    monkeypatch.setattr(doctor, "examine", lambda: Examination([Finding("packages", "rich", "14.1")]))
    code, shown, _ = graftllm("doctor")
    assert code == 0
    assert shown.endswith("All is fit.\n")
