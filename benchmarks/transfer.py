"""Six skills from six foreign sources into one target: what each way of moving them reaches, keeps and takes.

    python benchmarks/transfer.py [--seeds 0 1 2] [--dir runs/transfer] [--rows NAME ...] [--reuse DIR ...]
        [--size small|large] [--device auto] [--image docs/images/transfer-bytes.png]
    python benchmarks/transfer.py --size large --steps 10 [--members target]    # see that trainings start

Builds the zoo of `fusion_models.py` where it is not there, measures every row of `transfer_rows.py` for each seed, and
writes `results.md`, `results.json` and a picture. Each row is kept when it is measured, and each training is a stage,
so a killed run goes on where it was; rows that are there are not measured again.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fusion_models import SIZES
from rehearsal import add_options, rehearse
from transfer_models import Setting, open_setting
from transfer_report import as_json, cost_table, costs, draw, table
from transfer_rows import Row, rows

from graftllm.metering import Spent
from graftllm.stages import Stamp
from graftllm.storage import only_writer, write_text

_VERSION = 1  # of how rows are measured; a higher one measures them again


def measure_seed(setting: Setting, wanted: Sequence[str] | None) -> dict[str, Row]:
    """Measure the wanted rows of one seed that are not kept yet; return all that are there."""
    home, found = setting.work.directory / "rows", {}
    for name, measure in rows(setting):
        path = home / f"{name.replace(' ', '-')}.json"
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if kept.get("version") == _VERSION:
            found[name] = Row(**kept["row"])
        elif wanted is None or name in wanted:
            found[name] = measure()
            write_text(path, json.dumps({"version": _VERSION, "row": asdict(found[name])}, indent=1))
            print(f"{setting.work.directory.name}: {name}: {found[name]}", flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is asked for and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("runs/transfer"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", help="measure these alone  [default: all]")
    parser.add_argument("--reuse", nargs="*", type=Path, default=[], help="directories with zoos, one for each seed")
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
    results: dict[int, dict[str, Row]] = {}
    spent: dict[int, dict[str, Spent]] = {}
    tokens: dict[int, dict[str, int]] = {}
    for i, seed in enumerate(given.seeds):
        where = given.dir / (f"seed{seed}" if given.size == "small" else f"{given.size}-seed{seed}")
        reuse = given.reuse[i] if i < len(given.reuse) else None
        with only_writer(where):
            setting = open_setting(where, seed, size=given.size, reuse=reuse, device=given.device)
            results[seed] = measure_seed(setting, given.rows)
            spent[seed] = costs(_stamps(where / "stages"))
            tokens[seed] = setting.tokens() if "SFT" in results[seed] else {}
        if results[seed]:
            text = f"{table(results)}\n{cost_table(spent, tokens)}"
            content = {seed: {name: asdict(row) for name, row in found.items()} for seed, found in results.items()}
            whole = {"rows": content, "spent": as_json(spent), "tokens": tokens}
            write_text(given.dir / "results.json", json.dumps(whole, indent=1))
            write_text(given.dir / "results.md", text)
            draw(results, given.image or given.dir / "bytes.png")
            print(text)


def _stamps(directory: Path) -> list[Stamp]:
    """Return the stamps of a seed's finished stages."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(directory.glob("*.json"))]
    return [Stamp(**stamp) for stamp in found]


if __name__ == "__main__":
    main()
