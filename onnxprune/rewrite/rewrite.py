"""A plan made real: the smaller graph, in which only what must change changes.

Rules:
1. Every parameter is sliced at its use; a use that needs another slice gets a tensor of its own.
2. Nodes are patched by their operator's rule. Sizes and positions that a node reads are compared with what the new
   graph computes by itself (shape arithmetic is folded again, in the new sizes): what follows is left alone, a
   constant is exchanged, and what is computed from elsewhere is corrected by a factor. Nothing is patched twice.
3. A value computed from a pruned size that is used as a number and not as a size (an attention scale) keeps its value.
4. Constants that dead units contributed are folded into biases, means over pruned axes are rescaled.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from onnx import NodeProto, helper

from onnxprune.axes.analysis import Analysis
from onnxprune.axes.dead import INEXACT
from onnxprune.axes.expr import Atom, Expr, Product, Sum, atoms, kept, resolve
from onnxprune.axes.vanish import broadcast_region
from onnxprune.model.graph import Graph, Model, Node
from onnxprune.model.payload import dtype_of
from onnxprune.ops.rules import Contraction
from onnxprune.rewrite.edit import Change, Edit
from onnxprune.select.plan import METADATA_KEY, Plan, plan_to_text

__all__ = ["rewrite"]

Kept = np.ndarray | None


def rewrite(analysis: Analysis, plan: Plan) -> Model:
    """The pruned model. The plan is stored in its metadata."""
    work = _Rewrite(analysis, plan)
    work.run()
    model = work.edit.build()
    entry = next((p for p in model.proto.metadata_props if p.key == METADATA_KEY), None)
    if entry is None:
        entry = model.proto.metadata_props.add(key=METADATA_KEY)
    entry.value = plan_to_text(plan, analysis)
    return model


class _Rewrite:
    """The pass over the nodes."""

    def __init__(self, analysis: Analysis, plan: Plan) -> None:
        self.analysis = analysis
        self.graph: Graph = analysis.graph
        self.keep = plan.by_atom(analysis)
        self.inexact = {g.atom for g in analysis.groups if g.kind == INEXACT}
        self.edit = Edit(self.graph)
        self.values: dict[str, np.ndarray] = {}  # known values that differ from the original's
        self.memo: dict[str, tuple[Kept, ...]] = {}

    def run(self) -> None:
        for node in self.graph.nodes:
            self.visit(node)
        for name, axes in self.analysis.axes.items():
            masks = self.masks(name, axes)
            if any(m is not None for m in masks):
                self.edit.resized[name] = tuple(
                    e.size if m is None else len(m) for e, m in zip(axes, masks, strict=True)
                )

    def masks(self, name: str, axes: Sequence[Expr]) -> tuple[Kept, ...]:
        if name not in self.memo:
            self.memo[name] = tuple(kept(e, self.keep) for e in axes)
        return self.memo[name]

    def input_masks(self, node: Node, i: int) -> tuple[Kept, ...]:
        use = self.analysis.uses.get((node.index, i))
        if use is not None:
            return tuple(kept(e, self.keep) for e in use)
        name = node.inputs[i]
        return self.masks(name, self.analysis.axes.get(name, ()))

    def output_masks(self, node: Node, j: int) -> tuple[Kept, ...]:
        name = node.outputs[j]
        return self.masks(name, self.analysis.axes.get(name, ()))

    def size(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor in the original; -1 for a size that isn't known."""
        known = self.graph.shapes.get(name)
        if known is None:
            return tuple(e.size for e in self.analysis.axes.get(name, ()))
        return tuple(-1 if n is None else n for n in known)

    def touched(self, node: Node) -> bool:
        if any(m is not None for i, n in enumerate(node.inputs) if n for m in self.input_masks(node, i)):
            return True
        if any(m is not None for j, n in enumerate(node.outputs) if n for m in self.output_masks(node, j)):
            return True
        noted = self.analysis.noted.get(node.index, {})
        return any(kept(e, self.keep) is not None for e in noted.values()) or any(n in self.values for n in node.inputs)

    def visit(self, node: Node) -> None:
        if not self.touched(node):
            return
        if any(self.is_empty(self.output_masks(node, j)) for j, n in enumerate(node.outputs) if n):
            self.edit.drop(node.index)
            return
        if any(self.is_empty(self.input_masks(node, i)) for i, n in enumerate(node.inputs) if n):
            self.leave_bias(node)
            return
        patch = _Patch(self, node)
        for i, name in enumerate(node.inputs):
            if name in self.graph.parameters:
                self.slice(node, i, name)
        operator = self.analysis.registry.get(node.op)
        known = bool(node.outputs) and all(n in self.graph.values for n in node.outputs if n)
        if node.index not in self.analysis.arithmetic:
            if operator is not None and operator.patch is not None:
                operator.patch(patch)
            if not known or not self.foldable(node):
                self.hold_numbers(node, patch)
        self.fold_constants(node)
        self.refold(node)

    @staticmethod
    def is_empty(masks: Sequence[Kept]) -> bool:
        return any(m is not None and len(m) == 0 for m in masks)

    def leave_bias(self, node: Node) -> None:
        """All units of a contracted axis are gone: the node's output is its bias, in a shape that broadcasts."""
        output, bias = node.outputs[0], self.analysis.registry[node.op].bias
        elem, rank = self.graph.types[output], len(self.size(output))
        operand, axis = self.analysis.contractions[node.index][0].operands[0]
        channel = 1 if axis == 1 and len(self.size(node.inputs[operand])) > 2 else rank - 1
        mask = self.output_masks(node, 0)[channel]
        count = self.size(output)[channel] if mask is None else len(mask)
        value = np.zeros(count, dtype_of(elem))
        if bias is not None and bias < len(node.inputs) and node.inputs[bias]:
            value += take(self.graph.array(node.inputs[bias]), self.input_masks(node, bias)).reshape(-1)
        shape = [1] * rank
        shape[channel] = count
        self.edit.drop(node.index)
        self.edit.replace(output, value.reshape(shape))
        self.edit.undeclared |= broadcast_region(self.analysis, output) or {output}

    def foldable(self, node: Node) -> bool:
        operator = self.analysis.registry.get(node.op)
        return operator is not None and (operator.evaluate is not None or operator.from_shape is not None)

    def slice(self, node: Node, i: int, name: str) -> None:
        masks = self.input_masks(node, i)
        if all(m is None for m in masks):
            return
        shape = tuple(n if m is None else len(m) for n, m in zip(self.graph.parameters[name].shape, masks, strict=True))
        key = tuple(None if m is None else m.tobytes() for m in masks)
        self.edit.changes[node.index, i] = Change(key, shape, lambda array: take(array, masks))
        if name in self.graph.values:
            self.values.setdefault(f"{node.index}:{i}", take(self.graph.values[name], masks))

    def have(self, node: Node, i: int) -> np.ndarray | None:
        """The value of an input in the new graph, where it is known."""
        name = node.inputs[i]
        at_use = self.values.get(f"{node.index}:{i}")
        return at_use if at_use is not None else self.values.get(name, self.graph.values.get(name))

    def refold(self, node: Node) -> None:
        """Known outputs, computed again in the new sizes."""
        if not node.outputs or not all(n in self.graph.values for n in node.outputs if n):
            return
        operator = self.analysis.registry.get(node.op)
        if operator is None:
            return
        if operator.from_shape is not None:
            masks = self.input_masks(node, 0)
            before = self.size(node.inputs[0])
            shape = tuple(n if m is None else len(m) for n, m in zip(before, masks, strict=True))
            results: Any = operator.from_shape(node, shape)
        elif operator.evaluate is not None:
            results = operator.evaluate(node, *(self.have(node, i) if n else None for i, n in enumerate(node.inputs)))
        else:
            return
        for name, result in zip(node.outputs, results if isinstance(results, tuple) else (results,), strict=False):
            result = np.asarray(result)
            if not np.array_equal(result, self.graph.values[name]):
                self.values[name] = result

    def hold_numbers(self, node: Node, patch: _Patch) -> None:
        """A number computed from a pruned size keeps its value (rule 3)."""
        for i, name in enumerate(node.inputs):
            if name not in self.values or name not in self.graph.sized or i in patch.wanted:
                continue
            masks = self.input_masks(node, i)
            original = self.graph.values[name]
            wanted = take(original, masks) if len(masks) == original.ndim else original
            patch.want(i, wanted)

    def correct(self, node: Node, i: int, wanted: np.ndarray) -> None:
        """Make input i of the new node have this value."""
        have = self.have(node, i)
        if have is not None and have.shape == wanted.shape and np.array_equal(have, wanted):
            return
        name = node.inputs[i]
        parameter = self.graph.parameters.get(name)
        if parameter is not None:
            value = wanted.astype(dtype_of(parameter.elem_type))
            self.edit.changes[node.index, i] = Change(
                ("value", value.tobytes(), value.shape), value.shape, lambda _: value, uniform=False
            )
            self.values[f"{node.index}:{i}"] = value
            return
        self.edit.nodes[node.index].input[i] = self.corrected(node.index, name, have, wanted)
        self.values[f"{node.index}:{i}"] = wanted

    def corrected(self, at: int, name: str, have: np.ndarray | None, wanted: np.ndarray) -> str:
        """A tensor with the wanted value, made from `name`: through a Concat part by part, at a constant by exchange,
        and of anything else by a factor per element."""
        producer = self.graph.producers.get(name)
        if have is None or have.shape != wanted.shape:
            return self.edit.constant(f"{name}_pruned", wanted)
        if producer is not None and wanted.ndim == 1 and self.joined(producer, wanted.size):
            return self.corrected_parts(at, producer, name, wanted)
        if name in self.graph.parameters or not np.all(have):
            return self.edit.constant(f"{name}_pruned", wanted.astype(have.dtype))
        return self.scaled(at, name, have, wanted)

    def joined(self, producer: Node, size: int) -> bool:
        """True where a node puts its inputs one after another."""
        parts = [self.have(producer, i) for i in range(len(producer.inputs))]
        operator = self.analysis.registry.get(producer.op)
        return (
            operator is not None
            and operator.joins
            and all(p is not None for p in parts)
            and sum(p.size for p in parts if p is not None) == size
        )

    def corrected_parts(self, at: int, producer: Node, name: str, wanted: np.ndarray) -> str:
        inputs, start = [], 0
        for i, part in enumerate(producer.inputs):
            have = self.have(producer, i)
            assert have is not None
            piece = wanted[start : start + have.size].reshape(have.shape)
            start += have.size
            same = np.array_equal(have, piece)
            inputs.append(self.edit.nodes[producer.index].input[i] if same else self.corrected(at, part, have, piece))
        new = self.edit.name(f"{name}_pruned")
        self.edit.insert_before(at, producer.proto.op_type, inputs, new, axis=0)
        return new

    def scaled(self, at: int, name: str, have: np.ndarray, wanted: np.ndarray) -> str:
        new = self.edit.name(f"{name}_pruned")
        if have.dtype.kind == "f":
            factor = self.edit.constant(f"{name}_factor", (wanted / have).astype(have.dtype))
            self.edit.insert_before(at, "Mul", [name, factor], new)
            return new
        ratios = [Fraction(int(w), int(h)) for w, h in zip(wanted.reshape(-1), have.reshape(-1), strict=True)]
        top = np.array([r.numerator for r in ratios], have.dtype).reshape(have.shape)
        bottom = np.array([r.denominator for r in ratios], have.dtype).reshape(have.shape)
        if np.all(bottom == 1):
            self.edit.insert_before(at, "Mul", [name, self.edit.constant(f"{name}_factor", top)], new)
            return new
        scaled = self.edit.name(f"{name}_scaled")
        self.edit.insert_before(at, "Mul", [name, self.edit.constant(f"{name}_factor", top)], scaled)
        self.edit.insert_before(at, "Div", [scaled, self.edit.constant(f"{name}_divisor", bottom)], new)
        return new

    def fold_constants(self, node: Node) -> None:
        """c * W of the removed units, added where the node adds its bias."""
        for contraction in self.analysis.contractions.get(node.index, ()):
            if not contraction.fold:
                continue
            found = [
                (a, c)
                for (n, a), c in self.analysis.verdicts.constants.items()
                if n == node.index and a in self.keep and a not in self.inexact and a in set(atoms(contraction.over))
            ]
            if found:
                _fold(self, node, contraction, dict(found))


