"""Numbers for the symbolic sizes of a model's inputs."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping

from onnxprune.model.graph import Graph

__all__ = ["batch_dimension", "evaluate_dim", "pin_candidates", "symbolic_inputs"]


def symbolic_inputs(graph: Graph) -> dict[str, list[str | int]]:
    """Dimensions of every graph input: numbers, or names for the symbolic ones (made up where there is none)."""
    found: dict[str, list[str | int]] = {}
    for value in graph.model.proto.graph.input:
        if value.name in graph.inputs and value.type.HasField("tensor_type"):
            dims: list[str | int] = []
            for k, d in enumerate(value.type.tensor_type.shape.dim):
                if d.HasField("dim_value") and d.dim_value > 0:
                    dims.append(d.dim_value)
                else:
                    dims.append(d.dim_param or f"{value.name}.{k}")
            found[value.name] = dims
    return found


_BATCH = re.compile(r"batch|^n$|^b$|^bs$|^unk|^None$", re.I)


def batch_dimension(graph: Graph) -> str | None:
    """The symbolic dimension that is the batch: one that is called so, or the first input's first axis."""
    inputs = symbolic_inputs(graph).values()
    named = next((d for dims in inputs for d in dims if isinstance(d, str) and _BATCH.search(d)), None)
    leading = next((dims[0] for dims in inputs if len(dims) > 1 and isinstance(dims[0], str)), None)
    return named or leading


def pin_candidates(graph: Graph, *, batch: tuple[int, ...] = (11, 1)) -> Iterator[dict[str, int]]:
    """Plausible sizes for the symbolic dimensions, likeliest first.

    The batch gets a prime that no channel count is a multiple of by accident; images and sequences get usual sizes.
    """
    dims = symbolic_inputs(graph)
    names: dict[str, str] = {}
    for entries in dims.values():
        for k, d in enumerate(entries):
            if isinstance(d, int):
                continue
            image = (
                len(entries) == 4 and k > 0 and any(isinstance(e, int) and e <= 16 for e in (entries[1], entries[3]))
            )
            leading = k == 0 and len(entries) > 1
            names.setdefault(d, "batch" if leading or _BATCH.search(d) else "image" if image else "sequence")
    expressions = [d for d in names if not re.fullmatch(r"[\w.:/\-]+", d)]
    for first in batch:
        for spatial, sequence in ((224, 24), (64, 128), (32, 16), (256, 64), (640, 1), (28, 8), (96, 256)):
            pins: dict[str, int] = {}
            for k, (name, use) in enumerate(names.items()):
                if name not in expressions:
                    step = 8 * (k % 3) if use == "sequence" and "past" in name.lower() else 0
                    pins[name] = first if use == "batch" else spatial if use == "image" else sequence + step
            for name in expressions:
                pins[name] = evaluate_dim(name, pins) or sequence
            yield pins


def evaluate_dim(expression: str, pins: Mapping[str, int]) -> int | None:
    """The value of a symbolic dimension such as 'past + sequence', where its names are pinned."""
    text = re.sub(r"floor|ceiling", "", expression)
    try:
        tree = ast.parse(text, mode="eval")
        return int(_arithmetic(tree.body, pins))
    except (SyntaxError, ValueError, KeyError, ZeroDivisionError, TypeError):
        return None


def _arithmetic(node: ast.expr, pins: Mapping[str, int]) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.Name):
        return pins[node.id]
    if isinstance(node, ast.BinOp):
        a, b = _arithmetic(node.left, pins), _arithmetic(node.right, pins)
        match node.op:
            case ast.Add():
                return a + b
            case ast.Sub():
                return a - b
            case ast.Mult():
                return a * b
            case ast.Div() | ast.FloorDiv():
                return a // b
    raise ValueError("not arithmetic")
