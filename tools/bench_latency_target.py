"""How exactly `compress --target latency=...` lands: the share of the original's time that is left, measured again.

Every network is compressed to every target; the latency table is empty at first, and each finds what the others left in
it. Then the written model is opened anew, several times, and measured in turns with the original: `measured` is the
median over these rounds of the ratio of medians, `rounds` the least and the greatest; it has to lie within 5 % of the
target. `planned` is what the table promised of the plan that was taken, `models` how many plans were measured.

    python tools/bench_latency_target.py                                  four networks with random weights, latency=0.6
    python tools/bench_latency_target.py --networks resnet50 --targets 0.8 0.6 0.4 --threads 2
    python tools/bench_latency_target.py --models a.onnx b.onnx

Networks are exported from `_torch_models.py` with torch, images at 224 x 224 and 128 tokens, batch 1. Weights play no
part in speed. Runs that other programs interrupted do not count (see `verify.latency`), so the machine may be in use.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from _common import amount, machine_note, print_table, write_json

from onnxprune import OnnxPruneError, Result, compress
from onnxprune.latency import search
from onnxprune.verify.latency import bench

SIZES = {"resnet50": 224, "mobilenet_v2": 224, "vit_s": 224, "bert": 128}
WITHIN = 0.05


def exported(name: str, folder: Path) -> Path:
    """A network of `_torch_models` as a file."""
    import torch
    from _torch_models import NETWORKS

    network = NETWORKS[name]
    module = network.make(SIZES[name]).eval()
    path = folder / f"{name}.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            module,
            network.inputs(1, SIZES[name]),
            path,
            input_names=list(network.names),
            output_names=["logits"],
            opset_version=17,
            dynamo=False,
        )
    return path


class Noted:
    """Calls `search.reach`, and remembers what it gave."""

    def __init__(self) -> None:
        self.reach, self.last = search.reach, None

    def __call__(self, *args: Any, **options: Any) -> search.Reached:
        self.last = self.reach(*args, **options)
        return self.last


def landed(source: Path, target: float, folder: Path, options: argparse.Namespace, noted: Noted) -> dict[str, Any]:
    """One compression, and what comes out of measuring it again."""
    out = folder / f"{source.stem}.{target}.onnx"
    start = time.perf_counter()
    try:
        result: Result = compress(source, out, target=f"latency={target}", threads=options.threads, force=True)
    except OnnxPruneError as error:
        return {"target": target, "error": str(error), "seconds": time.perf_counter() - start}
    seconds = time.perf_counter() - start
    rounds = [bench([source, out], threads=options.threads, seconds=options.seconds) for _ in range(options.rounds)]
    shares = [r.rows[1].median_ms / r.rows[0].median_ms for r in rounds]
    assert noted.last is not None and result.after is not None
    taken = next(t for t in noted.last.tried if t.latency is noted.last.latency)
    return {
        "target": target,
        "planned": taken.planned,
        "reached": result.target.reached,
        "measured": statistics.median(shares),
        "rounds": [[asdict(row) for row in r.rows] for r in rounds],
        "shares": shares,
        "models": len(noted.last.tried),
        "macs": result.after.macs / result.before.macs,
        "before_ms": statistics.median(r.rows[0].median_ms for r in rounds),
        "total_macs": result.before.macs,
        "seconds": seconds,
    }


def row_of(name: str, found: dict[str, Any]) -> list[str]:
    if "error" in found:
        return [
            name,
            f"{found['target']:g}",
            "",
            "",
            found["error"][:60],
            "",
            "",
            "",
            "",
            f"{found['seconds']:.0f}",
            "",
        ]
    off = found["measured"] / found["target"] - 1
    return [
        f"{name} ({amount(found['total_macs'])}MACs, {found['before_ms']:.3g} ms)",
        f"{found['target']:g}",
        f"{found['planned']:.3f}",
        f"{found['reached']:.3f}",
        f"{found['measured']:.3f}",
        f"{min(found['shares']):.3f}-{max(found['shares']):.3f}",
        f"{off:+.1%}",
        f"{found['macs']:.3f}",
        str(found["models"]),
        f"{found['seconds']:.0f}",
        "met" if abs(off) <= WITHIN else "MISSED",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--models", nargs="+", type=Path, help="files to take instead")
    parser.add_argument("--targets", nargs="+", type=float, default=[0.6], help="shares of the time that are to remain")
    parser.add_argument("--rounds", type=int, default=3, help="independent measurements")
    parser.add_argument("--seconds", type=float, default=5, help="time per model and round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    note = machine_note()
    print(note)
    document: dict[str, Any] = {"machine": note, "threads": options.threads, "models": {}}
    rows: list[list[str]] = []
    noted = Noted()
    search.reach = noted  # type: ignore[assignment]
    with tempfile.TemporaryDirectory(prefix="bench-latency-target-") as temporary:
        folder = Path(temporary)
        os.environ["ONNXPRUNE_CACHE"] = str(folder / "cache")
        for source in options.models or options.networks:
            path = source if isinstance(source, Path) else exported(source, folder)
            for target in options.targets:
                found = landed(path, target, folder, options, noted)
                document["models"].setdefault(path.stem, []).append(found)
                rows.append(row_of(path.stem, found))
                print(f"{path.stem} {target} done", file=sys.stderr, flush=True)
    head = ["model", "target", "planned", "reached", "measured", "rounds", "off", "MACs kept", "models", "seconds", ""]
    title = f"{options.threads} thread(s), {options.rounds} rounds of {options.seconds:g} s per model, medians"
    print_table(head, rows, title)
    write_json(options.json, document)


if __name__ == "__main__":
    main()
