"""Stored integers as weights: a parameter holds the reals that they stand for, and is rounded where it is used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import TensorProto
from onnx.helper import tensor_dtype_to_np_dtype

__all__ = ["INTEGERS", "Quantised"]

INTEGERS = frozenset({TensorProto.INT8, TensorProto.UINT8, TensorProto.INT16, TensorProto.UINT16, TensorProto.INT32})


@dataclass(frozen=True, eq=False, slots=True)
class Quantised:
    """How a stored tensor of integers stands for reals: (q - zero_point) * scale.

    elem_type: of the stored tensor. scale, zero_point: one, one per index of `axis`, or one per `block` along it.
    """

    elem_type: int
    scale: np.ndarray
    zero_point: np.ndarray
    axis: int | None = None
    block: int = 0

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Quantised):
            return NotImplemented
        arrays = (self.scale, other.scale), (self.zero_point, other.zero_point)
        places = [(q.elem_type, q.axis, q.block) for q in (self, other)]
        return places[0] == places[1] and all(np.array_equal(a, b) for a, b in arrays)

    def reals(self, q: np.ndarray) -> np.ndarray:
        """What stored integers stand for, as float32."""
        return (q.astype(np.float32) - self.spread(self.zero_point, q)) * self.spread(self.scale, q)

    def integers(self, reals: np.ndarray) -> np.ndarray:
        """The integers that stand for these reals, in the stored type; rounded half to even."""
        dtype = np.dtype(tensor_dtype_to_np_dtype(self.elem_type))
        bounds = np.iinfo(dtype)
        q = np.round(reals / self.spread(self.scale, reals)) + self.spread(self.zero_point, reals)
        return np.clip(q.astype(np.float64), bounds.min, bounds.max).astype(dtype)

    def spread(self, values: np.ndarray, x: np.ndarray) -> Any:
        values = values.astype(np.float32)
        if values.size == 1 or self.axis is None:
            return values.reshape(()) if values.size == 1 else values
        axis = self.axis % x.ndim
        if self.block:
            return np.repeat(values, self.block, axis).take(range(x.shape[axis]), axis)
        return values if values.ndim > 1 else values.reshape([-1 if k == axis else 1 for k in range(x.ndim)])
