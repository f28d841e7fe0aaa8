"""Blocks for images (N, C, H, W)."""

from __future__ import annotations

import numpy as np

from tests.graphs.attention import attention
from tests.graphs.builder import EPSILON, FAR, Builder, From, Tensor
from tests.graphs.layers import activation, batch_norm, channelwise, conv, layer_norm, linear, rms_norm

__all__ = ["IMAGE", "image_to_rows", "to_sequence"]


def plain(b: Builder, x: Tensor) -> Tensor:
    """Convolution, maybe a normalisation, an activation."""
    y = conv(b, x, stride=b.pick([1, 2]) if x.size(2) > 2 else 1)
    y = batch_norm(b, y) if b.chance() else y
    return activation(b, y) if b.chance() else y


def grouped(b: Builder, x: Tensor) -> Tensor:
    c = x.size(1)
    groups = b.pick([g for g in range(2, c + 1) if c % g == 0] or [1])
    return conv(b, x, groups * b.pick([1, 2, 3]), groups=groups)


def depthwise(b: Builder, x: Tensor) -> Tensor:
    """Expand, depthwise, project: an inverted residual without the sum."""
    y = conv(b, x, kernel=1) if b.chance() else x
    y = conv(b, y, y.size(1) * b.pick([1, 1, 2]), groups=y.size(1), kernel=3)
    return conv(b, y, kernel=1) if b.chance() else y


