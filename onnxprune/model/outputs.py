"""What a model's outputs mean, as far as the graph tells: logits, probabilities, sigmoids, or just values.

Found by walking from an output back to the node that decides it, through nodes that only rearrange it. The axes to
which that node gives a meaning (a Softmax's axis, a convolution's channels) are carried forward again by shapes alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

from onnx import TensorProto

from onnxprune.model.graph import Graph, Node
from onnxprune.ops.registry import Role

__all__ = ["Kind", "OutputKind", "output_kinds"]

Kind = Literal["logits", "probabilities", "sigmoid", "values", "discrete"]
Axes = tuple[int, ...]

# Behind these an output is still what it was.
_REARRANGING = frozenset({Role.REARRANGES, Role.TRANSPOSES})
_AFFINE = frozenset({Role.AFFINE, Role.QUOTIENT})
_SOFTMAX = frozenset({Role.SOFTMAX, Role.LOG_SOFTMAX})

_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
_EIGHT_BIT = {TensorProto.INT8, TensorProto.UINT8}


@dataclass(frozen=True, slots=True)
class OutputKind:
    """One graph output.

    kind: 'logits' (rank 2, two classes or more, made by a matrix product), 'probabilities' (a softmax, or its
    logarithm where `log`), 'sigmoid', 'values' (any other float) or 'discrete' (integers, bools, strings, sequences:
    nothing that could be learnt).
    axes: the axes, counted from the front, over which the classes lie; one unless an old Softmax runs over several.
    Of 'sigmoid' and 'values' it is the axis of the channels of the layer that made them, empty where that isn't known.
    """

    name: str
    kind: Kind
    axes: Axes = ()
    log: bool = False

    @property
    def learnable(self) -> bool:
        """Whether a loss can be taken of it."""
        return self.kind != "discrete"

    def class_axis(self, shape: Sequence[int], indices: Sequence[int]) -> int | None:
        """The axis of an output of this shape that class indices of shape `indices` leave out (or give as 1); None
        where there is none. Known axes come first, then the channels of an image, then any other."""
        order = [*self.axes[:1], 1, len(shape) - 1, *range(min(1, len(shape) - 1), len(shape))]
        for axis in order:
            if axis < len(shape) and tuple(indices) in (
                (*shape[:axis], *shape[axis + 1 :]),
                (*shape[:axis], 1, *shape[axis + 1 :]),
            ):
                return axis
        return None


def output_kinds(graph: Graph) -> tuple[OutputKind, ...]:
    """The kind of every output of the graph, in its order."""
    return tuple(_kind(graph, name) for name in graph.outputs)


def _kind(graph: Graph, name: str) -> OutputKind:
    if _element_type(graph, name) not in _FLOATS:
        return OutputKind(name, "discrete")
    path, node = _back(graph, name, _REARRANGING)
    if node is not None and (softmax := _softmax_axes(graph, node)):
        axes = _forward(graph, softmax, path, name)
        if axes:
            return OutputKind(name, "probabilities", axes, _role(graph, node) is Role.LOG_SOFTMAX)
    kind: Kind = "sigmoid" if node is not None and _role(graph, node) is Role.SIGMOID else "values"
    shape = graph.shapes.get(name, ())
    if kind == "values" and len(shape) == 2 and (shape[1] or 0) >= 2:
        _, node = _back(graph, name, _REARRANGING | _AFFINE)
        if node is not None and _role(graph, node) is Role.PRODUCT:
            return OutputKind(name, "logits", (1,))
    return OutputKind(name, kind, _channels(graph, name))


def _role(graph: Graph, node: Node) -> Role | None:
    operator = graph.registry.get(node.op)
    return None if operator is None else operator.role


def _element_type(graph: Graph, name: str) -> int:
    declared = next((o.type for o in graph.model.proto.graph.output if o.name == name), None)
    if declared is not None and declared.WhichOneof("value") not in (None, "tensor_type"):
        return TensorProto.UNDEFINED
    found = graph.types.get(name, TensorProto.UNDEFINED)
    return found or (declared.tensor_type.elem_type if declared is not None else TensorProto.UNDEFINED)


def _back(graph: Graph, name: str, through: frozenset[Role]) -> tuple[list[tuple[str, Node, str]], Node | None]:
    """Follow a tensor back through nodes of these roles. Gives the way, as (input, node, output) from the end, and the
    first node that isn't one of them; None where the way ends at an input or a weight."""
    path: list[tuple[str, Node, str]] = []
    while (node := graph.producers.get(name)) is not None and (role := _role(graph, node)) in through:
        source = _carrier(graph, node)
        if source is None or (role in _AFFINE and not _beside(graph, node, source)):
            break
        path.append((source, node, name))
        name = source
    return path, node


def _carrier(graph: Graph, node: Node) -> str | None:
    """The input that carries the data: the largest of those that depend on the model's inputs."""
    moving = [n for n in node.inputs if n and n not in graph.static and _carries(graph, n)]
    return max(moving, key=lambda n: prod(d or 1 for d in graph.shapes.get(n, ())), default=None)


