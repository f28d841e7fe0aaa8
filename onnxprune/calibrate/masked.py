"""What a network gives without some units of one group at a time: their producing parameters are zeroed on the way.

One batch after the other goes through the original once. Where a group's first parameter is read, the run branches: for
every mask of the group the rest of the network is run from there, on what the original had computed so far. What comes
in front of a group is so computed once for all of its masks, and nothing is held but what the rest still reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from onnxprune.calibrate.layout import Part, made_parts
from onnxprune.calibrate.predicted import Prediction, Predictor, filled
from onnxprune.calibrate.watched import Watched, gate

__all__ = ["Branches"]

Masks = Mapping[str, Sequence[np.ndarray]]  # per group id, the units that go
Outputs = Mapping[str, Tensor]


class Branches:
    """Runs a network with every mask of every group. masks: per group id, indices of units that go together.
    predictor: puts, where units are read, what the others tell of them in their place: what is seen then is the network
    after its repair."""

    def __init__(self, watched: Watched, masks: Masks, predictor: Predictor | None = None) -> None:
        self.watched = watched
        self.nodes: list[Node] = list(watched.module.graph.nodes)
        self.run = _Masked(watched)
        parts = made_parts(watched)
        sizes = {g.id: g.size for g in watched.analysis.groups}
        self.gone, self.predictor = masks, predictor
        self.masks = {g: [_factors(parts[g], sizes[g], gone) for gone in found] for g, found in masks.items()}
        place = {node.args[1]: k for k, node in enumerate(self.nodes) if node.target is gate}
        starts = {g: min((place[p.gate] for p in parts[g] if p.gate in place), default=len(self.nodes)) for g in masks}
        self.starts = sorted((k, g) for g, k in starts.items() if k < len(self.nodes))
        position = {node: k for k, node in enumerate(self.nodes)}
        self.last = {node: max((position[u] for u in node.users), default=k) for node, k in position.items()}

    @torch.no_grad()
    def batch(self, inputs: Sequence[Tensor]) -> Iterator[tuple[str, int, Outputs]]:
        """(group id, index of its mask, outputs) of all of them. A group that no parameter of the mirror makes is left
        out."""
        env: dict[Node, Any] = {}
        self.run.args_iter = iter(inputs)
        at = 0
        for start, group in self.starts:
            self.run.predictions = {}
            self._advance(env, at, start, {})
            at = start
            for k, factors in enumerate(self.masks[group]):
                self.run.predictions = self.predictor.of(group, self.gone[group][k]) if self.predictor else {}
                branch = dict(env)
                found = self._advance(branch, start, len(self.nodes), factors)
                yield group, k, self.watched.named(found)

    def _advance(self, env: dict[Node, Any], start: int, end: int, factors: Mapping[int, Any]) -> Any:
        """Run some of the nodes, and forget what none behind them reads."""
        run, result = self.run, None
        run.env, run.factors = env, factors
        for k in range(start, end):
            node = self.nodes[k]
            result = env[node] = run.run_node(node)
            for read in (node, *node.all_input_nodes):
                if self.last[read] <= k:
                    env.pop(read, None)
        return result


class _Masked(Interpreter):
    """Multiplies what makes units, and fills in where they are read. factors: per gate, along which axis, and what
    with."""

    def __init__(self, watched: Watched) -> None:
        super().__init__(watched.module)
        self.factors: Mapping[int, Sequence[tuple[int, Tensor]]] = {}
        self.predictions: Mapping[int, Sequence[Prediction]] = {}

    def run_node(self, node: Node) -> Any:
        x = super().run_node(node)
        if node.target is gate:
            number: Any = node.args[1]
            for axis, factor in self.factors.get(number, ()):
                x = x * factor.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1 - axis))
            for prediction in self.predictions.get(number, ()):
                x = filled(x, prediction)
        return x


def _factors(parts: Sequence[Part], size: int, gone: np.ndarray) -> Mapping[int, list[tuple[int, Tensor]]]:
    kept = torch.ones(size)
    kept[torch.from_numpy(np.asarray(gone, np.int64))] = 0
    found: dict[int, list[tuple[int, Tensor]]] = {}
    for part in parts:
        found.setdefault(part.gate, []).append((part.axis, part.mask(kept)))
    return found
