"""What `compress` makes of every ONNX file below a folder: coverage, sizes, error, latency, time, and every failure.

    python tools/coverage_table.py MODELS_DIR [--reach reach.csv] [--target params=0.7] [--latency 0.5]

coverage   share of all parameters that lie in a prunable group
exact      the same without groups whose removal changes more than they contribute (--allow-inexact)
init       the same over initializers that some node reads, which is what reach.csv states as a floor (its last column,
           rounded to two places); LOW where init is below it
error      the pruned model against the masked original in onnxruntime, relative
exit       as the command line's; 'crash' and 'time' where the trial's own process died or took longer than --limit

Models run one at a time in a child process (--jobs N for several, 0 for none). Ends with counts per exit code.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from pathlib import Path

from _common import amount, machine_note, print_table, write_json
from _trials import Trial, exit_counts, run_all

HALF_PLACE = 0.005  # reach.csv is rounded to two places
REASON = 110


def read_reach(path: Path) -> dict[str, float]:
    """Floor per model name."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    return {row[0]: float(row[-1]) for row in rows[1:] if row}


def row_of(t: Trial, name: str, floor: float | None) -> list[str]:
    def percent(key: str) -> str:
        return f"{t[key]:.1%}" if key in t else ""

    def pair(key: str) -> str:
        after = f" -> {amount(t[f'{key}_after'])}" if f"{key}_after" in t else ""
        return f"{amount(t[key])}{after}" if key in t else ""

    latency = f"{t['before_ms']:.3g} -> {t['after_ms']:.3g}" if "before_ms" in t else t.get("latency_note", "")[:20]
    return [
        name,
        percent("coverage"),
        percent("exact"),
        percent("initializers"),
        "" if floor is None else f"{floor:.0%}",
        below(t, floor),
        pair("params"),
        pair("macs"),
        f"{t['error']:.0e}" if "error" in t else "",
        latency,
        f"{t['seconds']:.1f}",
        str(t["exit"]),
        (t["reason"] or t["barrier"] if t["exit"] != 0 or below(t, floor) == "LOW" else "")[:REASON],
    ]


def below(t: Trial, floor: float | None) -> str:
    """The verdict on a model's coverage."""
    if floor is None:
        return ""
    return "ok" if t.get("initializers", 0.0) >= floor - HALF_PLACE else "LOW"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models_dir", type=Path)
    parser.add_argument("--reach", type=Path, help="CSV: model name first, floor of its coverage last")
    parser.add_argument("--target", default="params=0.7", help="what is to remain")
    parser.add_argument("--best-effort", action="store_true", help="take the closest model where the target isn't met")
    parser.add_argument("--latency", type=float, default=0, help="seconds per model to measure latency for; 0: don't")
    parser.add_argument("--only", help="regular expression of paths below MODELS_DIR")
    parser.add_argument("--jobs", type=int, default=1, help="child processes; 0: in this process, without a limit")
    parser.add_argument("--limit", type=float, default=300, help="seconds per model")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    floors = read_reach(options.reach) if options.reach else {}
    root: Path = options.models_dir
    paths = sorted(
        p for p in root.rglob("*.onnx") if not options.only or re.search(options.only, str(p.relative_to(root)))
    )
    if not paths:
        sys.exit(f"no .onnx below {root}")
    note = machine_note()
    print(note)
    trials: list[Trial] = []
    for done in run_all(
        paths,
        options.target,
        jobs=options.jobs,
        limit=options.limit,
        latency=options.latency,
        best_effort=options.best_effort,
    ):
        trials.append(done)
        print(
            f"{len(trials)}/{len(paths)} {Path(done['path']).stem}: exit {done['exit']} {done['reason'][:150]}",
            file=sys.stderr,
            flush=True,
        )
    trials.sort(key=lambda t: t["path"])
    rows = [
        row_of(t, str(Path(t["path"]).relative_to(root).with_suffix("")), floors.get(Path(t["path"]).stem))
        for t in trials
    ]
    print_table(
        [
            "model",
            "coverage",
            "exact",
            "init",
            "reach",
            "",
            "params",
            "MACs",
            "error",
            "latency ms",
            "seconds",
            "exit",
            "reason, or the largest barrier",
        ],
        rows,
        f"{options.target}, {len(trials)} models",
    )
    print(f"\n{exit_counts(trials)}")
    known = [(t, floors[Path(t["path"]).stem]) for t in trials if Path(t["path"]).stem in floors]
    low = [Path(t["path"]).stem for t, floor in known if below(t, floor) == "LOW"]
    if known:
        print(f"{len(low)} of {len(known)} models with a known reach are below it{': ' if low else ''}{', '.join(low)}")
    write_json(options.json, {"machine": note, "target": options.target, "trials": trials, "below_reach": low})


if __name__ == "__main__":
    main()
