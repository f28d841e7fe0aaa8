"""What is solved for in a step, one kind of layer per class: where its numbers come from, and what becomes of them.

A task names the nodes of both networks whose values it wants, adds up moments of them batch by batch, and then gives
new values of stored tensors. It may want several turns: what it aims for may depend on what it has become.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from onnxprune.mirroring.shapes import Shapes
from onnxprune.reconstruct.beyond import Beyond
from onnxprune.reconstruct.bilinear import Grams, solve_bilinear
from onnxprune.reconstruct.consumers import Consumer, Left
from onnxprune.reconstruct.lockstep import Lockstep, Side
from onnxprune.reconstruct.logits import Logits
from onnxprune.reconstruct.moments import Moments
from onnxprune.reconstruct.solve import Solution, solve
from onnxprune.reconstruct.unfolded import Misfit

__all__ = ["ConsumerRepair", "LinearTask", "ProductTask", "Settings", "Task"]

ROWS = 1 << 16
ROWS_PER_COLUMN = 32
RESIZED = "its axes are not those of the sizes that the file was analysed with"

Values = Sequence[Mapping[Node, Any]]  # of both networks' nodes, for one batch


@dataclass(frozen=True, slots=True)
class ConsumerRepair:
    """What was done about one consumer.

    mode: 'affine', 'ls', 'mean', or 'none' where no repair was better on the inputs that were held out. before, after:
    error of its output there, relative to the output's variance, with the sliced and with the new weight (both with
    what comes in front of it repaired). rows: of how many the moments are. condition: of the matrix that was solved for
    (square root). turns: how often it was solved for. seconds: for moments and solution. nbytes: of the moments.
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
    turns: int
    seconds: float
    nbytes: int


@dataclass(frozen=True, slots=True)
class Settings:
    """See `repair`. limit: bytes of moments."""

    mode: str
    ridges: tuple[float, ...]
    turns: int
    limit: int
    seed: int


class Task(ABC):
    """sides: the original and the pruned network. inputs: what of the pruned one it wants; aims: of the original."""

    turns = 1

    def __init__(self, consumer: Consumer | Logits, sides: tuple[Side, Side], settings: Settings) -> None:
        self.original, self.pruned = sides
        self.settings = settings
        self.label, self.op, self.groups = consumer.label, consumer.op, consumer.groups
        self.seconds = 0.0

    @property
    @abstractmethod
    def inputs(self) -> list[Node]: ...

    @property
    @abstractmethod
    def aims(self) -> list[Node]: ...

    @property
    def tried(self) -> list[Node]:
        """Of the pruned network, run again for every turn."""
        return []

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Of its moments."""

    def scales(self, one: Sequence[Shapes], two: Sequence[Shapes], batch: int) -> bool:
        """Whether it can read several batches at once, going by the shapes of the networks' tensors for one of the
        file's size, `batch`, and for two of them: their samples stand in front, and what is masked is another axis."""
        places = [(0, n) for n in self.aims] + [(1, n) for n in (*self.inputs, *self.tried)]
        shapes = [(one[k].get(n, ()), two[k].get(n, ())) for k, n in places]
        return all(b == (2 * a[0], *a[1:]) if a else False for a, b in shapes)

    @abstractmethod
    def start(self, turn: int) -> None:
        """A pass over the batches is about to begin."""

    @abstractmethod
    def gather(self, values: Values, *, held: bool, batch: int, batches: int) -> None:
        """A batch of both networks' values. held: it is one to judge by."""

    @abstractmethod
    def solve(self, turn: int, lockstep: Lockstep) -> dict[str, np.ndarray]:
        """New values of stored tensors of the pruned model."""

    @abstractmethod
    def report(self) -> ConsumerRepair | Left: ...


