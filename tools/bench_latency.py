"""How much faster pruned networks run in onnxruntime: the original against two pruned versions of it, one with channel
counts in blocks for onnxruntime's CPU kernels (`--deploy ort-cpu`) and one without (`--deploy none`).

All three are measured in turns (a, b, c, a, b, c, ...) on one thread at batch 1, after `compress` proved each. Weights
play no part in speed, but random ones spread the pruning over the layers more evenly than trained ones would.

    python tools/bench_latency.py MODELS_DIR                      resnet50, mobilenet_v2, efficientnet_b0 at macs=0.5
    python tools/bench_latency.py MODELS_DIR --models a b --target macs=0.7 --rounds 3

MODELS_DIR holds NAME.onnx, such as `bench_analysis.py --export` writes. Every round opens new sessions; the table has
the median over the rounds of each round's ratio of medians, and the least and greatest of them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from _common import amount, machine_note, print_table, verdict, write_json

from onnxprune import OnnxPruneError, Result, compress
from onnxprune.verify.latency import Bench, bench

TARGETS = {"resnet50": 1.8, "mobilenet_v2": 1.6, "efficientnet_b0": 1.4}
DEPLOYMENTS = ("ort-cpu", "none")
CHOICES = ("scope", "importance", "floor")


def prune(source: Path, folder: Path, target: str, choices: dict[str, Any]) -> dict[str, Result]:
    """The model, pruned for each deployment; one that can't be is left out, and why is said."""
    found = {}
    for deploy in DEPLOYMENTS:
        try:
            found[deploy] = compress(
                source, folder / f"{source.stem}.{deploy}.onnx", target=target, deploy=deploy, force=True, **choices
            )
        except OnnxPruneError as error:
            print(f"{source.stem} for {deploy}: {type(error).__name__}: {error}", flush=True)
    return found


def ratios(benches: list[Bench], k: int) -> list[float]:
    """Speed-up of model k over the first, per round."""
    return [b.against_first(k).speedup for b in benches]


def rows_of(name: str, results: dict[str, Result], benches: list[Bench]) -> list[list[str]]:
    before = next(iter(results.values())).before
    first = [b.rows[0] for b in benches]
    rows = [
        [
            name,
            "original",
            "1.000",
            amount(before.macs),
            amount(before.params),
            "",
            f"{statistics.median(r.median_ms for r in first):.2f}",
            f"{min(r.min_ms for r in first):.2f}",
            "1.00x",
            "",
            str(first[0].nchwc_kernels),
            "",
            "",
            "",
        ]
    ]
    for k, (deploy, result) in enumerate(results.items(), 1):
        after, proof = result.after, result.verification
        assert after is not None and proof is not None
        mine, found = [b.rows[k] for b in benches], ratios(benches, k)
        middle, limit = statistics.median(found), TARGETS.get(name) if deploy == "ort-cpu" else None
        rows.append(
            [
                "",
                deploy,
                f"{after.macs / before.macs:.3f}",
                amount(after.macs),
                amount(after.params),
                str(result.align),
                f"{statistics.median(r.median_ms for r in mine):.2f}",
                f"{min(r.min_ms for r in mine):.2f}",
                f"{middle:.2f}x",
                f"{min(found):.2f}-{max(found):.2f}",
                str(mine[0].nchwc_kernels),
                f"{proof.max_rel_error:.1e}",
                f">= {limit}x" if limit else "",
                verdict(middle, limit, at_least=True) if limit else "",
            ]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models_dir", type=Path, help="folder of NAME.onnx")
    parser.add_argument("--models", nargs="+", default=list(TARGETS))
    parser.add_argument("--target", default="macs=0.5", help="what is to remain")
    parser.add_argument("--rounds", type=int, default=3, help="independent measurements")
    parser.add_argument("--seconds", type=float, default=10, help="time per model and round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scope", default="global", help="as in compress")
    parser.add_argument("--importance", default="l2", help="as in compress")
    parser.add_argument("--floor", type=float, default=0.1, help="as in compress")
    parser.add_argument("--keep", type=Path, help="folder in which to leave the pruned models")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    note = machine_note()
    print(note)
    choices = {name: getattr(options, name) for name in CHOICES}
    document: dict[str, Any] = {"machine": note, "target": options.target, "choices": choices, "models": {}}
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory(prefix="bench-latency-") as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name in options.models:
            source = options.models_dir / f"{name}.onnx"
            results = prune(source, folder, options.target, choices)
            if not results:
                rows.append([name, "not pruned", *[""] * 12])
                continue
            paths = [source, *(folder / f"{name}.{deploy}.onnx" for deploy in results)]
            benches = [bench(paths, threads=options.threads, seconds=options.seconds) for _ in range(options.rounds)]
            rows += rows_of(name, results, benches)
            document["models"][name] = {
                "models": ["original", *results],
                "rounds": [[asdict(r) for r in b.rows] for b in benches],
            }
            document["runtime"] = benches[0].runtime
            print(f"{name} done", file=sys.stderr, flush=True)
    print_table(
        [
            "model",
            "deploy",
            "MACs kept",
            "MACs",
            "params",
            "block",
            "median ms",
            "min ms",
            "speed-up",
            "rounds",
            "NCHWc",
            "rel. error",
            "target",
            "",
        ],
        rows,
        f"{document.get('runtime', '')}, {options.threads} thread, {options.rounds} rounds of "
        f"{options.seconds:g} s per model, {options.target}",
    )
    write_json(options.json, document)


if __name__ == "__main__":
    main()
