"""Reductions. A sum over zeros is exact, a mean is once it is rescaled, and an extreme value may be a zero's."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from onnxprune.ops.layout import listed_axes
from onnxprune.ops.registry import Operator
from onnxprune.ops.rules import AxisContext, GiveUp, Kind, MaskContext, MaskRule, NodeView, PatchContext, PatchRule

__all__ = ["OPERATORS"]


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


def _reduction(
    name: str,
    kind: Kind,
    since: int,
    f: Any = None,
    dead: Any = zero_dead,
    patch: PatchRule | None = None,
    mask: MaskRule | None = None,
) -> Operator:
    evaluate = _reducer(f) if f else None
    return Operator(name, reduce_axes(kind, since), dead, patch=patch, mask=mask, evaluate=evaluate)


BIG = 3e4  # beyond what activations reach, and within what float16 holds


OPERATORS = (
    _reduction("ReduceSum", Kind.SUM, 13, np.sum),
    _reduction("ReduceMean", Kind.MEAN, 18, np.mean, same_dead, patch_mean(18), mask_mean),
    _reduction("ReduceMax", Kind.EXTREME, 18, np.max, same_dead, mask=mask_extreme(-BIG)),
    _reduction("ReduceMin", Kind.EXTREME, 18, np.min, same_dead, mask=mask_extreme(BIG)),
    _reduction("ReduceProd", Kind.EXTREME, 18, np.prod, mask=mask_extreme(1.0)),
    _reduction("ReduceL1", Kind.SUM, 18),
    _reduction("ReduceL2", Kind.SUM, 18),
    _reduction("ReduceSumSquare", Kind.SUM, 18),
    Operator("ReduceLogSum", reduce_axes(Kind.SUM, 18)),
    Operator("ReduceLogSumExp", reduce_axes(Kind.EXTREME, 18), mask=mask_extreme(-BIG)),
    Operator("ArgMax", arg_axes, discrete=True),
    Operator("ArgMin", arg_axes, discrete=True),
)
