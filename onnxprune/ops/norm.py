"""Normalisations. Over axes that stay whole they are elementwise; over an axis that is pruned, a root mean square is
compensated exactly and a mean and variance are not.

With q = kept / all: RMSNorm over the kept units equals the original with gamma / sqrt(q) and epsilon / q, since the
removed units were zero (../shared methods, section 3.7; checked to 1e-15 there).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod, sqrt
from typing import Any

from onnxprune.ops.lazy import kernels
from onnxprune.ops.registry import Operator
from onnxprune.ops.rules import AxisContext, GiveUp, Kind, MaskContext, MirrorContext, NodeView, PatchContext

__all__ = ["OPERATORS"]

_run = kernels("norm")


def batch_norm_axes(c: AxisContext) -> None:
    x = c.axes(0)
    channel = x[1] if len(x) > 1 else x[0]
    if c.attr("training_mode", 0) or (c.node.opset < 14 and len(c.node.outputs) > 1):  # statistics of the batch
        for k in range(len(x)):
            if k != 1:
                c.contract(Kind.NORM, (0, k), through=True)
    for i in range(1, 5):
        c.equal(channel, c.axes(i)[0])
    c.output(*x)
    for j in range(1, len(c.node.outputs)):
        c.output(channel, j=j)


def affine_dead(scale: int, bias: int):
    """y = normalised(x) * scale + bias."""

    def dead(node: NodeView, states: Sequence[float | None]) -> float | None:
        plain = bias >= len(node.inputs) or not node.inputs[bias]
        return 0.0 if (states[scale] == 0 or states[0] == 0) and (plain or states[bias] == 0) else None

    return dead


def batch_norm_dead(node: NodeView, states: Sequence[float | None]) -> float | None:
    return 0.0 if states[1] == 0 and states[2] == 0 else None


def instance_norm_axes(c: AxisContext) -> None:
    x = c.axes(0)
    c.equal(x[1], c.axes(1)[0], c.axes(2)[0])
    for k in range(2, len(x)):
        c.contract(Kind.NORM, (0, k), through=True)
    c.output(*x)


def trailing_norm(c: AxisContext, kind: Kind, first: int, *affine: int) -> None:
    """Statistics over the axes from `first` on; the affine parameters follow the trailing axes."""
    x = c.axes(0)
    for k in range(first % len(x), len(x)):
        c.contract(kind, (0, k), through=True)
    for i in affine:
        if c.has(i):
            for axis, target in zip(reversed(c.axes(i)), reversed(x), strict=False):
                if axis.size != 1:
                    c.equal(axis, target)


def layer_norm(kind: Kind):
    def axes(c: AxisContext) -> None:
        x = c.axes(0)
        first = int(c.attr("axis", -1)) % len(x)
        trailing_norm(c, kind, first, 1, 2)
        c.output(*x)
        for j in range(1, len(c.node.outputs)):
            c.output(*x[:first], *(c.frozen(1) for _ in x[first:]), j=j)

    return axes


def skip_norm(kind: Kind, gamma: int, bias: int):
    """Inputs x, skip, gamma, (beta,) bias; outputs the norm, two statistics, and x + skip + bias."""

    def axes(c: AxisContext) -> None:
        x, skip = c.axes(0), c.axes(1)
        for a, b in zip(reversed(x), reversed(skip), strict=False):
            if a.size == b.size:
                c.equal(a, b)
        trailing_norm(c, kind, -1, *range(gamma, bias + 1))
        c.output(*x)
        for j in (1, 2):
            if len(c.node.outputs) > j and c.node.outputs[j]:
                c.output(*x[:-1], c.frozen(1), j=j)
        if len(c.node.outputs) > 3 and c.node.outputs[3]:
            c.output(*x, j=3)

    return axes


def skip_dead(node: NodeView, states: Sequence[float | None]) -> float | None:
    """All outputs at once: the normalised one needs the affine parameters, the sum its terms."""
    present = [s for s, name in zip(states, node.inputs, strict=True) if name]
    return 0.0 if all(s == 0 for s in present) else None


def skip_shape(node, inputs):
    x = inputs[0]
    return [x, None, None, x][: len(node.outputs)]


def mask_norm(kind: Kind, first: int | None, gamma: int, beta: int | None, default_epsilon: float = 1e-5):
    """The normalisation, spelled out, over the kept units of the axes from `first` on (None: `axis`, or the last).

    Of a normalisation with channels in front (InstanceNormalization), gamma and beta are laid along axis 1.
    """

    def mask(m: MaskContext) -> None:
        if any(m.node.outputs[1:]):
            raise GiveUp("further outputs of a normalisation")
        rank = m.rank(0)
        start = int(m.node.attributes.get("axis", -1)) % rank if first is None else first
        axes = list(range(start, rank))
        kept = m.constant(m.mask(0))
        count = m.constant(1.0 / (m.kept_fraction(0) * m.size(0, axes)))
        epsilon = m.constant(m.node.attributes.get("epsilon", default_epsilon))
        x = m.before("Mul", [m.input(0), kept])
        if kind is Kind.NORM:
            mean = m.before("Mul", [m.summed(x, axes), count])
            x = m.before("Mul", [m.before("Sub", [x, mean]), kept])
        square = m.before("Mul", [m.summed(m.before("Mul", [x, x]), axes), count])
        y = m.before("Div", [x, m.before("Sqrt", [m.before("Add", [square, epsilon])])])
        affine = [m.input(i) if m.has(i) else "" for i in (gamma, beta) if i is not None]
        if first is not None:
            affine = [m.laid(i, 1) for i in (gamma, beta) if i is not None]
        if len(affine) > 1 and affine[1]:
            m.become("Add", [m.before("Mul", [y, affine[0]]), affine[1]])
        else:
            m.become("Mul", [y, affine[0]])

    return mask


def patch_rms(first: int, gamma: int, default_epsilon: float = 1e-5):
    """gamma / sqrt(q) and epsilon / q where the removed units vanish exactly."""

    def patch(p: PatchContext) -> None:
        rank = len(p.before(0))
        start = int(p.attr("axis", first)) % rank
        q = prod(p.share(0, k) for k in range(start, rank))
        if q == 1:
            return
        p.scale(gamma, 1 / sqrt(q))
        p.set_attr("epsilon", float(p.attr("epsilon", default_epsilon)) / q)

    return patch


def group_norm_axes(c: AxisContext) -> None:
    """X.C is (groups inner); the mean and variance are over inner and the spatial axes."""
    x, groups = c.axes(0), int(c.attr("num_groups"))
    if x[1].size % groups:
        raise GiveUp("the groups do not divide the channels")
    g, inner = c.split(x[1], groups)
    c.note("groups", g)
    if inner.size > 1:
        c.contract(Kind.NORM, (0, 1), over=inner, through=True)
    c.freeze("a spatial axis", *x[2:])
    for i in (1, 2):
        axis = c.axes(i)[0]
        c.equal(axis, x[1] if axis.size == x[1].size else g)
    c.output(*x)


def patch_group_norm(p: PatchContext) -> None:
    p.set_attr("num_groups", p.noted("groups"))


def softmax_axes(c: AxisContext) -> None:
    """Before opset 13 everything from the axis on is one distribution."""
    x = c.axes(0)
    old = c.node.opset < 13
    axis = int(c.attr("axis", 1 if old else -1)) % max(len(x), 1)
    c.freeze(f"a {c.node.op} runs over it", *(x[axis:] if old else x[axis : axis + 1]))
    c.output(*x)


def lrn_axes(c: AxisContext) -> None:
    c.freeze("a local response normalisation runs over neighbouring channels", c.axes(0)[1])
    c.output(*c.axes(0))


def lp_normalization_axes(c: AxisContext) -> None:
    x = c.axes(0)
    c.contract(Kind.SUM, (0, int(c.attr("axis", -1)) % len(x)), through=True)
    c.output(*x)


def mean_variance_axes(c: AxisContext) -> None:
    x = c.axes(0)
    for k in c.attr("axes", [0, 2, 3]):
        c.contract(Kind.NORM, (0, int(k) % len(x)), through=True)
    c.output(*x)


def zero_stays(node: NodeView, states: Sequence[float | None]) -> float | None:
    return 0.0 if states[0] == 0 else None


def _as_input(node, inputs):
    return [inputs[0], None, None][: len(node.outputs)]


def batch_norm_mirror(m: MirrorContext) -> Any:
    scale, bias, mean, variance = (m.tensor(i) for i in range(1, 5))
    momentum, eps = 1 - float(m.attr("momentum", 0.9)), float(m.attr("epsilon", 1e-5))
    return m.call(_run.batch_norm, m.tensor(0), mean, variance, scale, bias, m.training, momentum, eps)


OPERATORS = (
    Operator(
        "BatchNormalization",
        batch_norm_axes,
        batch_norm_dead,
        keeps=frozenset({3, 4}),
        gamma=1,
        broadcasts=True,
        mirror=batch_norm_mirror,
        fixed=frozenset({3, 4}),
    ),
    Operator("InstanceNormalization", instance_norm_axes, affine_dead(1, 2), mask=mask_norm(Kind.NORM, 2, 1, 2)),
    Operator("LayerNormalization", layer_norm(Kind.NORM), affine_dead(1, 2), mask=mask_norm(Kind.NORM, None, 1, 2)),
    Operator(
        "RMSNormalization",
        layer_norm(Kind.RMS),
        affine_dead(1, 2),
        patch=patch_rms(-1, 1),
        shape=_as_input,
        mask=mask_norm(Kind.RMS, None, 1, None),
    ),
    Operator(
        "SimplifiedLayerNormalization", layer_norm(Kind.RMS), affine_dead(1, 2), patch=patch_rms(-1, 1), shape=_as_input
    ),
    Operator("com.microsoft::SkipLayerNormalization", skip_norm(Kind.NORM, 2, 4), skip_dead, shape=skip_shape),
    Operator(
        "com.microsoft::SkipSimplifiedLayerNormalization",
        skip_norm(Kind.RMS, 2, 3),
        skip_dead,
        patch=patch_rms(-1, 2, 1e-12),
        shape=skip_shape,
    ),
    Operator("GroupNormalization", group_norm_axes, affine_dead(1, 2), patch=patch_group_norm, shape=_as_input),
    Operator("Softmax", softmax_axes),
    Operator("LogSoftmax", softmax_axes),
    Operator("Hardmax", softmax_axes, discrete=True),
    Operator("LRN", lrn_axes, zero_stays),
    Operator("LpNormalization", lp_normalization_axes, zero_stays),
    Operator("MeanVarianceNormalization", mean_variance_axes, shape=_as_input),
)
