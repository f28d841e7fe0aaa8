"""Regions of an image at run time: pooled into cells of equal number, whatever their size (MaxRoiPool, RoiAlign)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["max_roi_pool", "roi_align"]


def max_roi_pool(x: Tensor, rois: Tensor, rows: int, columns: int, scale: float) -> Tensor:
    """The largest element of each cell. rois: (R, 5), the image's number and x1, y1, x2, y2, which are included and
    rounded to pixels; cells overlap where they meet within a pixel. An empty cell is zero. (R, C, rows, columns)"""
    image = x.index_select(0, rois[:, 0].to(torch.int64))
    corners = torch.floor(rois[:, 1:] * scale + 0.5)

    def cells(first: Tensor, last: Tensor, count: int, size: int) -> Tensor:
        """Which pixels along an axis belong to each cell: (count, R, size)."""
        width = (last - first + 1).clamp(min=1) / count
        k = torch.arange(count, device=x.device, dtype=rois.dtype)[:, None]
        begin, end = torch.floor(k * width) + first, torch.ceil((k + 1) * width) + first
        pixel = torch.arange(size, device=x.device, dtype=rois.dtype)
        return (pixel >= begin[..., None]) & (pixel < end[..., None])

    by_row = cells(corners[:, 1], corners[:, 3], rows, x.size(2))
    by_column = cells(corners[:, 0], corners[:, 2], columns, x.size(3))
    strips = [image.masked_fill(~c[:, None, None, :], -torch.inf).amax(3) for c in by_column]
    strip = torch.stack(strips, 3)
    found = torch.stack([strip.masked_fill(~r[:, None, :, None], -torch.inf).amax(2) for r in by_row], 2)
    return found.masked_fill(found == -torch.inf, 0.0)


def roi_align(
    x: Tensor,
    rois: Tensor,
    images: Tensor,
    rows: int,
    columns: int,
    sampling: int,
    scale: float,
    half_pixel: bool,
    largest: bool,
) -> Tensor:
    """Bilinear samples of each cell, averaged, or the largest of them. (R, C, rows, columns)

    rois: (R, 4), x1, y1, x2, y2. images: which image each is cut out of. sampling: samples per cell and axis; 0: as
    many as it has pixels. half_pixel: pixels are centred at halves; otherwise a region is at least one pixel wide.
    """
    exact = torch.promote_types(rois.dtype, torch.float32)
    corners = rois.to(exact) * scale - (0.5 if half_pixel else 0.0)
    y, x_axis = (
        samples(corners[:, k], corners[:, k + 2], count, sampling, 0.0 if half_pixel else 1.0)
        for k, count in ((1, rows), (0, columns))
    )
    if largest:
        return largest_sample(x, images, y, x_axis)
    down, across = (averages(*s, size).to(x.dtype) for s, size in ((y, x.size(2)), (x_axis, x.size(3))))
    chosen = torch.nn.functional.one_hot(images.to(torch.int64), x.size(0)).to(x.dtype)
    strips = torch.einsum("rph,rn,nchw->rcpw", down, chosen, x)
    return torch.einsum("rcpw,rqw->rcpq", strips, across)


def samples(first: Tensor, last: Tensor, count: int, sampling: int, least: float) -> tuple[Tensor, Tensor]:
    """Positions of the samples along an axis, (R, count, most samples), and how many of them each region has, (R)."""
    length = (last - first).clamp(min=least) if least else last - first
    width = length / count
    each = torch.full_like(width, float(sampling)) if sampling > 0 else torch.ceil(width).clamp(min=1)
    most = sampling if sampling > 0 else int(each.max().item()) if each.numel() else 1
    cell = torch.arange(count, device=first.device, dtype=first.dtype)
    k = torch.arange(most, device=first.device, dtype=first.dtype)
    within = (k + 0.5) * (width / each)[:, None]
    return first[:, None, None] + cell[:, None] * width[:, None, None] + within[:, None, :], each


def neighbours(position: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The pixels below and above positions along an axis, the upper one's share, and which positions count at all: a
    position more than a pixel outside of the image reads zero, nearer ones the border."""
    counts = (position >= -1) & (position <= size)
    inside = position.clamp(min=0)
    low = inside.floor().clamp(max=size - 1)
    high = (low + 1).clamp(max=size - 1)
    return low.to(torch.int64), high.to(torch.int64), torch.where(low >= size - 1, 0.0, inside - low), counts


def averages(position: Tensor, each: Tensor, size: int) -> Tensor:
    """What every pixel along an axis adds to the mean of each cell: (R, cells, size)."""
    low, high, share, counts = neighbours(position, size)
    used = torch.arange(position.size(2), device=position.device) < each[:, None, None]
    scaled = (counts & used) / each[:, None, None]
    weight = position.new_zeros(*position.shape[:2], size)
    return weight.scatter_add(2, low, (1 - share) * scaled).scatter_add(2, high, share * scaled)


def largest_sample(x: Tensor, images: Tensor, y: tuple[Tensor, Tensor], z: tuple[Tensor, Tensor]) -> Tensor:
    """The largest of what the four neighbours add to any sample: ONNX takes it over those, not over their sums."""
    height, width = x.shape[2:]
    flat = x.flatten(2).index_select(0, images.to(torch.int64))
    rows, columns = neighbours(y[0], height), neighbours(z[0], width)
    used = [torch.arange(p.size(2), device=x.device) < n[:, None, None] for p, n in (y, z)]
    counted = laid(rows[3], columns[3]) & laid(used[0], used[1])
    missing = ~laid(used[0], used[1])
    shape = counted.shape
    best = None
    for row, by_row in ((rows[0], 1 - rows[2]), (rows[1], rows[2])):
        for column, by_column in ((columns[0], 1 - columns[2]), (columns[1], columns[2])):
            at = row[:, :, :, None, None] * width + column[:, None, None]
            read = flat.gather(2, at.reshape(at.size(0), 1, -1).expand(-1, x.size(1), -1))
            share = (by_row[:, :, :, None, None] * by_column[:, None, None] * counted).to(x.dtype)
            part = read.reshape(shape[0], x.size(1), *shape[1:]) * share[:, None]
            best = part if best is None else torch.maximum(best, part)
    assert best is not None
    return best.masked_fill(missing[:, None], -torch.inf).amax((3, 5))


def laid(rows: Tensor, columns: Tensor) -> Tensor:
    """Both, of (R or 1, cells or 1, samples), for every cell: (R, cells, samples, cells, samples)."""
    return rows[:, :, :, None, None] & columns[:, None, None]
