"""`repair`: the weights of a pruned model, solved for so that its layers give what the original's gave.

1. The consumers of pruned groups are put in order: those that lie behind as many others are one step.
2. In each step the original and the pruned network run on, side by side, to the consumers' inputs; moments of the
   pruned network's rows and of the original's outputs are added up, over one part of the batches and over the rest.
3. The ridge problem of each is solved (`solve`), and its new weight stands in the pruned network when that runs on.
   In front of an activation that is flat somewhere it is solved again, for what the activation gives (`beyond`).
4. On the batches that were held out, the outputs of the repaired network are compared with those of the sliced one.
   Where they are no closer to the original's, nothing is changed (where they are integers: where more are wrong).
Each network runs once over the data, whatever the number of consumers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from onnxprune.axes.analysis import Analysis
from onnxprune.data.signature import signature_of
from onnxprune.data.source import Source
from onnxprune.errors import DataError
from onnxprune.mirroring.values import as_tensor
from onnxprune.model.graph import Model
from onnxprune.model.infer import infer
from onnxprune.model.profile import costs
from onnxprune.ops.registry import Operator
from onnxprune.reconstruct.consumers import Consumer, Left, consumers
from onnxprune.reconstruct.frontier import Frontier
from onnxprune.reconstruct.lockstep import Lockstep, Side
from onnxprune.reconstruct.logits import Logits
from onnxprune.reconstruct.normalised import Restated
from onnxprune.reconstruct.solve import MODES, RIDGES
from onnxprune.reconstruct.tasks import ConsumerRepair, LinearTask, ProductTask, Settings, Task
from onnxprune.reconstruct.together import grouped, together
from onnxprune.rewrite.rewrite import rewrite
from onnxprune.rewrite.weights import Path, with_weights
from onnxprune.select.plan import Plan
from onnxprune.workers import sparing_threads

__all__ = ["ConsumerRepair", "Repaired", "repair"]

SAMPLES = 512
MEMORY = 2 << 30
LARGEST_BATCH = 16
BATCHES = 16  # at least, where there are as many samples: every fifth is held out
HOLD_OUT = 5
FAINTEST = 1e-12  # of the mean square of an output: a smaller variance is rounding
TURNS, LONG = 2, 2e11  # for what an activation behind a layer gives; one less where it takes minutes

Batches = Iterable[Mapping[str, np.ndarray]]


@dataclass(frozen=True, slots=True)
class Repaired:
    """The pruned model with other weights, what was done for each consumer, and which were left and why.

    before, after: error of the model's outputs on the inputs that were held out, relative to their variance, with the
    sliced weights and with the new ones. dropped: it was no smaller, and the model has the sliced weights.
    samples: how many inputs the networks could be run on; held_out: how many of them to judge by. peak_bytes: of
    activations held in memory between steps; spilled_bytes: of those written to files.
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
    turns: int | None = None,
    behind: bool = True,
    seed: int = 0,
    memory_limit: int = MEMORY,
    statistics: Mapping[str, np.ndarray] | None = None,
    registry: Mapping[str, Operator] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Repaired:
    """Give the pruned model the weights with which its layers come closest to the original's outputs.

    data: a source, or batches of inputs by name; no labels are needed. samples: how many to take. batch: how many at a
    time. mode: 'affine' (weights and biases), 'ls' (weights), 'mean' (biases), 'none'. ridges: sizes to choose from per
    consumer, of the mean diagonal of the matrix. turns: how often a layer in front of an activation that is flat
    somewhere is solved for again, for what the activation gives: 2, or 1 for what takes minutes, unless told otherwise;
    0: each for its own output alone. behind: solve for linear layers that lost no input as well, where what comes in
    front of them did. memory_limit: bytes of activations held in memory between steps, and again of moments; more goes
    to temporary files, or into more steps.
    statistics: of the original's BatchNormalizations, by the names of the stored tensors, to run both networks with
    instead of the stored ones; see `normalised`.
    progress: called with the steps that are done, and their number.

    The model is that of `rewrite(analysis, plan)` with other values in some stored tensors. Raises NotMirrored where
    the model has no form in torch, RuntimeError where that can't be run on the inputs, DataError where there are none.
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
    with closing(Frontier(memory_limit)) as frontier, closing(Frontier(memory_limit // 8)) as judged, sparing_threads():
        sides = Side(graph, registry), Side(pruned, registry)
        restated = Restated(analysis, plan, sides, statistics or {})
        if turns is None:
            turns = TURNS - (samples * costs(analysis)["macs"].total({}) > LONG)
        settings = Settings(mode, tuple(ridges), turns, memory_limit, seed)
        work = _Work(Lockstep(sides, frontier), judged, found, settings)
        steps = work.steps()
        work.load(data, samples, batch)
        for k in range(len(steps)):
            progress(k, len(steps))
            work.run(steps[k], [t for s in steps[k + 1 :] for t in s])
        progress(len(steps), len(steps))
        before, after = work.judge()
    dropped = bool(work.values) and not (after < before or (work.coarse and after == before))
    if dropped:
        work.values.clear()
    kept = restated.back(work.values)
    values: dict[Path, np.ndarray] = {(name,): sides[1].stored(name, array) for name, array in kept.items()}
    return Repaired(
        with_weights(pruned, values),
        tuple(work.reports),
        (*left, *work.left),
        before,
        after,
        dropped,
        work.samples,
        work.held_out,
        len(steps),
        time.perf_counter() - start,
        frontier.peak + judged.peak,
        frontier.spilled + judged.spilled,
    )


class _Work:
    """values: stored tensors that changed, by name; sliced: what they were. judged: inputs to judge the whole by."""

    def __init__(self, run: Lockstep, judged: Frontier, found: Sequence[Consumer | Logits], settings: Settings) -> None:
        self.lockstep, self.judged, self.settings = run, judged, settings
        self.original, self.pruned = run.sides
        self.values: dict[str, np.ndarray] = {}
        self.sliced: dict[str, Tensor] = {}
        self.reports: list[ConsumerRepair] = []
        self.left: list[Left] = []
        self.tasks: list[Task] = []
        self.coarse = False  # whether the outputs tell whether they are right, but not by how much they are wrong
        self.sizes: list[int] = []
        for consumer in found:
            reason = "its weight or its input has no tensor of its own in the mirror"
            if isinstance(consumer, Logits) and settings.mode == "mean":
                reason = "a product of two tensors has no constant"
            elif self.within_reach(consumer):
                self.tasks.append(self.task(consumer))
                continue
            self.left.append(Left(consumer.label, consumer.op, consumer.groups, reason))

    def task(self, consumer: Consumer | Logits) -> Task:
        sides = self.original, self.pruned
        if isinstance(consumer, Consumer):
            return LinearTask(consumer, sides, self.settings)
        return ProductTask(consumer, sides, self.settings)

    def within_reach(self, consumer: Consumer | Logits) -> bool:
        if isinstance(consumer, Consumer):
            names, inputs, aims = [consumer.weight], [consumer.x], [consumer.source or consumer.y]
        else:
            names = [consumer.weight, *(m.name for m in consumer.mixed)]
            inputs, aims = ([getattr(o, n) for o in (consumer.left, consumer.right)] for n in ("name", "of"))
        places = ((names, self.pruned.targets), (inputs, self.pruned.places), (aims, self.original.places))
        return all(n in known for wanted, known in places for n in wanted)

    def load(self, data: Source | Batches, samples: int, batch: int | None) -> None:
        """Take the inputs. Raises DataError where there are none."""
        names, seed = self.original.names, self.settings.seed
        most = max(1, min(LARGEST_BATCH, samples // BATCHES))
        count = together((self.original, self.pruned), self.tasks, most, seed=seed) if batch is None else 1
        batch = batch or signature_of(self.original.graph).batch
        for k, inputs in enumerate(grouped(_batches(data, samples, batch, seed), count)):
            tensors = [as_tensor(inputs[n]) for n in names]
            self.lockstep.append(tensors)
            if k % HOLD_OUT == HOLD_OUT - 1 or not k:  # the first in case that there are few
                self.judged.append(dict(enumerate(tensors)))
            self.sizes.append(len(inputs[names[0]]) if names and np.ndim(inputs[names[0]]) else 1)
        if not self.sizes:
            raise DataError("there are no inputs to repair the model on", "give at least one batch")

    @property
    def samples(self) -> int:
        """How many the networks could be run on."""
        return sum(n for k, n in enumerate(self.sizes) if k not in self.lockstep.lost)

    @property
    def held_out(self) -> int:
        return sum(n for k, n in enumerate(self.sizes) if self.is_held(k) and k not in self.lockstep.lost)

    def is_held(self, batch: int) -> bool:
        every = HOLD_OUT if len(self.sizes) >= HOLD_OUT else max(len(self.sizes), 2)
        return batch % every == every - 1

    @torch.no_grad()
    def judge(self) -> tuple[float, float]:
        """Error of the pruned network's outputs with the sliced weights and with the new ones, relative to the variance
        of the original's, summed over the outputs: of those that are numbers, or the share of integers that differ
        where there are no numbers."""
        sums = [[_errors(*t) for t in zip(*outputs, strict=True)] for outputs in self.compared()]
        found = [[x for x in output if x is not None] for output in zip(*sums, strict=True)]
        whole = [np.sum(output, 0) for output in found if len(output) == len(sums)]  # no output's size may differ
        numbers = [x for x in whole if x[0]]
        self.coarse = not numbers
        total = np.zeros(2)
        for floating, n, first_moment, second, *errors in numbers or whole:
            spread = second - first_moment**2 / max(n, 1) if floating else second
            total += np.array(errors) / max(spread, FAINTEST * second, np.finfo(float).tiny)
        return float(total[0]), float(total[1])

    def compared(self) -> Iterator[tuple[list[Tensor | None], ...]]:
        """Outputs of the original, the sliced and the repaired network on the inputs that were held out, but for those
        that can't be run on. Raises RuntimeError where none can, or the repaired network can't where the sliced one can
        be."""
        failed: RuntimeError | None = None
        seen = False
        for k in range(int(len(self.judged) > 1), len(self.judged)):
            inputs = [x for _, x in sorted(self.judged.take(k).items())]
            self.swap()
            try:
                wanted, old = (side.outputs(inputs) for side in (self.original, self.pruned))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                failed = error
                continue
            finally:
                self.swap()
            yield wanted, old, self.pruned.outputs(inputs)
            seen = True
        if failed is not None and not seen:
            raise failed

    def swap(self) -> None:
        """Exchange the new weights with the sliced ones."""
        for name, other in self.sliced.items():
            tensor = self.pruned.tensor(name)
            self.sliced[name] = tensor.clone()
            tensor.copy_(other)

    def steps(self) -> list[list[Task]]:
        """What is solved for together: as many others lie in front of it, and the moments fit."""
        linear = {t.consumer.weight for t in self.tasks if isinstance(t, LinearTask)}
        turned = {self.pruned.places[t.product.left.name] for t in self.tasks if isinstance(t, ProductTask)}
        levels = self.pruned.levels(linear, turned)
        by_level: dict[int, list[Task]] = {}
        for task in self.tasks:
            level = max(levels[n] for n in task.inputs)
            if isinstance(task, LinearTask):
                task.begin(levels.__getitem__, level)
            by_level.setdefault(level, []).append(task)
        steps: list[list[Task]] = []
        for level in sorted(by_level):
            room = 0
            for task in by_level[level]:
                size = task.nbytes
                if room < size:
                    steps.append([])
                    room = max(self.settings.limit, size)
                steps[-1].append(task)
                room -= size
        return steps

    def run(self, step: Sequence[Task], later: Sequence[Task]) -> None:
        for turn in range(max(t.turns for t in step)):
            now = [t for t in step if turn < t.turns]
            again = [t for t in step if turn + 1 < t.turns]
            for task in now:
                task.start(turn)

            def visit(batch: int, values: Sequence[Mapping[Node, Tensor]], now: Sequence[Task] = now) -> None:
                for task in now:
                    task.gather(values, held=self.is_held(batch), batch=batch, batches=len(self.sizes))

            tried = {n for t in now for n in t.tried}
            self.lockstep.step(_wanted(now), _wanted([*again, *later], tried=True), visit, ((), tried))
            for task in now:
                for name, array in task.solve(turn, self.lockstep).items():
                    self.exchange(name, array)
        for task in step:
            said = task.report()
            if isinstance(said, Left):
                self.left.append(said)
            else:
                self.reports.append(said)

    def exchange(self, name: str, array: np.ndarray) -> None:
        tensor = self.pruned.tensor(name)
        self.sliced.setdefault(name, tensor.clone())
        tensor.copy_(torch.from_numpy(np.ascontiguousarray(array)))
        self.values[name] = tensor.numpy().copy()


def _wanted(tasks: Sequence[Task], *, tried: bool = False) -> tuple[set[Node], set[Node]]:
    """Nodes of both networks that tasks ask for."""
    inputs = {n for t in tasks for n in (*t.inputs, *(t.tried if tried else ()))}
    return {n for t in tasks for n in t.aims}, inputs


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
        yield inputs
        left -= max(1, min((len(a) for a in inputs.values() if np.ndim(a)), default=1))


def _errors(wanted: Tensor | None, old: Tensor | None, new: Tensor | None) -> np.ndarray | None:
    """Of an output: whether it is one of numbers; how many elements; their sum and sum of squares, and those of the
    squared errors. Elements that the original has no finite number for don't count. Of integers the elements, 0, the
    elements, and how many are wrong. None where they can't be compared."""
    if wanted is None or old is None or new is None or not wanted.shape == old.shape == new.shape:
        return None
    if not wanted.is_floating_point():
        n = wanted.numel()
        return np.array([0, n, 0, n, *(int((x != wanted).sum()) for x in (old, new))], np.float64)
    finite = wanted.isfinite()
    wanted, old, new = (x.double()[finite] for x in (wanted, old, new))
    errors = (float((x - wanted).square().sum()) for x in (old, new))
    return np.array([1, wanted.numel(), float(wanted.sum()), float(wanted.square().sum()), *errors])
