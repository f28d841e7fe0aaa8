"""How well a network passes gradients: the singular values of its Jacobian.

A network trains well where they are near 1, and poorly where most of them have vanished (dynamical isometry, Saxe et
al., arXiv 1312.6120). Pruning breaks that more than it breaks the function, which is what TPP is about.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from onnxprune.errors import UsageError

__all__ = ["mean_jsv"]

MOST_BYTES = 1 << 28  # of the Jacobians that are held at a time


def mean_jsv(module: nn.Module, *inputs: Tensor, output: int = 0) -> float:
    """The mean singular value of d(output)/d(inputs), over samples and singular values.

    inputs: the module's, the first axis of each counts samples; the derivative is by those of floating point. output:
    which of the module's outputs, where it gives several. The module is taken in eval mode, where samples don't
    interact, and left as it was. A sample whose output has K numbers costs K backward passes.
    Raises UsageError where no input is floating point, or the output does not have one entry per sample.
    """
    if not any(x.is_floating_point() for x in inputs):
        raise UsageError("a Jacobian wants inputs of floating point, found none", "give what follows the embedding")
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        total, count = 0.0, 0
        for jacobian in _jacobians(module, inputs, output):
            values = _singular_values(jacobian)
            total += float(values.sum())
            count += values.numel()
    finally:
        for part, mode in modes.items():
            part.training = mode
    return total / max(count, 1)


def _singular_values(jacobian: Tensor) -> Tensor:
    """Of (samples, K, D), min(K, D) each: roots of the eigenvalues of the smaller of its two Gram matrices."""
    wide = jacobian.double()
    gram = wide @ wide.mT if wide.shape[1] <= wide.shape[2] else wide.mT @ wide
    return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()


def _jacobians(module: nn.Module, inputs: Sequence[Tensor], output: int) -> Iterator[Tensor]:
    """(samples, K, D) for some samples after the other."""
    numbers = sum(x[:1].numel() for x in inputs if x.is_floating_point())
    samples, at_once, done = len(inputs[0]), 1, 0
    while done < samples:
        part = [x[done : done + at_once].detach() for x in inputs]
        learnt = [x.requires_grad_() for x in part if x.is_floating_point()]
        with torch.enable_grad():
            found = module(*part)
            found = found if isinstance(found, Tensor) else found[output]
            if found.ndim == 0 or len(found) != len(part[0]):
                raise UsageError(
                    f"the output should have one entry for each of {len(part[0])} samples, "
                    f"its shape is {tuple(found.shape)}"
                )
            flat = found.reshape(len(part[0]), -1)
            rows = [_gradient(flat[:, k].sum(), learnt) for k in range(flat.shape[1])]
        yield torch.stack(rows, 1)
        done += at_once
        size = 8 * numbers * flat.shape[1]
        at_once = max(1, MOST_BYTES // max(size, 1))


def _gradient(value: Tensor, learnt: Sequence[Tensor]) -> Tensor:
    """(samples, D)."""
    found = torch.autograd.grad(value, learnt, retain_graph=True, materialize_grads=True)
    return torch.cat([g.reshape(len(g), -1) for g in found], 1)
