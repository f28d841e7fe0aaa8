"""Reductions. A sum over zeros is exact, a mean is once it is rescaled, and an extreme value may be a zero's."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from onnxprune.ops.layout import listed_axes
from onnxprune.ops.lazy import kernels, torch
from onnxprune.ops.registry import Operator, Role
from onnxprune.ops.rules import (
    AxisContext,
    GiveUp,
    Kind,
    MaskContext,
    MaskRule,
    MirrorContext,
    MirrorRule,
    NodeView,
    PatchContext,
    PatchRule,
)
from onnxprune.ops.unsigned import widened

__all__ = ["OPERATORS"]

_run = kernels("reduce")


def reduced(c: AxisContext | PatchContext, rank: int, since: int) -> list[int]:
    """The axes that go, ascending."""
    chosen = listed_axes(c, since)
    if not chosen:
        return [] if c.attr("noop_with_empty_axes", 0) else list(range(rank))
    return sorted(k % rank for k in chosen)


def reduce_axes(kind: Kind, since: int):
    def axes(c: AxisContext) -> None:
        x = c.axes(0)
        gone = reduced(c, len(x), since)
        for k in gone:
            c.contract(kind, (0, k))
        keep = c.attr("keepdims", 1)
        c.output(*(c.frozen(1) if k in gone else e for k, e in enumerate(x) if keep or k not in gone))

    return axes


def patch_mean(since: int):
    """A mean over n' of n units, the others being zero, is n'/n of what it was over n."""

    def patch(p: PatchContext) -> None:
        try:
            gone = reduced(p, len(p.before(0)), since)
        except GiveUp:
            return
        q = prod(p.share(0, k) for k in gone)
        if q != 1:
            p.scale_output(q)

    return patch


def mask_mean(m: MaskContext) -> None:
    """The mean of the kept units is that over all, the removed ones being zero, but for the count."""
    m.replace_input(0, m.before("Mul", [m.input(0), m.constant(m.mask(0))]))
    m.scale_output(1 / m.kept_fraction(0))


def mask_extreme(neutral: float):
    """Removed units get a value that can't win."""

    def mask(m: MaskContext) -> None:
        kept = m.before("Mul", [m.input(0), m.constant(m.mask(0))])
        m.replace_input(0, m.before("Add", [kept, m.constant((1 - m.mask(0)) * neutral)]))

    return mask


def same_dead(node: NodeView, states: Sequence[float | None]) -> float | None:
    """Over other axes, all the reduced values are the unit's constant."""
    return states[0]


def zero_dead(node: NodeView, states: Sequence[float | None]) -> float | None:
    return 0.0 if states[0] == 0 else None


def arg_axes(c: AxisContext) -> None:
    x = c.axes(0)
    axis = int(c.attr("axis", 0)) % len(x)
    c.freeze(f"an {c.node.op} runs over it", x[axis])
    keep = c.attr("keepdims", 1)
    c.output(*(c.frozen(1) if k == axis else e for k, e in enumerate(x) if keep or k != axis))


def _reducer(f: Any) -> Any:
    def evaluate(n: NodeView, x: Any, axes: Any = None) -> Any:
        axes = n.attributes.get("axes") if axes is None else axes
        if axes is None or not np.size(axes):
            if n.attributes.get("noop_with_empty_axes", 0):
                return x
            axes = range(np.ndim(x))
        kept = bool(n.attributes.get("keepdims", 1))
        return np.asarray(f(x, axis=tuple(int(a) for a in axes), keepdims=kept)).astype(np.asarray(x).dtype)

    return evaluate


def mirror_axes(m: MirrorContext, since: int) -> Any:
    """The axes that go: a tuple, None for all of them, or a proxy of a list."""
    if m.node.opset < since:
        axes = m.attr("axes")
    else:
        axes = m.ints(1) if m.has(1) else None
        if axes is not None and not isinstance(axes, list):
            return axes
    if axes:
        return tuple(axes)
    return () if m.attr("noop_with_empty_axes", 0) else None


