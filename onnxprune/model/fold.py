"""Weights that a model computes from its weights and their statistics are stored as what they come to.

Weight standardisation and weight norm divide every weight by a statistic over input channels, so that no channel could
go without changing the rest. Nothing in that depends on the model's input: onnxruntime folds it whenever the model is
loaded. Products of weights stay as they are (a factorised matrix is smaller than its product, and prunable).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from math import prod

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxprune.axes.expr import Atom, Barrier
from onnxprune.model.graph import Graph, Model, Node
from onnxprune.model.payload import Computed, nbytes
from onnxprune.ops.registry import Operator
from onnxprune.ops.rules import MALFORMED, AxisContext, GiveUp, Kind

__all__ = ["with_statistics_folded"]

LARGEST = 500_000_000  # bytes that one folded tensor may depend on
LISTED_BEFORE_IR = 4  # initializers had to be listed as graph inputs


def with_statistics_folded(graph: Graph, registry: Mapping[str, Operator]) -> Model | None:
    """A copy of the graph's model in which such weights are stored, under the name of the tensor that they were
    computed as; None where there are none."""
    found: dict[str, np.ndarray] = {}
    for name in _frontier(graph, registry):
        value = _computed(graph, name)
        if value is not None:
            found[name] = value
    return _stored(graph, found) if found else None


def _frontier(graph: Graph, registry: Mapping[str, Operator]) -> list[str]:
    """Tensors behind a statistic of weights, where data meets them."""
    weights = {n for n in graph.weighted if n in graph.parameters}
    behind: set[str] = set()
    for node in graph.nodes:
        if node.captured or not graph.static.issuperset(filter(None, node.inputs)):
            continue
        made = [n for n in node.outputs if n and n not in graph.parameters]
        if any(n in behind for n in node.inputs):
            behind.update(made)
        elif any(n in weights for n in node.inputs):
            weights.update(made)
            if _takes_statistics(graph, node, registry.get(node.op)):
                behind.update(made)
    data = [node for node in graph.nodes if not graph.static.issuperset(filter(None, node.outputs))]
    met = {n for node in data for n in node.inputs}
    return [n for node in graph.nodes for n in node.outputs if n in behind and n in met]


def _takes_statistics(graph: Graph, node: Node, operator: Operator | None) -> bool:
    """True where an axis disappears into a mean, a norm or an extreme value, as the operator's axis rule says."""
    if operator is None or operator.axes is None:
        return False
    shapes = [graph.shapes.get(n) for n in node.inputs]
    axes = [None if s is None else tuple(Atom(-1 if n is None else n) for n in s) for s in shapes]
    values = [graph.values.get(n) for n in node.inputs]
    outputs = [graph.shapes.get(n) for n in node.outputs]
    context = AxisContext(node, Barrier(node.label, node.op, ""), axes, values, outputs)
    try:
        operator.axes(context)
    except (GiveUp, *MALFORMED):
        return False
    return any(c.kind not in (Kind.PRODUCT, Kind.STATE) for c in context.contractions)


def _computed(graph: Graph, name: str) -> np.ndarray | None:
    """The value of a tensor that depends on parameters only; None where it is random, larger than what it is computed
    from, or onnxruntime can't tell."""
    nodes, parameters = _upstream(graph, name)
    stored = [graph.parameters[n] for n in sorted(parameters)]
    shape = graph.shapes.get(name, ())
    if None in shape or prod(n or 0 for n in shape) > sum(p.size for p in stored):
        return None
    if sum(p.size for p in stored) * 8 > LARGEST:
        return None
    initializers = [numpy_helper.from_array(np.asarray(graph.array(p.name), order="C"), p.name) for p in stored]
    body = helper.make_graph([n.proto for n in nodes], "weights", [], [onnx.ValueInfoProto(name=name)], initializers)
    body.output[0].type.tensor_type.elem_type = graph.types.get(name, TensorProto.FLOAT)
    source = graph.model.proto
    model = helper.make_model(body, opset_imports=source.opset_import, ir_version=max(source.ir_version, 4))
    return _run(model)


def _upstream(graph: Graph, name: str) -> tuple[list[Node], set[str]]:
    """The nodes that a tensor is computed by, in order, and the parameters that it is computed from."""
    nodes: set[int] = set()
    parameters: set[str] = set()
    pending = [name]
    while pending:
        now = pending.pop()
        if now in graph.parameters:
            parameters.add(now)
            continue
        node = graph.producers[now]
        if node.index not in nodes:
            nodes.add(node.index)
            pending += [n for n in node.inputs if n]
    return [graph.nodes[k] for k in sorted(nodes)], parameters


def _run(model: onnx.ModelProto) -> np.ndarray | None:
    """The only output of a model without inputs; None where it doesn't run, or another time gives something else."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        first, second = (np.asarray(session.run(None, {})[0]) for _ in range(2))
    except Exception:  # onnxruntime raises types of its own; the model is then analysed as it stands
        return None
    return first if np.array_equal(first, second) else None


def _stored(graph: Graph, values: Mapping[str, np.ndarray]) -> Model:
    """The model with these tensors as initializers, without the nodes and parameters that only they needed."""
    source = graph.model
    model = Model(onnx.ModelProto(), dict(source.payloads), source.source, source.nbytes)
    model.proto.CopyFrom(source.proto)
    body = model.proto.graph
    gone = _gone(graph, values)
    for k in reversed(range(len(body.node))):
        outputs = body.node[k].output
        if gone.intersection(outputs):
            del body.node[k]
            continue
        for j, name in enumerate(outputs):
            if name in values:  # another output of this node is still read
                outputs[j] = f"{name}_computed"
    dropped = [graph.parameters[n] for n in gone if n in graph.parameters]
    model.folded = sum(nbytes(p.elem_type, p.shape) for p in dropped if p.proto is not None)
    model.folded -= sum(nbytes(graph.types[n], v.shape) for n, v in values.items())
    for entries in (body.initializer, body.input, body.value_info):
        for k in reversed([k for k, entry in enumerate(entries) if entry.name in gone - values.keys()]):
            del entries[k]
    for name, value in values.items():
        tensor = body.initializer.add(name=name, data_type=graph.types[name], dims=value.shape)
        model.attach(tensor, Computed(partial(_same, value)))
        if model.proto.ir_version < LISTED_BEFORE_IR:
            body.input.append(helper.make_tensor_value_info(name, graph.types[name], list(value.shape)))
    return model


def _same(value: np.ndarray) -> np.ndarray:
    return value


def _gone(graph: Graph, values: Iterable[str]) -> set[str]:
    """What nothing reads any more when these tensors are stored."""
    found = set(values)
    upstream: set[int] = set()
    parameters: set[str] = set()
    for name in found:
        nodes, stored = _upstream(graph, name)
        upstream.update(n.index for n in nodes)
        parameters |= stored
    upstream |= {graph.producers[p].index for p in parameters if p in graph.producers}
    read = set(graph.outputs)
    gone: set[str] = set()
    for node in reversed(graph.nodes):
        if node.index in upstream and not (read - found).intersection(node.outputs):
            gone.update(n for n in node.outputs if n)
        else:
            read.update((*node.inputs, *node.captured))
    return gone | (parameters - read)
