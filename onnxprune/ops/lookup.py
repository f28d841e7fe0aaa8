"""Reading and writing by index: the mirror rules of Gather, Scatter and their relatives."""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxprune.ops.lazy import F, kernels, torch
from onnxprune.ops.registry import Operator
from onnxprune.ops.rules import MirrorContext

__all__ = ["OPERATORS"]

_run = kernels("lookup")


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
    Operator("Compress", mirror=compress_mirror, carries=True),
    Operator("CumProd", mirror=cumulative_mirror("cumprod")),
    Operator("TensorScatter", mirror=tensor_scatter_mirror, carries=True),
)
