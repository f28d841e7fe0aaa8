"""Fourier transforms and what goes with them. Complex numbers are a last axis of size 2."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["dft", "mel_weights", "stft", "window"]


def as_numbers(x: Tensor) -> Tensor:
    """Real or complex numbers, without the last axis; in float32 at least."""
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    return x.squeeze(-1) if x.size(-1) == 1 else torch.view_as_complex(x.contiguous())


def transformed(numbers: Tensor, length: int | None, axis: int, onesided: bool) -> Tensor:
    """The Fourier transform; of its frequencies those that are not negative, where `onesided`."""
    if onesided and not numbers.is_complex():
        return torch.fft.rfft(numbers, length, axis)
    found = torch.fft.fft(numbers, length, axis)
    return found.narrow(axis, 0, found.size(axis) // 2 + 1) if onesided else found


def dft(x: Tensor, length: int | None, axis: int, inverse: bool, onesided: bool) -> Tensor:
    """The discrete Fourier transform along an axis, cut or padded to `length`."""
    axis, numbers = axis % x.dim(), as_numbers(x)
    if inverse and onesided:
        return torch.fft.irfft(numbers, length, axis).unsqueeze(-1).to(x.dtype)
    if inverse:
        return torch.view_as_real(torch.fft.ifft(numbers, length, axis)).to(x.dtype)
    return torch.view_as_real(transformed(numbers, length, axis, onesided)).to(x.dtype)


def stft(x: Tensor, step: int, weights: Tensor | None, length: int | None, onesided: bool) -> Tensor:
    """Fourier transforms of frames of a signal (batch, time, 1 or 2), times a window: (batch, frame, frequency, 2)."""
    if length is None:
        length = x.size(1) if weights is None else weights.size(0)
    frames = as_numbers(x).unfold(1, length, step)
    if weights is not None:
        frames = frames * weights.to(frames.real.dtype)
    return torch.view_as_real(transformed(frames, None, 2, onesided)).to(x.dtype)


def window(
    size: int, terms: Sequence[float], periodic: bool, dtype: torch.dtype, device: torch.device | None
) -> Tensor:
    """A sum of cosines with these coefficients and alternating signs, over one period."""
    period = max(size if periodic else size - 1, 1)
    angle = torch.arange(size, dtype=torch.float64, device=device) * (2 * math.pi / period)
    result = torch.zeros_like(angle)
    for k, term in enumerate(terms):
        result = result + (-1) ** k * term * torch.cos(k * angle)
    return result.to(dtype)


def mel_weights(
    bands: int,
    length: int,
    rate: int,
    low: Tensor | float,
    high: Tensor | float,
    dtype: torch.dtype,
    device: torch.device | None,
) -> Tensor:
    """Triangles over the frequencies of a one-sided transform of `length`, evenly spaced on the mel scale:
    (frequency, band)."""
    bottom, top = (2595 * math.log10(1 + float(f) / 700) for f in (low, high))
    mel = bottom + torch.arange(bands + 2, dtype=torch.float64, device=device) * ((top - bottom) / (bands + 2))
    corners = torch.floor((length + 1) * (700 * (10 ** (mel / 2595) - 1)) / rate)
    left, peak, right = corners[:-2], corners[1:-1], corners[2:]
    at = torch.arange(length // 2 + 1, dtype=torch.float64, device=device)[:, None]
    rising = torch.where(peak > left, (at - left) / (peak - left).clamp(min=1), 1.0)
    falling = (right - at) / (right - peak).clamp(min=1)
    inside = torch.where((at >= left) & (at <= peak), rising, 0.0)
    return torch.where((at >= peak) & (at < right), falling, inside).to(dtype)
