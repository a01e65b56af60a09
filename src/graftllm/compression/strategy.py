"""The strategies: which operator compresses which parameter, and how hard.

`auto`, which takes for every matrix the operator that is cheapest at one step for the whole model, is in `filling`.
`exact` keeps every bit; with a budget it does so in two layers, of which the lower is what `auto` makes. `paper` is in
`published`. What is done to a tensor is a unit of `units`, and a `crew` does them.
"""

from collections.abc import Sequence
from dataclasses import replace

from graftllm.compression.crew import Crew
from graftllm.compression.filling import Budget, fill_budget
from graftllm.compression.jobs import Compressed, Job, Unit, found_code, found_sizes
from graftllm.compression.lowrank import rank_for_energy
from graftllm.errors import BudgetError


def encode_job(job: Job, crew: Crew, budget: Budget | None) -> list[Compressed]:
    """Return every parameter of a delta in compressed form. Payloads stay in the job's workspace.

    Args:
        job: what to compress, and how.
        crew: who does it.
        budget: bytes that the file may take. `paper` does not count what its header says of each parameter.

    Raises:
        BudgetError: it cannot be met.
        CheckpointError: the delta holds NaN, infinity or values above 2 ** 48.
    """
    if job.options.strategy == "auto" or job.options.layered:
        return fill_budget(job, crew, budget)
    ranks = {} if budget is None else _ranks_for_budget(job, crew, budget.nbytes - budget.beside([]))
    units = [Unit(name, "publish", ranks.get(name)) for name in job.delta.distinct]
    crew(units, "packing")
    return [found_code(job, unit) for unit in units]


def refine_job(job: Job, crew: Crew, parts: Sequence[Compressed]) -> list[Compressed]:
    """Return parts that `encode_job` gave, with an exact layer on all that are not exact yet."""
    lossy = [part for part in parts if part.unit.kind == "code" and part.facts.operator.operator != "exact"]
    units = {part.name: replace(part.unit, kind="refine") for part in lossy}
    crew(list(units.values()), "refining")
    return [found_code(job, units[part.name]) if part.name in units else part for part in parts]


def _ranks_for_budget(job: Job, crew: Crew, budget: int) -> dict[str, int]:
    """Return the ranks at the largest energy that fits the budget, by bisection over known spectra."""
    options = job.options
    crew([Unit(name, "spectrum") for name in job.delta.distinct], "reading spectra")
    sizes = {name: found_sizes(job, name) for name in job.delta.distinct}

    def total(energy: float) -> int:
        return sum(size.nbytes(energy, options) for size in sizes.values())

    low, high = 1e-6, 1.0
    if total(low) > budget:
        raise BudgetError(
            f"budget: too small by {total(low) - budget:,} bytes: the header, tokenizer files, and "
            f"{total(low):,} bytes that this delta takes at least, are more. Raise it, or lower the density (now "
            f"{options.density})."
        )
    if total(high) <= budget:
        low = high
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if total(middle) <= budget else (low, middle)
    return {name: rank_for_energy(size.spectrum, low) for name, size in sizes.items() if size.spectrum is not None}
