"""Inputs that are made up so that BatchNormalization finds in them what it found in the data.

Noise whose neighbours are alike (a spectrum of 1/f, as images and sounds have) is changed by a few steps of gradient
descent until mean and deviation in front of every BatchNormalization are near the stored ones. The idea is that of
Cai et al., "ZeroQ" (2020), and Yin et al., "Dreaming to Distill" (2020), with fewer steps: what is still missing is
made up for by running on the statistics of these inputs (`normalised`).

Top-1 on 2,000 images after repair 'ls' at 70 % of the MACs of two ResNets for CIFAR-10 (that of `models/`, 85.5 %
before, and a ResNet-20 of width 8, 78.9 %), on 256 and 128 inputs, with stored statistics and with those of the inputs:

    not repaired                                        40.5   16.1
    white noise                                         40.7   54.0 | 77.7   57.2
    1/f noise                                           47.1   43.3 | 78.8   56.3
    1/f noise and 20 steps                              75.4   61.9 | 79.2   64.4
    1/f noise and 60 steps                              78.9   64.7 |
    as it is here, 128 inputs, mean of two seeds                    | 79.5   64.0
    training images                                     81.4   72.4

Constants alone (`mean`) took even the true means no further than 40.5 and 22.3, so that moments of rectified Gaussians
in closed form, which give nothing but means, were not worth having.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import cos, pi
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from onnxprune.axes.analysis import Analysis
from onnxprune.data.signature import signature_of
from onnxprune.mirroring.values import as_tensor
from onnxprune.model.profile import costs
from onnxprune.reconstruct.lockstep import Side
from onnxprune.reconstruct.normalised import Norm, depths, norms, statistics_on
from onnxprune.reconstruct.together import activations
from onnxprune.train.batching import free_batch
from onnxprune.verify.inputs import draw

__all__ = ["Imagined", "coloured", "imagine", "imagined", "mismatch"]

SAMPLES, FEWEST_SAMPLES = 128, 16
STEPS, FEWEST_STEPS = 30, 10
# Multiply-accumulates, about. Samples and steps follow from it and not from the clock, so that a seed tells the file.
WORK = 4e12
BATCH = 32  # inputs whose statistics are matched together
PIECES, LARGEST_PIECE = 16, 16  # of what the repair is given: see `repair`
MEMORY = 1 << 30  # bytes of activations that gradients want
RATE = 0.2  # of the inputs' size; falls to zero
FRAME_STEPS, FRAME_RATE, FEW = 30, 0.3, 8  # for mean and size of the inputs' channels
SCALES = tuple(10 ** (k / 2) for k in range(-4, 7))
FEWEST = 8  # numbers per channel, for its deviation to mean anything


@dataclass(frozen=True, eq=False, slots=True)
class Imagined:
    """Batches that the file takes; what statistics the original has on them (`normalised.statistics_on`), and of how
    many BatchNormalizations."""

    batches: list[dict[str, np.ndarray]]
    samples: int
    statistics: dict[str, np.ndarray]
    norms: int


def imagine(
    analysis: Analysis,
    shapes: Mapping[str, Sequence[int]],
    *,
    samples: int | None = None,
    batch: int | None = None,
    seed: int = 0,
) -> Imagined:
    """Inputs for a model, in a bounded time.

    shapes: of inputs that it runs on. samples: how many; None: as many as take a minute or two, 16 to 128.
    batch: how many at once, in the file; None: what it is fixed to, or what suits. Raises RuntimeError where torch
    can't run it on so many.
    """
    graph, rng = analysis.graph, np.random.default_rng(seed)
    side = Side(graph, analysis.registry)
    signature = signature_of(graph)
    runs = WORK / (3 * max(costs(analysis)["macs"].total({}), 1.0))
    samples = samples or int(np.clip(runs / FEWEST_STEPS, FEWEST_SAMPLES, SAMPLES))
    steps = int(np.clip(runs / samples, FEWEST_STEPS, STEPS))
    piece, at_once = batch or signature.batch, BATCH
    if batch is not None or not (signature.batch is None or free_batch(side.module, graph, signature, seed=seed)):
        at_once = piece or 1
    elif not signature.whole:
        at_once = _multiple(int(np.clip(MEMORY // activations(graph), 1, BATCH)), piece or 1)
        piece = piece or max(1, min(LARGEST_PIECE, samples // PIECES))
    if signature.whole:  # complete feeds
        at_once = 1
    sizes = {n: tuple(s) if signature.whole else (at_once, *s[1:]) for n, s in shapes.items()}
    few = None if signature.whole else min(_multiple(FEW, piece or 1), at_once)
    feeds = (draw(graph, {}, rng, sizes) for _ in range(-(-samples // at_once)))
    made = list(imagined(side, feeds, steps=steps, few=few))
    statistics = statistics_on(side, made)
    arrays = ({n: x.numpy() for n, x in zip(graph.inputs, inputs, strict=True)} for inputs in made)
    if signature.whole:
        batches = list(arrays)
    else:
        step = piece or 1
        batches = [{n: a[k : k + step] for n, a in x.items()} for x in arrays for k in range(0, at_once, step)]
    return Imagined(batches, samples, statistics, len(statistics) // 2)


def _multiple(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def channel_axis(shape: Sequence[int]) -> int:
    """Where an input (N, ...) has its channels, as far as sizes tell: the smallest axis."""
    return 1 + int(np.argmin(shape[1:])) if len(shape) > 2 else len(shape) - 1


def coloured(noise: np.ndarray) -> np.ndarray:
    """White noise with a spectrum of 1/f along all axes but samples and channels, as large as before."""
    axes = tuple(k for k in range(1, noise.ndim) if k != channel_axis(noise.shape) and noise.shape[k] > 1)
    if not axes:
        return noise
    square = sum(
        np.square(np.fft.fftfreq(noise.shape[a])).reshape([-1 if b == a else 1 for b in range(noise.ndim)])
        for a in axes
    )
    lowest = 1 / max(noise.shape[a] for a in axes)
    spectrum = np.fft.fftn(noise, axes=axes) / np.maximum(np.sqrt(square), lowest)
    found = np.fft.ifftn(spectrum, axes=axes).real
    return (found * (noise.std() / max(found.std(), np.finfo(float).tiny))).astype(noise.dtype)


def imagined(
    side: Side, batches: Iterable[Mapping[str, np.ndarray]], *, steps: int = STEPS, few: int | None = None
) -> Iterator[list[Tensor]]:
    """Batches of inputs in the model's order, from random ones. What is no number of floating point stays as drawn.

    side: the original; it is run on whole batches, whose statistics are matched, each by itself. Size and mean of the
    inputs' channels, which no file tells, are those that suit the first BatchNormalizations, on `few` samples of the
    first batch (None: all). Each step takes about three runs of the network.
    """
    found = norms(side)
    depth = depths(side, found)
    first = [n for n in found if not depth[n.x]]
    for parameter in side.module.parameters():
        parameter.requires_grad_(False)
    frame: dict[int, tuple[Tensor, Tensor]] | None = None
    for drawn in batches:
        inputs = [as_tensor(drawn[n]) for n in side.module.meta["inputs"]]
        floats = [k for k, x in enumerate(inputs) if x.is_floating_point() and x.ndim]
        for k in floats:
            inputs[k] = torch.from_numpy(coloured(inputs[k].numpy()))
        if floats and found:
            frame = frame or _framed(side, first, [x[:few] if x.ndim else x for x in inputs], floats)
            free = {k: inputs[k].requires_grad_() for k in floats}
            placed = partial(_placed, inputs, free, frame)
            _descend(side, found, placed, [*free.values()], steps, RATE)
            inputs = placed()
        yield [x.detach() for x in inputs]


def _placed(
    inputs: Sequence[Tensor], free: Mapping[int, Tensor], frame: Mapping[int, tuple[Tensor, Tensor]]
) -> list[Tensor]:
    """frame: mean, in deviations, and logarithm of the size, per channel."""
    return [(free[k] + frame[k][0]) * frame[k][1].exp() if k in free else x for k, x in enumerate(inputs)]


def _framed(
    side: Side, found: Sequence[Norm], inputs: Sequence[Tensor], floats: Sequence[int]
) -> dict[int, tuple[Tensor, Tensor]]:
    """Means and sizes of the inputs' channels that fit the statistics best."""
    start = float(np.log(_size(side, found, inputs, floats)))
    frame: dict[int, tuple[Tensor, Tensor]] = {}
    for k in floats:
        axis = channel_axis(inputs[k].shape)
        shape = [n if a == axis and a else 1 for a, n in enumerate(inputs[k].shape)]
        frame[k] = torch.zeros(shape, requires_grad=True), torch.full(shape, start, requires_grad=True)
    free = {k: inputs[k] for k in floats}
    variables = [t for pair in frame.values() for t in pair]
    _descend(side, found, partial(_placed, inputs, free, frame), variables, FRAME_STEPS, FRAME_RATE)
    return {k: (mean.detach(), size.detach()) for k, (mean, size) in frame.items()}


