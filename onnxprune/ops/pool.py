"""Operators over the spatial axes of an image: pooling, resizing, sampling. The channel axis passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from onnxprune.ops.registry import Operator
from onnxprune.ops.rules import AxisContext, GiveUp, MirrorContext, NodeView, PatchContext

__all__ = ["OPERATORS"]


def spatial_axes(c: AxisContext) -> None:
    """Batch and channel pass; spatial axes are new, also in a second output (indices)."""
    x = c.axes(0)
    c.freeze("a spatial axis", *x[2:])
    for j in range(len(c.node.outputs)):
        c.output(*x[:2], *(c.frozen(n, "a spatial axis") for n in c.output_shape(j)[2:]), j=j)


def resize_axes(c: AxisContext) -> None:
    """An axis that keeps its size passes: only spatial axes are ever resized."""
    if c.attr("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise GiveUp("sizes that depend on each other")
    if c.has(3):
        c.pinned(3, "the target sizes")
    x, sizes = c.axes(0), c.output_shape()
    out = []
    for expr, n in zip(x, sizes, strict=True):
        if n is not None and expr.size == n:
            out.append(expr)
        else:
            c.freeze("a spatial axis", expr)
            out.append(c.frozen(n, "a spatial axis"))
    c.output(*out)


def patch_resize(p: PatchContext) -> None:
    sizes = p.value(3) if p.has(3) else None
    if sizes is None or len(sizes) != len(p.before_out()):
        return
    p.want(3, np.array(p.after_out(), np.int64))


def sampled_axes(c: AxisContext) -> None:
    """GridSample: the grid is spatial."""
    x = c.axes(0)
    c.equal(x[0], c.axes(1)[0])
    c.freeze("a spatial axis", *x[2:], *c.axes(1)[1:])
    c.output(x[0], x[1], *(c.frozen(n, "a spatial axis") for n in c.output_shape()[2:]))


def roi_axes(c: AxisContext) -> None:
    x = c.axes(0)
    sizes = c.output_shape()
    c.freeze("regions are cut out of it", x[0], *x[2:])
    c.output(c.frozen(sizes[0]), x[1], *(c.frozen(n, "a spatial axis") for n in sizes[2:]))


def zero_stays(node: NodeView, states: Sequence[float | None]) -> float | None:
    return 0.0 if states[0] == 0 else None


def same(node: NodeView, states: Sequence[float | None]) -> float | None:
    return states[0]


def global_average_mirror(m: MirrorContext) -> Any:
    rank = m.rank(0)
    if rank is None:
        raise m.unsupported("the rank of its input is unknown")
    return m.tensor(0).mean(tuple(range(2, rank)), keepdim=True)


OPERATORS = (
    *(Operator(name, spatial_axes, zero_stays) for name in ("MaxPool", "AveragePool", "LpPool", "GlobalLpPool")),
    Operator("GlobalAveragePool", spatial_axes, same, mirror=global_average_mirror),
    Operator("GlobalMaxPool", spatial_axes, same),
    *(Operator(name, resize_axes, zero_stays, patch=patch_resize) for name in ("Resize", "Upsample")),
    Operator("GridSample", sampled_axes, zero_stays, keeps=frozenset({1})),
    Operator("RoiAlign", roi_axes, zero_stays),
    Operator("MaxRoiPool", roi_axes, zero_stays),
)
