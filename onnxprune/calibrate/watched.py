"""A mirror that can be watched and gated: its tensors are known by their names in the graph, and wherever a unit is
made or read, a gate stands that passes its tensor on, or on the way multiplies it, or takes its gradient.

It is not fused, so that every tensor of the graph is one of its nodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Node, Proxy

from onnxprune.axes.analysis import Analysis
from onnxprune.axes.dead import PRODUCES
from onnxprune.calibrate.reads import reads_of
from onnxprune.data.batching import Batch
from onnxprune.data.signature import signature_of
from onnxprune.data.source import Source
from onnxprune.errors import DataError
from onnxprune.mirroring.build import Builder
from onnxprune.mirroring.quantised import Quantised
from onnxprune.mirroring.shapes import tensor_shapes
from onnxprune.mirroring.values import as_tensor
from onnxprune.train.batching import free_batch, takes_several

__all__ = ["Batches", "Gate", "Watched", "gate"]

ACTIVATIONS = 1 << 28  # numbers that the activations of one batch may hold together
LARGEST = 64  # samples of a batch
FEW = (2, 3)  # samples, to see which axes are the batch's


@dataclass(frozen=True, slots=True)
class Gate:
    """Where a gate stands: in front of an input of a node, by the tensor's name. made: the tensor is a parameter that
    makes units, otherwise one that carries them to where they are read."""

    node: int
    tensor: str
    made: bool


def gate(x: Any, number: int) -> Any:
    """Passes on what it gets; interpreters do more, by the gate's number in `Watched.gates`."""
    return x


class _Builder(Builder):
    """Puts gates in front of the inputs that are to have one."""

    def __init__(self, analysis: Analysis) -> None:
        super().__init__(analysis.graph, analysis.registry, half=torch.float32)
        self.gated: dict[tuple[int, str], bool] = {}
        for g in analysis.groups:
            for m in g.members:
                if m.role == PRODUCES:
                    self.gated[m.use[0], m.initializer] = True
        for reads in reads_of(analysis).values():
            for read in reads:
                self.gated.update({(read.node, o.tensor): False for o in read.operands if o.input is not None})
        self.gates: list[Gate] = []
        self.behind: dict[tuple[int, str], Proxy] = {}

    def tensor(self, name: str) -> Proxy:
        return self.behind_gate(name, super().tensor(name))

    def weight(self, name: str, form: Quantised) -> Proxy | None:
        found = super().weight(name, form)
        return None if found is None else self.behind_gate(name, found)

    def behind_gate(self, name: str, value: Proxy) -> Proxy:
        key = (-1 if self.at is None else self.at.index, name)
        if key not in self.gated:
            return value
        if key not in self.behind:
            self.behind[key] = self.call(gate, value, len(self.gates))
            self.gates.append(Gate(*key, self.gated[key]))
        return self.behind[key]


