"""Operators of classical machine learning. They hold no channels, but networks stand behind and before them."""

from __future__ import annotations

from onnxprune.ops.registry import Operator
from onnxprune.ops.rules import AxisContext

__all__ = ["OPERATORS"]


def featurewise_axes(c: AxisContext) -> None:
    """Every feature has a constant of its own in an attribute."""
    x = c.axes(0)
    c.freeze(f"a {c.node.op} has attributes per feature", *x[-1:])
    c.output(*x)


def _as_floats(node, inputs):
    return [(1, inputs[0][1])]


OPERATORS = tuple(
    Operator(f"ai.onnx.ml::{name}", featurewise_axes, shape=_as_floats) for name in ("Scaler", "Imputer", "Normalizer")
)
