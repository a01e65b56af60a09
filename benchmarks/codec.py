"""How much is lost at how many bytes: our codec, the published ones and the limit, on real fine-tunes.

    python benchmarks/codec.py [--dir runs/codec] [--quick] [--reuse runs/demo] [--size small|large] [--device auto]
    python benchmarks/codec.py --only auto --target demo --seeds 0      # one method again, in a minute or two
    python benchmarks/codec.py --size large --steps 10                      # see that trainings start

Models are trained once (`codec_models.py`), and every file is measured once: what is known is kept
under DIR/measured until the method's code or its models change. With --only the other methods count as
they were last measured. Writes results.json, results.md and kl.png into DIR, and prints the tables.
"""

import argparse
import hashlib
import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from codec_measures import PROMPTS, Yardstick
from codec_methods import OWN, RATES, Method, code_digest, methods
from codec_models import LARGE, SEEDS, SIZES, SKILLS, WIDE, build_subjects
from codec_report import draw, tables
from codec_results import REFERENCE, Point
from rehearsal import add_options, rehearse

from graftllm.checkpoint import Checkpoint
from graftllm.progress import track
from graftllm.stages import Stages
from graftllm.storage import whole_file, write_text


def main() -> None:
    """Measure what is asked for and not known; write and print the results."""
    given = _arguments()
    known = methods(given.rates)
    wanted = [] if given.report else [name for name in known if given.only is None or name in given.only]
    if given.steps:
        zoo = LARGE if given.size == "large" else WIDE
        for line in rehearse(given.dir, zoo, given.steps, members=given.members, device=given.device):
            print(line, flush=True)
        return
    targets, seeds = (given.target or SIZES[given.size]), given.seeds
    if given.quick:
        targets, seeds = targets[:1], [0]
    points: list[Point] = []
    facts: dict[str, Any] = {}
    for subject in build_subjects(given.dir / "models", targets, seeds, given.reuse, given.device):
        if given.skills and subject.skill not in given.skills:
            continue
        yardstick = Yardstick(subject, given.prompts)
        bench = Bench(given.dir / "measured" / subject.name, yardstick)
        facts[subject.name] = bench.once("ends", "ends", [], yardstick.ends)
        for name in track(wanted, label=subject.name) if len(wanted) > 3 else wanted:
            for setting in known[name].settings_for(subject.target, quick=given.quick):
                bench.measured(known[name], setting)
        for method in known.values():
            for setting, found in bench.remembered(method):
                if method.name == "exact":
                    facts[subject.name] |= {"exact": found}
                elif "refused" not in found:
                    about = (subject.target, subject.skill, subject.seed, yardstick.delta.base.parameters)
                    points.append(Point(*about, method.name, str(setting), found.pop("nbytes"), found))
    _write(given.dir, points, facts)


class Bench:
    """Where the measurements of one subject are remembered."""

    def __init__(self, directory: Path, yardstick: Yardstick) -> None:
        """Remember under `directory` what is measured on a subject."""
        self.yardstick = yardstick
        self.stages = Stages(directory)
        subject = yardstick.subject
        models = [Checkpoint.open(path).fingerprint for path in (subject.base, subject.tuned)]
        files = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (subject.rows, subject.test)]
        self._inputs = [*models, *files, yardstick.prompts]

    def once(self, method: str, setting: str, inputs: Sequence[Any], action: Any) -> dict[str, Any]:
        """Return what `action` finds; it is done only when it was not, or with other inputs."""
        stamp = self.stages.run(f"{_slug(method)}/{_slug(setting)}", [*self._inputs, *inputs], [], action)
        return dict(cast(dict[str, Any], stamp.result))

    def measured(self, method: Method, setting: Any) -> dict[str, Any]:
        """Measure a method at a setting, unless that is known and its code has not changed."""
        action = partial(method.measure, self.yardstick, setting)
        return self.once(method.name, str(setting), [code_digest(method.sources)], action)

    def remembered(self, method: Method) -> list[tuple[Any, dict[str, Any]]]:
        """Return what was last measured of a method at its settings, also by older code."""
        paths = {
            setting: self.stages.directory / _slug(method.name) / f"{_slug(str(setting))}.json"
            for setting in method.settings
        }
        return [(setting, json.loads(path.read_text())["result"]) for setting, path in paths.items() if path.exists()]


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")


def _write(directory: Path, points: Sequence[Point], facts: dict[str, Any]) -> None:
    content = {
        "subjects": facts,
        "points": [
            {"subject": f"{p.target}.{p.skill}.{p.seed}", "method": p.method, "setting": p.setting, "nbytes": p.nbytes}
            | {"bits_per_parameter": round(p.rate, 4)} | dict(p.found)
            for p in points
        ],
    }  # fmt: skip
    write_text(directory / "results.json", json.dumps(content, indent=1))
    text = tables(points, facts)
    write_text(directory / "results.md", text)
    with whole_file(directory / "kl.png") as file:
        draw(points).savefig(file, format="png", dpi=130, bbox_inches="tight")
    print(text)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("runs/codec"))
    parser.add_argument("--reuse", type=Path, help="directory of a finished demo with seed 0, to copy its models")
    parser.add_argument(
        "--quick", action="store_true", help="the first of the size's targets with seed 0, and few settings"
    )
    parser.add_argument("--only", nargs="+", choices=list(methods()), metavar="METHOD", help=f"{OWN}, {REFERENCE!r} …")
    parser.add_argument("--report", action="store_true", help="measure nothing, write what is known")
    parser.add_argument("--size", choices=list(SIZES), default="small")
    add_options(parser)
    parser.add_argument("--device", default="auto", help="where models are trained; measured is on CPU")
    parser.add_argument("--target", nargs="+", choices=list(SKILLS), help="instead of those of the size")
    parser.add_argument("--skills", nargs="+", help="all by default")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES), help="bits per parameter of our budgets")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="held-out prompts for KL and score")
    return parser.parse_args()


if __name__ == "__main__":
    main()
