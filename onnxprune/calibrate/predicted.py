"""What is gone, predicted from what is left: the best that the layers behind it can make of its absence.

A layer that is repaired in closed form absorbs, for every unit that went, its best affine prediction from what is kept:
x_S = mean_S + B (x_K - mean_K). With P the inverse of the covariance of all of x, B = -(P_SS)^-1 P_SK, so that one
inverse per tensor serves every set S.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from onnxprune.calibrate.layout import read_parts
from onnxprune.calibrate.reads import reads_of
from onnxprune.calibrate.watched import Batches, Watched

__all__ = ["Predictor"]

WIDEST = 4096  # indices of an axis; of wider ones the mean stands for the prediction
RIDGE = 1e-3  # of the mean variance
HELD = 1 << 28  # numbers of predictions that are kept for the next batch

Place = tuple[str, int]
Prediction = tuple[int, Tensor, Tensor, Tensor, Tensor]  # axis, gone, kept, B', constant


class Predictor:
    """Predictions for the tensors that stored weights read. One pass over the data, for their covariances."""

    def __init__(self, watched: Watched, batches: Batches) -> None:
        places = _places(watched)
        sums: dict[Place, list[Any]] = {}
        run = _Covariances(watched, places, sums)
        with torch.no_grad():
            for batch in batches:
                run.run(*batches.tensors(batch))
        self.means = {place: first / n for place, (n, first, _) in sums.items()}
        self.precisions = {p: _inverse(second / n, first / n) for p, (n, first, second) in sums.items() if n}
        self.parts: dict[str, list[Any]] = {}
        for number, parts in read_parts(watched).items():
            for part in parts:
                if (watched.gates[number].tensor, part.axis) in self.means:
                    self.parts.setdefault(part.group, []).append(part)
        self.names = [g.tensor for g in watched.gates]
        self.held: dict[tuple[str, bytes], Mapping[int, Sequence[Prediction]]] = {}
        self.room = HELD

    def of(self, group: str, gone: np.ndarray) -> Mapping[int, Sequence[Prediction]]:
        """By the number of the gate in front of a reader, what stands for these units of a group."""
        key = (group, np.asarray(gone, np.int64).tobytes())
        if key not in self.held:
            found: dict[int, list[Prediction]] = {}
            for part in self.parts.get(group, ()):
                inside = np.isin(part.units.numpy(), gone)
                place = (self.names[part.gate], part.axis)
                found.setdefault(part.gate, []).append(self._prediction(place, part.at.numpy()[inside]))
            used = sum(p[3].numel() for predictions in found.values() for p in predictions)
            if used > self.room:
                return found
            self.room -= used
            self.held[key] = found
        return self.held[key]

    def _prediction(self, place: Place, gone: np.ndarray) -> Prediction:
        mean, precision = self.means[place], self.precisions[place]
        kept = np.setdiff1d(np.arange(len(mean)), gone)
        if precision is None or not len(kept):
            linear = np.zeros((len(gone), 0))
            kept = kept[:0]
        else:
            linear = -np.linalg.solve(precision[np.ix_(gone, gone)], precision[np.ix_(gone, kept)])
        constant = mean[gone] - linear @ mean[kept]
        tensors = (torch.from_numpy(a) for a in (gone, kept, linear.T.astype(np.float32), constant.astype(np.float32)))
        return (place[1], *tensors)  # type: ignore[return-value]


def filled(x: Tensor, prediction: Prediction) -> Tensor:
    """A tensor with predictions in the place of what is gone."""
    axis, gone, kept, linear, constant = prediction
    y = x.movedim(axis, -1).clone()
    y[..., gone] = (y[..., kept] @ linear.to(x.dtype) if len(kept) else 0.0) + constant.to(x.dtype)
    return y.movedim(-1, axis)


def _places(watched: Watched) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for reads in reads_of(watched.analysis).values():
        for read in reads:
            if read.weight is not None and len(read.operands) == 1 and read.operands[0].input is not None:
                found.setdefault(read.operands[0].tensor, set()).add(read.operands[0].axis)
    return found


def _inverse(second: np.ndarray, mean: np.ndarray) -> np.ndarray | None:
    if second.ndim < 2:
        return None
    second = second - np.outer(mean, mean)
    diagonal = np.einsum("ii->i", second)
    diagonal += max(RIDGE * float(diagonal.mean()), np.finfo(float).tiny)
    try:
        return np.linalg.inv(second)
    except np.linalg.LinAlgError:
        return None


class _Covariances(Interpreter):
    def __init__(self, watched: Watched, places: Mapping[str, set[int]], sums: dict[Place, list[Any]]) -> None:
        super().__init__(watched.module)
        self.sums = sums
        self.at = {
            node: [(name, axis) for name in names for axis in places.get(name, ())]
            for node, names in watched.tensors.items()
        }

    def run_node(self, node: Node) -> Any:
        result = super().run_node(node)
        for place in self.at.get(node, ()):
            self.add(place, result)
        return result

    def add(self, place: Place, x: Tensor) -> None:
        rows = x.movedim(place[1], 0).flatten(1).double().numpy()
        held = self.sums.setdefault(place, [0, 0.0, 0.0])
        held[0] += rows.shape[1]
        held[1] = held[1] + rows.sum(1)
        if len(rows) <= WIDEST:
            held[2] = held[2] + rows @ rows.T
