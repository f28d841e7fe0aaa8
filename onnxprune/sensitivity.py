"""How much a network loses with the units of each group: one curve per group, measured on data, one group at a time.

    found = measure(analysis, groups, calibration, importance="obs")
    choose(analysis, target, importance=found.scores, losses=found.losses())

Units go in the order of their importance. What is lost is the distillation loss (the distance from the original's own
outputs, as training has it) and a metric; the curves are read by `select.allocate`, which takes from the groups that
lose least per cost saved. A curve costs a few passes over the rest of the network behind the group, and can be stored.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxprune.axes.analysis import Analysis, Group
from onnxprune.errors import DataError, UsageError
from onnxprune.model.outputs import OutputKind, output_kinds
from onnxprune.select.importance import Criterion, Scores, scores

if TYPE_CHECKING:
    from onnxprune.calibrate.calibration import Calibration
    from onnxprune.metrics import Meter, Metric

__all__ = ["FRACTIONS", "Curve", "Sensitivity", "measure"]

FRACTIONS = (0.1, 0.25, 0.5, 0.75, 1.0)
SCHEMA = 1


@dataclass(frozen=True)
class Curve:
    """removed: units that are gone, from none to all. loss: the distillation loss, 0 at first. metric: without them."""

    removed: tuple[int, ...]
    loss: tuple[float, ...]
    metric: tuple[float, ...]


@dataclass(frozen=True)
class Sensitivity:
    """The curves of a model's groups. scores: the importance by which units go, per group id. metric, before: what was
    measured beside the loss, and of the original; higher_is_better: whether a large one is good."""

    model: str
    importance: str
    metric: str
    higher_is_better: bool
    before: float
    samples: int
    seconds: float
    curves: Mapping[str, Curve]
    scores: Scores

    def losses(self) -> dict[str, np.ndarray]:
        """Per group id, the loss when 0, 1, ... all units are gone: between what was measured, along straight lines; a
        loss that falls again is noise, and counts as its largest before."""
        found = {}
        for gid, curve in self.curves.items():
            rising = np.maximum.accumulate(np.array(curve.loss))
            found[gid] = np.interp(np.arange(curve.removed[-1] + 1), curve.removed, rising)
        return found

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "schema": SCHEMA,
            "command": "sensitivity",
            **{k: v for k, v in asdict(self).items() if k not in ("curves", "scores")},
            "groups": [
                {"id": gid, **asdict(curve), "scores": np.asarray(self.scores[gid]).tolist()}
                for gid, curve in self.curves.items()
            ],
        }

    def save(self, path: Path) -> None:
        """Raises UsageError where the file can't be written."""
        try:
            path.write_text(json.dumps(self.document(), separators=(",", ":")), encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{path} can't be written: {error.strerror or error}") from None

    @classmethod
    def load(cls, path: Path, analysis: Analysis) -> Sensitivity:
        """Raises UsageError where the file is of another model, or none of ours."""
        hint = "`onnxprune sensitivity MODEL --data DATA` measures it"
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            groups = {g.pop("id"): g for g in held.pop("groups")}
            known = held.pop("schema") == SCHEMA and held.pop("command", "sensitivity") == "sensitivity"
            curves = {k: Curve(*(tuple(g[n]) for n in ("removed", "loss", "metric"))) for k, g in groups.items()}
            ranked = {k: np.array(g["scores"], np.float64) for k, g in groups.items()}
            found = cls(**held, curves=curves, scores=ranked)
        except OSError as error:
            raise UsageError(f"{path} can't be read: {error.strerror or error}", hint) from None
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} holds no sensitivity: {error}", hint) from None
        if not known or found.model != fingerprint(analysis):
            raise UsageError(f"{path} was measured on another model, or with other groups left alone", hint)
        return found


