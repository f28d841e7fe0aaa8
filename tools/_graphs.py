"""Models made from nothing, as large or as deep as a measurement wants them.

The small ones carry their (random) weights; the large ones write them beside the model, in pieces or as a hole in a
sparse file, so that making one takes neither memory nor, in the second case, a disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

__all__ = ["conv_chain", "decoder", "encoder_stack"]

OPSET = 17
PIECE = 1 << 22  # numbers written at once
ALIGNMENT = 4096  # of tensors in an external file

Dims = Sequence[int | str]


class _Builder:
    """Nodes and initializers as they come; names are counted."""

    def __init__(self, seed: int = 0) -> None:
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []
        self.random = np.random.default_rng(seed)

    def node(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        """Add a node; its first output."""
        name = f"{op}_{len(self.nodes)}"
        made = [name] if outputs == 1 else [f"{name}.{j}" for j in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), made, name=name, **attributes))
        return made[0]

    def constant(self, value: np.ndarray) -> str:
        name = f"constant_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(value, name))
        return name

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def weight(self, *shape: int) -> str:
        """A random tensor, scaled so that activations keep their size."""
        fan = int(np.prod(shape[1:])) if len(shape) > 1 else 1
        return self.constant((self.random.standard_normal(shape) / np.sqrt(fan)).astype(np.float32))

    def model(self, inputs: Sequence[tuple[str, int, Dims]], output: str, shape: Dims) -> ModelProto:
        graph: GraphProto = helper.make_graph(
            self.nodes,
            "synthetic",
            [helper.make_tensor_value_info(*i) for i in inputs],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)],
            self.initializers,
        )
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8, producer_name="synthetic"
        )


def conv_chain(nodes: int, channels: int = 16) -> ModelProto:
    """Residual blocks (Conv, Relu, Conv, Add, Relu) of about `nodes` nodes, between a stem and a classifier."""
    b = _Builder()
    x = b.node("Conv", "x", b.weight(channels, 3, 3, 3), b.weight(channels), pads=[1, 1, 1, 1])
    for _ in range(max((nodes - 4) // 5, 1)):
        inner = b.node("Relu", b.node("Conv", x, b.weight(channels, channels, 1, 1), b.weight(channels)))
        branch = b.node("Conv", inner, b.weight(channels, channels, 1, 1), b.weight(channels))
        x = b.node("Relu", b.node("Add", x, branch))
    flat = b.node("Flatten", b.node("GlobalAveragePool", x))
    y = b.node("Gemm", flat, b.weight(channels, 10), b.weight(10))
    return b.model([("x", TensorProto.FLOAT, (1, 3, 8, 8))], y, (1, 10))


def encoder_stack(nodes: int, hidden: int = 32, heads: int = 4, length: int = 8) -> ModelProto:
    """Pre-norm transformer layers of 29 nodes each, about `nodes` nodes in all."""
    b = _Builder()
    shape, back = b.ints(0, length, heads, hidden // heads), b.ints(0, length, hidden)
    scale = b.constant(np.array((hidden // heads) ** -0.5, np.float32))
    x = b.node("MatMul", "x", b.weight(hidden, hidden))
    for _ in range(max((nodes - 2) // 29, 1)):
        y = b.node("LayerNormalization", x, b.weight(hidden), b.weight(hidden))
        q, k, v = (
            b.node("Transpose", b.node("Reshape", _linear(b, y, hidden, hidden), shape), perm=perm)
            for perm in ((0, 2, 1, 3), (0, 2, 3, 1), (0, 2, 1, 3))
        )
        weights = b.node("Softmax", b.node("Mul", b.node("MatMul", q, k), scale), axis=-1)
        y = b.node("Transpose", b.node("MatMul", weights, v), perm=(0, 2, 1, 3))
        x = b.node("Add", x, _linear(b, b.node("Reshape", y, back), hidden, hidden))
        y = b.node("LayerNormalization", x, b.weight(hidden), b.weight(hidden))
        x = b.node("Add", x, _linear(b, b.node("Relu", _linear(b, y, hidden, 2 * hidden)), 2 * hidden, hidden))
    y = b.node("MatMul", x, b.weight(hidden, hidden))
    return b.model([("x", TensorProto.FLOAT, (1, length, hidden))], y, (1, length, hidden))


def _linear(b: _Builder, x: str, inputs: int, outputs: int) -> str:
    return b.node("Add", b.node("MatMul", x, b.weight(inputs, outputs)), b.weight(outputs))


class _ExternalBuilder(_Builder):
    """As `_Builder`, but large weights go to a file: random numbers, or a hole of the same length."""

    def __init__(self, file: BinaryIO, location: str, hollow: bool) -> None:
        super().__init__()
        self.file = file
        self.location = location
        self.hollow = hollow

    def weight(self, *shape: int) -> str:
        size, name = int(np.prod(shape, dtype=np.int64)), f"weight_{len(self.initializers)}"
        start = -(-self.file.tell() // ALIGNMENT) * ALIGNMENT
        self.file.seek(start)
        if self.hollow:
            self.file.seek(start + 4 * size)
            self.file.truncate()
        else:
            scale = np.float32(shape[0] ** -0.5 if len(shape) > 1 else 1)
            for done in range(0, size, PIECE):
                piece = self.random.standard_normal(min(PIECE, size - done), np.float32) * scale
                self.file.write(piece.tobytes())
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", self.location), ("offset", str(start)), ("length", str(4 * size))):
            tensor.external_data.add(key=key, value=value)
        self.initializers.append(tensor)
        return name


def decoder(
    path: Path, *, layers: int, hidden: int, heads: int, mlp: int, vocabulary: int, hollow: bool, positions: int = 2048
) -> int:
    """Write a Llama-like decoder (RMSNorm taken apart, rotary embedding, gated MLP) with external data; its bytes.

    hollow: the external file is sparse and reads as zeros.
    """
    location = f"{path.name}.data"
    with (path.parent / location).open("wb") as file:
        b = _ExternalBuilder(file, location, hollow)
        half = hidden // heads // 2
        angles = np.arange(positions)[:, None] / 10000 ** (np.arange(half) / half)[None, :]
        length = b.node("Gather", b.node("Shape", "tokens"), b.ints(1), axis=0)
        waves = [
            b.node(
                "Slice", b.constant(np.concatenate([wave, wave], 1).astype(np.float32)), b.ints(0), length, b.ints(0)
            )
            for wave in (np.cos(angles), np.sin(angles))
        ]
        x = b.node("Gather", b.weight(vocabulary, hidden), "tokens", axis=0)
        for _ in range(layers):
            x = b.node("Add", x, _attention(b, _rms_norm(b, x, hidden), waves, hidden, heads))
            y = _rms_norm(b, x, hidden)
            gate = b.node("MatMul", y, b.weight(hidden, mlp))
            gated = b.node("Mul", gate, b.node("Sigmoid", gate))
            y = b.node("Mul", gated, b.node("MatMul", y, b.weight(hidden, mlp)))
            x = b.node("Add", x, b.node("MatMul", y, b.weight(mlp, hidden)))
        logits = b.node("MatMul", _rms_norm(b, x, hidden), b.weight(hidden, vocabulary))
    inputs = [
        ("tokens", TensorProto.INT64, ("batch", "sequence")),
        ("mask", TensorProto.FLOAT, ("batch", 1, "sequence", "sequence")),
    ]
    model = b.model(inputs, logits, ("batch", "sequence", vocabulary))
    onnx.save(model, path)
    return path.stat().st_size + (path.parent / location).stat().st_size


def _rms_norm(b: _Builder, x: str, hidden: int) -> str:
    square = b.node("Pow", x, b.constant(np.array(2, np.float32)))
    mean = b.node("ReduceMean", square, axes=[-1], keepdims=1)
    root = b.node("Sqrt", b.node("Add", mean, b.constant(np.array(1e-5, np.float32))))
    gamma = b.constant(np.ones(hidden, np.float32))
    return b.node("Mul", gamma, b.node("Div", x, root))


def _rotated(b: _Builder, x: str, waves: Sequence[str], half: int) -> str:
    low = b.node("Slice", x, b.ints(0), b.ints(half), b.ints(3))
    high = b.node("Slice", x, b.ints(half), b.ints(2 * half), b.ints(3))
    turned = b.node("Concat", b.node("Neg", high), low, axis=-1)
    return b.node("Add", b.node("Mul", x, waves[0]), b.node("Mul", turned, waves[1]))


def _attention(b: _Builder, x: str, waves: Sequence[str], hidden: int, heads: int) -> str:
    shape = b.ints(0, -1, heads, hidden // heads)
    q, k, v = (
        b.node("Transpose", b.node("Reshape", b.node("MatMul", x, b.weight(hidden, hidden)), shape), perm=(0, 2, 1, 3))
        for _ in range(3)
    )
    q, k = (_rotated(b, t, waves, hidden // heads // 2) for t in (q, k))
    scale = b.constant(np.array((hidden // heads) ** -0.5, np.float32))
    scores = b.node("Mul", b.node("MatMul", q, b.node("Transpose", k, perm=(0, 1, 3, 2))), scale)
    weights = b.node("Softmax", b.node("Add", scores, "mask"), axis=-1)
    joined = b.node("Transpose", b.node("MatMul", weights, v), perm=(0, 2, 1, 3))
    return b.node("MatMul", b.node("Reshape", joined, b.ints(0, -1, hidden)), b.weight(hidden, hidden))
