"""Matrix products: the contracted axes are equal, the others pass through."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from onnxprune.axes.expr import Expr
from onnxprune.ops.lazy import F, torch
from onnxprune.ops.registry import Operator, Role
from onnxprune.ops.rules import AxisContext, GiveUp, Kind, Linear, MirrorContext, NodeView, Shape, Term

__all__ = ["OPERATORS", "matmul", "matmul_macs", "product_dead", "product_shape"]


def product_dead(a: int, b: int, *added: int):
    """A product is zero where a factor is, and what is added to it as well."""

    def dead(node: NodeView, states: Sequence[float | None]) -> float | None:
        terms = (states[k] for k in added if k < len(states) and node.inputs[k])
        finite = math.inf not in (states[a], states[b])
        return 0.0 if finite and 0 in (states[a], states[b]) and all(t == 0 for t in terms) else None

    return dead


def matmul(c: AxisContext, a: int, b: int, *, last_a: int = -1, row_b: int = -2) -> tuple[Expr, ...]:
    """numpy's matmul, with the contracted axes at `last_a` and `row_b`; returns the output's axes."""
    x, y = c.axes(a), c.axes(b)
    if not x or not y:
        raise GiveUp("a matrix product of scalars")
    ka = len(x) - 1 if len(x) == 1 else last_a % len(x)
    kb = 0 if len(y) == 1 else row_b % len(y)
    c.contract(Kind.PRODUCT, (a, ka), (b, kb), fold=len(y) == 2)
    batch: list[Expr] = []
    left, right = x[:-2], y[:-2]
    for k in range(-max(len(left), len(right)), 0):
        aligned = [s[k] for s in (left, right) if len(s) >= -k]
        wide = [e for e in aligned if e.size != 1] or aligned[:1]
        c.equal(*wide)
        batch.append(wide[0])
    rows = [] if len(x) == 1 else [x[-2 if ka == len(x) - 1 else -1]]
    columns = [] if len(y) == 1 else [y[-1 if kb == len(y) - 2 else -2]]
    return (*batch, *rows, *columns)


def matmul_axes(c: AxisContext) -> None:
    c.output(*matmul(c, 0, 1))


def fused_matmul_axes(c: AxisContext) -> None:
    if c.attr("transBatchA", 0) or c.attr("transBatchB", 0):
        raise GiveUp("a matrix product with transposed batch axes")
    c.output(*matmul(c, 0, 1, last_a=-2 if c.attr("transA", 0) else -1, row_b=-1 if c.attr("transB", 0) else -2))


def gemm_axes(c: AxisContext) -> None:
    x, kb = c.axes(0), (1 if c.attr("transB", 0) else 0)
    ka = 0 if c.attr("transA", 0) else len(x) - 1  # some exporters leave leading axes in place
    c.contract(Kind.PRODUCT, (0, ka), (1, kb), fold=len(x) == 2)
    out = (*(e for k, e in enumerate(x) if k != ka), c.axes(1)[1 - kb])
    if c.has(2):
        bias = c.axes(2)
        for axis, target in zip(reversed(bias), reversed(out), strict=False):
            if axis.size != 1:
                c.equal(axis, target)
    c.output(*out)


def einsum_terms(equation: str, ranks: Sequence[int]) -> tuple[list[list[str]], list[str]]:
    """Labels of every input axis and of the output; an ellipsis becomes labels of its own."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    widest = max((r - len(t.replace("...", "")) for t, r in zip(left.split(","), ranks, strict=True)), default=0)
    hidden = [f"...{k}" for k in range(widest)]

    def expand(term: str, rank: int | None = None) -> list[str]:
        if "..." not in term:
            return list(term)
        before, after = term.split("...")
        count = widest if rank is None else rank - len(before) - len(after)
        return [*before, *hidden[widest - count :], *after]

    terms = [expand(t, r) for t, r in zip(left.split(","), ranks, strict=True)]
    if arrow:
        return terms, expand(right)
    flat = [label for t in terms for label in t]
    return terms, [*hidden, *sorted({x for x in flat if flat.count(x) == 1 and x not in hidden})]


def einsum_axes(c: AxisContext) -> None:
    count = len(c.node.inputs)
    terms, result = einsum_terms(c.attr("equation"), [c.rank(i) for i in range(count)])
    positions: dict[str, list[tuple[int, int]]] = {}
    for i, term in enumerate(terms):
        for k, label in enumerate(term):
            positions.setdefault(label, []).append((i, k))
    named: dict[str, Expr] = {}
    for label, where in positions.items():
        axes = [c.axes(i)[k] for i, k in where]
        wide = [e for e in axes if e.size != 1] or axes[:1]
        c.equal(*wide)
        named[label] = wide[0]
        if label not in result:
            spots = tuple((i, k) for i, k in where if c.axes(i)[k].size == wide[0].size)
            c.contract(Kind.PRODUCT if count > 1 and len(spots) > 1 else Kind.SUM, *spots)
    c.output(*(named[label] for label in result))


