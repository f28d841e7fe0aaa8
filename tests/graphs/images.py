"""Blocks for images (N, C, H, W)."""

from __future__ import annotations

import numpy as np

from tests.graphs.attention import attention
from tests.graphs.builder import EPSILON, Builder, Tensor
from tests.graphs.layers import activation, batch_norm, channelwise, conv, linear

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


def channel_shuffle(b: Builder, x: Tensor) -> Tensor:
    c, h, w = (x.size(k) for k in (1, 2, 3))
    groups = b.pick([g for g in range(2, c + 1) if c % g == 0] or [1])
    y = b.reshape(x, [From(0), groups, From(1, over=groups), h, w])
    y = b.transpose(y, 0, 2, 1, 3, 4)
    return b.reshape(y, [From(0), c, h, w])


def channel_gather(b: Builder, x: Tensor) -> Tensor:
    """Channels picked by constant indices: a permutation, a part, or some twice."""
    c = x.size(1)
    order = list(range(c))
    way = b.pick(["rotate", "part", "twice", "reverse"])
    if way == "rotate":
        k = b.choose.integer(0, c - 1)
        order = order[k:] + order[:k]
    elif way == "part":
        order = order[: max(1, c - b.choose.integer(0, c - 1))]
    elif way == "twice":
        order = order + order[:1]
    else:
        order = order[::-1]
    return b.node("Gather", [x, b.constant(order)], (x.shape[0], len(order), *x.shape[2:]), axis=1)


def pixel_shuffle(b: Builder, x: Tensor) -> Tensor:
    out = b.pick([1, 2, 3])
    y = conv(b, x, out * 4)
    h, w = y.size(2), y.size(3)
    if b.chance():
        return b.node("DepthToSpace", [y], (y.shape[0], out, 2 * h, 2 * w), blocksize=2, mode=b.pick(["CRD", "DCR"]))
    y = b.reshape(y, [From(0), From(1, over=4), 2, 2, h, w])
    return b.reshape(b.transpose(y, 0, 1, 4, 2, 5, 3), [From(0), out, 2 * h, 2 * w])


def space_to_depth(b: Builder, x: Tensor) -> Tensor:
    """By the operator, or as YOLO's Focus writes it: strided Slices side by side."""
    c, h, w = (x.size(k) for k in (1, 2, 3))
    if h % 2 or w % 2:
        return x
    if b.chance():
        return b.node("SpaceToDepth", [x], (x.shape[0], 4 * c, h // 2, w // 2), blocksize=2)
    parts = [b.slice(b.slice(x, 2, i, h, 2), 3, j, w, 2) for j in (0, 1) for i in (0, 1)]
    return b.concat(parts, 1)


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


def padded_shortcut(b: Builder, x: Tensor) -> Tensor:
    """The ResNet 'option A' shortcut: zero channels are added to x."""
    low, high = b.choose.integer(0, 2), b.choose.integer(1, 3)
    c = x.size(1) + low + high
    pads = [0, low, 0, 0, 0, high, 0, 0]
    short = b.node(
        "Pad", [x, b.constant(pads), *([b.scalar(0.0)] if b.chance() else [])], (x.shape[0], c, *x.shape[2:])
    )
    return b.add(short, conv(b, x, c))


def spatial_pad(b: Builder, x: Tensor) -> Tensor:
    shape = (x.shape[0], x.shape[1], x.size(2) + 2, x.size(3) + 1)
    mode = b.pick(["constant", "reflect", "edge"]) if min(x.size(2), x.size(3)) > 1 else "constant"
    return b.node("Pad", [x, b.constant([0, 0, 1, 1, 0, 0, 1, 0])], shape, mode=mode)


def pooled(b: Builder, x: Tensor) -> Tensor:
    h, w = x.size(2), x.size(3)
    if min(h, w) < 2:
        return x
    op = b.pick(["MaxPool", "AveragePool"])
    return b.node(op, [x], (*x.shape[:2], h // 2, w // 2), kernel_shape=[2, 2], strides=[2, 2])


def resized(b: Builder, x: Tensor) -> Tensor:
    if x.size(2) > 6:
        return x
    region = b.constant(np.zeros(0, np.float32)) if b.opset < 13 else None
    scales = b.constant(np.array([1, 1, 2, 2], np.float32))
    return b.node("Resize", [x, region, scales], (*x.shape[:2], 2 * x.size(2), 2 * x.size(3)), mode="nearest")


def instance_norm(b: Builder, x: Tensor) -> Tensor:
    c = x.size(1)
    return b.node("InstanceNormalization", [x, b.vector(c, 0.5, 1.5), b.vector(c)], x.shape, epsilon=EPSILON)


def group_norm(b: Builder, x: Tensor) -> Tensor:
    """By the operator, or as torch exports it: InstanceNormalization over groups, then the affine part."""
    c, h, w = (x.size(k) for k in (1, 2, 3))
    groups = b.pick([g for g in range(2, c + 1) if c % g == 0] or [1])
    if b.opset >= 21 and b.chance():
        return b.node("GroupNormalization", [x, b.vector(c, 0.5, 1.5), b.vector(c)], x.shape, num_groups=groups,
                      epsilon=EPSILON)
    y = b.reshape(x, [From(0), groups, c // groups * h * w])
    ones = b.initializer(np.ones(groups, np.float32))
    y = b.node("InstanceNormalization", [y, ones, b.initializer(np.zeros(groups, np.float32))], y.shape,
               epsilon=EPSILON)
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