def _carries(graph: Graph, name: str) -> bool:
    """Floats, and the integers that a quantised model has in their place."""
    return graph.types.get(name) in _FLOATS | _EIGHT_BIT or (
        graph.types.get(name) == TensorProto.INT32 and name not in graph.values
    )


def _beside(graph: Graph, node: Node, source: str) -> bool:
    """All other operands are weights or single numbers."""
    return all(
        n in graph.static or prod(d or 2 for d in graph.shapes.get(n, (None,))) == 1
        for n in node.inputs
        if n and n != source
    )


def _softmax_axes(graph: Graph, node: Node) -> Axes:
    """The axes of a Softmax (before opset 13 all from its axis on are one distribution); empty for another node."""
    rank = len(graph.shapes.get(node.outputs[0], ()))
    if _role(graph, node) not in _SOFTMAX:
        return _spelled_softmax(graph, node)
    old = not node.op.startswith("com.") and node.opset < 13
    axis = int(node.attributes.get("axis", 1 if old else -1))
    if not -rank <= axis < rank:
        return ()
    return tuple(range(axis % rank, rank)) if old else (axis % rank,)


def _spelled_softmax(graph: Graph, node: Node) -> Axes:
    """The axis of exp(x) / sum(exp(x)), as some exporters write a Softmax."""
    exp = graph.producers.get(node.inputs[0]) if _role(graph, node) is Role.QUOTIENT else None
    if exp is None or _role(graph, exp) is not Role.EXPONENTIAL:
        return ()
    total = graph.producers.get(node.inputs[1])
    while total is not None and _role(graph, total) in _REARRANGING | {Role.EXPANDS}:
        total = graph.producers.get(total.inputs[0])
    if total is None or _role(graph, total) is not Role.TOTAL or total.inputs[0] != node.inputs[0]:
        return ()
    given = total.attributes.get("axes")
    if given is None and len(total.inputs) > 1:
        given = graph.values.get(total.inputs[1])
    rank = len(graph.shapes.get(node.outputs[0], ()))
    return (int(given[0]) % rank,) if given is not None and len(given) == 1 and rank else ()


def _channels(graph: Graph, name: str) -> Axes:
    """The channel axis of the layer that made a tensor, where every node in between lets it be followed."""
    output = name
    path: list[tuple[str, Node, str]] = []
    for _ in range(len(graph.nodes)):
        node = graph.producers.get(name)
        if node is None:
            return ()
        role = _role(graph, node)
        if role in (Role.PRODUCT, Role.CONVOLUTION):
            rank = len(graph.shapes.get(name, ()))
            first = (1,) if role is Role.CONVOLUTION else (rank - 1,)
            axes = _forward(graph, first, path, output, part=True) if rank > 1 else ()
            return axes if axes and 0 < axes[0] < len(graph.shapes.get(output, ())) else ()
        source = _carrier(graph, node)
        if source is None:
            return ()
        path.append((source, node, name))
        name = source
    return ()


def _forward(
    graph: Graph, axes: Axes, path: Sequence[tuple[str, Node, str]], output: str, *, part: bool = False
) -> Axes:
    """Where axes that lie side by side end up; empty where that can't be told. part: the inner part of an axis that is
    split will do, as of the channels (anchors, values) of a detector."""
    for source, node, result in reversed(path):
        before, after = graph.shapes.get(source), graph.shapes.get(result)
        if not axes or before is None or after is None:
            return ()
        role = _role(graph, node)
        if role is Role.TRANSPOSES:
            order = list(node.attributes.get("perm", range(len(before))[::-1]))
            axes = tuple(sorted(order.index(a) for a in axes))
            if axes[-1] - axes[0] >= len(axes):
                return ()
        elif len(before) != len(after) or (role is Role.REARRANGES and before != after):
            axes = tuple(_regrouped(axes, before, after)) or (_inner(axes, before, after) if part else ())
    sizes = graph.shapes.get(output)
    wide = tuple(a for a in axes if not sizes or sizes[a] != 1)
    return wide or axes[:1]


def _regrouped(axes: Axes, before: Sequence[int | None], after: Sequence[int | None]) -> Iterator[int]:
    """The axes of `after` that hold exactly what `axes` hold in `before`, when sizes are regrouped in order."""
    if any(d is None for d in (*before, *after)):
        return
    left = prod(d or 0 for d in before[: axes[0]])
    extent = prod(d or 0 for d in before[axes[0] : axes[-1] + 1])
    for first in range(len(after)):
        if prod(d or 0 for d in after[:first]) != left:
            continue
        for last in range(first + 1, len(after) + 1):
            if prod(d or 0 for d in after[first:last]) == extent:
                if extent > 1 and after[first] == 1:
                    break  # a leading 1 belongs to what stands before
                yield from range(first, last)
                return


def _inner(axes: Axes, before: Sequence[int | None], after: Sequence[int | None]) -> Axes:
    """The axis of `after` that is the fastest running part of one of `before`."""
    if any(d is None for d in (*before, *after)):
        return ()
    size, right = before[axes[0]] or 0, prod(d or 0 for d in before[axes[0] + 1 :])
    fits = [k for k, d in enumerate(after) if d and d > 1 and size % d == 0]
    return tuple(k for k in fits if prod(n or 0 for n in after[k + 1 :]) == right)[-1:]
