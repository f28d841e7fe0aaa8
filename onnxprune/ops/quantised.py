"""Quantised tensors in the mirror: an input as the reals that it stands for, and reals rounded to an output.

A tensor of 8-bit integers is carried as floats that hold whole numbers, so that gradients pass. Stored ones are
weights: parameters in real units, rounded at use.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from onnx import TensorProto

from onnxprune.ops.lazy import kernels, torch
from onnxprune.ops.rules import MirrorContext

__all__ = ["BOUNDS", "centred", "declared", "number", "real", "real_table", "rounded", "scaled", "single", "whole"]

_run = kernels("quant")

BOUNDS: dict[int, tuple[int, int]] = {
    TensorProto.INT8: (-128, 127),
    TensorProto.UINT8: (0, 255),
    TensorProto.INT16: (-32768, 32767),
    TensorProto.UINT16: (0, 65535),
    TensorProto.INT4: (-8, 7),
    TensorProto.UINT4: (0, 15),
    TensorProto.INT2: (-2, 1),
    TensorProto.UINT2: (0, 3),
}
NONE = np.zeros((), np.float32)
UNSCALED = np.array(1 / 128, np.float32)  # the scale of weights whose own isn't known to the node that reads them


def number(m: MirrorContext, i: int | None) -> Any:
    """A scale or a zero point: a number where there is one, a tensor where there are several; 0 where it is absent."""
    if i is None or not m.has(i):
        return 0
    stored = m.stored(i)
    same = stored is not None and stored.size > 0 and (stored.size == 1 or not is_float(m, i))
    if stored is not None and same and (stored == stored.flat[0]).all():
        value = stored.flat[0].astype(np.float32).item()
        return value if is_float(m, i) else int(value)
    return m.tensor(i) if is_float(m, i) else m.whole(i)


def is_float(m: MirrorContext, i: int) -> bool:
    dtype = m.dtype(i)
    return dtype is not None and dtype.is_floating_point


def zero_points(m: MirrorContext, i: int | None) -> np.ndarray | None:
    """Their values, where they are known."""
    return NONE if i is None or not m.has(i) else m.stored(i)


def single(*values: Any) -> bool:
    return all(isinstance(v, (int, float)) for v in values)


def real(
    m: MirrorContext, i: int, scale: int, zero: int | None = None, *, axis: int | None = None, block: int = 0
) -> Any:
    """Input i as the reals that it stands for; `scale` and `zero` are the inputs that say how."""
    scales, zeros, kind = m.stored(scale), zero_points(m, zero), m.elem_type(i)
    if kind == TensorProto.INT32 and scales is not None and zeros is not None and not zeros.any():
        weight = m.weight(i, scales, NONE, axis=axis, block=block)
        if weight is not None:
            return weight
    q, s, z = whole(m, i, scale, zero, axis=axis, block=block), number(m, scale), number(m, zero)
    if single(s, z):
        return (q - z) * s if z else q * s
    return m.call(_run.dequantize, q, s, z, axis, block)


def whole(
    m: MirrorContext, i: int, scale: int | None, zero: int | None = None, *, axis: int | None = None, block: int = 0
) -> Any:
    """Input i as floats that hold whole numbers. A weight of 8 or 16 bits is rounded to its own integers."""
    scales = UNSCALED if scale is None else m.stored(scale)
    zeros, kind = zero_points(m, zero), m.elem_type(i)
    if kind in BOUNDS and scales is not None and zeros is not None:
        weight = m.weight(i, scales, zeros, axis=axis, block=block)
        if weight is not None:
            s = UNSCALED.item() if scale is None else number(m, scale)
            return quantized(m, weight, s, number(m, zero), kind, axis, block)
    return m.whole(i)


def real_table(m: MirrorContext, i: int, scale: int, zero: int) -> Any:
    """A stored table (outer, rows, columns) whose scales and zero points are one per outer index, or per column of
    it."""
    scales, zeros = m.stored(scale), m.stored(zero)
    if scales is None or zeros is None:
        raise m.unsupported("its scales are computed from the data")
    scales, zeros = (v.reshape(len(v), 1, -1) for v in (scales, zeros))
    weight = m.weight(i, scales, zeros)
    if weight is None:
        raise m.unsupported("its weights are computed from the data")
    s, z = m.buffer(scales), m.buffer(zeros.astype(np.float32))
    return m.call(_run.dequantize, m.call(_run.quantize, weight, s, z, *BOUNDS[m.elem_type(i)]), s, z)


def centred(m: MirrorContext, i: int, zero: int, *, axis: int | None = None) -> Any:
    """The whole numbers of input i less their zero point."""
    q, z = whole(m, i, None, zero, axis=axis), number(m, zero)
    if single(z):
        return q - z if z else q
    return m.call(_run.dequantize, q, 1.0, z, axis)


def scaled(m: MirrorContext, i: int, *scales: int) -> Any:
    """A bias of 32-bit integers in units of a product of scales, of which some may be one per element."""
    known = [m.stored(k) for k in scales]
    if all(k is not None for k in known):
        weight = m.weight(i, np.asarray(math.prod(known)).squeeze(), NONE, axis=0)  # type: ignore[arg-type]
        if weight is not None:
            return weight
    return m.whole(i) * math.prod(number(m, k) for k in scales)


def quantized(m: MirrorContext, x: Any, scale: Any, zero: Any, kind: int, axis: int | None, block: int) -> Any:
    where = () if single(scale, zero) or axis is None else (axis, block)
    return m.call(_run.quantize, x, scale, zero, *BOUNDS[kind], *where)


def rounded(
    m: MirrorContext, y: Any, scale: int, zero: int | None = None, *, axis: int | None = None, block: int = 0
) -> Any:
    """Reals as the first output, which is of integers."""
    kind = m.elem_type(zero) if zero is not None and m.has(zero) else 0
    kind = kind or m.output_elem_type() or TensorProto.UINT8
    if kind not in BOUNDS:
        raise m.unsupported(f"it rounds to {TensorProto.DataType.Name(kind)}")
    return m.carry(quantized(m, y, number(m, scale), number(m, zero), kind, axis, block), kind)


def declared(m: MirrorContext, y: Any) -> Any:
    """Reals in the type that the output declares."""
    dtype = m.output_dtype()
    return y if dtype in (None, torch.float32) else y.to(dtype)
