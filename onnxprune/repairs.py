"""`compress --repair`: which repair in closed form, on which inputs, and what is told of it.

Where there is data, the layers behind the surgery are solved for on it. Where there is none, inputs can be made up,
which is never done unasked. `--calibrate bn` fits them to what BatchNormalization nodes store of the data
(`reconstruct.imagined`). `--calibrate random` takes them as drawn: the second moments of noise are not those of data,
and a model repaired on them may be worse.

On inputs that are made up 'auto' is 'ls': constants follow the means, which noise does not have right. Of 36 cells of
tools/repair_table.py (nine networks without BatchNormalization at four sizes, random inputs), 'ls' was worse than
none in 9, and by more than two points in 4; 'affine' in 19 and 11, 'mean' in 23 and 18. On average they changed the
accuracy or agreement by 3.1, -2.5 and -9.5 points.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxprune.data.signature import signature_of
from onnxprune.errors import NotMirrored, UsageError
from onnxprune.imports import wants_torch
from onnxprune.model.graph import Graph, Model
from onnxprune.ops.registry import Operator
from onnxprune.request import Request
from onnxprune.result import Repair
from onnxprune.verify.inputs import draw
from onnxprune.verify.runs import feeds_that_run, session

if TYPE_CHECKING:
    from onnxprune.axes.analysis import Analysis
    from onnxprune.data.source import Source
    from onnxprune.select.plan import Plan

__all__ = ["CALIBRATIONS", "REPAIRED_KEY", "REPAIRS", "SAMPLES", "Repairing", "chosen_mode"]

REPAIRED_KEY = "onnxprune.repaired"
REPAIRS = ("auto", "affine", "ls", "mean", "none")
CALIBRATIONS = ("random", "bn")
SAMPLES = 512


def chosen_mode(request: Request) -> str:
    """What 'auto' stands for where no training has found the units: 'affine' on data; 'ls' on inputs that are made up,
    whose means are not to be trusted; else 'none'. Raises UsageError where a repair was asked for that can't be."""
    if request.repair not in REPAIRS:
        raise UsageError(f"--repair '{request.repair}' is none of {', '.join(REPAIRS)}")
    if request.calibrate is not None:
        _check_calibration(request)
    if request.repair == "none":
        return "none"
    inputs = request.data is not None or request.calibrate is not None
    if request.samples is not None and not inputs:
        raise UsageError("--samples counts inputs, and there are none", "give them with --data")
    if request.repair == "auto":
        best = "affine" if request.calibrate is None else "ls"
        return best if inputs and not request.in_training else "none"
    if request.in_training:
        raise UsageError(
            f"--repair {request.repair} finds nothing to repair: what a method in training removes is zero",
            "leave it away, or take --method oneshot",
        )
    if not inputs:
        raise UsageError(
            f"--repair {request.repair} wants inputs",
            "give some with --data, or let them be made up: --calibrate bn, or random",
        )
    return request.repair


def _check_calibration(request: Request) -> None:
    if request.calibrate not in CALIBRATIONS:
        raise UsageError(f"--calibrate '{request.calibrate}' is none of {', '.join(CALIBRATIONS)}")
    if request.data is not None:
        raise UsageError("--calibrate is for where there is no data", "leave it or --data away")
    if request.repair == "none" or request.in_training:
        raise UsageError("--calibrate is about repair, which is not asked for", "leave it away")


def has_statistics(graph: Graph, registry: Mapping[str, Operator]) -> bool:
    """Whether a BatchNormalization normalises by statistics that are stored."""
    for node in graph.nodes:
        operator = registry.get(node.op)
        running = operator.running if operator is not None else ()
        by_batch = node.attributes.get("training_mode", 0) or (node.opset < 14 and any(node.outputs[1:]))
        if running and not by_batch and all(node.inputs[i] in graph.parameters for i in running):
            return True
    return False


@dataclass(frozen=True, eq=False, slots=True)
class Inputs:
    """What a repair runs on. statistics: what BatchNormalization nodes are to normalise by meanwhile, where not by what
    is stored."""

    batches: Source | Iterable[Mapping[str, np.ndarray]]
    samples: int
    description: str
    statistics: Mapping[str, np.ndarray] | None = None