def conv_transpose(b: Builder, x: Tensor) -> Tensor:
    c = x.size(1)
    groups = b.pick([1, *(g for g in (2, c) if c % g == 0)])
    per_group, stride = b.pick([1, 2, 3, 4]), b.pick([1, 2]) if x.size(2) <= 6 else 1
    weight = b.weight((c, per_group, stride, stride), c // groups)
    inputs = [x, weight, *([b.vector(groups * per_group)] if b.chance() else [])]
    shape = (x.shape[0], groups * per_group, x.size(2) * stride, x.size(3) * stride)
    return b.node("ConvTranspose", inputs, shape, strides=[stride, stride], group=groups)


def residual(b: Builder, x: Tensor) -> Tensor:
    """x + f(x), where f goes through a width of its own or back to that of x."""
    y = activation(b, conv(b, x)) if b.chance() else x
    y = conv(b, y, x.size(1))
    short = conv(b, x, x.size(1), kernel=1) if b.chance(4) else x
    total = b.add(short, y)
    return activation(b, total) if b.chance() else total


def dense(b: Builder, x: Tensor) -> Tensor:
    """Channels of several branches, side by side."""
    parts = [conv(b, x), *([x] if b.chance() else [conv(b, x)])]
    return b.concat(parts, 1)


def split_channels(b: Builder, x: Tensor) -> Tensor:
    """Cut the channels, work on a part, put them together again (maybe in another order)."""
    c = x.size(1)
    if c < 2:
        return x
    first = c // 2 if c % 2 == 0 and b.chance() else b.choose.integer(1, c - 1)
    a, rest = b.split(x, 1, [first, c - first])
    a = conv(b, a, a.size(1) if b.chance() else None)
    way = b.pick(["concat", "swapped", "both"])
    if way == "both":
        rest = conv(b, rest)
    return b.concat([rest, a] if way == "swapped" else [a, rest], 1)


def gated(b: Builder, x: Tensor) -> Tensor:
    """GLU over the channels."""
    y = conv(b, x, 2 * b.pick([2, 3, 4]))
    a, gate = b.split(y, 1, [y.size(1) // 2] * 2)
    return b.mul(a, b.elementwise("Sigmoid", gate))


def squeeze_excite(b: Builder, x: Tensor) -> Tensor:
    c = x.size(1)
    y = b.node("GlobalAveragePool", [x], (x.shape[0], c, 1, 1)) if b.chance() else b.reduce("ReduceMean", x, [2, 3])
    if b.chance():
        y = conv(b, activation(b, conv(b, y, kernel=1)), c, kernel=1)
    else:
        y = b.node("Flatten", [y], (x.shape[0], c)) if b.chance() else b.squeeze(y, [2, 3])
        y = linear(b, activation(b, linear(b, y)), c)
        y = b.unsqueeze(y, [2, 3]) if b.chance() else b.reshape(y, [From(0), From(1), 1, 1])
    return b.mul(x, b.elementwise(b.pick(["Sigmoid", "HardSigmoid"]), y))


def spatial_attention(b: Builder, x: Tensor) -> Tensor:
    """A map over the pixels from the mean over the channels."""
    mean = b.reduce(b.pick(["ReduceMean", "ReduceSum", "ReduceMax"]), x, [1])
    return b.mul(x, b.elementwise("Sigmoid", conv(b, mean, 1)))


def pooled(b: Builder, x: Tensor) -> Tensor:
    h, w = x.size(2), x.size(3)
    if min(h, w) < 2:
        return x
    op = b.pick(["MaxPool", "AveragePool"])
    return b.node(op, [x], (*x.shape[:2], h // 2, w // 2), kernel_shape=[2, 2], strides=[2, 2])


def instance_norm(b: Builder, x: Tensor) -> Tensor:
    c = x.size(1)
    return b.node("InstanceNormalization", [x, b.vector(c, 0.5, 1.5), b.vector(c)], x.shape, epsilon=EPSILON)


def group_norm(b: Builder, x: Tensor) -> Tensor:
    """By the operator, or as torch exports it: InstanceNormalization over groups, then the affine part."""
    c, h, w = (x.size(k) for k in (1, 2, 3))
    groups = b.pick([g for g in range(2, c + 1) if c % g == 0] or [1])
    if b.opset >= 21 and b.chance():
        return b.node(
            "GroupNormalization", [x, b.vector(c, 0.5, 1.5), b.vector(c)], x.shape, num_groups=groups, epsilon=EPSILON
        )
    y = b.reshape(x, [From(0), groups, c // groups * h * w])
    ones = b.initializer(np.ones(groups, np.float32))
    y = b.node(
        "InstanceNormalization", [y, ones, b.initializer(np.zeros(groups, np.float32))], y.shape, epsilon=EPSILON
    )
    y = b.reshape(y, [From(0), c, h, w])
    y = b.mul(y, b.unsqueeze(b.vector(c, 0.5, 1.5), [1, 2]))
    return b.add(y, b.unsqueeze(b.vector(c), [1, 2]))


def spatial_softmax(b: Builder, x: Tensor) -> Tensor:
    c, h, w = (x.size(k) for k in (1, 2, 3))
    y = b.node("Softmax", [b.reshape(x, [From(0), From(1), h * w])], (x.shape[0], c, h * w), axis=2)
    return b.mul(b.reshape(y, [From(0), From(1), h, w]), x)


def image_attention(b: Builder, x: Tensor) -> Tensor:
    """Attention over the pixels, on the way through a sequence and back."""
    c, h, w = (x.size(k) for k in (1, 2, 3))
    y = attention(b, to_sequence(b, x))
    y = linear(b, y, c)
    return b.reshape(b.transpose(y, 0, 2, 1), [From(0), From(1), h, w])


def resized(b: Builder, x: Tensor) -> Tensor:
    return b.upsample(x) if x.size(2) <= 6 else x


def convnext(b: Builder, x: Tensor) -> Tensor:
    """Depthwise, then channels last: normalise, widen, narrow, scale; added to x."""
    c = x.size(1)
    y = b.transpose(conv(b, x, c, groups=c, kernel=3), 0, 2, 3, 1)
    y = layer_norm(b, y) if b.chance() else rms_norm(b, y)
    y = linear(b, activation(b, linear(b, y)), c)
    y = b.mul(y, b.vector(c, 0.5, 1.5)) if b.chance() else y
    return b.add(x, b.transpose(y, 0, 3, 1, 2))


def channel_attention(b: Builder, x: Tensor) -> Tensor:
    """Every channel is replaced by a mixture of all, by their products over the pixels: one axis twice in a tensor."""
    n, c, h, w = x.shape
    f = b.reshape(x, [From(0), From(1), x.size(2) * x.size(3)])
    scores = b.node("MatMul", [f, b.transpose(f, 0, 2, 1)], (n, c, c))
    scores = b.mul(scores, b.scalar(1 / (x.size(2) * x.size(3))))
    scores = b.node("Softmax", [scores], scores.shape, axis=2) if b.chance() else activation(b, scores)
    y = b.node("MatMul", [scores, f], f.shape)
    return b.add(b.reshape(y, [From(0), From(1), h, w]), x)


def dynamic_filter(b: Builder, x: Tensor) -> Tensor:
    """A 1x1 convolution whose weights a layer computes from the image itself."""
    n, c = x.shape[0], x.size(1)
    out = b.pick([2, 3, 4])
    pooled_ = b.reduce("ReduceMean", x, [2, 3], keep=False)
    w = b.reshape(linear(b, pooled_, out * c), [From(0), out, c])
    f = b.reshape(x, [From(0), From(1), x.size(2) * x.size(3)])
    y = b.node("MatMul", [w, f], (n, out, f.size(2)))
    return b.reshape(y, [From(0), From(1), x.size(2), x.size(3)])


def global_context(b: Builder, x: Tensor) -> Tensor:
    """The mean over the pixels, spread over all of them again and put beside the channels (ASPP)."""
    y = activation(b, conv(b, b.reduce("ReduceMean", x, [2, 3]), kernel=1))
    c, h, w = y.size(1), x.size(2), x.size(3)
    written = not isinstance(x.shape[0], str) and b.chance()
    target = b.constant([x.size(0), c, h, w]) if written else b.sizes(x, [From(0), c, From(2), From(3)])
    return b.concat([b.node("Expand", [y, target], (x.shape[0], c, h, w)), x], 1)


def unit_length(b: Builder, x: Tensor) -> Tensor:
    """Every pixel's channels divided by their length, as torch's normalize exports it."""
    length = b.clip(b.reduce("ReduceL2", x, [1]), 0.05, None)
    if b.chance():
        shape = b.node("Shape", [x], (4,))
        length = b.node("Expand", [length, shape], x.shape)
    return b.elementwise("Div", x, length)


def several(b: Builder, x: Tensor) -> Tensor:
    """Sum, Mean, Max or Min of three branches."""
    c = b.pick([2, 3, 4, 6])
    return b.elementwise(b.pick(["Sum", "Mean", "Max", "Min"]), *(conv(b, x, c, kernel=1) for _ in range(3)))


def where(b: Builder, x: Tensor) -> Tensor:
    """Some pixels from one branch and the others from another, or from nowhere."""
    mask = b.constant(b.values.random((x.size(2), x.size(3))) < 0.5)
    other = conv(b, x, x.size(1)) if b.chance() else b.scalar(0.0)
    return b.elementwise("Where", mask, x, other)


def coordinates(b: Builder, x: Tensor) -> Tensor:
    """Two constant channels beside those of x (CoordConv)."""
    h, w = x.size(2), x.size(3)
    if isinstance(x.shape[0], int):
        return b.concat([x, b.weight((x.size(0), 2, h, w), 1)], 1)
    grid = b.node("Expand", [b.weight((1, 2, h, w), 1), b.sizes(x, [From(0), 2, h, w])], (x.shape[0], 2, h, w))
    return b.concat([grid, x], 1)


def extra_input(b: Builder, x: Tensor) -> Tensor:
    """A second image from outside, added or put beside."""
    c = x.size(1) if b.chance(4) else 2
    other = b.input((x.shape[0], c, x.size(2), x.size(3)))
    return b.concat([other, x], 1) if b.chance() or c != x.size(1) else b.add(x, other)


def barrier(b: Builder, x: Tensor) -> Tensor:
    """Operators over the channels that let none of them go."""
    way = b.pick(["softmax", "lrn", "backwards", "conv over channels"])
    if way == "softmax":
        return b.node("Softmax", [x], x.shape, axis=1)
    if way == "lrn":
        return b.node("LRN", [x], x.shape, size=3)
    if way == "backwards" and b.opset >= 10:
        bounds = [b.constant([-1]), b.constant([-FAR - 1]), b.constant([1]), b.constant([-1])]
        return b.node("Slice", [x, *bounds], x.shape)
    y = b.squeeze(b.reduce("ReduceMean", x, [2, 3]), [3])
    y = b.node("Conv", [b.transpose(y, 0, 2, 1), b.weight((1, 1, 3))], (x.shape[0], 1, x.size(1)), pads=[1, 1])
    return b.mul(x, b.elementwise("Sigmoid", b.unsqueeze(b.transpose(y, 0, 2, 1), [3])))


def to_sequence(b: Builder, x: Tensor) -> Tensor:
    return b.transpose(b.reshape(x, [From(0), From(1), x.size(2) * x.size(3)]), 0, 2, 1)


def image_to_rows(b: Builder, x: Tensor) -> Tensor:
    c, h, w = (x.size(k) for k in (1, 2, 3))
    way = b.pick(["pool", "flatten", "reshape", "mean"])
    if way == "mean":
        return b.reduce("ReduceMean", x, [2, 3], keep=False)
    if way == "pool":
        x, h, w = b.node("GlobalAveragePool", [x], (x.shape[0], c, 1, 1)), 1, 1
    if way == "reshape":
        return b.reshape(x, [From(0), c * h * w])
    return b.node("Flatten", [x], (x.shape[0], c * h * w))


IMAGE = (
    plain,
    conv,
    residual,
    grouped,
    depthwise,
    conv_transpose,
    dense,
    split_channels,
    gated,
    squeeze_excite,
    spatial_attention,
    pooled,
    resized,
    instance_norm,
    group_norm,
    batch_norm,
    channelwise,
    activation,
    spatial_softmax,
    image_attention,
    convnext,
    channel_attention,
    dynamic_filter,
    global_context,
    unit_length,
    several,
    where,
    coordinates,
    extra_input,
    barrier,
)
