"""The command `graftllm`: options in, one call of the library each, results out.

Commands on SkillPacks are in `cli_packs`, `cli_merge` and `cli_hub`, those on grafted models in `cli_fusion`,
`cli_learning` and `cli_serve`. No logic lives here. Heavy imports happen inside the subcommands, so that `--help`
answers at once.
"""

import errno
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftllm.cli_cost import cost
from graftllm.cli_doctor import doctor
from graftllm.cli_fusion import add, chat, fuse, list_shelf, remove, rules
from graftllm.cli_hub import pull, push
from graftllm.cli_learning import evaluate, learn
from graftllm.cli_merge import merge
from graftllm.cli_packs import ServableAlone, apply, inspect, pack, verify
from graftllm.cli_report import report
from graftllm.cli_serve import export, serve
from graftllm.errors import GraftError
from graftllm.launched import leads
from graftllm.terminal import (
    AllJson,
    AsJson,
    Device,
    Panels,
    Quiet,
    ShowVersion,
    check_place,
    check_words,
    print_lines,
    print_table,
    printable,
    settle,
    typed,
)

if TYPE_CHECKING:
    from graftllm.evaluation.report import Report
    from graftllm.pipeline.work import Work

app = typer.Typer(
    cls=Panels,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

SKILLS, PACKS, GRAFTED, AROUND = "Skills from a recipe", "SkillPacks", "Grafted models", "Hub and machine"
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML recipe, such as recipes/demo.yaml.")]
RunDirectory = Annotated[
    Path | None, typer.Option("--dir", help="Where artifacts go.  [default: runs/NAME of the recipe]")
]
EXTRAS = {
    **dict.fromkeys(("datasets", "peft", "trl"), "train"),
    **dict.fromkeys(("fastapi", "prometheus_client", "starlette", "uvicorn"), "serve"),
}  # what is imported only where it is needed, and what brings it
RESUMING = ("run", "sample", "score", "train", "learn", "demo", "pack", "push", "pull")  # go on where they were


def main() -> None:
    """Run the command; a user's mistake is one line on stderr and exit code 1, Ctrl-C is exit code 130.

    A stdout that takes no more is a line and exit code 1 too; where it is a pipe that nobody reads, there is no line.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # TRL's own bar, which fills a log with lines
    if not leads():
        sys.stdout = open(os.devnull, "w")  # of processes launched together, one prints
    try:
        try:
            _answer()
        finally:
            print(end="", flush=True)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE) or _prints():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
        if error.errno != errno.EPIPE:
            print(f"graftllm: stdout cannot be written ({error.strerror}).", file=sys.stderr)
        sys.exit(1)


def _prints() -> bool:
    """Return whether stdout still takes a line: what failed was another file then."""
    try:
        print(flush=True)
    except OSError:
        return False
    return True


def _answer() -> None:
    try:
        check_place()
        check_words(sys.argv[1:])
        app()
    except GraftError as error:
        print(f"graftllm: {printable(str(error))}", file=sys.stderr)
        sys.exit(1)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRAS:
            raise
        mend = f"pip install 'graftllm[{EXTRAS[missing]}]'"
        print(f"graftllm: this command needs {missing}, which is not installed; {mend}.", file=sys.stderr)
        sys.exit(1)
    except SystemExit as stop:
        if stop.code == 130:
            command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
            mend = "; run the same command again to go on where it was." if command in RESUMING else "."
            print(f"graftllm: interrupted{mend}", file=sys.stderr, flush=True)
            with suppress(OSError):
                print(end="", flush=True)
            os._exit(130)  # threads that pack would be waited for; what they write appears whole or not at all
        raise


@app.callback()
def every(context: typer.Context, quiet: Quiet = False, json: AllJson = False, version: ShowVersion = False) -> None:
    """Move a capability from any LLM into yours, and keep it as a small SkillPack that plugs in and out."""
    settle(context, quiet=quiet, json=json)


@app.command(rich_help_panel=SKILLS)
def run(recipe: RecipeFile, dir: RunDirectory = None, device: Device = "auto", json: AsJson = False) -> None:
    """Do everything a recipe asks for: sample, score, train, pack, verify, fuse, evaluate.

    Stages that are done are skipped, so a killed run goes on where it was.
    """
    from graftllm.pipeline import river
    from graftllm.storage import only_writer

    work = _open_work(recipe, dir, device)
    with only_writer(work.directory):
        report = river.run(work)
    _print_report(report, work.directory, as_json=json)


@app.command(rich_help_panel=SKILLS)
def sample(recipe: RecipeFile, dir: RunDirectory = None, device: Device = "auto") -> None:
    """Ask the sources of a recipe its prompts; stop there."""
    from graftllm.pipeline import transfer

    _each_skill(_open_work(recipe, dir, device), transfer.sample)


@app.command(rich_help_panel=SKILLS)
def score(recipe: RecipeFile, dir: RunDirectory = None, device: Device = "auto") -> None:
    """Sample and judge; write SFT rows and preference pairs; stop there."""
    from graftllm.pipeline import transfer

    _each_skill(_open_work(recipe, dir, device), transfer.score)


@app.command(rich_help_panel=SKILLS)
def train(recipe: RecipeFile, dir: RunDirectory = None, device: Device = "auto") -> None:
    """Sample, score, tune the target on each skill (SFT, then DPO); stop there."""
    from graftllm.pipeline import transfer

    _each_skill(_open_work(recipe, dir, device), transfer.train)


app.command(rich_help_panel=SKILLS)(cost)
app.command(rich_help_panel=SKILLS)(report)
app.command(rich_help_panel=PACKS, cls=ServableAlone)(pack)
for _command in (inspect, verify, apply, merge, export):
    app.command(rich_help_panel=PACKS)(_command)
for _command in (fuse, add, remove, rules, learn):
    app.command(rich_help_panel=GRAFTED)(_command)
app.command("list", rich_help_panel=GRAFTED)(list_shelf)
app.command("eval", rich_help_panel=GRAFTED)(evaluate)
for _command in (chat, serve):
    app.command(rich_help_panel=GRAFTED)(_command)
for _command in (push, pull, doctor):
    app.command(rich_help_panel=AROUND)(_command)


@app.command(rich_help_panel=SKILLS)
def demo(
    dir: Annotated[Path, typer.Option(help="Where artifacts go.")] = Path("runs/demo"),
    device: Device = "auto",
    json: AsJson = False,
) -> None:
    """See the method work on small models that are trained on the spot.

    Trains a target and three foreign sources from scratch and moves three skills into the target. About ten
    to twenty minutes on two cores, without a download. Killed and started again it goes on where it was.
    """
    from graftllm.demo import RECIPE, build_zoo
    from graftllm.pipeline import river
    from graftllm.storage import only_writer

    with only_writer(dir):
        work = _open_work(RECIPE, dir, device)
        build_zoo(dir / "zoo", work.stages, device=device)
        report = river.run(work)
    _print_report(report, dir, as_json=json)
    if not json:
        first = next(iter(report.packs))
        print_lines(
            "What to type next:",
            "  " + typed("graftllm", "chat", dir / "grafted"),
            "  " + typed("graftllm", "inspect", dir / "packs" / f"{first}.safetensors"),
            "  " + typed("graftllm", "eval", dir / "grafted", "--task", dir / f"zoo/prompts/{first}.test.jsonl"),
        )


def _open_work(recipe: Path, directory: Path | None, device: str) -> "Work":
    from graftllm.pipeline.work import open_work

    return open_work(recipe, directory, device=device)


def _each_skill(work: "Work", stage: Any) -> None:
    from graftllm.pipeline.preparing import check_inputs
    from graftllm.storage import only_writer

    with only_writer(work.directory):
        check_inputs(work)
        for skill in work.recipe.skills:
            stage(work, skill)
            print(f"{work.skill(skill)}: {stage.__name__} done")


def _print_report(report: "Report", directory: Path, *, as_json: bool) -> None:
    from graftllm.evaluation.tables import closing_lines, grids, table

    if as_json:
        print(report.model_dump_json())
        return
    for grid in grids(report):
        print_table(table(grid))
    print_lines(*closing_lines(report), f"Report and plots: {directory / 'report.md'}")


if __name__ == "__main__":
    main()
