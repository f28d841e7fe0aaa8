"""Operators that only rearrange: axes are moved, merged, factored or repeated, and values stay what they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from onnxprune.axes.expr import Expr, stretches
from onnxprune.ops.lazy import F, kernels
from onnxprune.ops.registry import Operator, Role
from onnxprune.ops.rules import AxisContext, GiveUp, MirrorContext, NodeView, PatchContext

__all__ = ["OPERATORS", "carried", "reshape"]

_run = kernels("layout")


def carried(node: NodeView, states: Sequence[float | None]) -> float | None:
    """The value of the first input, rearranged."""
    return states[0]


def reshape(c: AxisContext, axes: Sequence[Expr], sizes: Sequence[int | None]) -> list[Expr]:
    """Match the shortest stretches of equal product, and merge or factor the axes inside each.

    Heads, channel shuffle, window partition and pixel shuffle need nothing more.
    """
    result: list[Expr | None] = [c.frozen(1) if n == 1 else None for n in sizes]
    source = [e for e in axes if e.size != 1]
    target = [k for k, n in enumerate(sizes) if n != 1]
    known = all(e.size > 0 for e in source) and all((sizes[k] or 0) > 0 for k in target)
    if not known:
        return _reshape_unknown(c, source, sizes, target, result)
    for left, right in stretches([e.size for e in source], [sizes[k] or 0 for k in target]):
        before, after = source[left], target[right]
        if len(after) == 1:
            result[after[0]] = c.product(*before)
        elif after:
            pieces = [c.fresh(sizes[k] or 0) for k in after]
            c.equal(c.product(*before), c.product(*pieces))
            for k, piece in zip(after, pieces, strict=True):
                result[k] = piece
    return [c.frozen(n) if e is None else e for e, n in zip(result, sizes, strict=True)]


def _reshape_unknown(
    c: AxisContext, source: list[Expr], sizes: Sequence[int | None], target: list[int], result: list[Expr | None]
) -> list[Expr]:
    """Some size is unknown: pair equal sizes from both ends, and freeze what is left in the middle."""
    for pick in (0, -1):
        while source and target and source[pick].size > 0 and source[pick].size == sizes[target[pick]]:
            result[target.pop(pick)] = source.pop(pick)
    c.freeze("its size is unknown where it is reshaped", *source)
    return [c.frozen(n) if e is None else e for e, n in zip(result, sizes, strict=True)]


def reshape_axes(c: AxisContext) -> None:
    if c.node.opset >= 5:
        c.pinned(1, "the target sizes")
    c.output(*reshape(c, c.axes(0), c.output_shape()))


def patch_target(p: PatchContext) -> None:
    """Reshape: the sizes that are spelled out follow the axes; 0 and -1 follow by themselves."""
    target = p.attr("shape") if p.node.opset < 5 else p.value(1)
    if target is None:
        return
    after = p.after_out()
    spelled = [int(t) if t <= 0 else after[k] for k, t in enumerate(np.asarray(target).reshape(-1))]
    if p.node.opset < 5:
        p.set_attr("shape", spelled)
    else:
        p.want(1, np.array(spelled, np.int64))


def flatten_axes(c: AxisContext) -> None:
    x = c.axes(0)
    axis = int(c.attr("axis", 1))
    axis += len(x) if axis < 0 else 0
    c.output(*(_merged(c, part) for part in (x[:axis], x[axis:])))


def _merged(c: AxisContext, part: Sequence[Expr]) -> Expr:
    return c.product(*part) if part else c.frozen(1)


def transpose_axes(c: AxisContext) -> None:
    x = c.axes(0)
    c.output(*(x[k] for k in c.attr("perm", range(len(x))[::-1])))


def listed_axes(c: AxisContext | PatchContext, since: int) -> list[int] | None:
    """The axes of a Squeeze, Unsqueeze or reduction: an attribute before opset `since`, an input from then on."""
    if c.node.opset < since:
        found = c.attr("axes")
        return None if found is None else [int(k) for k in found]
    if not c.has(1):
        return None
    value = c.value(1)
    if value is None:
        raise GiveUp("the axes are computed from the data")
    return [int(k) for k in np.asarray(value).reshape(-1)]


def squeeze_axes(c: AxisContext) -> None:
    x = c.axes(0)
    chosen = listed_axes(c, 13)
    gone = {k for k, e in enumerate(x) if e.size == 1} if chosen is None else {k % len(x) for k in chosen}
    c.output(*(e for k, e in enumerate(x) if k not in gone))


def unsqueeze_axes(c: AxisContext) -> None:
    x = list(c.axes(0))
    chosen = listed_axes(c, 13) or []
    rank = len(x) + len(chosen)
    for k in sorted(k % rank for k in chosen):
        x.insert(k, c.frozen(1))
    c.output(*x)


def expand_axes(c: AxisContext) -> None:
    """A repeated axis is fresh: grouped-query attention falls out of it."""
    target = c.pinned(1, "the target sizes").reshape(-1)
    x, sizes = c.axes(0), c.output_shape()
    padded = [c.frozen(1)] * (len(sizes) - len(x)) + list(x)
    repeated = [k + len(target) - len(sizes) for k in range(len(sizes))]
    out = []
    for expr, n, k in zip(padded, sizes, repeated, strict=True):
        fresh = n is not None and k >= 0 and c.constant(1, k)
        out.append(expr if expr.size == n else c.fresh(n or 0) if fresh else c.frozen(n))
    c.output(*out)


def patch_expand(p: PatchContext) -> None:
    target = p.value(1)
    if target is None:
        return
    after = p.after_out()[-len(target) :] if len(target) else ()
    p.want(1, np.array([int(t) if t == 1 else n for t, n in zip(target, after, strict=True)], np.int64))


def tile_axes(c: AxisContext) -> None:
    repeats = [int(r) for r in c.pinned(1, "the repeats").reshape(-1)]
    copies = [c.fresh(r) if r > 1 and c.constant(1, k) else c.frozen(r) for k, r in enumerate(repeats)]
    for k, copy in enumerate(copies):
        c.note(f"repeat{k}", copy)
    c.output(*(c.product(copy, e) for copy, e in zip(copies, c.axes(0), strict=True)))


def patch_tile(p: PatchContext) -> None:
    repeats = p.value(1)
    if repeats is not None:
        p.want(1, np.array([p.noted(f"repeat{k}") for k in range(len(repeats))], np.int64))


def depth_to_space_axes(c: AxisContext) -> None:
    x, b = c.axes(0), int(c.attr("blocksize"))
    c.freeze("a spatial axis", *x[2:])
    out = c.fresh(x[1].size // (b * b))
    blocks = [c.frozen(b, "a pixel shuffle's block"), c.frozen(b, "a pixel shuffle's block")]
    order = [*blocks, out] if c.attr("mode", "DCR") == "DCR" else [out, *blocks]
    c.equal(x[1], c.product(*order))
    c.output(x[0], out, *(c.frozen(n, "a spatial axis") for n in c.output_shape()[2:]))


def space_to_depth_axes(c: AxisContext) -> None:
    x, b = c.axes(0), int(c.attr("blocksize"))
    c.freeze("a spatial axis", *x[2:])
    block = c.frozen(b * b, "a pixel shuffle's block")
    order = (block, x[1]) if c.attr("mode", "DCR") == "DCR" else (x[1], block)
    c.output(x[0], c.product(*order), *(c.frozen(n, "a spatial axis") for n in c.output_shape()[2:]))


def _reshaped(n: NodeView, x: Any, shape: Any = None) -> Any:
    shape = n.attributes.get("shape") if shape is None else shape
    target = [int(s) for s in np.asarray(shape).reshape(-1)]
    if not n.attributes.get("allowzero", 0):
        target = [x.shape[k] if s == 0 else s for k, s in enumerate(target)]
    return x.reshape(target)


def _squeezed(n: NodeView, x: Any, axes: Any = None) -> Any:
    axes = n.attributes.get("axes") if axes is None else axes
    return np.squeeze(x, None if axes is None else tuple(int(a) for a in np.asarray(axes).reshape(-1)))


def _unsqueezed(n: NodeView, x: Any, axes: Any = None) -> Any:
    axes = n.attributes.get("axes") if axes is None else axes
    return np.expand_dims(x, tuple(int(a) for a in np.asarray(axes).reshape(-1)))


def _flattened(n: NodeView, x: Any) -> Any:
    axis = n.attributes.get("axis", 1)
    return x.reshape(int(np.prod(x.shape[:axis])), -1)


def _transposed(n: NodeView, x: Any) -> Any:
    return np.transpose(x, n.attributes.get("perm"))


def _expanded(n: NodeView, x: Any, shape: Any) -> Any:
    return (
        x * np.ones(tuple(int(s) for s in shape), x.dtype)
        if x.dtype != bool
        else np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(int(s) for s in shape))).copy()
    )


def flatten_mirror(m: MirrorContext) -> Any:
    x, axis, rank = m.tensor(0), int(m.attr("axis", 1)), m.rank(0)
    if axis < 0:
        if rank is None:
            raise m.unsupported("its axis counts from the back, and the rank is unknown")
        axis += rank
    if axis == 0:
        return x.reshape(1, -1)
    if axis == rank:
        return x.reshape(-1, 1)
    if axis == 1:
        return x.flatten(1)
    return x.flatten(0, axis - 1).flatten(1)


def reshape_mirror(m: MirrorContext) -> Any:
    x, allowzero = m.tensor(0), bool(m.attr("allowzero", 0))
    sizes = list(m.attr("shape")) if m.node.opset < 5 else m.ints(1)
    if not isinstance(sizes, list):
        return m.call(_run.reshape, x, sizes, allowzero)
    if not allowzero:
        sizes = [x.size(k) if isinstance(n, int) and n == 0 else n for k, n in enumerate(sizes)]
    return x.reshape(sizes)


def transpose_mirror(m: MirrorContext) -> Any:
    perm = m.attr("perm")
    if perm is None and m.rank(0) is None:
        return m.call(_run.reversed_axes, m.tensor(0))
    return m.tensor(0).permute(tuple(perm if perm is not None else range(m.rank(0) or 0)[::-1]))


def stated_axes(m: MirrorContext) -> Any:
    """The axes of a Squeeze or Unsqueeze: a list, or a proxy of one that is computed from data."""
    if m.node.opset < 13:
        found = m.attr("axes")
        return None if found is None else [int(k) for k in found]
    return m.ints(1) if m.has(1) else None


def squeeze_mirror(m: MirrorContext) -> Any:
    axes = stated_axes(m)
    if axes is None:
        return m.tensor(0).squeeze()
    if not isinstance(axes, list):
        return m.call(_run.squeeze, m.tensor(0), axes)
    return m.tensor(0).squeeze(axes[0] if len(axes) == 1 else tuple(axes))


def unsqueeze_mirror(m: MirrorContext) -> Any:
    axes = stated_axes(m)
    if isinstance(axes, list) and len(axes) == 1:
        return m.tensor(0).unsqueeze(axes[0])
    return m.call(_run.unsqueeze, m.tensor(0), axes)


def expand_mirror(m: MirrorContext) -> Any:
    """As torch has it where every size that is asked for is a number; an axis keeps its size where that is 1."""
    x, sizes, rank = m.tensor(0), m.ints(1), m.rank(0)
    if rank is None or not isinstance(sizes, list) or not all(isinstance(n, int) for n in sizes) or len(sizes) < rank:
        return m.call(_run.expand, x, sizes)
    new = len(sizes) - rank
    return x.expand([-1 if n == 1 and k >= new else n for k, n in enumerate(sizes)])


def depth_to_space_mirror(m: MirrorContext) -> Any:
    x, b = m.tensor(0), int(m.attr("blocksize"))
    if m.attr("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, b)
    n, c, h, w = (x.size(k) for k in range(4))
    parts = x.reshape(n, b, b, c // (b * b), h, w).permute(0, 3, 4, 1, 5, 2)
    return parts.reshape(n, c // (b * b), h * b, w * b)


def space_to_depth_mirror(m: MirrorContext) -> Any:
    x, b = m.tensor(0), int(m.attr("blocksize"))
    n, c, h, w = (x.size(k) for k in range(4))
    order = (0, 3, 5, 1, 2, 4) if m.attr("mode", "DCR") == "DCR" else (0, 1, 3, 5, 2, 4)
    parts = x.reshape(n, c, h // b, b, w // b, b).permute(order)
    return parts.reshape(n, c * b * b, h // b, w // b)


OPERATORS = (
    Operator(
        "Reshape",
        reshape_axes,
        carried,
        patch=patch_target,
        evaluate=_reshaped,
        mirror=reshape_mirror,
        carries=True,
        role=Role.REARRANGES,
    ),
    Operator(
        "Flatten", flatten_axes, carried, evaluate=_flattened, mirror=flatten_mirror, carries=True, role=Role.REARRANGES
    ),
    Operator(
        "Transpose",
        transpose_axes,
        carried,
        evaluate=_transposed,
        mirror=transpose_mirror,
        carries=True,
        role=Role.TRANSPOSES,
    ),
    Operator(
        "Squeeze", squeeze_axes, carried, evaluate=_squeezed, mirror=squeeze_mirror, carries=True, role=Role.REARRANGES
    ),
    Operator(
        "Unsqueeze",
        unsqueeze_axes,
        carried,
        evaluate=_unsqueezed,
        mirror=unsqueeze_mirror,
        carries=True,
        role=Role.REARRANGES,
    ),
    Operator(
        "Expand",
        expand_axes,
        carried,
        patch=patch_expand,
        evaluate=_expanded,
        mirror=expand_mirror,
        carries=True,
        role=Role.EXPANDS,
    ),
    Operator(
        "Tile",
        tile_axes,
        carried,
        patch=patch_tile,
        evaluate=lambda n, x, r: np.tile(x, [int(k) for k in r]),
        mirror=lambda m: m.tensor(0).repeat(m.ints(1)),
        carries=True,
    ),
    Operator("DepthToSpace", depth_to_space_axes, carried, mirror=depth_to_space_mirror, carries=True),
    Operator("SpaceToDepth", space_to_depth_axes, carried, mirror=space_to_depth_mirror, carries=True),
)
