"""onnxsim's pruning module and onnxprune on the same files: accuracy at equal MACs, latency, and how far each gets.

    python tools/rival_onnxsim.py accuracy models FOLDER --data-dir DATA --rival-python VENV/bin/python
    python tools/rival_onnxsim.py reach RESNET50.onnx VIT.onnx ... --rival-python VENV/bin/python

VENV is one with `pip install onnxsim onnxruntime sympy`. MACs of both are counted by onnxprune, latency is measured by
all files of a model in turns on one thread at batch 1.

accuracy: trained classifiers (see `_classifiers.py`, DATA too). onnxsim gets what suits it: every file is given to it
in four forms (as it is; simplified; at opset 20 without the passes that hide chains from it; through onnxruntime's
transformer optimiser), of which the one that it can prune furthest is taken; its one ratio for all layers is set such
that the MACs come as near to the target as they can; and of its rankings (l1, l2, wanda) and recoveries (ridge, blocks,
both) the table has those that turn out best *on the test images*. onnxprune then gets the MACs that came out as its
target, with one setting for all: --importance, --repair (and --steps of training) on the same --samples images, whose
labels are not looked at; and each --deploy, since blocks of channels are faster and single channels choose better.

reach: MACs left when half of the channels go, and the least that can be left. onnxsim's result at one half must pass
the checker (and its full check, which compares stored shapes with inferred ones), run, and give what the original gives
with the removed weights at zero; what doesn't is told.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Timer
from typing import Any

import numpy as np
import onnx
from _classifiers import CLASSIFIERS, known
from _common import machine_note, print_table, write_json
from _masked import error_of
from _repairs import REPAIRS, pruned

from onnxprune import OnnxPruneError, TrainSettings, compress, inspect
from onnxprune.data import CalibrationReader, Source
from onnxprune.evaluate import evaluate
from onnxprune.metrics import METRICS
from onnxprune.result import Result
from onnxprune.verify.latency import bench

RUNNER = Path(__file__).with_name("_rival_onnxsim.py")
RANKINGS = ("l1", "l2", "wanda")
RECOVERIES = ("ridge", "blocks", "ridge+blocks")
MOST = 0.999  # of the channels: one is left everywhere
NEAR = 0.02  # of all MACs: how far from a target a row may be and still stand for it
SAME = 1e-4  # relative difference that is rounding


class Rival:
    """onnxsim in a process of its own; it is killed when a request takes longer than `patience` seconds."""

    def __init__(self, python: Path, patience: float) -> None:
        self.command, self.patience = [str(python), str(RUNNER)], patience
        self._start()

    def _start(self) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(self.command, text=True, **pipes)  # type: ignore[call-overload]
        self.version = json.loads(self.process.stdout.readline() or '{"version": "that does not start"}')["version"]

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Its answer; one with an "error" where it fails, crashes or takes too long."""
        timer = Timer(self.patience, self.process.kill)
        timer.start()
        try:
            plain = {k: str(v) if isinstance(v, Path) else v for k, v in request.items()}
            self.process.stdin.write(json.dumps({"do": do, **plain}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        late = not timer.is_alive()
        timer.cancel()
        if line:
            return dict(json.loads(line))
        self.process.kill()
        code = self.process.wait()
        self._start()
        return {"error": f"took more than {self.patience:g} s" if late else f"crashed ({code})"}

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def macs_of(path: Path) -> int:
    return inspect(path).summary.macs


def furthest(rival: Rival, model: Path, folder: Path) -> tuple[str, Path, float, list[str]]:
    """The form of the model that the rival prunes furthest, its file, the least MACs it reaches, and what went wrong
    with the others."""
    answer = rival.ask("prepare", model=model, out=folder)
    notes = [f"{name}: {why}" for name, why in answer.get("failed", {}).items()]
    notes += [answer["error"]] if "error" in answer else []
    best = ("as it is", model, float(macs_of(model)))
    for name, path in answer.get("forms", {}).items():
        out = folder / "least.onnx"
        error = rival.ask("prune", model=path, out=out, sparsity=MOST).get("error")
        try:
            macs = float("inf") if error else float(macs_of(out))
        except OnnxPruneError as rejected:
            error, macs = str(rejected), float("inf")
        if error:
            notes.append(f"{name}: {error}")
        if macs < best[2]:
            best = (name, Path(path), macs)
    return (*best, notes)


# accuracy at equal MACs


@dataclasses.dataclass
class Entry:
    """One pruned network, or why there is none."""

    who: str
    how: str
    file: Path | None = None
    kept: float = 0.0
    top1: float = 0.0
    agreement: float = 0.0
    seconds: float = 0.0
    median_ms: float = 0.0
    speedup: float = 0.0


class Trial:
    """One classifier: the original, its data, and networks pruned from it."""

    def __init__(self, model: Path, folder: Path, options: argparse.Namespace) -> None:
        self.model, self.folder, self.options = model, folder, options
        kind = CLASSIFIERS[model.stem]
        self.test = kind.source(model, options.data_dir, "test", options.test)
        self.data: Source = kind.source(model, options.data_dir, "train", options.samples)
        self.macs = macs_of(model)
        feeds = list(CalibrationReader(self.data, batch=64))
        full = [f for f in feeds if all(a.shape == feeds[0][n].shape for n, a in f.items())]
        self.calibration = folder / "calibration.npz"
        np.savez(self.calibration, **{n: np.stack([f[n] for f in full]) for n in full[0]})

    def entry(self, who: str, how: str, file: Path, seconds: float) -> Entry:
        return Entry(
            who,
            how,
            file,
            macs_of(file) / self.macs,
            evaluate(file, self.test, METRICS["top1"]),
            evaluate(file, self.test, METRICS["agreement"], original=self.model),
            seconds,
        )

    # theirs

    def ratio_for(self, rival: Rival, form: Path, target: float) -> tuple[float, float]:
        """The rival's ratio whose MACs come nearest to the target, and those, by bisection."""
        out, low, high = self.folder / "bisect.onnx", 0.0, MOST
        near = (0.0, 1.0)
        for _ in range(9):
            middle = (low + high) / 2
            rival.ask("prune", model=form, out=out, sparsity=middle)
            kept = macs_of(out) / self.macs
            near = min(near, (middle, kept), key=lambda p: abs(p[1] - target))
            low, high = (middle, high) if kept > target else (low, middle)
        return near

    def theirs(self, rival: Rival, form: Path, ratio: float) -> Iterator[Entry]:
        """Every ranking, with and without every recovery."""
        for ranking in self.options.rankings:
            out = self.folder / f"theirs-{ranking}.onnx"
            data = {"calibration": self.calibration}
            answer = rival.ask("prune", model=form, out=out, sparsity=ratio, ranking=ranking, **data)
            if "error" in answer:
                yield Entry("onnxsim", f"{ranking}: {answer['error']}")
                continue
            yield self.entry("onnxsim", ranking, out, answer["seconds"])
            for recovery in self.options.recoveries:
                to = self.folder / f"theirs-{ranking}-{recovery}.onnx"
                more = rival.ask("recover", original=form, pruned=out, out=to, recovery=recovery, **data)
                how = f"{ranking}, {recovery}"
                if "error" in more:
                    yield Entry("onnxsim", f"{how}: {more['error']}")
                else:
                    yield self.entry("onnxsim", how, to, answer["seconds"] + more["seconds"])

    # ours

    def ours(self, target: float) -> Iterator[Entry]:
        """For every deployment: one-shot, repaired, trained."""
        options = self.options
        for deploy in options.deploy:
            common: dict[str, Any] = {"target": f"macs={target:.4f}", "best_effort": True}
            common |= {"importance": options.importance, "deploy": deploy}
            repaired = partial(pruned, data=self.data, samples=options.samples, **common)
            ways: dict[str, Callable[[Path, Path], Result]] = {"one-shot": partial(repaired, repair="none")}
            if options.repair != "none":
                ways[options.repair] = partial(repaired, repair=options.repair)
            if options.steps:
                settings = TrainSettings(steps=options.steps)
                ways[f"{options.steps} steps"] = partial(compress, data=self.data, train=settings, force=True, **common)
            for how, work in ways.items():
                out, start = self.folder / f"ours-{deploy}-{how.replace(' ', '-')}.onnx", time.perf_counter()
                try:
                    work(self.model, out)
                except OnnxPruneError as error:
                    yield Entry("onnxprune", f"{deploy}, {how}: {type(error).__name__}: {error}")
                else:
                    yield self.entry("onnxprune", f"{deploy}, {how}", out, time.perf_counter() - start)

    def timed(self, entries: list[Entry]) -> None:
        """Latency into the entries that have a file, by turns with the original."""
        there = [e for e in entries if e.file is not None]
        result = bench([self.model, *(e.file for e in there)], threads=1, seconds=self.options.seconds)  # type: ignore[list-item]
        for k, entry in enumerate(there, 1):
            entry.median_ms = result.rows[k].median_ms
            entry.speedup = result.against_first(k).speedup


def best(entries: list[Entry], kept: float) -> list[Entry]:
    """Of the rival's networks of these MACs the best without and the best with recovery; and what failed."""
    failed = [e for e in entries if e.file is None]
    small = [e for e in entries if e.file and abs(e.kept - kept) <= NEAR]
    failed += [
        Entry(e.who, f"{e.how}: {e.kept:.3f} of the MACs, not {kept:.3f}") for e in entries if e.file and e not in small
    ]
    groups = ([e for e in small if ("," in e.how) == recovered] for recovered in (False, True))
    return [max(g, key=lambda e: e.top1) for g in groups if g] + failed


def accuracy(options: argparse.Namespace, rival: Rival, folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for model in known(options.models):
        place = folder / model.stem
        place.mkdir(exist_ok=True)
        trial = Trial(model, place, options)
        name, form, least, notes = furthest(rival, model, place)
        original = trial.entry("original", "", model, 0.0)
        table = [["", "original", "", *figures(original)]]
        document[model.stem] = {"form": name, "least": least / trial.macs, "targets": {}}
        for target in options.targets:
            ratio, kept = trial.ratio_for(rival, form, target) if least < trial.macs else (0.0, 1.0)
            reached = abs(kept - target) <= NEAR
            entries = list(trial.theirs(rival, form, ratio)) if reached else []
            shown = best(entries, kept) if reached else [Entry("onnxsim", f"can't: {kept:.3f} is nearest")]
            shown += trial.ours(kept if reached else target)
            trial.timed(shown)
            document[model.stem]["targets"][str(target)] = [as_json(e) for e in (*entries, *shown)]
            table += [[f"{target:g}", e.who, e.how, *figures(e)] for e in shown if e.file]
            notes += [f"{target:g}: {e.who}: {e.how}" for e in shown if not e.file]
        header = ["target", "who", "how", "MACs", "top-1", "agrees", "seconds", "ms", "speed-up"]
        print_table(
            header, table, f"{model.stem} (onnxsim {rival.version} takes it {name}; {trial.test.size} test images)"
        )
        print("".join(f"  {note}\n" for note in notes), end="", flush=True)
        document[model.stem]["notes"] = notes
        write_json(options.json, document)
    return document


def figures(entry: Entry) -> list[str]:
    shares = [f"{entry.kept:.3f}", f"{entry.top1:.2%}", f"{entry.agreement:.2%}"]
    if not entry.median_ms:
        return [*shares, "", "", ""]
    return [*shares, f"{entry.seconds:.1f}", f"{entry.median_ms:.3f}", f"{entry.speedup:.2f}x"]


def as_json(entry: Entry) -> dict[str, Any]:
    return {**dataclasses.asdict(entry), "file": entry.file.name if entry.file else None}


# how far each gets


def sound(form: Path, pruned: Path) -> str:
    """Empty where a pruned file is valid, runs, and equals the original with zeros; else what is wrong."""
    found = [f"{name} fails" for name, full in (("checker", False), ("full check", True)) if not valid(pruned, full)]
    try:
        error = error_of(form, pruned)
    except (ValueError, OnnxPruneError) as wrong:
        found.append(str(wrong)[:200])
    else:
        found += [f"differs from the original with zeros by {error:.1g}"] if error > SAME else []
    return "; ".join(found)


def valid(path: Path, full: bool) -> bool:
    try:
        onnx.checker.check_model(str(path), full_check=full)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        return False
    return True


def half_of_ours(model: Path) -> Result:
    return compress(model, target="channels=0.5", scope="local", align=1, best_effort=True)


def least_of_ours(model: Path) -> Result:
    return compress(model, target="macs=0.0001", floor=1e-6, align=1, best_effort=True)


def kept_of_ours(work: Callable[[Path], Result], model: Path) -> tuple[float | None, str]:
    try:
        result = work(model)
    except OnnxPruneError as error:
        return None, f"{type(error).__name__}: {error}"
    assert result.after is not None
    return result.after.macs / result.before.macs, ""


def reach(options: argparse.Namespace, rival: Rival, folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = {}
    table = []
    for model in options.models:
        before = macs_of(model)
        name, form, least, notes = furthest(rival, model, folder)
        out = folder / "half.onnx"
        answer = rival.ask("prune", model=form, out=out, sparsity=0.5)
        wrong = answer.get("error") or sound(form, out)
        half = None if "error" in answer else macs_of(out) / before
        our_half, why = kept_of_ours(half_of_ours, model)
        our_least, more = kept_of_ours(least_of_ours, model)
        shares = [half, least / before, our_half, our_least]
        label = f"{model.parent.name}/{model.stem}"
        table.append([label, name, *("" if s is None else f"{s:.3f}" for s in shares), wrong, why or more])
        document[label] = {"form": name, "shares": shares, "wrong": wrong, "ours": why or more, "notes": notes}
        print(f"{label} done ({'; '.join(notes) or 'no failures'})", file=sys.stderr, flush=True)
    print_table(
        ["model", "form", "theirs, half", "least", "ours, half", "least", "wrong in theirs", "wrong in ours"],
        table,
        f"MACs left: onnxsim {rival.version} and onnxprune (proved)",
    )
    return document


@contextmanager
def workplace(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="rival-onnxsim-") as folder:
        yield Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("accuracy", "reach"))
    parser.add_argument("models", type=Path, nargs="+", help="files; for accuracy folders of them, too")
    parser.add_argument("--rival-python", type=Path, required=True)
    parser.add_argument("--patience", type=float, default=600, help="seconds that the rival has for one request")
    parser.add_argument("--data-dir", type=Path, help="for accuracy")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.7, 0.5], help="shares of the MACs")
    parser.add_argument("--rankings", nargs="+", default=RANKINGS, help="what the rival tries")
    parser.add_argument("--recoveries", nargs="*", default=RECOVERIES, help="what the rival tries; bn is there, too")
    parser.add_argument("--importance", default="auto", help="as in compress")
    parser.add_argument("--deploy", nargs="+", default=["ort-cpu", "none"], help="as in compress")
    parser.add_argument("--repair", choices=REPAIRS, default="none", help="as in compress")
    parser.add_argument("--steps", type=int, default=0, help="of training, on the same images")
    parser.add_argument("--samples", type=int, default=512, help="images to calibrate on, for both")
    parser.add_argument("--test", type=int, help="test images at most")
    parser.add_argument("--seconds", type=float, default=2, help="time per file for latency")
    parser.add_argument("--keep", type=Path, help="folder in which to leave the networks")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    if options.what == "accuracy" and options.data_dir is None:
        parser.error("accuracy wants --data-dir")
    logging.disable(logging.WARNING)
    print(note := machine_note(), flush=True)
    rival = Rival(options.rival_python, options.patience)
    try:
        with workplace(options.keep) as folder:
            document = (accuracy if options.what == "accuracy" else reach)(options, rival, folder)
    finally:
        rival.stop()
    write_json(options.json, {"machine": note, "onnxsim": rival.version, "models": document})


if __name__ == "__main__":
    main()
