"""Convolutions: Conv, ConvTranspose and their integer, quantised and fused forms.

With g groups the input channels are (g i), the output channels (g o) and the weight's axes (g o) and i: pruning g
removes whole groups, pruning o or i the same place in every group. A depthwise Conv is i = o = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from onnx import TensorProto

from onnxprune.axes.expr import Expr
from onnxprune.ops.lazy import F, kernels, torch
from onnxprune.ops.quantised import centred, real, rounded, scaled
from onnxprune.ops.registry import Operator, Role
from onnxprune.ops.rules import AxisContext, GiveUp, Kind, Linear, MirrorContext, NodeView, PatchContext, Shape, Term

__all__ = ["OPERATORS", "padding", "sides", "symmetric"]

_run = kernels("conv")
_exact = kernels("quant")


def convolution(c: AxisContext, x: int, w: int, channelwise: Sequence[int], *, transposed: bool = False) -> Expr:
    """Relate X.C, the weight's axes and the inputs along the output channels; returns the output's channel axis."""
    data, weight = c.axes(x), c.axes(w)
    groups = int(c.attr("group", 1))
    if (
        len(data) < 3
        or len(weight) != len(data)
        or data[1].size != weight[1 - transposed].size * (1 if transposed else groups)
    ):
        raise GiveUp("the weight does not fit the input")
    consuming, producing = (0, 1) if transposed else (1, 0)
    if groups == 1:
        out = weight[producing]
        c.contract(Kind.PRODUCT, (x, 1), (w, consuming), fold=not transposed and unpadded(c))
    else:
        g = c.note("groups", c.fresh(groups))
        i = c.fresh(data[1].size // groups)
        o = c.fresh(weight[0].size // groups) if not transposed else weight[1]
        c.equal(data[1], c.product(g, i))
        c.equal(weight[0], c.product(g, i if transposed else o))
        if not transposed:
            c.equal(weight[1], i)
        if i.size > 1:
            c.contract(Kind.PRODUCT, (x, 1), (w, consuming), over=i)
        out = c.product(g, o)
    for k in channelwise:
        if c.has(k) and c.axes(k) and c.axes(k)[0].size == out.size:
            c.equal(c.axes(k)[0], out)
    c.freeze("a kernel's extent", *weight[2:])
    return out


def unpadded(c: AxisContext) -> bool:
    """True where no zero-padding mixes with the input."""
    return c.attr("auto_pad", "NOTSET") in ("NOTSET", "VALID") and not any(c.attr("pads", []))


def image(c: AxisContext, x: int, out: Expr) -> None:
    """The output of something that slides over the spatial axes."""
    c.freeze("a spatial axis", *c.axes(x)[2:])
    c.output(c.axes(x)[0], out, *(c.frozen(n, "a spatial axis") for n in c.output_shape()[2:]))


def conv_axes(c: AxisContext) -> None:
    image(c, 0, convolution(c, 0, 1, (2,)))


def conv_transpose_axes(c: AxisContext) -> None:
    image(c, 0, convolution(c, 0, 1, (2,), transposed=True))


def fused_conv_axes(c: AxisContext) -> None:
    """An activation, and optionally a tensor Z added before it."""
    out = convolution(c, 0, 1, (2,))
    if c.has(3):
        c.equal(c.axes(3)[1], out)
        c.equal(c.axes(3)[0], c.axes(0)[0])
        c.freeze("a spatial axis", *c.axes(3)[2:])
    image(c, 0, out)


def conv_integer_axes(c: AxisContext) -> None:
    image(c, 0, convolution(c, 0, 1, (3,)))


def qlinear_conv_axes(c: AxisContext) -> None:
    """Inputs x, its scale and zero point, w, its scale and zero point, y's scale and zero point, B."""
    image(c, 0, convolution(c, 0, 3, (4, 5, 8)))