def take(array: np.ndarray, masks: Sequence[Kept]) -> np.ndarray:
    """The kept indices along every axis."""
    for axis, mask in enumerate(masks):
        if mask is not None:
            array = np.take(array, mask, axis)
    return array


def _fold(work: _Rewrite, node: Node, contraction: Contraction, constants: dict[Atom, float]) -> None:
    """Add sum over removed units of c * W to the output; through the bias where there is a plain one."""
    (wi, axis) = contraction.operands[1]
    name = node.inputs[wi]
    weights = work.graph.array(name).astype(np.float64)
    position = dead_constants(contraction.over, work.keep, constants)
    total = np.tensordot(position, weights, axes=(0, axis))
    while total.ndim > 1:
        total = total.sum(axis=-1)
    masks = work.input_masks(node, wi)
    other = masks[1 - axis] if axis < 2 else None
    total = total if other is None else total[other]
    total *= float(node.attributes.get("alpha", 1.0))
    elem = work.graph.types[node.outputs[0]]
    rank = len(work.graph.shapes[node.outputs[0]])
    shape = (1, -1, *[1] * (rank - 2)) if weights.ndim > 2 else (-1,)
    new = work.edit.nodes[node.index]
    output = node.outputs[0]
    hidden = work.edit.name(f"{output}_uncompensated")
    new.output[0] = hidden
    shift = work.edit.constant(f"{output}_constant", total.astype(dtype_of(elem)).reshape(shape))
    work.edit.insert_after(node.index, "Add", [hidden, shift], output)


