"""What `compress` makes of a zoo of exports, and whether the same network fares alike whatever exported it.

    python tools/zoo_table.py ZOO_DIR [--target params=0.7] [--jobs 2]
    python tools/zoo_table.py ZOO_DIR/torchvision-torchscript ZOO_DIR/torchvision-dynamo

ZOO_DIR holds FAMILY-EXPORTER/NAME.onnx with NAME.onnx.json beside each, whose field 'ort' is 'ok' where onnxruntime ran
the model. Only those are tried. Three tables: how many per folder are pruned and verified (exit 0), every exception
with its reason, and coverage per exporter of each network that several exporters wrote; more than two points between
the highest and the lowest are flagged.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from _common import machine_note, print_table, write_json
from _trials import Trial, exit_counts, run_all

SPREAD = 0.02
REASON = 150


def runnable(folder: Path) -> list[Path]:
    """Models of a folder that onnxruntime runs."""
    found = []
    for path in sorted(folder.glob("*.onnx")):
        note = path.with_name(f"{path.name}.json")
        if note.exists() and json.loads(note.read_text(encoding="utf-8")).get("ort") == "ok":
            found.append(path)
    return found


def folders_of(roots: Iterable[Path]) -> list[Path]:
    """The given folders, or the ones inside where a given one holds no models itself."""
    found: list[Path] = []
    for root in roots:
        inside = sorted(p for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
        found += [root] if any(root.glob("*.onnx")) else inside
    return [f for f in found if any(f.glob("*.onnx"))]


def summary_rows(trials: Sequence[Trial]) -> list[list[str]]:
    by_folder: dict[str, list[Trial]] = {}
    for t in trials:
        by_folder.setdefault(folder(t), []).append(t)
    rows = []
    for name, inside in [*sorted(by_folder.items()), ("all", list(trials))]:
        done = sum(t["exit"] == 0 for t in inside)
        rows.append(
            [
                name,
                str(len(inside)),
                str(done),
                f"{done / len(inside):.1%}",
                mean_of(inside, "coverage"),
                mean_of(inside, "exact"),
                f"{sum(t['seconds'] for t in inside):.0f}",
            ]
        )
    return rows


def mean_of(trials: Sequence[Trial], key: str) -> str:
    """Mean share over the trials that came far enough to have one."""
    shares = [t[key] for t in trials if key in t]
    return f"{sum(shares) / len(shares):.1%}" if shares else ""


def spread_rows(trials: Sequence[Trial], exporters: Sequence[str]) -> tuple[list[list[str]], int]:
    """Coverage per exporter of networks that came from at least two; and how many are too far apart."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for t in trials:
        family, _, exporter = folder(t).partition("-")
        if "coverage" in t:
            found.setdefault((family, Path(t["path"]).stem), {})[exporter] = t["coverage"]
    rows, flagged = [], 0
    for (family, name), per_exporter in sorted(found.items()):
        if len(per_exporter) < 2:
            continue
        spread = max(per_exporter.values()) - min(per_exporter.values())
        flagged += spread > SPREAD
        cells = [f"{per_exporter[e]:.1%}" if e in per_exporter else "" for e in exporters]
        rows.append([f"{family}/{name}", *cells, f"{spread * 100:.1f}", "APART" if spread > SPREAD else ""])
    return rows, flagged


def folder(t: Trial) -> str:
    """FAMILY-EXPORTER of a trial."""
    return Path(t["path"]).parent.name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path, nargs="+", help="a folder of FAMILY-EXPORTER folders, or some of those")
    parser.add_argument("--target", default="params=0.7", help="what is to remain")
    parser.add_argument("--best-effort", action="store_true", help="take the closest model where the target isn't met")
    parser.add_argument("--only", help="regular expression of FAMILY-EXPORTER/NAME")
    parser.add_argument("--jobs", type=int, default=1, help="child processes; 0: in this process, without a limit")
    parser.add_argument("--limit", type=float, default=300, help="seconds per model")
    parser.add_argument("--all-spreads", action="store_true", help="list networks whose exporters agree, too")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    paths = [
        p
        for f in folders_of(options.zoo)
        for p in runnable(f)
        if not options.only or re.search(options.only, f"{f.name}/{p.stem}")
    ]
    if not paths:
        sys.exit("no models that onnxruntime runs")
    note = machine_note()
    print(note)
    trials: list[Trial] = []
    for done in run_all(paths, options.target, jobs=options.jobs, limit=options.limit, best_effort=options.best_effort):
        trials.append(done)
        print(
            f"{len(trials)}/{len(paths)} {folder(done)}/{Path(done['path']).stem}: exit {done['exit']} "
            f"{done['reason'][:150]}",
            file=sys.stderr,
            flush=True,
        )
    trials.sort(key=lambda t: t["path"])
    print_table(
        ["family-exporter", "run in ort", "exit 0", "share", "mean coverage", "mean exact", "seconds"],
        summary_rows(trials),
        f"{options.target}: models that onnxruntime runs, and how many are pruned and verified",
    )
    print(f"\n{exit_counts(trials)}")
    exceptions = [
        [
            f"{folder(t)}/{Path(t['path']).stem}",
            str(t["exit"]),
            f"{t['coverage']:.1%}" if "coverage" in t else "",
            (t["reason"] or t["barrier"])[:REASON],
        ]
        for t in trials
        if t["exit"] != 0
    ]
    print_table(["exception", "exit", "coverage", "reason"], exceptions, f"{len(exceptions)} exceptions")
    exporters = sorted({folder(t).partition("-")[2] for t in trials})
    rows, flagged = spread_rows(trials, exporters)
    shown = [r for r in rows if r[-1] or options.all_spreads]
    print_table(
        ["network", *exporters, "spread", ""],
        shown,
        f"Coverage per exporter, {len(rows)} networks from several; {flagged} more than "
        f"{SPREAD * 100:.0f} points apart",
    )
    write_json(options.json, {"machine": note, "target": options.target, "trials": trials, "apart": flagged})


if __name__ == "__main__":
    main()