def deform_conv_axes(c: AxisContext) -> None:
    """Offsets and mask are per offset group, which an input channel belongs to: those channels stay."""
    out = convolution(c, 0, 1, (3,))
    if int(c.attr("offset_group", 1)) > 1:
        c.freeze("several offset groups", c.axes(0)[1])
    for k in (2, 4):
        if c.has(k):
            c.freeze("offsets of a deformable convolution", *c.axes(k))
    image(c, 0, out)


def conv_dead(x: int, w: int, *added: int):
    """Zero where the weight's rows (or, per group, the input) are zero and so is everything added."""

    def dead(node: NodeView, states: Sequence[float | None]) -> float | None:
        terms = (states[k] for k in added if k < len(states) and node.inputs[k])
        return 0.0 if (states[x] == 0 or states[w] == 0) and all(t == 0 for t in terms) else None

    return dead


_RESTING_AT_ZERO = {"Relu", "Tanh", "LeakyRelu", "Clip", "HardSwish", ""}


def fused_conv_dead(node: NodeView, states: Sequence[float | None]) -> float | None:
    resting = node.attributes.get("activation", "") in _RESTING_AT_ZERO
    return conv_dead(0, 1, 2, 3)(node, states) if resting else None


def conv_macs(w: int):
    def macs(node: NodeView, inputs: Sequence[tuple[Expr, ...]], outputs: Sequence[tuple[Expr, ...]]) -> list[Term]:
        weight, out = inputs[w], outputs[0]
        return [(1.0, (*out, *weight[1:]))]

    return macs


def spatial(m: MirrorContext, w: int) -> tuple[list[Any], list[int], list[int]]:
    """Kernel sizes, strides and dilations of a convolution whose weight is input w."""
    rank = m.rank(w)
    if not m.attr("kernel_shape") and rank is None:
        raise m.unsupported("the rank of its weight is unknown")
    kernel = list(m.attr("kernel_shape") or [m.size(w, k) for k in range(2, rank or 0)])
    if not 1 <= len(kernel) <= 3:
        raise m.unsupported(f"a convolution over {len(kernel)} axes")
    return kernel, list(m.attr("strides", [1] * len(kernel))), list(m.attr("dilations", [1] * len(kernel)))


def padding(m: MirrorContext, x: Any, kernel: Sequence[Any], strides: list[int], dilations: list[int]) -> list[Any]:
    """Paddings before and after each axis, as in `pads`; proxies where `auto_pad` makes them depend on sizes."""
    rank = len(kernel)
    auto = m.attr("auto_pad", "NOTSET")
    if auto not in ("SAME_UPPER", "SAME_LOWER"):
        return [0] * (2 * rank) if auto == "VALID" else list(m.attr("pads") or [0] * (2 * rank))
    pads: list[Any] = [0] * (2 * rank)
    for k in range(rank):
        span = dilations[k] * (kernel[k] - 1) + 1
        total = span - 1 if strides[k] == 1 else m.call(_run.same_padding, x.size(2 + k), span, strides[k])
        less = total // 2
        pads[k], pads[rank + k] = (less, total - less) if auto == "SAME_UPPER" else (total - less, less)
    return pads


def symmetric(pads: Sequence[Any]) -> bool:
    """True for paddings that torch's own operators take."""
    rank = len(pads) // 2
    return all(isinstance(p, int) and p >= 0 for p in pads) and list(pads[:rank]) == list(pads[rank:])


def sides(pads: Sequence[Any]) -> list[Any]:
    """`pads` in the order in which F.pad takes them."""
    rank = len(pads) // 2
    return [p for k in reversed(range(rank)) for p in (pads[k], pads[rank + k])]


def convolved(m: MirrorContext) -> Any:
    """A convolution; padding that isn't symmetric becomes a node of its own."""
    return convolution_of(m, m.tensor(0), m.tensor(1), m.optional(2))


