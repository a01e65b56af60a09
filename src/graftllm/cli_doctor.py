"""The command that looks at the installation: doctor. `cli` registers it."""

import typer

from graftllm.terminal import AsJson, print_json, print_lines, print_table


def doctor(json: AsJson = False) -> None:
    """Show what is installed, against what is supported, and what this machine is fit for.

    Exit code 1 where something has to be mended. The network is not asked.
    """
    from graftllm.doctor import examine

    found = examine()
    if json:
        print_json(found.figures())
    else:
        from graftllm.evaluation.tables import Grid, table

        print_table(table(Grid("", ("what", "which", "how it is"), found.rows)))
        print_lines(*found.problems or ["All is fit."])
    if found.problems:
        raise typer.Exit(1)
