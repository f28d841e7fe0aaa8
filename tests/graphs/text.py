"""Models written in ONNX's text form."""

from __future__ import annotations

from math import prod, sqrt

import numpy as np
import onnx
from onnx import numpy_helper

__all__ = ["from_text", "random_weight"]


def from_text(
    text: str, *, opset: int = 17, microsoft: bool = False, ir: int = 8, **weights: tuple[int, ...] | np.ndarray
) -> onnx.ModelProto:
    """A model in ONNX's text form, such as `(float[N,8] x) => (float[N,3] y) { y = MatMul(x, w) }`.

    weights: initializers by name, given as arrays, or as shapes to be filled with random numbers.
    """
    domains = '"" : %d' % opset + (', "com.microsoft" : 1' if microsoft else "")
    model = onnx.parser.parse_model(f"<ir_version: {ir}, opset_import: [{domains}]> graph {text}")
    rng = np.random.default_rng(0)
    for name, value in weights.items():
        array = value if isinstance(value, np.ndarray) else random_weight(rng, value)
        model.graph.initializer.append(numpy_helper.from_array(array.copy(order="C"), name))
    return model


def random_weight(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Normal numbers, scaled so that signals keep their size."""
    return (rng.standard_normal(shape) / sqrt(max(prod(shape[1:]), 1))).astype(np.float32)
