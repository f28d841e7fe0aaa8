"""The operators that a network spends its time on, and the sizes at which pruning may leave them.

An anchor is a node with multiply-accumulates of which some axis may shrink. Its *coordinates* are the axes that do, as
expressions over atoms; `kernel` gives the operator alone at other sizes of them, with its attributes as the rewriter
would patch them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto

from onnxprune.axes.analysis import Analysis
from onnxprune.axes.expr import Atom, Expr, Product, Sum, atoms, resolve
from onnxprune.latency.kernels import Kernel, Operand, opsets_of
from onnxprune.model.graph import Node
from onnxprune.model.payload import dtype_of
from onnxprune.model.profile import count
from onnxprune.ops.rules import MALFORMED, Term
from onnxprune.rewrite.patch import Patch
from onnxprune.rewrite.rewrite import Rewrite
from onnxprune.select.plan import Plan

__all__ = ["Anchor", "Kernels", "anchors", "sized"]

Counts = Mapping[Atom, int]
Shape = tuple[int | None, ...]
SMALL = 4096  # elements of an input whose values are looked at: sizes and positions


@dataclass(frozen=True, eq=False)
class Anchor:
    """A node, the axes of it that may shrink (none of which shares an atom with another), and its
    multiply-accumulates."""

    node: Node
    coordinates: tuple[Expr, ...]
    macs: tuple[Term, ...]

    def work(self, counts: Counts) -> float:
        """Multiply-accumulates at these sizes."""
        total = 0.0
        for coefficient, axes in self.macs:
            for axis in axes:
                coefficient *= count(axis, counts)
            total += coefficient
        return total


def anchors(analysis: Analysis, free: Collection[Atom]) -> list[Anchor]:
    """The anchors of a graph, in its order. free: the atoms that may lose units."""
    found = []
    for node in analysis.graph.nodes:
        operator = analysis.registry.get(node.op)
        if operator is None or operator.macs is None or all(n in analysis.graph.static for n in node.outputs):
            continue
        inputs = [_axes(analysis, node, i) for i in range(len(node.inputs))]
        outputs = [analysis.axes.get(n, ()) for n in node.outputs]
        try:
            terms = tuple(t for t in operator.macs(node, inputs, outputs) if all(e.size >= 0 for e in t[1]))
        except MALFORMED:  # an input of unknown rank
            continue
        resolved = dict.fromkeys(resolve(e) for axes in (*inputs, *outputs) for e in axes)
        coordinates = _independent([e for e in resolved if not set(atoms(e)).isdisjoint(free)], free)
        if coordinates and terms:
            found.append(Anchor(node, coordinates, terms))
    return found


def _axes(analysis: Analysis, node: Node, i: int) -> tuple[Expr, ...]:
    return analysis.uses.get((node.index, i)) or analysis.axes.get(node.inputs[i], ())


def _independent(axes: list[Expr], free: Collection[Atom]) -> tuple[Expr, ...]:
    """Axes that can be sized one by one: of two that share an atom, the simpler one and what is left of the other."""
    chosen: list[Expr] = []
    taken: set[Atom] = set()
    for axis in sorted(axes, key=lambda e: len(set(atoms(e)))):
        mine = [a for a in dict.fromkeys(atoms(axis)) if a in free]
        if taken.isdisjoint(mine):
            chosen.append(axis)
        else:
            chosen += [a for a in mine if a not in taken]
        taken.update(mine)
    return tuple(chosen)


def sized(axis: Expr, share: float, step: Mapping[Atom, int]) -> dict[Atom, int]:
    """Sizes of an axis' atoms that leave about this share of it, in whole blocks of `step` units."""
    axis = resolve(axis)
    if isinstance(axis, Atom):
        if axis not in step:
            return {}
        block = step[axis]
        return {axis: min(axis.size, max(block, round(share * axis.size / block) * block))}
    if isinstance(axis, Sum):
        return {a: n for part in axis.parts for a, n in sized(part, share, step).items()}
    assert isinstance(axis, Product)
    able = [f for f in axis.factors if not step.keys().isdisjoint(atoms(f))]
    return sized(max(able, key=lambda f: f.size), share, step) if able else {}


class Kernels(Rewrite):
    """Makes the operator of an anchor at other sizes. shapes: of all tensors, at the sizes that time is taken at."""

    def __init__(self, analysis: Analysis, shapes: Mapping[str, Shape]) -> None:
        super().__init__(analysis, Plan({}))
        self.shapes = shapes
        self.opsets = opsets_of(self.graph.model.proto)
        self.ir_version = self.graph.model.proto.ir_version

    def kernel(self, anchor: Anchor, counts: Counts) -> Kernel | None:
        """The operator by itself when atoms have these sizes; None where it does not stand alone."""
        node = anchor.node
        if node.captured:
            return None
        self._shrink(node, counts)
        patch = Patch(self, node)
        operator = self.analysis.registry[node.op]
        try:
            if operator.patch is not None:
                operator.patch(patch)
            inputs = tuple(self._operand(node, i, counts) for i in range(len(node.inputs)))
        except (*MALFORMED, LookupError, AssertionError):
            return None
        if self.edit.before or self.edit.after or len(patch.new.input) != len(node.inputs):
            return None  # more than the operator itself changes
        held = NodeProto()
        held.attribute.extend(patch.new.attribute)
        outputs = tuple(self.graph.types.get(n, 0) if n else 0 for n in node.outputs)
        if any(n and not elem for n, elem in zip(node.outputs, outputs, strict=True)):
            return None
        proto = node.proto
        return Kernel(
            proto.op_type,
            "" if proto.domain == "ai.onnx" else proto.domain,
            held.SerializeToString(deterministic=True),
            inputs,
            outputs,
            self.opsets,
            self.ir_version,
        )

    def _shrink(self, node: Node, counts: Counts) -> None:
        """Forget the last plan, and keep the first units of each atom."""
        self.keep = {a: np.arange(n) for a, n in counts.items() if n != a.size}
        for known in (self.memo, self.values, self.lost, self.edit.changes, self.edit.before, self.edit.after):
            known.clear()
        self.edit.new_tensors.clear()
        self.edit.nodes[node.index].CopyFrom(node.proto)

    def _operand(self, node: Node, i: int, counts: Counts) -> Operand | None:
        name = node.inputs[i]
        if not name:
            return None
        change = self.edit.changes.get((node.index, i))
        known = self.graph.parameters[name].shape if name in self.graph.parameters else self.shapes[name]
        if any(n is None for n in known):
            raise LookupError(name)
        shape = [int(n) for n in known if n is not None]
        for k, axis in enumerate(_axes(self.analysis, node, i)):
            if axis.size > 0:
                shape[k] = shape[k] * count(axis, counts) // axis.size
        elem = self.graph.types.get(name) or self.graph.parameters[name].elem_type
        stored = name in self.graph.static
        value = None
        dtype = dtype_of(elem)
        if dtype.kind in "iu" and stored and int(np.prod(shape)) <= SMALL:
            array = change.make(self.graph.array(name)) if change is not None else self._array(name)
            if array is not None and array.shape == tuple(shape):
                value = np.ascontiguousarray(array, dtype).tobytes()
        return Operand(elem, tuple(shape), stored, value)

    def _array(self, name: str) -> np.ndarray | None:
        return self.graph.array(name) if name in self.graph.parameters else self.graph.values.get(name)
