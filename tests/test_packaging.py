"""What is published: a wheel that has everything it needs and nothing else, and extras that can be left out."""

import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from zipfile import ZipFile

import pytest

from graftllm import __version__
from graftllm.cli import EXTRAS
from graftllm.records import write_rows
from tests.models import rows

ROOT = Path(__file__).parents[1]
_COMMANDS = """
import sys
for name in {blocked}:
    sys.modules[name] = None
from graftllm import cli
for words in sys.stdin.read().splitlines():
    sys.argv = words.split("\t")
    try:
        cli.main()
    except SystemExit as stop:
        print(sys.argv[1], stop.code or 0)
    else:
        print(sys.argv[1], 0)
"""


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


def test_a_wheel_holds_the_package_and_its_data_and_nothing_else(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert len(names) == len(archive.namelist())
    wanted = {
        f"graftllm/{path.relative_to(ROOT / 'src' / 'graftllm')}"
        for path in (ROOT / "src" / "graftllm").rglob("*")
        if path.is_file() and path.suffix in (".py", ".css", ".html", ".typed")
    }
    wanted |= {f"graftllm/recipes/{path.relative_to(ROOT / 'recipes')}" for path in (ROOT / "recipes").rglob("*.yaml")}
    assert {name for name in names if name.startswith("graftllm/")} >= wanted
    assert {"graftllm/py.typed", "graftllm/recipes/demo.yaml", "graftllm/serving/page.html"} <= names
    assert all(name.startswith(("graftllm/", f"graftllm-{__version__}.dist-info/")) for name in names)
    assert f"graftllm-{__version__}.dist-info/licenses/LICENSE" in names


def test_a_wheel_works_where_it_was_put(wheel: Path, tmp_path: Path) -> None:
    with ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import graftllm, importlib.metadata as m, pathlib as p; from graftllm.recipe import load_recipe\n"
        "recipe, _ = load_recipe(p.Path(graftllm.__file__).parent / 'recipes' / 'demo.yaml')\n"
        "print(graftllm.__file__, recipe.name, m.version('graftllm') == graftllm.__version__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": f"{tmp_path}/site"},
    )
    assert done.stdout.split() == [str(tmp_path / "site" / "graftllm" / "__init__.py"), "demo", "True"], done.stderr


def test_packs_need_no_extra_and_other_commands_name_theirs(base_dir: Path, tuned_dir: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", rows(8))
    base, tuned, out = ["--base", base_dir], ["--tuned", tuned_dir], tmp_path / "p.safetensors"
    works = [
        ["pack", *base, *tuned, "--calibration", tmp_path / "rows.jsonl", "--out", out],
        ["inspect", out],
        ["verify", *base, *tuned, "--pack", out, "--prompts", tmp_path / "rows.jsonl"],
        ["apply", *base, "--pack", out, "--out", tmp_path / "applied"],
        ["merge", *base, "--method", "linear", "--pack", out, "--out", tmp_path / "merged"],
        ["fuse", *base, "--pack", f"p={out}", "--out", tmp_path / "g"],
        ["list", tmp_path / "g"],
        ["eval", tmp_path / "g", "--pack", "p", "--task", tmp_path / "rows.jsonl", "--max-new-tokens", "4"],
    ]
    needs = [
        ["run", ROOT / "recipes" / "demo.yaml", "--dir", tmp_path / "run"],
        ["export", out, *base, "--format", "peft", "--out", tmp_path / "adapter"],
        ["serve", tmp_path / "g"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", _COMMANDS.format(blocked=tuple(EXTRAS))],
        input="\n".join("\t".join(map(str, ["graftllm", *words])) for words in works + needs),
        capture_output=True,
        text=True,
    )
    ends = [line for line in done.stdout.splitlines() if line.split(" ")[0] in {words[0] for words in works + needs}]
    assert ends == [*(f"{words[0]} 0" for words in works), *(f"{words[0]} 1" for words in needs)], done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("graftllm: ")]
    assert [line.split("; ")[1] for line in lines] == [
        "pip install 'graftllm[train]'.",
        "pip install 'graftllm[train]'.",
        "pip install 'graftllm[serve]'.",
    ]


def test_every_extra_brings_what_the_command_says_it_brings(project: dict) -> None:
    brought = packages_distributions()
    for module, extra in EXTRAS.items():
        names = [requirement.split(">")[0].split("=")[0] for requirement in project["optional-dependencies"][extra]]
        if module != "starlette":  # comes with fastapi
            assert {name.replace("_", "-") for name in brought[module]} & set(names), module


def test_versions_agree(project: dict) -> None:
    assert project["version"] == __version__
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert project["requires-python"] == ">=3.11"
