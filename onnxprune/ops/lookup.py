"""Operators that read and write by index, or run over an axis: Gather, Scatter, TopK, CumSum and their relatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from onnxprune.axes.expr import Expr, is_frozen
from onnxprune.ops.layout import carried
from onnxprune.ops.lazy import F, kernels, torch
from onnxprune.ops.registry import Operator
from onnxprune.ops.rules import AxisContext, GiveUp, MirrorContext, NodeView, PatchContext

__all__ = ["OPERATORS"]

_run = kernels("lookup")

LONGEST_GATHER = 512  # runs of indices that an axis is cut into at most; more are positions, not channels


def gather_axes(c: AxisContext) -> None:
    data, index = c.axes(0), c.axes(1)
    axis = int(c.attr("axis", 0)) % len(data)
    picked = gathered(c, data[axis], index)
    c.output(*data[:axis], *picked, *data[axis + 1 :])


def gathered(c: AxisContext, expr: Expr, index: Sequence[Expr]) -> Sequence[Expr]:
    """The axes that take the place of a gathered one: the pieces that constant indices cut out of it."""
    value = c.value(1)
    if c.shape_only and not index and value is not None:
        return ()
    if value is None or is_frozen(expr) or expr.size < 0 or value.size == 0:
        c.freeze("it is looked up by index", expr)
        return index
    flat = np.asarray(value).reshape(-1).astype(np.int64) % expr.size
    runs = runs_of(flat)
    if len(index) > 1 or len(runs) > LONGEST_GATHER:
        looked_up(c, expr, runs_of(np.unique(flat)))
        return index
    picked = picked_pieces(c, expr, runs)
    if not index:
        c.freeze("one index is picked out of it", picked[0])
        return ()
    return (c.sum(*picked),)


def runs_of(indices: np.ndarray) -> list[tuple[int, int]]:
    """Stretches of consecutive indices as (first, past the last)."""
    starts = np.flatnonzero(np.diff(indices, prepend=indices[0] - 2) != 1)
    ends = np.append(starts[1:], len(indices)) - 1
    return [(int(indices[a]), int(indices[b]) + 1) for a, b in zip(starts, ends, strict=True)]


def picked_pieces(c: AxisContext, expr: Expr, runs: Sequence[tuple[int, int]]) -> list[Expr]:
    """The parts of an axis that are at these positions; it is cut where one of them starts or ends."""
    bounds = sorted({0, expr.size, *(b for run in runs for b in run)})
    pieces = dict(zip(bounds, c.cut(expr, np.diff(bounds).tolist()), strict=False))
    return [c.sum(*(pieces[b] for b in bounds if low <= b < high)) for low, high in runs]


def looked_up(c: AxisContext, expr: Expr, read: Sequence[tuple[int, int]]) -> None:
    """A table of which these rows are read, in whatever order; nothing becomes of the others (positions beyond a
    fixed length)."""
    rows = picked_pieces(c, expr, read) if len(read) <= LONGEST_GATHER else [expr]
    c.freeze("it is looked up by index", *rows)


def patch_gather(p: PatchContext) -> None:
    axis = int(p.attr("axis", 0)) % len(p.before(0))
    kept, value = p.kept(0, axis), p.value(1)
    if kept is None or value is None:
        return
    n = p.before(0)[axis]
    place = np.full(n, -1, np.int64)
    place[kept] = np.arange(len(kept))
    moved = place[np.asarray(value).astype(np.int64) % n]
    if moved.ndim > 1:
        for k in range(moved.ndim):
            along = p.kept(1, k)
            moved = moved if along is None else np.take(moved, along, k)
    else:
        moved = moved[moved >= 0] if moved.ndim else np.maximum(moved, 0)
    p.want(1, moved.astype(value.dtype))


def gather_elements_axes(c: AxisContext) -> None:
    data, index = c.axes(0), c.axes(1)
    axis = int(c.attr("axis", 0)) % len(data)
    c.freeze("it is looked up by index", data[axis], index[axis])
    for k, (a, b) in enumerate(zip(data, index, strict=True)):
        if k != axis:
            c.equal(a, b) if a.size == b.size else c.freeze("it is looked up by index", a, b)
    c.output(*index)


def gather_nd_axes(c: AxisContext) -> None:
    data, index = c.axes(0), c.axes(1)
    batch, depth = int(c.attr("batch_dims", 0)), index[-1].size
    if depth < 0:
        raise GiveUp("the depth of the indices is unknown")
    for a, b in zip(data[:batch], index[:batch], strict=True):
        c.equal(a, b)
    c.freeze("it is looked up by index", *data[batch : batch + depth], index[-1])
    c.output(*index[:-1], *data[batch + depth :])


def scatter_nd_axes(c: AxisContext) -> None:
    data, index, updates = c.axes(0), c.axes(1), c.axes(2)
    depth = index[-1].size
    if depth < 0:
        raise GiveUp("the depth of the indices is unknown")
    c.freeze("it is written by index", *data[:depth], *index, *updates[: len(index) - 1])
    for a, b in zip(data[depth:], updates[len(index) - 1 :], strict=True):
        c.equal(a, b)
    c.output(*data)


def scatter_elements_axes(c: AxisContext) -> None:
    data, index, updates = c.axes(0), c.axes(1), c.axes(2)
    axis = int(c.attr("axis", 0)) % len(data)
    for k, (a, b, u) in enumerate(zip(data, index, updates, strict=True)):
        if k != axis and a.size == b.size:
            c.equal(a, b, u)
        else:
            c.freeze("it is written by index", a, b, u)
    c.output(*data)


def scattered_dead(node: NodeView, states: Sequence[float | None]) -> float | None:
    return 0.0 if states[0] == 0 and states[2] == 0 else None


def along(name: str, reason: str, default: int | None = None, dead: Any = carried) -> Operator:
    """An operator that keeps its first input's axes and must keep one of them whole."""

    def axes(c: AxisContext) -> None:
        x = c.axes(0)
        given = c.attr("axis", default)
        given = c.known(1, "the axis") if given is None else given
        c.freeze(reason, x[int(np.asarray(given).reshape(-1)[0]) % len(x)])
        for j in range(len(c.node.outputs)):
            c.output(*x, j=j)

    return Operator(name, axes, dead)


