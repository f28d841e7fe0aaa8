"""Blocks for rows (N, D)."""

from __future__ import annotations

from tests.graphs.builder import WIDTHS, Builder, From, Tensor
from tests.graphs.layers import activation, batch_norm, layer_norm, linear, rms_norm
from tests.graphs.sequences import tied

__all__ = ["ROWS", "rows_to_image"]


def gemm(b: Builder, x: Tensor) -> Tensor:
    y = linear(b, x)
    y = batch_norm(b, y) if b.chance() else y
    return activation(b, y) if b.chance() else y


def row_residual(b: Builder, x: Tensor) -> Tensor:
    return b.add(x, linear(b, activation(b, linear(b, x)), x.size(1)))


def row_concat(b: Builder, x: Tensor) -> Tensor:
    return b.concat([linear(b, x), x if b.chance() else linear(b, x)], 1)


def row_split(b: Builder, x: Tensor) -> Tensor:
    d = x.size(1)
    if d < 2:
        return linear(b, x)
    k = b.choose.integer(1, d - 1)
    a, rest = b.split(x, 1, [k, d - k])
    return b.concat([linear(b, rest), a], 1)


def concatenated_weights(b: Builder, x: Tensor) -> Tensor:
    """One product with the weights of two layers side by side, taken apart again."""
    m, n, d = b.pick(WIDTHS), b.pick(WIDTHS), x.size(1)
    w = b.concat([b.weight((d, m), d), b.weight((d, n), d)], 1)
    y = b.node("MatMul", [x, w], (x.shape[0], m + n))
    first, second = b.split(y, 1, [m, n])
    return b.concat([activation(b, second), first], 1)
