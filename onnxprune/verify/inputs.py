"""Inputs to try a model on, when nothing is known but the model: right types, plausible sizes, indices in range."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from onnx import TensorProto

from onnxprune.model.graph import Graph
from onnxprune.model.load import load
from onnxprune.model.payload import dtype_of
from onnxprune.model.pins import pin_candidates, symbolic_inputs

__all__ = ["SPREADS", "draw", "index_limits", "input_sets", "size_candidates"]

Feed = dict[str, np.ndarray]
SPREADS = ("normal", "uniform")
_INTEGERS = {TensorProto.INT32, TensorProto.INT64, TensorProto.INT16, TensorProto.UINT32, TensorProto.UINT64}


def input_sets(
    model: str | os.PathLike[str] | Graph,
    *,
    seed: int = 0,
    count: int = 1,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> list[Feed]:
    """`count` sets of random inputs at the likeliest sizes. shapes: sizes of inputs that the caller knows."""
    graph = model if isinstance(model, Graph) else load(model)
    pins = next(iter(size_candidates(graph, shapes)))
    rng = np.random.default_rng(seed)
    return [draw(graph, pins, rng, shapes) for _ in range(count)]


def size_candidates(
    graph: Graph, shapes: Mapping[str, Sequence[int]] | None = None, batch: tuple[int, ...] = (2, 1)
) -> Iterator[dict[str, int]]:
    """Sizes for the symbolic dimensions, likeliest first; what the caller fixes stays fixed."""
    fixed = pins_of(graph, shapes)
    seen = set()
    for pins in pin_candidates(graph, batch=batch):
        pins = {**pins, **fixed}
        key = tuple(sorted(pins.items()))
        if key not in seen:
            seen.add(key)
            yield pins


def pins_of(graph: Graph, shapes: Mapping[str, Sequence[int]] | None) -> dict[str, int]:
    """Symbolic dimensions that given input shapes fix."""
    fixed = {}
    for name, dims in symbolic_inputs(graph).items():
        for d, n in zip(dims, (shapes or {}).get(name, ()), strict=False):
            if isinstance(d, str) and n > 0:
                fixed[d] = int(n)
    return fixed


def draw(
    graph: Graph,
    pins: Mapping[str, int],
    rng: np.random.Generator,
    shapes: Mapping[str, Sequence[int]] | None = None,
    *,
    spread: str = "normal",
) -> Feed:
    """One random value per graph input. spread: 'normal', or 'uniform' in 0 to 1 as images are."""
    limits = index_limits(graph)
    feed: Feed = {}
    for value in graph.model.proto.graph.input:
        if value.name not in graph.inputs or not value.type.HasField("tensor_type"):
            continue
        dims = symbolic_inputs(graph)[value.name]
        shape = [d if isinstance(d, int) else pins.get(d, 1) for d in dims]
        given = (shapes or {}).get(value.name)
        if given is not None and len(given) == len(shape):
            shape = [int(g) if g > 0 else s for g, s in zip(given, shape, strict=True)]
        feed[value.name] = _values(
            value.type.tensor_type.elem_type, shape, rng, limits.get(value.name), value.name, spread
        )
    return feed


def _values(
    elem: int, shape: list[int], rng: np.random.Generator, limit: int | None, name: str, spread: str
) -> np.ndarray:
    if elem == TensorProto.STRING:
        return np.full(shape, "a", object)
    if elem == TensorProto.BOOL:
        return np.ones(shape, bool) if "mask" in name.lower() else np.asarray(rng.random(shape) < 0.5)
    dtype = dtype_of(elem)
    if elem in _INTEGERS:
        if limit is None and "mask" in name.lower():
            return np.ones(shape, dtype)
        if "position" in name.lower() and shape:
            return np.broadcast_to(np.arange(shape[-1]), shape).astype(dtype)
        return rng.integers(0, max(limit or 8, 1), shape).astype(dtype)
    if elem in (TensorProto.UINT8, TensorProto.INT8):
        info = np.iinfo(dtype)
        return rng.integers(info.min, info.max + 1, shape).astype(dtype)
    drawn = rng.random(shape) if spread == "uniform" else rng.standard_normal(shape)
    return drawn.astype(np.float32).astype(dtype)


def index_limits(graph: Graph) -> dict[str, int]:
    """For every graph input that ends up as an index, the size of the smallest axis it looks up."""
    limits: dict[str, int] = {}
    for name in graph.inputs:
        if graph.types.get(name) not in _INTEGERS:
            continue
        reached, pending = {name}, [name]
        while pending:
            for node, i in graph.consumers.get(pending.pop(), ()):
                operator = graph.registry.get(node.op)
                tables = [table for index, table in (operator.indices if operator else ()) if index == i]
                if tables:
                    shape = graph.shapes.get(node.inputs[tables[0]])
                    axis = int(node.attributes.get("axis", 0))
                    if shape and shape[axis]:
                        limits[name] = min(limits.get(name, 1 << 30), shape[axis] or 1)
                elif len(reached) < 64:
                    for out in node.outputs:
                        if out and out not in reached and graph.types.get(out) in _INTEGERS and out not in graph.values:
                            reached.add(out)
                            pending.append(out)
    return limits
