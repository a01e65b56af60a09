"""The command that shows a run: report. `cli` registers it.

Like there, no logic lives here and heavy imports happen inside the function.
"""

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run, such as runs/demo; finished or not.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="HTML file to write.")],
) -> None:
    """Write one self-contained HTML page of a run: scores, forgetting, router, pack cards, data, costs, plots."""
    from graftllm.evaluation.page import write_page

    write_page(run, out)
    print(f"{out}: {out.stat().st_size:,} bytes; open it in a browser.")
