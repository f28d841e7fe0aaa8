"""What closed-form repair brings back: accuracy, or agreement with the original, and seconds, over real trained files.

    python tools/repair_table.py MODEL_OR_FOLDER ... --data FOLDER --rows rows.jsonl
    python tools/repair_table.py models --data FOLDER --rows rows.jsonl --samples 512 --macs 0.7

Models are the classifiers of `_classifiers.py` and the others of `_agreement.py`, FOLDER holds their data. A cell is a
model, a ranking (`l2`, magnitudes alone; and the --best one, with --best-allocate), a number of calibration inputs, the
MACs that are left, and a repair. All repairs of a plan start from the same pruned network and the same inputs, no
labels. Without inputs there is no ranking but l2, and repair is on inputs that are made up (`--calibrate`). Only exact
groups are pruned; where the MACs can't be had, the plan that comes nearest is taken, and the MACs it has are told.
--align 4: small networks have few whole blocks of 16.

The score is one of these, on test inputs that nothing was made on:
  top-1                      where there are labels;
  above one half, argmax     the share of the inputs for which the first output says what the original's says;
  fidelity                   the share of the variance of the original's outputs, element by element over the inputs,
                             that is explained, averaged over the outputs (1 is perfect, 0 is what a constant gives, and
                             there is no lower end): for embeddings, and for detectors, which see hardly anything.
All three are in the rows. Noise is the standard error of the difference on the same inputs (frames of speech follow
each other, so theirs is larger than told).

Rows go to the screen and to a file as they come; cells that are in it are not taken again. At the end the file's rows
are printed as tables, with the verdicts: what the repair brings back on each labelled classifier of what is lost at 0.7
(a loss within two standard errors is none), and every cell of the largest number of inputs in which the affine repair
is worse than none.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import time
import traceback
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from _agreement import OTHERS, Feed
from _classifiers import CLASSIFIERS
from _common import machine_note
from _repair_report import report
from _repairs import REPAIRS

from onnxprune import OnnxPruneError, load
from onnxprune.axes.analysis import Analysis, Group, analyse
from onnxprune.calibrate import Calibration
from onnxprune.data import Source
from onnxprune.model.save import write
from onnxprune.ranking import measured_samples
from onnxprune.repairs import CALIBRATIONS, Repairing
from onnxprune.request import Request
from onnxprune.rewrite.rewrite import rewrite
from onnxprune.select.choose import Choice, candidates, choose
from onnxprune.select.plan import Plan
from onnxprune.select.target import parse_target
from onnxprune.sensitivity import measure
from onnxprune.verify.latency import open_session, run_options

MAGNITUDE = "l2"
KEY = ("model", "ranking", "samples", "inputs", "macs", "repair")

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Scores:
    """Per test input. top1 is empty where there are no labels; fidelity is what is missing of 1, per input."""

    top1: np.ndarray
    agreement: np.ndarray
    fidelity: np.ndarray

    def row(self) -> Row:
        return {f.name: float(v.mean()) for f in dataclasses.fields(self) if (v := getattr(self, f.name)).size}


class Judge:
    """The test inputs of a model, and what the original gives for them."""

    def __init__(self, model: Path, options: argparse.Namespace) -> None:
        self.threads, self.labels = options.threads, np.zeros(0)
        self.states: dict[str, str] = {}
        if model.stem in CLASSIFIERS:
            self.kind = "top1"
            batches = list(CLASSIFIERS[model.stem].source(model, options.data, "test", options.test).batches(250))
            self.streams = [[dict(b.inputs)] for b in batches]
            self.labels = np.concatenate([b.targets["label"] for b in batches])
        else:
            other = OTHERS[model.stem]
            self.kind, self.states = other.judge, dict(other.states)
            self.streams = other.tests(model, options.data, options.test if self.states else options.test_others)
        self.original = self.outputs(model)
        # what never changes can't be explained
        spread = [np.square(a - a.mean(0)).mean(0).sum() for a in self.original]
        size = [np.square(a).mean(0).sum() for a in self.original]
        self.variance = [v if v > 1e-8 * max(s, 1e-30) else None for v, s in zip(spread, size, strict=True)]

    def outputs(self, model: Path) -> list[np.ndarray]:
        """The floating-point outputs, (inputs, elements) each."""
        session = open_session(model, run_options(self.threads, "all"))
        names = [o.name for o in session.get_outputs()]
        found: list[list[np.ndarray]] = []
        for stream in self.streams:
            held: Feed = {}
            for feed in stream:
                answer = dict(zip(names, session.run(None, {**feed, **held}), strict=True))
                held = {i: answer[o] for i, o in self.states.items()}
                count = len(next(iter(feed.values()))) if self.labels.size else 1
                found.append([a.reshape(count, -1) for a in answer.values() if a.dtype.kind == "f"])
        return [np.concatenate(arrays).astype(np.float64) for arrays in zip(*found, strict=True)]

    def scores(self, model: Path) -> Scores:
        found, wanted = self.outputs(model), self.original
        saying = (lambda a: a[:, 0] > 0.5) if self.kind == "above" else (lambda a: a.argmax(1))
        said = saying(found[0])
        errors = [
            np.square(a - b).sum(1) / v for a, b, v in zip(wanted, found, self.variance, strict=True) if v is not None
        ]
        return Scores(said[: self.labels.size] == self.labels, said == saying(wanted[0]), 1 - np.mean(errors, 0))

    def main(self, scores: Scores) -> np.ndarray:
        """What counts for this model."""
        name = {"above": "agreement", "argmax": "agreement"}.get(self.kind, self.kind)
        return np.asarray(getattr(scores, name), np.float64)


def difference(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """By how much a is better than b, and the standard error of that."""
    change = a - b
    return float(change.mean()), float(change.std() / np.sqrt(len(change)))


class Table:
    """The cells of one model."""

    def __init__(self, model: Path, options: argparse.Namespace, done: set[tuple]) -> None:
        self.model, self.options, self.done = model, options, done
        self.analysis: Analysis = analyse(load(model))
        self.groups: list[Group] = candidates(self.analysis, allow_inexact=False)
        self.folder = TemporaryDirectory(prefix="repair-table-")

    @cached_property
    def judge(self) -> Judge:
        return Judge(self.model, self.options)

    @cached_property
    def whole(self) -> np.ndarray:
        return self.judge.main(self.judge.scores(self.model))

    def source(self, samples: int) -> Source:
        name, options = self.model.stem, self.options
        if name in CLASSIFIERS:
            return CLASSIFIERS[name].source(self.model, options.data, "train", samples)
        return OTHERS[name].calibration(self.model, options.data, samples)

    def rows(self) -> Iterator[Row]:
        for ranking in (MAGNITUDE, self.best):
            for samples in self.options.samples:
                for row in self.ranked(ranking, samples) if samples or ranking == MAGNITUDE else ():
                    self.done.add(tuple(row[k] for k in KEY))
                    yield row

    @property
    def best(self) -> str:
        options = self.options
        more = "+repaired" if options.best_repaired else ""
        return options.best if options.best_allocate == "importance" else f"{options.best}+sensitivity{more}"

    def ranked(self, ranking: str, samples: int) -> Iterator[Row]:
        """Everything with so many inputs. What magnitudes choose is the same for any number of them, so that what is
        pruned by them and not repaired stands in the table once."""
        ways = ["data"] if samples else list(CALIBRATIONS)
        bare = 0 if ranking == MAGNITUDE else samples
        wanted: dict[float, list[Row]] = {}
        for macs in self.options.macs:
            cells: list[Row] = [{"samples": bare, "inputs": "", "repair": "none"}]
            cells += [
                {"samples": samples, "inputs": way, "repair": repair}
                for way in ways
                for repair in self.options.repairs
                if repair != "none"
            ]
            cells = [{"model": self.model.stem, "ranking": ranking, "macs": macs, **c} for c in cells]
            left = [c for c in cells if tuple(c[k] for k in KEY) not in self.done]
            if left:
                wanted[macs] = left
        if not wanted:
            return
        source = self.source(samples) if samples else None
        start = time.perf_counter()
        known = self.ranking(ranking, source, samples)
        seconds = time.perf_counter() - start
        for macs, cells in wanted.items():
            try:
                target = parse_target(f"macs={macs}")
                choice = choose(self.analysis, target, align=self.options.align, **known)
            except OnnxPruneError as error:
                yield from ({**c, "why": str(error)} for c in cells)
                continue
            yield from self.cells(choice, cells, source, {"ranking_s": seconds})

    def ranking(self, ranking: str, source: Source | None, samples: int) -> Row:
        """What `choose` is told."""
        options = self.options
        if ranking == MAGNITUDE or source is None:
            return {"importance": MAGNITUDE}
        calibration = Calibration(self.analysis, source, samples, options.seed)
        if options.best_allocate == "importance":
            return {"importance": options.best, "calibration": calibration}
        found = measure(
            self.analysis,
            self.groups,
            calibration,
            importance=options.best,
            samples=measured_samples(self.analysis, self.groups, samples),
            repaired=options.best_repaired,
            seed=options.seed,
        )
        return {"importance": found.scores, "losses": found.losses()}

    def cells(self, choice: Choice, cells: list[Row], source: Source | None, common: Row) -> Iterator[Row]:
        sliced = self.judge.scores(self.saved(rewrite(self.analysis, choice.plan)))
        bare = self.judge.main(sliced)
        common |= {"reached": choice.outcome.reached, "align": choice.align, "kind": self.judge.kind}
        common |= {"original": float(self.whole.mean()), "tests": len(bare)}
        common["lost"], common["lost_noise"] = difference(self.whole, bare)
        for cell in cells:
            done = cell | common
            if cell["repair"] == "none":
                yield done | sliced.row() | {"score": float(bare.mean())}
                continue
            try:
                scores, more = self.repaired(choice.plan, cell, source, sliced)
            except OnnxPruneError as error:
                yield done | {"why": str(error)}
                continue
            mine = self.judge.main(scores)
            gain, noise = difference(mine, bare)
            yield done | more | scores.row() | {"score": float(mine.mean()), "gain": gain, "gain_noise": noise}

    def repaired(self, plan: Plan, cell: Row, source: Source | None, sliced: Scores) -> tuple[Scores, Row]:
        """As `compress` repairs."""
        drawn = None if source is not None else cell["inputs"]
        samples = cell["samples"] or None
        about = {"repair": cell["repair"], "data": source, "calibrate": drawn, "samples": samples}
        request = Request(**about, seed=self.options.seed)
        repairing = Repairing.prepared(self.analysis.graph, request, source, mirrored=True)
        assert repairing is not None
        start = time.perf_counter()
        model, told = repairing.run(self.analysis, plan, self.model)
        more = {"seconds": time.perf_counter() - start, "dropped": model is None}
        more |= {"judged_before": told.before, "judged_after": told.after, "held_out": told.held_out}
        more["modes"] = {m: [c["mode"] for c in told.consumers].count(m) for m in REPAIRS}
        more["left"] = len(told.left)
        return (sliced if model is None else self.judge.scores(self.saved(model))), more

    def saved(self, model: Any) -> Path:
        path = Path(self.folder.name) / "model.onnx"
        path.unlink(missing_ok=True)
        write(model, path)
        return path


def chosen(paths: list[Path], only: list[str]) -> list[Path]:
    """Files that are known, in the order of the tables."""
    files = {f.stem: f for p in paths for f in (sorted(p.glob("*.onnx")) if p.is_dir() else [p])}
    return [files[n] for n in (*CLASSIFIERS, *OTHERS) if n in files and (not only or n in only)]


def read(path: Path) -> list[Row]:
    """Rows that are in the file: of a cell that was tried again, the last. What was cut off in the middle is none."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[tuple(row.get(k) for k in KEY)] = row
    return list(found.values())


