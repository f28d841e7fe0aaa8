"""Shape arithmetic without tensors: what an exporter computes from sizes becomes arithmetic on Python integers.

A known value of which some elements depend on the sizes of the inputs is an array of objects: integers, and proxies
of integers for the elements that vary. The operators' own numpy functions compute with such arrays; what they can't
compute that way is left to tensors.
"""

from __future__ import annotations

import operator as arithmetic
from collections.abc import Callable
from typing import Any

import numpy as np
from torch.fx import Proxy

from onnxprune.model.graph import Graph, Node
from onnxprune.ops.registry import Operator
from onnxprune.ops.rules import MALFORMED

__all__ = ["Size", "computed", "unwrapped"]


class Size:
    """A proxy of an integer that numpy takes for a plain object: what it knows is integer arithmetic."""

    __slots__ = ("proxy",)

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy

    def __bool__(self) -> bool:
        raise TypeError("a size is known only when the module runs")


def _binary(function: Callable[[Any, Any], Any], *, reflected: bool) -> Callable[[Size, Any], Any]:
    def apply(self: Size, other: Any) -> Any:
        if not isinstance(other, (int, np.integer, Size)):
            return NotImplemented
        operand = other.proxy if isinstance(other, Size) else int(other)
        return Size(function(operand, self.proxy) if reflected else function(self.proxy, operand))

    return apply


for _name, _function in (
    ("add", arithmetic.add),
    ("sub", arithmetic.sub),
    ("mul", arithmetic.mul),
    ("floordiv", arithmetic.floordiv),
    ("truediv", arithmetic.floordiv),  # of integers; see `whole`
    ("mod", arithmetic.mod),
):
    setattr(Size, f"__{_name}__", _binary(_function, reflected=False))
    setattr(Size, f"__r{_name}__", _binary(_function, reflected=True))


def unwrapped(values: np.ndarray) -> list[Any]:
    """Elements as integers and proxies of integers."""
    return [e.proxy if isinstance(e, Size) else int(e) for e in values.reshape(-1)]


def merged(known: np.ndarray, varying: np.ndarray, elements: Any) -> np.ndarray | None:
    """The known numbers where they don't vary, and the computed elements where they do."""
    elements = np.asarray(elements)
    if elements.shape != known.shape or elements.dtype != object:
        return None
    result = np.empty(known.shape, object)
    for k in np.ndindex(known.shape):
        result[k] = elements[k] if varying[k] else known[k].item()
        if not isinstance(result[k], (int, Size)):
            return None
    return result


def computed(node: Node, operator: Operator, graph: Graph, inputs: list[Any]) -> list[np.ndarray] | None:
    """The outputs of a node as arrays of sizes, from inputs that are arrays (of numbers or of objects) or None.

    None where that can't be: the elements are no integers, one is negative (ONNX divides towards zero, Python does
    not), or the operator has no numpy function for objects.
    """
    names = [n for n in node.outputs if n]
    if (
        operator.evaluate is None
        or not all(whole(graph, n) for n in names)
        or not all(whole(graph, n) or decided(graph, n) for n in node.inputs)
    ):
        return None
    try:
        found = operator.evaluate(node, *inputs)
    except MALFORMED:
        return None
    found = found if isinstance(found, tuple) else (found,)
    results = []
    for name, elements in zip(names, found, strict=False):
        known = graph.values[name]
        result = merged(known, graph.varying.get(name, np.zeros(known.shape, bool)), elements)
        if result is None:
            return None
        results.append(result)
    return results if len(results) == len(names) else None


def whole(graph: Graph, name: str) -> bool:
    """Integers of which those that vary are not negative."""
    if not name:
        return True
    known = graph.values.get(name)
    if known is None or known.dtype.kind != "i":
        return False
    varying = graph.varying.get(name)
    return varying is None or not np.any(known[varying] < 0)


def decided(graph: Graph, name: str) -> bool:
    """Bools that are the same for all sizes, such as which sizes of an Expand are given."""
    known = graph.values.get(name)
    return known is not None and known.dtype.kind == "b" and name not in graph.varying and name not in graph.resized
