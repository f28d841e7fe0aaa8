"""What a model declares of its inputs and outputs: names, dtypes and sizes, free ones as None.

Data is checked against this and nothing else of the model, so that a caller who runs the model at another batch
size only changes the ports.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from onnxprune.errors import DataError

if TYPE_CHECKING:
    from onnx import ValueInfoProto

    from onnxprune.model.graph import Graph

__all__ = ["Port", "Signature", "shape_text", "signature_of"]


def shape_text(shape: Sequence[int | None], *, lead: str = "N") -> str:
    """`(N,3,224,224)`: a free leading size is `lead`, any other free size is ?."""
    return "(" + ",".join((lead if k == 0 else "?") if d is None else str(d) for k, d in enumerate(shape)) + ")"


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output. In `shape` a free size is None; `shape` itself is None where the rank is unknown.
    The dtype of text, and of what is no tensor, is object."""

    name: str
    dtype: np.dtype
    shape: tuple[int | None, ...] | None

    def __str__(self) -> str:
        return shape_text(self.shape) if self.shape is not None else "any shape"


@dataclass(frozen=True, slots=True)
class Signature:
    """The ports of a model, in its order."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    @property
    def leads(self) -> set[int | None]:
        """The leading sizes of the inputs whose rank is known and not 0."""
        return {p.shape[0] for p in self.inputs if p.shape}

    @property
    def whole(self) -> bool:
        """Whether the inputs share no leading axis to count samples by (a scalar, or a fixed size beside a free or
        another one). Data for such a model is cut into complete feeds, not into rows."""
        return any(p.shape == () for p in self.inputs) or len(self.leads) > 1

    @property
    def batch(self) -> int | None:
        """The batch size that the model is fixed to; None where it is free."""
        return next(iter(self.leads)) if len(self.leads) == 1 and not self.whole else None

    def with_batch(self, size: int | None) -> Signature:
        """The same at another batch size (None: free), for a caller who runs the model at that. Raises DataError
        where the inputs share no batch axis."""
        if self.whole:
            raise DataError("the inputs of the model share no batch axis: it runs on complete feeds only")
        ports = (replace(p, shape=(size, *p.shape[1:])) if p.shape else p for p in self.inputs)
        return replace(self, inputs=tuple(ports))


def signature_of(graph: Graph) -> Signature:
    """The declared inputs and outputs of a graph. Raises DataError where an input is no tensor."""
    declared = {v.name: v for v in graph.model.proto.graph.input}
    for name in graph.inputs:
        if not declared[name].type.HasField("tensor_type"):
            kind = (declared[name].type.WhichOneof("value") or "value of no type").removesuffix("_type")
            raise DataError(f"input '{name}' of the model is a {kind}; data can only be given for tensors")
    outputs = {v.name: v for v in graph.model.proto.graph.output}
    return Signature(
        tuple(_port(declared[name], graph) for name in graph.inputs),
        tuple(_port(outputs[name], graph) for name in graph.outputs),
    )


def _port(value: ValueInfoProto, graph: Graph) -> Port:
    from onnxprune.model.payload import dtype_of

    tensor = value.type.tensor_type
    element = tensor.elem_type or graph.types.get(value.name, 0)
    if not value.type.HasField("tensor_type") or not element:
        return Port(value.name, np.dtype(object), None)
    if not tensor.HasField("shape"):
        return Port(value.name, dtype_of(element), None)
    shape = tuple(d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None for d in tensor.shape.dim)
    return Port(value.name, dtype_of(element), shape)
