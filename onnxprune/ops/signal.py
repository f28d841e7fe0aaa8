"""Signal processing: Fourier transforms, windows and the mel scale. Their axes stay."""

from __future__ import annotations

from typing import Any

from onnxprune.ops.lazy import kernels
from onnxprune.ops.registry import Operator
from onnxprune.ops.rules import MirrorContext, MirrorRule

__all__ = ["OPERATORS"]

_run = kernels("signal")

HANN = (0.5, 0.5)
HAMMING = (25 / 46, 21 / 46)
BLACKMAN = (0.42, 0.5, 0.08)


def scalar(m: MirrorContext, i: int) -> Any:
    """Input i, one integer; None where it is absent."""
    return m.ints(i)[0] if m.has(i) else None


def dft_mirror(m: MirrorContext) -> Any:
    """The axis is an attribute before opset 20."""
    if m.node.opset < 20:
        axis = int(m.attr("axis", 1))
    else:
        axis = scalar(m, 2) if m.has(2) else -2
    inverse, onesided = bool(m.attr("inverse", 0)), bool(m.attr("onesided", 0))
    return m.call(_run.dft, m.tensor(0), scalar(m, 1), axis, inverse, onesided)


def stft_mirror(m: MirrorContext) -> Any:
    onesided = bool(m.attr("onesided", 1))
    return m.call(_run.stft, m.tensor(0), scalar(m, 1), m.optional(2), scalar(m, 3), onesided)


def window_mirror(terms: tuple[float, ...]) -> MirrorRule:
    def mirror(m: MirrorContext) -> Any:
        size, periodic = scalar(m, 0), bool(m.attr("periodic", 1))
        dtype = m.torch_type(int(m.attr("output_datatype", 1)))
        if isinstance(size, int):
            return m.buffer(_run.window(size, terms, periodic, dtype, None).numpy())
        return m.call(_run.window, size, terms, periodic, dtype, m.device)

    return mirror


def mel_mirror(m: MirrorContext) -> Any:
    sizes = [scalar(m, i) for i in range(3)]
    edges = [m.constant(i) for i in (3, 4)]
    dtype = m.torch_type(int(m.attr("output_datatype", 1)))
    if all(isinstance(n, int) for n in sizes) and all(e is not None for e in edges):
        low, high = (float(e.reshape(())) for e in edges if e is not None)
        return m.buffer(_run.mel_weights(*sizes, low, high, dtype, None).numpy())
    return m.call(_run.mel_weights, *sizes, m.tensor(3), m.tensor(4), dtype, m.device)


OPERATORS = (
    Operator("DFT", mirror=dft_mirror),
    Operator("STFT", mirror=stft_mirror, fixed=frozenset({2})),
    Operator("HannWindow", mirror=window_mirror(HANN)),
    Operator("HammingWindow", mirror=window_mirror(HAMMING)),
    Operator("BlackmanWindow", mirror=window_mirror(BLACKMAN)),
    Operator("MelWeightMatrix", mirror=mel_mirror, fixed=frozenset({3, 4})),
)
