"""Does the mirror compute what onnxruntime computes? Every ONNX file below some folders, on inputs that it accepts.

    python tools/mirror_table.py MODELS_DIR [ZOO_DIR ...] [--only REGEX] [--limit 1e-4] [--json FILE]

error     mirror against onnxruntime: largest difference of an output, relative to its largest magnitude, over three
          input sets of several sizes. Files that onnxruntime doesn't run are listed apart and don't count
f64       where that is beyond --limit: the mirror, and onnxruntime, against the mirror computed in float64. 'ok, f64'
          where onnxruntime is the one that is further off
limit     --limit, or what the verification allows where the model computes in 16 bits or rounds to 8
mirror s  seconds to build the mirror; parameters that training would change, of all

Ends with the share of files that agree, with and without those adjudged by float64, and the operators that can't be
mirrored, with their files.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import amount, machine_note, print_table, write_json

from onnxprune import OPERATORS, Graph, OnnxPruneError, load
from onnxprune.errors import ModelRejected, NotMirrored
from onnxprune.mirroring import mirror
from onnxprune.verify.compare import difference
from onnxprune.verify.equivalence import TOLERANCES, tolerance
from onnxprune.verify.runs import feeds_that_run, session

Row = dict[str, Any]


def try_one(path: Path, limit: float) -> Row:
    """What becomes of one file."""
    row: Row = {"path": str(path), "state": "error", "reason": ""}
    start = time.perf_counter()
    try:
        graph = load(path)
        runner = session(path, threads=1)
        feeds, expected = feeds_that_run(graph, runner, 0, None)
    except ModelRejected as error:
        return row | {"state": "not run", "reason": str(error)}
    try:
        begun = time.perf_counter()
        module = mirror(graph)
        row["seconds"] = time.perf_counter() - begun
        row["trained"] = sum(p.numel() for p in module.parameters())
        row["stored"] = sum(p.size for p in graph.parameters.values())
        row["limit"] = max(limit, tolerance(graph, OPERATORS)) if has_small_formats(graph) else limit
        found = [run(module, graph.inputs, f) for f in feeds]
        row["error"] = worst(expected, found)
        if row["error"] > row["limit"]:
            double = mirror(graph, half=torch.float64).double()
            exact = [run(double, graph.inputs, f, double=True) for f in feeds]
            row["f64"] = [worst(exact, found), worst(exact, expected)]
        row["state"] = "ran"
    except NotMirrored as error:
        row.update(state="not mirrored", reason=str(error), missing=error.operators)
    except OnnxPruneError as error:
        row.update(reason=f"{type(error).__name__}: {error}")
    except Exception as error:  # the table goes on; this is what it is there to show
        row.update(reason=f"{type(error).__name__}: {str(error).strip()[:300]}")
    row["total"] = time.perf_counter() - start
    return row


def has_small_formats(graph: Graph) -> bool:
    """Whether anything is computed in, or rounded to, less than 32 bits."""
    return tolerance(graph, OPERATORS) != TOLERANCES["float32"]


def run(module: Any, names: Sequence[str], feed: dict[str, np.ndarray], *, double: bool = False) -> list[Any]:
    """The mirror's outputs as arrays."""
    inputs = [as_tensor(feed[n]) for n in names]
    with torch.no_grad():
        found = module(*(t.double() if double and t.is_floating_point() else t for t in inputs))
    return [as_array(f) for f in (found if isinstance(found, tuple) else (found,))]


def worst(expected: Sequence[Sequence[Any]], found: Sequence[Sequence[Any]]) -> float:
    """Largest relative difference over input sets and outputs."""
    pairs = [pair for e, f in zip(expected, found, strict=True) for pair in zip(e, f, strict=True)]
    return max((difference(e, f)[1] for e, f in pairs), default=0.0)


def as_tensor(array: np.ndarray) -> torch.Tensor:
    if array.dtype.kind == "V" or array.dtype.name == "bfloat16":
        return torch.from_numpy(array.astype(np.float32)).bfloat16()
    return torch.from_numpy(np.ascontiguousarray(array)).reshape(array.shape)


def as_array(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()
    return [as_array(v) for v in value] if isinstance(value, (list, tuple)) else value


def verdict(row: Row) -> str:
    if row["state"] == "ran":
        if row["error"] <= row["limit"]:
            return "ok"
        mine, theirs = row["f64"]
        return "ok, f64" if mine <= max(theirs, row["limit"]) and theirs > row["limit"] else "FAR"
    return {"not run": "not run", "not mirrored": "MISSING"}.get(row["state"], "CRASH")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--only", help="regular expression of paths")
    parser.add_argument("--limit", type=float, default=1e-4, help="largest relative error that counts as equal")
    parser.add_argument("--all", action="store_true", help="list the files that agree, too")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    paths = sorted(
        p
        for f in options.folders
        for p in ([f] if f.is_file() else f.rglob("*.onnx"))
        if not options.only or re.search(options.only, str(p))
    )
    if not paths:
        sys.exit("no .onnx there")
    note = machine_note()
    print(note)
    torch.set_num_threads(1)
    rows = []
    for k, path in enumerate(paths):
        rows.append(try_one(path, options.limit))
        row = rows[-1]
        print(
            f"{k + 1}/{len(paths)} {path.parent.name}/{path.stem}: {verdict(row)} "
            f"{row.get('error', '')} {row['reason'][:200]}",
            file=sys.stderr,
            flush=True,
        )
    report(rows, everything=options.all)
    write_json(options.json, {"machine": note, "limit": options.limit, "rows": rows})


def report(rows: Sequence[Row], *, everything: bool) -> None:
    shown = [r for r in rows if everything or verdict(r) != "ok"]
    print_table(
        ["file", "verdict", "error", "f64: mirror, ort", "mirror s", "trained", "stored", "reason"],
        [
            [
                f"{Path(r['path']).parent.name}/{Path(r['path']).stem}",
                verdict(r),
                f"{r['error']:.0e}" if "error" in r else "",
                "{:.0e}, {:.0e}".format(*r["f64"]) if "f64" in r else "",
                f"{r['seconds']:.2f}" if "seconds" in r else "",
                amount(r["trained"]) if "trained" in r else "",
                amount(r["stored"]) if "stored" in r else "",
                r["reason"][:120],
            ]
            for r in shown
        ],
    )
    ran = [r for r in rows if r["state"] != "not run"]
    by_folder: dict[str, list[Row]] = {}
    for r in ran:
        by_folder.setdefault(Path(r["path"]).parent.name, []).append(r)
    print_table(
        ["folder", "run in ort", "agree", "share", "worst of those", "with f64", "share"],
        [
            [
                name,
                len(inside),
                len(good),
                f"{len(good) / len(inside):.1%}",
                f"{max((g['error'] for g in good), default=0):.0e}",
                len(good) + len(adjudged),
                f"{(len(good) + len(adjudged)) / len(inside):.1%}",
            ]
            for name, inside in [*sorted(by_folder.items()), ("all", ran)]
            if inside
            for good in [[r for r in inside if verdict(r) == "ok"]]
            for adjudged in [[r for r in inside if verdict(r) == "ok, f64"]]
        ],
        f"{len(rows)} files, {len(rows) - len(ran)} of which onnxruntime doesn't run on made-up inputs",
    )
    missing = Counter(op for r in rows for op in set(r.get("missing", ())))
    print_table(["operator without a mirror", "files"], [[op, n] for op, n in missing.most_common()])


if __name__ == "__main__":
    main()
