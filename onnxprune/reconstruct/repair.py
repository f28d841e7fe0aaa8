"""`repair`: the weights of a pruned model, solved for so that its layers give what the original's gave.

1. The consumers of pruned groups are put in order: those that lie behind as many others are one step.
2. In each step the original and the pruned network run on, side by side, to the consumers' inputs; moments of the
   pruned network's rows and of the original's outputs are added up, over one part of the batches and over the rest.
3. The ridge problem of each is solved (`solve`), and its new weight stands in the pruned network when that runs on.
4. On the batches that were held out, the outputs of the repaired network are compared with those of the sliced one.
   Where they are no closer to the original's, nothing is changed.
Each network runs once over the data, whatever the number of consumers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from onnxprune.axes.analysis import Analysis
from onnxprune.data.source import Source
from onnxprune.errors import DataError
from onnxprune.model.graph import Model
from onnxprune.model.infer import infer
from onnxprune.ops.registry import Operator
from onnxprune.reconstruct.bilinear import Bilinear, Grams, solve_bilinear
from onnxprune.reconstruct.consumers import Consumer, Left, consumers
from onnxprune.reconstruct.frontier import Frontier
from onnxprune.reconstruct.lockstep import Lockstep, Side
from onnxprune.reconstruct.logits import Logits
from onnxprune.reconstruct.moments import Moments
from onnxprune.reconstruct.solve import MODES, RIDGES, Solution, solve
from onnxprune.rewrite.rewrite import rewrite
from onnxprune.rewrite.weights import Path, with_weights
from onnxprune.select.plan import Plan

__all__ = ["ConsumerRepair", "Repaired", "repair"]

SAMPLES = 512
MEMORY = 2 << 30
LARGEST_BATCH = 16
BATCHES = 16  # at least, where there are as many samples: every fifth is held out
HOLD_OUT = 5
ROWS = 1 << 17
ROWS_PER_COLUMN = 64

Batches = Iterable[Mapping[str, np.ndarray]]


@dataclass(frozen=True, slots=True)
class ConsumerRepair:
    """What was done about one consumer.

    mode: 'affine', 'ls', 'mean', or 'none' where no repair was better on the inputs that were held out. before, after:
    error of its output there, relative to the output's variance, with the sliced and with the new weight (both with
    what comes in front of it repaired). rows: of how many the moments are. condition: of the matrix that was solved for
    (square root). seconds: for moments and solution. nbytes: of the moments.
    """

    label: str
    op: str
    groups: tuple[str, ...]
    mode: str
    ridge: float
    condition: float
    before: float
    after: float
    rows: int
    columns: int
    seconds: float
    nbytes: int


@dataclass(frozen=True, slots=True)
class Repaired:
    """The pruned model with other weights, what was done for each consumer, and which were left and why.

    before, after: error of the model's outputs on the inputs that were held out, relative to their variance, with the
    sliced weights and with the new ones. dropped: it was no smaller, and the model has the sliced weights.
    samples: how many inputs were used; held_out: how many of them to judge by. peak_bytes: of activations held in
    memory between steps; spilled_bytes: of those written to files.
    """

    model: Model
    consumers: tuple[ConsumerRepair, ...]
    left: tuple[Left, ...]
    before: float
    after: float
    dropped: bool
    samples: int
    held_out: int
    steps: int
    seconds: float
    peak_bytes: int
    spilled_bytes: int


def repair(
    analysis: Analysis,
    plan: Plan,
    data: Source | Batches,
    *,
    mode: str = "affine",
    samples: int = SAMPLES,
    batch: int | None = None,
    ridges: Sequence[float] = RIDGES,
    behind: bool = True,
    seed: int = 0,
    memory_limit: int = MEMORY,
    registry: Mapping[str, Operator] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Repaired:
    """Give the pruned model the weights with which its layers come closest to the original's outputs.

    data: a source, or batches of inputs by name; no labels are needed. samples: how many to take. batch: how many at a
    time. mode: 'affine' (weights and biases), 'ls' (weights), 'mean' (biases), 'none'. ridges: sizes to choose from per
    consumer, of the mean diagonal of the matrix. behind: solve for linear layers that lost no input as well, where what
    comes in front of them did. memory_limit: bytes of
    activations held in memory between steps, and again of moments; more goes to temporary files, or into more steps.
    progress: called with the steps that are done, and their number.

    The model is that of `rewrite(analysis, plan)` with other values in some stored tensors. Raises NotMirrored where
    the model can't be run in torch, DataError where there is no data.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is none of {', '.join(MODES)}")
    start = time.perf_counter()
    registry = registry or analysis.registry
    graph = analysis.graph
    model = rewrite(analysis, plan)
    pruned = infer(model, registry, graph.pins)
    found, left = consumers(analysis, plan, pruned, behind=behind)
    if mode == "none" or not found:
        return Repaired(model, (), tuple(left), 0.0, 0.0, False, 0, 0, 0, time.perf_counter() - start, 0, 0)
    with closing(Frontier(memory_limit)) as frontier, closing(Frontier(memory_limit // 8)) as judged:
        sides = Side(graph, registry), Side(pruned, registry)
        work = _Work(Lockstep(sides, frontier), judged, found, mode, tuple(ridges), memory_limit, seed)
        taken = work.load(data, samples, batch)
        steps = work.steps()
        for k in range(len(steps)):
            progress(k, len(steps))
            work.run(steps[k], [c for s in steps[k + 1 :] for c in s])
        progress(len(steps), len(steps))
        before, after = work.judge()
    dropped = bool(work.values) and not after < before
    if dropped:
        work.values.clear()
    values: dict[Path, np.ndarray] = {(name,): array for name, array in work.values.items()}
    return Repaired(
        with_weights(pruned, values),
        tuple(work.reports),
        (*left, *work.left),
        before,
        after,
        dropped,
        taken,
        work.held_out,
        len(steps),
        time.perf_counter() - start,
        frontier.peak + judged.peak,
        frontier.spilled + judged.spilled,
    )


class _Work:
    """values: stored tensors that changed, by name; sliced: what they were. judged: inputs to judge the whole by."""

    def __init__(
        self,
        run: Lockstep,
        judged: Frontier,
        found: Sequence[Consumer | Logits],
        mode: str,
        ridges: Sequence[float],
        limit: int,
        seed: int,
    ) -> None:
        self.lockstep, self.judged, self.limit, self.seed = run, judged, limit, seed
        self.mode, self.ridges = mode, ridges
        self.original, self.pruned = run.sides
        self.values: dict[str, np.ndarray] = {}
        self.sliced: dict[str, Tensor] = {}
        self.reports: list[ConsumerRepair] = []
        self.left: list[Left] = []
        self.found: list[Consumer | Logits] = []
        self.held_out = 0
        self.sizes: list[int] = []
        for consumer in found:
            reason = "its weight or its input has no tensor of its own in the mirror"
            if isinstance(consumer, Logits) and mode == "mean":
                reason = "a product of two tensors has no constant"
            elif self.within_reach(consumer):
                self.found.append(consumer)
                continue
            self.left.append(Left(consumer.label, consumer.op, consumer.groups, reason))

    def within_reach(self, consumer: Consumer | Logits) -> bool:
        if isinstance(consumer, Consumer):
            names, inputs, aims = [consumer.weight], [consumer.x], [consumer.source or consumer.y]
        else:
            names = [consumer.weight, *(m.name for m in consumer.mixed)]
            inputs, aims = ([getattr(o, n) for o in (consumer.left, consumer.right)] for n in ("name", "of"))
        places = ((names, self.pruned.targets), (inputs, self.pruned.places), (aims, self.original.places))
        return all(n in known for wanted, known in places for n in wanted)

    def load(self, data: Source | Batches, samples: int, batch: int | None) -> int:
        """Take the inputs; returns how many."""
        names = self.original.module.meta["inputs"]
        for k, inputs in enumerate(_batches(data, samples, batch, self.seed)):
            tensors = [_as_tensor(inputs[n]) for n in names]
            self.lockstep.append(tensors)
            if k % HOLD_OUT == HOLD_OUT - 1 or not k:  # the first in case that there are few
                self.judged.append(dict(enumerate(tensors)))
            self.sizes.append(len(inputs[names[0]]) if np.ndim(inputs[names[0]]) else 1)
        if not self.sizes:
            raise DataError("there are no inputs to repair the model on", "give at least one batch")
        self.held_out = sum(n for k, n in enumerate(self.sizes) if self.is_held(k))
        return sum(self.sizes)

    def is_held(self, batch: int) -> bool:
        every = HOLD_OUT if len(self.sizes) >= HOLD_OUT else max(len(self.sizes), 2)
        return batch % every == every - 1

    @torch.no_grad()
    def judge(self) -> tuple[float, float]:
        """Error of the pruned network's outputs with the sliced weights and with the new ones, relative to the variance
        of the original's, summed over the outputs."""
        first = 1 if len(self.judged) > 1 else 0
        sums: list[list[np.ndarray]] = []
        for k in range(first, len(self.judged)):
            inputs = [x for _, x in sorted(self.judged.take(k).items())]
            wanted = _floats(self.original.module(*inputs))
            new = _floats(self.pruned.module(*inputs))
            self.swap()
            old = _floats(self.pruned.module(*inputs))
            self.swap()
            sums.append([_squares(*t) for t in zip(wanted, old, new, strict=True)])
        total = np.zeros(2)
        for outputs in zip(*sums, strict=True):
            n, first_moment, second, *errors = np.sum(outputs, 0)
            total += np.array(errors) / max(second - first_moment**2 / max(n, 1), np.finfo(float).tiny)
        return float(total[0]), float(total[1])

    def swap(self) -> None:
        """Exchange the new weights with the sliced ones."""
        for name, other in self.sliced.items():
            tensor = self.pruned.tensor(name)
            self.sliced[name] = tensor.clone()
            tensor.copy_(other)

    def steps(self) -> list[list[Consumer | Logits]]:
        """Consumers that are solved for together: as many others lie in front of them, and their moments fit."""
        linear = {c.weight for c in self.found if isinstance(c, Consumer)}
        turned = {self.pruned.places[c.left.name] for c in self.found if isinstance(c, Logits)}
        levels = self.pruned.levels(linear, turned)
        by_level: dict[int, list[Consumer | Logits]] = {}
        for consumer in self.found:
            by_level.setdefault(max(levels[n] for n in self.inputs(consumer)), []).append(consumer)
        steps: list[list[Consumer | Logits]] = []
        for level in sorted(by_level):
            room = 0
            for consumer in by_level[level]:
                size = self.nbytes(consumer)
                if room < size:
                    steps.append([])
                    room = max(self.limit, size)
                steps[-1].append(consumer)
                room -= size
        return steps

    def nbytes(self, consumer: Consumer | Logits) -> int:
        """Of its moments."""
        if isinstance(consumer, Consumer):
            return 2 * Moments.nbytes(*consumer.sizes())
        return Grams.nbytes(consumer.limit(self.limit // 4), *consumer.sizes())

    def inputs(self, consumer: Consumer | Logits) -> list[Node]:
        """What of the pruned network a consumer's moments are of."""
        names = [consumer.x] if isinstance(consumer, Consumer) else [consumer.left.name, consumer.right.name]
        return [self.pruned.places[n] for n in names]

    def aims(self, consumer: Consumer | Logits) -> list[Node]:
        """What of the original a consumer's targets are made from."""
        if isinstance(consumer, Consumer):
            return [self.original.places[consumer.source or consumer.y]]
        names = [consumer.left.of, consumer.right.of]
        return [self.original.places[n] for n in names]

    def run(self, step: Sequence[Consumer | Logits], later: Sequence[Consumer | Logits]) -> None:
        pairs: list[Any] = [tuple(empty(c) for _ in range(2)) for c in step]
        seconds = [0.0] * len(step)

        def wanted(some: Sequence[Consumer | Logits]) -> tuple[set[Node], set[Node]]:
            return {n for c in some for n in self.aims(c)}, {n for c in some for n in self.inputs(c)}

        def visit(batch: int, values: Sequence[Mapping[Node, Tensor]]) -> None:
            for k, consumer in enumerate(step):
                start = time.perf_counter()
                given = [values[1][n] for n in self.inputs(consumer)]
                aims = [values[0][n] for n in self.aims(consumer)]
                self.gather(consumer, pairs[k][self.is_held(batch)], given, aims, batch)
                seconds[k] += time.perf_counter() - start

        self.lockstep.step(wanted(step), wanted(later), visit)
        for k, consumer in enumerate(step):
            if isinstance(consumer, Logits):
                self.finish_product(consumer, pairs[k], seconds[k])
            else:
                self.finish(consumer, pairs[k], seconds[k])
            pairs[k] = None

    def gather(
        self, consumer: Consumer | Logits, moments: Any, given: Sequence[Tensor], aims: Sequence[Tensor], batch: int
    ) -> None:
        """Add a batch to the moments. given: of the pruned network; aims: of the original."""
        rng = np.random.default_rng((self.seed, batch))
        if isinstance(consumer, Logits):
            limit = -(-consumer.limit(self.limit // 4) // len(self.sizes))
            consumer.gather(moments, (given[0], given[1]), (aims[0], aims[1]), limit, rng)
            return
        x, y = consumer.form.linear.unfold(given[0]), self.target(consumer, aims[0])
        limit = -(-max(ROWS, ROWS_PER_COLUMN * consumer.sizes()[1]) // len(self.sizes))
        for rows, targets in consumer.form.blocks(x, y, limit, rng):
            moments.add(rows, targets)

    @staticmethod
    def target(consumer: Consumer, tensor: Tensor) -> Tensor:
        """What a consumer's output should be, with the axes of its rule's third term."""
        if consumer.original is None:
            for axis, mask in enumerate(consumer.kept):
                tensor = tensor if mask is None else tensor.index_select(axis, torch.from_numpy(mask))
            return consumer.form.linear.unfold_output(tensor)
        whole, weight = consumer.original
        names = {n: chr(ord("a") + k) for k, n in enumerate(dict.fromkeys(n for t in whole.linear.terms for n in t))}
        x, w, y = ("".join(names[n] for n in t) for t in whole.linear.terms)
        return torch.einsum(f"{x},{w}->{y}", whole.linear.unfold(tensor).double(), torch.from_numpy(weight))

    def finish(self, consumer: Consumer, moments: tuple[Moments, Moments], seconds: float) -> None:
        start = time.perf_counter()
        fit, held = moments
        stored = self.pruned.tensor(consumer.weight)
        place = consumer.place if consumer.place is not None and consumer.place.name in self.pruned.targets else None
        weight = consumer.form.matrix(stored.double().numpy())
        rows = fit.n + held.n
        solution = solve(fit, held, weight, consumer.offset, self.mode, free=place is not None, ridges=self.ridges)
        if solution.mode in ("ls", "affine"):
            self.exchange(consumer.weight, consumer.form.stored(solution.weight, tuple(stored.shape)))
        if solution.mode in ("mean", "affine") and place is not None:
            change = place.lay((solution.offset - consumer.offset).reshape(-1))
            self.exchange(place.name, self.pruned.tensor(place.name).double().numpy() + change)
        seconds += time.perf_counter() - start
        nbytes = 2 * Moments.nbytes(*consumer.sizes())
        self.reports.append(report(consumer, solution, rows, consumer.sizes()[1], seconds, nbytes))

    def finish_product(self, consumer: Logits, moments: tuple[Grams, Grams], seconds: float) -> None:
        start = time.perf_counter()
        fit, held = moments
        if not fit.samples:
            reason = "its axes are not those of the sizes that the file was analysed with"
            self.left.append(Left(consumer.label, consumer.op, consumer.groups, reason))
            return
        samples, nbytes = fit.samples + held.samples, fit.nbytes(fit.samples + held.samples, *consumer.sizes())
        solution = solve_bilinear(fit, held, self.ridges)
        if solution.mode != "none":
            names = (consumer.weight, *(m.name for m in consumer.mixed))
            stored = {n: self.pruned.tensor(n).double().numpy() for n in names}
            for name, array in consumer.absorbed(solution.mixed, stored).items():
                self.exchange(name, array)
            # what the layer gave is held, and not computed again
            factor = self.pruned.places[consumer.left.name]
            self.lockstep.turn(1, factor, lambda x: consumer.turn(x, solution.mixed))
        seconds += time.perf_counter() - start
        self.reports.append(report(consumer, solution, samples, consumer.sizes()[1], seconds, nbytes))

    def exchange(self, name: str, array: np.ndarray) -> None:
        tensor = self.pruned.tensor(name)
        self.sliced.setdefault(name, tensor.clone())
        tensor.copy_(torch.from_numpy(np.ascontiguousarray(array)))
        self.values[name] = tensor.numpy().copy()


def empty(consumer: Consumer | Logits) -> Moments | Grams:
    """Moments of no rows."""
    return Grams.zeros(*consumer.sizes()) if isinstance(consumer, Logits) else Moments.zeros(*consumer.sizes())


def report(
    consumer: Consumer | Logits, solution: Solution | Bilinear, rows: int, columns: int, seconds: float, nbytes: int
) -> ConsumerRepair:
    return ConsumerRepair(
        consumer.label,
        consumer.op,
        consumer.groups,
        solution.mode,
        solution.ridge,
        solution.condition,
        solution.before,
        solution.after,
        rows,
        columns,
        seconds,
        nbytes,
    )


def _batches(data: Source | Batches, samples: int, batch: int | None, seed: int) -> Iterator[Mapping[str, np.ndarray]]:
    """At most so many samples."""
    if isinstance(data, Source):
        count = min(samples, data.size or samples)
        size = batch or max(1, min(LARGEST_BATCH, count // BATCHES))
        data = (b.inputs for b in data.batches(size, seed=seed, shuffle=True))
    left = samples
    for inputs in data:
        if left <= 0:
            return
        count = min((len(a) for a in inputs.values() if np.ndim(a)), default=1)
        yield inputs
        left -= count


def _floats(outputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    found = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    return [x.double() for x in found if isinstance(x, Tensor) and x.is_floating_point()]


def _squares(wanted: Tensor, old: Tensor, new: Tensor) -> np.ndarray:
    """Number, sum and sum of squares of the elements, and those of the squared errors."""
    errors = (float((x - wanted).square().sum()) for x in (old, new))
    return np.array([wanted.numel(), float(wanted.sum()), float(wanted.square().sum()), *errors])


def _as_tensor(array: np.ndarray) -> Tensor:
    half = array.dtype.kind == "f" and array.dtype.itemsize == 2
    return torch.from_numpy(np.ascontiguousarray(array.astype(np.float32) if half else array)).reshape(array.shape)
