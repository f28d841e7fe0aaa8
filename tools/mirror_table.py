"""Does the mirror compute what onnxruntime computes? Every ONNX file below some folders, on inputs that it accepts.

    python tools/mirror_table.py MODELS_DIR [ZOO_DIR ...] [--only REGEX] [--limit 1e-4] [--json FILE]

error     largest difference of an output, relative to its largest magnitude, over three input sets of several sizes
          (random operators and files that onnxruntime doesn't run are listed apart and don't count)
mirror s  seconds to build the mirror; parameters that training would change, of all

Ends with the share of files that agree within --limit, and the operators that can't be mirrored, with their files.
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

from onnxprune import OnnxPruneError, load
from onnxprune.errors import ModelRejected, NotMirrored
from onnxprune.mirror import mirror
from onnxprune.verify.compare import difference
from onnxprune.verify.runs import feeds_that_run, session

Row = dict[str, Any]


def try_one(path: Path) -> Row:
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
        gaps = [compare(module, graph.inputs, f, e) for f, e in zip(feeds, expected, strict=True)]
        row.update(error=max(gaps), state="ran")
    except NotMirrored as error:
        row.update(state="not mirrored", reason=str(error), missing=error.operators)
    except OnnxPruneError as error:
        row.update(reason=f"{type(error).__name__}: {error}")
    except Exception as error:  # the table goes on; this is what it is there to show
        row.update(reason=f"{type(error).__name__}: {str(error).strip()[:300]}")
    row["total"] = time.perf_counter() - start
    return row


def compare(module: Any, names: Sequence[str], feed: dict[str, np.ndarray], expected: Sequence[Any]) -> float:
    with torch.no_grad():
        found = module(*(as_tensor(feed[n]) for n in names))
    found = [found] if len(expected) == 1 else list(found)
    return max((difference(e, as_array(f))[1] for e, f in zip(expected, found, strict=True)), default=0.0)


def as_tensor(array: np.ndarray) -> torch.Tensor:
    if array.dtype.kind == "V" or array.dtype.name == "bfloat16":
        return torch.from_numpy(array.astype(np.float32)).bfloat16()
    return torch.from_numpy(np.ascontiguousarray(array)).reshape(array.shape)


def as_array(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()
    return [as_array(v) for v in value] if isinstance(value, (list, tuple)) else value


def verdict(row: Row, limit: float) -> str:
    if row["state"] == "ran":
        return "ok" if row["error"] <= limit else "FAR"
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
        rows.append(try_one(path))
        row = rows[-1]
        print(
            f"{k + 1}/{len(paths)} {path.parent.name}/{path.stem}: {verdict(row, options.limit)} "
            f"{row.get('error', '')} {row['reason'][:200]}",
            file=sys.stderr,
            flush=True,
        )
    report(rows, options.limit, everything=options.all)
    write_json(options.json, {"machine": note, "limit": options.limit, "rows": rows})


def report(rows: Sequence[Row], limit: float, *, everything: bool) -> None:
    shown = [r for r in rows if everything or verdict(r, limit) != "ok"]
    print_table(
        ["file", "verdict", "error", "mirror s", "trained", "stored", "reason"],
        [
            [
                f"{Path(r['path']).parent.name}/{Path(r['path']).stem}",
                verdict(r, limit),
                f"{r['error']:.0e}" if "error" in r else "",
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
        ["folder", "run in ort", f"within {limit:g}", "share", "worst of those"],
        [
            [
                name,
                len(inside),
                len(good),
                f"{len(good) / len(inside):.1%}",
                f"{max((g['error'] for g in good), default=0):.0e}",
            ]
            for name, inside in [*sorted(by_folder.items()), ("all", ran)]
            if inside
            for good in [[r for r in inside if verdict(r, limit) == "ok"]]
        ],
        f"{len(rows)} files, {len(rows) - len(ran)} of which onnxruntime doesn't run on made-up inputs",
    )
    missing = Counter(op for r in rows for op in set(r.get("missing", ())))
    print_table(["operator without a mirror", "files"], [[op, n] for op, n in missing.most_common()])


if __name__ == "__main__":
    main()
