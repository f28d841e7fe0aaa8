"""Which stored tensors of a graph are weights that training may change, and which are constants.

A weight is a float tensor in a place where its operator learns: not a statistic, a bound or a scale of a resize
(`Operator.fixed`), not a single number that meets others elementwise (an epsilon, a scale), not a mask, not padding.
What only moves a tensor (an Identity that an exporter put between two that share it) is looked through.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx
from onnx import TensorProto

from onnxprune.model.graph import Graph, Parameter, subgraphs
from onnxprune.ops.registry import Operator

__all__ = ["FLOATS", "reads", "statistics", "weights"]

FLOATS = frozenset({TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16})
MASK_LIMIT = 1e4  # what stands for minus infinity in an attention mask is far beyond any weight


def weights(graph: Graph, registry: Mapping[str, Operator]) -> set[str]:
    """Names of the parameters that are learnable."""
    inside: dict[str, list[tuple[str, int]]] = {}
    for node in graph.nodes:
        for body in subgraphs(node.proto) if node.captured else ():
            for name, op, i in reads(body):
                inside.setdefault(name, []).append((op, i))

    def learnt(parameter: Parameter) -> bool:
        pending, seen = [parameter.name], {parameter.name}
        while pending:
            name = pending.pop()
            if any(learns(registry.get(op), i, parameter) for op, i in inside.get(name, ())):
                return True
            for node, i in graph.consumers.get(name, ()):
                operator = registry.get(node.op)
                moved = [n for n in node.outputs if n] if operator is not None and operator.carries and i == 0 else []
                if not moved and learns(operator, i, parameter):
                    return True
                if any(n in outputs for n in moved):
                    return True
                pending += [n for n in moved if n not in seen]
                seen.update(moved)
        return False

    outputs = set(graph.outputs)
    return {
        name
        for name, parameter in graph.parameters.items()
        if parameter.elem_type in FLOATS
        and parameter.size
        and not is_padding(parameter)
        and learnt(parameter)
        and not is_mask(graph, parameter)
    }


def statistics(graph: Graph, registry: Mapping[str, Operator]) -> dict[str, int]:
    """Stored statistics that training updates as it goes over the data, and how many nodes read each of them."""
    found: dict[str, int] = {}
    origin = {name: name for name in graph.parameters}
    for node in graph.nodes:
        operator = registry.get(node.op)
        if operator is None:
            continue
        if operator.carries and len(node.inputs) == 1 and node.inputs[0] in origin:
            origin.update((name, origin[node.inputs[0]]) for name in node.outputs)
        for i in operator.running:
            if i < len(node.inputs) and node.inputs[i] in origin:
                name = origin[node.inputs[i]]
                found[name] = found.get(name, 0) + 1
    return found


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


def is_padding(parameter: Parameter) -> bool:
    """Filled with one number along several axes, not stored: zeros that are joined to a tensor, and no weight."""
    return parameter.proto is None and sum(n > 1 for n in parameter.shape) > 1


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
