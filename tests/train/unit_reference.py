"""DHSPG and HESSO unit by unit, as the papers write them: Python loops, no table. What the fast forms are held against.

A problem is a list of tensors, their parameter groups' options, and units: per unit, the boolean masks of what it owns
in each tensor. Everything is float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onnxprune.train.units import Part

Gradients = Sequence[Tensor | None]


@dataclass
class Problem:
    """tensors, parts: as an optimizer's parameter groups have them. group: of each tensor, an index into `options`."""

    tensors: list[Tensor]
    parts: list[tuple[Part, ...]]
    group: list[int]
    options: list[dict[str, Any]]

    def param_groups(self, dtype: torch.dtype = torch.float64) -> list[dict[str, Any]]:
        """Fresh parameters, for an optimizer."""
        groups: list[dict[str, Any]] = [{"params": [], "parts": [], **o} for o in self.options]
        for tensor, parts, k in zip(self.tensors, self.parts, self.group, strict=True):
            groups[k]["params"].append(
                torch.nn.Parameter(tensor.detach().clone(memory_format=torch.preserve_format).to(dtype))
            )
            groups[k]["parts"].append(parts)
        return groups

    def order(self) -> list[int]:
        """The tensors' numbers, in the order in which an optimizer has them."""
        return sorted(range(len(self.tensors)), key=lambda k: self.group[k])

    def names(self) -> list[tuple[str, int]]:
        """Family and number in it of every unit, in the table's numbering."""
        sizes: dict[str, int] = {}
        for k in self.order():
            for part in self.parts[k]:
                sizes[part.family] = max(sizes.get(part.family, 0), int(part.units.max()) + 1)
        return [(family, unit) for family, size in sizes.items() for unit in range(size)]

    def units(self) -> list[list[Tensor | None]]:
        """Per unit, what it owns in each tensor."""
        return [[self._mask(k, *name) for k in range(len(self.tensors))] for name in self.names()]

    def _mask(self, k: int, family: str, unit: int) -> Tensor | None:
        mask = torch.zeros(self.tensors[k].shape, dtype=torch.bool)
        for part in self.parts[k]:
            if part.family == family:
                for index in np.flatnonzero(part.units == unit):
                    mask.select(part.axis, int(index)).fill_(True)
        return mask if bool(mask.any()) else None


@dataclass
class Base:
    """Directions of SGD, Adam and AdamW as their papers have them, for one tensor."""

    variant: str
    options: Mapping[str, Any]
    memory: dict[str, Any] = field(default_factory=dict)

    def direction(self, x: Tensor, gradient: Tensor | None) -> Tensor:
        if gradient is None:
            return torch.zeros_like(x)
        o, m = self.options, self.memory
        decay = o.get("weight_decay", 0.0)
        if self.variant == "sgd":
            g = gradient + decay * x
            m["v"] = o["momentum"] * m.get("v", torch.zeros_like(x)) + g
            return g + o["momentum"] * m["v"] if o.get("nesterov") else m["v"]
        g = gradient + decay * x if self.variant == "adam" else gradient
        b1, b2 = o.get("betas", (0.9, 0.999))
        m["t"] = m.get("t", 0) + 1
        m["m"] = b1 * m.get("m", torch.zeros_like(x)) + (1 - b1) * g
        m["v"] = b2 * m.get("v", torch.zeros_like(x)) + (1 - b2) * g * g
        d = (m["m"] / (1 - b1 ** m["t"])) / ((m["v"] / (1 - b2 ** m["t"])).sqrt() + o.get("eps", 1e-8))
        return d + decay * x if self.variant == "adamw" else d


class Reference:
    """What both methods have in common. `x` are the tensors as they are now."""

    def __init__(self, problem: Problem, variant: str) -> None:
        self.problem = problem
        self.x = [t.detach().double().clone() for t in problem.tensors]
        self.bases = [Base(variant, problem.options[k]) for k in problem.group]
        self.units = problem.units()
        self.zero = [False] * len(self.units)
        self.measured: list[list[tuple[float, float, float]]] = [[] for _ in self.units]  # |x|, cos, <x, d>
        self.rates = [float(o["lr"]) for o in problem.options]

    def directions(self, gradients: Gradients) -> list[Tensor]:
        """d of every tensor, such that all move by the largest rate times it."""
        a = max(self.rates)
        found = [b.direction(x, g) for b, x, g in zip(self.bases, self.x, gradients, strict=True)]
        return [d * (self.rates[k] / a) for d, k in zip(found, self.problem.group, strict=True)]

    def flat(self, unit: int, tensors: Sequence[Tensor]) -> Tensor:
        """A unit's slices, end to end."""
        return torch.cat([t[m] for t, m in zip(tensors, self.units[unit], strict=True) if m is not None])

    def measure(self, d: Sequence[Tensor]) -> None:
        for u in range(len(self.units)):
            x_u, d_u = self.flat(u, self.x), self.flat(u, d)
            inner = float(x_u @ d_u)
            size = float(x_u.norm() * d_u.norm())
            self.measured[u].append((float(x_u.norm()), inner / size if size else 0.0, inner))

    def clear(self) -> None:
        for rows in self.measured:
            rows.clear()

    def means(self) -> tuple[list[float], list[float], list[float], list[float], list[int]]:
        """|x|, cos, <x, d>, <x, d>^2 over the steps that were measured; how many numbers a unit has."""
        n = len(self.measured[0])
        norm, cosine, inner = ([sum(r[k] for r in rows) / n for rows in self.measured] for k in range(3))
        square = [sum(r[2] ** 2 for r in rows) / n for rows in self.measured]
        return norm, cosine, inner, square, [len(self.flat(u, self.x)) for u in range(len(self.units))]

    def least(self, saliency: Sequence[float], count: int) -> set[int]:
        """The units of the lowest saliency, but for the last one of each family."""
        families = [family for family, _ in self.problem.names()]
        left = {family: families.count(family) for family in families}
        found: set[int] = set()
        for u in sorted(range(len(saliency)), key=lambda u: saliency[u]):
            if len(found) < count and left[families[u]] > 1:
                found.add(u)
                left[families[u]] -= 1
        return found

    def set_zero(self) -> None:
        for u, gone in enumerate(self.zero):
            if gone:
                for x, mask in zip(self.x, self.units[u], strict=True):
                    if mask is not None:
                        x[mask] = 0.0


