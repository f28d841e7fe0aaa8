"""Several samples at once through two networks whose file is fixed to a batch size, mostly to one sample.

Run one at a time, a small network costs more in calls than in numbers. Whether several can be run at once is found
out by trying (`train.batching.free_batch`); what a repair reads must then be what it is for one, with more samples in
front.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from math import prod

import numpy as np

from onnxprune.data.signature import signature_of
from onnxprune.mirroring.shapes import Shapes, tensor_shapes
from onnxprune.mirroring.values import as_tensor
from onnxprune.model.graph import Graph
from onnxprune.model.pins import batch_dimension
from onnxprune.reconstruct.lockstep import Side
from onnxprune.reconstruct.tasks import Task
from onnxprune.train.batching import UNFIT, free_batch
from onnxprune.verify.inputs import draw

__all__ = ["activations", "grouped", "joined", "together"]

ACTIVATIONS = 1 << 30  # bytes between the nodes of a network, for all samples that run at once

Feed = Mapping[str, np.ndarray]


def together(sides: Sequence[Side], tasks: Sequence[Task], most: int, *, seed: int = 0) -> int:
    """How many batches of the file's size both networks can run as one, at most so many samples: 1 where they can't, or
    where a task would not find its axes. The mirrors are changed so that they take them."""
    graph = sides[0].graph
    signature = signature_of(graph)
    if signature.batch is None or signature.whole:
        return 1
    count = min(most, ACTIVATIONS // activations(graph)) // signature.batch
    if count < 2 or not all(free_batch(s.module, s.graph, signature_of(s.graph), seed=seed) for s in sides):
        return 1
    rng = np.random.default_rng(seed)
    feeds = [draw(graph, graph.pins, rng) for _ in range(2)]
    try:
        one, two = ([_shapes(s, feed) for s in sides] for feed in (feeds[0], joined(feeds)))
    except UNFIT:  # not on such inputs
        return 1
    return count if all(t.scales(one, two, signature.batch) for t in tasks) else 1


def _shapes(side: Side, feed: Feed) -> Shapes:
    return tensor_shapes(side.module, [as_tensor(feed[n]) for n in side.names])


def grouped(feeds: Iterable[Feed], count: int) -> Iterator[Feed]:
    """So many feeds as one; the last one may be of fewer."""
    rest = iter(feeds)
    while several := list(islice(rest, count)):
        yield joined(several)


def joined(feeds: Sequence[Feed]) -> Feed:
    """Their samples, one behind the other."""
    return feeds[0] if len(feeds) == 1 else {n: np.concatenate([f[n] for f in feeds]) for n in feeds[0]}


def activations(graph: Graph) -> int:
    """Bytes of a sample's tensors between the nodes, about; sizes that are not known count as one."""
    dimension = batch_dimension(graph)
    lead = signature_of(graph).batch or (graph.pins.get(dimension, 1) if dimension is not None else 1)
    sizes = (prod(d or 1 for d in graph.shapes.get(n) or (1,)) for node in graph.nodes for n in node.outputs if n)
    return max(1, 4 * sum(sizes) // lead)