def einsum_dead(node: NodeView, states: Sequence[float | None]) -> float | None:
    return 0.0 if 0 in states and math.inf not in states else None


def matmul_macs(a: int, b: int):
    def macs(node: NodeView, inputs: Sequence[tuple[Expr, ...]], outputs: Sequence[tuple[Expr, ...]]) -> list[Term]:
        k = 1 if node.attributes.get("transA") and len(inputs[a]) == 2 else len(inputs[a]) - 1
        if node.attributes.get("transA"):
            k = len(inputs[a]) - 2
        return [(1.0, (*outputs[0], inputs[a][k]))]

    return macs


def einsum_macs(node: NodeView, inputs: Sequence[tuple[Expr, ...]], outputs: Sequence[tuple[Expr, ...]]) -> list[Term]:
    """The product of all labels' sizes: the cost of two operands, an upper bound for more."""
    terms, _ = einsum_terms(node.attributes["equation"], [len(a) for a in inputs])
    sizes: dict[str, Expr] = {}
    for term, axes in zip(terms, inputs, strict=True):
        for label, axis in zip(term, axes, strict=True):
            if label not in sizes or sizes[label].size == 1:
                sizes[label] = axis
    return [(1.0, tuple(sizes.values()))] if len(inputs) > 1 else []


def product_shape(node: NodeView, inputs, *, elem: int | None = None):
    """Shape of a (Fused)MatMul."""
    (kind, x), (_, y) = inputs[0], inputs[1]
    x = (*x[:-2], x[-1], x[-2]) if node.attributes.get("transA") else x
    y = (*y[:-2], y[-1], y[-2]) if node.attributes.get("transB") else y
    batch = [max((s for s in pair if s is not None), default=None) for pair in _aligned(x[:-2], y[:-2])]
    tail = [*(x[-2:-1] if len(x) > 1 else ()), *(y[-1:] if len(y) > 1 else ())]
    return [(elem or kind, (*batch, *tail))]


def _aligned(a, b):
    n = max(len(a), len(b))
    return list(zip((1,) * (n - len(a)) + tuple(a), (1,) * (n - len(b)) + tuple(b), strict=True))


def matmul_mirror(m: MirrorContext) -> Any:
    return m.tensor(0) @ m.tensor(1)


def gemm_mirror(m: MirrorContext) -> Any:
    """alpha * A * B + beta * C; as `linear` where it is one, so that torch sees what the exporter saw."""
    a, b, c = m.tensor(0), m.tensor(1), m.optional(2)
    alpha, beta = scalar(m, "alpha"), scalar(m, "beta")
    a = a.t() if m.attr("transA", 0) else a
    plain = alpha == 1 and (c is None or (beta == 1 and m.rank(2) == 1))
    if plain:
        return F.linear(a, b if m.attr("transB", 0) else b.t(), c)
    b = b.t() if m.attr("transB", 0) else b
    if c is None:
        return alpha * (a @ b)
    return torch.addmm(c, a, b, beta=beta, alpha=alpha)


def matmul_linear(node: NodeView, w: int, shapes: Sequence[Shape]) -> Linear | None:
    """numpy's matmul; `transA` and `transB` swap the last two axes of an operand."""
    attributes = node.attributes
    if attributes.get("transBatchA", 0) or attributes.get("transBatchB", 0):
        return None
    a, b = shapes[0], shapes[1]
    if not a or not b:
        return None
    leading = [f"b{k}" for k in reversed(range(max(len(a), len(b)) - 2))]
    left, right = [*leading, "m", "k"][-len(a) :], [*leading, "k", "n"][-len(b) :]
    left, right = ["k"] if len(a) == 1 else left, ["k"] if len(b) == 1 else right
    y = [*leading, *(["m"] if len(a) > 1 else []), *(["n"] if len(b) > 1 else [])]
    for axes, name in ((left, "transA"), (right, "transB")):
        if attributes.get(name, 0) and len(axes) > 1:
            axes[-2:] = axes[:-3:-1]
    terms = (tuple(left), tuple(right))
    sizes: dict[str, set[int | None]] = {}
    for label, size in (*zip(left, a, strict=True), *zip(right, b, strict=True)):
        sizes.setdefault(label, set()).add(size)
    if any(len(s) > 1 for n, s in sizes.items() if n in leading):  # a weight that is broadcast over a batch
        return None
    channel = -1 if w == 1 or len(b) == 1 else -2
    scale = float(attributes.get("alpha", 1.0))
    return product_linear(w, shapes, (*terms, tuple(y)), scale=scale, channel=channel)


