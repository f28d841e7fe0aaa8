"""What the output loses with a unit, to first and second order, from gradients where the unit is read.

With a gate z per unit, 1 with the unit and 0 without, dl/dz = sum of activation times gradient over all places where
it is read (Molchanov et al., arXiv 1611.06440, eq. 7): no products of parameters that scale one another are counted
twice. Of a sample's loss l, (dl/dz)^2 estimates what its removal costs (arXiv 1906.10771, eq. 8).

Without labels l has to be made up: the distance from the original's own output is least at the original, where its
gradient is zero. Its second derivative is not: for the divergence of softmax outputs it is the Fisher information
E[(dl/dz)^2] of l = log p(y) with y drawn from the model's own output, for squared errors that of a random projection
of the output. So the labels are drawn, and the mean square is the distance that removal causes, to second order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from onnxprune.calibrate.layout import Part, read_parts
from onnxprune.calibrate.watched import Batches, Watched, gate, targets_of
from onnxprune.model.outputs import OutputKind
from onnxprune.train.loss import Criterion, criterion, output_kinds

__all__ = ["distillation_slopes", "fisher_information", "task_information"]

DRAWS = 512  # samples times draws of labels, at least
DROPPED = 0.1  # share of the units that are gone where slopes are taken

Scores = dict[str, np.ndarray]


def fisher_information(watched: Watched, batches: Batches, *, seed: int = 0) -> Scores:
    """Per group id and unit, the mean of (dl/dz)^2 over samples and draws of l."""
    kinds = [k for k in output_kinds(watched.analysis.graph) if k.learnable]
    generator = torch.Generator().manual_seed(seed)
    draws = max(1, math.ceil(DRAWS / batches.samples))
    scale = _Scale(watched)

    def losses(outputs: Mapping[str, Tensor], _: Any) -> list[Callable[[], Tensor]]:
        deviation = scale.of(outputs)
        return [lambda: _drawn(kinds, outputs, deviation, generator)] * draws

    return _squares(watched, batches, losses)


def task_information(watched: Watched, batches: Batches, loss: Criterion) -> Scores:
    """As `fisher_information`, of a loss on targets."""

    def losses(outputs: Mapping[str, Tensor], batch: Any) -> list[Callable[[], Tensor]]:
        return [lambda: loss(outputs, targets=targets_of(batch)) * batch.size]

    return _squares(watched, batches, losses)


def distillation_slopes(watched: Watched, batches: Batches, *, seed: int = 0) -> Scores:
    """Per group id and unit, how fast the distance from the original's output falls with the unit's gate, where a tenth
    of all units, other ones for every batch, is gone already: first order, and aware of what stands in for what."""
    gated = _Gated(watched, read_parts(watched))
    loss = criterion("auto", outputs=output_kinds(watched.analysis.graph))
    generator = torch.Generator().manual_seed(seed)
    sizes = {g.id: g.size for g in watched.analysis.groups}
    total = {g: np.zeros(n) for g, n in sizes.items()}
    passes = max(1, math.ceil(DRAWS / batches.samples))
    for batch in batches:
        inputs = batches.tensors(batch)
        teacher = watched.outputs_of(inputs)
        for _ in range(passes):
            drop = DROPPED * 2 * torch.rand((), generator=generator)
            gates = {g: (torch.rand(n, generator=generator) >= drop).float() for g, n in sizes.items()}
            gated.gates = {g: z.requires_grad_() for g, z in gates.items()}
            value = loss(watched.named(gated.run(*inputs)), teacher=teacher)
            used = [g for g in gates if g in gated.met]
            if not value.requires_grad or not used:
                break
            slopes = torch.autograd.grad(value, [gates[g] for g in used], allow_unused=True)
            for g, slope in zip(used, slopes, strict=True):
                if slope is not None:
                    total[g] -= slope.double().numpy() * batch.size
    return {g: np.maximum(t, 0) for g, t in total.items()}


def _squares(watched: Watched, batches: Batches, losses: Callable[..., list[Callable[[], Tensor]]]) -> Scores:
    """The sum over samples of squared (dl/dz)."""
    taken = _Taken(watched, read_parts(watched), watched.batch_axes(batches.first()))
    total = {g.id: np.zeros(g.size) for g in watched.analysis.groups}
    for batch in batches:
        outputs = watched.named(taken.run(*batches.tensors(batch)))
        made = losses(outputs, batch)
        for k, loss in enumerate(made):
            taken.start(batch.size)
            value = loss()
            if not value.requires_grad:
                break
            value.backward(retain_graph=k + 1 < len(made))
            for group, found in taken.found.items():
                total[group] += found.square().sum(0).numpy()
    return total


class _Taken(Interpreter):
    """Runs a mirror and, on the way back, adds up activation times gradient per unit: of each sample where all of a
    group's reads show which axis counts samples, otherwise of the batch. (Losses that are drawn are independent and of
    mean zero, so that the square of their sum is the sum of their squares in the mean.)"""

    def __init__(self, watched: Watched, parts: Mapping[int, Sequence[Part]], axes: Mapping[int, int]) -> None:
        super().__init__(watched.module)
        self.parts, self.axes = parts, axes
        self.sizes = {g.id: g.size for g in watched.analysis.groups}
        apart = {p.group: True for found in parts.values() for p in found}
        for number, found in parts.items():
            apart.update({p.group: False for p in found if number not in axes})
        self.apart = apart
        self.found: dict[str, Tensor] = {}

    def start(self, samples: int) -> None:
        self.found = {
            g: torch.zeros(samples if apart else 1, self.sizes[g], dtype=torch.float64)
            for g, apart in self.apart.items()
        }

    def run_node(self, node: Node) -> Any:
        x = super().run_node(node)
        if node.target is not gate or not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        number: Any = node.args[1]
        if number not in self.parts:
            return x
        y = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        y.register_hook(partial(self.collect, number, x.detach()))
        return y

    def collect(self, number: int, x: Tensor, slope: Tensor) -> None:
        for part in self.parts[number]:
            found = self.found[part.group]
            product = (x - part.constant if part.constant else x) * slope
            if number in self.axes:
                product = product.movedim((self.axes[number], part.axis), (0, 1))
                product = product.reshape(len(found), -1, part.length, product[0, 0].numel()).sum((1, 3))
            else:
                product = product.movedim(part.axis, 0).flatten(1).sum(1)[None]
            found.index_add_(1, part.units, product[:, part.at].double())


class _Gated(Interpreter):
    """Runs a mirror with gates per unit where units are read. gates: by the group's id; met: whose were used."""

    def __init__(self, watched: Watched, parts: Mapping[int, Sequence[Part]]) -> None:
        super().__init__(watched.module)
        self.parts = parts
        self.gates: Mapping[str, Tensor] = {}
        self.met: set[str] = set()

    def run_node(self, node: Node) -> Any:
        x = super().run_node(node)
        if node.target is gate and isinstance(x, Tensor) and x.is_floating_point():
            for part in self.parts.get(node.args[1], ()):  # type: ignore[arg-type]
                self.met.add(part.group)
                z = part.mask(self.gates[part.group]).to(x.dtype)
                z = z.reshape(-1, *[1] * (x.ndim - 1 - part.axis))
                x = x * z if not part.constant else part.constant + (x - part.constant) * z
        return x