def mismatch(side: Side, found: Sequence[Norm], inputs: Sequence[Tensor]) -> Tensor:
    """How far means and deviations of the channels are from the stored ones, in stored deviations: mean square over
    the channels, and over the BatchNormalizations that have enough numbers to tell."""
    seen = _Watch(side, found).of(inputs)
    total, count = torch.zeros(()), 0
    for norm in found:
        x = seen[norm.x]
        if x.numel() < FEWEST * x.shape[1]:
            continue
        spread, mean = torch.var_mean(x, [k for k in range(x.ndim) if k != 1], unbiased=False)
        stored = (side.tensor(norm.variance) + norm.epsilon).sqrt()
        # the root has no slope at zero
        deviation = (spread + norm.epsilon).sqrt()
        total = total + ((mean - side.tensor(norm.mean)) / stored).square().mean()
        total = total + (deviation / stored - 1).square().mean()
        count += 1
    return total / max(count, 1)


def _size(side: Side, found: Sequence[Norm], inputs: Sequence[Tensor], floats: Sequence[int]) -> float:
    """How large inputs are that fit the statistics best."""

    def misfit(scale: float) -> float:
        with torch.no_grad():
            value = float(mismatch(side, found, [scale * x if k in floats else x for k, x in enumerate(inputs)]))
        return value if np.isfinite(value) else np.inf

    return min(SCALES, key=misfit)