class Watched:
    """A mirror of an analysed graph, with its tensors by name and gates where units are made and read.

    module: as `mirroring.mirror` makes it, in eval mode, without gradients for its parameters. tensors: per node of the
    module, the names of the graph's tensors that it computes. fixed: how many samples it takes at a time; None where it
    takes any number. Raises NotMirrored.
    """

    def __init__(self, analysis: Analysis) -> None:
        builder = _Builder(analysis)
        self.analysis = analysis
        self.module: GraphModule = builder.build().eval().requires_grad_(False)
        self.gates = tuple(builder.gates)
        kept = set(self.module.graph.nodes)
        self.tensors: dict[Node, list[str]] = {}
        for name, value in builder.values.items():
            if isinstance(value, Proxy) and value.node in kept:
                self.tensors.setdefault(value.node, []).append(name)
        self.inputs: tuple[str, ...] = self.module.meta["inputs"]
        self.outputs: tuple[str, ...] = self.module.meta["outputs"]
        signature = signature_of(analysis.graph)
        freed = signature.whole or free_batch(self.module, analysis.graph, signature)
        self.fixed = None if freed and not signature.whole else 1 if signature.whole else signature.batch
        if self.fixed is None and not takes_several(self.module, analysis.graph):
            self.fixed = 1  # whatever it declares

    def named(self, found: Any) -> dict[str, Tensor]:
        """What the module gives, by output name."""
        results = (found,) if len(self.outputs) == 1 else tuple(found)
        return dict(zip(self.outputs, results, strict=True))

    @torch.no_grad()
    def outputs_of(self, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """The network's own outputs, by name."""
        return self.named(self.module(*inputs))

    def batch_axes(self, inputs: tuple[Tensor, ...]) -> dict[int, int]:
        """Which axis of a gated tensor counts samples, by the gate's number: the one that differs between batches of
        two and of three. Empty where the model does not take such batches."""
        if self.fixed is not None:
            return {}
        shapes = []
        for count in FEW:
            found = tensor_shapes(self.module, [torch.cat([x[:1]] * count) for x in inputs])
            gates: Any = {n.args[1]: shape for n, shape in found.items() if n.target is gate}
            shapes.append(gates)
        axes = {}
        for number, first in shapes[0].items():
            differing = [k for k, (a, b) in enumerate(zip(first, shapes[1][number], strict=False)) if a != b]
            if len(differing) == 1 and first[differing[0]] % FEW[0] == 0:
                axes[number] = differing[0]
        return axes


@dataclass(frozen=True)
class Batches:
    """The first `samples` samples of a shuffled source, the same in every pass, `size` at a time. fixed: what the model
    takes at a time, if that is fixed."""

    source: Source
    inputs: tuple[str, ...]
    samples: int
    size: int
    fixed: int | None = None
    seed: int = 0

    @classmethod
    def fitting(cls, watched: Watched, source: Source, *, samples: int, seed: int = 0) -> Batches:
        """In batches whose activations fit into about a gigabyte."""
        graph = watched.analysis.graph
        numbers = sum(prod(d or 1 for d in shape) for n, shape in graph.shapes.items() if n not in graph.static)
        pinned = max((graph.shapes[n][0] or 1 for n in graph.inputs if graph.shapes.get(n)), default=1)
        size = max(1, min(LARGEST, samples, ACTIVATIONS * max(pinned, 1) // max(numbers, 1)))
        return cls(source, graph.inputs, samples, watched.fixed or size, watched.fixed, seed)

    def __iter__(self) -> Iterator[Batch]:
        if self.fixed is not None:
            wanted = max(1, self.samples // self.fixed)
            yield from islice(self.source.batches(self.fixed, seed=self.seed, shuffle=True), wanted)
            return
        left, held, count = self.samples, [], 0
        for batch in self.source.batches(self.size, seed=self.seed, shuffle=True):
            held.append(_cut(batch, left) if batch.size > left else batch)
            left -= held[-1].size
            count += held[-1].size
            if count >= self.size or left <= 0:
                yield _joined(held)
                held, count = [], 0
            if left <= 0:
                return
        if held:
            yield _joined(held)

    def tensors(self, batch: Batch) -> tuple[Tensor, ...]:
        """The inputs of a batch in the model's order; float16 as float32, in which the mirror computes."""
        return tuple(as_tensor(batch.inputs[n]) for n in self.inputs)

    def first(self) -> tuple[Tensor, ...]:
        """The inputs of a first batch. Raises DataError where there is none."""
        batch = next(iter(replace(self, samples=self.fixed or 1)), None)
        if batch is None:
            raise DataError("the data holds no sample to calibrate on", "give data with --data")
        return self.tensors(batch)


def _cut(batch: Batch, count: int) -> Batch:
    inputs, targets = ({n: a[:count] for n, a in part.items()} for part in (batch.inputs, batch.targets))
    return Batch(inputs, targets)


def _joined(batches: list[Batch]) -> Batch:
    """Small batches (of a file that is fixed to one sample) as one."""
    if len(batches) == 1:
        return batches[0]
    inputs, targets = (
        {n: np.concatenate([getattr(b, part)[n] for b in batches]) for n in getattr(batches[0], part)}
        for part in ("inputs", "targets")
    )
    return Batch(inputs, targets)


def targets_of(batch: Batch) -> Mapping[str, Tensor]:
    return {n: torch.from_numpy(np.ascontiguousarray(a)) for n, a in batch.targets.items()}
