"""Constants that dead units contributed, moved to where their consumer adds its bias."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from onnxprune.axes.expr import Atom, Expr, Product, Sum, kept, resolve
from onnxprune.model.graph import Graph, Node
from onnxprune.model.payload import dtype_of
from onnxprune.ops.rules import Contraction

if TYPE_CHECKING:
    from onnxprune.rewrite.rewrite import Rewrite

__all__ = ["fold_constants", "folded"]

ADDS = "Add"  # the node that is put in for a constant


def fold_constants(work: Rewrite, node: Node, contraction: Contraction, constants: dict[Atom, float]) -> None:
    """Add the sum of c * W over the removed units to the output; onnxruntime folds that into a bias."""
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
    work.edit.insert_after(node.index, ADDS, [hidden, shift], output)


def folded(original: Graph, pruned: Graph) -> set[str]:
    """Names of the stored tensors that `fold_constants` added. They are sums of weights, and as such change in training
    before the surgery."""
    known = {*original.parameters, *original.producers, *original.inputs}
    return {
        node.inputs[1]
        for node in pruned.nodes
        if node.op == ADDS
        and node.inputs[1] in pruned.parameters
        and node.outputs[0] in known
        and not known.intersection(node.inputs)
    }


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
