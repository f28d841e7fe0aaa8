"""The masked original: the same graph with the removed units zeroed, against which the surgery is proved.

For exact and compensated groups only what produces a unit is zeroed, so that the proof covers their zero-invariance
as well: the units must vanish by themselves. For inexact groups what consumes a unit is zeroed too, and reductions
over its axis are taken over the kept units only, so that the surgery is proved even where the function changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto

from onnxprune.axes.analysis import NEEDS_MASK, Analysis, Group
from onnxprune.axes.dead import CONSUMES, FOLLOWS, INEXACT, Use
from onnxprune.axes.expr import Atom, atoms, kept
from onnxprune.model.graph import Model, Node
from onnxprune.model.payload import dtype_of
from onnxprune.ops.rules import Kind
from onnxprune.rewrite.edit import Change, Edit
from onnxprune.select.plan import Plan

__all__ = ["masked", "not_zero"]


def masked(analysis: Analysis, plan: Plan) -> Model:
    """The original model with the units that the plan removes set to zero."""
    edit = Edit(analysis.graph)
    keep = plan.by_atom(analysis)
    pruned = plan.pruned(analysis)
    for use, axes in _zeroed(pruned).items():
        _zero(analysis, edit, use, axes, keep)
    inexact = {g.atom: keep[g.atom] for g in pruned if g.kind == INEXACT}
    if inexact:
        edit.later.extend(
            partial(_mask, analysis, edit, analysis.graph.nodes[k], inexact) for k in analysis.contractions
        )
    return edit.build()


def not_zero(analysis: Analysis, plan: Plan) -> list[str]:
    """Parameters that produce removed units and are not exactly zero there, as a model's are after training with a
    method that makes units vanish."""
    keep = plan.by_atom(analysis)
    edit = Edit(analysis.graph)
    found = []
    for use, axes in _zeroed(plan.pruned(analysis), producing_only=True).items():
        _zero(analysis, edit, use, axes, keep)
        name = analysis.graph.nodes[use[0]].inputs[use[1]]
        array = analysis.graph.array(name)
        if not np.array_equal(edit.changes[use].make(array), array):
            found.append(name)
        analysis.graph.release(name)
    return found


def _zeroed(groups: Sequence[Group], *, producing_only: bool = False) -> dict[Use, list[tuple[int, Atom]]]:
    """Axes of every use of a parameter whose dead indices are set to zero."""
    found: dict[Use, list[tuple[int, Atom]]] = {}
    for group in groups:
        for m in group.members:
            if m.role != FOLLOWS and (m.role != CONSUMES or (group.kind == INEXACT and not producing_only)):
                found.setdefault(m.use, []).append((m.axis, group.atom))
    return found


def _zero(
    analysis: Analysis, edit: Edit, use: Use, where: Sequence[tuple[int, Atom]], keep: dict[Atom, np.ndarray]
) -> None:
    axes = analysis.uses[use]
    dead: dict[int, np.ndarray] = {}
    for axis, atom in where:
        mask = kept(axes[axis], {atom: keep[atom]})
        assert mask is not None
        gone = np.setdiff1d(np.arange(axes[axis].size), mask)
        dead[axis] = np.union1d(dead[axis], gone) if axis in dead else gone
    zero = _zero_point(analysis, use)

    def make(array: np.ndarray) -> np.ndarray:
        out = np.array(array)
        for axis, gone in dead.items():
            index: list[Any] = [slice(None)] * out.ndim
            index[axis] = gone
            if zero is None or zero.size == 1:
                out[tuple(index)] = 0 if zero is None else zero.reshape(-1)[0]
            else:
                out[tuple(index)] = np.broadcast_to(_aligned(zero, out), out.shape)[tuple(index)]
        return out

    key = tuple((axis, gone.tobytes()) for axis, gone in sorted(dead.items()))
    name = analysis.graph.nodes[use[0]].inputs[use[1]]
    edit.changes[use] = Change(key, analysis.graph.parameters[name].shape, make, uniform=False)


def _zero_point(analysis: Analysis, use: Use) -> np.ndarray | None:
    """The integers that stand for zero in a quantised parameter; None where that is 0."""
    node = analysis.graph.nodes[use[0]]
    for i, j in analysis.registry[node.op].quantised:
        if i == use[1] and j < len(node.inputs) and node.inputs[j]:
            name = node.inputs[j]
            if name in analysis.graph.parameters:
                return analysis.graph.array(name)
    return None


def _aligned(zero: np.ndarray, like: np.ndarray) -> np.ndarray:
    """A zero point per channel, laid along the axis that has its length."""
    if zero.ndim != 1:
        return zero
    axis = next(k for k, n in enumerate(like.shape) if n == zero.size)
    shape = [1] * like.ndim
    shape[axis] = -1
    return zero.reshape(shape)


@dataclass
class _Mask:
    """One reduction in the masked original: see `ops.rules.MaskContext`."""

    analysis: Analysis
    edit: Edit
    node: Node
    masks: dict[tuple[int, int], np.ndarray]  # (input, axis) -> 1 for kept indices, 0 for removed ones

    @property
    def new(self) -> NodeProto:
        return self.edit.nodes[self.node.index]

    def rank(self, i: int) -> int:
        return len(self.analysis.axes[self.node.inputs[i]])

    def has(self, i: int) -> bool:
        return i < len(self.node.inputs) and bool(self.node.inputs[i])

    def input(self, i: int) -> str:
        return self.new.input[i]

    def constant(self, value: Any, like: int = 0) -> str:
        elem = self.analysis.graph.types[self.node.inputs[like]]
        return self.edit.constant("mask", np.asarray(value).astype(dtype_of(elem)))

    def mask(self, i: int) -> np.ndarray:
        result = np.ones([1] * self.rank(i))
        for (j, axis), mask in self.masks.items():
            if j == i:
                shape = [1] * result.ndim
                shape[axis] = -1
                result = result * mask.reshape(shape)
        return result

    def size(self, i: int, axes: Sequence[int]) -> int:
        found = self.analysis.axes[self.node.inputs[i]]
        return prod(found[k].size for k in axes)

    def laid(self, i: int, axis: int) -> str:
        shape = [1] * self.rank(0)
        shape[axis] = -1
        return self.before("Reshape", [self.new.input[i], self.edit.constant("shape", np.array(shape, np.int64))])

    def kept_fraction(self, i: int) -> float:
        return float(np.prod([m.mean() for (j, _), m in self.masks.items() if j == i]))

    def before(self, op: str, inputs: Sequence[str], **attributes: Any) -> str:
        out = self.edit.name(f"{self.node.outputs[0]}_masked")
        self.edit.insert_before(self.node.index, op, list(inputs), out, **attributes)
        return out

    def summed(self, x: str, axes: Sequence[int]) -> str:
        imports = {o.domain: o.version for o in self.analysis.graph.model.proto.opset_import}
        if imports.get("", imports.get("ai.onnx", 13)) < 13:
            return self.before("ReduceSum", [x], axes=list(axes), keepdims=1)
        return self.before("ReduceSum", [x, self.edit.constant("axes", np.array(axes, np.int64))], keepdims=1)

    def replace_input(self, i: int, name: str) -> None:
        self.new.input[i] = name

    def become(self, op: str, inputs: Sequence[str]) -> None:
        self.new.op_type, self.new.domain = op, ""
        del self.new.attribute[:]
        del self.new.input[:]
        self.new.input.extend(inputs)

    def scale_output(self, factor: float) -> None:
        out = self.node.outputs[0]
        hidden = self.edit.name(f"{out}_unscaled")
        self.new.output[0] = hidden
        self.edit.insert_after(self.node.index, "Mul", [hidden, self.constant(factor)], out)


def _mask(analysis: Analysis, edit: Edit, node: Node, inexact: dict[Atom, np.ndarray]) -> None:
    """Leave the removed units of inexact groups out of everything that the node sums over."""
    masks: dict[tuple[int, int], np.ndarray] = {}
    kinds = set()
    for contraction in analysis.contractions.get(node.index, ()):
        gone = {a: inexact[a] for a in set(atoms(contraction.over)) if a in inexact}
        if not gone or contraction.kind is Kind.STATE:
            continue
        for i, axis in contraction.operands:
            use = analysis.uses.get((node.index, i))
            axes = use if use is not None else analysis.axes[node.inputs[i]]
            mask = kept(axes[axis], gone)
            if mask is not None and node.inputs[i] not in analysis.graph.parameters:
                ones = np.zeros(axes[axis].size)
                ones[mask] = 1.0
                masks[i, axis] = ones
                kinds.add(contraction.kind)
    if not masks:
        return
    context = _Mask(analysis, edit, node, masks)
    if kinds & NEEDS_MASK:
        rule = analysis.registry[node.op].mask
        assert rule is not None, node.op
        rule(context)
        return
    i = min(i for i, _ in masks)
    if analysis.graph.types[node.inputs[i]] in _FLOATS:
        context.new.input[i] = context.before("Mul", [context.new.input[i], context.constant(context.mask(i), i)])


_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16}