def gemm_linear(node: NodeView, w: int, shapes: Sequence[Shape]) -> Linear | None:
    a, b = shapes[0], shapes[1]
    if a is None or b is None or len(a) != 2 or len(b) != 2:
        return None
    left = ("k", "m") if node.attributes.get("transA", 0) else ("m", "k")
    right = ("n", "k") if node.attributes.get("transB", 0) else ("k", "n")
    scale, bias_scale = (float(node.attributes.get(n, 1.0)) for n in ("alpha", "beta"))
    added = len(shapes) > 2 and bool(node.inputs[2]) and bias_scale != 0
    columns = b[right.index("n")]
    if added and (w != 1 or shapes[2] not in ((columns,), (1, columns))):
        return None  # it is added along the other axis as well
    more = {"bias": 2 if added else None, "bias_scale": bias_scale, "scale": scale, "channel": 1 if w == 1 else 0}
    return product_linear(w, shapes, (left, right, ("m", "n")), **more)


def einsum_linear(node: NodeView, w: int, shapes: Sequence[Shape]) -> Linear | None:
    if len(shapes) != 2 or shapes[0] is None or shapes[1] is None:
        return None
    (left, right), y = einsum_terms(node.attributes["equation"], [len(shapes[0]), len(shapes[1])])
    sizes: dict[str, set[int | None]] = {}
    for label, size in (*zip(left, shapes[0], strict=True), *zip(right, shapes[1], strict=True)):
        sizes.setdefault(label, set()).add(size)
    repeated = any(len(set(t)) < len(t) for t in (left, right))
    if repeated or any(1 in s and len(s) > 1 for s in sizes.values()):
        return None
    own = [k for k, label in enumerate(y) if label in (left, right)[w]]
    return product_linear(w, shapes, (tuple(left), tuple(right), tuple(y)), channel=own[0] if len(own) == 1 else None)


def product_linear(w: int, shapes: Sequence[Shape], terms: tuple[tuple[str, ...], ...], **more: Any) -> Linear | None:
    """A product of x and w, whichever of them stands on the left."""
    stored = shapes[w]
    if stored is None or any(n is None for n in stored):
        return None
    ordered = (terms[1 - w], terms[w], terms[2])
    return Linear(1 - w, w, ordered, tuple(n for n in stored if n is not None), **more)


def scalar(m: MirrorContext, name: str) -> float | int:
    """A factor of Gemm, which torch wants as an integer where it is one."""
    value = float(m.attr(name, 1.0))
    return int(value) if value.is_integer() else value


def fused_matmul_mirror(m: MirrorContext) -> Any:
    """alpha * A * B. transBatch moves the first axis behind the batch axes; trans swaps the last two before that."""
    x, y = (turned(m, i, letter) for i, letter in enumerate("AB"))
    alpha = float(m.attr("alpha", 1.0))
    return x @ y if alpha == 1 else alpha * (x @ y)


def turned(m: MirrorContext, i: int, letter: str) -> Any:
    x, rank = m.tensor(i), m.rank(i)
    if m.attr(f"transBatch{letter}", 0) and rank != 2:
        x = x.movedim(0, -2)
    return x.mT if m.attr(f"trans{letter}", 0) and rank != 1 else x


def einsum_mirror(m: MirrorContext) -> Any:
    return torch.einsum(m.attr("equation").replace(" ", ""), *(m.tensor(i) for i in range(len(m.node.inputs))))


OPERATORS = (
    Operator(
        "MatMul",
        matmul_axes,
        product_dead(0, 1),
        matmul_macs(0, 1),
        evaluate=lambda n, a, b: np.matmul(a, b),
        bias=2,
        mirror=matmul_mirror,
        role=Role.PRODUCT,
        linear=matmul_linear,
    ),
    Operator(
        "Gemm",
        gemm_axes,
        product_dead(0, 1, 2),
        matmul_macs(0, 1),
        bias=2,
        mirror=gemm_mirror,
        role=Role.PRODUCT,
        linear=gemm_linear,
    ),
    Operator("Einsum", einsum_axes, einsum_dead, einsum_macs, mirror=einsum_mirror, linear=einsum_linear),
    Operator(
        "com.microsoft::FusedMatMul",
        fused_matmul_axes,
        product_dead(0, 1),
        matmul_macs(0, 1),
        shape=product_shape,
        mirror=fused_matmul_mirror,
        role=Role.PRODUCT,
        linear=matmul_linear,
    ),
)
