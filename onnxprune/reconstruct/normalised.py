"""Two networks run on inputs that are made up, as if they were data: what BatchNormalization knows of the data helps.

Its nodes hold mean and variance of every channel as the data had them. On other inputs a channel has others, so that
what is behind the node is far from what it would be on data. So a repair on such inputs runs both networks with the
statistics that the original has on these (`statistics_on`): behind every such node each channel then has mean and
deviation as on data, and only how channels go together comes from the inputs. The pruned network gets the
original's, not its own: otherwise the repair would not see what surgery does to a channel's mean and size.
What is found is told in terms of the stored statistics (`Restated.back`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from onnxprune.axes.analysis import Analysis
from onnxprune.axes.expr import kept
from onnxprune.ops.kernels.norm import batch_norm
from onnxprune.reconstruct.frontier import Frontier
from onnxprune.reconstruct.lockstep import Lockstep, Side
from onnxprune.select.plan import Plan

__all__ = ["Norm", "Restated", "depths", "norms", "statistics_on"]

FLOOR = 1e-3  # of epsilon: what variance + epsilon is at least, that a channel without values is not blown up
MEMORY = 1 << 30


@dataclass(frozen=True, slots=True)
class Norm:
    """A BatchNormalization whose statistics are stored, and read by no other node. x: what it normalises."""

    node: Node
    x: Node
    mean: str
    variance: str
    epsilon: float


def norms(side: Side) -> list[Norm]:
    """In the order in which they run."""
    found = []
    for node in side.nodes:
        if node.target is not batch_norm or node in side.static:
            continue
        arguments: Any = node.args
        mean, variance = (side.weights.get(n, "") for n in arguments[1:3])
        if all(len(side.graph.consumers.get(n, ())) == 1 for n in (mean, variance)):
            found.append(Norm(node, arguments[0], mean, variance, float(arguments[7])))
    return found


def statistics_on(
    side: Side, batches: Iterable[Sequence[Tensor]], *, memory_limit: int = MEMORY
) -> dict[str, np.ndarray]:
    """New statistics, float64, by the names of the stored tensors, with which every channel has the mean and deviation
    behind its BatchNormalization on these inputs that the stored ones state for the data. batches: inputs, in the order
    of the model's. The side's own are changed to them. Goes once over the inputs, at float32 as the mirror does.
    """
    found = norms(side)
    depth = depths(side, found)
    by_depth: dict[int, list[Norm]] = {}
    for norm in found:
        by_depth.setdefault(depth[norm.x], []).append(norm)
    new: dict[str, np.ndarray] = {}
    with closing(Frontier(memory_limit)) as frontier:
        run = Lockstep([side], frontier)
        for inputs in batches:
            run.append(inputs)
        for level in sorted(by_depth):
            sums = {norm: np.zeros(0) for norm in by_depth[level]}

            def visit(_: int, values: Sequence[Mapping[Node, Tensor]], sums: dict[Norm, np.ndarray] = sums) -> None:
                for norm, before in sums.items():
                    sums[norm] = _added(before, values[0][norm.x])

            later = {n.x for k in by_depth if k > level for n in by_depth[k]}
            run.step([{n.x for n in sums}], [later], visit)
            for norm, total in sums.items():
                count, first, second = total
                new[norm.mean] = mean = np.asarray(first / count)
                spread = (second / count - mean**2).clip(min=0)
                new[norm.variance] = _matched(spread, side.tensor(norm.variance).double().numpy(), norm.epsilon)
                for name in (norm.mean, norm.variance):
                    side.tensor(name).copy_(torch.from_numpy(new[name]))
    return new


def depths(side: Side, found: Sequence[Norm]) -> dict[Node, int]:
    """How many of these lie one behind another up to each node."""
    own = {n.node for n in found}
    depth: dict[Node, int] = {}
    for node in side.nodes:
        depth[node] = max((depth[a] for a in node.all_input_nodes), default=0) + (node in own)
    return depth


def _added(before: np.ndarray, x: Tensor) -> np.ndarray:
    """Count, sum and sum of squares per channel: (3, channels)."""
    axes = [k for k in range(x.ndim) if k != 1]
    wide = x.double()
    sums = [torch.full((x.shape[1],), x.numel() / max(x.shape[1], 1), dtype=torch.float64)]
    sums += [wide.sum(axes), wide.square().sum(axes)]
    found = torch.stack(sums).numpy()
    return before + found if before.size else found


def _matched(spread: np.ndarray, stored: np.ndarray, epsilon: float) -> np.ndarray:
    """The variance to normalise by: the share of epsilon in the divisor is to be that of the stored variance, so that
    a channel that hardly moves on the data does not move here either."""
    moving = stored > 0
    share = np.where(moving, (stored + epsilon) / np.where(moving, stored, 1.0), np.inf)
    wanted = np.where(moving, spread * share, 1.0 / np.finfo(np.float32).tiny ** 0.5)
    return np.maximum(wanted, FLOOR * epsilon) - epsilon


class Restated:
    """Statistics of the original that two networks run with instead of their own.

    sides: the original, and the pruned network of this plan. statistics: by the names of the stored tensors.
    """

    def __init__(
        self, analysis: Analysis, plan: Plan, sides: Sequence[Side], statistics: Mapping[str, np.ndarray]
    ) -> None:
        keep = plan.by_atom(analysis)
        self.moved: dict[str, np.ndarray] = {}  # by how much, in the pruned network
        for name, values in statistics.items():
            ((reader, i),) = analysis.graph.consumers[name]
            mask = kept(analysis.uses[reader.index, i][0], keep)
            for side, array in zip(sides, (values, values if mask is None else values[mask]), strict=True):
                if name not in side.targets:
                    continue
                tensor = side.tensor(name)
                stored = tensor.double().numpy().copy()
                tensor.copy_(torch.from_numpy(array))
                if side is sides[1]:
                    self.moved[name] = tensor.double().numpy() - stored

    def back(self, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Stored tensors of the pruned model that changed, as the stored statistics want them."""
        return {
            n: (a.astype(np.float64) - self.moved[n]).astype(a.dtype) if n in self.moved else a
            for n, a in values.items()
        }
