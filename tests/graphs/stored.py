"""The ways in which exporters store a weight: in an initializer, in a Constant, or behind a little arithmetic."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, numpy_helper

from tests.graphs.builder import Builder, Storing, Tensor

__all__ = ["STORED"]


def _in_constant(b: Builder, array: np.ndarray) -> Tensor:
    return b.node("Constant", [], array.shape, value=numpy_helper.from_array(array))


def _behind_identity(b: Builder, array: np.ndarray) -> Tensor:
    return b.node("Identity", [b.initializer(array)], array.shape)


def _behind_transpose(b: Builder, array: np.ndarray) -> Tensor:
    perm = tuple(reversed(range(array.ndim)))
    return b.transpose(b.initializer(array.transpose(perm)), *perm)


def _behind_reshape(b: Builder, array: np.ndarray) -> Tensor:
    return b.node("Reshape", [b.initializer(array.reshape(len(array), -1)), b.constant(list(array.shape))], array.shape)


def _in_two_halves(b: Builder, array: np.ndarray) -> Tensor:
    half = len(array) // 2
    if not half:
        return b.initializer(array)
    return b.concat([b.initializer(array[:half]), b.initializer(array[half:])], 0)


def _as_half_floats(b: Builder, array: np.ndarray) -> Tensor:
    return b.node("Cast", [b.initializer(array.astype(np.float16))], array.shape, to=TensorProto.FLOAT)


def _as_integers(b: Builder, array: np.ndarray) -> Tensor:
    """Symmetric int8 with a scale per index of the first axis."""
    if b.opset < 13:
        return b.initializer(array)
    scale = np.maximum(np.abs(array).reshape(len(array), -1).max(1), 1e-6) / 127
    stored = np.round(array / scale.reshape(-1, *[1] * (array.ndim - 1))).astype(np.int8)
    return b.node(
        "DequantizeLinear", [b.initializer(stored), b.initializer(scale.astype(np.float32))], array.shape, axis=0
    )


def _normalised(b: Builder, array: np.ndarray) -> Tensor:
    """torch's weight_norm: direction times length, per index of the first axis."""
    v = b.initializer(array)
    length = b.reduce("ReduceL2", v, range(1, array.ndim)) if array.ndim > 1 else b.scalar(1.0)
    g = b.initializer(b.values.uniform(0.5, 1.5, (len(array), *[1] * (array.ndim - 1))).astype(np.float32))
    return b.mul(v, b.elementwise("Div", g, b.elementwise("Add", length, b.scalar(1e-6))))


STORED: tuple[Storing, ...] = (
    _in_constant,
    _behind_identity,
    _behind_transpose,
    _behind_reshape,
    _in_two_halves,
    _as_half_floats,
    _as_integers,
    _normalised,
)
