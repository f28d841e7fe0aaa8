"""Operators over the spatial axes of an image: pooling, sampling, regions. The channel axis passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from onnxprune.ops.conv import padding, symmetric
from onnxprune.ops.lazy import F, kernels, torch
from onnxprune.ops.registry import Operator
from onnxprune.ops.rules import AxisContext, MirrorContext, NodeView

__all__ = ["OPERATORS"]

_run, _regions = kernels("pool"), kernels("regions")


def spatial_axes(c: AxisContext) -> None:
    """Batch and channel pass; spatial axes are new, also in a second output (indices)."""
    x = c.axes(0)
    c.freeze("a spatial axis", *x[2:])
    for j in range(len(c.node.outputs)):
        c.output(*x[:2], *(c.frozen(n, "a spatial axis") for n in c.output_shape(j)[2:]), j=j)


def sampled_axes(c: AxisContext) -> None:
    """GridSample: the grid is spatial."""
    x = c.axes(0)
    c.equal(x[0], c.axes(1)[0])
    c.freeze("a spatial axis", *x[2:], *c.axes(1)[1:])
    c.output(x[0], x[1], *(c.frozen(n, "a spatial axis") for n in c.output_shape()[2:]))


def roi_axes(c: AxisContext) -> None:
    x = c.axes(0)
    sizes = c.output_shape()
    c.freeze("regions are cut out of it", x[0], *x[2:])
    c.output(c.frozen(sizes[0]), x[1], *(c.frozen(n, "a spatial axis") for n in sizes[2:]))


def zero_stays(node: NodeView, states: Sequence[float | None]) -> float | None:
    return 0.0 if states[0] == 0 else None


def same(node: NodeView, states: Sequence[float | None]) -> float | None:
    return states[0]


@dataclass(frozen=True)
class Windows:
    """A pooling node: sizes per spatial axis, paddings in front and at the end."""

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    pads: list[Any]
    ceil: bool

    @property
    def direct(self) -> bool:
        """True where torch takes the padding: the same on both sides, and no more than half a kernel."""
        return symmetric(self.pads) and all(p <= k // 2 for p, k in zip(self.pads, self.kernel, strict=False))

    @property
    def before(self) -> list[Any]:
        return self.pads[: len(self.kernel)]

    @property
    def after(self) -> list[Any]:
        return self.pads[len(self.kernel) :]

    @property
    def arguments(self) -> tuple[Any, ...]:
        """As the kernels take them."""
        return self.kernel, self.strides, self.before, self.after, self.dilations, self.ceil


def pooling(m: MirrorContext, x: Any) -> Windows:
    kernel = [int(k) for k in m.attr("kernel_shape")]
    rank = len(kernel)
    if not 1 <= rank <= 3:
        raise m.unsupported(f"pooling over {rank} axes")
    strides, dilations = list(m.attr("strides") or [1] * rank), list(m.attr("dilations") or [1] * rank)
    ceil = bool(m.attr("ceil_mode", 0)) and not m.attr("auto_pad", "NOTSET").startswith("SAME")
    return Windows(kernel, strides, dilations, padding(m, x, kernel, strides, dilations), ceil)


def max_pool_mirror(m: MirrorContext) -> Any:
    x = m.tensor(0)
    w = pooling(m, x)
    if len(m.node.outputs) > 1 and m.node.outputs[1]:
        both = m.call(_run.max_pool_positions, x, *w.arguments, bool(m.attr("storage_order", 0)))
        return both[0], both[1]
    if not w.direct or not getattr(m.dtype(0), "is_floating_point", True):
        return m.call(_run.max_pool, x, *w.arguments)
    function = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(w.kernel) - 1]
    return function(x, tuple(w.kernel), tuple(w.strides), tuple(w.before), tuple(w.dilations), ceil_mode=w.ceil)


def average_pool_mirror(m: MirrorContext) -> Any:
    x = m.tensor(0)
    w = pooling(m, x)
    counted = bool(m.attr("count_include_pad", 0))
    if not w.direct or any(d != 1 for d in w.dilations):
        return m.call(_run.average_pool, x, *w.arguments, counted)
    function = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(w.kernel) - 1]
    return function(x, tuple(w.kernel), tuple(w.strides), tuple(w.before), w.ceil, counted)


def lp_pool_mirror(m: MirrorContext) -> Any:
    x = m.tensor(0)
    return m.call(_run.lp_pool, x, *pooling(m, x).arguments, float(m.attr("p", 2)))


def max_unpool_mirror(m: MirrorContext) -> Any:
    """Inputs X, positions, output_shape."""
    kernel = list(m.attr("kernel_shape"))
    strides, pads = list(m.attr("strides") or [1] * len(kernel)), list(m.attr("pads") or [0] * (2 * len(kernel)))
    shape = m.ints(2) if m.has(2) else None
    return m.call(_run.max_unpool, m.tensor(0), m.tensor(1), kernel, strides, pads, shape)


def over_image(reduce: Callable[[MirrorContext, Any, Any], Any]) -> Callable[[MirrorContext], Any]:
    """The rule of a reduction over all spatial axes, which stay with size 1."""

    def mirror(m: MirrorContext) -> Any:
        x, rank = m.tensor(0), m.rank(0)
        return reduce(m, x, m.call(_run.spatial, x) if rank is None else tuple(range(2, rank)))

    return mirror


global_average = over_image(lambda m, x, axes: x.mean(axes, keepdim=True))
global_max = over_image(lambda m, x, axes: x.amax(axes, keepdim=True))
global_lp = over_image(lambda m, x, axes: torch.linalg.vector_norm(x, float(m.attr("p", 2)), axes, keepdim=True))


def max_roi_pool_mirror(m: MirrorContext) -> Any:
    """Inputs X, rois."""
    rows, columns = m.attr("pooled_shape")
    return m.call(_regions.max_roi_pool, m.tensor(0), m.tensor(1), rows, columns, float(m.attr("spatial_scale", 1.0)))


def roi_align_mirror(m: MirrorContext) -> Any:
    """Inputs X, rois, numbers of the images."""
    half_pixel = m.node.opset >= 16 and m.attr("coordinate_transformation_mode", "half_pixel") == "half_pixel"
    return m.call(
        _regions.roi_align,
        *(m.tensor(i) for i in range(3)),
        rows=int(m.attr("output_height", 1)),
        columns=int(m.attr("output_width", 1)),
        sampling=int(m.attr("sampling_ratio", 0)),
        scale=float(m.attr("spatial_scale", 1.0)),
        half_pixel=half_pixel,
        largest=m.attr("mode", "avg") == "max",
    )


_SAMPLING = {"linear": "bilinear", "bilinear": "bilinear", "cubic": "bicubic", "bicubic": "bicubic"}


def grid_sample_mirror(m: MirrorContext) -> Any:
    mode = m.attr("mode", "linear")
    mode = _SAMPLING.get(mode, mode)
    if mode == "bicubic" and m.rank(0) not in (4, None):
        raise m.unsupported("cubic interpolation over more than two axes")
    edges, align = m.attr("padding_mode", "zeros"), bool(m.attr("align_corners", 0))
    return F.grid_sample(m.tensor(0), m.tensor(1), mode, edges, align)


def affine_grid_mirror(m: MirrorContext) -> Any:
    return F.affine_grid(m.tensor(0), m.ints(1), bool(m.attr("align_corners", 0)))


def col2im_mirror(m: MirrorContext) -> Any:
    """Inputs X (N, C * block, blocks), the image's sizes, the block's sizes."""
    known = m.constant(2)
    strides, dilations, pads = (m.attr(name) or None for name in ("strides", "dilations", "pads"))
    if known is not None and known.size == 2 and (pads is None or symmetric(pads)):
        inside, block = tuple((pads or (0, 0))[:2]), tuple(int(k) for k in known)
        return F.fold(m.tensor(0), m.ints(1), block, tuple(dilations or (1, 1)), inside, tuple(strides or (1, 1)))
    return m.call(_run.col2im, m.tensor(0), m.ints(1), m.ints(2), strides, pads, dilations)


OPERATORS = (
    Operator("MaxPool", spatial_axes, zero_stays, mirror=max_pool_mirror, carries=True),
    Operator("AveragePool", spatial_axes, zero_stays, mirror=average_pool_mirror),
    Operator("LpPool", spatial_axes, zero_stays, mirror=lp_pool_mirror),
    Operator("GlobalLpPool", spatial_axes, zero_stays, mirror=global_lp),
    Operator("GlobalAveragePool", spatial_axes, same, mirror=global_average),
    Operator("GlobalMaxPool", spatial_axes, same, mirror=global_max, carries=True),
    Operator("MaxUnpool", mirror=max_unpool_mirror),
    Operator(
        "GridSample",
        sampled_axes,
        zero_stays,
        keeps=frozenset({1}),
        mirror=grid_sample_mirror,
        fixed=frozenset({1}),
    ),
    Operator("AffineGrid", mirror=affine_grid_mirror),
    Operator("Col2Im", mirror=col2im_mirror),
    Operator("RoiAlign", roi_axes, zero_stays, mirror=roi_align_mirror, fixed=frozenset({1})),
    Operator("MaxRoiPool", roi_axes, zero_stays, mirror=max_roi_pool_mirror, fixed=frozenset({1})),
)