def append(path: Path, row: Row) -> None:
    print(told(row), flush=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def told(row: Row) -> str:
    cell = " ".join(str(row[k]) for k in KEY if row.get(k) not in ("", None))
    if "why" in row:
        return f"{cell}: {row['why']}"
    gain = f" ({row['gain']:+.4f})" if "gain" in row else ""
    seconds = f", {row['seconds']:.1f} s" if "seconds" in row else ""
    return f"{cell}: {row['kind']} {row['score']:.4f}{gain} of {row['original']:.4f} at {row['reached']:.3f}{seconds}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, help="none: only print what is in --rows")
    parser.add_argument("--data", type=Path, help="folder of cifar_train.npz and so on")
    parser.add_argument("--rows", required=True, type=Path, help="JSON, a line per cell: written to, and gone on from")
    parser.add_argument("--only", nargs="*", default=[], help="names of models")
    parser.add_argument("--samples", default="0,64,512", help="calibration inputs")
    parser.add_argument("--macs", default="0.9,0.7,0.5,0.3", help="shares that are left")
    parser.add_argument("--repairs", default=",".join(REPAIRS))
    parser.add_argument("--best", default="obs", help="the importance to compare with magnitude")
    parser.add_argument("--best-allocate", default="sensitivity", choices=("importance", "sensitivity"))
    parser.add_argument("--best-repaired", action="store_true", help="measure sensitivity as after a repair")
    parser.add_argument("--test", type=int, default=2000, help="test images with labels, and frames of speech")
    parser.add_argument("--test-others", type=int, default=400, help="test images without labels")
    parser.add_argument("--align", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if options.models and options.data is None:
        parser.error("models want --data")
    options.macs = [float(m) for m in options.macs.split(",")]
    options.samples = [int(n) for n in options.samples.split(",")]
    options.repairs = options.repairs.split(",")
    return options


def main() -> None:
    import torch

    options = arguments()
    logging.disable(logging.WARNING)
    torch.set_num_threads(options.threads)
    print(machine_note(), flush=True)
    done = {tuple(r.get(k) for k in KEY) for r in read(options.rows) if "why" not in r}
    if options.rows.exists() and not options.rows.read_bytes().endswith(b"\n"):  # it was cut off there
        options.rows.write_bytes(options.rows.read_bytes() + b"\n")
    for model in chosen(options.models, options.only):
        try:
            for row in Table(model, options, done).rows():
                append(options.rows, row)
        except Exception as error:  # hours of other models may be ahead
            if not isinstance(error, OnnxPruneError):
                traceback.print_exc()
            append(options.rows, {"model": model.stem, "why": f"{type(error).__name__}: {error}"})
    report(read(options.rows))


if __name__ == "__main__":
    main()