def measure(
    analysis: Analysis,
    groups: Sequence[Group],
    calibration: Calibration,
    *,
    importance: str | Criterion | Scores = "obs",
    metric: Metric | None = None,
    fractions: Sequence[float] = FRACTIONS,
    repaired: bool = False,
    samples: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Sensitivity:
    """Mask the least important units of each group, more and more of them, and see what the output loses.

    metric: of `metrics.parse_metric`; by default the agreement with the original. fractions: of a group's units.
    repaired: whether what is left makes up for what is gone, as far as an affine prediction can: what a repair in
        closed form does where one group alone is cut. It takes each group's help for granted, and misleads where most
        of a network goes. samples: of the calibration's, to measure on; all unless told otherwise.
    progress: called with the samples done and those there are.
    Raises UsageError and DataError for a metric that can't be taken, NotMirrored.
    """
    from onnxprune.metrics import METRICS

    start = time.perf_counter()
    chosen = metric or METRICS["agreement"]
    ranked = scores(analysis, list(groups), importance, seed=seed, calibration=calibration)
    removed = {g.id: _counts(g.size, fractions) for g in groups}
    masks = {g.id: [np.argsort(ranked[g.id], kind="stable")[:n] for n in removed[g.id]] for g in groups}
    taken = _Taken(analysis, calibration, chosen, masks, samples=samples, repaired=repaired)
    with calibration.threads():
        taken.run(progress)
    before, curves = taken.result(), {}
    for gid, counts in removed.items():
        found = [taken.of(gid, k) for k in range(len(counts))]
        losses, metrics = zip(*[(0.0, before), *found], strict=True) if found else ((0.0,), (before,))
        curves[gid] = Curve((0, *counts), losses, metrics)
    return Sensitivity(
        fingerprint(analysis),
        importance if isinstance(importance, str) else "given",
        chosen.name,
        chosen.higher_is_better,
        before,
        taken.samples,
        time.perf_counter() - start,
        {gid: c for gid, c in curves.items() if len(c.removed) > 1},
        {gid: ranked[gid] for gid, c in curves.items() if len(c.removed) > 1},
    )


def _counts(size: int, fractions: Sequence[float]) -> list[int]:
    return sorted({n for f in fractions if (n := min(size, max(1, round(f * size)))) > 0})


class _Taken:
    """Losses and meters of all masks, added up over batches."""

    def __init__(
        self,
        analysis: Analysis,
        calibration: Calibration,
        metric: Metric,
        masks: Mapping[str, Sequence[np.ndarray]],
        *,
        samples: int | None,
        repaired: bool,
    ) -> None:
        from onnxprune.calibrate.masked import Branches
        from onnxprune.train.loss import criterion

        if metric.meter is None:
            raise UsageError(
                f"metric '{metric.name}' is a callable of its own, which asks for a model file",
                "sensitivity is taken on a torch mirror: choose one of the metrics that have a name",
            )
        if metric.needs_targets and not calibration.source.targets:
            raise UsageError(f"metric '{metric.name}' needs targets and the data has none", "--eval agreement does not")
        self.watched, self.metric = calibration.watched, metric
        self.batches = replace(calibration.batches, samples=min(calibration.samples, samples or calibration.samples))
        kinds = output_kinds(analysis.graph)
        self.loss = criterion("auto", outputs=kinds)
        self.kind, self.target = _judged(kinds, calibration.source.targets if metric.needs_targets else None)
        self.branches = Branches(calibration.watched, masks, calibration.predictor if repaired else None)
        self.meters: dict[tuple[str, int], Meter] = {}
        self.whole = self._meter()
        self.losses: dict[tuple[str, int], float] = {}
        self.samples = 0

    def _meter(self) -> Meter:
        assert self.metric.meter is not None
        return self.metric.meter(self.kind, self.target)

    def run(self, progress: Callable[[int, int], None]) -> None:
        batches, watched = self.batches, self.watched
        for batch in batches:
            inputs = batches.tensors(batch)
            teacher = watched.outputs_of(inputs)
            reference = batch.targets[self.target] if self.metric.needs_targets else _numpy(teacher[self.kind.name])
            self.whole.add(_numpy(teacher[self.kind.name]), reference)
            for gid, k, outputs in self.branches.batch(inputs):
                lost = float(self.loss(outputs, teacher=teacher)) * batch.size
                self.losses[gid, k] = self.losses.get((gid, k), 0.0) + lost
                self.meters.setdefault((gid, k), self._meter()).add(_numpy(outputs[self.kind.name]), reference)
            self.samples += batch.size
            progress(self.samples, batches.samples)
        if not self.samples:
            raise DataError("the data holds no sample to measure on", "give data with --data")

    def result(self) -> float:
        return self.whole.result()

    def of(self, gid: str, k: int) -> tuple[float, float]:
        """The loss and the metric with one mask; those of the original where the mirror does not know the group."""
        if (gid, k) not in self.losses:
            return 0.0, self.result()
        return self.losses[gid, k] / self.samples, self.meters[gid, k].result()


def _judged(kinds: Sequence[OutputKind], targets: Sequence[str] | None) -> tuple[OutputKind, str]:
    """The output that the metric is taken of, and its target."""
    floats = [k for k in kinds if k.learnable] or list(kinds)
    kind = next((k for k in kinds if targets and k.name in targets), floats[0])
    if targets is None or kind.name in targets:
        return kind, kind.name
    if len(targets) > 1:
        raise UsageError(f"none of the targets {', '.join(targets)} is called as output '{kind.name}'")
    return kind, targets[0]


def _numpy(x: Any) -> np.ndarray:
    return (x.float() if x.is_floating_point() else x).numpy()


def fingerprint(analysis: Analysis) -> str:
    """Tells one analysed model from another: its nodes, its groups, and the beginning of every parameter."""
    graph = analysis.graph
    about: list[Any] = [[n.op, n.inputs, n.outputs] for n in graph.nodes]
    about += [[g.id, g.size, g.members[0].initializer] for g in analysis.groups]
    found = hashlib.sha256(json.dumps(about).encode())
    for name, parameter in graph.parameters.items():
        if parameter.elem_type and parameter.size:
            found.update(np.ascontiguousarray(graph.array(name).reshape(-1)[:64]).tobytes())
            graph.release(name)
    return found.hexdigest()[:16]
