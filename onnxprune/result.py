"""What `compress` gives back: plain values, enough for a table, a JSON document or another program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxprune.axes.analysis import Analysis
    from onnxprune.model.graph import Model
    from onnxprune.select.plan import Plan

__all__ = [
    "Accuracy",
    "Latency",
    "LatencyStats",
    "ModelSummary",
    "Repair",
    "Result",
    "Sparsified",
    "TargetOutcome",
    "Training",
    "Verification",
]


@dataclass(frozen=True)
class ModelSummary:
    """A model in numbers. macs: multiply-accumulates at batch 1; bytes: file and external data; inputs and outputs:
    (name, type, shape as text)."""

    name: str
    params: int
    macs: int
    bytes: int
    opset: int
    ir_version: int
    producer: str
    inputs: tuple[tuple[str, str, str], ...]
    outputs: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class TargetOutcome:
    """What was asked for and what came out, both as the fraction of `metric` that remains."""

    metric: str
    spec: str
    wanted: float
    reached: float
    met: bool


@dataclass(frozen=True)
class Verification:
    """The pruned model against the masked original in onnxruntime.

    max_rel_error is max |a - b| / max |a| per output, the worst over outputs and input sets.
    """

    passed: bool
    max_abs_error: float
    max_rel_error: float
    tolerance: float
    input_sets: int
    shapes: tuple[Mapping[str, tuple[int, ...]], ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LatencyStats:
    """Milliseconds per run of one model. disturbed: how many of the runs don't count, since other programs took the
    processor in between."""

    min_ms: float
    median_ms: float
    p90_ms: float
    runs: int
    nchwc_kernels: int = 0
    disturbed: int = 0


@dataclass(frozen=True)
class Latency:
    """Two models measured turn by turn. significant: their spreads (10th to 90th percentile) don't overlap."""

    before: LatencyStats
    after: LatencyStats
    significant: bool
    threads: int
    optimisation: str

    @property
    def speedup(self) -> float:
        return self.before.median_ms / self.after.median_ms


@dataclass(frozen=True)
class Training:
    """How the model was trained: after the surgery, and before it where a method works in training (`Sparsified` says
    which part that was). seconds: over all parts of a run that was resumed.

    first_loss, last_loss: of the first step, and the mean of the last ones. backoffs: how often the rate was halved.
    batchnorms_inserted: put in for training, and folded again. mirror_error_*: the torch module against the file in
    onnxruntime, relative, before training and after it.
    """

    loss: str
    data: str
    steps: int
    epochs: int
    seconds: float
    first_loss: float
    last_loss: float
    samples_per_s: float
    backoffs: int
    resumed_from: int | None
    batchnorms_inserted: int
    mirror_error_before: float
    mirror_error_after: float | None


@dataclass(frozen=True)
class Sparsified:
    """What a method that works in training did to the whole network, before anything was removed.

    options: the method's, as it had them. share: part of the training; steps, seconds: that it took.
    units, zero: of all families that it may prune, and those that are exactly zero and were removed.
    max_rel_error: the trained network, its zero units in place, against the one without them in onnxruntime; None where
    inexact groups were pruned, whose removal changes the function.
    families: per family 'family' (the group's id), 'units', 'left', 'redundant', 'sparsity', 'smallest_kept' and
    'largest_redundant' (norms), 'angles' (statistics that the method decides by, means over the family's units).
    """

    method: str
    options: Mapping[str, Any]
    share: float
    steps: int
    seconds: float
    units: int
    zero: int
    max_rel_error: float | None
    families: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Repair:
    """How the layers behind the surgery were solved for.

    mode: 'affine', 'ls' or 'mean'. data: what it was done on; samples: how many inputs, of which held_out were kept
    to judge by. before, after: error of the model's outputs on those, relative to their variance, right after the
    surgery and repaired. dropped: it was no smaller, and nothing was changed.
    consumers: the fields of `reconstruct.ConsumerRepair` for each layer that was solved for; left: for each other
    'label', 'op', 'groups' and 'reason'. steps: passes over parts of the network. peak_bytes: of activations held in
    memory; spilled_bytes: written to temporary files.
    """

    mode: str
    data: str
    samples: int
    held_out: int
    before: float
    after: float
    dropped: bool
    consumers: tuple[Mapping[str, Any], ...]
    left: tuple[Mapping[str, Any], ...]
    steps: int
    seconds: float
    peak_bytes: int
    spilled_bytes: int


@dataclass(frozen=True)
class Accuracy:
    """A metric of the files in onnxruntime: of the original, right after the surgery (None where nothing came after it)
    and of what was written. drop: what was lost, in points for a fraction (0.01 is one percent), else relative.
    repaired: between repair and training, where there were both."""

    metric: str
    higher_is_better: bool
    before: float
    pruned: float | None
    after: float
    drop: float
    is_fraction: bool
    repaired: float | None = None


@dataclass(eq=False)
class Result:
    """The outcome of `compress`. `after`, `verification` and `latency` are None in a dry run. ranking: by what units
    were chosen, in words."""

    before: ModelSummary
    after: ModelSummary | None
    target: TargetOutcome
    plan: Plan
    analysis: Analysis
    verification: Verification | None = None
    latency: Latency | None = None
    sparsified: Sparsified | None = None
    repair: Repair | None = None
    training: Training | None = None
    accuracy: Accuracy | None = None
    output: str | None = None
    timing: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    model: Model | None = None
    ranking: str = ""
    align: int = 1
    aligned: tuple[int, int, int, int] = (0, 0, 0, 0)
