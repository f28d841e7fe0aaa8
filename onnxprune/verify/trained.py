"""The proof of a model that was trained after the surgery.

Its outputs are others than the masked original's, and are meant to be. So the proof is taken of the surgery, done again
from the stored plan, and the file has to be what came out of it, with other numbers in its weights and nothing else:
the same nodes, attributes, names, types, shapes and constants.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import AttributeProto, NodeProto, TensorProto

from onnxprune.axes.analysis import Analysis
from onnxprune.errors import ModelRejected, VerificationFailed
from onnxprune.model.graph import Graph, Model, Node, Parameter, names_used
from onnxprune.model.infer import infer
from onnxprune.model.load import open_model
from onnxprune.model.save import write
from onnxprune.model.weights import reads, statistics, weights
from onnxprune.ops.registry import Operator
from onnxprune.result import Verification
from onnxprune.rewrite.fold import folded
from onnxprune.rewrite.rewrite import rewrite
from onnxprune.select.plan import Plan
from onnxprune.verify.equivalence import check, prove
from onnxprune.verify.runs import feeds_that_run, session

__all__ = ["differences", "prove_trained"]

NOTE = "trained: weights not compared"
_STORED_INTEGERS = frozenset(
    {TensorProto.INT8, TensorProto.UINT8, TensorProto.INT16, TensorProto.UINT16, TensorProto.INT32}
)

Registry = Mapping[str, Operator]


def prove_trained(
    analysis: Analysis,
    plan: Plan,
    path: Path,
    trained: Model,
    *,
    seed: int = 0,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> Verification:
    """Prove the surgery of a trained file, that the file is its result with other weights, and that it runs.

    trained: the file, opened. Raises VerificationFailed, and ModelRejected where onnxruntime can't run the original.
    """
    registry, pins = analysis.registry, analysis.graph.pins
    with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
        again = Path(folder) / "pruned.onnx"
        model = rewrite(analysis, plan)
        write(model, again)
        found = prove(analysis, plan, again, seed=seed, shapes=shapes, model=model)
        graph = infer(trained, registry, pins)
        wanted = infer(open_model(again), registry, pins)
        sizes = _sizes(analysis.graph) | _sizes(wanted)
        problem = next(differences(wanted, graph, free=folded(analysis.graph, wanted), sizes=sizes), None)
    if problem is not None:
        raise VerificationFailed(
            f"{path.name} differs from the pruned original in more than its weights: {problem}",
            "was it changed after it was written?",
        )
    check(path, analysis.graph.model)
    try:
        feeds_that_run(graph, session(path), seed, shapes)
    except ModelRejected as error:
        raise VerificationFailed(f"the trained model does not run: {error}") from None
    return replace(found, notes=(*found.notes, NOTE))


def differences(
    wanted: Graph, found: Graph, *, free: Set[str] = frozenset(), sizes: Set[str] = frozenset()
) -> Iterator[str]:
    """In words, where a graph is not the wanted one with other weights. free: stored tensors made of weights. sizes:
    that may be stored in one of them only."""
    yield from _header(wanted.model.proto, found.model.proto)
    yield from _graphs(wanted, found, "", free, sizes)


def _header(wanted: onnx.ModelProto, found: onnx.ModelProto) -> Iterator[str]:
    opsets = [sorted((o.domain, o.version) for o in p.opset_import) for p in (wanted, found)]
    if opsets[0] != opsets[1] or wanted.ir_version != found.ir_version:
        yield "it is of another opset or IR version"


def _graphs(
    wanted: Graph, found: Graph, where: str, made: Set[str] = frozenset(), sizes: Set[str] = frozenset()
) -> Iterator[str]:
    """where: the path of control-flow nodes, for messages. made: of weights."""
    protos = wanted.model.proto.graph, found.model.proto.graph
    for field in ("input", "output", "value_info", "sparse_initializer", "quantization_annotation"):
        if _bytes(getattr(protos[0], field)) != _bytes(getattr(protos[1], field)):
            yield f"{where}the graph's {field.replace('_', ' ')}s are others"
    for name in sorted((wanted.parameters.keys() ^ found.parameters.keys()) - sizes):
        yield f"{where}the tensor '{name}' is stored in one of them only"
    free = _trainable(wanted) | made
    for name in sorted(wanted.parameters.keys() & found.parameters.keys()):
        yield from (f"{where}{text}" for text in _tensors(wanted, found, name, free=name in free))
    nodes = [_computing(g) for g in (wanted, found)]
    if len(nodes[0]) != len(nodes[1]):
        yield f"{where}it has {len(nodes[1])} nodes instead of {len(nodes[0])}"
        return
    for a, b in zip(*nodes, strict=True):
        if _bare(a.proto) != _bare(b.proto):
            yield f"{where}the node '{b.label}' is another"
            continue
        for (name, one), (_, other) in zip(_bodies(a.proto), _bodies(b.proto), strict=True):
            inner = f"{where}{a.label}/{name}: "
            yield from _graphs(_inner(wanted, one), _inner(found, other), inner)


def _computing(graph: Graph) -> list[Node]:
    """The nodes that are no stored tensors."""
    return [n for n in graph.nodes if not any(o in graph.parameters for o in n.outputs)]


def _sizes(graph: Graph) -> set[str]:
    """What is read by nodes that fill a tensor with one number. When that is trained it is stored instead, and they are
    left behind."""
    return {name for n in graph.nodes if any(o in graph.parameters for o in n.outputs) for name in n.inputs}


def _tensors(wanted: Graph, found: Graph, name: str, *, free: bool) -> Iterator[str]:
    """free: it is a weight, whose numbers may be any."""
    forms = [(g.parameters[name].elem_type, g.parameters[name].shape) for g in (wanted, found)]
    if forms[0] != forms[1]:
        yield f"the tensor '{name}' has another type or shape"
        return
    a, b = wanted.array(name), found.array(name)
    same = np.array_equal(a, b) or a.tobytes() == b.tobytes()
    if not same and not free:
        yield f"the constant '{name}' has other values"
    elif not same and b.dtype.kind == "f" and not np.isfinite(b).all() and np.isfinite(a).all():
        yield f"the weight '{name}' holds nan or infinity"
    wanted.release(name)
    found.release(name)


def _trainable(graph: Graph) -> set[str]:
    """Stored tensors that training may have changed: weights, running statistics, and integers that stand for
    weights."""
    found = weights(graph, graph.registry) | set(statistics(graph, graph.registry))
    uses = [(name, n.op, i) for n in graph.nodes for i, name in enumerate(n.inputs)]
    uses += [use for n in graph.nodes for _, body in _bodies(n.proto) for use in reads(body)]
    for name, op, i in uses:
        parameter, operator = graph.parameters.get(name), graph.registry.get(op)
        if parameter is None or operator is None:
            continue
        if i in operator.running or _stands(operator, i, parameter):
            found.add(name)
    return found


def _stands(operator: Operator, i: int, parameter: Parameter) -> bool:
    """Whether stored integers stand for weights."""
    zero_points = {zero for _, zero in operator.quantised}
    integers = parameter.elem_type in _STORED_INTEGERS and parameter.size > 1
    return integers and bool(operator.quantised) and i not in zero_points


def _bodies(node: NodeProto) -> Iterator[tuple[str, onnx.GraphProto]]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.name, attribute.g


def _inner(outer: Graph, body: onnx.GraphProto) -> Graph:
    """A body as a graph of its own, for its stored tensors and who reads them."""
    proto = onnx.ModelProto(ir_version=outer.model.proto.ir_version, graph=body)
    proto.opset_import.extend(outer.model.proto.opset_import)
    for name in sorted(names_used(body)):
        proto.graph.input.add(name=name)
    return infer(Model(proto, outer.model.payloads), outer.registry, outer.pins)


def _bare(node: NodeProto) -> bytes:
    """A node without its bodies."""
    copy = NodeProto()
    copy.CopyFrom(node)
    for attribute in copy.attribute:
        if attribute.type == AttributeProto.GRAPH:
            attribute.ClearField("g")
    return copy.SerializeToString(deterministic=True)


def _bytes(messages: Sequence) -> list[bytes]:
    return [m.SerializeToString(deterministic=True) for m in messages]
