"""onnxruntime's own operators (com.microsoft): what their rules leave free can be pruned."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

from onnxprune.axes.analysis import analyse
from onnxprune.axes.dead import INEXACT
from onnxprune.model.load import load
from onnxprune.model.save import write
from onnxprune.rewrite.rewrite import rewrite
from onnxprune.select.plan import Plan
from onnxprune.verify.equivalence import prove
from tests.graphs import from_text
from tests.ops.surround import surrounded

RNG = np.random.default_rng(0)


def f(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def u8(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape).astype(np.uint8)


def i8(*shape: int) -> np.ndarray:
    return RNG.integers(-100, 101, shape).astype(np.int8)


def i32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def one(
    op: str,
    inputs: list[np.ndarray | None],
    count: int = 1,
    domain: str = "com.microsoft",
    opset: int = 17,
    **attributes: Any,
) -> onnx.ModelProto:
    """The operator by itself, surrounded."""
    names = ["" if x is None else f"input{k}" for k, x in enumerate(inputs)]
    present = [(n, x) for n, x in zip(names, inputs, strict=True) if x is not None]
    outputs = [f"output{j}" for j in range(count)]
    graph = helper.make_graph(
        [helper.make_node(op, names, outputs, "the node", domain=domain, **attributes)],
        "one",
        [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape) for n, x in present],
        [onnx.ValueInfoProto(name=n) for n in outputs],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    results = session.run(None, dict(present))
    del model.graph.output[:]
    for n, y in zip(outputs, results, strict=True):
        elem = helper.np_dtype_to_tensor_dtype(y.dtype)
        model.graph.output.append(helper.make_tensor_value_info(n, elem, y.shape))
    return surrounded(model, [x for _, x in present], results)


B, S, H, D = 2, 5, 4, 8
LENGTHS = i32(5, 4)
CACHE = (f(9, D // 2), f(9, D // 2))

FLOATING = {
    "Gelu": partial(one, "Gelu", [f(2, 6)]),
    "QuickGelu": partial(one, "QuickGelu", [f(2, 6)]),
    "BiasGelu": partial(one, "BiasGelu", [f(2, 6), f(6)]),
    "FastGelu": partial(one, "FastGelu", [f(2, 6), f(6)]),
    "FusedMatMul": partial(one, "FusedMatMul", [f(3, 4, 6), f(3, 6, 5)], alpha=0.5),
    "FusedMatMul transposed": partial(one, "FusedMatMul", [f(3, 6, 4), f(3, 5, 6)], transA=1, transB=1),
    "FusedConv": partial(one, "FusedConv", [f(2, 6, 5, 5), f(4, 6, 3, 3), f(4)], activation="Relu", pads=[1, 1, 1, 1]),
    "FusedConv with a sum": partial(
        one, "FusedConv", [f(2, 6, 5, 5), f(4, 6, 1, 1), f(4), f(2, 4, 5, 5)], activation="Relu"
    ),
    "FusedConv grouped": partial(
        one, "FusedConv", [f(2, 6, 5, 5), f(4, 3, 3, 3)], group=2, activation="LeakyRelu", activation_params=[0.1]
    ),
    "SkipLayerNormalization": partial(one, "SkipLayerNormalization", [f(2, 5, 6), f(2, 5, 6), f(6), f(6), f(6)]),
    "SkipLayerNormalization with its sum": partial(
        one, "SkipLayerNormalization", [f(2, 5, 6), f(2, 5, 6), f(6), f(6)], 1
    ),
    "SkipSimplifiedLayerNormalization": partial(
        one, "SkipSimplifiedLayerNormalization", [f(2, 5, 6), f(2, 5, 6), f(6)]
    ),
    "SkipSimplifiedLayerNormalization biased": partial(
        one, "SkipSimplifiedLayerNormalization", [f(2, 5, 6), f(2, 5, 6), f(6), f(6)]
    ),
    "SimplifiedLayerNormalization": partial(
        one, "SimplifiedLayerNormalization", [f(2, 5, 6), f(6)], domain="", axis=-1
    ),
    "EmbedLayerNormalization": partial(
        one,
        "EmbedLayerNormalization",
        [i32(*range(10)).reshape(2, 5), i32(*[0, 1] * 5).reshape(2, 5), f(12, 6), f(7, 6), f(2, 6), f(6), f(6)],
        2,
    ),
    "Attention": partial(one, "Attention", [f(B, S, 6), f(6, 3 * H * D), f(3 * H * D)], num_heads=H),
    "Attention with a scale": partial(
        one, "Attention", [f(B, S, 6), f(6, 3 * H * D), f(3 * H * D)], num_heads=H, scale=0.3
    ),
    "Attention with other value widths": partial(
        one,
        "Attention",
        [f(B, S, 6), f(6, 2 * H * D + H * 3), f(2 * H * D + H * 3)],
        num_heads=H,
        qkv_hidden_sizes=[H * D, H * D, H * 3],
        scale=0.3,
    ),
    "Attention with a mask": partial(
        one, "Attention", [f(B, S, 6), f(6, 3 * H * D), f(3 * H * D), LENGTHS], num_heads=H
    ),
    "Attention with score bias": partial(
        one, "Attention", [f(B, S, 6), f(6, 3 * H * D), f(3 * H * D), None, None, f(1, H, S, S)], num_heads=H
    ),
    "MultiHeadAttention": partial(
        one, "MultiHeadAttention", [f(B, S, H * D), f(B, 7, H * D), f(B, 7, H * 3)], num_heads=H
    ),
    "MultiHeadAttention with a scale": partial(
        one, "MultiHeadAttention", [f(B, S, H * D), f(B, 7, H * D), f(B, 7, H * 3)], num_heads=H, scale=0.3
    ),
    "MultiHeadAttention biased": partial(
        one, "MultiHeadAttention", [f(B, S, H * D), f(B, S, H * D), f(B, S, H * D), f(3 * H * D)], num_heads=H
    ),
    "MultiHeadAttention masked": partial(
        one,
        "MultiHeadAttention",
        [f(B, S, H * D), f(B, S, H * D), f(B, S, H * D), None, i32(*[1] * 10).reshape(B, S)],
        num_heads=H,
    ),
    "MultiHeadAttention with score bias": partial(
        one,
        "MultiHeadAttention",
        [f(B, S, H * D), f(B, S, H * D), f(B, S, H * D), None, None, f(1, H, S, S)],
        num_heads=H,
    ),
    "MultiHeadAttention with a cache": partial(
        one,
        "MultiHeadAttention",
        [f(B, S, H * D), f(B, S, H * D), f(B, S, H * D), None, None, None, f(B, H, 3, D), f(B, H, 3, D)],
        3,
        num_heads=H,
    ),
    "GroupQueryAttention": partial(
        one,
        "GroupQueryAttention",
        [f(B, S, H * D), f(B, S, 2 * D), f(B, S, 2 * D), None, None, LENGTHS - 1, np.array(5, np.int32)],
        3,
        num_heads=H,
        kv_num_heads=2,
    ),
    "RotaryEmbedding": partial(one, "RotaryEmbedding", [f(B, S, H * D), np.arange(10).reshape(B, S) % 9, *CACHE]),
    "RotaryEmbedding by heads": partial(
        one, "RotaryEmbedding", [f(B, H, S, D), np.arange(10).reshape(B, S) % 9, *CACHE]
    ),
}


WHOLE = {
    "SkipLayerNormalization",
    "SkipLayerNormalization with its sum",
    "EmbedLayerNormalization",
}


def pruned(model: onnx.ModelProto, path: Path, *, expect: int) -> float:
    """Half of the units of every group that vanishes go; the error of the proof."""
    analysis = analyse(load(model))
    assert not analysis.graph.problems
    free = [g for g in analysis.groups if g.kind != INEXACT]
    assert len(free) >= expect
    keep = {g.id: np.sort(RNG.permutation(g.size)[: max(1, g.size // 2)]) for g in free}
    write(rewrite(analysis, Plan(keep)), path)
    return prove(analysis, Plan(keep), path).max_rel_error if keep else 0.0


@pytest.mark.parametrize("name", list(FLOATING))
def test_what_a_rule_leaves_free_can_be_pruned(name: str, tmp_path: Path) -> None:
    """At least one group is found in each, except where a normalisation runs over all there is."""
    expect = 0 if name in WHOLE else 1
    assert pruned(FLOATING[name](), tmp_path / "pruned.onnx", expect=expect) < 1e-4


SCALE, ZERO = np.array(0.05, np.float32), np.array(120, np.uint8)

QUANTISED = {
    "MatMulIntegerToFloat": partial(
        from_text,
        """(float[N,6] x) => (float[N,4] y) {
            q, s, z = DynamicQuantizeLinear(x)
            a = com.microsoft.MatMulIntegerToFloat(q, w, s, ws, z, wz, b)
            r = Relu(a)
            y = MatMul(r, w2)
        }""",
        microsoft=True,
        w=i8(6, 8),
        ws=np.linspace(0.01, 0.02, 8, dtype=np.float32),
        wz=np.zeros(8, np.int8),
        b=(8,),
        w2=(8, 4),
    ),
    "DynamicQuantizeMatMul": partial(
        from_text,
        """(float[N,6] x) => (float[N,4] y) {
            a = com.microsoft.DynamicQuantizeMatMul(x, w, ws, wz, b)
            r = Relu(a)
            y = MatMul(r, w2)
        }""",
        microsoft=True,
        w=i8(6, 8),
        ws=np.linspace(0.01, 0.02, 8, dtype=np.float32),
        wz=np.zeros(8, np.int8),
        b=(8,),
        w2=(8, 4),
    ),
    "MatMulInteger": partial(
        from_text,
        """(float[N,6] x) => (float[N,4] y) {
            h = MatMul(x, w0)
            q, s, z = DynamicQuantizeLinear(h)
            i = MatMulInteger(q, w, z)
            c = Cast<to=1>(i)
            a = Mul(c, s)
            y = MatMul(a, w2)
        }""",
        w0=(6, 7),
        w=i8(7, 8),
        w2=(8, 4),
    ),
    "ConvInteger": partial(
        from_text,
        """(float[N,3,6,6] x) => (float[N,4,6,6] y) {
            q, s, z = DynamicQuantizeLinear(x)
            i = ConvInteger(q, w, z, wz)
            c = Cast<to=1>(i)
            a = Mul(c, s)
            y = Conv(a, w2)
        }""",
        w=i8(8, 3, 1, 1),
        wz=np.array(0, np.int8),
        w2=(4, 8, 1, 1),
    ),
    "QGemm": partial(
        from_text,
        """(float[N,6] x) => (float[N,4] y) {
            q = QuantizeLinear(x, s, z)
            g = com.microsoft.QGemm<transB=1>(q, s, z, w, ws, wz, b, s, z)
            a = DequantizeLinear(g, s, z)
            y = MatMul(a, w2)
        }""",
        microsoft=True,
        s=SCALE,
        z=ZERO,
        w=i8(8, 6),
        ws=np.linspace(0.01, 0.02, 8, dtype=np.float32),
        wz=np.zeros(8, np.int8),
        b=RNG.integers(-99, 99, 8).astype(np.int32),
        w2=(8, 4),
    ),
    "QLinearMatMul": partial(
        from_text,
        """(float[N,6] x) => (float[N,4] y) {
            q = QuantizeLinear(x, s, z)
            g = QLinearMatMul(q, s, z, w, ws, wz, s, z)
            h = QLinearMatMul(g, s, z, w1, ws1, wz1, s, z)
            a = DequantizeLinear(h, s, z)
            y = MatMul(a, w2)
        }""",
        s=SCALE,
        z=ZERO,
        w=i8(6, 8),
        ws=np.full(8, 0.01, np.float32),
        wz=np.zeros(8, np.int8),
        w1=i8(8, 5),
        ws1=np.full(1, 0.01, np.float32),
        wz1=np.zeros(1, np.int8),
        w2=(5, 4),
    ),
    "QLinearAdd, Mul, Concat, pool and activations": partial(
        from_text,
        """(float[N,3,6,6] x) => (float[N,4,1,1] y) {
            q = QuantizeLinear(x, s, z)
            a = QLinearConv(q, s, z, wa, ws, wz, s, z)
            b = QLinearConv(q, s, z, wb, ws, wz, s, z)
            c = com.microsoft.QLinearAdd(a, s, z, b, s, z, s, z)
            d = com.microsoft.QLinearMul(c, s, z, a, s, z, s, z)
            e = com.microsoft.QLinearLeakyRelu<alpha=0.1>(d, s, z, s, z)
            f = com.microsoft.QLinearConcat<axis=1>(s, z, e, s, z, b, s, z)
            g = com.microsoft.QLinearGlobalAveragePool<channels_last=0>(f, s, z, s, z)
            h = QLinearConv(g, s, z, wc, ws1, wz1, s, z)
            y = DequantizeLinear(h, s, z)
        }""",
        microsoft=True,
        s=SCALE,
        z=ZERO,
        wa=i8(8, 3, 1, 1),
        wb=i8(8, 3, 1, 1),
        wc=i8(4, 16, 1, 1),
        ws=np.full(8, 0.01, np.float32),
        wz=np.zeros(8, np.int8),
        ws1=np.full(1, 0.01, np.float32),
        wz1=np.zeros(1, np.int8),
    ),
    "MatMulNBits with zero points": partial(
        from_text,
        """(float[N,48] x) => (float[N,4] y) {
            a = com.microsoft.MatMulNBits<K=48, N=64, bits=4, block_size=16>(x, b1, s1, z1)
            r = Relu(a)
            b = com.microsoft.MatMulNBits<K=64, N=12, bits=4, block_size=16>(r, b2, s2, z2)
            y = MatMul(b, w)
        }""",
        microsoft=True,
        b1=u8(64, 3, 8),
        s1=(64 * 3,),
        z1=u8(64 * 2),
        b2=u8(12, 4, 8),
        s2=(12 * 4,),
        z2=u8(12 * 2),
        w=(12, 4),
    ),
    "DynamicQuantizeLSTM": partial(
        from_text,
        """(float[7,N,5] x) => (float[7,N,4] y) {
            h = com.microsoft.DynamicQuantizeLSTM<hidden_size=6>(x, w, r, b, , , , , ws, wz, rs, rz)
            s = Squeeze(h, one)
            y = MatMul(s, w2)
        }""",
        microsoft=True,
        w=i8(1, 5, 24),
        r=i8(1, 6, 24),
        b=(1, 48),
        ws=np.full(1, 0.01, np.float32),
        wz=np.zeros(1, np.int8),
        rs=np.full(1, 0.01, np.float32),
        rz=np.zeros(1, np.int8),
        one=np.array([1]),
        w2=(6, 4),
    ),
    "blockwise weights": partial(
        from_text,
        """(float[N,6] x) => (float[N,4] y) {
            w = DequantizeLinear<axis=0, block_size=16>(w1, s)
            a = MatMul(x, w0)
            b = MatMul(a, w)
            y = MatMul(b, w2)
        }""",
        opset=21,
        ir=10,
        w0=(6, 48),
        w1=i8(48, 8),
        s=np.abs(f(3, 8)) / 50,
        w2=(8, 4),
    ),
}


@pytest.mark.parametrize("name", list(QUANTISED))
def test_quantised_operators_can_be_pruned(name: str, tmp_path: Path) -> None:
    """Rounding to integers may tip over by one step where sums are taken in another order."""
    assert pruned(QUANTISED[name](), tmp_path / "pruned.onnx", expect=1) < 2e-2
