"""Gram matrices of everything that produces units, and the penalty on what redundant units have in common with others.

With the outputs of a layer as the rows of W, and m 1 for rows that stay and 0 for those that go, the penalty is

    a/2 * || W W^T * (1 - m m^T) ||_F^2     with the gradient     2 a ((1 - m m^T) * W W^T) W

(TPP, arXiv 2207.12534, eq. 3 and 4). Each weight has a Gram matrix of its own: inner products that are summed over
layers can cancel. In a grouped convolution only rows of the same group see the same inputs: its mask is block-diagonal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from onnxprune.train.families import Grouping
from onnxprune.train.units import Part

__all__ = ["GramPenalty", "Scale"]

Scale = Literal["paper", "code", "auto"]
WARM_UP = 10  # power iterations before the first gradient; one per gradient follows


class _Layout(NamedTuple):
    """A weight as (blocks, rows, columns): reshaped to `split`, permuted by `order`, reshaped again."""

    split: tuple[int, ...]
    order: tuple[int, ...]

    @classmethod
    def of(cls, shape: Sequence[int], axis: int, grouping: Grouping | None) -> _Layout:
        if grouping is None:
            return cls((1, *shape), (0, axis + 1, *(k + 1 for k in range(len(shape)) if k != axis)))
        split = (grouping.groups, shape[0] // grouping.groups, *shape[1:])
        if grouping.rows == 0:
            return cls(split, tuple(range(len(split))))
        return cls(split, (0, 2, 1, *range(3, len(split))))

    @property
    def form(self) -> tuple[int, int, int]:
        blocks, rows, *columns = (self.split[k] for k in self.order)
        return blocks, rows, prod(columns)

    def forth(self, weight: Tensor) -> Tensor:
        return weight.reshape(self.split).permute(self.order).reshape(self.form)

    def back(self, rows: Tensor, shape: torch.Size) -> Tensor:
        permuted = rows.reshape([self.split[k] for k in self.order])
        return permuted.permute([self.order.index(k) for k in range(len(self.order))]).reshape(shape)

    def units(self, part: Part, shape: Sequence[int]) -> np.ndarray:
        """Which unit of a part each row belongs to, (blocks, rows)."""
        laid = part.units.reshape([-1 if k == part.axis else 1 for k in range(len(shape))])
        whole = np.broadcast_to(laid, shape).reshape(self.split).transpose(self.order)
        for _ in range(whole.ndim - 2):
            whole = whole[..., 0]
        return whole


@dataclass(eq=False)
class _Stack:
    """Weights of one form, (weights * blocks, rows, columns) when stacked.

    unit: (weights * blocks, rows, parts), numbered through; the one behind the last where a row has none.
    kept: 1 for rows that stay, 0 for others. vector: where the power iteration for the largest eigenvalue stands.
    """

    form: tuple[int, int, int]
    tensors: list[Tensor]
    layouts: list[_Layout]
    unit: Tensor
    kept: Tensor
    vector: Tensor

    def rows(self) -> Tensor:
        found = [layout.forth(t.detach()) for t, layout in zip(self.tensors, self.layouts, strict=True)]
        return found[0] if len(found) == 1 else torch.cat(found)

    def largest(self, gram: Tensor, *, advance: bool = True) -> Tensor:
        """The largest eigenvalue of each Gram matrix, from below, and per weight the largest of its blocks',
        (weights * blocks, 1, 1). advance: take the step of the power iteration that this is."""
        product = (gram @ self.vector[..., None])[..., 0]
        size = torch.linalg.vector_norm(product, dim=-1, keepdim=True)
        if advance:
            self.vector.copy_(torch.where(size > 0, product / size, self.vector))
        blocks = self.form[0]
        return size.view(-1, blocks).amax(1, keepdim=True).expand(-1, blocks).reshape(-1, 1, 1)


class GramPenalty:
    """The penalty of all weights of a network, its gradient in closed form.

    tensors, parts: as of a `UnitTable`; grouping: per tensor, where it is a grouped convolution's weight. Depthwise
    ones, and what has one number per row, have no Gram matrix worth the name. slices: how the units are numbered.
    scale: 'paper': a = 1; 'code': a = 2000 / N^2 with N rows, as in the authors' program, whose loss is 1000 times the
    mean over the matrix; 'auto': a = rho / (largest singular value of W)^2, which is the same for layers of all sizes.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        parts: Sequence[Sequence[Part]],
        grouping: Sequence[Grouping | None],
        slices: Mapping[str, slice],
        *,
        scale: Scale = "auto",
        rho: float = 0.5,
    ) -> None:
        self.scale, self.rho = scale, rho
        self.units = max((s.stop for s in slices.values()), default=0)
        found: dict[tuple[object, ...], list[tuple[Tensor, _Layout, np.ndarray]]] = {}
        for tensor, own, grouped in zip(tensors, parts, grouping, strict=True):
            for axis in _row_axes(tensor, own, grouped):
                layout = _Layout.of(tensor.shape, axis, grouped)
                inside = [p for p in own if p.axis == axis or (grouped is not None and p.axis == 0)]
                units = [(layout.units(p, tensor.shape), slices[p.family].start) for p in inside]
                unit = np.stack([np.where(u >= 0, u + start, self.units) for u, start in units])
                key = (tensor.dtype, tensor.device, *layout.form, len(inside))
                found.setdefault(key, []).append((tensor, layout, np.moveaxis(unit, 0, -1)))
        self.stacks = [_stack(members) for members in found.values()]
        if scale == "auto":
            for stack in self.stacks:
                rows = stack.rows()
                gram = rows @ rows.mT
                for _ in range(WARM_UP):
                    stack.largest(gram)

    def select(self, redundant: Tensor) -> None:
        """Which units go, bool (units,). A row goes with any of its units."""
        gone = torch.cat([redundant, redundant.new_zeros(1)])
        for stack in self.stacks:
            stack.kept.copy_(~gone[stack.unit].any(-1))

    @torch.no_grad()
    def gradients(self) -> list[tuple[Tensor, Tensor]]:
        """(weight, gradient of the penalty): a weight comes up once per axis that has units."""
        found = []
        for stack in self.stacks:
            rows = stack.rows()
            gram, factor = self._masked(stack, rows)
            gradient = torch.bmm(gram, rows).mul_(2 * factor)
            for tensor, layout, one in zip(stack.tensors, stack.layouts, gradient.split(stack.form[0]), strict=True):
                found.append((tensor, layout.back(one, tensor.shape)))
        return found

    @torch.no_grad()
    def value(self) -> Tensor:
        """The penalty, a scalar on the device."""
        total = torch.zeros((), device=self.stacks[0].kept.device if self.stacks else None)
        for stack in self.stacks:
            gram, factor = self._masked(stack, stack.rows(), advance=False)
            total = total + (gram.square() * (factor / 2)).sum()
        return total

    def _masked(self, stack: _Stack, rows: Tensor, *, advance: bool = True) -> tuple[Tensor, Tensor | float]:
        """Gram matrices without what stays, and the factor of the penalty."""
        gram = torch.bmm(rows, rows.mT)
        if self.scale == "auto":
            largest = stack.largest(gram, advance=advance)
            factor: Tensor | float = torch.where(largest > 0, self.rho / largest, 0.0)
        else:
            factor = 1.0 if self.scale == "paper" else 2000.0 / (stack.form[0] * stack.form[1]) ** 2
        return gram.mul_(1 - stack.kept[:, :, None] * stack.kept[:, None, :]), factor

    def state_dict(self) -> dict[str, Tensor]:
        return {f"vector.{k}": stack.vector for k, stack in enumerate(self.stacks)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for k, stack in enumerate(self.stacks):
            stack.vector.copy_(state[f"vector.{k}"])


def _row_axes(tensor: Tensor, parts: Sequence[Part], grouping: Grouping | None) -> list[int]:
    """The axes whose indices are rows of a Gram matrix: those with units, of weights that are learnt."""
    if not tensor.requires_grad or tensor.ndim < 2 or not parts:
        return []
    if grouping is not None:
        rows = grouping.rows
        per_group = tensor.shape[1] if rows == 0 else tensor.shape[0] // grouping.groups
        axes = [rows] if per_group > 1 else []
    else:
        axes = list(dict.fromkeys(p.axis for p in parts))
    forms = {axis: _Layout.of(tensor.shape, axis, grouping).form for axis in axes}
    return [axis for axis, (_, rows, columns) in forms.items() if rows > 1 and columns > 1]


def _stack(members: Sequence[tuple[Tensor, _Layout, np.ndarray]]) -> _Stack:
    tensors, layouts, units = (list(x) for x in zip(*members, strict=True))
    first, form = tensors[0], layouts[0].form
    unit = torch.from_numpy(np.concatenate(units).astype(np.int64)).to(first.device)
    count = len(tensors) * form[0]
    kept = torch.ones(count, form[1], dtype=first.dtype, device=first.device)
    start = torch.randn(form[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vector = (start / start.norm()).to(first).expand(count, -1).clone()
    return _Stack(form, tensors, layouts, unit, kept, vector)
