"""What an operator's mirror rule sees of its node, and what it can record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.fx import Proxy

from onnxprune.mirroring.quantised import Quantised
from onnxprune.mirroring.sizes import unwrapped
from onnxprune.model.graph import Node
from onnxprune.ops.kernels import sizes as size_kernels

if TYPE_CHECKING:
    from onnxprune.mirroring.build import Builder

__all__ = ["Context", "Unsupported"]

LARGEST_HALF = 65504.0  # torch refuses larger numbers beside float16, which autocast may bring anywhere


class Unsupported(Exception):
    """A rule's word that this form of the operator can't be mirrored."""


class Context:
    """One node while the mirror is built: see `ops.rules.MirrorContext`."""

    def __init__(self, builder: Builder, node: Node) -> None:
        self.builder = builder
        self.graph = builder.graph
        self.node = node

    @property
    def training(self) -> Proxy:
        return self.builder.training()

    @property
    def device(self) -> Any:
        return self.builder.device()

    def attr(self, name: str, default: Any = None) -> Any:
        return self.node.attributes.get(name, default)

    def has(self, i: int) -> bool:
        return i < len(self.node.inputs) and bool(self.node.inputs[i])

    def tensor(self, i: int) -> Any:
        if not self.has(i):
            raise self.unsupported(f"it lacks input {i}")
        name = self.node.inputs[i]
        return self.builder.tensor(name) if self.carries else self.builder.integers(name)

    @property
    def carries(self) -> bool:
        operator = self.builder.registry.get(self.node.op)
        return operator is not None and operator.carries

    def shared(self, i: int) -> bool:
        node = self.tensor(i).node
        path = self.builder.parameters.get(node.target, ()) if node.op == "get_attr" else ()
        return any(self.builder.statistics.get(name, 0) > 1 for name in path)

    def optional(self, i: int) -> Any:
        return self.tensor(i) if self.has(i) else None

    def operand(self, i: int) -> Any:
        value = self.constant(i)
        if value is None or value.size != 1 or value.dtype.kind not in "fiub" or not self.spares(i, value.ndim):
            return self.tensor(i)
        number = value.reshape(()).item()
        return self.tensor(i) if LARGEST_HALF < abs(number) < float("inf") else number

    def spares(self, i: int, rank: int) -> bool:
        """A number can stand for this input: another one has at least its rank, and is of the same type."""
        others = [k for k in range(len(self.node.inputs)) if k != i and self.has(k) and self.constant(k) is None]
        kind = self.graph.types.get(self.node.inputs[i])
        return any((self.rank(k) or 0) >= rank and self.graph.types.get(self.node.inputs[k]) == kind for k in others)

    def constant(self, i: int) -> np.ndarray | None:
        return self.builder.constant(self.node.inputs[i]) if self.has(i) else None

    def known(self, i: int, what: str) -> np.ndarray:
        value = self.constant(i)
        if value is None:
            raise self.unsupported(f"{what} are computed from the data")
        return value

    def ints(self, i: int) -> Any:
        value = self.builder.elements(self.node.inputs[i])
        if value is not None:
            return unwrapped(value)
        return self.call(size_kernels.to_ints, self.tensor(i))

    def rank(self, i: int) -> int | None:
        shape = self.shape(i)
        return None if shape is None else len(shape)

    def shape(self, i: int) -> tuple[int | None, ...] | None:
        return self.graph.shapes.get(self.node.inputs[i]) if self.has(i) else None

    def used(self, j: int) -> bool:
        name = self.node.outputs[j]
        inside = any(name in n.captured for n in self.graph.nodes)
        return bool(name) and (name in self.graph.outputs or name in self.graph.consumers or inside)

    def output_rank(self, j: int = 0) -> int | None:
        shape = self.graph.shapes.get(self.node.outputs[j]) if j < len(self.node.outputs) else None
        return None if shape is None else len(shape)

    def size(self, i: int, axis: int) -> Any:
        return self.tensor(i).size(axis)

    def dtype(self, i: int) -> Any:
        return self.builder.dtype(self.node.inputs[i]) if self.has(i) else None

    def output_dtype(self, j: int = 0) -> Any:
        return self.builder.dtype(self.node.outputs[j]) if j < len(self.node.outputs) else None

    def torch_type(self, elem_type: int) -> Any:
        return self.builder.torch_type(elem_type)

    def elem_type(self, i: int) -> int:
        return self.graph.types.get(self.node.inputs[i], 0) if self.has(i) else 0

    def output_elem_type(self, j: int = 0) -> int:
        return self.graph.types.get(self.node.outputs[j], 0) if j < len(self.node.outputs) else 0

    def stored(self, i: int) -> np.ndarray | None:
        return self.builder.value(self.node.inputs[i]) if self.has(i) else None

    def whole(self, i: int) -> Any:
        return self.builder.whole(self.node.inputs[i])

    def weight(
        self, i: int, scale: np.ndarray, zero_point: np.ndarray, *, axis: int | None = None, block: int = 0
    ) -> Any:
        return self.builder.weight(self.node.inputs[i], Quantised(self.elem_type(i), scale, zero_point, axis, block))

    def carry(self, x: Any, elem_type: int, j: int = 0) -> Any:
        self.builder.carried[self.node.outputs[j]] = elem_type
        return x

    def call(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        return self.builder.call(function, *args, **kwargs)

    def buffer(self, array: np.ndarray) -> Any:
        return self.builder.buffer(array)

    def body(
        self, name: str, sources: Sequence[tuple[int, int | None] | None] = (), *, carried: int = 0
    ) -> tuple[Any, list[Any]]:
        named = [None if s is None or not self.has(s[0]) else (self.node.inputs[s[0]], s[1]) for s in sources]
        return self.builder.body(self.node, name, named, carried=carried)

    def inline(self, name: str) -> list[Any]:
        return self.builder.inline(self.node, name)

    def module(self, module: Any, bodies: Mapping[str, Any], *args: Any) -> Any:
        return self.builder.module(self.node, module, bodies, args)

    def is_sequence(self, i: int) -> bool:
        return self.node.inputs[i] not in self.graph.types

    def unsupported(self, reason: str) -> Unsupported:
        return Unsupported(reason)
