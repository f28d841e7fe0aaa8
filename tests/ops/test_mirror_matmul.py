"""Matrix products in the mirror."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from onnxprune.mirroring import mirror
from tests.ops.mirroring import agree, differentiable, one_node, run_mirror, run_onnxruntime

RNG = np.random.default_rng(0)


def f(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


MS = {"domain": "com.microsoft"}

# name: (operator, inputs, stored inputs, attributes)
CASES: dict[str, tuple[str, list[Any], tuple[int, ...], dict[str, Any]]] = {
    "matrices": ("MatMul", [f(3, 4), f(4, 2)], (1,), {"opset": 7}),
    "batches": ("MatMul", [f(2, 1, 3, 4), f(5, 4, 2)], (), {}),
    "vector and matrix": ("MatMul", [f(4), f(2, 4, 3)], (), {}),
    "matrix and vector": ("MatMul", [f(2, 3, 4), f(4)], (), {}),
    "vectors": ("MatMul", [f(4), f(4)], (), {}),
    "gemm": ("Gemm", [f(3, 4), f(4, 2), f(2)], (1, 2), {}),
    "gemm without c": ("Gemm", [f(3, 4), f(2, 4)], (), {"transB": 1, "alpha": 0.5, "opset": 11}),
    "gemm, all": ("Gemm", [f(4, 3), f(2, 4), f(3, 1)], (), {"transA": 1, "transB": 1, "alpha": 0.5, "beta": 2.0}),
    "gemm 7": ("Gemm", [f(3, 4), f(4, 2), f(1)], (), {"opset": 7}),
    "gemm, scalar c": ("Gemm", [f(3, 4), f(4, 2), np.array(0.5, np.float32)], (), {"beta": 0.5}),
    "einsum": ("Einsum", [f(2, 3, 4), f(2, 4, 5)], (), {"equation": "bij,bjk->bik"}),
    "einsum with an ellipsis": ("Einsum", [f(2, 3, 4), f(4, 5)], (), {"equation": "...j, jk -> ...k"}),
    "einsum of a diagonal": ("Einsum", [f(2, 3, 3)], (), {"equation": "bii->bi"}),
    "einsum without an output": ("Einsum", [f(3, 4), f(4, 2)], (), {"equation": "zj,ja"}),
    "einsum of three": ("Einsum", [f(2, 3), f(3, 4), f(4)], (), {"equation": "ab,bc,c->a"}),
    "fused": ("FusedMatMul", [f(2, 4, 3), f(2, 5, 4)], (), {"transA": 1, "transB": 1, "alpha": 0.25, **MS}),
    "fused batches": ("FusedMatMul", [f(3, 2, 4), f(2, 4, 5)], (), {"transBatchA": 1, **MS}),
    "fused batches, all": (
        "FusedMatMul",
        [f(4, 2, 3), f(4, 2, 5)],
        (),
        {"transBatchA": 1, "transA": 1, "transBatchB": 1, **MS},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mirror_computes_what_onnxruntime_does(name: str) -> None:
    op, inputs, stored, attributes = CASES[name]
    agree(*one_node(op, inputs, stored=stored, **attributes))


@pytest.mark.parametrize("name", CASES)
def test_derivatives_are_the_numerical_ones(name: str) -> None:
    op, inputs, _, attributes = CASES[name]
    differentiable(op, inputs, **attributes)


def test_integers_are_multiplied_as_such() -> None:
    a, b = RNG.integers(-9, 9, (3, 4)), RNG.integers(-9, 9, (4, 2))
    agree(*one_node("MatMul", [a, b]))
    c = RNG.integers(-9, 9, (3, 2))
    found = run_mirror(*one_node("Gemm", [a, b, c], opset=13, beta=2.0))
    np.testing.assert_array_equal(found[0], a @ b + 2 * c)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero_points", [False, True])
def test_a_packed_weight_is_unpacked(bits: int, zero_points: bool) -> None:
    n, k, block = 6, 40, 16
    blocks = -(-k // block)
    packed = RNG.integers(0, 256, (n, blocks, block * bits // 8)).astype(np.uint8)
    scales = RNG.uniform(0.01, 0.1, n * blocks).astype(np.float32)
    zeros = RNG.integers(0, 256, n * -(-blocks * bits // 8)).astype(np.uint8) if zero_points else None
    inputs = [f(2, 3, k), packed, scales, zeros, None, f(n)]
    model, fed = one_node("MatMulNBits", inputs, stored=(1, 2, 3, 5), N=n, K=k, block_size=block, bits=bits, **MS)
    agree(model, fed, rtol=1e-3, atol=1e-3)
    assert [p.shape for p in mirror(model).parameters()] == [(n,)]


def test_a_large_packed_weight_is_unpacked() -> None:
    n, k = 64, 512
    packed = RNG.integers(0, 256, (n, k // 32, 16)).astype(np.uint8)
    scales = RNG.uniform(0.01, 0.02, (n, k // 32)).astype(np.float32)
    model, fed = one_node("MatMulNBits", [f(3, k), packed, scales], stored=(1, 2), N=n, K=k, block_size=32, **MS)
    found, wanted = run_mirror(model, fed), run_onnxruntime(model, fed)
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-3, atol=1e-3)


def test_a_linear_layer_reads_like_one() -> None:
    model, _ = one_node("Gemm", [f(3, 4), f(2, 4), f(2)], stored=(1, 2), transB=1)
    assert "linear(x0, x1, x2)" in mirror(model).code
    with torch.autocast("cpu", torch.bfloat16):
        assert mirror(model)(torch.randn(3, 4)).dtype == torch.bfloat16
