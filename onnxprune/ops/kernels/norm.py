"""Normalisations at run time."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

__all__ = ["batch_norm"]


def batch_norm(
    x: Tensor, mean: Tensor, variance: Tensor, scale: Tensor, bias: Tensor, training: bool, momentum: float, eps: float
) -> Tensor:
    """BatchNormalization over axis 1; in training with the statistics of the batch, which move the running ones.

    momentum: how far the running statistics move towards the batch's (torch's convention; ONNX's is 1 minus that).
    """
    return F.batch_norm(x, mean, variance, scale, bias, training, momentum, eps)
