"""Which units to remove, and from where: rankings and allocations right after one-shot pruning, and after repair.

    python tools/ranking_table.py MODEL_OR_FOLDER ... --data FOLDER
    python tools/ranking_table.py models/resnet_cifar10_bn.onnx --data FOLDER --importance l2,wanda,obs --samples 512

Models are the trained classifiers of `_classifiers.py`, FOLDER holds their data. Every row is one ranking and one
allocation; its cells are top-1 on the first `--test` test images with that share of the MACs left, "top-1 as pruned /
after repair" on the same calibration inputs (training images, no labels). An allocation by `importance` guesses what a
group loses from the importance of its units, `masked` measures it with units of one group at a time zeroed, `repaired`
with the rest making up for them (both are `--allocate sensitivity`). Seconds are those of ranking and measuring,
alone. --align 4: small networks have few whole blocks of 16.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from _classifiers import CLASSIFIERS, known
from _common import machine_note, print_table, write_json

from onnxprune import OnnxPruneError, load
from onnxprune.axes.analysis import Analysis, analyse
from onnxprune.calibrate import Calibration
from onnxprune.data import Source
from onnxprune.evaluate import evaluate
from onnxprune.metrics import parse_metric
from onnxprune.model.save import write
from onnxprune.reconstruct import repair
from onnxprune.rewrite.rewrite import rewrite
from onnxprune.select.choose import candidates, choose
from onnxprune.select.importance import CALIBRATED, IMPORTANCE, scores
from onnxprune.select.target import parse_target
from onnxprune.sensitivity import measure

ALLOCATIONS = ("importance", "masked", "repaired")


class Table:
    """One model, ranked on so many inputs."""

    def __init__(self, path: Path, options: argparse.Namespace, samples: int) -> None:
        self.path, self.options, self.samples = path, options, samples
        self.analysis: Analysis = analyse(load(path))
        self.groups = candidates(self.analysis, allow_inexact=False)
        known_as = CLASSIFIERS[path.stem]
        self.source: Source = known_as.source(path, options.data, "train", samples)
        self.test: Source = known_as.source(path, options.data, "test", options.test)

    def rows(self, importances: Sequence[str], allocations: Sequence[str]) -> Iterator[dict[str, Any]]:
        for name in importances:
            calibration = Calibration(self.analysis, self.source, self.samples, self.options.seed)
            start = time.perf_counter()
            ranked = scores(self.analysis, self.groups, name, seed=self.options.seed, calibration=calibration)
            ranking_s = time.perf_counter() - start
            for allocation in allocations:
                start = time.perf_counter()
                losses = None
                if allocation != "importance":
                    found = measure(
                        self.analysis,
                        self.groups,
                        calibration,
                        importance=ranked,
                        repaired=allocation == "repaired",
                    )
                    losses = found.losses()
                seconds = ranking_s + time.perf_counter() - start
                cells = {macs: self.cell(ranked, losses, macs) for macs in self.options.macs}
                yield {"importance": name, "allocate": allocation, "seconds": seconds, "cells": cells}

    def cell(self, ranked: Mapping[str, np.ndarray], losses: Any, macs: float) -> list[float | None]:
        """Top-1 as pruned, and after the repair."""
        options = self.options
        target = parse_target(f"macs={macs}")
        plan = choose(self.analysis, target, importance=ranked, losses=losses, align=options.align).plan
        found: list[float | None] = [self.top1(rewrite(self.analysis, plan)), None]
        if options.repair != "none":
            solved = repair(self.analysis, plan, self.source, mode=options.repair, samples=self.samples)
            found[1] = self.top1(solved.model)
        return found

    def top1(self, model: Any) -> float:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            write(model, path)
            return evaluate(path, self.test, parse_metric("top1"), batch=250)

    def original(self) -> float:
        return evaluate(self.path, self.test, parse_metric("top1"), batch=250)


def shown(cell: Sequence[float | None]) -> str:
    return " / ".join("-" if x is None else f"{x:.3f}" for x in cell)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--data", required=True, type=Path, help="folder of cifar_train.npz and so on")
    parser.add_argument("--samples", default="64,512", help="calibration inputs")
    parser.add_argument("--macs", default="0.9,0.7,0.5,0.3")
    parser.add_argument("--importance", default=",".join(IMPORTANCE))
    parser.add_argument("--allocate", default=",".join(ALLOCATIONS))
    parser.add_argument("--repair", default="affine", help="affine, ls, mean or none")
    parser.add_argument("--test", type=int, default=2000, help="test images")
    parser.add_argument("--align", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write all figures here")
    options = parser.parse_args()
    options.macs = [float(m) for m in options.macs.split(",")]
    importances, allocations = options.importance.split(","), options.allocate.split(",")
    document = []
    for path in known(options.models):
        for k, samples in enumerate(int(n) for n in options.samples.split(",")):
            table = Table(path, options, samples)
            # what needs no data is the same whatever there is of it, but for its repair and what it is measured by
            names = [n for n in importances if k == 0 or n in CALIBRATED or n == "l2"]
            rows = []
            original = table.original()
            try:
                for row in table.rows(names, allocations):
                    rows.append(row)
                    print(path.stem, samples, row, flush=True)
            except OnnxPruneError as error:
                print(f"{path.stem}: {error}")
                continue
            print_table(
                ["importance", "allocate", *(f"macs {m:g}" for m in options.macs), "s"],
                [
                    [r["importance"], r["allocate"], *map(shown, r["cells"].values()), f"{r['seconds']:.1f}"]
                    for r in rows
                ],
                f"{path.stem}: top-1 {original:.3f}; {samples} calibration inputs",
            )
            document.append({"model": path.stem, "samples": samples, "original": original, "rows": rows})
    print(machine_note())
    write_json(options.json, document)


if __name__ == "__main__":
    main()
