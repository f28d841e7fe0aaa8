"""What a layer's output goes through before anything tells its values apart: scalings, sums, and an activation.

A layer in front of a ReLU needn't give what the original gave where that was negative: anything negative is as good.
And where its output is added to another tensor of the pruned network, which is no longer quite that of the original,
it is the sum that should be right. So what such a layer should give depends on what it gives now (`Beyond.aims`), and
it is solved for more than once. The idea is that of Zhang et al., "Accelerating Very Deep Convolutional Networks for
Classification and Detection" (2015), section 3.2: alternate between the aims and the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from onnxprune.axes.analysis import Analysis
from onnxprune.axes.expr import Atom, kept
from onnxprune.model.graph import Graph, Node
from onnxprune.ops.registry import Operator
from onnxprune.ops.rules import MALFORMED, Flat

__all__ = ["Beyond", "beyond"]

FAINT = 1e-4  # of the steepest slope: what a channel with a smaller one gives is as good as nothing


@dataclass(frozen=True, eq=False, slots=True)
class Beyond:
    """From a layer's output y to u, where the activation stands.

    y, u: in the pruned model; of: u in the original. passed: nodes of the pruned model on the way, and the input that
    they are entered by. sums: whether another tensor that is computed from the data is added; others: those tensors.
    activation: the node behind u, None where none is known that is flat. kept: per axis of `of`, what the plan keeps.
    """

    y: str
    u: str
    of: str
    passed: tuple[tuple[Node, int], ...]
    others: tuple[str, ...]
    activation: Node | None
    kept: tuple[np.ndarray | None, ...]
    registry: Mapping[str, Operator]

    def slope(self, value: Callable[[str], np.ndarray | None], rank: int) -> Tensor:
        """Of u in y, broadcasting against both. value: of a stored tensor; None for any other."""
        found: np.ndarray = np.ones(())
        for node, i in self.passed:
            found = found * self.registry[node.op].slope(node, i, [value(n) for n in node.inputs], rank)  # type: ignore[misc]
        return torch.from_numpy(np.ascontiguousarray(found, dtype=np.float64))

    def flat(self, value: Callable[[str], np.ndarray | None]) -> Flat | None:
        if self.activation is None:
            return None
        node = self.activation
        rule = self.registry[node.op].flat
        return rule(node, [value(n) for n in node.inputs]) if rule is not None else None

    def aims(self, y: Tensor, u: Tensor, wanted: Tensor, slope: Tensor, flat: Flat | None) -> Tensor:
        """What y should be. y, u: as the pruned network has them; wanted: the original's u. flat: None where u should
        be the original's everywhere."""
        for axis, mask in enumerate(self.kept):
            wanted = wanted if mask is None else wanted.index_select(axis, torch.from_numpy(mask))
        if flat is not None:
            wanted = torch.where(wanted <= flat.low, _near(u.clamp(max=flat.low), wanted, flat), wanted)
            wanted = torch.where(wanted >= flat.high, _near(u.clamp(min=flat.high), wanted, flat), wanted)
        size = slope.abs()
        inverse = torch.where(size > FAINT * size.max(), 1 / slope, 0.0).to(y.dtype)
        return y + (wanted - u) * inverse


def _near(free: Tensor, wanted: Tensor, flat: Flat) -> Tensor:
    """Where the activation grows by `leak`, the square of its error is smaller by that."""
    leak = torch.as_tensor(flat.leak, dtype=wanted.dtype).square().clamp(max=1)
    return free + leak * (wanted - free)


def beyond(analysis: Analysis, keep: Mapping[Atom, np.ndarray], pruned: Graph, y: str) -> Beyond | None:
    """None where y itself is what counts: nothing is added to it and no activation known to be flat is behind it."""
    graph, registry = analysis.graph, analysis.registry
    passed: list[tuple[Node, int]] = []
    others: list[str] = []
    name = of = y
    while True:
        first, second = _only(graph, of), _only(pruned, name)
        if first is None or second is None:
            break
        (whole, i), (node, j) = first, second
        if whole.op != node.op or i != j or whole.outputs[0] not in analysis.axes:
            break
        operator = registry.get(node.op)
        if operator is None or operator.slope is None or not _has_slope(operator, node, i, pruned):
            break
        passed.append((node, i))
        others += [n for k, n in enumerate(node.inputs) if k != i and n and n not in pruned.parameters]
        name, of = node.outputs[0], whole.outputs[0]
    reader = _only(pruned, name)
    known = registry.get(reader[0].op) if reader is not None and reader[1] == 0 else None
    activation = reader[0] if reader is not None and known is not None and known.flat is not None else None
    if activation is None and not others:
        return None
    if pruned.shapes.get(name) is None or len(pruned.shapes[name] or ()) != len(pruned.shapes.get(y) or ()):
        return None  # broadcast to more axes
    masks = tuple(kept(e, keep) for e in analysis.axes[of])
    return Beyond(y, name, of, tuple(passed), tuple(others), activation, masks, registry)


def _only(graph: Graph, name: str) -> tuple[Node, int] | None:
    """The only reader of a tensor, and its input; None where there are several, or it is an output of the model."""
    readers: Sequence[tuple[Node, int]] = graph.consumers.get(name, ())
    return readers[0] if len(readers) == 1 and name not in graph.outputs else None


def _has_slope(operator: Operator, node: Node, i: int, graph: Graph) -> bool:
    shape = graph.shapes.get(node.outputs[0])
    if operator.slope is None or shape is None or graph.shapes.get(node.inputs[i]) != shape:
        return False
    stored = [graph.array(n) if n in graph.parameters else None for n in node.inputs]
    try:
        return operator.slope(node, i, stored, len(shape)) is not None
    except MALFORMED:
        return False