def top_k_axes(c: AxisContext) -> None:
    x = c.axes(0)
    axis = int(c.attr("axis", -1)) % len(x)
    c.freeze("a TopK runs over it", x[axis])
    for j in range(len(c.node.outputs)):
        c.output(*x[:axis], c.frozen(c.output_shape(j)[axis]), *x[axis + 1 :], j=j)


def trilu_axes(c: AxisContext) -> None:
    c.freeze("a Trilu runs over it", *c.axes(0)[-2:])
    c.output(*c.axes(0))


def reverse_sequence_axes(c: AxisContext) -> None:
    x = c.axes(0)
    c.freeze("a ReverseSequence runs over it", *x[:2])
    c.output(*x)


def zero_carried(node: NodeView, states: Sequence[float | None]) -> float | None:
    return 0.0 if states[0] == 0 else None


def _gather(n: NodeView, x: Any, index: Any) -> Any:
    return np.take(x, np.asarray(index).astype(np.int64), axis=int(n.attributes.get("axis", 0)))


def _gather_nd(n: NodeView, x: Any, index: Any) -> Any:
    if n.attributes.get("batch_dims", 0):
        raise ValueError("batch dimensions")
    return x[tuple(np.moveaxis(np.asarray(index).astype(np.int64), -1, 0))]


def _scatter_nd(n: NodeView, x: Any, index: Any, updates: Any) -> Any:
    if n.attributes.get("reduction", "none") != "none":
        raise ValueError("reduction")
    out = np.array(x)
    out[tuple(np.moveaxis(np.asarray(index).astype(np.int64), -1, 0))] = updates
    return out


def _cumsum(n: NodeView, x: Any, axis: Any) -> Any:
    if n.attributes.get("exclusive", 0) or n.attributes.get("reverse", 0):
        raise ValueError("form of CumSum")
    return np.cumsum(x, int(np.asarray(axis).reshape(-1)[0]), dtype=x.dtype)


def _trilu(n: NodeView, x: Any, k: Any = 0) -> Any:
    k = int(np.asarray(k).reshape(-1)[0]) if np.size(k) else 0
    return np.triu(x, k) if n.attributes.get("upper", 1) else np.tril(x, k)


def gather_mirror(m: MirrorContext) -> Any:
    """One constant index is a selection, consecutive ones a stretch, and rows of a matrix an embedding."""
    x, axis, index = m.tensor(0), int(m.attr("axis", 0)), m.constant(1)
    if index is not None and index.ndim == 0:
        return x.select(axis, int(index))
    if (
        index is not None
        and index.ndim == 1
        and index.size
        and np.all(np.diff(index) == 1)
        and index[0] * index[-1] >= 0
    ):
        return x.narrow(axis, int(index[0]), index.size)
    if index is None and m.rank(1) == 0 and isinstance(m.ints(1), list):  # a place that is computed from sizes
        return x.select(axis, m.ints(1)[0])
    if m.rank(0) == 2 and axis in (0, -2):
        if index is not None and (index >= 0).all() and m.dtype(1) in (torch.int32, torch.int64):
            return F.embedding(m.tensor(1), x)
        return m.call(_run.embedding, m.tensor(1), x)
    return m.call(_run.gather, x, m.tensor(1), axis)