class LinearTask(Task):
    """A layer with a stored weight.

    In the first turn it aims for the original's output, or for the sum that its output is part of; in further ones, at
    what an activation behind it gives (`beyond`).
    """

    def __init__(self, consumer: Consumer, sides: tuple[Side, Side], settings: Settings) -> None:
        super().__init__(consumer, sides, settings)
        self.consumer = consumer
        self.stored = self.pruned.tensor(consumer.weight).clone()
        place = consumer.place
        self.place = place if place is not None and place.name in self.pruned.targets else None
        self.laid = None if self.place is None else self.pruned.tensor(self.place.name).double().numpy().copy()
        self.weight = consumer.form.matrix(self.stored.double().numpy())
        self.moments: list[Moments] = []
        self.solution: Solution | None = None
        self.beyond: Beyond | None = None
        self.changed: set[str] = set()
        self.misfit = ""  # why it can't be solved for
        self.settled = False  # no further turn changes it

    @property
    def inputs(self) -> list[Node]:
        return [self.pruned.places[self.consumer.x]]

    @property
    def aims(self) -> list[Node]:
        name = self.beyond.of if self.beyond is not None else self.consumer.source or self.consumer.y
        return [self.original.places[name]]

    @property
    def tried(self) -> list[Node]:
        return [] if self.beyond is None else [self.pruned.places[n] for n in (self.beyond.y, self.beyond.u)]

    def scales(self, one: Sequence[Shapes], two: Sequence[Shapes], batch: int) -> bool:
        consumer, found = self.consumer, self.beyond
        kept = found.kept if found is not None else consumer.kept if consumer.original is None else ()
        return super().scales(one, two, batch) and (not kept or kept[0] is None)

    @property
    def nbytes(self) -> int:
        return 3 * Moments.nbytes(*self.consumer.sizes())

    def begin(self, level: Callable[[Node], int], own: int) -> None:
        """The steps are known. level: how many solved layers lie in front of a node; own: of this one's input."""
        found = self.consumer.beyond
        if found is None or not self.settings.turns or self.settings.mode not in ("ls", "affine"):
            return
        known = {found.y, found.u, *found.others} <= set(self.pruned.places) and found.of in self.original.places
        # what is added must be in its final state: it comes from layers that have been solved for
        if known and all(level(self.pruned.places[n]) <= own for n in found.others):
            self.beyond = found
            self.turns = 1 + self.settings.turns * (found.activation is not None)

    def start(self, turn: int) -> None:
        size = self.consumer.sizes()
        self.moments = [m.aimed() for m in self.moments] if turn else [Moments.zeros(*size) for _ in range(2)]
        self.seen = 0
        if self.beyond is not None:
            rank = len(self.beyond.kept)
            self.slope = self.beyond.slope(self.value, rank)
            self.flat = self.beyond.flat(self.value) if turn else None

    def value(self, name: str) -> np.ndarray | None:
        """Of a stored tensor of the pruned model, as it is now: reals in float64."""
        if name in self.pruned.targets:
            return self.pruned.tensor(name).double().numpy()
        graph = self.pruned.graph
        array = graph.array(name) if name in graph.parameters else None
        return array if array is None or array.dtype.kind in "iu" else array.astype(np.float64)

    def gather(self, values: Values, *, held: bool, batch: int, batches: int) -> None:
        if self.misfit or self.settled:
            return
        start = time.perf_counter()
        limit = -(-max(ROWS, ROWS_PER_COLUMN * self.consumer.sizes()[1]) // batches)
        try:
            self.add(values, self.moments[held], limit, np.random.default_rng((self.settings.seed, batch)))
        except Misfit as reason:
            self.misfit = str(reason)
        self.seconds += time.perf_counter() - start

    def add(self, values: Values, moments: Moments, limit: int, rng: np.random.Generator) -> None:
        form = self.consumer.form
        x = form.linear.unfold(values[1][self.inputs[0]])
        for rows, targets in form.blocks(x, self.target(values), limit, rng):
            finite = np.isfinite(rows.sum() + targets.sum())
            if self.solution is None and finite:
                moments.add(rows, targets)
            elif self.solution is None:
                usable = np.isfinite(rows).all((0, 2)) & np.isfinite(targets).all((0, 2))
                moments.add(rows[:, usable], targets[:, usable])
            elif finite:
                moments.aim(rows, targets)
                self.seen += rows.shape[1]

    def target(self, values: Values) -> Tensor:
        """What the output should be, with the axes of the rule's third term. Raises Misfit."""
        consumer, tensor = self.consumer, values[0][self.aims[0]]
        if self.beyond is not None:
            y, u = (values[1][n] for n in self.tried)
            if _sizes(tensor, self.original, self.beyond.of, self.beyond.kept) != u.shape or u.shape != y.shape:
                raise Misfit("what it is added to has other rows than in the original")
            return consumer.form.linear.unfold_output(self.beyond.aims(y, u, tensor, self.slope, self.flat))
        if consumer.original is None:
            _sizes(tensor, self.original, consumer.y, consumer.kept)
            for axis, mask in enumerate(consumer.kept):
                tensor = tensor if mask is None else tensor.index_select(axis, torch.from_numpy(mask))
            return consumer.form.linear.unfold_output(tensor)
        whole, weight = consumer.original
        names = {n: chr(ord("a") + k) for k, n in enumerate(dict.fromkeys(n for t in whole.linear.terms for n in t))}
        x, w, y = ("".join(names[n] for n in t) for t in whole.linear.terms)
        return torch.einsum(f"{x},{w}->{y}", whole.linear.unfold(tensor).double(), torch.from_numpy(weight))

    def solve(self, turn: int, lockstep: Lockstep) -> dict[str, np.ndarray]:
        start = time.perf_counter()
        settings, offset = self.settings, self.consumer.offset
        fit, held = self.moments
        self.rows = fit.n + held.n
        if turn and self.seen != self.rows:  # it was not shown the rows that there are moments of
            self.settled = True
        if not fit.n and not self.misfit:
            self.misfit = "none of the inputs gives it rows to learn from"
        if not self.misfit and not self.settled:
            free = self.place is not None
            begin, last = None if self.solution is None else self.solution.ridge, turn == self.turns - 1
            how: dict[str, Any] = {"free": free, "ridges": settings.ridges, "begin": begin, "final": last}
            how["snap"] = self.snapped
            found = solve(fit, held, self.weight, offset, settings.mode, **how)
            self.solution = found if self.solution is None else replace(found, before=self.solution.before)
        if turn == self.turns - 1:
            self.moments = []
        changed = self.new_values()
        self.seconds += time.perf_counter() - start
        return changed

    def snapped(self, matrix: np.ndarray) -> np.ndarray:
        """The weight that the file can hold: integers have a range and steps."""
        name, form = self.consumer.weight, self.consumer.form
        integers = self.pruned.form(name)
        if integers is None:
            return matrix
        return form.matrix(integers.reals(integers.integers(form.stored(matrix, tuple(self.stored.shape)))))

    def new_values(self) -> dict[str, np.ndarray]:
        """Of the stored tensors that it changes, or has changed in an earlier turn."""
        found = None if self.misfit else self.solution
        mode = "none" if found is None else found.mode
        form, place = self.consumer.form, self.place
        if mode in ("ls", "affine"):
            self.changed.add(self.consumer.weight)
        if mode in ("mean", "affine") and place is not None:
            self.changed.add(place.name)
        values: dict[str, np.ndarray] = {}
        if self.consumer.weight in self.changed:
            matrix = self.weight if found is None else found.weight
            values[self.consumer.weight] = form.stored(matrix, tuple(self.stored.shape))
        if place is not None and self.laid is not None and place.name in self.changed:
            offset = self.consumer.offset
            values[place.name] = self.laid + place.lay(
                ((offset if found is None else found.offset) - offset).reshape(-1)
            )
        return values

    def report(self) -> ConsumerRepair | Left:
        found = self.solution
        if self.misfit or found is None:
            return Left(self.label, self.op, self.groups, self.misfit)
        columns = self.consumer.sizes()[1]
        return ConsumerRepair(
            self.label,
            self.op,
            self.groups,
            found.mode,
            found.ridge,
            found.condition,
            found.before,
            found.after,
            self.rows,
            columns,
            self.turns,
            self.seconds,
            self.nbytes,
        )


class ProductTask(Task):
    """A product of two tensors that are both computed from the data: a matrix per head between them."""

    def __init__(self, product: Logits, sides: tuple[Side, Side], settings: Settings) -> None:
        super().__init__(product, sides, settings)
        self.product = product

    @property
    def inputs(self) -> list[Node]:
        return [self.pruned.places[o.name] for o in (self.product.left, self.product.right)]

    @property
    def aims(self) -> list[Node]:
        return [self.original.places[o.of] for o in (self.product.left, self.product.right)]

    def scales(self, one: Sequence[Shapes], two: Sequence[Shapes], batch: int) -> bool:
        leads = [one[k][n][0] for k, some in ((0, self.aims), (1, self.inputs)) for n in some if one[k].get(n)]
        return super().scales(one, two, batch) and all(lead == batch for lead in leads)

    @property
    def nbytes(self) -> int:
        return Grams.nbytes(self.product.limit(self.settings.limit // 4), *self.product.sizes())

    def start(self, turn: int) -> None:
        self.fit, self.held = (Grams.zeros(*self.product.sizes()) for _ in range(2))

    def gather(self, values: Values, *, held: bool, batch: int, batches: int) -> None:
        start = time.perf_counter()
        factors, originals = ([values[k][n] for n in some] for k, some in ((1, self.inputs), (0, self.aims)))
        limit = -(-self.product.limit(self.settings.limit // 4) // batches)
        rng = np.random.default_rng((self.settings.seed, batch))
        moments = self.held if held else self.fit
        self.product.gather(moments, (factors[0], factors[1]), (originals[0], originals[1]), limit, rng)
        self.seconds += time.perf_counter() - start

    def solve(self, turn: int, lockstep: Lockstep) -> dict[str, np.ndarray]:
        start = time.perf_counter()
        self.samples = self.fit.samples + self.held.samples
        if not self.fit.samples:
            return {}
        self.taken = self.fit.nbytes(self.samples, *self.product.sizes())
        self.solution = found = solve_bilinear(self.fit, self.held, self.settings.ridges)
        changed: dict[str, np.ndarray] = {}
        if found.mode != "none":
            names = (self.product.weight, *(m.name for m in self.product.mixed))
            stored = {n: self.pruned.tensor(n).double().numpy() for n in names}
            changed = self.product.absorbed(found.mixed, stored)
            # what the layer gave is held, and not computed again
            factor = self.pruned.places[self.product.left.name]
            lockstep.turn(1, factor, lambda x: self.product.turn(x, found.mixed))
        del self.fit, self.held
        self.seconds += time.perf_counter() - start
        return changed

    def report(self) -> ConsumerRepair | Left:
        if not self.samples:
            return Left(self.label, self.op, self.groups, RESIZED)
        found, columns = self.solution, self.product.sizes()[1]
        return ConsumerRepair(
            self.label,
            self.op,
            self.groups,
            found.mode,
            found.ridge,
            found.condition,
            found.before,
            found.after,
            self.samples,
            columns,
            1,
            self.seconds,
            self.taken,
        )


def _sizes(tensor: Tensor, side: Side, name: str, masks: Sequence[np.ndarray | None]) -> tuple[int, ...]:
    """Of a tensor less what the masks leave out. Raises Misfit where an axis with a mask is not of the size that it was
    analysed with."""
    analysed = side.graph.shapes.get(name) or tensor.shape
    if any(m is not None and tensor.shape[k] != analysed[k] for k, m in enumerate(masks)):
        raise Misfit(RESIZED)
    return tuple(n if m is None else len(m) for n, m in zip(tensor.shape, masks, strict=True))
