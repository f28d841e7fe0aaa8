"""What a model costs: parameters, multiply-accumulates and bytes, as sums of products of axis sizes.

Because the terms are expressions, the same sums give the cost of any plan without rewriting the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from onnx import TensorProto

from onnxprune.axes.analysis import Analysis
from onnxprune.axes.expr import Atom, Expr, Product, Sum, atoms, resolve
from onnxprune.axes.walk import NO_PARAMETERS, OUTPUT, parameter_of
from onnxprune.model.graph import Graph, Model
from onnxprune.model.load import stored_tensors
from onnxprune.model.payload import nbytes
from onnxprune.model.pins import batch_dimension
from onnxprune.ops.rules import MALFORMED
from onnxprune.result import ModelSummary

__all__ = ["Cost", "costs", "count", "summary"]

Counts = Mapping[Atom, int]


def count(expr: Expr, counts: Counts) -> int:
    """Size of an axis when its atoms have these sizes."""
    if isinstance(expr, Atom):
        return counts.get(expr, expr.size)
    if isinstance(expr, Product):
        return prod(count(f, counts) for f in expr.factors)
    assert isinstance(expr, Sum)
    return sum(count(p, counts) for p in expr.parts)


@dataclass(frozen=True)
class Cost:
    """A sum of terms, each a coefficient times the sizes of axes. Axes without a free atom are in the coefficient."""

    constant: float
    terms: tuple[tuple[float, tuple[Expr, ...]], ...]

    def total(self, counts: Counts) -> float:
        return self.constant + sum(self.term(k, counts) for k in range(len(self.terms)))

    def term(self, k: int, counts: Counts) -> float:
        coefficient, axes = self.terms[k]
        for axis in axes:
            coefficient *= count(axis, counts)
        return coefficient

    def by_atom(self) -> dict[Atom, list[int]]:
        """The terms that each free atom is in."""
        found: dict[Atom, list[int]] = {}
        for k, (_, axes) in enumerate(self.terms):
            for atom in {a for e in axes for a in atoms(e) if a.barrier is None}:
                found.setdefault(atom, []).append(k)
        return found


class _Builder:
    def __init__(self) -> None:
        self.constant = 0.0
        self.terms: dict[tuple[Expr, ...], float] = {}

    def add(self, coefficient: float, axes: tuple[Expr, ...]) -> None:
        variable = []
        for axis in axes:
            axis = resolve(axis)
            if any(a.barrier is None and a.size > 1 for a in atoms(axis)):
                variable.append(axis)
            else:
                coefficient *= max(axis.size, 1)
        if variable:
            key = tuple(variable)
            self.terms[key] = self.terms.get(key, 0.0) + coefficient
        else:
            self.constant += coefficient

    def build(self) -> Cost:
        return Cost(self.constant, tuple((c, axes) for axes, c in self.terms.items()))


def costs(analysis: Analysis) -> dict[str, Cost]:
    """`params` (elements), `size` (bytes) and `macs` (per sample) of the analysed model."""
    params, size, macs = _Builder(), _Builder(), _Builder()
    graph = analysis.graph
    seen: set[tuple[str, tuple[Expr, ...]]] = set()
    first: set[str] = set()
    for use, axes in analysis.uses.items():
        name = parameter_of(graph, use)
        key = (name, tuple(resolve(e) for e in axes))
        frozen = all(a.barrier is not None for e in axes for a in atoms(e))
        if key in seen or (frozen and name in first) or use[0] == OUTPUT:
            continue
        if name in first and len(axes) < 2:
            continue  # a small tensor that several uses share costs little wherever it is cut
        seen.add(key)
        first.add(name)
        parameter = graph.parameters[name]
        if parameter.elem_type not in NO_PARAMETERS:
            params.add(1.0, axes)
        if parameter.proto is not None:
            size.add(nbytes(parameter.elem_type, parameter.shape) / max(parameter.size, 1), axes)
    for tensor in stored_tensors(graph.model.proto.graph):
        known = graph.parameters.get(tensor.name)
        if known is not None and tensor.name not in first and known.elem_type not in NO_PARAMETERS:
            params.add(float(graph.parameters[tensor.name].size), ())
    stored = size.constant + sum(c * prod(e.size for e in axes) for axes, c in size.terms.items())
    size.constant += max(graph.model.nbytes - graph.model.folded - stored, 0)
    batch = batch_size(graph)
    for node in graph.nodes:
        operator = analysis.registry.get(node.op)
        if operator is None or operator.macs is None or all(n in graph.static for n in node.outputs):
            continue
        inputs = [analysis.uses.get((node.index, i)) or analysis.axes.get(n, ()) for i, n in enumerate(node.inputs)]
        outputs = [analysis.axes.get(n, ()) for n in node.outputs]
        try:
            for coefficient, axes in operator.macs(node, inputs, outputs):
                if all(e.size >= 0 for e in axes):
                    macs.add(coefficient / batch, axes)
        except MALFORMED:  # an input of unknown rank
            continue
    return {"params": params.build(), "size": size.build(), "macs": macs.build()}


def batch_size(graph: Graph) -> int:
    """The batch under which shapes were found out."""
    name = batch_dimension(graph)
    return 1 if name is None else graph.pins.get(name, 1)


_TYPES = {v: k.lower() for k, v in TensorProto.DataType.items()}


def summary(model: Model, name: str, cost: Mapping[str, Cost]) -> ModelSummary:
    """A model in numbers."""
    proto = model.proto
    versions = {o.domain: o.version for o in proto.opset_import}
    stored = {t.name for t in proto.graph.initializer}

    def shown(values: object) -> tuple[tuple[str, str, str], ...]:
        rows = []
        for v in values:  # type: ignore[attr-defined]
            if v.name in stored:
                continue
            tensor = v.type.tensor_type
            dims = ",".join(
                str(d.dim_value) if d.HasField("dim_value") else d.dim_param or "?" for d in tensor.shape.dim
            )
            rows.append(
                (
                    v.name,
                    _TYPES.get(tensor.elem_type, "?").replace("float", "float32")
                    if tensor.elem_type == 1
                    else _TYPES.get(tensor.elem_type, "?"),
                    f"({dims})",
                )
            )
        return tuple(rows)

    producer = f"{proto.producer_name} {proto.producer_version}".strip()
    return ModelSummary(
        name,
        round(cost["params"].total({})),
        round(cost["macs"].total({})),
        model.nbytes,
        versions.get("", versions.get("ai.onnx", 0)),
        proto.ir_version,
        producer,
        shown(proto.graph.input),
        shown(proto.graph.output),
    )
