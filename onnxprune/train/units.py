"""All zero-invariant groups of a network in one table: norms, inner products and scalings of every unit at once.

A *part* says which unit each index of a tensor's axis belongs to. The table moves the tensors' storage into a few
*banks*, in which what has the same form lies side by side, so that a reduction over all units' slices is one kernel
per bank, whatever the number of units and of tensors:

    tensors --bank--> rows (the slices of one tensor) --pairs--> units (rows of all tensors that live or die together)

A row belongs to no unit (it is frozen), to one, or, where two axes of a tensor are free, to one of each family; units
that share rows are no special case. Nothing here waits for the device, and every sum has a fixed order.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from math import prod
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Part", "UnitTable"]


CHUNK = 1 << 17  # numbers of a product that is summed at once on a CPU: it stays in the cache


class Part(NamedTuple):
    """One axis of a tensor. units: per index of the axis, the unit of `family` that it belongs to, or -1."""

    family: str
    axis: int
    units: np.ndarray


Parts = Sequence[Part]


@dataclass(frozen=True, slots=True)
class _Form:
    """How a tensor lies in memory: its axes in the order of their strides, neighbours of one kind merged.

    order: the permutation that makes it contiguous. sizes, free: per merged axis its length, and whether its indices
    are rows (several free axes: one row per combination) or summed over.
    """

    order: tuple[int, ...]
    sizes: tuple[int, ...]
    free: tuple[bool, ...]

    @classmethod
    def of(cls, tensor: Tensor, axes: frozenset[int]) -> _Form:
        strides = tensor.stride()
        order = tuple(sorted(range(tensor.ndim), key=lambda k: (-strides[k], k)))
        if not tensor.permute(order).is_contiguous():
            order = tuple(range(tensor.ndim))
        sizes, free = [], []
        for inside, axes_of_kind in groupby(order, key=lambda k: k in axes):
            sizes.append(prod(tensor.shape[k] for k in axes_of_kind))
            free.append(inside)
        return cls(order, tuple(sizes), tuple(free))

    @property
    def key(self) -> tuple[object, ...]:
        """What has the same key goes into one bank. Rows in front of what is summed stack whatever their number."""
        if self.free in ((True,), (True, False)):
            return ("rows", *(self.sizes[1:] or (1,)))
        return (self.sizes, self.free)


class _Bank:
    """Tensors of one form, as one tensor. shape: (all rows, length) or (tensors, *merged sizes); over: the axes that
    are summed; broadcast: the shape of a number per row."""

    def __init__(self, forms: Sequence[_Form], like: Tensor) -> None:
        form = forms[0]
        self.dtype = like.dtype
        if form.free in ((True,), (True, False)):
            self.shape: tuple[int, ...] = (sum(f.sizes[0] for f in forms), prod(form.sizes[1:]))
            self.over: tuple[int, ...] = (1,)
        else:
            self.shape = (len(forms), *form.sizes)
            self.over = tuple(k for k, free in enumerate(form.free, start=1) if not free)
        self.broadcast = tuple(1 if k in self.over else n for k, n in enumerate(self.shape))
        self.rows = prod(self.broadcast)
        rows_last = like.device.type == "cpu" and self.over == (len(self.shape) - 1,) and self.rows > 0
        self.diagonal = _diagonal(self.rows, _accumulated(self.dtype)) if rows_last else None

    def dot(self, x: Tensor, y: Tensor) -> Tensor:
        """Inner products of the rows, (rows,), in float32 at least."""
        x, y = _wide(x), _wide(y)
        if not self.over or self.shape[1:] == (1,):
            return (x * y).reshape(-1)
        if not torch.compiler.is_compiling() and self.diagonal is not None:
            x, y = x.view(self.rows, -1), y.view(self.rows, -1)
            return torch.sparse.sampled_addmm(self.diagonal, x, y.T, beta=0.0).values()
        if x.device.type != "cpu" or x.numel() <= CHUNK:
            return (x * y).sum(self.over).reshape(-1)
        axis = self.over[0]
        count = max(1, CHUNK * x.shape[axis] // x.numel())
        pieces = zip(x.split(count, axis), y.split(count, axis), strict=True)
        return torch.stack([(p * q).sum(self.over) for p, q in pieces]).sum(0).reshape(-1)

    def norm(self, x: Tensor) -> Tensor:
        """Norms of the rows, in the same way."""
        if not self.over or self.shape[1:] == (1,):
            return _wide(x).abs().reshape(-1)
        return torch.linalg.vector_norm(x, dim=self.over, dtype=_accumulated(x.dtype)).reshape(-1)


def _diagonal(rows: int, dtype: torch.dtype) -> Tensor:
    """The pattern of x y^T of which the diagonal alone is wanted: inner products in one pass over both, without a
    product in memory. On a CPU; elsewhere temporary memory costs nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that sparse tensors are in beta
        return torch.sparse_csr_tensor(torch.arange(rows + 1), torch.arange(rows), torch.zeros(rows, dtype=dtype))


