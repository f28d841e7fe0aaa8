"""Operators that put axes together and take them apart: Concat, Split, Slice and Pad."""

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

_run = kernels("pieces")

FARTHEST = 2**31 - 1  # a bound of a Slice from here on stands for the end of the axis


def concat_axes(c: AxisContext) -> None:
    count = len(c.node.inputs)
    parts = [c.axes(i) for i in range(count)]
    rank = len(parts[0])
    axis = int(c.attr("axis", 1 if c.node.opset < 4 else 0)) % rank
    for k in range(rank):
        if k != axis:
            c.equal(*(p[k] for p in parts))
    joined = c.sum(*(p[axis] for p in parts)) if all(p[axis].size >= 0 for p in parts) else None
    if joined is None:
        c.freeze("its size is unknown where it is concatenated", *(p[axis] for p in parts))
        joined = c.frozen(c.output_shape()[axis])
    c.output(*parts[0][:axis], joined, *parts[0][axis + 1 :])


def joined_dead(node: NodeView, states: Sequence[float | None]) -> float | None:
    """Inputs that carry the unit have the same value; those that don't are nan here."""
    carriers = {s for s in states if s is None or s == s}
    return carriers.pop() if len(carriers) == 1 else None


def split_sizes(c: AxisContext | PatchContext, total: int) -> list[int]:
    given = c.attr("split") if c.node.opset < 13 else (c.value(1) if c.has(1) else None)
    if given is None and c.node.opset >= 13 and c.has(1):
        raise GiveUp("the sizes of a Split are computed from the data")
    if given is not None:
        return [int(n) for n in np.asarray(given).reshape(-1)]
    count = len(c.node.outputs)
    each = -(-total // count)
    return [min(each, total - each * k) for k in range(count)]


def split_axes(c: AxisContext) -> None:
    x = c.axes(0)
    axis = int(c.attr("axis", 0)) % len(x)
    sizes = split_sizes(c, x[axis].size)
    for j, part in enumerate(c.cut(x[axis], sizes)):
        c.output(*x[:axis], part, *x[axis + 1 :], j=j)


def patch_split(p: PatchContext) -> None:
    axis = int(p.attr("axis", 0)) % len(p.before(0))
    if p.before(0)[axis] == p.after(0)[axis]:
        return
    sizes = np.array([p.after_out(j)[axis] for j in range(len(p.node.outputs))], np.int64)
    if p.node.opset < 13:
        p.set_attr("split", sizes.tolist())
    elif p.has(1):
        p.want(1, sizes)
    elif len(set(sizes.tolist())) > 1:
        p.set_attr("num_outputs", None)
        p.add_input(1, sizes)


def slice_bounds(c: AxisContext | PatchContext, rank: int) -> list[tuple[int, int, int, int, int]]:
    """(position in the lists, axis, start, end, step), as written."""
    if c.node.opset < 10:
        starts, ends, axes, steps = c.attr("starts"), c.attr("ends"), c.attr("axes"), None
    else:
        starts, ends = c.value(1), c.value(2)
        axes = c.value(3) if c.has(3) else None
        steps = c.value(4) if c.has(4) else None
        if starts is None or ends is None or (c.has(3) and axes is None) or (c.has(4) and steps is None):
            raise GiveUp("the bounds of a Slice are computed from the data")
    starts, ends = np.asarray(starts).reshape(-1), np.asarray(ends).reshape(-1)
    along = list(range(len(starts))) if axes is None else np.asarray(axes).reshape(-1).tolist()
    strides = [1] * len(starts) if steps is None else np.asarray(steps).reshape(-1).tolist()
    return [
        (k, int(a) % rank, int(s), int(e), int(t))
        for k, (a, s, e, t) in enumerate(zip(along, starts, ends, strides, strict=True))
    ]


def slice_axes(c: AxisContext) -> None:
    try:
        bounds = slice_bounds(c, c.rank(0))
    except GiveUp as reason:
        sliced_somewhere(c, str(reason))
        return
    out = list(c.axes(0))
    for _, axis, start, end, step in bounds:
        out[axis] = sliced(c, out[axis], start, end, step)
    c.output(*out)


def sliced_somewhere(c: AxisContext, reason: str) -> None:
    """Bounds unknown: the axes that keep their size may still be cut anywhere, so only listed axes are frozen."""
    x = c.axes(0)
    axes = c.value(3) if c.has(3) else None
    touched = range(len(x)) if axes is None else [int(a) % len(x) for a in np.asarray(axes).reshape(-1)]
    c.freeze(reason, *(x[k] for k in touched))
    sizes = c.output_shape()
    c.output(*(c.frozen(sizes[k]) if k in touched else e for k, e in enumerate(x)))


def sliced(c: AxisContext, expr: Expr, start: int, end: int, step: int) -> Expr:
    n = expr.size
    if n < 0:
        return c.frozen(None)
    if step < 0:
        c.freeze("a Slice runs over it backwards", expr)
        return c.frozen(len(range(n)[start : end if end >= -n else None : step]))
    low, high, _ = slice(start, end).indices(n)
    high = max(low, high)
    if step == 1:
        return c.cut(expr, [low, high - low, n - high])[1]
    count = len(range(low, high, step))
    if n % step or low >= step or count != n // step or is_frozen(expr):
        c.freeze("a strided Slice that isn't a whole factor", expr)
        return c.frozen(count)
    outer, inner = c.split(expr, n // step)
    c.freeze("the stride of a Slice", inner)
    return outer


def patch_slice(p: PatchContext) -> None:
    """Bounds are moved to the same units; an end beyond the axis (the largest integer) stays beyond it."""
    try:
        bounds = slice_bounds(p, len(p.before(0)))
    except GiveUp:
        return
    starts, ends = [b[2] for b in bounds], [b[3] for b in bounds]
    for k, axis, start, end, step in bounds:
        kept = p.kept(0, axis)
        if kept is None or step < 0:
            continue
        n = p.before(0)[axis]
        low, high, _ = slice(start, end).indices(n)
        starts[k] = low if step > 1 else int(np.searchsorted(kept, low))
        if -n <= end <= n:
            ends[k] = int(np.searchsorted(kept, max(low, high)))
    if p.node.opset < 10:
        p.set_attr("starts", starts)
        p.set_attr("ends", ends)
    else:
        p.want(1, np.array(starts, np.int64))
        p.want(2, np.array(ends, np.int64))


def pad_amounts(c: AxisContext | PatchContext, rank: int) -> list[tuple[int, int]]:
    pads = c.attr("pads") if c.node.opset < 11 else c.value(1)
    if pads is None:
        raise GiveUp("the amounts of a Pad are computed from the data")
    pads = [int(n) for n in np.asarray(pads).reshape(-1)]
    axes = list(range(rank))
    if c.has(3):
        given = c.value(3)
        if given is None:
            raise GiveUp("the axes of a Pad are computed from the data")
        axes = [int(a) % rank for a in np.asarray(given).reshape(-1)]
    amounts = [(0, 0)] * rank
    for k, axis in enumerate(axes):
        amounts[axis] = (pads[k], pads[k + len(axes)])
    return amounts


def pad_axes(c: AxisContext) -> None:
    """The padding of an axis is a part of its own, and may be pruned like one (option-A shortcuts)."""
    x, sizes = c.axes(0), c.output_shape()
    try:
        amounts = pad_amounts(c, len(x))
    except GiveUp:
        amounts = [(0, 0) if e.size == n else (-1, -1) for e, n in zip(x, sizes, strict=True)]
    out: list[Expr] = []
    for k, (expr, (low, high)) in enumerate(zip(x, amounts, strict=True)):
        if (low, high) == (0, 0):
            out.append(expr)
        elif low < 0 or high < 0 or is_frozen(expr) or c.attr("mode", "constant") != "constant":
            c.freeze("a Pad runs over it", expr)
            out.append(c.frozen(sizes[k]))
        else:
            sides = [c.note(f"low{k}", c.fresh(low)), c.note(f"high{k}", c.fresh(high))]
            out.append(c.sum(sides[0], expr, sides[1]))
    c.output(*out)


def pad_dead(node: NodeView, states: Sequence[float | None]) -> float | None:
    """nan: the input doesn't carry the unit, which is padding then. Only padding with zero is accounted for."""
    filled = states[2] if len(states) > 2 and node.inputs[2] else float(node.attributes.get("value", 0.0))
    if filled != 0:
        return None
    return 0.0 if states[0] is not None and (states[0] == 0 or states[0] != states[0]) else None


def patch_pad(p: PatchContext) -> None:
    rank = len(p.before(0))
    try:
        amounts = pad_amounts(p, rank)
    except GiveUp:
        return
    changed = [k for k in range(rank) if p.before_out()[k] != p.after_out()[k] and any(amounts[k])]
    if not changed:
        return
    for k in changed:
        amounts[k] = (p.noted(f"low{k}"), p.noted(f"high{k}"))
    axes = list(range(rank))
    if p.has(3):
        axes = [int(a) % rank for a in np.asarray(p.value(3)).reshape(-1)]
    pads = np.array([amounts[k][0] for k in axes] + [amounts[k][1] for k in axes], np.int64)
    if p.node.opset < 11:
        p.set_attr("pads", pads.tolist())
    else:
        p.want(1, pads)


def _concat(n: NodeView, *xs: Any) -> Any:
    return np.concatenate(xs, axis=int(n.attributes.get("axis", 0)))


def _slice(n: NodeView, x: Any, starts: Any = None, ends: Any = None, axes: Any = None, steps: Any = None) -> Any:
    starts = n.attributes.get("starts") if starts is None else starts
    ends = n.attributes.get("ends") if ends is None else ends
    axes = n.attributes.get("axes") if axes is None else axes
    axes = range(len(starts)) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    index = [slice(None)] * x.ndim
    for a, s, e, t in zip(axes, starts, ends, steps, strict=True):
        s, e, t = int(s), int(e), int(t)
        index[int(a)] = slice(s, None if t < 0 and e < -x.shape[int(a)] else e, t)
    return x[tuple(index)]


def _split(n: NodeView, x: Any, sizes: Any = None) -> Any:
    axis = int(n.attributes.get("axis", 0))
    sizes = n.attributes.get("split") if sizes is None else sizes
    if sizes is None:
        each = -(-x.shape[axis] // len(n.outputs))
        return tuple(np.split(x, [each * k for k in range(1, len(n.outputs))], axis))
    return tuple(np.split(x, np.cumsum(np.asarray(sizes, np.int64))[:-1], axis))


def _pad(n: NodeView, x: Any, pads: Any = None, value: Any = None, axes: Any = None) -> Any:
    if axes is not None or n.attributes.get("mode", "constant") != "constant":
        raise ValueError("form of Pad")
    pads = np.asarray(n.attributes.get("pads") if pads is None else pads).reshape(2, -1)
    return np.pad(x, pads.T, constant_values=0 if value is None else value)


def concat_mirror(m: MirrorContext) -> Any:
    return torch.cat([m.tensor(i) for i in range(len(m.node.inputs))], int(m.attr("axis", 0)))


def split_mirror(m: MirrorContext) -> Any:
    """Without sizes, parts of one size; since opset 18 the last ones may be shorter."""
    x, axis, count = m.tensor(0), int(m.attr("axis", 0)), len(m.node.outputs)
    if m.node.opset < 13:
        sizes = m.attr("split")
    else:
        sizes = m.ints(1) if m.has(1) else None
    if sizes is not None:
        found = x.split(list(sizes) if isinstance(sizes, list) else sizes, axis)
    elif m.node.opset < 18:
        found = x.chunk(count, axis)
    else:
        found = m.call(_run.even_parts, x, count, axis)
    return [found[j] for j in range(count)]


def slice_mirror(m: MirrorContext) -> Any:
    x, rank = m.tensor(0), m.rank(0)
    starts, ends, axes, steps = slice_lists(m)
    axes = list(range(len(starts))) if axes is None and isinstance(starts, list) else axes
    steps = [1] * len(starts) if steps is None and isinstance(starts, list) else steps
    lists = all(isinstance(b, list) for b in (starts, ends, axes, steps))
    if not lists or not all(isinstance(n, int) for n in (*axes, *steps)) or (rank is None and min(axes) < 0):
        return m.call(_run.slices, x, starts, ends, axes, steps)
    index: dict[int, slice] = {}
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if step < 0:
            whole = step == -1 and isinstance(start, int) and start == -1 and isinstance(end, int) and end <= -FARTHEST
            x = x.flip(axis) if whole else m.call(_run.slice_backwards, x, axis, start, end, step)
            continue
        low, high = bound(start, 0), bound(end, FARTHEST)
        if low is not None or high is not None or step != 1:
            index[axis % rank if rank else axis] = slice(low, high, None if step == 1 else step)
    return x[tuple(index.get(k, slice(None)) for k in range(max(index) + 1))] if index else x


def slice_lists(m: MirrorContext) -> tuple[Any, Any, Any, Any]:
    """Starts, ends, axes and steps, as written."""
    if m.node.opset < 10:
        return m.attr("starts"), m.attr("ends"), m.attr("axes"), None
    starts, ends, axes, steps = (m.ints(i) if m.has(i) else None for i in range(1, 5))
    return starts, ends, axes, steps


def bound(value: Any, default: int) -> Any:
    """A bound of a slice; None where it is the end of the axis."""
    if not isinstance(value, int):
        return value
    beyond = value >= default if default else value == 0 or value <= -FARTHEST
    return None if beyond else value


def pad_mirror(m: MirrorContext) -> Any:
    x, mode = m.tensor(0), m.attr("mode", "constant")
    pads = m.attr("pads") if m.node.opset < 11 else m.ints(1)
    axes = m.ints(3) if m.has(3) else None
    value = pad_value(m)
    if axes is None and isinstance(pads, list):
        axes = list(range(len(pads) // 2))
    rank = m.rank(0) or (len(pads) // 2 if isinstance(pads, list) and not m.has(3) else 0)
    if not (isinstance(pads, list) and isinstance(axes, list) and rank and all(isinstance(a, int) for a in axes)):
        return m.call(_run.pad, x, pads, axes, mode, value)
    amounts: list[tuple[Any, Any]] = [(0, 0)] * rank
    for k, axis in enumerate(axes):
        amounts[axis] = (pads[k], pads[len(axes) + k])
    sides = [n for pair in reversed(amounts) for n in pair]
    if mode == "constant":
        while sides and all(isinstance(n, int) and n == 0 for n in sides[-2:]):
            del sides[-2:]
        if not sides:
            return x
        return (
            F.pad(x, sides, value=value) if isinstance(value, (int, float)) else m.call(_run.pad_with, x, sides, value)
        )
    if fits_torch(m, amounts, mode):
        return F.pad(x, sides[: 2 * (rank - 2)], {"edge": "replicate"}.get(mode, mode))
    return m.call(_run.pad, x, pads, axes, mode)


def pad_value(m: MirrorContext) -> Any:
    """What a constant pad is filled with: a number, or a tensor where it is computed."""
    if m.node.opset < 11:
        return float(m.attr("value", 0.0))
    known = m.constant(2)
    if known is not None:
        return known.reshape(()).item()
    return m.tensor(2) if m.has(2) else 0


def fits_torch(m: MirrorContext, amounts: Sequence[tuple[Any, Any]], mode: str) -> bool:
    """torch reflects and repeats the axes behind the second one of images, by less than their size."""
    shape, dtype = m.shape(0), m.dtype(0)
    if shape is None or len(shape) not in (3, 4, 5) or mode == "wrap" or dtype is None or not dtype.is_floating_point:
        return False
    inner = all(pair == (0, 0) for pair in amounts[:2])
    return inner and all(
        isinstance(a, int) and a >= 0 and (mode == "edge" or (n is not None and a < n))
        for n, pair in zip(shape[2:], amounts[2:], strict=True)
        for a in pair
    )


def center_crop_pad_mirror(m: MirrorContext) -> Any:
    return m.call(_run.center_crop_pad, m.tensor(0), m.ints(1), m.attr("axes"))


OPERATORS = (
    Operator("CenterCropPad", mirror=center_crop_pad_mirror, carries=True),
    Operator("Concat", concat_axes, joined_dead, evaluate=_concat, joins=True, mirror=concat_mirror, carries=True),
    Operator("Split", split_axes, carried, patch=patch_split, evaluate=_split, mirror=split_mirror, carries=True),
    Operator("Slice", slice_axes, carried, patch=patch_slice, evaluate=_slice, mirror=slice_mirror, carries=True),
    Operator(
        "Pad",
        pad_axes,
        pad_dead,
        patch=patch_pad,
        evaluate=_pad,
        joins=True,
        mirror=pad_mirror,
        carries=True,
        fixed=frozenset({2}),
    ),
)
