"""Operators that make tensors out of sizes: their axes stay, and reading a tensor's shape asks nothing of it."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto, numpy_helper

from onnxprune.ops.lazy import kernels, torch
from onnxprune.ops.registry import Operator
from onnxprune.ops.rules import AxisContext, GiveUp, MirrorContext, NodeView, PatchContext
from onnxprune.ops.unsigned import widened

__all__ = ["OPERATORS", "frozen_axes"]

_run = kernels("generator")


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


def shape_mirror(m: MirrorContext) -> Any:
    """Where it is not known in advance: of a rank or sizes that depend on the data."""
    return m.call(_run.shape_of, m.tensor(0), m.attr("start", 0), m.attr("end"))


def filled_mirror(m: MirrorContext) -> Any:
    value = m.attr("value")
    fill, dtype = (0.0, torch.float32) if value is None else (_number(value), m.torch_type(value.data_type))
    if dtype is None:
        raise m.unsupported(f"torch has no {TensorProto.DataType.Name(value.data_type)}")
    return m.call(torch.full, m.ints(0), fill, dtype=dtype, device=m.device)


def _number(value: TensorProto) -> Any:
    first = numpy_helper.to_array(value).reshape(-1)[0]
    return first.item() if first.dtype.kind in "biuf" else float(first)


def range_mirror(m: MirrorContext) -> Any:
    dtype = m.dtype(0)
    if dtype is None or dtype.is_floating_point:
        return m.call(_run.stepped, m.tensor(0), m.tensor(1), m.tensor(2))
    start, limit, delta = (m.ints(i)[0] for i in range(3))
    if isinstance(start, int) and start == 0 and isinstance(delta, int) and delta == 1:
        return m.call(torch.arange, limit, dtype=dtype, device=m.device)
    return m.call(_run.counted, start, limit, delta, dtype, m.device)


def one_hot_mirror(m: MirrorContext) -> Any:
    return m.call(_run.one_hot, m.tensor(0), m.ints(1)[0], m.tensor(2), int(m.attr("axis", -1)))


def eye_like_mirror(m: MirrorContext) -> Any:
    dtype = m.torch_type(int(m.attr("dtype"))) if m.attr("dtype") else m.dtype(0)
    return m.call(_run.eye_like, m.tensor(0), int(m.attr("k", 0)), dtype)


def unique_mirror(m: MirrorContext) -> Any:
    found = m.call(_run.unique, m.tensor(0), m.attr("axis"), bool(m.attr("sorted", 1)))
    return [found[j] for j in range(4)]


OPERATORS = (
    Operator("Constant", stored=_constant),
    Operator("Shape", shape_axes, from_shape=_shape, mirror=shape_mirror),
    Operator(
        "Size",
        shape_axes,
        from_shape=lambda n, shape: np.array(int(np.prod(shape)), np.int64),
        mirror=lambda m: m.call(_run.size_of, m.tensor(0)),
    ),
    Operator(
        "ConstantOfShape",
        filled_axes,
        filled_dead,
        patch=patch_filled,
        evaluate=_filled,
        stored=_fill,
        mirror=filled_mirror,
    ),
    Operator("Range", frozen_axes, evaluate=_range, mirror=range_mirror, fixed=frozenset({0, 1, 2})),
    Operator(
        "NonZero",
        evaluate=lambda n, x: np.array(np.nonzero(x), np.int64),
        discrete=True,
        mirror=widened(lambda m: torch.nonzero(m.tensor(0)).t()),
    ),
    Operator("Unique", discrete=True, mirror=widened(unique_mirror)),
    Operator("OneHot", None, evaluate=_one_hot, mirror=widened(one_hot_mirror), fixed=frozenset({1, 2})),
    Operator("EyeLike", mirror=eye_like_mirror),
)