def _accumulated(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _wide(x: Tensor) -> Tensor:
    return x.to(_accumulated(x.dtype))


class Storage(NamedTuple):
    """Numbers laid out as the table's tensors are: banks, and a view per tensor, in the tensors' order and shapes."""

    banks: list[Tensor]
    views: list[Tensor]


class UnitTable:
    """The units of some tensors.

    tensors: floating point, and dense; their storage is exchanged, their values stay. Move a module to its device and
    memory format first. parts: per tensor, its free axes. sizes: units per family, where no part names the last ones.

    Units are numbered through, family after family in the order in which they come up: `slices[family]` are a
    family's. counts: numbers per unit. x: the tensors' values. "Per unit" is a tensor (units,) on the tensors' device,
    of `dtype`: float32, or float64 where a tensor is.
    """

    def __init__(
        self, tensors: Sequence[Tensor], parts: Sequence[Sequence[Part]], *, sizes: Mapping[str, int] | None = None
    ) -> None:
        _check(tensors, parts)
        chosen = [k for k, own in enumerate(parts) if any((p.units >= 0).any() for p in own)]
        self.tensors = [tensors[k] for k in chosen]
        self.parts = [tuple(parts[k]) for k in chosen]
        self.slices = _numbered(self.parts, sizes or {})
        self.units = max((s.stop for s in self.slices.values()), default=0)
        self.device = self.tensors[0].device if self.tensors else torch.device("cpu")
        self.dtype = torch.float32
        for tensor in self.tensors:
            self.dtype = torch.promote_types(self.dtype, tensor.dtype)
        self._forms = [
            _Form.of(t, frozenset(p.axis for p in own)) for t, own in zip(self.tensors, self.parts, strict=True)
        ]
        together: dict[tuple[object, ...], list[int]] = {}
        for k, (tensor, form) in enumerate(zip(self.tensors, self._forms, strict=True)):
            together.setdefault((tensor.dtype, *form.key), []).append(k)
        self._members = list(together.values())
        self._banks = [_Bank([self._forms[k] for k in ks], self.tensors[ks[0]].detach()) for ks in self._members]
        self.rows = sum(bank.rows for bank in self._banks)
        self._pair()
        self.x = self.storage()
        for tensor, view in zip(self.tensors, self.x.views, strict=True):
            view.copy_(tensor.detach())
            tensor.data = view
        lengths = [prod(bank.shape[k] for k in bank.over) for bank in self._banks]
        per_row = [
            torch.full((b.rows,), float(n), device=self.device) for b, n in zip(self._banks, lengths, strict=True)
        ]
        self.counts = self.sums(per_row)

    # layout

    def storage(self) -> Storage:
        """Zeros, laid out as the tensors are."""
        banks = [torch.zeros(bank.shape, dtype=bank.dtype, device=self.device) for bank in self._banks]
        views: dict[int, Tensor] = {}
        for ks, whole in zip(self._members, banks, strict=True):
            pieces = whole.view(-1).split([self.tensors[k].numel() for k in ks])
            for k, piece in zip(ks, pieces, strict=True):
                order = self._forms[k].order
                laid = piece.view([self.tensors[k].shape[a] for a in order])
                views[k] = laid.permute([order.index(a) for a in range(len(order))])
        return Storage(banks, [views[k] for k in range(len(views))])

    def rebind(self) -> None:
        """Take up tensors whose storage was exchanged since (`module.to`, `p.data = ...`) with the values they have."""
        for tensor, view in zip(self.tensors, self.x.views, strict=True):
            if tensor.data_ptr() != view.data_ptr():
                view.copy_(tensor.detach())
                tensor.data = view

    def _pair(self) -> None:
        """Which rows are which units'."""
        rows: list[np.ndarray] = []
        units: list[np.ndarray] = []
        tensor_of_row: list[int] = []
        for k in (k for ks in self._members for k in ks):
            order = [a for a in self._forms[k].order if a in {p.axis for p in self.parts[k]}]
            shape = [self.tensors[k].shape[a] for a in order]
            begin = len(tensor_of_row)
            tensor_of_row += [k] * prod(shape)
            for part in self.parts[k]:
                laid = [-1 if a == part.axis else 1 for a in order]
                own = np.broadcast_to(part.units.reshape(laid), shape).reshape(-1)
                rows.append(begin + np.flatnonzero(own >= 0))
                units.append(own[own >= 0] + self.slices[part.family].start)
        self._tensor_of_row = self._index(np.array(tensor_of_row))
        pairs = np.stack([np.concatenate([*r, np.zeros(0, np.int64)]) for r in (rows, units)])
        pairs = np.unique(pairs, axis=1)
        per_row = np.bincount(pairs[0], minlength=self.rows)
        self.overlap = bool((per_row > 1).any())
        self._pairs_per_row, self._unit_of_pair = self._index(per_row), self._index(pairs[1])
        unit_of_row = np.full(self.rows, self.units)  # of a frozen row: the one behind the last
        unit_of_row[pairs[0]] = pairs[1]
        self._unit_of_row = self._index(unit_of_row)
        by_unit = np.lexsort(pairs)
        self._row_of_pair = self._index(pairs[0][by_unit])
        self._pairs_per_unit = self._index(np.bincount(pairs[1], minlength=self.units))

    def _index(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, np.int64)).to(self.device)

    # reductions

    def dot(self, a: Sequence[Tensor], b: Sequence[Tensor], *, weights: Tensor | None = None) -> Tensor:
        """Inner products of the units' slices in two storages' banks, per unit. weights: per row (`rows_of`)."""
        return self.sums([bank.dot(x, y) for bank, x, y in zip(self._banks, a, b, strict=True)], weights=weights)

    def square(self, a: Sequence[Tensor], *, weights: Tensor | None = None) -> Tensor:
        """Squared norms of the units' slices, per unit. weights: per row, of the squares."""
        norms = [bank.norm(x) for bank, x in zip(self._banks, a, strict=True)]
        return self._sums_of(self._joined(norms).square(), weights)

    def sums(self, rows: Sequence[Tensor], *, weights: Tensor | None = None) -> Tensor:
        """Sums over every unit's rows, per unit. rows: per bank, (its rows,). weights: per row of all banks."""
        return self._sums_of(self._joined(rows), weights)

    def _joined(self, rows: Sequence[Tensor]) -> Tensor:
        if not rows:
            return torch.zeros(0, dtype=self.dtype, device=self.device)
        return torch.cat([r.to(self.dtype) for r in rows])

    def _sums_of(self, values: Tensor, weights: Tensor | None) -> Tensor:
        if weights is not None:
            values = values * weights
        return torch.segment_reduce(values[self._row_of_pair], "sum", lengths=self._pairs_per_unit, unsafe=True)

    # changes

    def rows_of(self, per_tensor: Tensor) -> Tensor:
        """A number per tensor as one per row of all banks."""
        return per_tensor.to(self.device, self.dtype)[self._tensor_of_row]

    def by_bank(self, rows: Tensor) -> list[Tensor]:
        """Numbers per row of all banks, in the shape that multiplies each bank, and in its dtype."""
        pieces = rows.split([bank.rows for bank in self._banks])
        return [p.to(b.dtype).view(b.broadcast) for b, p in zip(self._banks, pieces, strict=True)]

    def spread_rows(self, per_unit: Tensor, *, combine: Literal["sum", "prod"]) -> Tensor:
        """A number per unit as one per row of all banks. combine: what a row of several units gets; a frozen row gets 0
        from 'sum', 1 from 'prod'."""
        if self.overlap:
            return torch.segment_reduce(per_unit[self._unit_of_pair], combine, lengths=self._pairs_per_row, unsafe=True)
        neutral = per_unit.new_full((1,), 1.0 if combine == "prod" else 0.0)
        return torch.cat([per_unit, neutral])[self._unit_of_row]

    def spread(self, per_unit: Tensor, *, combine: Literal["sum", "prod"]) -> list[Tensor]:
        """The same, in the shape that multiplies each bank."""
        return self.by_bank(self.spread_rows(per_unit, combine=combine))

    def scale_(self, factor: Tensor) -> None:
        """Multiply every unit's slices by its factor; of rows of several units, by all of theirs."""
        for x, f in zip(self.x.banks, self.spread(factor, combine="prod"), strict=True):
            x.mul_(f)

    def keep_(self, alive: Tensor) -> None:
        """Set the slices of units that are not alive (bool, per unit) to zero, whatever they hold."""
        for x, f in zip(self.x.banks, self.spread(alive.float(), combine="prod"), strict=True):
            x.masked_fill_(f == 0, 0.0)

    # families

    def by_family(self, per_unit: Tensor) -> dict[str, np.ndarray]:
        """A tensor per unit as arrays per family. Waits for the device."""
        array = per_unit.detach().cpu().numpy()
        return {family: array[where] for family, where in self.slices.items()}

    def from_families(self, values: Mapping[str, np.ndarray], *, missing: float = 0.0) -> Tensor:
        """Arrays per family as a float32 tensor per unit."""
        found = np.full(self.units, missing, np.float32)
        for family, array in values.items():
            found[self.slices[family]] = array
        return torch.from_numpy(found).to(self.device)

    @property
    def family_of(self) -> Tensor:
        """Per unit, the number of its family."""
        return self._index(np.repeat(np.arange(len(self.slices)), [s.stop - s.start for s in self.slices.values()]))


def _check(tensors: Sequence[Tensor], parts: Sequence[Sequence[Part]]) -> None:
    if len(tensors) != len(parts):
        raise ValueError(f"{len(tensors)} tensors, and parts of {len(parts)}")
    for tensor, own in zip(tensors, parts, strict=True):
        for part in own:
            if np.shape(part.units) != (tensor.shape[part.axis],):
                raise ValueError(
                    f"axis {part.axis} of a tensor {tuple(tensor.shape)} has {tensor.shape[part.axis]} indices, "
                    f"its part in '{part.family}' is {np.shape(part.units)}"
                )


def _numbered(parts: Sequence[Sequence[Part]], sizes: Mapping[str, int]) -> dict[str, slice]:
    count = dict(sizes)
    for part in (p for own in parts for p in own):
        count[part.family] = max(count.get(part.family, 0), int(part.units.max(initial=-1)) + 1)
    ends = list(accumulate(count.values(), initial=0))
    return {family: slice(a, b) for family, a, b in zip(count, ends, ends[1:], strict=False)}