def convolution_of(m: MirrorContext, x: Any, weight: Any, bias: Any, *, w: int = 1, whole: bool = False) -> Any:
    """A convolution of these tensors; the weight is input w. whole: they hold whole numbers, and so does the result."""
    kernel, strides, dilations = spatial(m, w)
    function = (F.conv1d, F.conv2d, F.conv3d)[len(kernel) - 1]
    pads = padding(m, x, kernel, strides, dilations)
    inside = tuple(pads[: len(kernel)]) if symmetric(pads) else (0,) * len(kernel)
    x = x if symmetric(pads) else F.pad(x, sides(pads))
    settings = (tuple(strides), inside, tuple(dilations), int(m.attr("group", 1)))
    return m.call(_exact.convolution, x, weight, *settings) if whole else function(x, weight, bias, *settings)


def conv_integer_mirror(m: MirrorContext) -> Any:
    """Whole numbers less their zero points; sums are exact up to 2^24."""
    y = convolution_of(m, centred(m, 0, 2), centred(m, 1, 3, axis=0), None, whole=True)
    return m.carry(y, TensorProto.INT32)


def qlinear_conv_mirror(m: MirrorContext) -> Any:
    """x, its scale and zero point; w, its scales and zero points, per output channel; those of y; and a bias in units
    of both scales."""
    x, weight = real(m, 0, 1, 2), real(m, 3, 4, 5, axis=0)
    bias = scaled(m, 8, 1, 4) if m.has(8) else None
    return rounded(m, convolution_of(m, x, weight, bias, w=3), 6, 7)


FUSED = {
    "Relu": lambda y, _: torch.relu(y),
    "Tanh": lambda y, _: torch.tanh(y),
    "Sigmoid": lambda y, _: torch.sigmoid(y),
    "LeakyRelu": lambda y, p: F.leaky_relu(y, *p[:1]),
    "Clip": lambda y, p: torch.clamp(y, *p[:2]),
    "HardSigmoid": lambda y, p: torch.clamp(p[0] * y + p[1], 0, 1),
    "HardSwish": lambda y, _: F.hardswish(y),
    "": lambda y, _: y,
}


def fused_conv_mirror(m: MirrorContext) -> Any:
    """A convolution, then the sum with Z, then the activation."""
    activation = m.attr("activation", "")
    if activation not in FUSED:
        raise m.unsupported(f"the activation {activation}")
    y = convolved(m)
    y = y + m.tensor(3) if m.has(3) else y
    return FUSED[activation](y, [float(p) for p in m.attr("activation_params", [])])


def conv_transpose_mirror(m: MirrorContext) -> Any:
    """A result of length L is cut by `pads`; output_padding gives back some of what the end loses. That is torch's
    padding and output_padding as long as the latter is smaller than the stride or the dilation."""
    kernel, strides, dilations = spatial(m, 1)
    rank, groups = len(kernel), int(m.attr("group", 1))
    extra = list(m.attr("output_padding") or [0] * rank)
    tensors = (m.tensor(0), m.tensor(1), m.optional(2))
    auto = m.attr("auto_pad", "NOTSET")
    if m.attr("output_shape"):
        wanted = list(m.attr("output_shape"))[-rank:]
        upper = auto == "SAME_UPPER"
        return m.call(_run.conv_transpose_to, *tensors, strides, dilations, groups, extra, wanted, upper)
    pads = [0] * (2 * rank) if auto == "VALID" else list(m.attr("pads") or [0] * (2 * rank))
    before, after = pads[:rank], [p - e for p, e in zip(pads[rank:], extra, strict=True)]
    if auto.startswith("SAME"):  # the result is stride times as long as the input
        for k in range(rank):
            beyond = dilations[k] * (kernel[k] - 1) + 1 - strides[k]
            total = m.call(max, beyond + extra[k], 0) if not isinstance(beyond, int) else max(beyond + extra[k], 0)
            before[k] = total // 2 if auto == "SAME_UPPER" else total - total // 2
            after[k] = beyond - before[k]
    fits = all(
        isinstance(b, int) and b >= 0 and 0 <= b - a < max(s, d)
        for b, a, s, d in zip(before, after, strides, dilations, strict=True)
    )
    if not fits:
        return m.call(_run.conv_transpose, *tensors, strides, dilations, groups, before, after)
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    lengthened = tuple(b - a for b, a in zip(before, after, strict=True))
    return function(*tensors, tuple(strides), tuple(before), lengthened, groups, tuple(dilations))