def _descend(
    side: Side,
    found: Sequence[Norm],
    inputs: Callable[[], Sequence[Tensor]],
    free: Sequence[Tensor],
    steps: int,
    rate: float,
) -> None:
    """Change the tensors that are free so that the inputs made of them fit."""
    optimizer = torch.optim.Adam(free, lr=rate, betas=(0.9, 0.99))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 + cos(pi * step / steps)) / 2
        optimizer.zero_grad()
        loss = mismatch(side, found, inputs())
        if not loss.requires_grad or not torch.isfinite(loss):  # nothing that could be differentiated leads there
            return
        loss.backward()
        for x in free:
            if x.grad is not None:
                x.grad.nan_to_num_(0.0, 0.0, 0.0)
        optimizer.step()


class _Watch(Interpreter):
    """Runs the network as far as its last BatchNormalization, and keeps what they read."""

    def __init__(self, side: Side, found: Sequence[Norm]) -> None:
        super().__init__(side.module)
        self.wanted = {n.x for n in found}
        self.last = max((side.nodes.index(n.x) for n in found), default=0)
        self.side = side

    def of(self, inputs: Sequence[Tensor]) -> dict[Node, Any]:
        self.env = dict(zip(self.side.inputs, inputs, strict=True))
        found: dict[Node, Any] = {}
        for node in self.side.nodes[: self.last + 1]:
            if node not in self.env:
                self.env[node] = self.run_node(node)
            if node in self.wanted:
                found[node] = self.env[node]
            for used in self.user_to_last_uses.get(node, ()):
                self.env.pop(used, None)
        return found
