"""Normalisations. Over axes that stay whole they are elementwise; over an axis that is pruned, a root mean square is
compensated exactly and a mean and variance are not.

With q = kept / all: RMSNorm over the kept units equals the original with gamma / sqrt(q) and epsilon / q, since the
removed units were zero (to rounding: 1e-15 in float64).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod, sqrt
from typing import Any

import numpy as np

from onnxprune.ops.lazy import F, kernels
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
    """With its own statistics of the batch where the node is in training mode; before opset 14 its further outputs
    told that. Before opset 9 `spatial=0` asked for statistics of every place by itself."""
    x, (scale, bias, mean, variance) = m.tensor(0), (m.tensor(i) for i in range(1, 5))
    momentum, eps = 1 - float(m.attr("momentum", 0.9)), float(m.attr("epsilon", 1e-5))
    if m.attr("training_mode", 0) or (m.node.opset < 14 and any(m.node.outputs[1:])):
        if not any(m.used(j) for j in range(1, len(m.node.outputs))):
            return [m.call(_run.batch_norm_by_batch, x, scale, bias, eps)]
        found = m.call(_run.batch_norm_of_batch, x, mean, variance, scale, bias, momentum, eps)
        return [found[j] for j in range(len(m.node.outputs))]
    training = False if m.shared(3) or m.shared(4) else m.training
    if not m.attr("spatial", 1):
        each = (p.flatten() for p in (mean, variance, scale, bias))
        return m.call(_run.batch_norm, x.flatten(1), *each, training, momentum, eps).view_as(x)
    return m.call(_run.batch_norm, x, mean, variance, scale, bias, training, momentum, eps)


def instance_norm_mirror(m: MirrorContext) -> Any:
    return m.call(_run.instance_norm, m.tensor(0), m.tensor(1), m.tensor(2), float(m.attr("epsilon", 1e-5)))


def is_stored(m: MirrorContext, i: int) -> bool:
    """True for a tensor that the module holds, whose shape is the same for all inputs."""
    return m.has(i) and m.tensor(i).node.op == "get_attr"


def whole_shape(m: MirrorContext, axis: int, *affine: int) -> tuple[int, ...] | None:
    """The shape that is normalised, where stored parameters state it and none of them is broadcast."""
    image, shapes = m.shape(0), {m.shape(i) for i in affine}
    if image is None or len(shapes) != 1 or not all(is_stored(m, i) for i in affine):
        return None
    whole = tuple(n for n in shapes.pop() or () if n is not None)
    return whole if whole == image[axis % len(image) :] else None


def layer_norm_mirror(m: MirrorContext) -> Any:
    axis, eps = int(m.attr("axis", -1)), float(m.attr("epsilon", 1e-5))
    return layer_normed(m, m.tensor(0), (1, 2), axis, eps, m.node.outputs[1:])


def layer_normed(
    m: MirrorContext, x: Any, affine: tuple[int, int], axis: int, eps: float, further: Sequence[str]
) -> list[Any]:
    """[result, mean, inverse standard deviation], the latter only where `further` outputs want them."""
    scale, bias = (m.optional(i) for i in affine)
    if any(further):
        found = m.call(_run.layer_norm_statistics, x, scale, bias, axis, eps)
        return [found[0], *(as_declared(m, found[j], j) for j in (1, 2))]
    shape = whole_shape(m, axis, *(i for i in affine if m.has(i)))
    if shape is not None:
        return [F.layer_norm(x, shape, scale, bias, eps)]
    return [m.call(_run.layer_norm, x, scale, bias, axis, eps)]


def as_declared(m: MirrorContext, x: Any, j: int) -> Any:
    """Output j in its declared type: statistics are floats where the tensor is of halves."""
    dtype = m.output_dtype(j)
    return x if dtype is None or dtype == m.dtype(0) else x.to(dtype)


def rms_norm_mirror(m: MirrorContext) -> Any:
    axis, eps = int(m.attr("axis", -1)), float(m.attr("epsilon", 1e-5))
    return rms_normed(m, m.tensor(0), 1, axis, eps, m.node.outputs[1:], 1)


def rms_normed(
    m: MirrorContext, x: Any, gamma: int, axis: int, eps: float, further: Sequence[str], j: int
) -> list[Any]:
    """[result, inverse root mean square], the latter only where `further` outputs want it, as output j."""
    if any(further):
        found = m.call(_run.rms_norm_statistics, x, m.optional(gamma), axis, eps)
        return [found[0], as_declared(m, found[1], j)]
    shape = whole_shape(m, axis, gamma) if m.has(gamma) else None
    if shape is not None:
        return [F.rms_norm(x, shape, m.tensor(gamma), eps)]
    return [m.call(_run.rms_norm, x, m.optional(gamma), axis, eps)]


def skip_sum(m: MirrorContext, bias: int) -> Any:
    x = m.tensor(0) + m.tensor(1)
    return x + m.tensor(bias) if m.has(bias) else x


def skip_layer_norm_mirror(m: MirrorContext) -> Any:
    """Inputs x, skip, gamma, beta, bias; outputs the norm, mean, inverse standard deviation, and the sum."""
    x, eps = skip_sum(m, 4), float(m.attr("epsilon", 1e-12))
    found = layer_normed(m, x, (2, 3), -1, eps, m.node.outputs[1:3])
    return [*found, *[None] * (3 - len(found)), x]


def skip_rms_norm_mirror(m: MirrorContext) -> Any:
    """Inputs x, skip, gamma, bias; outputs the norm, nothing, inverse root mean square, and the sum."""
    x, eps = skip_sum(m, 3), float(m.attr("epsilon", 1e-12))
    found = rms_normed(m, x, 2, -1, eps, m.node.outputs[1:3], 2)
    return [found[0], None, found[1] if len(found) > 1 else None, x]


def group_norm_mirror(m: MirrorContext) -> Any:
    """Before opset 21 scale and bias were the groups'."""
    groups, eps = int(m.attr("num_groups")), float(m.attr("epsilon", 1e-5))
    tensors = (m.tensor(0), groups, m.tensor(1), m.tensor(2), eps)
    return m.call(_run.group_norm, *tensors) if m.node.opset < 21 else F.group_norm(*tensors)