@dataclass(frozen=True, eq=False)
class Repairing:
    """A repair that was asked for, checked against the model before any long work.

    source: inputs; None where they are made up, as `calibrate` says. samples: how many; None: as many as usual.
    """

    mode: str
    source: Source | None
    samples: int | None
    seed: int
    shapes: Mapping[str, Sequence[int]] | None = None
    calibrate: str | None = None

    @classmethod
    def prepared(cls, graph: Graph, request: Request, source: Source | None, *, mirrored: bool) -> Repairing | None:
        """None where there is nothing to do. mirrored: that the model can be is known already.

        Raises UsageError, NotMirrored.
        """
        mode = chosen_mode(request)
        if mode == "none":
            return None
        if request.calibrate == "bn" and not has_statistics(graph, request.registry):
            raise UsageError(
                "--calibrate bn wants BatchNormalization nodes with stored statistics, and the model has none "
                "(exporters often fold them into the layer in front)",
                "--calibrate random does without",
            )
        if not mirrored:
            with wants_torch("repair", "--repair none prunes without it"):
                from onnxprune.mirroring import mirror
            try:
                mirror(graph, registry=request.registry)
            except NotMirrored as error:
                error.hint = "--repair none prunes it without repair"
                raise
        return cls(mode, source, request.samples, request.seed, request.input_shapes, request.calibrate)

    def about(self) -> dict[str, Any]:
        """What a training that comes after it depends on."""
        return {"repair": self.mode, "repair samples": self.samples or SAMPLES}

    def run(self, analysis: Analysis, plan: Plan, original: Path) -> tuple[Model | None, Repair]:
        """Solve. Gives the repaired model, marked as such, None where the pruned one is best left as it is.

        original: the analysed model as a file. Raises DataError where the model can't be run in torch on the inputs.
        """
        from onnxprune.reconstruct import repair
        from onnxprune.train.batching import Unfitting, fitting

        solve = partial(repair, analysis, plan, mode=self.mode, seed=self.seed)
        try:
            with fitting():
                inputs = self.inputs(analysis, original)
                found = solve(inputs.batches, samples=inputs.samples, statistics=inputs.statistics)
        except Unfitting:  # it declares any batch, and takes one sample
            try:
                with fitting(1):
                    inputs = self.inputs(analysis, original, batch=1)
                    found = solve(inputs.batches, samples=inputs.samples, statistics=inputs.statistics, batch=1)
            except Unfitting as error:
                error.hint = "--repair none prunes it without repair"
                raise
        report = Repair(
            mode=self.mode,
            data=inputs.description,
            samples=found.samples,
            held_out=found.held_out,
            before=found.before,
            after=found.after,
            dropped=found.dropped,
            consumers=tuple(asdict(c) for c in found.consumers),
            left=tuple(asdict(left) for left in found.left),
            steps=found.steps,
            seconds=found.seconds,
            peak_bytes=found.peak_bytes,
            spilled_bytes=found.spilled_bytes,
        )
        if found.dropped or all(c.mode == "none" for c in found.consumers):
            return None, report
        entry = found.model.proto.metadata_props.add(key=REPAIRED_KEY)
        entry.value = json.dumps({"mode": self.mode, "samples": found.samples})
        return found.model, report

    def inputs(self, analysis: Analysis, original: Path, batch: int | None = None) -> Inputs:
        """Batches that the file takes, which may be smaller ones than training takes. batch: the only size to try."""
        graph, samples = analysis.graph, self.samples or SAMPLES
        if self.source is None:
            feeds, _ = feeds_that_run(graph, session(original), self.seed, self.shapes)
            shapes = {name: np.shape(array) for name, array in feeds[0].items()}
            if self.calibrate == "bn":
                from onnxprune.reconstruct.imagined import imagine

                made = imagine(analysis, shapes, samples=self.samples, batch=batch, seed=self.seed)
                nodes = "1 BatchNormalization node" if made.norms == 1 else f"{made.norms} BatchNormalization nodes"
                about = f"random inputs fitted to the stored statistics of {nodes}"
                return Inputs(made.batches, made.samples, about, made.statistics)
            return Inputs(self.drawn(graph, shapes), samples, "inputs drawn at random")
        fixed = signature_of(graph).batch
        if fixed is None:
            return Inputs(self.source, samples, self.source.description)
        samples = min(samples, self.source.size or samples)
        batches = (b.inputs for b in self.source.batches(fixed, seed=self.seed, shuffle=True, drop_last=True))
        return Inputs(batches, samples, self.source.description)

    def drawn(self, graph: Graph, shapes: Mapping[str, Sequence[int]]) -> Iterator[dict[str, np.ndarray]]:
        """Random inputs of the types and ranges that the model declares."""
        rng = np.random.default_rng(self.seed)
        while True:
            yield draw(graph, {}, rng, shapes)
