"""Softmax, LogSoftmax and Hardmax: what runs over an axis keeps all of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from onnxprune.ops.lazy import kernels, torch
from onnxprune.ops.registry import Operator, Role
from onnxprune.ops.rules import AxisContext, MirrorContext

__all__ = ["OPERATORS"]

_run = kernels("norm")


def softmax_axes(c: AxisContext) -> None:
    """Before opset 13 everything from the axis on is one distribution."""
    x = c.axes(0)
    old = c.node.opset < 13
    axis = int(c.attr("axis", 1 if old else -1)) % max(len(x), 1)
    c.freeze(f"a {c.node.op} runs over it", *(x[axis:] if old else x[axis : axis + 1]))
    c.output(*x)


def along(function: Callable[[], Any]) -> Callable[[MirrorContext], Any]:
    """The rule of a function along an axis; before opset 13 along all axes from it on, taken together."""

    def mirror(m: MirrorContext) -> Any:
        x, old, rank = m.tensor(0), m.node.opset < 13, m.rank(0)
        axis = int(m.attr("axis", 1 if old else -1))
        if not old or (rank is not None and axis % max(rank, 1) == rank - 1):
            return m.call(function(), x, axis)
        return m.call(function(), x.flatten(axis), -1).reshape_as(x)

    return mirror


OPERATORS = (
    Operator("Softmax", softmax_axes, mirror=along(lambda: torch.softmax), role=Role.SOFTMAX),
    Operator("LogSoftmax", softmax_axes, mirror=along(lambda: torch.log_softmax), role=Role.LOG_SOFTMAX),
    Operator("Hardmax", softmax_axes, discrete=True, mirror=along(lambda: _run.hardmax)),
)