def deform_conv_mirror(m: MirrorContext) -> Any:
    """Inputs X, W, offset, B, mask."""
    kernel, strides, dilations = spatial(m, 1)
    if len(kernel) != 2:
        raise m.unsupported(f"a deformable convolution over {len(kernel)} axes")
    pads = list(m.attr("pads") or [0] * 4)
    tensors = (m.tensor(0), m.tensor(1), m.tensor(2), m.optional(3), m.optional(4))
    groups, offset_groups = int(m.attr("group", 1)), int(m.attr("offset_group", 1))
    return m.call(_run.deform_conv, *tensors, strides, pads[:2], dilations, groups, offset_groups)


def conv_transpose_macs(
    node: NodeView, inputs: Sequence[tuple[Expr, ...]], outputs: Sequence[tuple[Expr, ...]]
) -> list[Term]:
    data, weight = inputs[0], inputs[1]
    return [(1.0, (*data, *weight[1:]))]


def conv_linear(node: NodeView, w: int, shapes: Sequence[Shape]) -> Linear | None:
    """Per group, a row is what lies under the kernel: x (b g c at taps) times w (g o c taps)."""
    form = kernel_form(node, w, shapes)
    if form is None:
        return None
    (out, per_group, *kernel), groups, strides, dilations, places, taps = form
    auto, given = node.attributes.get("auto_pad", "NOTSET"), node.attributes.get("pads") or [0] * (2 * len(kernel))

    def unfold(x: Any) -> Any:
        pads = list(given) if auto == "NOTSET" else [0] * (2 * len(kernel))
        if auto.startswith("SAME"):
            for k, size in enumerate(kernel):
                span = dilations[k] * (size - 1) + 1
                total = _run.same_padding(x.size(2 + k), span, strides[k])
                less, more = total // 2, total - total // 2
                pads[k], pads[len(kernel) + k] = (less, more) if auto == "SAME_UPPER" else (more, less)
        return windows(F.pad(x, sides(pads)), kernel, strides, dilations).unflatten(1, (groups, per_group))

    return Linear(
        0,
        w,
        (("b", "g", "c", *places, *taps), ("g", "o", "c", *taps), ("b", "g", "o", *places)),
        (groups, out // groups, per_group, *kernel),
        bias=2,
        unfold=unfold,
        unfold_output=lambda y: y.unflatten(1, (groups, -1)),
        channel=1,
    )


def conv_transpose_linear(node: NodeView, w: int, shapes: Sequence[Shape]) -> Linear | None:
    """A convolution of x with zeros between its elements, with the kernel the other way round."""
    form = kernel_form(node, w, shapes)
    if form is None or node.attributes.get("output_shape") or node.attributes.get("auto_pad", "NOTSET") != "NOTSET":
        return None
    (channels, out, *kernel), groups, strides, dilations, places, taps = form
    rank = len(kernel)
    pads, extra = (node.attributes.get(n) or [0] * m for n, m in (("pads", 2 * rank), ("output_padding", rank)))
    spans = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
    before = [spans[k] - pads[k] for k in range(rank)]
    after = [spans[k] - pads[rank + k] + extra[k] for k in range(rank)]

    def unfold(x: Any) -> Any:
        sizes = [s * (n - 1) + 1 for n, s in zip(x.shape[2:], strides, strict=True)]
        apart = x.new_zeros(*x.shape[:2], *sizes)
        apart[(..., *(slice(None, None, s) for s in strides))] = x
        seen = windows(F.pad(apart, sides([*before, *after])), kernel, [1] * rank, dilations)
        return seen.flip(list(range(-rank, 0))).unflatten(1, (groups, -1))

    return Linear(
        0,
        w,
        (("b", "g", "c", *places, *taps), ("g", "c", "o", *taps), ("b", "g", "o", *places)),
        (groups, channels // groups, out, *kernel),
        bias=2,
        unfold=unfold,
        unfold_output=lambda y: y.unflatten(1, (groups, -1)),
        channel=1,
    )


def kernel_form(node: NodeView, w: int, shapes: Sequence[Shape]) -> Any:
    """The weight's shape, groups, strides, dilations, and labels of the places and of the kernel's taps."""
    weight = shapes[w]
    if w != 1 or weight is None or len(weight) < 3:
        return None
    rank = len(weight) - 2
    strides, dilations = (list(node.attributes.get(n) or [1] * rank) for n in ("strides", "dilations"))
    places, taps = (tuple(f"{letter}{k}" for k in range(rank)) for letter in "pt")
    return weight, int(node.attributes.get("group", 1)), strides, dilations, places, taps


def windows(x: Any, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> Any:
    """(b, c, places, taps) of an image: a view."""
    for k, size in enumerate(kernel):
        x = x.unfold(2 + k, dilations[k] * (size - 1) + 1, strides[k])[..., :: dilations[k]]
    return x


def patch_groups(p: PatchContext) -> None:
    if int(p.attr("group", 1)) > 1:
        p.set_attr("group", p.noted("groups"))


def fused_shape(node, inputs):
    """FusedConv: as Conv, computed here because onnx does not know the operator."""
    (elem, x), (_, w) = inputs[0], inputs[1]
    rank = len(x) - 2
    kernel = node.attributes.get("kernel_shape") or w[2:]
    strides = node.attributes.get("strides") or [1] * rank
    dilations = node.attributes.get("dilations") or [1] * rank
    pads = node.attributes.get("pads") or [0] * (2 * rank)
    auto = node.attributes.get("auto_pad", "NOTSET")
    out: list[int | None] = []
    for k in range(rank):
        if x[2 + k] is None:
            out.append(None)
        elif auto.startswith("SAME"):
            out.append(-(-x[2 + k] // strides[k]))
        else:
            span = dilations[k] * (kernel[k] - 1) + 1
            out.append((x[2 + k] + pads[k] + pads[rank + k] - span) // strides[k] + 1)
    return [(elem, (x[0], w[0], *out))]


def _zero_dead(node: NodeView, states: Sequence[float | None]) -> float | None:
    return conv_dead(0, 3, 8)(node, states)


OPERATORS = (
    Operator(
        "Conv",
        conv_axes,
        conv_dead(0, 1, 2),
        conv_macs(1),
        patch_groups,
        bias=2,
        mirror=convolved,
        role=Role.CONVOLUTION,
        linear=conv_linear,
    ),
    Operator(
        "ConvTranspose",
        conv_transpose_axes,
        conv_dead(0, 1, 2),
        conv_transpose_macs,
        patch_groups,
        mirror=conv_transpose_mirror,
        role=Role.CONVOLUTION,
        linear=conv_transpose_linear,
    ),
    Operator(
        "ConvInteger",
        conv_integer_axes,
        conv_dead(0, 1),
        conv_macs(1),
        patch_groups,
        rounds=True,
        keeps=frozenset({2, 3}),
        quantised=((1, 3),),
        mirror=conv_integer_mirror,
        role=Role.CONVOLUTION,
    ),
    Operator(
        "QLinearConv",
        qlinear_conv_axes,
        _zero_dead,
        conv_macs(3),
        patch_groups,
        rounds=True,
        keeps=frozenset({1, 2, 4, 5, 6, 7}),
        quantised=((3, 5),),
        mirror=qlinear_conv_mirror,
        fixed=frozenset({1, 4, 6}),
        role=Role.CONVOLUTION,
    ),
    Operator("DeformConv", deform_conv_axes, conv_dead(0, 1, 3), conv_macs(1), patch_groups, mirror=deform_conv_mirror),
    Operator(
        "com.microsoft::FusedConv",
        fused_conv_axes,
        fused_conv_dead,
        conv_macs(1),
        patch_groups,
        shape=fused_shape,
        mirror=fused_conv_mirror,
        role=Role.CONVOLUTION,
    ),
)
