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

from onnxprune.axes.analysis import Analysis
from onnxprune.axes.dead import INEXACT
from onnxprune.axes.expr import Expr, atoms, kept
from onnxprune.axes.vanish import broadcast_region
from onnxprune.model.graph import Graph, Model, Node
from onnxprune.model.payload import dtype_of
from onnxprune.ops.rules import MALFORMED
from onnxprune.rewrite.edit import Change, Edit, Kept, take
from onnxprune.rewrite.fold import fold_constants
from onnxprune.rewrite.patch import Patch, shrunk
from onnxprune.select.plan import METADATA_KEY, Plan, plan_to_text

__all__ = ["Rewrite", "rewrite"]


def rewrite(analysis: Analysis, plan: Plan) -> Model:
    """The pruned model. The plan is stored in its metadata."""
    work = Rewrite(analysis, plan)
    work.run()
    model = work.edit.build()
    entry = next((p for p in model.proto.metadata_props if p.key == METADATA_KEY), None)
    if entry is None:
        entry = model.proto.metadata_props.add(key=METADATA_KEY)
    entry.value = plan_to_text(plan, analysis)
    return model


class Rewrite:
    """The pass over the nodes."""

    def __init__(self, analysis: Analysis, plan: Plan) -> None:
        self.analysis = analysis
        self.graph: Graph = analysis.graph
        self.keep = plan.by_atom(analysis)
        self.inexact = {g.atom for g in analysis.groups if g.kind == INEXACT}
        self.edit = Edit(self.graph)
        self.values: dict[str, np.ndarray] = {}  # known values that differ from the original's
        self.lost: set[str] = set()  # tensors whose value was known and isn't any more
        self.memo: dict[str, tuple[Kept, ...]] = {}
        self.left_bias: set[str] = set()

    def run(self) -> None:
        for node in self.graph.nodes:
            self.visit(node)
        if self.left_bias:
            self.edit.undeclared |= broadcast_region(self.analysis, self.left_bias) or self.left_bias
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
        return any(kept(e, self.keep) is not None for e in noted.values()) or any(
            n in self.values or n in self.lost for n in node.inputs
        )

    def visit(self, node: Node) -> None:
        if not self.touched(node):
            return
        if any(self.is_empty(self.output_masks(node, j)) for j, n in enumerate(node.outputs) if n):
            self.edit.drop(node.index)
            return
        if any(self.is_empty(self.input_masks(node, i)) for i, n in enumerate(node.inputs) if n):
            self.leave_bias(node)
            return
        patch = Patch(self, node)
        for i, name in enumerate(node.inputs):
            if name in self.graph.parameters:
                self.slice(node, i, name)
        operator = self.analysis.registry.get(node.op)
        if node.index not in self.analysis.arithmetic:
            if operator is not None and operator.patch is not None:
                operator.patch(patch)
            if not self.passes_numbers(node):
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
        self.left_bias.add(output)

    def passes_numbers(self, node: Node) -> bool:
        """True where a node makes numbers of numbers, so that they are held further on. Weights are no numbers."""
        operator = self.analysis.registry.get(node.op)
        if operator is None or (operator.evaluate is None and operator.from_shape is None):
            return False
        made = [n for n in node.outputs if n]
        return bool(made) and all(n in self.graph.values and n not in self.graph.weighted for n in made)

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
        if at_use is not None or name in self.lost:
            return at_use
        return self.values.get(name, self.graph.values.get(name))

    def refold(self, node: Node) -> None:
        """Known outputs, computed again in the new sizes. What comes from weights alone is no size or position: it is
        a tensor like any other, and its value is not followed."""
        made = [n for n in node.outputs if n]
        if not made or not all(n in self.graph.values for n in made):
            return
        results = None
        if any(n in self.graph.sized or n not in self.graph.weighted for n in made):
            results = self.evaluated(node)
        if results is None:
            self.lost.update(made)
            return
        for name, result in zip(node.outputs, results, strict=False):
            if not np.array_equal(result, self.graph.values[name]):
                self.values[name] = np.asarray(result)

    def evaluated(self, node: Node) -> tuple[Any, ...] | None:
        """A node's outputs in the new sizes; None where they can't be told."""
        operator = self.analysis.registry.get(node.op)
        if operator is not None and operator.from_shape is not None:
            return (operator.from_shape(node, shrunk(self.size(node.inputs[0]), self.input_masks(node, 0))),)
        inputs = [self.have(node, i) if n else None for i, n in enumerate(node.inputs)]
        missing = any(v is None for n, v in zip(node.inputs, inputs, strict=True) if n)
        if operator is None or operator.evaluate is None or missing:
            return None
        try:
            results = operator.evaluate(node, *inputs)
        except MALFORMED:  # attributes that fit the old sizes only
            return None
        return results if isinstance(results, tuple) else (results,)

    def hold_numbers(self, node: Node, patch: Patch) -> None:
        """A number computed from a pruned size keeps its value (rule 3)."""
        for i, name in enumerate(node.inputs):
            number = name in self.graph.sized and name not in self.graph.weighted
            changed = name in self.values or name in self.lost
            if not changed or not number or i in patch.wanted:
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
        and of anything else by a factor per element, or a difference where that is no number or zero."""
        producer = self.graph.producers.get(name)
        if have is None or have.shape != wanted.shape:
            return self.edit.constant(f"{name}_pruned", wanted)
        if producer is not None and wanted.ndim == 1 and self.joined(producer, wanted.size):
            return self.corrected_parts(at, producer, name, wanted)
        if name in self.graph.parameters:
            return self.edit.constant(f"{name}_pruned", wanted.astype(have.dtype))
        if have.dtype == bool:
            return self.inserted(at, "Xor", name, have ^ wanted)
        if not np.all(have):
            return self.inserted(at, "Add", name, (wanted - have).astype(have.dtype))
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
        if have.dtype.kind == "f":
            return self.inserted(at, "Mul", name, (wanted / have).astype(have.dtype))
        ratios = [Fraction(int(w), int(h)) for w, h in zip(wanted.reshape(-1), have.reshape(-1), strict=True)]
        top = np.array([r.numerator for r in ratios], have.dtype).reshape(have.shape)
        bottom = np.array([r.denominator for r in ratios], have.dtype).reshape(have.shape)
        scaled = self.inserted(at, "Mul", name, top)
        return scaled if np.all(bottom == 1) else self.inserted(at, "Div", scaled, bottom)

    def inserted(self, at: int, op: str, name: str, by: np.ndarray) -> str:
        """A tensor made from `name` and a constant, in front of node `at`."""
        new = self.edit.name(f"{name}_pruned")
        self.edit.insert_before(at, op, [name, self.edit.constant(f"{name}_by", by)], new)
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
                fold_constants(self, node, contraction, dict(found))
