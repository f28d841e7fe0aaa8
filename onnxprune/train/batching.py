"""Real batches for a model whose file is fixed to a batch size, mostly to one sample.

The graphs of most such files do not care, but for Reshape nodes that spell the batch out and constants that stand
beside a sample. The idea: nothing is concluded from the graph. The mirror's reshapes are left to find the first size
themselves, and such constants are repeated; then two feeds are run one after the other and together, and every output
that can be learnt from has to be the same. The file stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from onnxprune.data.signature import Signature
from onnxprune.errors import DataError
from onnxprune.mirroring.shapes import Shapes, tensor_shapes
from onnxprune.mirroring.values import as_tensor
from onnxprune.model.graph import Graph
from onnxprune.model.outputs import output_kinds
from onnxprune.verify.compare import difference
from onnxprune.verify.inputs import SPREADS, draw

__all__ = ["UNFIT", "Unfitting", "fitting", "free_batch", "takes_several"]

TRIES = 3  # pairs of feeds; some models give the same for most inputs
TOLERANCE = 1e-4  # relative; sums are taken in another order
UNFIT = (RuntimeError, IndexError, ValueError, TypeError)  # what torch says of shapes that don't fit

Feed = Mapping[str, np.ndarray]


class Unfitting(DataError):
    """A model can't be computed on so many samples at once."""


@contextmanager
def fitting(samples: int | None = None) -> Iterator[None]:
    """What torch says of shapes that don't fit, as an error of ours: some files declare any batch and take one sample.
    samples: how many are computed at once, where that is known."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError) as error:
        many = "several samples" if samples is None else "a sample" if samples == 1 else f"{samples} samples"
        raise Unfitting(
            f"the model can't be computed on {many} at once: {str(error).splitlines()[0]}",
            "--batch-size 1, where it takes one sample whatever it declares",
        ) from error


def free_batch(mirror: GraphModule, graph: Graph, signature: Signature, *, doubt: bool = False, seed: int = 0) -> bool:
    """Make a mirror of a graph with a fixed batch size run on any, and say whether it can: whether it gives for several
    batches at once what it gives for each. Where it can't it is left as it was.

    Made-up inputs are tried. Outputs that nothing is learnt from (indices, counts) don't matter.
    doubt: the answer where nothing is seen, because the mirror can't be run on such inputs or gives the same for all.
    """
    size = signature.batch
    learnt = [k.name for k in output_kinds(graph) if k.learnable]
    if size is None or not learnt:
        return False
    rng = np.random.default_rng(seed)
    before = _relax(mirror, _shapes(mirror, graph, draw(graph, graph.pins, rng)))
    found = None
    for spread in (s for s in SPREADS for _ in range(TRIES)):
        found = _same(mirror, graph, [draw(graph, graph.pins, rng, spread=spread) for _ in range(2)], size, learnt)
        if found is not None:
            break
    answer = doubt if found is None else found
    if not answer:
        for node, target, arguments in before:
            node.target, node.args = target, arguments
        mirror.recompile()
    return answer


def takes_several(mirror: GraphModule, graph: Graph, *, seed: int = 0) -> bool:
    """Whether a mirror that declares any batch can be computed on two samples, where it can on one. Made-up inputs are
    tried; True where they show nothing."""
    feed = draw(graph, graph.pins, np.random.default_rng(seed))
    one, two = ({n: np.concatenate([x[:1]] * count) if x.ndim else x for n, x in feed.items()} for count in (1, 2))
    return _outputs(mirror, graph, one) is None or _outputs(mirror, graph, two) is not None


def _relax(mirror: GraphModule, shapes: Shapes) -> list[tuple[Node, Any, tuple]]:
    """Let reshapes to constant sizes find the first one themselves, and what is put beside constants (as zeros for
    padding) repeat them for every sample; gives the nodes with what they had before. shapes: of the nodes' tensors."""
    before = []
    for node in mirror.graph.nodes:
        was = node, node.target, node.args
        if node.op == "call_method" and node.target == "reshape" and len(node.args) == 2:
            sizes = node.args[1]
            if isinstance(sizes, (list, tuple)) and sizes and all(isinstance(s, int) for s in sizes) and sizes[0] > 0:
                rest = shapes.get(node, tuple(sizes))[1:]
                if all(s > 0 for s in rest):
                    before.append(was)
                    node.args = (node.args[0], [-1, *rest])
        elif node.target is torch.cat:
            before.append(was)
            node.target = _beside
    mirror.recompile()
    return before


def _beside(tensors: list[Tensor], dim: int = 0) -> Tensor:
    """`torch.cat`, where some of them may be for one sample only."""
    samples = max(len(x) for x in tensors)
    if dim in (0, -tensors[0].ndim) or samples == 1:
        return torch.cat(tensors, dim)
    return torch.cat([x.expand(samples, *x.shape[1:]) if len(x) == 1 else x for x in tensors], dim)


def _shapes(mirror: GraphModule, graph: Graph, feed: Feed) -> Shapes:
    """Empty where the mirror can't be run on this."""
    try:
        return tensor_shapes(mirror, [as_tensor(feed[n]) for n in graph.inputs])
    except UNFIT:
        return {}


def _same(mirror: GraphModule, graph: Graph, feeds: Sequence[Feed], size: int, learnt: Sequence[str]) -> bool | None:
    """Whether the outputs are the same; None where these feeds don't show it."""
    one, other = (_outputs(mirror, graph, feed) for feed in feeds)
    if one is None or other is None:
        return None
    if any(not np.isfinite(one[n]).all() or difference(one[n], other[n])[1] <= TOLERANCE for n in learnt):
        return None
    both = _outputs(mirror, graph, {n: np.concatenate([feed[n] for feed in feeds]) for n in graph.inputs})
    if both is None or any(one[n].ndim == 0 or len(one[n]) != size for n in learnt):
        return False
    return all(difference(np.concatenate([one[n], other[n]]), both[n])[1] <= TOLERANCE for n in learnt)


@torch.no_grad()
def _outputs(mirror: GraphModule, graph: Graph, feed: Feed) -> dict[str, np.ndarray] | None:
    """Tensors by output name; None where the mirror can't be run."""
    try:
        found = mirror.forward(*(as_tensor(feed[n]) for n in graph.inputs))  # called, it would print a traceback
    except UNFIT:
        return None
    found = [found] if len(graph.outputs) == 1 else found
    return {
        n: (x.float() if x.is_floating_point() else x).numpy()
        for n, x in zip(graph.outputs, found, strict=True)
        if isinstance(x, Tensor)
    }
