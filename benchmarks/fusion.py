"""Fusion compared: packs behind a router against merging, training on, and LoRAs; and how it scales with packs.

    python benchmarks/fusion.py [--seeds 0 1 2] [--dir runs/fusion] [--baselines sequential lora]
        [--scaling 1 2 8 32 64] [--size small|large] [--device auto] [--image docs/images/fusion-bytes.png]
    python benchmarks/fusion.py --size large --steps 10 [--members target]      # see that trainings start

Builds the zoo of `fusion_models.py` where it is not there, measures every row of `fusion_rows.py` for each seed,
and writes `results.md`, `results.json` and a picture. Each row is kept when it is measured, so a killed run goes on
where it was; rows that are there are not measured again.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from fusion_models import SIZES, build_models
from fusion_report import Results, draw, table
from fusion_rows import Bench, Measurement, baselines, rows
from fusion_scaling import measure_scaling
from rehearsal import add_options, rehearse

from graftllm.storage import only_writer, write_text

_VERSION = 3  # of how rows are measured; a higher one measures them again


def measure_seed(bench: Bench, directory: Path, baseline_names: Sequence[str]) -> dict[str, Measurement]:
    """Measure every row of one seed that is not kept in `directory` yet."""
    found = {}
    for name, measure in (*rows(bench), *baselines(bench, baseline_names)):
        found[name] = _kept(bench, directory, name, measure)
        print(f"{directory.parent.name}: {name}: {found[name]}", flush=True)
    return found


def _kept(bench: Bench, directory: Path, name: str, measure: Callable[[], Measurement]) -> Measurement:
    path, key = directory / f"{name.replace(' ', '-')}.json", [_VERSION, bench.built.stamp.key]
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["key"] == key:
            return Measurement(**kept["row"])
    measured = measure()
    write_text(path, json.dumps({"key": key, "row": asdict(measured)}, indent=1))
    return measured


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is asked for and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("runs/fusion"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--reuse", nargs="*", type=Path, default=[], help="finished demos, one for each seed")
    parser.add_argument("--baselines", nargs="*", default=["sequential", "lora"], help="of the pipeline, by name")
    parser.add_argument(
        "--scaling", nargs="*", type=int, default=[1, 2, 8, 32, 64], help="numbers of packs, first seed"
    )
    parser.add_argument("--size", choices=list(SIZES), default="small")
    add_options(parser)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--image", type=Path, help="where the picture goes  [default: DIR/bytes.png]")
    given = parser.parse_args(arguments)
    if given.steps:
        zoo, seed = SIZES[given.size], given.seeds[0]
        for line in rehearse(given.dir, zoo, given.steps, members=given.members, seed=seed, device=given.device):
            print(line, flush=True)
        return
    words = [task for task, _ in SIZES[given.size].skills]
    results: Results = {}
    scaling: list[dict[str, Any]] = []
    for i, seed in enumerate(given.seeds):
        where = given.dir / (f"seed{seed}" if given.size == "small" else f"{given.size}-seed{seed}")
        reuse = given.reuse[i] if i < len(given.reuse) else None
        with only_writer(where):
            built = build_models(where, seed, size=given.size, reuse=reuse, device=given.device)
            bench = Bench(built, words)
            results[seed] = measure_seed(bench, where / "rows", given.baselines)
            if i == 0 and given.scaling:
                scaling = measure_scaling(bench, where / "scaling", given.scaling)
        _write(results, scaling, given.dir, given.image or given.dir / "bytes.png")


def _write(results: Results, scaling: Sequence[dict[str, Any]], directory: Path, image: Path) -> None:
    skills = [name for name in next(iter(cast(Any, results).values()))["base"].scores if name != "general"]
    content = {seed: {name: asdict(row) for name, row in found.items()} for seed, found in results.items()}
    write_text(directory / "results.json", json.dumps({"rows": content, "scaling": list(scaling)}, indent=1))
    text = table(results, skills, scaling)
    write_text(directory / "results.md", text)
    draw(results, skills, image)
    print(text)


if __name__ == "__main__":
    main()