class _Scale:
    """The deviation of outputs that are numbers, as distillation has it, from the first batch that is seen."""

    def __init__(self, watched: Watched) -> None:
        self.loss = criterion("auto", outputs=output_kinds(watched.analysis.graph))

    def of(self, outputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if not self.loss.state_dict():
            self.loss.calibrate([{n: x.detach() for n, x in outputs.items()}])
        return {n: v.sqrt() for n, v in self.loss.state_dict().items()}


def _drawn(
    kinds: Sequence[OutputKind], outputs: Mapping[str, Tensor], scale: Mapping[str, Tensor], generator: torch.Generator
) -> Tensor:
    """A loss of mean zero whose gradient's square is, in the mean, the second derivative of the distillation loss."""
    terms = []
    for kind in kinds:
        z = outputs[kind.name].float()
        if kind.kind in ("logits", "probabilities"):
            terms.append(_label(kind, z, generator))
        if kind.kind != "probabilities":
            noise = torch.randn(z.shape, generator=generator)
            deviation = scale[kind.name]
            if deviation.numel() > 1 and z.shape[kind.axes[0]] == deviation.numel():
                noise = noise / deviation.reshape(-1, *[1] * (z.ndim - 1 - kind.axes[0]))
            else:
                noise = noise / deviation.mean()
            terms.append((z * noise).sum() / math.sqrt(max(1, z[0].numel() if z.ndim > 1 else 1)))
    return torch.stack(terms).sum()


def _label(kind: OutputKind, z: Tensor, generator: torch.Generator) -> Tensor:
    """log p(y) of classes that are drawn from p, one at every position."""
    rows = z.flatten(kind.axes[0], kind.axes[-1]).movedim(kind.axes[0], -1)
    if kind.kind == "logits":
        logs = torch.log_softmax(rows, -1)
    else:
        logs = rows if kind.log else rows.clamp_min(torch.finfo(rows.dtype).tiny).log()
    flat = logs.reshape(-1, logs.shape[-1])
    y = torch.multinomial(flat.detach().exp(), 1, generator=generator)
    return flat.gather(1, y).sum() / math.sqrt(max(1, len(flat) // max(1, len(z))))
