"""Random small models, put together from the constructs that exporters write.

A block takes a tensor and adds one construct to the graph: a convolution, an attention, a channel shuffle. Which one,
and how it is spelled (weights in initializers, in Constant nodes or behind a Transpose; sizes written out or computed
from Shape), is drawn from `Choices`: from hypothesis in a property, from a seed in a script.

    model = random_model(7)                      # by seed
    @given(models()) def test_...(model): ...    # by hypothesis, which makes a failing model as small as it can
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

__all__ = ["Builder", "Choices", "From", "Seeded", "Tensor", "build", "from_text", "models", "random_model",
           "random_weight"]

T = TypeVar("T")
Size: TypeAlias = "int | str"  # a name stands for a symbolic dimension
BATCH = "N"
OPSETS = (11, 13, 17, 18, 21, 23)
WIDTHS = (2, 3, 4, 6, 8, 12)
FAR = 2**63 - 1
EPSILON = 0.01  # large enough for rounding errors not to be blown up where a variance is next to nothing


class Choices(Protocol):
    """Where the randomness of a model comes from."""

    def integer(self, low: int, high: int) -> int:
        """A number from low to high, both included; low is the simplest."""


class Seeded:
    """Choices from a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def integer(self, low: int, high: int) -> int:
        return self.random.randint(low, high)


class Drawn:
    """Choices from hypothesis."""

    def __init__(self, draw: Callable[[st.SearchStrategy[int]], int]) -> None:
        self.draw = draw

    def integer(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))


@dataclass(frozen=True)
class Tensor:
    """A tensor of the graph under construction."""

    name: str
    shape: tuple[Size, ...]

    def size(self, axis: int) -> int:
        """The size of an axis that is not symbolic."""
        n = self.shape[axis]
        assert isinstance(n, int), f"axis {axis} of {self.name} is symbolic"
        return n

    @property
    def rank(self) -> int:
        return len(self.shape)


@dataclass(frozen=True)
class From:
    """A size taken from an axis of the tensor that is reshaped: `shape[axis] * times / over`."""

    axis: int
    times: int = 1
    over: int = 1


Dim: TypeAlias = "int | From"


