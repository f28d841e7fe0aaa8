"""Every method in training on real files: does it train, reach its target, rewrite, and verify?

    python tools/method_matrix.py MODEL.onnx ... [--methods dhspg,tpp] [--target macs=0.7] [--steps 30] [--json OUT]

The data is made up from the model's input types, the loss is distillation from the original: this is about whether a
method gets through, and not about accuracy (tools/cifar_methods.py is). A row per model and method:

kept       of the target's metric, 'met' where that is the target
zero       units that are exactly zero after the method's part of the training, of those it might take
trained    largest relative error in onnxruntime of the pruned model against the trained one, zero units in place
masked     the same against the masked reference
verify     `onnxprune verify ORIGINAL PRUNED` on the file that was written, after tuning

A model that can't be trained, or that a method can't take the target from, says why. Ends with 1 where a proof fails or
an error is none that a user is meant to see.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import machine_note, print_table, write_json

import onnxprune
from onnxprune.data import signature_of
from onnxprune.train.methods import METHODS
from onnxprune.verify.inputs import draw, size_candidates
from onnxprune.verify.runs import run, session

HEADER = ["model", "method", "kept", "zero", "trained", "masked", "verify", "s", "loss", ""]
Feed = dict[str, np.ndarray]


def made_up(path: Path, count: int) -> tuple[list[Feed], bool]:
    """Inputs that onnxruntime takes, all of one size; and whether several may be joined to a batch: a file may say that
    it takes any number of samples, and then take one. Raises ModelRejected."""
    graph, runner, rng = onnxprune.load(path), session(path), np.random.default_rng(0)
    reason = ""
    for spread in ("normal", "uniform"):
        for pins in size_candidates(graph, batch=(4, 2, 1)):
            found, reason = run(runner, draw(graph, pins, rng, spread=spread))
            if found is not None:
                feeds = [draw(graph, pins, rng, spread=spread) for _ in range(count)]
                single = all(len(x) == 1 for x in feeds[0].values() if x.ndim)
                return feeds, not (single and signature_of(graph).batch is None)
    raise onnxprune.ModelRejected(f"onnxruntime takes no input that is made up: {reason}")


def tried(
    path: Path, method: str, data: Callable[[], Iterable[Feed]], batch: int, given: argparse.Namespace
) -> dict[str, Any]:
    """One row."""
    settings = onnxprune.TrainSettings(steps=given.steps, batch=batch, lr=given.lr, amp="none", device=given.device)
    start = time.perf_counter()
    row: dict[str, Any] = {"model": path.stem, "method": method, "why": "", "sound": True}
    with tempfile.TemporaryDirectory(prefix="method-matrix-") as folder:
        out = Path(folder) / "small.onnx"
        try:
            how: dict[str, Any] = {"data": data, "train": settings, "repair": "none", "deploy": "none"}
            found = onnxprune.compress(path, out, target=given.target, method=method, **how)
            assert found.training is not None and found.verification is not None
            row |= {"kept": found.target.reached, "met": found.target.met, "masked": found.verification.max_rel_error}
            if found.sparsified is not None:
                s = found.sparsified
                row |= {"zero": s.zero, "units": s.units, "trained": s.max_rel_error}
            row |= {"losses": [found.training.first_loss, found.training.last_loss]}
            row["verified"] = onnxprune.verify(path, out).passed
        except onnxprune.OnnxPruneError as error:
            sound = not isinstance(error, onnxprune.VerificationFailed)
            row |= {"why": f"{type(error).__name__}: {error}", "sound": sound}
        except Exception as error:  # a bug
            row |= {"why": f"{type(error).__name__}: {error}", "sound": False}
    return row | {"seconds": time.perf_counter() - start}


def shown(row: dict[str, Any]) -> Sequence[object]:
    """The row of the table."""

    def power(name: str) -> str:
        return "-" if row.get(name) is None else f"{row[name]:.1e}"

    why = " ".join(row["why"].split())[:110]
    if "kept" not in row:
        return [row["model"], row["method"], "-", "-", "-", "-", "-", f"{row['seconds']:.1f}", "-", why]
    losses = "{:.3g} to {:.3g}".format(*row["losses"])
    zero = f"{row['zero']}/{row['units']}" if "zero" in row else "-"
    kept = f"{row['kept']:.1%}{' met' if row['met'] else ' NOT MET'}"
    proved = "passed" if row.get("verified") else "FAILED"
    return [row["model"], row["method"], kept, zero, power("trained"), power("masked"), proved,
            f"{row['seconds']:.1f}", losses, why]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--target", default="macs=0.7")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--samples", type=int, default=8, help="made-up input sets")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(machine_note(), flush=True)
    rows = []
    for path in given.models:
        try:
            feeds, several = made_up(path, given.samples)
        except onnxprune.OnnxPruneError as error:
            print(f"{path.name}: left out: {error}", flush=True)
            continue
        for method in given.methods.split(","):
            batch = given.batch_size if several else 1
            rows.append(tried(path, method, lambda feeds=feeds: iter(feeds), batch, given))  # type: ignore[misc]
            print(" | ".join(map(str, shown(rows[-1]))), flush=True)
    print_table(HEADER, [shown(row) for row in rows], f"{given.target}, {given.steps} steps")
    write_json(given.json, rows)
    sys.exit(0 if all(row["sound"] and row.get("verified", True) for row in rows) else 1)


if __name__ == "__main__":
    main()
