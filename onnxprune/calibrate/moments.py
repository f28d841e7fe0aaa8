"""First and second moments of activations, index by index of the axes on which units are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from onnxprune.axes.analysis import Analysis
from onnxprune.calibrate.reads import reads_of
from onnxprune.calibrate.watched import Batches, Watched

__all__ = ["Moments", "activation_moments"]

Place = tuple[str, int]  # a tensor and one of its axes


@dataclass(frozen=True)
class Moments:
    """Mean and mean square per index of an axis, over samples and all other axes; float64."""

    count: int
    mean: np.ndarray
    square: np.ndarray

    @property
    def variance(self) -> np.ndarray:
        return np.maximum(self.square - self.mean**2, 0)


def activation_moments(analysis: Analysis, watched: Watched, batches: Batches) -> Mapping[Place, Moments]:
    """Of every tensor that a group is read from. One pass; nothing is kept but the sums."""
    places: dict[str, set[int]] = {}
    for reads in reads_of(analysis).values():
        for read in reads:
            for o in read.operands:
                places.setdefault(o.tensor, set()).add(o.axis)
    sums: dict[Place, list[Any]] = {}
    run = _Sums(watched, places, sums)
    with torch.no_grad():
        for batch in batches:
            run.run(*batches.tensors(batch))
    return {place: Moments(n, first / n, second / n) for place, (n, first, second) in sums.items() if n}


class _Sums(Interpreter):
    def __init__(self, watched: Watched, places: Mapping[str, set[int]], sums: dict[Place, list[Any]]) -> None:
        super().__init__(watched.module)
        self.sums = sums
        self.watched = {
            node: [(name, axis) for name in names for axis in places.get(name, ())]
            for node, names in watched.tensors.items()
        }

    def run_node(self, node: Node) -> Any:
        result = super().run_node(node)
        for place in self.watched.get(node, ()):
            if isinstance(result, Tensor):
                self.add(place, result)
        return result

    def add(self, place: Place, result: Tensor) -> None:
        rows = result.movedim(place[1], 0).flatten(1).double()
        held = self.sums.setdefault(place, [0, 0.0, 0.0])
        held[0] += rows.shape[1]
        held[1] = held[1] + rows.sum(1).numpy()
        held[2] = held[2] + rows.square_().sum(1).numpy()
