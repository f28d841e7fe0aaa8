"""Operators that make tensors out of sizes: their axes stay, and reading a tensor's shape asks nothing of it."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import numpy_helper

from onnxprune.ops.registry import Operator
from onnxprune.ops.rules import AxisContext, GiveUp, NodeView, PatchContext

__all__ = ["OPERATORS"]


def shape_axes(c: AxisContext) -> None:
    """What is computed from a channel's size follows it, unless the computation can't be followed."""
    if c.output_shapes[0] is None:
        raise GiveUp("its shape is read where it is not known")
    c.axes(0)
    c.output(*(c.frozen(n) for n in c.output_shape()))


def filled_axes(c: AxisContext) -> None:
    """A ConstantOfShape is free to have any size that its readers want."""
    sizes = c.pinned(0, "the sizes").reshape(-1)
    c.output(*(c.fresh(int(n)) if c.constant(0, k) else c.frozen(int(n)) for k, n in enumerate(sizes)))


def patch_filled(p: PatchContext) -> None:
    if p.value(0) is not None:
        p.want(0, np.array(p.after_out(), np.int64))


def frozen_axes(c: AxisContext) -> None:
    for j in range(len(c.node.outputs)):
        c.output(*(c.frozen(n) for n in c.output_shape(j)), j=j)


def filled_dead(node: NodeView, states: Any) -> float | None:
    value = node.attributes.get("value")
    return 0.0 if value is None else float(numpy_helper.to_array(value).reshape(-1)[0])


def _shape(n: NodeView, shape: tuple[int, ...]) -> Any:
    rank = len(shape)
    start, end = n.attributes.get("start", 0), n.attributes.get("end", rank)
    return np.array(shape[slice(*slice(start, end).indices(rank)[:2])], np.int64)


def _filled(n: NodeView, shape: Any) -> Any:
    value = n.attributes.get("value")
    fill = np.zeros(1, np.float32) if value is None else numpy_helper.to_array(value)
    return np.full([int(k) for k in shape], fill.reshape(-1)[0])


def _one_hot(n: NodeView, indices: Any, depth: Any, values: Any) -> Any:
    if n.attributes.get("axis", -1) not in (-1, np.ndim(indices)):
        raise ValueError("form of OneHot")
    depth = int(np.asarray(depth).reshape(-1)[0])
    hit = np.asarray(indices).astype(np.int64)[..., None] % depth == np.arange(depth)
    return np.where(hit, values[1], values[0]).astype(np.asarray(values).dtype)


def _constant(n: NodeView, values: Any) -> Any:
    """The tensor of a Constant node; None for strings and sparse tensors."""
    a = n.attributes
    if "value" in a:
        return a["value"]
    for name, dtype in (
        ("value_float", np.float32),
        ("value_floats", np.float32),
        ("value_int", np.int64),
        ("value_ints", np.int64),
    ):
        if name in a:
            return numpy_helper.from_array(np.array(a[name], dtype))
    return None


def _fill(n: NodeView, values: Any) -> Any:
    """A ConstantOfShape of constant size that holds floats may be a weight, and is pruned like one."""
    value = n.attributes.get("value")
    fill = np.zeros(1, np.float32) if value is None else numpy_helper.to_array(value)
    shape = tuple(int(k) for k in np.asarray(values[0]).reshape(-1))
    return (fill, shape) if fill.dtype.kind == "f" and shape and min(shape) > 0 else None


def _range(n: NodeView, start: Any, limit: Any, delta: Any) -> Any:
    bounds = [np.asarray(v).reshape(-1)[0] for v in (start, limit, delta)]
    return np.arange(*bounds, dtype=np.asarray(start).dtype)


OPERATORS = (
    Operator("Constant", stored=_constant),
    Operator("Shape", shape_axes, from_shape=_shape),
    Operator("Size", shape_axes, from_shape=lambda n, shape: np.array(int(np.prod(shape)), np.int64)),
    Operator("ConstantOfShape", filled_axes, filled_dead, patch=patch_filled, evaluate=_filled, stored=_fill),
    Operator("Range", frozen_axes, evaluate=_range),
    Operator("NonZero", evaluate=lambda n, x: np.array(np.nonzero(x), np.int64), discrete=True),
    Operator("Unique", discrete=True),
    Operator("OneHot", None, evaluate=_one_hot),
)
