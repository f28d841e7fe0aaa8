"""Attention in the mirror: onnxruntime's fused operators and ONNX's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.ops.mirroring import agree, differentiable, one_node

RNG = np.random.default_rng(0)
B, S, H, D = 2, 5, 4, 8


def f(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def i32(*values: Any) -> np.ndarray:
    return np.array(values[0] if len(values) == 1 and isinstance(values[0], list) else values, np.int32)


X, W, BIAS = f(B, S, 6), f(6, 3 * H * D), f(3 * H * D)
Q, K, V = f(B, S, H * D), f(B, 7, H * D), f(B, 7, H * 3)
LAST = i32(S - 1, S - 1)
TABLES = (np.cos(f(9, D // 2)), np.sin(f(9, D // 2)))
WIDE = (np.cos(f(9, 8)), np.sin(f(9, 8)))  # onnxruntime rotates grouped heads of a multiple of 16 only
CACHE = (f(B, 2, 6, 16), f(B, 2, 6, 16))
IDS = i32([[1, 2, 3, 4, 5]] * 2)
SQUARE = RNG.integers(0, 2, (B, S, S)).astype(np.int32) | np.eye(S, dtype=np.int32)
PLACES = np.arange(10, dtype=np.int64).reshape(B, S) % 9

MICROSOFT: dict[str, tuple[str, list[Any], dict[str, Any]]] = {
    "packed": ("Attention", [X, W, BIAS], {}),
    "packed, one way": ("Attention", [X, W, BIAS], {"unidirectional": 1}),
    "packed, scaled": ("Attention", [X, W, BIAS], {"scale": 0.3}),
    "packed, lengths": ("Attention", [X, W, BIAS, i32(5, 3)], {}),
    "packed, ends and starts": ("Attention", [X, W, BIAS, i32(5, 4, 0, 2)], {}),
    "packed, mask": ("Attention", [X, W, BIAS, i32([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]])], {"unidirectional": 1}),
    "packed, mask per query": ("Attention", [X, W, BIAS, SQUARE], {}),
    "packed, score bias": ("Attention", [X, W, BIAS, None, None, f(1, H, S, S)], {}),
    "packed, past": (
        "Attention",
        [X, W, BIAS, i32([[1] * 8, [0, 0] + [1] * 6]), f(2, B, H, 3, D)],
        {"count": 2, "unidirectional": 1},
    ),
    "packed, other value widths": (
        "Attention",
        [X, f(6, 2 * H * D + H * 3), f(2 * H * D + H * 3)],
        {"qkv_hidden_sizes": [H * D, H * D, H * 3]},
    ),
    "heads": ("MultiHeadAttention", [Q, K, V], {}),
    "heads, biased": ("MultiHeadAttention", [Q, K, V, f(2 * H * D + H * 3)], {"scale": 0.3}),
    "heads, masked": ("MultiHeadAttention", [Q, K, V, None, i32([[1] * 6 + [0], [0] * 3 + [1] * 4])], {}),
    "heads, lengths": ("MultiHeadAttention", [Q, K, V, None, i32(7, 4)], {}),
    "heads, score bias": ("MultiHeadAttention", [Q, K, V, None, None, f(1, H, S, 7)], {}),
    "heads, past": (
        "MultiHeadAttention",
        [Q, f(B, S, H * D), f(B, S, H * D), None, None, None, f(B, H, 3, D), f(B, H, 3, D)],
        {"count": 3, "unidirectional": 1},
    ),
    "heads, keys by heads": ("MultiHeadAttention", [Q, f(B, H, 6, D), f(B, H, 6, D)], {}),
    "grouped": (
        "GroupQueryAttention",
        [Q, f(B, S, 2 * D), f(B, S, 2 * D), None, None, LAST, np.array(S, np.int32)],
        {"count": 3, "kv_num_heads": 2},
    ),
    "grouped, packed and rotated": (
        "GroupQueryAttention",
        [f(B, S, 8 * 16), None, None, None, None, LAST, np.array(S, np.int32), *WIDE],
        {"count": 3, "kv_num_heads": 2, "do_rotary": 1},
    ),
    "grouped, past": (
        "GroupQueryAttention",
        [f(B, 1, H * 16), f(B, 1, 32), f(B, 1, 32), *CACHE, i32(6, 4), np.array(7, np.int32), *WIDE],
        {"count": 3, "kv_num_heads": 2, "do_rotary": 1, "rotary_interleaved": 1},
    ),
    "grouped, window": (
        "GroupQueryAttention",
        [Q, f(B, S, 2 * D), f(B, S, 2 * D), None, None, LAST, np.array(S, np.int32)],
        {"count": 3, "kv_num_heads": 2, "local_window_size": 2},
    ),
    "grouped, capped": (
        "GroupQueryAttention",
        [Q, f(B, S, 2 * D), f(B, S, 2 * D), None, None, LAST, np.array(S, np.int32)],
        {"count": 3, "kv_num_heads": 2, "softcap": 1.5, "scale": 0.4},
    ),
    "rotary": ("RotaryEmbedding", [Q, PLACES, *TABLES], {"num_heads": None}),
    "rotary by heads": ("RotaryEmbedding", [f(B, H, S, D), PLACES, *TABLES], {"num_heads": None, "interleaved": 1}),
    "rotary from a place on": ("RotaryEmbedding", [Q, np.array([3]), *TABLES], {"num_heads": None}),
    "rotary of a part": (
        "RotaryEmbedding",
        [f(B, H, S, D), PLACES, TABLES[0][:, :2], TABLES[1][:, :2]],
        {"rotary_embedding_dim": 4},
    ),
    "embedding": (
        "EmbedLayerNormalization",
        [IDS, IDS % 2, f(12, 6), f(7, 6), f(2, 6), f(6), f(6), i32([[1, 1, 1, 0, 0]] * 2)],
        {"count": 2, "num_heads": None},
    ),
    "embedding without segments": (
        "EmbedLayerNormalization",
        [i32([[1, 2, 3]]), None, f(12, 6), f(7, 6), None, f(6), f(6), None, i32([[2, 0, 1]])],
        {"count": 2, "num_heads": None},
    ),
}
ONNX: dict[str, tuple[str, list[Any], dict[str, Any]]] = {
    "plain": ("Attention", [f(B, H, S, D), f(B, H, 7, D), f(B, H, 7, 3)], {}),
    "causal": ("Attention", [f(B, H, S, D), f(B, 2, S, D), f(B, 2, S, 3)], {"is_causal": 1, "scale": 0.4}),
    "flat": ("Attention", [Q, f(B, 7, 2 * D), f(B, 7, 2 * 3)], {"q_num_heads": H, "kv_num_heads": 2}),
    "mask": ("Attention", [f(B, H, S, D), f(B, H, 7, D), f(B, H, 7, D), f(S, 7)], {"softcap": 2.0}),
    "cache": (
        "Attention",
        [Q, Q, Q, None, f(B, H, 3, D), f(B, H, 3, D)],
        {"q_num_heads": H, "kv_num_heads": H, "count": 3, "is_causal": 1},
    ),
    "rotary": ("RotaryEmbedding", [f(B, H, S, D), *TABLES, PLACES], {}),
    "rotary, tables per place": (
        "RotaryEmbedding",
        [Q, f(B, S, D // 2), f(B, S, D // 2)],
        {"num_heads": H, "interleaved": 1},
    ),
}


def settings(given: dict[str, Any]) -> dict[str, Any]:
    found = {"num_heads": H, "domain": "com.microsoft", **given}
    return {k: v for k, v in found.items() if v is not None}


@pytest.mark.parametrize("name", MICROSOFT)
def test_a_mirror_computes_what_onnxruntime_does(name: str) -> None:
    op, inputs, attributes = MICROSOFT[name]
    stored = [k for k, x in enumerate(inputs) if x is not None and x.dtype == np.int32 and x.ndim == 0]
    stored = [2, 3, 4, 5, 6] if op.startswith("Embed") else stored
    agree(*one_node(op, inputs, stored=stored, **settings(attributes)), atol=1e-4)


@pytest.mark.parametrize("name", ONNX)
def test_a_mirror_of_onnx_s_own_computes_what_onnxruntime_does(name: str) -> None:
    op, inputs, attributes = ONNX[name]
    agree(*one_node(op, inputs, opset=23, **attributes), atol=1e-4)


@pytest.mark.parametrize("name", MICROSOFT)
def test_derivatives_are_the_numerical_ones(name: str) -> None:
    op, inputs, attributes = MICROSOFT[name]
    differentiable(op, small(inputs), **settings(attributes))


@pytest.mark.parametrize("name", ONNX)
def test_derivatives_of_onnx_s_own_are_the_numerical_ones(name: str) -> None:
    op, inputs, attributes = ONNX[name]
    differentiable(op, small(inputs), opset=23, **attributes)


def small(inputs: list[Any]) -> list[Any]:
    """Numbers around which a softmax isn't saturated."""
    return [x / 2 if x is not None and x.dtype == np.float32 else x for x in inputs]