def reduce_mirror(function: str, since: int) -> MirrorRule:
    """function: its name in the kernels, which have every form of it."""

    def mirror(m: MirrorContext) -> Any:
        x, axes, keep = m.tensor(0), mirror_axes(m, since), bool(m.attr("keepdims", 1))
        floats = m.dtype(0) is not None and m.dtype(0).is_floating_point
        if floats and function in _PLAIN and isinstance(axes, tuple) and axes:
            return _PLAIN[function](x, axes, keep)
        noop = bool(m.attr("noop_with_empty_axes", 0))
        return m.call(getattr(_run, function), x, axes, keep, noop)

    return mirror


_PLAIN: dict[str, Any] = {  # of floats, over known axes: one function of torch
    "total": lambda x, axes, keep: torch.sum(x, axes, keep),
    "mean": lambda x, axes, keep: torch.mean(x, axes, keep),
    "norm1": lambda x, axes, keep: torch.linalg.vector_norm(x, 1, axes, keep),
    "norm2": lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keep),
    "squares": lambda x, axes, keep: torch.sum(x * x, axes, keep),
    "log_total": lambda x, axes, keep: torch.log(torch.sum(x, axes, keep)),
    "log_total_exp": lambda x, axes, keep: torch.logsumexp(x, axes, keep),
}


def arg_mirror(function: str) -> MirrorRule:
    """The first of equals, unless the last one is asked for."""

    def mirror(m: MirrorContext) -> Any:
        x, axis, keep = m.tensor(0), int(m.attr("axis", 0)), bool(m.attr("keepdims", 1))
        if m.attr("select_last_index", 0):
            return x.size(axis) - 1 - getattr(torch, function)(torch.flip(x, (axis,)), axis, keep)
        return getattr(torch, function)(x, axis, keep)

    return mirror


def _reduction(
    name: str,
    kind: Kind,
    since: int,
    function: str,
    f: Any = None,
    dead: Any = zero_dead,
    patch: PatchRule | None = None,
    mask: MaskRule | None = None,
    role: Role | None = None,
) -> Operator:
    """since: the opset from which the axes are an input; function: the reduction in the kernels."""
    evaluate = _reducer(f) if f else None
    mirror = widened(reduce_mirror(function, since))
    return Operator(
        name, reduce_axes(kind, since), dead, patch=patch, mask=mask, evaluate=evaluate, mirror=mirror, role=role
    )


BIG = 3e4  # beyond what activations reach, and within what float16 holds


OPERATORS = (
    _reduction("ReduceSum", Kind.SUM, 13, "total", np.sum, role=Role.TOTAL),
    _reduction("ReduceMean", Kind.MEAN, 18, "mean", np.mean, same_dead, patch_mean(18), mask_mean),
    _reduction("ReduceMax", Kind.EXTREME, 18, "largest", np.max, same_dead, mask=mask_extreme(-BIG)),
    _reduction("ReduceMin", Kind.EXTREME, 18, "smallest", np.min, same_dead, mask=mask_extreme(BIG)),
    _reduction("ReduceProd", Kind.EXTREME, 18, "product", np.prod, mask=mask_extreme(1.0)),
    _reduction("ReduceL1", Kind.SUM, 18, "norm1"),
    _reduction("ReduceL2", Kind.SUM, 18, "norm2"),
    _reduction("ReduceSumSquare", Kind.SUM, 18, "squares"),
    _reduction("ReduceLogSum", Kind.SUM, 18, "log_total", dead=None),
    _reduction("ReduceLogSumExp", Kind.EXTREME, 18, "log_total_exp", dead=None, mask=mask_extreme(-BIG)),
    Operator("ArgMax", arg_axes, discrete=True, mirror=widened(arg_mirror("argmax"))),
    Operator("ArgMin", arg_axes, discrete=True, mirror=widened(arg_mirror("argmin"))),
    Operator("Det", mirror=lambda m: m.call(_run.determinant, m.tensor(0))),
)
