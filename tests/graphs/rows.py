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


def bilinear(b: Builder, x: Tensor) -> Tensor:
    """Products of two projections, as they are or summed over pieces."""
    width = b.pick([4, 6, 8])
    y = b.mul(linear(b, x, width), linear(b, x, width))
    if b.chance():
        return y
    return b.reduce("ReduceSum", b.reshape(y, [From(0), 2, width // 2]), [1], keep=False)


def factorisation(b: Builder, x: Tensor) -> Tensor:
    """A factorisation machine: the square of a sum minus the sum of squares, over fields."""
    fields, width = b.pick([2, 3]), b.pick([3, 4])
    e = b.reshape(linear(b, x, fields * width), [From(0), fields, width])
    total = b.reduce("ReduceSum", e, [1], keep=False)
    return b.elementwise("Sub", b.mul(total, total), b.reduce("ReduceSum", b.mul(e, e), [1], keep=False))


def experts(b: Builder, x: Tensor) -> Tensor:
    """A mixture of experts, all of them computed and weighted by a gate."""
    if b.opset < 12:
        return gemm(b, x)
    n, d = x.shape[0], x.size(1)
    count, hidden, out = 3, b.pick([2, 4]), b.pick([2, 3, 4])
    gate = b.node("Softmax", [linear(b, x, count)], (n, count), axis=1)
    h = b.node("Einsum", [x, b.weight((count, d, hidden), d)], (n, count, hidden), equation="nd,edh->neh")
    h = activation(b, h)
    y = b.node("Einsum", [h, b.weight((count, hidden, out), hidden)], (n, count, out), equation="neh,eho->neo")
    return b.node("Einsum", [gate, y], (n, out), equation="ne,neo->no")


def rows_to_image(b: Builder, x: Tensor) -> Tensor:
    """A decoder's start: a layer whose outputs are laid out as a small image."""
    c = b.pick([2, 3, 4])
    return b.reshape(linear(b, x, 4 * c), [From(0), c, 2, 2])


ROWS = (
    gemm,
    row_residual,
    row_concat,
    row_split,
    concatenated_weights,
    tied,
    rms_norm,
    layer_norm,
    batch_norm,
    activation,
    bilinear,
    factorisation,
    experts,
)