def dead_constants(expr: Expr, keep: dict[Atom, np.ndarray], constants: dict[Atom, float]) -> np.ndarray:
    """Per index of an axis: the constant that its dead unit has, 0 for kept ones and for units that are zero."""
    expr = resolve(expr)
    if isinstance(expr, Atom):
        values = np.zeros(expr.size)
        if expr in keep and expr in constants:
            values[:] = constants[expr]
            values[keep[expr]] = 0.0
        return values
    if isinstance(expr, Sum):
        return np.concatenate([dead_constants(p, keep, constants) for p in expr.parts])
    assert isinstance(expr, Product)
    result = np.zeros(expr.size).reshape([f.size for f in expr.factors])
    dead_by_zero = np.zeros_like(result, dtype=bool)
    for k, factor in enumerate(expr.factors):
        shape = [1] * result.ndim
        shape[k] = -1
        values = dead_constants(factor, keep, constants).reshape(shape)
        result = np.where(values != 0, values, result)
        mask = kept(factor, keep)
        zero = np.zeros(factor.size, bool) if mask is None else ~np.isin(np.arange(factor.size), mask)
        dead_by_zero |= zero.reshape(shape) & (values == 0)
    return np.where(dead_by_zero, 0.0, result).reshape(-1)


class _Patch:
    """The view of a node that its patch rule gets: see `ops.rules.PatchContext`."""

    def __init__(self, work: _Rewrite, node: Node) -> None:
        self.work = work
        self.node = node
        self.new: NodeProto = work.edit.nodes[node.index]
        self.wanted: set[int] = set()

    def attr(self, name: str, default: Any = None) -> Any:
        return self.node.attributes.get(name, default)

    def has(self, i: int) -> bool:
        return i < len(self.node.inputs) and bool(self.node.inputs[i])

    def value(self, i: int) -> np.ndarray | None:
        return self.work.graph.values.get(self.node.inputs[i]) if self.has(i) else None

    def kept(self, i: int, axis: int) -> Kept:
        masks = self.work.input_masks(self.node, i)
        return masks[axis] if masks else None

    def kept_out(self, axis: int, j: int = 0) -> Kept:
        return self.work.output_masks(self.node, j)[axis]

    def before(self, i: int) -> tuple[int, ...]:
        return self.work.size(self.node.inputs[i])

    def after(self, i: int) -> tuple[int, ...]:
        return _shrunk(self.before(i), self.work.input_masks(self.node, i))

    def before_out(self, j: int = 0) -> tuple[int, ...]:
        return self.work.size(self.node.outputs[j])

    def after_out(self, j: int = 0) -> tuple[int, ...]:
        return _shrunk(self.before_out(j), self.work.output_masks(self.node, j))

    def noted(self, name: str) -> int:
        expr = self.work.analysis.noted[self.node.index][name]
        mask = kept(expr, self.work.keep)
        return expr.size if mask is None else len(mask)

    def set_attr(self, name: str, value: Any) -> None:
        found = next((a for a in self.new.attribute if a.name == name), None)
        if value is None:
            if found is not None:
                self.new.attribute.remove(found)
            return
        made = helper.make_attribute(name, value)
        if found is None:
            self.new.attribute.append(made)
        elif found != made:
            found.CopyFrom(made)

    def want(self, i: int, value: np.ndarray) -> None:
        self.wanted.add(i)
        original = self.value(i)
        if original is not None and original.shape != value.shape and original.size == value.size:
            value = value.reshape(original.shape)
        if original is not None:
            value = value.astype(original.dtype)
        self.work.correct(self.node, i, value)

    def add_input(self, i: int, value: np.ndarray) -> None:
        name = self.work.edit.constant(f"{self.node.label or self.node.outputs[0]}_input{i}", value)
        while len(self.new.input) <= i:
            self.new.input.append("")
        self.new.input[i] = name

    def exact(self, i: int, axis: int) -> bool:
        use = self.work.analysis.uses.get((self.node.index, i))
        axes = use if use is not None else self.work.analysis.axes[self.node.inputs[i]]
        return not any(a in self.work.inexact for a in atoms(axes[axis]) if a in self.work.keep)

    def scale(self, i: int, factor: float) -> None:
        elem = self.work.graph.types[self.node.inputs[i]]
        source = self.node.inputs[i]
        parameter = self.work.graph.parameters.get(source)
        if parameter is not None:
            use = (self.node.index, i)
            known = self.work.edit.changes.get(use)
            change = known or Change(None, parameter.shape, lambda array: array)
            self.work.edit.changes[use] = Change(
                (change.key, "scaled", factor),
                change.shape,
                lambda array: (change.make(array) * factor).astype(array.dtype),
                uniform=False,
            )
            return
        name = self.work.edit.name(f"{source}_scaled")
        by = self.work.edit.constant(f"{name}_factor", np.array(factor, dtype_of(elem)))
        self.work.edit.insert_before(self.node.index, "Mul", [source, by], name)
        self.new.input[i] = name

    def scale_output(self, factor: float, j: int = 0) -> None:
        output = self.node.outputs[j]
        elem = self.work.graph.types[output]
        hidden = self.work.edit.name(f"{output}_unscaled")
        by = self.work.edit.constant(f"{output}_factor", np.array(factor, dtype_of(elem)))
        self.new.output[j] = hidden
        self.work.edit.insert_after(self.node.index, "Mul", [hidden, by], output)


def _shrunk(shape: Sequence[int | None], masks: Sequence[Kept]) -> tuple[int, ...]:
    if not masks:
        return tuple(-1 if n is None else n for n in shape)
    return tuple((-1 if n is None else n) if m is None else len(m) for n, m in zip(shape, masks, strict=True))
