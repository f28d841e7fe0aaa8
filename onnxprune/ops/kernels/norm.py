"""Normalisations at run time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from onnxprune.ops.kernels.pool import root

__all__ = [
    "batch_norm",
    "batch_norm_by_batch",
    "batch_norm_of_batch",
    "group_norm",
    "hardmax",
    "instance_norm",
    "layer_norm",
    "layer_norm_statistics",
    "local_response_norm",
    "lp_normalize",
    "mean_variance_norm",
    "rms_norm",
    "rms_norm_statistics",
]


class _Gather(torch.autograd.Function):
    """A vector of every process as the rows of a matrix; a row's gradient goes back, summed, to its process."""

    @staticmethod
    def forward(ctx: Any, row: Tensor) -> Tensor:
        rows = [torch.empty_like(row) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, row.contiguous())
        return torch.stack(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous()
        dist.all_reduce(total)
        return total[dist.get_rank()]


def together() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """BatchNormalization over axis 1; in training with the statistics of the batch, which move the running ones.

    Of processes that train together (torch.distributed), the batches count as one: statistics and gradients are those
    of the global batch, and running statistics stay equal in all of them.
    momentum: how far the running statistics move towards the batch's (torch's convention; ONNX's is 1 minus that).
    """
    if not (training and together()):
        return F.batch_norm(x, mean, variance, scale, bias, training, momentum, eps)
    with torch.autocast(x.device.type, enabled=False):
        y, centre, spread, total = normalised(x, scale, bias, eps)
        with torch.no_grad():
            mean.lerp_(centre.to(mean.dtype), momentum)
            variance.lerp_((spread * (total / (total - 1))).to(variance.dtype), momentum)
    return y


def batch_norm_of_batch(
    x: Tensor, mean: Tensor, variance: Tensor, scale: Tensor, bias: Tensor, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """BatchNormalization in ONNX's own training mode, which changes nothing that is stored: the result, the moved
    statistics, and those of the batch (its variance divided by n)."""
    with torch.autocast(x.device.type, enabled=False):
        y, centre, spread, _ = normalised(x, scale, bias, eps)
        centre, spread = centre.to(mean.dtype), spread.to(variance.dtype)
        return y, mean.lerp(centre, momentum), variance.lerp(spread, momentum), centre, spread


def batch_norm_by_batch(x: Tensor, scale: Tensor, bias: Tensor, eps: float) -> Tensor:
    """As `batch_norm_of_batch`, the result alone."""
    if together():
        with torch.autocast(x.device.type, enabled=False):
            return normalised(x, scale, bias, eps)[0]
    return torch.batch_norm(x, scale, bias, None, None, True, 0.0, eps, torch.backends.cudnn.enabled)


def normalised(
    x: Tensor, scale: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """By the statistics of all processes' batches; and those: mean, variance, elements per channel."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    axes = [0, *range(2, x.ndim)]
    shape = [1, -1, *(1 for _ in axes[1:])]
    centre, spread = wide.mean(axes), wide.var(axes, unbiased=False)
    total = wide.new_full((1,), x.numel() / x.shape[1])
    if together():
        rows = _Gather.apply(torch.cat([centre, spread, total]))
        means, variances, counts = rows.split([x.shape[1], x.shape[1], 1], dim=1)
        total = counts.sum()
        centre = (means * counts).sum(0) / total
        spread = ((variances + (means - centre).square()) * counts).sum(0) / total
    factor = torch.rsqrt(spread + eps)
    factor = factor if scale is None else factor * scale
    y = (wide - centre.view(shape)) * factor.view(shape)
    y = y if bias is None else y + bias.view(shape)
    return y.to(x.dtype), centre, spread, total


def instance_norm(x: Tensor, scale: Tensor, bias: Tensor, eps: float) -> Tensor:
    """As F.instance_norm, which refuses images of one pixel."""
    return torch.instance_norm(x, scale, bias, None, None, True, 0.0, eps, torch.backends.cudnn.enabled)


def group_norm(x: Tensor, groups: int, scale: Tensor, bias: Tensor, eps: float) -> Tensor:
    """With a scale and a bias for every group, as before opset 21."""
    each = x.size(1) // groups
    return F.group_norm(x, groups, scale.repeat_interleave(each), bias.repeat_interleave(each), eps)


def layer_norm(x: Tensor, scale: Tensor | None, bias: Tensor | None, axis: int, eps: float) -> Tensor:
    """Over the axes from `axis` on; scale and bias are broadcast."""
    return layer_norm_statistics(x, scale, bias, axis, eps)[0]


def layer_norm_statistics(
    x: Tensor, scale: Tensor | None, bias: Tensor | None, axis: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `layer_norm`; and the means and the inverse standard deviations."""
    shape = x.shape[axis:]
    fits = all(p is None or p.shape == shape for p in (scale, bias))
    y, mean, inverse = torch.native_layer_norm(x, shape, scale if fits else None, bias if fits else None, eps)
    if not fits:
        y = y if scale is None else y * scale
        y = y if bias is None else y + bias
    return y, mean, inverse


def rms_norm(x: Tensor, scale: Tensor | None, axis: int, eps: float) -> Tensor:
    """By the root mean square over the axes from `axis` on; the scale is broadcast."""
    y = F.rms_norm(x, x.shape[axis:], None, eps)
    return y if scale is None else y * scale.to(y.dtype)


def rms_norm_statistics(x: Tensor, scale: Tensor | None, axis: int, eps: float) -> tuple[Tensor, Tensor]:
    """As `rms_norm`; and the inverse root mean square."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse = torch.rsqrt(wide.square().mean(tuple(range(axis % x.dim(), x.dim())), keepdim=True) + eps)
    return rms_norm(x, scale, axis, eps), inverse


def hardmax(x: Tensor, axis: int) -> Tensor:
    """1 at the first of the largest elements along an axis, else 0."""
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1.0)


def local_response_norm(x: Tensor, size: int, alpha: float, beta: float, bias: float) -> Tensor:
    """Over `size` neighbouring channels, of an even number one more behind than in front."""
    front = (size - 1) // 2
    laid = F.pad(x.square().movedim(1, -1), (front, size - 1 - front))
    total = laid.unfold(-1, size, 1).sum(-1).movedim(-1, 1)
    return x / (bias + alpha / size * total).pow(beta)


def lp_normalize(x: Tensor, p: float, axis: int) -> Tensor:
    """Divided by the p-norm along an axis; zeros stay zeros."""
    norm = torch.linalg.vector_norm(x, p, axis, keepdim=True)
    return x / norm.masked_fill(norm == 0, 1.0)


def mean_variance_norm(x: Tensor, axes: Sequence[int]) -> Tensor:
    """Without the mean over these axes, and divided by the standard deviation."""
    over = tuple(axes)
    centred = x - x.mean(over, keepdim=True)
    return centred / (root(centred.square().mean(over, keepdim=True), 2) + 1e-9)