def lrn_mirror(m: MirrorContext) -> Any:
    size, alpha = int(m.attr("size")), float(m.attr("alpha", 1e-4))
    beta, bias = float(m.attr("beta", 0.75)), float(m.attr("bias", 1.0))
    if size % 2 and m.rank(0) not in (2, None):
        return F.local_response_norm(m.tensor(0), size, alpha, beta, bias)
    return m.call(_run.local_response_norm, m.tensor(0), size, alpha, beta, bias)


def lp_normalization_mirror(m: MirrorContext) -> Any:
    return m.call(_run.lp_normalize, m.tensor(0), float(m.attr("p", 2)), int(m.attr("axis", -1)))


def mean_variance_mirror(m: MirrorContext) -> Any:
    return m.call(_run.mean_variance_norm, m.tensor(0), [int(k) for k in m.attr("axes", [0, 2, 3])])


def batch_norm_slope(node: NodeView, i: int, stored: Sequence[np.ndarray | None], rank: int) -> np.ndarray | None:
    gamma, variance = stored[1], stored[4]
    if gamma is None or variance is None:
        return None
    slope = gamma / np.sqrt(variance + node.attributes.get("epsilon", 1e-5))
    return slope.reshape(-1, *[1] * (rank - 2))


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
        running=frozenset({3, 4}),
        shift=lambda n, i: (3, -1, 1),
        slope=batch_norm_slope,
    ),
    Operator(
        "InstanceNormalization",
        instance_norm_axes,
        affine_dead(1, 2),
        mask=mask_norm(Kind.NORM, 2, 1, 2),
        mirror=instance_norm_mirror,
    ),
    Operator(
        "LayerNormalization",
        layer_norm(Kind.NORM),
        affine_dead(1, 2),
        mask=mask_norm(Kind.NORM, None, 1, 2),
        mirror=layer_norm_mirror,
    ),
    Operator(
        "RMSNormalization",
        layer_norm(Kind.RMS),
        affine_dead(1, 2),
        patch=patch_rms(-1, 1),
        shape=_as_input,
        mask=mask_norm(Kind.RMS, None, 1, None),
        mirror=rms_norm_mirror,
    ),
    Operator(
        "SimplifiedLayerNormalization",
        layer_norm(Kind.RMS),
        affine_dead(1, 2),
        patch=patch_rms(-1, 1),
        shape=_as_input,
        mirror=rms_norm_mirror,
    ),
    Operator(
        "com.microsoft::SkipLayerNormalization",
        skip_norm(Kind.NORM, 2, 4),
        skip_dead,
        shape=skip_shape,
        mirror=skip_layer_norm_mirror,
        shift=lambda n, i: (4, 1, None),
    ),
    Operator(
        "com.microsoft::SkipSimplifiedLayerNormalization",
        skip_norm(Kind.RMS, 2, 3),
        skip_dead,
        patch=patch_rms(-1, 2, 1e-12),
        shape=skip_shape,
        mirror=skip_rms_norm_mirror,
        shift=lambda n, i: (3, 1, None),
    ),
    Operator(
        "GroupNormalization",
        group_norm_axes,
        affine_dead(1, 2),
        patch=patch_group_norm,
        shape=_as_input,
        mirror=group_norm_mirror,
    ),
    Operator("LRN", lrn_axes, zero_stays, mirror=lrn_mirror),
    Operator("LpNormalization", lp_normalization_axes, zero_stays, mirror=lp_normalization_mirror),
    Operator("MeanVarianceNormalization", mean_variance_axes, shape=_as_input, mirror=mean_variance_mirror),
)
