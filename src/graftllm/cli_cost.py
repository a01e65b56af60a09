"""The command `cost`: what a recipe would take. `cli` registers it.

Like there, no logic lives here and heavy imports happen inside the functions.
"""

from pathlib import Path
from typing import Annotated

import typer

from graftllm.terminal import AsJson, print_json, print_lines, print_table


def cost(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML recipe, such as recipes/demo.yaml.")],
    dir: Annotated[Path | None, typer.Option("--dir", help="The run's directory, for {dir} in the recipe.")] = None,
    hardware: Annotated[
        str | None,
        typer.Option(
            help="Show every part on this: cpu-CORES, COUNTxGPU or MACHINESxCOUNTxGPU, such as 2x8xh100.  [default: "
            "a row for each of several]"
        ),
    ] = None,
    accelerate: Annotated[
        Path | None,
        typer.Option(help="accelerate configuration to check against --hardware; shows how it shares the target out."),
    ] = None,
    prompts: Annotated[
        int, typer.Option(min=1, help="Prompts of each set that is not here and has no limit.")
    ] = 10_000,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt that is not here.")] = 200,
    answer_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of an answer.  [default: half of the most that is allowed]")
    ] = None,
    json: AsJson = False,
) -> None:
    """Estimate what a recipe takes before it is run: tokens, operations, hours, memory, disk, dollars.

    Prompts that lie on this machine are counted; nothing but configurations of models is downloaded. It says what it
    assumes, and what does not fit.
    """
    from graftllm.costs import tables
    from graftllm.costs.hardware import ROWS
    from graftllm.costs.hardware import hardware as named
    from graftllm.costs.launching import fitting, read_launch
    from graftllm.costs.prompts import Assumed
    from graftllm.costs.survey import survey
    from graftllm.evaluation.tables import table
    from graftllm.recipe import check_target_made, load_recipe

    launch = read_launch(accelerate) if accelerate else None
    rows = [named(name) for name in ([hardware] if hardware else ROWS)]
    if launch:
        rows = [fitting(launch, named(hardware) if hardware else None)]
    assumed = Assumed(prompts=prompts, prompt_tokens=prompt_tokens, answer_tokens=answer_tokens)
    loaded, directory = load_recipe(recipe, dir)
    check_target_made(loaded, directory)
    asked = survey(loaded, assumed)
    if json:
        print_json(tables.figures(asked, rows, launch))
        return
    parts = tables.estimates(asked, rows[0], launch)
    print_table(table(tables.amount_grid([one.amount for one in parts])))
    alone = len(rows) == 1
    print_table(table(tables.hardware_grid(parts, rows[0]) if alone else tables.rows_grid(asked, rows)))
    if alone:
        print_lines(*tables.warnings(parts, rows[0]))
    print_lines(*tables.closing_lines(asked, launch))
