"""Non-maximum suppression in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["non_max_suppression"]


def non_max_suppression(
    boxes: Tensor, scores: Tensor, most: int, overlap: float, least: float | None, centred: bool
) -> Tensor:
    """Rows (batch, class, box) of the boxes that are kept, best first within a class.

    boxes: (batch, boxes, 4), corners in any order or, if `centred`, (x, y, width, height). scores: (batch, classes,
    boxes). A box goes where its intersection over union with a better one is above `overlap`.
    """
    rows = []
    for b in range(boxes.size(0)):
        overlaps = intersection_over_union(corners(boxes[b], centred)) > overlap
        for c in range(scores.size(1)):
            chosen = kept(scores[b, c], overlaps, most, least)
            head = torch.tensor([[b, c]], device=boxes.device).expand(len(chosen), 2)
            rows.append(torch.cat([head, chosen.unsqueeze(1)], 1))
    return torch.cat(rows) if rows else torch.zeros(0, 3, dtype=torch.int64, device=boxes.device)


def kept(scores: Tensor, overlaps: Tensor, most: int, least: float | None) -> Tensor:
    """Indices of one class's boxes, best first; of equal ones the first."""
    order = scores.sort(descending=True, stable=True).indices
    if least is not None:
        order = order[scores[order] > least]
    chosen: list[Tensor] = []
    while len(order) and len(chosen) < most:
        best = order[0]
        chosen.append(best)
        order = order[1:][~overlaps[best, order[1:]]]
    return torch.stack(chosen) if chosen else order[:0]


def corners(boxes: Tensor, centred: bool) -> tuple[Tensor, Tensor]:
    """Lower and upper corners."""
    first, second = boxes[:, :2], boxes[:, 2:]
    if centred:
        return first - second / 2, first + second / 2
    return torch.minimum(first, second), torch.maximum(first, second)


def intersection_over_union(boxes: tuple[Tensor, Tensor]) -> Tensor:
    """Of every box with every other; 0 where one has no area."""
    low, high = boxes
    area = (high - low).prod(1)
    sides = torch.minimum(high[:, None], high) - torch.maximum(low[:, None], low)
    shared = sides.clamp(min=0).prod(2)
    union = area[:, None] + area - shared
    solid = (area[:, None] > 0) & (area > 0) & (union > 0)
    return torch.where(solid, shared / union, 0.0)
