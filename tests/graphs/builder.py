"""An ONNX graph under construction, and where the choices in it come from."""

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

__all__ = [
    "EPSILON",
    "FAR",
    "WIDTHS",
    "Builder",
    "Choices",
    "Dim",
    "Drawn",
    "From",
    "Seeded",
    "Size",
    "Storing",
    "Tensor",
]

T = TypeVar("T")
Size: TypeAlias = "int | str"  # a name stands for a symbolic dimension
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

    def __init__(self, choose: Choices, opset: int, batch: Size, stored: Sequence[Storing]) -> None:
        self.choose = choose
        self.opset = opset
        self.batch = batch
        self.stored = stored
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
        made = self.pick(self.stored)(self, array) if self.chance(3) else self.initializer(array)
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
        return self.squeeze(self.slice(shape, 0, axis, axis + 1), [0])

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
        if self.opset < 10 and step == 1:
            return self.node("Slice", [x], shape, starts=[start], ends=[end], axes=[axis])
        bounds = [self.constant([start]), self.constant([end]), self.constant([axis])]
        return self.node("Slice", [x, *bounds, *([self.constant([step])] if step != 1 else [])], shape)

    def split(self, x: Tensor, axis: int, sizes: Sequence[int]) -> list[Tensor]:
        """Cut an axis: by a Split, by Slices, or by Slices at positions computed from its size."""
        shapes = [[*x.shape[:axis], n, *x.shape[axis + 1 :]] for n in sizes]
        even = len(set(sizes)) == 1
        way = self.pick(["split", "slices", "chunk"] if even and self.opset >= 10 else ["split", "slices"])
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

    def pad(self, x: Tensor, low: Sequence[int], high: Sequence[int], mode: str = "constant") -> Tensor:
        shape = [n + a + b if isinstance(n, int) else n for n, a, b in zip(x.shape, low, high, strict=True)]
        if self.opset < 11:
            return self.node("Pad", [x], shape, pads=[*low, *high], mode=mode)
        value = [self.scalar(0.0)] if mode == "constant" and self.chance() else []
        return self.node("Pad", [x, self.constant([*low, *high]), *value], shape, mode=mode)

    def clip(self, x: Tensor, low: float | None, high: float | None) -> Tensor:
        bounds = {"min": low, "max": high}
        if self.opset < 11:
            return self.node("Clip", [x], x.shape, **{k: v for k, v in bounds.items() if v is not None})
        return self.node("Clip", [x, *(None if v is None else self.scalar(v) for v in bounds.values())], x.shape)

    def upsample(self, x: Tensor) -> Tensor:
        """Twice the height and width of an image: by factors, or to sizes that are written out or computed."""
        shape = (*x.shape[:2], 2 * x.size(2), 2 * x.size(3))
        factors = self.constant(np.array([1, 1, 2, 2], np.float32))
        if self.opset < 11:
            return self.node("Upsample" if self.opset < 10 else "Resize", [x, factors], shape, mode="nearest")
        nothing = self.constant(np.zeros(0, np.float32)) if self.opset < 13 else None
        if self.chance():
            return self.node("Resize", [x, nothing, factors], shape, mode="nearest")
        written = all(isinstance(n, int) for n in shape) and self.chance()
        sizes = (
            self.constant([int(n) for n in shape])
            if written
            else self.sizes(x, [From(0), From(1), From(2, times=2), From(3, times=2)])
        )
        return self.node("Resize", [x, nothing, nothing, sizes], shape, mode="nearest")

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


Storing: TypeAlias = Callable[[Builder, np.ndarray], Tensor]


def _size(x: Tensor, d: From) -> Size:
    n = x.shape[d.axis]
    if isinstance(n, str):
        assert d.times == d.over == 1
        return n
    return n * d.times // d.over
