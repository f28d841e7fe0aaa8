"""The view of a node that its patch rule gets while the graph is rewritten."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import NodeProto, helper

from onnxprune.axes.expr import atoms, kept
from onnxprune.model.graph import Node
from onnxprune.model.payload import dtype_of
from onnxprune.rewrite.edit import Change, Kept

if TYPE_CHECKING:
    from onnxprune.rewrite.rewrite import Rewrite

__all__ = ["Patch", "shrunk"]


class Patch:
    """The view of a node that its patch rule gets: see `ops.rules.PatchContext`."""

    def __init__(self, work: Rewrite, node: Node) -> None:
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
        return shrunk(self.before(i), self.work.input_masks(self.node, i))

    def before_out(self, j: int = 0) -> tuple[int, ...]:
        return self.work.size(self.node.outputs[j])

    def after_out(self, j: int = 0) -> tuple[int, ...]:
        return shrunk(self.before_out(j), self.work.output_masks(self.node, j))

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

    def share(self, i: int, axis: int) -> float:
        use = self.work.analysis.uses.get((self.node.index, i))
        axes = use if use is not None else self.work.analysis.axes[self.node.inputs[i]]
        alone = {a: self.work.keep[a] for a in atoms(axes[axis]) if a in self.work.keep and a in self.work.inexact}
        left = kept(axes[axis], alone)
        now = kept(axes[axis], self.work.keep)
        before = axes[axis].size if left is None else len(left)
        return (axes[axis].size if now is None else len(now)) / before

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


def shrunk(shape: Sequence[int | None], masks: Sequence[Kept]) -> tuple[int, ...]:
    if not masks:
        return tuple(-1 if n is None else n for n in shape)
    return tuple((-1 if n is None else n) if m is None else len(m) for n, m in zip(shape, masks, strict=True))