class Builder:
    """A graph under construction. Methods add nodes and return their outputs."""

    def __init__(self, choose: Choices, opset: int, batch: Size) -> None:
        self.choose = choose
        self.opset = opset
        self.batch = batch
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.matrices: dict[tuple[int, ...], list[Tensor]] = {}
        self.vectors: dict[tuple[int, float, float], list[Tensor]] = {}
        self.values = np.random.default_rng(0)
        self.count = 0

    # choices

    def pick(self, options: Sequence[T]) -> T:
        """One of the options; the first is the simplest."""
        return options[self.choose.integer(0, len(options) - 1)]

    def chance(self, one_in: int = 2) -> bool:
        """True once in a while."""
        return self.choose.integer(0, one_in - 1) == one_in - 1

    # nodes

    def fresh(self, base: str) -> str:
        self.count += 1
        return f"{base}_{self.count}"

    def node(self, op: str, inputs: Sequence[Tensor | None], shape: Sequence[Size], **attributes: Any) -> Tensor:
        """A node with one output."""
        return self.many(op, inputs, [shape], **attributes)[0]

    def many(
        self, op: str, inputs: Sequence[Tensor | None], shapes: Sequence[Sequence[Size]], **attributes: Any
    ) -> list[Tensor]:
        """A node with an output for every shape."""
        outputs = [Tensor(self.fresh(op.lower()), tuple(s)) for s in shapes]
        names = ["" if t is None else t.name for t in inputs]
        self.nodes.append(
            helper.make_node(op, names, [t.name for t in outputs], name=f"node_{outputs[0].name}", **attributes)
        )
        return outputs

    def input(self, shape: Sequence[Size], elem: int = TensorProto.FLOAT) -> Tensor:
        made = Tensor(f"input{len(self.inputs)}", tuple(shape))
        self.inputs.append(helper.make_tensor_value_info(made.name, elem, list(shape)))
        return made

    def output(self, x: Tensor) -> None:
        if x.name not in {o.name for o in self.outputs}:
            self.outputs.append(helper.make_tensor_value_info(x.name, TensorProto.FLOAT, list(x.shape)))

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, "random", self.inputs, self.outputs, self.initializers)
        opset = [helper.make_opsetid("", self.opset)]
        return helper.make_model(
            graph,
            opset_imports=opset,
            ir_version=max(4, helper.find_min_ir_version_for(opset)),
            producer_name="tests.graphs",
        )

    # constants and weights

    def initializer(self, array: np.ndarray, base: str = "w") -> Tensor:
        name = self.fresh(base)
        self.initializers.append(numpy_helper.from_array(array.copy(order="C"), name))
        return Tensor(name, array.shape)

    def constant(self, array: np.ndarray | Sequence[int] | int) -> Tensor:
        """Sizes, positions or tables: in an initializer or in a Constant node."""
        array = np.asarray(array, None if isinstance(array, np.ndarray) else np.int64)
        if self.chance():
            return self.initializer(array, "c")
        return self.node("Constant", [], array.shape, value=numpy_helper.from_array(array))

    def weight(self, shape: Sequence[int], fan_in: int | None = None) -> Tensor:
        """A matrix or kernel, stored in one of the ways in which exporters store them; now and then an earlier one."""
        shape = tuple(shape)
        known = self.matrices.setdefault(shape, [])
        if known and self.chance(6):
            return self.pick(known)
        scale = 1 / sqrt(fan_in or max(prod(shape[1:]), 1))
        array = (self.values.standard_normal(shape) * scale).astype(np.float32)
        made = self.pick(STORED)(self, array) if self.chance(3) else self.initializer(array)
        known.append(made)
        return made

    def vector(self, n: int, low: float = -0.5, high: float = 0.5) -> Tensor:
        """A bias, scale or variance; exporters share those that are equal."""
        known = self.vectors.setdefault((n, low, high), [])
        if known and self.chance(5):
            return self.pick(known)
        array = self.values.uniform(low, high, n).astype(np.float32)
        made = (
            self.node("Constant", [], (n,), value=numpy_helper.from_array(array))
            if self.chance(6)
            else (self.initializer(array, "b"))
        )
        known.append(made)
        return made

    def scalar(self, value: float) -> Tensor:
        return self.constant(np.array(value, np.float32))

    # layout, whose operators changed their form over the opsets

    def reshape(self, x: Tensor, dims: Sequence[Dim]) -> Tensor:
        """Reshape to sizes that are written out, or computed from the sizes of `x`."""
        shape = tuple(d if isinstance(d, int) else _size(x, d) for d in dims)
        target = self.sizes(x, dims) if self.chance(3) else self.constant(self.spelled(x, dims, shape))
        return self.node("Reshape", [x, target], shape)

    def spelled(self, x: Tensor, dims: Sequence[Dim], shape: Sequence[Size]) -> list[int]:
        """A target with numbers, 0 for what stays in its place, and at most one -1."""
        symbolic = [k for k, n in enumerate(shape) if isinstance(n, str)]
        free = symbolic[0] if symbolic else self.pick([-1, *range(len(shape))])
        target = []
        for k, (d, n) in enumerate(zip(dims, shape, strict=True)):
            stays = isinstance(d, From) and d == From(k) and k < x.rank
            if stays and (isinstance(n, str) or self.chance(4)):
                target.append(0)
                free = -1 if k == free else free
            else:
                target.append(-1 if k == free else int(n) if isinstance(n, int) else -1)
        return target

    def sizes(self, x: Tensor, dims: Sequence[Dim]) -> Tensor:
        """The same target, put together from the shape of `x`."""
        whole = self.node("Shape", [x], (x.rank,))
        parts = []
        for d in dims:
            if isinstance(d, int):
                parts.append(self.constant([d]))
                continue
            part = self.shape_entry(whole, d.axis)
            if d.times != 1:
                part = self.node("Mul", [part, self.constant(d.times)], ())
            if d.over != 1:
                part = self.node("Div", [part, self.constant(d.over)], ())
            parts.append(self.unsqueeze(part, [0]))
        return self.node("Concat", parts, (len(dims),), axis=0)

    def shape_entry(self, shape: Tensor, axis: int) -> Tensor:
        """One size, as a scalar."""
        if self.chance():
            return self.node("Gather", [shape, self.constant(axis)], (), axis=0)
        piece = self.node("Slice", [shape, self.constant([axis]), self.constant([axis + 1]), self.constant([0])], (1,))
        return self.squeeze(piece, [0])

    def transpose(self, x: Tensor, *perm: int) -> Tensor:
        return self.node("Transpose", [x], [x.shape[k] for k in perm], perm=perm)

    def unsqueeze(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        shape = list(x.shape)
        for a in sorted(axes):
            shape.insert(a, 1)
        if self.opset < 13:
            return self.node("Unsqueeze", [x], shape, axes=list(axes))
        return self.node("Unsqueeze", [x, self.constant(list(axes))], shape)

    def squeeze(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        shape = [n for k, n in enumerate(x.shape) if k not in axes]
        if self.opset < 13:
            return self.node("Squeeze", [x], shape, axes=list(axes))
        return self.node("Squeeze", [x, self.constant(list(axes))], shape)

    def slice(self, x: Tensor, axis: int, low: int, high: int, step: int = 1) -> Tensor:
        n = x.size(axis)
        shape = list(x.shape)
        shape[axis] = len(range(n)[low:high:step])
        start = low - n if low and self.chance(3) else low
        end = high if high < n else self.pick([high, FAR])
        bounds = [self.constant([start]), self.constant([end]), self.constant([axis])]
        return self.node("Slice", [x, *bounds, *([self.constant([step])] if step != 1 else [])], shape)

    def split(self, x: Tensor, axis: int, sizes: Sequence[int]) -> list[Tensor]:
        """Cut an axis: by a Split, by Slices, or by Slices at positions computed from its size."""
        shapes = [[*x.shape[:axis], n, *x.shape[axis + 1 :]] for n in sizes]
        even = len(set(sizes)) == 1
        way = self.pick(["split", "slices", "chunk"] if even else ["split", "slices"])
        if way == "split":
            if even and self.opset < 18 and self.chance():
                return self.many("Split", [x], shapes, axis=axis)
            if self.opset < 13:
                return self.many("Split", [x], shapes, axis=axis, split=list(sizes))
            return self.many("Split", [x, self.constant(list(sizes))], shapes, axis=axis)
        starts = np.cumsum([0, *sizes]).tolist()
        if way == "slices":
            return [self.slice(x, axis, a, b) for a, b in zip(starts, starts[1:], strict=False)]
        return self.chunk(x, axis, shapes)

    def chunk(self, x: Tensor, axis: int, shapes: Sequence[Sequence[Size]]) -> list[Tensor]:
        """torch.chunk in old exports: every bound is computed from the axis' size."""
        total = self.shape_entry(self.node("Shape", [x], (x.rank,)), axis)
        each = self.node("Div", [total, self.constant(len(shapes))], ())
        parts = []
        for k, shape in enumerate(shapes):
            low, high = (self.unsqueeze(self.node("Mul", [each, self.constant(j)], ()), [0]) for j in (k, k + 1))
            parts.append(self.node("Slice", [x, low, high, self.constant([axis])], shape))
        return parts

    def concat(self, parts: Sequence[Tensor], axis: int) -> Tensor:
        shape = list(parts[0].shape)
        shape[axis] = sum(p.size(axis) for p in parts)
        return self.node("Concat", parts, shape, axis=axis)

    def reduce(self, op: str, x: Tensor, axes: Sequence[int], *, keep: bool = True) -> Tensor:
        shape = [1 if k in axes else n for k, n in enumerate(x.shape) if keep or k not in axes]
        since = 13 if op == "ReduceSum" else 18
        if self.opset < since:
            return self.node(op, [x], shape, axes=list(axes), keepdims=int(keep))
        return self.node(op, [x, self.constant(list(axes))], shape, keepdims=int(keep))

    def elementwise(self, op: str, *operands: Tensor, **attributes: Any) -> Tensor:
        """A node with numpy's broadcasting."""
        rank = max(t.rank for t in operands)
        shape: list[Size] = []
        for k in range(rank):
            aligned = [t.shape[k - rank + t.rank] for t in operands if k - rank + t.rank >= 0]
            shape.append(next((n for n in aligned if n != 1), 1))
        return self.node(op, operands, shape, **attributes)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return self.elementwise("Add", *((a, b) if self.chance() else (b, a)))

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        return self.elementwise("Mul", *((a, b) if self.chance() else (b, a)))


def _size(x: Tensor, d: From) -> Size:
    n = x.shape[d.axis]
    if isinstance(n, str):
        assert d.times == d.over == 1
        return n
    return n * d.times // d.over


# How weights are stored


def _in_constant(b: Builder, array: np.ndarray) -> Tensor:
    return b.node("Constant", [], array.shape, value=numpy_helper.from_array(array))


def _behind_identity(b: Builder, array: np.ndarray) -> Tensor:
    return b.node("Identity", [b.initializer(array)], array.shape)


def _behind_transpose(b: Builder, array: np.ndarray) -> Tensor:
    perm = tuple(reversed(range(array.ndim)))
    return b.transpose(b.initializer(array.transpose(perm)), *perm)


def _behind_reshape(b: Builder, array: np.ndarray) -> Tensor:
    return b.node("Reshape", [b.initializer(array.reshape(len(array), -1)), b.constant(list(array.shape))], array.shape)


def _in_two_halves(b: Builder, array: np.ndarray) -> Tensor:
    half = len(array) // 2
    if not half:
        return b.initializer(array)
    return b.concat([b.initializer(array[:half]), b.initializer(array[half:])], 0)


def _as_half_floats(b: Builder, array: np.ndarray) -> Tensor:
    return b.node("Cast", [b.initializer(array.astype(np.float16))], array.shape, to=TensorProto.FLOAT)


def _as_integers(b: Builder, array: np.ndarray) -> Tensor:
    """Symmetric int8 with a scale per index of the first axis."""
    if b.opset < 13:
        return b.initializer(array)
    scale = np.maximum(np.abs(array).reshape(len(array), -1).max(1), 1e-6) / 127
    stored = np.round(array / scale.reshape(-1, *[1] * (array.ndim - 1))).astype(np.int8)
    return b.node(
        "DequantizeLinear", [b.initializer(stored), b.initializer(scale.astype(np.float32))], array.shape, axis=0
    )


def _normalised(b: Builder, array: np.ndarray) -> Tensor:
    """torch's weight_norm: direction times length, per index of the first axis."""
    v = b.initializer(array)
    length = b.reduce("ReduceL2", v, range(1, array.ndim)) if array.ndim > 1 else b.scalar(1.0)
    g = b.initializer(b.values.uniform(0.5, 1.5, (len(array), *[1] * (array.ndim - 1))).astype(np.float32))
    return b.mul(v, b.elementwise("Div", g, b.elementwise("Add", length, b.scalar(1e-6))))


STORED = (
    _in_constant,
    _behind_identity,
    _behind_transpose,
    _behind_reshape,
    _in_two_halves,
    _as_half_floats,
    _as_integers,
    _normalised,
)


# Layers


def conv(
    b: Builder,
    x: Tensor,
    out: int | None = None,
    *,
    kernel: int | None = None,
    stride: int = 1,
    groups: int = 1,
    bias: bool | None = None,
) -> Tensor:
    """A convolution over the axes from 2 on that keeps their size, divided by the stride."""
    out = b.pick(WIDTHS) if out is None else out
    kernel = b.pick([1, 3]) if kernel is None else kernel
    dims = x.rank - 2
    weight = b.weight((out, x.size(1) // groups, *[kernel] * dims))
    biased = b.chance() if bias is None else bias
    spatial = [(x.size(k) - 1) // stride + 1 for k in range(2, x.rank)]
    attributes: dict[str, Any] = {"pads": [kernel // 2] * (2 * dims)} if kernel > 1 else {}
    if stride > 1:
        attributes["strides"] = [stride] * dims
    if groups > 1:
        attributes["group"] = groups
    inputs = [x, weight, *([b.vector(out)] if biased else [])]
    return b.node("Conv", inputs, (x.shape[0], out, *spatial), **attributes)


def linear(b: Builder, x: Tensor, out: int | None = None, *, bias: bool | None = None) -> Tensor:
    """Along the last axis: Gemm, MatMul or Einsum, with or without a bias."""
    out = b.pick(WIDTHS) if out is None else out
    biased = b.chance() if bias is None else bias
    n = x.size(-1)
    way = b.pick(["matmul", "gemm", "einsum"]) if x.rank == 2 else b.pick(["matmul", "einsum"])
    if way == "gemm":
        flipped = b.chance()
        weight = b.weight((out, n) if flipped else (n, out), n)
        attributes = {"transB": 1} if flipped else {}
        return b.node("Gemm", [x, weight, *([b.vector(out)] if biased else [])], (*x.shape[:-1], out), **attributes)
    if way == "einsum":
        letters = "abc"[: x.rank - 1]
        y = (
            b.node("Einsum", [x, b.weight((out, n), n)], (*x.shape[:-1], out), equation=f"{letters}k,jk->{letters}j")
            if b.opset >= 12
            else b.node("MatMul", [x, b.weight((n, out), n)], (*x.shape[:-1], out))
        )
    else:
        y = b.node("MatMul", [x, b.weight((n, out), n)], (*x.shape[:-1], out))
    return b.add(y, b.vector(out)) if biased else y


ACTIVATIONS = ("Relu", "Tanh", "LeakyRelu", "Sigmoid", "Elu", "Softplus", "HardSigmoid", "Softsign", "Abs")


def activation(b: Builder, x: Tensor) -> Tensor:
    way = b.pick([*ACTIVATIONS, "silu", "gelu", "relu6", "hardswish", "prelu"])
    if way == "silu":
        return b.mul(x, b.elementwise("Sigmoid", x))
    if way == "gelu":
        if b.opset >= 20 and b.chance():
            return b.elementwise("Gelu", x)
        erf = b.elementwise("Erf", b.elementwise("Div", x, b.scalar(sqrt(2))))
        return b.mul(b.mul(x, b.add(erf, b.scalar(1.0))), b.scalar(0.5))
    if way == "relu6":
        return b.node("Clip", [x, b.scalar(0.0), b.scalar(6.0)], x.shape)
    if way == "hardswish":
        gate = b.node("Clip", [b.add(x, b.scalar(3.0)), b.scalar(0.0), b.scalar(6.0)], x.shape)
        return b.elementwise("Div", b.mul(x, gate), b.scalar(6.0))
    if way == "prelu":
        if x.rank == 4:
            slope = b.initializer(b.values.uniform(0, 0.5, (x.size(1), 1, 1)).astype(np.float32))
            return b.node("PRelu", [x, slope], x.shape)
        return b.node("PRelu", [x, b.vector(x.size(-1), 0.0, 0.4)], x.shape)
    return b.elementwise(way, x)


def batch_norm(b: Builder, x: Tensor) -> Tensor:
    c = x.size(1)
    inputs = [x, b.vector(c, 0.5, 1.5), b.vector(c), b.vector(c), b.vector(c, 0.5, 1.5)]
    return b.node("BatchNormalization", inputs, x.shape)


def channelwise(b: Builder, x: Tensor) -> Tensor:
    """Layer scale, or a bias behind a Reshape, along axis 1."""
    c = x.size(1)
    shape = (c, *[1] * (x.rank - 2))
    if b.chance():
        table = b.initializer(b.values.uniform(0.5, 1.5, shape).astype(np.float32))
    elif b.chance():
        table = b.node("Reshape", [b.vector(c), b.constant([1, -1, *[1] * (x.rank - 2)])], (1, *shape))
    else:
        table = b.unsqueeze(b.vector(c), list(range(1, x.rank - 1)))
    return b.elementwise(b.pick(["Mul", "Add", "Sub"]), x, table)


# Blocks for images (N, C, H, W)


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


# Blocks for sequences (N, T, D)


def feed_forward(b: Builder, x: Tensor) -> Tensor:
    y = linear(b, activation(b, linear(b, x)), x.size(-1))
    return b.add(x, y) if b.chance() else y


def swiglu(b: Builder, x: Tensor) -> Tensor:
    width = b.pick([2, 3, 4, 6])
    if b.chance():
        a, gate = b.split(linear(b, x, 2 * width), 2, [width, width])
    else:
        a, gate = linear(b, x, width), linear(b, x, width)
    return linear(b, b.mul(a, b.mul(gate, b.elementwise("Sigmoid", gate))))


def projection(b: Builder, x: Tensor) -> Tensor:
    return linear(b, x)


def flattened_gemm(b: Builder, x: Tensor) -> Tensor:
    """(N T) rows through a Gemm and back: how tf2onnx writes a Dense layer."""
    if isinstance(x.shape[0], str):
        return linear(b, x)
    n, t, d = (x.size(k) for k in range(3))
    y = b.node("Reshape", [x, b.constant([-1, d])], (n * t, d))
    y = linear(b, y)
    return b.reshape(y, [n, t, y.size(1)])


def layer_norm(b: Builder, x: Tensor) -> Tensor:
    """By the operator or written out."""
    d = x.size(-1)
    if b.opset >= 17 and b.chance():
        return b.node("LayerNormalization", [x, b.vector(d, 0.5, 1.5), b.vector(d)], x.shape, axis=-1, epsilon=EPSILON)
    last = [x.rank - 1]
    centred = b.elementwise("Sub", x, b.reduce("ReduceMean", x, last))
    variance = b.reduce("ReduceMean", b.elementwise("Pow", centred, b.scalar(2.0)), last)
    root = b.elementwise("Sqrt", b.add(variance, b.scalar(EPSILON)))
    return b.add(b.mul(b.elementwise("Div", centred, root), b.vector(d, 0.5, 1.5)), b.vector(d))


def rms_norm(b: Builder, x: Tensor) -> Tensor:
    """By the operator or written out."""
    d = x.size(-1)
    if b.opset >= 23 and b.chance():
        return b.node("RMSNormalization", [x, b.vector(d, 0.5, 1.5)], x.shape, axis=-1, epsilon=EPSILON)
    square = b.elementwise("Pow", x, b.scalar(2.0)) if b.chance() else b.mul(x, x)
    root = b.elementwise("Sqrt", b.add(b.reduce("ReduceMean", square, [x.rank - 1]), b.scalar(EPSILON)))
    y = b.elementwise("Div", x, root) if b.chance() else b.mul(x, b.elementwise("Reciprocal", root))
    return b.mul(y, b.vector(d, 0.5, 1.5))


def pre_norm(b: Builder, x: Tensor) -> Tensor:
    """x + f(norm(x)): the block of a transformer."""
    y = rms_norm(b, x) if b.chance() else layer_norm(b, x)
    y = attention(b, y) if b.chance() else activation(b, linear(b, y))
    return b.add(x, linear(b, y, x.size(-1)))


def heads_of(b: Builder, x: Tensor, heads: int) -> Tensor:
    """(N, T, h d) to (N, h, T, d)."""
    width = x.size(2) // heads
    dims: list[Dim] = [From(0), From(1), heads, width]
    if b.chance(3):
        dims[3] = From(2, over=heads)
    return b.transpose(b.reshape(x, dims), 0, 2, 1, 3)


def packed_heads(b: Builder, x: Tensor, heads: int, width: int) -> list[Tensor]:
    """Query, key and value from one projection, taken apart in one of the usual ways."""
    y = linear(b, x, 3 * heads * width)
    way = b.pick(["split", "five", "per head"])
    if way == "split":
        return [heads_of(b, p, heads) for p in b.split(y, 2, [heads * width] * 3)]
    t = x.size(1)
    if way == "per head":  # (h 3 d), as in GPT-NeoX
        y = b.transpose(b.reshape(y, [From(0), t, heads, 3 * width]), 0, 2, 1, 3)
        return b.split(y, 3, [width] * 3)
    y = b.transpose(b.reshape(y, [From(0), t, 3, heads, width]), 2, 0, 3, 1, 4)
    return [b.node("Gather", [y, b.constant(k)], y.shape[1:], axis=0) for k in range(3)]


def rotary(b: Builder, x: Tensor) -> Tensor:
    """Rotate the two halves of every head of (N, h, T, d)."""
    t, d = x.size(2), x.size(3)
    angles = np.outer(np.arange(t), 1 / 10.0 ** np.arange(d // 2))
    cos, sin = (np.concatenate([f(angles)] * 2, 1).astype(np.float32) for f in (np.cos, np.sin))
    low, high = b.slice(x, 3, 0, d // 2), b.slice(x, 3, d // 2, d)
    turned = b.concat([b.elementwise("Neg", high), low], 3)
    return b.add(b.mul(x, b.constant(cos)), b.mul(turned, b.constant(sin)))


def repeated(b: Builder, x: Tensor, times: int) -> Tensor:
    """Key-value heads for several query heads each: Unsqueeze, Expand, Reshape."""
    n, kv, t, d = x.shape
    if isinstance(n, str):
        ones = b.constant([1, 1, times, 1, 1])
    else:
        ones = b.constant([n, kv, times, t, d])
    wide = b.node("Expand", [b.unsqueeze(x, [2]), ones], (n, kv, times, t, d))
    return b.reshape(wide, [From(0), kv * times, t, d])


def scaled(b: Builder, scores: Tensor, query: Tensor) -> Tensor:
    """Divide by the root of the head width: as a constant or computed from a shape."""
    way = b.pick(["constant", "computed", "none"])
    if way == "constant":
        return b.mul(scores, b.scalar(1 / sqrt(query.size(-1))))
    if way == "computed":
        width = b.shape_entry(b.node("Shape", [query], (query.rank,)), query.rank - 1)
        root = b.node("Sqrt", [b.node("Cast", [width], (), to=TensorProto.FLOAT)], ())
        return b.elementwise("Div", scores, root)
    return scores


def attention(b: Builder, x: Tensor) -> Tensor:
    """(N, T, D) to (N, T, heads * width): separate, packed, grouped-query and rotary attention."""
    t = x.size(1)
    heads, width = b.pick([2, 3, 4]), b.pick([2, 4, 6])
    way = b.pick(["separate", "packed", "grouped"])
    if way == "packed":
        q, k, v = packed_heads(b, x, heads, width)
    else:
        shared = b.pick([1, 2]) if heads == 4 and way == "grouped" else 1 if way == "grouped" else heads
        values = b.pick([width, 3]) if way == "separate" else width
        q = heads_of(b, linear(b, x, heads * width), heads)
        k = heads_of(b, linear(b, x, shared * width), shared)
        v = heads_of(b, linear(b, x, shared * values), shared)
        if b.chance(3):
            q, k = rotary(b, q), rotary(b, k)
        if (way == "grouped" and shared > 1) or b.chance():
            k, v = (repeated(b, p, heads // shared) if shared < heads else p for p in (k, v))
    return attend(b, q, k, v, (x.shape[0], heads, t))


def attend(b: Builder, q: Tensor, k: Tensor, v: Tensor, rows: tuple[Size, int, int]) -> Tensor:
    """Softmax of the scores times the values, heads merged."""
    n, heads, t = rows
    if b.opset >= 12 and b.chance(4) and k.shape[1] == heads:
        scores = b.node("Einsum", [q, k], (n, heads, t, t), equation="bhqd,bhkd->bhqk")
    else:
        scores = b.node("MatMul", [q, b.transpose(k, 0, 1, 3, 2)], (n, heads, t, t))
    scores = scaled(b, scores, q)
    if b.chance(4):
        mask = np.triu(np.full((t, t), -1e4, np.float32), 1)
        scores = b.add(scores, b.constant(mask))
    weights = b.node("Softmax", [scores], scores.shape, axis=3)
    y = b.node("MatMul", [weights, v], (n, heads, t, v.shape[3]))
    return b.reshape(b.transpose(y, 0, 2, 1, 3), [From(0), t, heads * v.size(3)])


def recurrent(b: Builder, x: Tensor) -> Tensor:
    """LSTM, GRU or RNN over (T, N, D), in one or both directions."""
    op = b.pick(["LSTM", "GRU", "RNN"])
    gates, both = {"LSTM": 4, "GRU": 3, "RNN": 1}[op], b.chance()
    directions, hidden = 1 + both, b.pick([2, 3, 5])
    n, t, d = x.shape[0], x.size(1), x.size(2)
    w = b.weight((directions, gates * hidden, d), d)
    r = b.weight((directions, gates * hidden, hidden), hidden)
    inputs: list[Tensor | None] = [b.transpose(x, 1, 0, 2), w, r]
    if b.chance():
        inputs.append(b.weight((directions, 2 * gates * hidden), 4))
    attributes: dict[str, Any] = {"hidden_size": hidden, "direction": "bidirectional" if both else "forward"}
    if op == "GRU":
        attributes["linear_before_reset"] = b.pick([0, 1])
    if len(inputs) == 4 and b.chance(3):
        inputs += [None, zero_state(b, x, directions, hidden)]
    y = b.node(op, inputs, (t, directions, n, hidden), **attributes)
    if not both and b.chance():
        y = b.squeeze(y, [1])
    else:
        y = b.transpose(y, 0, 2, 1, 3)
        y = b.reshape(y, [t, From(1), directions * hidden])
    return b.transpose(y, 1, 0, 2)


def zero_state(b: Builder, x: Tensor, directions: int, hidden: int) -> Tensor:
    """An initial state as torch exports it: zeros of a computed size."""
    size = b.sizes(x, [directions, From(0), hidden])
    return b.node(
        "ConstantOfShape",
        [size],
        (directions, x.shape[0], hidden),
        value=helper.make_tensor("value", TensorProto.FLOAT, [1], [0.0]),
    )


def temporal_conv(b: Builder, x: Tensor) -> Tensor:
    y = b.transpose(x, 0, 2, 1)
    y = activation(b, conv(b, y, kernel=3))
    return b.transpose(y, 0, 2, 1)


def tied(b: Builder, x: Tensor) -> Tensor:
    """One square matrix, twice."""
    d = x.size(-1)
    w = b.weight((d, d), d)
    y = activation(b, b.node("MatMul", [x, w], x.shape))
    return b.node("MatMul", [y, w], x.shape)


def running_sum(b: Builder, x: Tensor) -> Tensor:
    return b.node("CumSum", [x, b.constant(1)], x.shape)


def positions(b: Builder, x: Tensor) -> Tensor:
    """Learned position embeddings, cut to the length."""
    t, d = x.size(1), x.size(2)
    table = b.weight((1, t + 2, d), 1)
    return b.add(x, b.slice(table, 1, 0, t))


def class_token(b: Builder, x: Tensor) -> Tensor:
    """A learned token in front, repeated over the batch."""
    d = x.size(2)
    token = b.weight((1, 1, d), 1)
    shape = b.sizes(x, [From(0), 1, d]) if isinstance(x.shape[0], str) else b.constant([x.size(0), 1, d])
    wide = b.node("Expand", [token, shape], (x.shape[0], 1, d))
    return b.concat([wide, x], 1)


# Blocks for rows (N, D)


def gemm(b: Builder, x: Tensor) -> Tensor:
    y = linear(b, x)
    y = batch_norm(b, y) if b.chance() else y
    return activation(b, y) if b.chance() else y


def row_residual(b: Builder, x: Tensor) -> Tensor:
    return b.add(x, linear(b, activation(b, linear(b, x)), x.size(1)))


def row_concat(b: Builder, x: Tensor) -> Tensor:
    return b.concat([linear(b, x), x if b.chance() else linear(b, x)], 1)


def row_split(b: Builder, x: Tensor) -> Tensor:
    d = x.size(1)
    if d < 2:
        return linear(b, x)
    k = b.choose.integer(1, d - 1)
    a, rest = b.split(x, 1, [k, d - k])
    return b.concat([linear(b, rest), a], 1)


def concatenated_weights(b: Builder, x: Tensor) -> Tensor:
    """One product with the weights of two layers side by side, taken apart again."""
    m, n, d = b.pick(WIDTHS), b.pick(WIDTHS), x.size(1)
    w = b.concat([b.weight((d, m), d), b.weight((d, n), d)], 1)
    y = b.node("MatMul", [x, w], (x.shape[0], m + n))
    first, second = b.split(y, 1, [m, n])
    return b.concat([activation(b, second), first], 1)


# From one kind of tensor to another


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


def sequence_to_rows(b: Builder, x: Tensor) -> Tensor:
    way = b.pick(["mean", "first", "last", "flatten"])
    if way == "mean":
        return b.reduce("ReduceMean", x, [1], keep=False)
    if way == "first":
        return b.node("Gather", [x, b.constant(0)], (x.shape[0], x.shape[2]), axis=1)
    if way == "last":
        return b.squeeze(b.slice(x, 1, x.size(1) - 1, x.size(1)), [1])
    return b.reshape(x, [From(0), x.size(1) * x.size(2)])


def rows_to_image(b: Builder, x: Tensor) -> Tensor:
    """A decoder's start: a layer whose outputs are laid out as a small image."""
    c = b.pick([2, 3, 4])
    return b.reshape(linear(b, x, 4 * c), [From(0), c, 2, 2])


Block: TypeAlias = Callable[[Builder, Tensor], Tensor]

IMAGE: tuple[Block, ...] = (
    plain,
    conv,
    residual,
    grouped,
    depthwise,
    conv_transpose,
    dense,
    split_channels,
    gated,
    channel_shuffle,
    channel_gather,
    pixel_shuffle,
    space_to_depth,
    squeeze_excite,
    spatial_attention,
    padded_shortcut,
    spatial_pad,
    pooled,
    resized,
    instance_norm,
    group_norm,
    batch_norm,
    channelwise,
    activation,
    spatial_softmax,
    image_attention,
)
SEQUENCE: tuple[Block, ...] = (
    projection,
    feed_forward,
    attention,
    pre_norm,
    swiglu,
    rms_norm,
    layer_norm,
    recurrent,
    temporal_conv,
    tied,
    flattened_gemm,
    running_sum,
    positions,
    class_token,
    activation,
)
ROWS: tuple[Block, ...] = (
    gemm,
    row_residual,
    row_concat,
    row_split,
    concatenated_weights,
    tied,
    rms_norm,
    layer_norm,
    batch_norm,
    activation,
)
KINDS = {4: IMAGE, 3: SEQUENCE, 2: ROWS}
BRIDGES: dict[int, tuple[Block, ...]] = {4: (image_to_rows, to_sequence), 3: (sequence_to_rows,), 2: (rows_to_image,)}


def start(b: Builder) -> Tensor:
    """A graph input and a first layer of free width."""
    kind = b.pick(["image", "sequence", "rows", "ids"])
    if kind == "image":
        return conv(b, b.input((b.batch, 3, b.pick([4, 6]), b.pick([4, 6]))))
    if kind == "sequence":
        return linear(b, b.input((b.batch, b.pick([3, 4, 5, 6]), 5)))
    if kind == "rows":
        return linear(b, b.input((b.batch, 7)))
    ids = b.input((b.batch, b.pick([3, 4, 5])), TensorProto.INT64)
    table = b.weight((9, b.pick(WIDTHS)), 1)
    return b.node("Gather", [table, ids], (*ids.shape, table.shape[1]), axis=0)


def head(b: Builder, x: Tensor) -> Tensor:
    """A last layer, so that what comes before is free."""
    if x.rank == 4:
        return conv(b, x, 3, kernel=1)
    return linear(b, x, 3)


def build(
    choose: Choices, *, blocks: int = 6, opset: int | None = None, only: Sequence[Block] | None = None
) -> onnx.ModelProto:
    """A model of up to `blocks` blocks. only: blocks to take where they fit."""
    batch: Size = BATCH if choose.integer(0, 1) else 2
    b = Builder(choose, opset or OPSETS[choose.integer(0, len(OPSETS) - 1)], batch)
    x = start(b)
    for _ in range(blocks):
        if not choose.integer(0, 7):
            break
        if b.chance(5):
            x = b.pick(BRIDGES[x.rank])(b, x)
        options = [k for k in KINDS[x.rank] if only is None or k in only] or KINDS[x.rank]
        x = b.pick(options)(b, x)
        if any(isinstance(n, int) and n > 150 for n in x.shape):
            x = head(b, x)
        if b.chance(12):
            b.output(x)
    b.output(head(b, x) if not b.chance(5) else x)
    return b.model()


def random_model(seed: int, **options: Any) -> onnx.ModelProto:
    """The model of a seed."""
    return build(Seeded(seed), **options)


@st.composite
def models(draw: Any, **options: Any) -> onnx.ModelProto:
    """Models drawn from hypothesis."""
    return build(Drawn(draw), **options)


def from_text(
    text: str, *, opset: int = 17, microsoft: bool = False, ir: int = 8, **weights: tuple[int, ...] | np.ndarray
) -> onnx.ModelProto:
    """A model in ONNX's text form, such as `(float[N,8] x) => (float[N,3] y) { y = MatMul(x, w) }`.

    weights: initializers by name, given as arrays, or as shapes to be filled with random numbers.
    """
    domains = '"" : %d' % opset + (', "com.microsoft" : 1' if microsoft else "")
    model = onnx.parser.parse_model(f"<ir_version: {ir}, opset_import: [{domains}]> graph {text}")
    rng = np.random.default_rng(0)
    for name, value in weights.items():
        array = value if isinstance(value, np.ndarray) else random_weight(rng, value)
        model.graph.initializer.append(numpy_helper.from_array(array.copy(order="C"), name))
    return model


def random_weight(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Normal numbers, scaled so that signals keep their size."""
    return (rng.standard_normal(shape) / sqrt(max(prod(shape[1:]), 1))).astype(np.float32)
