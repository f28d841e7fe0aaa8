"""Blocks that move the axes of images (N, C, H, W) about: shuffles, windows, merges, padding, repetition."""

from __future__ import annotations

from tests.graphs.builder import Builder, From, Tensor
from tests.graphs.layers import activation, conv, linear

__all__ = ["REARRANGED"]


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
        mode = {"mode": b.pick(["CRD", "DCR"])} if b.opset >= 11 else {}
        return b.node("DepthToSpace", [y], (y.shape[0], out, 2 * h, 2 * w), blocksize=2, **mode)
    y = b.reshape(y, [From(0), From(1, over=4), 2, 2, h, w])
    return b.reshape(b.transpose(y, 0, 1, 4, 2, 5, 3), [From(0), out, 2 * h, 2 * w])


def space_to_depth(b: Builder, x: Tensor) -> Tensor:
    """By the operator, or as YOLO's Focus writes it: strided Slices side by side."""
    c, h, w = (x.size(k) for k in (1, 2, 3))
    if h % 2 or w % 2:
        return x
    if b.chance() or b.opset < 10:
        return b.node("SpaceToDepth", [x], (x.shape[0], 4 * c, h // 2, w // 2), blocksize=2)
    parts = [b.slice(b.slice(x, 2, i, h, 2), 3, j, w, 2) for j in (0, 1) for i in (0, 1)]
    return b.concat(parts, 1)


def padded_shortcut(b: Builder, x: Tensor) -> Tensor:
    """The ResNet 'option A' shortcut: zero channels are added to x."""
    low, high = b.choose.integer(0, 2), b.choose.integer(1, 3)
    short = b.pad(x, [0, low, 0, 0], [0, high, 0, 0])
    return b.add(short, conv(b, x, short.size(1)))


def spatial_pad(b: Builder, x: Tensor) -> Tensor:
    mode = b.pick(["constant", "reflect", "edge"]) if min(x.size(2), x.size(3)) > 1 else "constant"
    return b.pad(x, [0, 0, 1, 1], [0, 0, 1, 0], mode)


def windows(b: Builder, x: Tensor) -> Tensor:
    """A layer inside windows of 2x2 pixels, which become part of the batch (Swin)."""
    c, h, w = (x.size(k) for k in (1, 2, 3))
    if h % 2 or w % 2:
        return x
    y = b.reshape(b.transpose(x, 0, 2, 3, 1), [From(0), h // 2, 2, w // 2, 2, c])
    y = b.transpose(y, 0, 1, 3, 2, 4, 5)
    y = b.node("Reshape", [y, b.constant([-1, 4, c])], ("windows", 4, c))
    y = activation(b, linear(b, y))
    d = y.size(2)
    y = b.node("Reshape", [y, b.constant([-1, h // 2, w // 2, 2, 2, d])], (x.shape[0], h // 2, w // 2, 2, 2, d))
    y = b.reshape(b.transpose(y, 0, 1, 3, 2, 4, 5), [From(0), h, w, d])
    return b.transpose(y, 0, 3, 1, 2)


def patch_merging(b: Builder, x: Tensor) -> Tensor:
    """Four neighbouring pixels side by side, channels last (Swin)."""
    h, w = x.size(2), x.size(3)
    if h % 2 or w % 2 or b.opset < 10:
        return x
    y = b.transpose(x, 0, 2, 3, 1)
    y = b.concat([b.slice(b.slice(y, 1, i, h, 2), 2, j, w, 2) for j in (0, 1) for i in (0, 1)], 3)
    return b.transpose(linear(b, y), 0, 3, 1, 2)


def tiled(b: Builder, x: Tensor) -> Tensor:
    """Every channel twice, one whole set after the other."""
    return b.node("Tile", [x, b.constant([1, 2, 1, 1])], (x.shape[0], 2 * x.size(1), *x.shape[2:]))


REARRANGED = (
    channel_shuffle,
    channel_gather,
    pixel_shuffle,
    space_to_depth,
    padded_shortcut,
    spatial_pad,
    windows,
    patch_merging,
    tiled,
)