def gather_elements_mirror(m: MirrorContext) -> Any:
    return m.call(_run.gather_elements, m.tensor(0), m.tensor(1), int(m.attr("axis", 0)))


def gather_nd_mirror(m: MirrorContext) -> Any:
    return m.call(_run.gather_nd, m.tensor(0), m.tensor(1), int(m.attr("batch_dims", 0)))


def scatter_elements_mirror(m: MirrorContext) -> Any:
    axis, reduction = int(m.attr("axis", 0)), m.attr("reduction", "none")
    return m.call(_run.scatter_elements, m.tensor(0), m.tensor(1), m.tensor(2), axis, reduction)


def scatter_nd_mirror(m: MirrorContext) -> Any:
    return m.call(_run.scatter_nd, m.tensor(0), m.tensor(1), m.tensor(2), m.attr("reduction", "none"))


def compress_mirror(m: MirrorContext) -> Any:
    x, axis, condition = m.tensor(0), m.attr("axis"), m.constant(1)
    if condition is None:
        return m.call(_run.compress, x, m.tensor(1), axis)
    kept = m.buffer(np.flatnonzero(condition).astype(np.int64))
    return x.reshape(-1)[kept] if axis is None else x.index_select(int(axis), kept)


def tensor_scatter_mirror(m: MirrorContext) -> Any:
    axis, mode = int(m.attr("axis", -2)), m.attr("mode", "linear")
    return m.call(_run.tensor_scatter, m.tensor(0), m.tensor(1), m.optional(2), axis, mode)


def reverse_sequence_mirror(m: MirrorContext) -> Any:
    batch, time = int(m.attr("batch_axis", 1)), int(m.attr("time_axis", 0))
    return m.call(_run.reverse_sequence, m.tensor(0), m.tensor(1), batch, time)


def cumulative_mirror(name: str) -> Any:
    """Running sums and products."""

    def mirror(m: MirrorContext) -> Any:
        x, axis = m.tensor(0), m.ints(1)[0]
        exclusive, reverse = int(m.attr("exclusive", 0)), int(m.attr("reverse", 0))
        dtype = m.dtype(0)
        if exclusive or reverse or dtype is None or not dtype.is_floating_point:
            return m.call(getattr(_run, name), x, axis, exclusive, reverse)
        return getattr(torch, name)(x, axis)

    return mirror


def top_k_mirror(m: MirrorContext) -> Any:
    k = m.attr("k") if m.node.opset < 10 else m.ints(1)[0]
    found = m.call(_run.top_k, m.tensor(0), k, int(m.attr("axis", -1)), int(m.attr("largest", 1)))
    return found[0], found[1]


def trilu_mirror(m: MirrorContext) -> Any:
    function = torch.triu if m.attr("upper", 1) else torch.tril
    return function(m.tensor(0), m.ints(1)[0] if m.has(1) else 0)


OPERATORS = (
    Operator(
        "Gather",
        gather_axes,
        carried,
        patch=patch_gather,
        evaluate=_gather,
        indices=((1, 0),),
        mirror=gather_mirror,
        carries=True,
    ),
    Operator(
        "GatherElements",
        gather_elements_axes,
        zero_carried,
        indices=((1, 0),),
        evaluate=lambda n, x, i: np.take_along_axis(x, np.asarray(i), int(n.attributes.get("axis", 0))),
        mirror=gather_elements_mirror,
        carries=True,
    ),
    Operator(
        "GatherND",
        gather_nd_axes,
        carried,
        evaluate=_gather_nd,
        indices=((1, 0),),
        mirror=gather_nd_mirror,
        carries=True,
    ),
    Operator(
        "ScatterND",
        scatter_nd_axes,
        scattered_dead,
        evaluate=_scatter_nd,
        mirror=scatter_nd_mirror,
        carries=True,
    ),
    Operator("ScatterElements", scatter_elements_axes, scattered_dead, mirror=scatter_elements_mirror, carries=True),
    Operator("Scatter", scatter_elements_axes, scattered_dead, mirror=scatter_elements_mirror, carries=True),
    Operator(
        "CumSum",
        along("CumSum", "a CumSum runs over it").axes,
        zero_carried,
        evaluate=_cumsum,
        mirror=cumulative_mirror("cumsum"),
    ),
    Operator("TopK", top_k_axes, zero_carried, discrete=True, mirror=top_k_mirror, carries=True),
    Operator("Trilu", trilu_axes, zero_carried, evaluate=_trilu, mirror=trilu_mirror, carries=True),
    Operator("ReverseSequence", reverse_sequence_axes, carried, mirror=reverse_sequence_mirror, carries=True),
    Operator("Compress", mirror=compress_mirror, carries=True),
    Operator("CumProd", mirror=cumulative_mirror("cumprod")),
    Operator("TensorScatter", mirror=tensor_scatter_mirror, carries=True),
)
