"""The river on one page: from a recipe to a grafted model and its report.

Each stage is skipped when what it makes is there and its inputs have not changed, so a run that
was killed goes on where it was, and a finished one gives its report again.
"""

from typing import cast

from graftllm.evaluation.report import Report, Results, build_report
from graftllm.evaluation.tables import write_report
from graftllm.fusion.manifest import AUTO
from graftllm.launched import leads
from graftllm.pipeline.baselines import BASELINES
from graftllm.pipeline.measuring import (
    check_unplug,
    measure_base,
    measure_grafted,
    measure_routes,
    measure_source,
    measure_spectra,
    measure_tuned,
)
from graftllm.pipeline.packing import check_budget, fuse, pack, verify
from graftllm.pipeline.preparing import check_inputs
from graftllm.pipeline.transfer import train
from graftllm.pipeline.work import GENERAL, Work
from graftllm.recipe import dump_recipe
from graftllm.storage import write_text


def run(work: Work) -> Report:
    """Do everything that the recipe asks for; return the report, which is also written to the directory.

    Raises:
        GraftError: something in the recipe, the models or the data cannot be used; see the message.
    """
    recipe = work.recipe
    check_inputs(work)
    check_budget(work)
    _keep_recipe(work)
    trained = {name: train(work, name) for name in recipe.skills}
    scores = {"base": measure_base(work)}
    for name in recipe.skills:
        scores[f"source.{name}"] = measure_source(work, name)
        scores[f"tuned.{name}"] = measure_tuned(work, name, trained[name])
    packed = {name: pack(work, name, trained[name], scores) for name in recipe.skills}
    verified = {name: verify(work, name, packed[name]) for name in recipe.skills}
    fused = fuse(work, list(packed.values()))
    for name in recipe.skills:
        scores[f"pack.{name}"] = measure_grafted(work, f"pack.{name}", fused, name, [name])
    scores["routed"] = measure_grafted(work, "routed", fused, AUTO, [*recipe.skills, GENERAL])
    routes = measure_routes(work, fused)
    unplugged = check_unplug(work, fused)
    for baseline in recipe.compare:
        scores |= BASELINES[baseline](work, trained, packed)
    curves = measure_spectra(work, list(trained.values()))
    report = build_report(recipe, Results(scores, packed, verified, routes, unplugged), list(work.stages.used.values()))
    if leads():
        write_report(report, work.directory, cast(dict[str, dict[str, list[float]]], curves.result))
    return report


def _keep_recipe(work: Work) -> None:
    """Write the recipe with what was chosen for it into the run's directory, unless it is read from there."""
    sft, dpo = work.training(lora=False)
    kept = work.directory / "recipe.yaml"
    written_by_hand = work.read_from is not None and work.read_from.absolute() == kept.absolute()
    if leads() and not written_by_hand:
        write_text(kept, dump_recipe(work.recipe.model_copy(update={"sft": sft, "dpo": dpo})))
