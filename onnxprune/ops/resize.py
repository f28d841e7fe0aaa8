"""Resize and Upsample. An axis that keeps its size passes; only spatial axes are ever resized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from onnxprune.ops.lazy import F, kernels
from onnxprune.ops.registry import Operator
from onnxprune.ops.rules import AxisContext, GiveUp, MirrorContext, NodeView, PatchContext

__all__ = ["OPERATORS"]

_run = kernels("resize")


def resize_axes(c: AxisContext) -> None:
    """An axis that keeps its size passes: only spatial axes are ever resized."""
    if c.attr("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise GiveUp("sizes that depend on each other")
    if c.has(3):
        c.pinned(3, "the target sizes")
    x, sizes = c.axes(0), c.output_shape()
    out = []
    for expr, n in zip(x, sizes, strict=True):
        if n is not None and expr.size == n:
            out.append(expr)
        else:
            c.freeze("a spatial axis", expr)
            out.append(c.frozen(n, "a spatial axis"))
    c.output(*out)


def patch_resize(p: PatchContext) -> None:
    sizes = p.value(3) if p.has(3) else None
    if sizes is None or len(sizes) != len(p.before_out()):
        return
    p.want(3, np.array(p.after_out(), np.int64))


def zero_stays(node: NodeView, states: Sequence[float | None]) -> float | None:
    return 0.0 if states[0] == 0 else None


ATTRIBUTES: dict[str, tuple[str, Any]] = {  # the kernel's word for it, and the default of both
    "mode": ("mode", "nearest"),
    "coordinate_transformation_mode": ("coordinates", "half_pixel"),
    "nearest_mode": ("nearest", "round_prefer_floor"),
    "cubic_coeff_a": ("cubic", -0.75),
    "exclude_outside": ("exclude_outside", 0),
    "antialias": ("antialias", 0),
    "extrapolation_value": ("extrapolation", 0.0),
    "keep_aspect_ratio_policy": ("policy", "stretch"),
}


def modes(m: MirrorContext) -> dict[str, Any]:
    """What the kernel must know, as far as it differs from its defaults. Before opset 11 coordinates were asymmetric,
    and 'nearest' was the pixel below, or above where the image shrinks."""
    mode = m.attr("mode", "nearest")
    if m.node.op == "Upsample" or m.node.opset < 11:
        found = {"coordinates": "asymmetric", "nearest": "simple"}
        return found if mode == "nearest" else {"mode": mode, "coordinates": "asymmetric"}
    given = {word: m.attr(name, default) for name, (word, default) in ATTRIBUTES.items()}
    defaults = dict(ATTRIBUTES.values())
    unused = {"nearest"} if mode != "nearest" else {"cubic", "exclude_outside", "antialias"}
    return {word: value for word, value in given.items() if value != defaults[word] and word not in unused}


def floats(m: MirrorContext) -> bool:
    return getattr(m.dtype(0), "is_floating_point", True)


def empty(m: MirrorContext, i: int) -> bool:
    """True for an input that is absent or has no elements, which is how 'absent' was written first."""
    return not m.has(i) or m.shape(i) == (0,)


def scales_of(m: MirrorContext) -> list[float] | None:
    """The scales, where the model states them."""
    if m.node.op == "Upsample" and m.node.opset < 9:
        return [float(s) for s in m.attr("scales")]
    i = 1 if m.node.op == "Upsample" or m.node.opset < 11 else 2
    value = None if empty(m, i) else m.constant(i)
    return None if value is None else [float(s) for s in value.reshape(-1)]


def resize_mirror(m: MirrorContext) -> Any:
    """Inputs X, roi, scales, sizes; before opset 11 X, scales."""
    x, how, rank = m.tensor(0), modes(m), m.rank(0)
    old = m.node.op == "Upsample" or m.node.opset < 11
    axes = m.attr("axes")
    if axes is not None and (rank is None or [a % rank for a in axes] != list(range(rank))):
        how["axes"] = [int(a) for a in axes]
    scales = scales_of(m)
    if scales is not None:
        common = interpolated(x, scales, how, rank) if floats(m) else None
        return m.call(_run.resize_by, x, scales, **roi(m, how), **how) if common is None else common
    at = 1 if old else 2
    if not empty(m, at):
        return m.call(_run.resize_by, x, m.call(_run.to_floats, m.tensor(at)), **roi(m, how), **how)
    return m.call(_run.resize_to, x, m.ints(3), **roi(m, how), **how)


def roi(m: MirrorContext, how: dict[str, Any]) -> dict[str, Any]:
    """The region of interest, which only one mode reads."""
    if how.get("coordinates") != "tf_crop_and_resize":
        return {}
    value = m.constant(1)
    if value is not None:
        return {"roi": [float(v) for v in value.reshape(-1)]}
    return {"roi": m.call(_run.to_floats, m.tensor(1))}


def interpolated(x: Any, scales: list[float], how: dict[str, Any], rank: int | None) -> Any:
    """One call of torch's own where that is known to compute the same for every size; None elsewhere.

    Scales are exact in binary, so that both find the same sizes.
    """
    if rank not in (3, 4, 5) or len(scales) != rank or scales[0] != 1 or scales[1] != 1:
        return None
    factors = tuple(scales[2:])
    mode, coordinates = how.get("mode", "nearest"), how.get("coordinates", "half_pixel")
    if set(how) - {"mode", "coordinates", "nearest"}:
        return None
    if mode == "nearest":
        rule = (coordinates, how.get("nearest", "round_prefer_floor"))
        if rule in NEAREST and all(f in WHOLE for f in factors):
            return F.interpolate(x, scale_factor=factors, mode="nearest")
        return None
    smooth = {("linear", 3): "linear", ("linear", 4): "bilinear", ("linear", 5): "trilinear", ("cubic", 4): "bicubic"}
    same = coordinates == "half_pixel" or (coordinates == "pytorch_half_pixel" and min(factors) >= 2)
    if (mode, rank) in smooth and same and all((64 * f).is_integer() for f in factors):
        return F.interpolate(x, scale_factor=factors, mode=smooth[mode, rank], align_corners=False)
    return None


# With whole factors all of these read pixel k for the results from k * factor to (k + 1) * factor - 1.
NEAREST = {
    ("asymmetric", "floor"),
    ("asymmetric", "simple"),
    ("tf_half_pixel_for_nn", "floor"),
    *(("half_pixel", rule) for rule in ("round_prefer_floor", "round_prefer_ceil")),
}
WHOLE = range(1, 17)  # beyond, torch's multiplication with 1 / factor may end below a whole number

OPERATORS = (
    Operator("Resize", resize_axes, zero_stays, patch=patch_resize, mirror=resize_mirror, fixed=frozenset({1, 2})),
    Operator("Upsample", resize_axes, zero_stays, patch=patch_resize, mirror=resize_mirror, fixed=frozenset({1})),
)
