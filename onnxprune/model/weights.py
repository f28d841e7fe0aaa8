"""Which stored tensors of a graph are weights that training may change, and which are constants.

A weight is a float tensor in a place where its operator learns: not a statistic, a bound or a scale of a resize
(`Operator.fixed`), not a single number that meets others elementwise (an epsilon, a scale), not a mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx
from onnx import TensorProto

from onnxprune.model.graph import Graph, Parameter, subgraphs
from onnxprune.ops.registry import Operator

__all__ = ["FLOATS", "weights"]

FLOATS = frozenset({TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16})
MASK_LIMIT = 1e4  # what stands for minus infinity in an attention mask is far beyond any weight


def weights(graph: Graph, registry: Mapping[str, Operator]) -> set[str]:
    """Names of the parameters that are learnable."""
    inside: dict[str, list[tuple[str, int]]] = {}
    for node in graph.nodes:
        for body in subgraphs(node.proto) if node.captured else ():
            for name, op, i in reads(body):
                inside.setdefault(name, []).append((op, i))
    return {
        name
        for name, parameter in graph.parameters.items()
        if parameter.elem_type in FLOATS
        and parameter.size
        and any(
            learns(registry.get(op), i, parameter)
            for op, i in [*((n.op, i) for n, i in graph.consumers.get(name, ())), *inside.get(name, ())]
        )
        and not is_mask(graph, parameter)
    }


def reads(body: onnx.GraphProto) -> Iterator[tuple[str, str, int]]:
    """What the nodes of a body read, as (tensor, operator, input)."""
    for node in body.node:
        domain = "" if node.domain == "ai.onnx" else node.domain
        for i, name in enumerate(node.input):
            yield name, f"{domain}::{node.op_type}" if domain else node.op_type, i
        for inner in subgraphs(node):
            yield from reads(inner)


def learns(operator: Operator | None, i: int, parameter: Parameter) -> bool:
    if operator is None or i in operator.fixed:
        return False
    return not operator.broadcasts or parameter.size > 1


def is_mask(graph: Graph, parameter: Parameter) -> bool:
    """Of rank 2 and more, it holds no more than two different numbers, or one that is no weight's."""
    if len(parameter.shape) < 2 or not parameter.size:
        return False
    array = graph.array(parameter.name).astype(np.float64).reshape(-1)
    sample = array[:65536]
    if not np.isfinite(sample).all() or np.abs(sample).max(initial=0) > MASK_LIMIT:
        return True
    first = sample[0]
    others = sample[sample != first]
    return others.size > 0 and bool((others == others[0]).all())
