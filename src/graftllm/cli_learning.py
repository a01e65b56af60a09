"""The commands that measure and extend a grafted model: eval and learn. `cli` registers them.

Like there, no logic lives here and heavy imports happen inside the functions.
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from graftllm.errors import FusionError
from graftllm.terminal import AsJson, Device, print_json, print_lines, print_table


def evaluate(
    dir: Annotated[Path, typer.Argument(metavar="DIR", help="Grafted model or checkpoint directory.")],
    task: Annotated[
        list[Path] | None, typer.Option(help="JSONL prompt rows, with a reference each; repeat for several.")
    ] = None,
    lm_eval: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK", help="Task of lm-evaluation-harness, or its YAML file, instead; repeat."),
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="With --lm-eval: put requests into the model's chat template.")
    ] = False,
    router: Annotated[
        bool, typer.Option("--router", help="Score where prompts go, not answers; a row's task says where it belongs.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="With --router: picture to draw, a .png, .svg or .pdf file.")
    ] = None,
    pack: Annotated[
        str, typer.Option(help="A pack's name, base, auto (the router), or by-task (each row's task).")
    ] = "auto",
    judge: Annotated[
        Literal["exact", "math", "choice", "reasoning_gym", "code"],
        typer.Option(help="How answers are compared with references; code runs the rows' tests in a sandbox."),
    ] = "exact",
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
    device: Device = "auto",
    json: AsJson = False,
) -> None:
    """Score a grafted model, or an ordinary checkpoint, on files of prompts; or its router, with --router."""
    if bool(task) == bool(lm_eval):
        raise FusionError("--task, --lm-eval: expected one of them, to score on; give rows or tasks.")
    if router and lm_eval:
        raise FusionError("--lm-eval, --router: the router is scored on rows that say where they belong; give --task.")
    if router and pack != "auto":
        raise FusionError(f"--pack {pack}, --router: a pack is named, or the router asked; leave one of them out.")
    if plot is not None and not router:
        raise FusionError("--plot: draws what --router finds; give both, or neither.")
    if chat_template and not lm_eval:
        raise FusionError("--chat-template: is of --lm-eval; rows (--task) are put into the chat template anyway.")
    if lm_eval:
        _evaluate_harness(dir, lm_eval, pack, device, chat_template=chat_template, as_json=json)
        return
    assert task
    if router:
        _evaluate_router(dir, task, plot, device, as_json=json)
        return
    from graftllm.evaluation.tasks import evaluate_tasks
    from graftllm.recipe import SamplingOptions, options_of

    given = {"samples": 1, "temperature": 0, "top_p": 1, "max_new_tokens": max_new_tokens}
    options = options_of(SamplingOptions, given)
    result = evaluate_tasks(dir, task, pack=pack, judge=judge, options=options, device=device)
    if json:
        print_json(result.figures())
    else:
        print_lines(*result.sentences())


def learn(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML recipe; skills that DIR lacks are learnt.")],
    into: Annotated[Path, typer.Option(metavar="DIR", help="Grafted model whose base is the recipe's target.")],
    on: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Train on top of this pack, not the bare base; repeat.")
    ] = None,
    dir: Annotated[
        Path | None, typer.Option("--dir", help="Where artifacts go.  [default: runs/NAME of the recipe]")
    ] = None,
    device: Device = "auto",
    json: AsJson = False,
) -> None:
    """Learn new skills as packs of a grafted model, and show that the old ones stay what they were.

    Skills of the recipe that the model has are measured before and after. Killed and started again it goes on.
    """
    from graftllm.evaluation.tables import table
    from graftllm.pipeline.learning import learn as learn_into
    from graftllm.pipeline.work import open_work
    from graftllm.storage import only_writer

    work = open_work(recipe, dir, device=device)
    with only_writer(work.directory):
        learned = learn_into(work, into, on=on or ())
    if json:
        print(learned.model_dump_json())
        return
    print_table(table(learned.grid()))
    print_lines(*learned.sentences(), f"Matrix: {work.directory / 'forgetting.md'}")


def _evaluate_harness(
    dir: Path, tasks: list[str], pack: str, device: str, *, chat_template: bool, as_json: bool
) -> None:
    from graftllm.evaluation.harness import evaluate_harness

    result = evaluate_harness(dir, tasks, pack=pack, chat_template=chat_template, device=device)
    if as_json:
        print_json(result.figures())
    else:
        print_lines(*result.sentences())


def _evaluate_router(dir: Path, tasks: list[Path], plot: Path | None, device: str, *, as_json: bool) -> None:
    from graftllm.evaluation.routes import draw_router, evaluate_router
    from graftllm.evaluation.tables import table
    from graftllm.storage import check_picture

    if plot is not None:
        check_picture(plot, read=[dir, *tasks])
    result = evaluate_router(dir, tasks, device=device)
    if as_json:
        print_json(result.figures())
    else:
        for grid in result.grids():
            print_table(table(grid))
        print_lines(*result.sentences())
    if plot is not None:
        draw_router(result, plot)
