"""TPP, trainability preserving pruning (arXiv 2207.12534): what is to go is first made independent of what stays.

Redundant units are chosen once. While the network trains on, a growing penalty takes the inner products between their
weights and all others to zero (`gram`), and shrinks whatever produces them. When they are removed nothing is missed,
and the network that is left trains as well as the whole one did.

    tpp = TPP(params_and_groups(mirror, analysis), scale="auto")
    tpp.choose(lowest(tpp.magnitudes(), 0.5))
    for step, batch in enumerate(batches):
        optimizer.zero_grad()
        loss(batch).backward()
        tpp.strength = ramp.at(step)                # Growing(), or whatever
        tpp.add_gradients()
        optimizer.step()
        tpp.shrink(lr)
    tpp.remove()

This file is the method, by hand; `penalised` has it as a part of `compress`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from onnxprune.errors import UsageError
from onnxprune.train.families import Grouping
from onnxprune.train.gram import GramPenalty, Scale
from onnxprune.train.magnitude import magnitudes
from onnxprune.train.units import Part, UnitTable

__all__ = ["TPP", "Growing", "lowest"]

Decay = Literal["shrink", "gradient", "none"]
Reach = Literal["all", "weights", "vectors"]


@dataclass(frozen=True, kw_only=True)
class Growing:
    """The paper's schedule: lambda grows by `by` every `every` steps up to `limit`, and stays there for `hold` steps.

    The defaults are those of the authors' program (every = 5, hold = 40,000 on ImageNet).
    """

    by: float = 1e-4
    limit: float = 1.0
    every: int = 10
    hold: int = 10_000

    def at(self, step: int) -> float:
        """Lambda in a step, from 0. The first `every` steps have the first addition."""
        return min(self.limit, self.by * (step // self.every + 1))

    @property
    def steps(self) -> int:
        """Until the end of the hold."""
        return (round(self.limit / self.by) - 1) * self.every + self.hold


class TPP:
    """Adds the penalty's gradients after backward, and shrinks redundant units; or one of both.

    params_and_groups: as `families.params_and_groups` gives them: "params", "parts", and where there are any,
    "grouping". The tensors' storage is exchanged: move a module to its device before.
    gram: whether inner products are penalised; scale, rho: see `GramPenalty`.
    decay: how lambda/2 |z|^2 of redundant slices z acts: 'shrink': z <- z / (1 + lr lambda) after the optimizer's step,
    stable for any lr lambda, and the same under Adam, clipping and loss scaling; 'gradient': lambda z is added to the
    gradient, as the authors' program does; 'none'.
    reach: of 'all' that produces a unit, its 'weights', or its 'vectors': what has one number per unit, such as scale
    and shift of a normalisation (with decay='gradient' and scale='paper' that is the loss of the paper).

    strength: lambda. redundant: units that are penalised; dead: units that are zero and stay so; bool, per unit of
    `table`.
    """

    def __init__(
        self,
        params_and_groups: Iterable[Mapping[str, Any]],
        *,
        redundant: Mapping[str, np.ndarray] | None = None,
        gram: bool = True,
        scale: Scale = "auto",
        rho: float = 0.5,
        decay: Decay = "shrink",
        reach: Reach = "all",
    ) -> None:
        _one_of("scale", scale, "paper", "code", "auto")
        _one_of("decay", decay, "shrink", "gradient", "none")
        _one_of("reach", reach, "all", "weights", "vectors")
        tensors: list[Tensor] = []
        parts: list[Sequence[Part]] = []
        grouping: list[Grouping | None] = []
        for group in params_and_groups:
            tensors += group["params"]
            parts += group["parts"]
            grouping += group.get("grouping") or [None] * len(group["params"])
        self.table = UnitTable(tensors, parts)
        self.gram = (
            GramPenalty(tensors, parts, grouping, self.table.slices, scale=scale, rho=rho)
            if gram
            else GramPenalty((), (), (), self.table.slices)
        )
        self.decay, self.reach = decay, reach
        self.strength = 0.0
        self.redundant = torch.zeros(self.table.units, dtype=torch.bool, device=self.table.device)
        self.dead = self.redundant.clone()
        if redundant is not None:
            self.choose(redundant)

    def magnitudes(self) -> dict[str, np.ndarray]:
        """Mean |w| of every unit, per family."""
        return self.table.by_family(magnitudes(self.table))

    def choose(self, redundant: Mapping[str, np.ndarray]) -> None:
        """Say which units are redundant (bool), per family; of families that are not named, none is.

        Raises UsageError for families that there are not, and arrays that are not as long as their family.
        """
        for family, gone in redundant.items():
            if family not in self.table.slices:
                raise UsageError(f"family '{family}' is none of {', '.join(self.table.slices) or 'none'}")
            where = self.table.slices[family]
            if np.shape(gone) != (where.stop - where.start,):
                raise UsageError(f"family '{family}' has {where.stop - where.start} units, found {np.shape(gone)}")
        self.redundant.copy_(self.table.from_families(redundant) > 0)
        self.gram.select(self.redundant)

    @torch.no_grad()
    def add_gradients(self, strength: float | None = None) -> None:
        """Add the gradient of the penalty to the parameters' gradients (which are unscaled, and clipped if at all).

        strength: lambda, `self.strength` by default.
        """
        strength = self.strength if strength is None else strength
        if not strength:
            return
        _add(self.gram.gradients(), strength)
        if self.decay == "gradient":
            decayed = self.table.storage()
            for y, x, f in zip(decayed.banks, self.table.x.banks, self.per_row(1.0, 0.0), strict=True):
                torch.mul(x, f, out=y)
            pairs = zip(self.table.tensors, decayed.views, strict=True)
            _add([(tensor, view) for tensor, view in pairs if tensor.requires_grad], strength)

    @torch.no_grad()
    def descend(self, lr: float, strength: float | None = None) -> None:
        """Instead of `add_gradients`, behind the optimizer's step: gradient descent on the Gram penalty alone.

        An optimizer that divides gradients by their size (Adam) would follow a penalty of any strength at its full
        rate, and remember its size for long.
        """
        strength = self.strength if strength is None else strength
        if strength:
            for weight, gradient in self.gram.gradients():
                weight.detach().sub_(gradient, alpha=lr * strength)

    @torch.no_grad()
    def shrink(self, lr: float, strength: float | None = None) -> None:
        """Behind the optimizer's step: shrink what is redundant, where the decay is of that kind; keep the dead zero.

        lr: the rate of that step (over 1 - momentum, for the effect that a gradient would have).
        """
        strength = self.strength if strength is None else strength
        if self.decay == "shrink" and strength:
            for x, f in zip(self.table.x.banks, self.per_row(1 / (1 + lr * strength), 1.0), strict=True):
                x.mul_(f)
        self.table.keep_(~self.dead)

    @torch.no_grad()
    def remove(self, units: Tensor | None = None) -> None:
        """Set redundant units to exactly zero for good; units: only those of them (bool, per unit)."""
        self.dead |= self.redundant if units is None else self.redundant & units
        self.table.keep_(~self.dead)

    def norms(self) -> Tensor:
        """Of every unit."""
        return self.table.square(self.table.x.banks).sqrt()

    def per_row(self, redundant: float, other: float) -> list[Tensor]:
        """A number per row of the table's banks, in the shape that multiplies them: `redundant` where a unit of the
        row's is redundant and the bank in reach."""
        gone = self.table.spread(self.redundant.float(), combine="sum")
        return [
            torch.where(r > 0, redundant, other).to(x.dtype) if self._reaches(r, x) else torch.full_like(r, other)
            for r, x in zip(gone, self.table.x.banks, strict=True)
        ]

    def _reaches(self, per_row: Tensor, bank: Tensor) -> bool:
        return self.reach == "all" or (self.reach == "vectors") == (per_row.numel() == bank.numel())

    def state_dict(self) -> dict[str, Any]:
        return {"redundant": self.redundant, "dead": self.dead, "gram": self.gram.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.redundant.copy_(state["redundant"])
        self.dead.copy_(state["dead"])
        self.gram.load_state_dict(state["gram"])
        self.gram.select(self.redundant)


def lowest(scores: Mapping[str, np.ndarray], ratio: float) -> dict[str, np.ndarray]:
    """The `ratio` of every family with the lowest scores, but never all of it."""
    found = {}
    for family, values in scores.items():
        found[family] = np.zeros(len(values), bool)
        found[family][np.argsort(values, kind="stable")[: min(round(ratio * len(values)), len(values) - 1)]] = True
    return found


def _add(pairs: Iterable[tuple[Tensor, Tensor]], factor: float) -> None:
    """grad += factor * value for (parameter, value), also where there is no gradient yet."""
    sums: dict[Tensor, Tensor] = {}
    for parameter, value in pairs:  # a parameter that comes up twice would be a race
        sums[parameter] = sums[parameter] + value if parameter in sums else value
    gradients = []
    for parameter in sums:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    if sums:
        torch._foreach_add_(gradients, list(sums.values()), alpha=factor)


def _one_of(name: str, value: str, *allowed: str) -> None:
    if value not in allowed:
        raise UsageError(f"{name} must be one of {', '.join(allowed)}, found '{value}'")