class ReferenceDHSPG(Reference):
    def __init__(
        self,
        problem: Problem,
        variant: str,
        *,
        start: int,
        stop: int,
        taper: int,
        window: int,
        target: float,
        lmbda: float,
        amplify: float,
        hat: float,
        epsilon: float,
    ) -> None:
        super().__init__(problem, variant)
        self.start, self.stop, self.taper, self.window, self.target = start, stop, taper, window, target
        self.lmbda, self.amplify, self.hat, self.epsilon = lmbda, amplify, hat, epsilon
        self.redundant: set[int] = set()

    def step(self, t: int, gradients: Gradients) -> None:
        a = max(self.rates)
        d = self.directions(gradients)
        if self.start - self.window <= t < self.start:
            self.measure(d)
        if t == self.start:
            self.redundant = self.partition()
        moved = [x - a * way for x, way in zip(self.x, d, strict=True)]
        if self.start <= t < self.stop:
            left = (self.stop - t - 1) / (self.stop - t) if t >= self.stop - self.taper else 1.0
            before = list(self.zero)
            drawn = [x.clone() for x in moved]
            for u in (u for u in self.redundant if not before[u]):
                x_u, d_u = self.flat(u, self.x), self.flat(u, d)
                if not float(x_u.norm()):
                    self.zero[u] = True
                    continue
                pull = self.strength(x_u, d_u) * x_u / x_u.norm()
                y_u = x_u - a * d_u - a * pull
                if float(y_u @ x_u) < self.epsilon * float(x_u @ x_u):
                    self.zero[u] = True
                begin = 0
                for y, mask in zip(drawn, self.units[u], strict=True):
                    if mask is not None:
                        count = int(mask.sum())
                        y[mask] -= a * pull[begin : begin + count]
                        begin += count
            for u in (u for u in self.redundant if not before[u]):
                for y, mask in zip(drawn, self.units[u], strict=True):
                    if mask is not None:
                        y[mask] *= left
                if left == 0:
                    self.zero[u] = True
            moved = drawn
        self.x = moved
        self.set_zero()

    def partition(self) -> set[int]:
        norm, cosine, _, _, counts = self.means()
        inverse = [n / x for n, x in zip(counts, norm, strict=True)]
        all_cos, all_inverse = math.hypot(*cosine), math.hypot(*inverse)
        score = [0.5 * c / all_cos + 0.5 * i / all_inverse for c, i in zip(cosine, inverse, strict=True)]
        return self.least([-s for s in score], round(self.target * len(score)))

    def strength(self, x: Tensor, d: Tensor) -> float:
        inner = float(x @ d)
        if inner >= 0:
            return self.lmbda
        least = -inner / float(x.norm())
        most = -float(d @ d) * float(x.norm()) / inner
        found = min(max(self.amplify * least, self.lmbda), self.lmbda * self.hat)
        return (least + most) / 2 if found >= most else found


class ReferenceHESSO(Reference):
    def __init__(
        self, problem: Problem, variant: str, *, start: int, steps: int, periods: int, window: int, target: float
    ) -> None:
        super().__init__(problem, variant)
        self.start, self.steps, self.periods, self.window, self.target = start, steps, periods, window, target
        self.redundant: set[int] = set()

    def step(self, t: int, gradients: Gradients) -> None:
        a = max(self.rates)
        d = self.directions(gradients)
        period, inside = divmod(t - self.start, self.steps)
        if inside == 0 and 0 <= period < self.periods:
            for u in self.redundant:
                self.zero[u] = True
            self.redundant |= self.chosen(period)
            self.clear()
        edge = self.start if t < self.start else self.start + (period + 1) * self.steps
        if edge - self.window <= t < edge < self.start + self.periods * self.steps:
            self.measure(d)
        self.x = [x - a * way for x, way in zip(self.x, d, strict=True)]
        if 0 <= period < self.periods:
            for u in (u for u in self.redundant if not self.zero[u]):
                for x, mask in zip(self.x, self.units[u], strict=True):
                    if mask is not None:
                        x[mask] *= (self.steps - inside - 1) / (self.steps - inside)
        elif period >= self.periods:
            for u in self.redundant:
                self.zero[u] = True
        self.set_zero()

    def chosen(self, period: int) -> set[int]:
        norm, cosine, inner, square, counts = self.means()
        criteria = [norm, [x / n for x, n in zip(norm, counts, strict=True)], [1 + c for c in cosine]]
        criteria += [[abs(i) for i in inner], [s / 2 for s in square]]
        score = [0.0] * len(norm)
        for values in criteria:
            size = math.hypot(*values)
            score = [s + 0.2 * v / size for s, v in zip(score, values, strict=True)]
        score = [-math.inf if u in self.redundant else s for u, s in enumerate(score)]
        return self.least(score, round(self.target * len(score) * (period + 1) / self.periods))
