"""Quantised operators in the mirror: onnxruntime's integers, with gradients that pass through the rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from onnx import numpy_helper

from onnxprune.mirroring import mirror
from onnxprune.mirroring.values import stored_values
from tests.ops.mirroring import agree, one_node, run_mirror, run_onnxruntime

RNG = np.random.default_rng(0)
MS = {"domain": "com.microsoft"}


def f(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def u8(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape).astype(np.uint8)


def i8(*shape: int) -> np.ndarray:
    return RNG.integers(-100, 101, shape).astype(np.int8)


def i32(*shape: int) -> np.ndarray:
    return RNG.integers(-2000, 2000, shape).astype(np.int32)


def s(*values: float) -> np.ndarray:
    return np.array(values[0] if len(values) == 1 else values, np.float32)


def z(*values: int, dtype: Any = np.uint8) -> np.ndarray:
    return np.array(values[0] if len(values) == 1 else values, dtype)


PER_CHANNEL, SMALL = s(0.01, 0.02, 0.03), s(0.001, 0.002, 0.003)
X, W, BIAS = u8(2, 4, 6, 6), i8(3, 4, 3, 3), i32(3)

# name: (operator, inputs, stored inputs, attributes)
CASES: dict[str, tuple[str, list[Any], tuple[int, ...], dict[str, Any]]] = {
    "quantize 10": ("QuantizeLinear", [3 * f(4, 5), s(0.02), z(120)], (1, 2), {"opset": 10}),
    "quantize computed scales": ("QuantizeLinear", [3 * f(4, 5), s(0.02), z(120)], (), {"opset": 10}),
    "quantize int8": ("QuantizeLinear", [3 * f(4, 5), s(0.02), z(3, dtype=np.int8)], (1, 2), {"opset": 13}),
    "quantize without a zero point": ("QuantizeLinear", [3 * f(4, 5), s(0.02)], (1,), {"opset": 13}),
    "quantize per axis": ("QuantizeLinear", [f(2, 3, 4), PER_CHANNEL, z(1, 2, 3)], (1, 2), {"opset": 13}),
    "quantize along the last axis": ("QuantizeLinear", [f(4, 3), PER_CHANNEL], (1,), {"axis": -1, "opset": 13}),
    "quantize in blocks": (
        "QuantizeLinear",
        [f(2, 5, 3), RNG.uniform(0.01, 0.1, (2, 2, 3)).astype(np.float32), u8(2, 2, 3)],
        (1, 2),
        {"axis": 1, "block_size": 3, "opset": 21},
    ),
    "quantize to 16 bits": (
        "QuantizeLinear",
        [3 * f(4, 5), s(0.001), z(7, dtype=np.int16)],
        (1, 2),
        {"opset": 21},
    ),
    "ties": ("QuantizeLinear", [np.arange(-8, 9).astype(np.float32) / 2, s(1.0), z(4)], (1, 2), {"opset": 13}),
    "dequantize 10": ("DequantizeLinear", [u8(4, 5), s(0.02), z(120)], (1, 2), {"opset": 10}),
    "dequantize a weight": ("DequantizeLinear", [i8(4, 3), PER_CHANNEL], (0, 1), {"opset": 13}),
    "dequantize int32": ("DequantizeLinear", [i32(4), s(0.02)], (0, 1), {"opset": 13}),
    "dequantize in blocks": (
        "DequantizeLinear",
        [u8(2, 5, 3), RNG.uniform(0.01, 0.1, (2, 2, 3)).astype(np.float32), u8(2, 2, 3)],
        (0, 1, 2),
        {"axis": 1, "block_size": 3, "opset": 21},
    ),
    "dynamic": ("DynamicQuantizeLinear", [f(3, 4)], (), {"count": 3, "opset": 11}),
    "dynamic, positive": ("DynamicQuantizeLinear", [np.abs(f(3, 4)) + 1], (), {"count": 3, "opset": 11}),
    "conv": (
        "QLinearConv",
        [X, s(0.02), z(128), W, PER_CHANNEL, np.zeros(3, np.int8), s(0.2), z(100), BIAS],
        (1, 2, 3, 4, 5, 6, 7, 8),
        {"pads": [1, 1, 1, 1], "strides": [2, 2]},
    ),
    "conv of data": (
        "QLinearConv",
        [X, s(0.02), z(128), u8(3, 4, 3, 3), s(0.01), z(128), s(0.2), z(100)],
        (1, 2, 4, 5, 6, 7),
        {"auto_pad": "SAME_UPPER"},
    ),
    "conv of integers": ("ConvInteger", [X, u8(3, 4, 3, 3), z(128), z(120)], (1, 2, 3), {"pads": [1, 1, 1, 1]}),
    "matmul": (
        "QLinearMatMul",
        [u8(2, 4), s(0.02), z(120), i8(4, 3), PER_CHANNEL, np.zeros(3, np.int8), s(0.1), z(128)],
        (1, 2, 3, 4, 5, 6, 7),
        {},
    ),
    "matmul of integers": ("MatMulInteger", [u8(2, 4), i8(4, 3), z(12), z(1, 2, 3, dtype=np.int8)], (1, 2, 3), {}),
    "matmul of data": ("MatMulInteger", [u8(2, 4), u8(4, 3)], (), {}),
    "matmul to float": (
        "MatMulIntegerToFloat",
        [u8(2, 4), i8(4, 3), s(0.02), PER_CHANNEL, z(120), np.zeros(3, np.int8), f(3)],
        (1, 2, 3, 4, 5),
        MS,
    ),
    "dynamic matmul": (
        "DynamicQuantizeMatMul",
        [f(2, 4), i8(4, 3), PER_CHANNEL, np.zeros(3, np.int8), f(3)],
        (1, 2, 3),
        MS,
    ),
    "gemm": (
        "QGemm",
        [u8(2, 4), s(0.02), z(120), i8(3, 4), PER_CHANNEL, np.zeros(3, np.int8), i32(3), s(0.1), z(128)],
        (1, 2, 3, 4, 5, 6, 7, 8),
        {"transB": 1, **MS},
    ),
    "gemm to float": (
        "QGemm",
        [u8(2, 4), s(0.02), z(120), i8(4, 3), s(0.01), z(0, dtype=np.int8), i32(3)],
        (1, 2, 3, 4, 5, 6),
        MS,
    ),
    "add": ("QLinearAdd", [u8(2, 4), s(0.02), z(120), u8(4), s(0.05), z(3), s(0.1), z(128)], (1, 2, 4, 5, 6, 7), MS),
    "mul": ("QLinearMul", [u8(2, 4), s(0.02), z(120), u8(4), s(0.05), z(3), s(0.1), z(128)], (1, 2, 4, 5, 6, 7), MS),
    "leaky relu": ("QLinearLeakyRelu", [u8(2, 9), s(0.02), z(120), s(0.03), z(9)], (1, 2, 3, 4), {"alpha": 0.2, **MS}),
    "sigmoid": ("QLinearSigmoid", [u8(2, 9), s(0.02), z(120), s(0.004), z(0)], (1, 2, 3, 4), MS),
    "global average": ("QLinearGlobalAveragePool", [X, s(0.02), z(120), s(0.01), z(120)], (1, 2, 3, 4), MS),
    "softmax": ("QLinearSoftmax", [u8(2, 9), s(0.02), z(120), s(1 / 256), z(0)], (1, 2, 3, 4), {"opset": 13, **MS}),
    "concat": (
        "QLinearConcat",
        [s(0.05), z(100), u8(2, 3), s(0.02), z(120), u8(2, 2), s(0.03), z(7)],
        (0, 1, 3, 4, 6, 7),
        {"axis": 1, **MS},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mirror_gives_onnxruntime_s_integers(name: str) -> None:
    """Floats to rounding; integers up to one where a number lies between two."""
    op, inputs, stored, attributes = CASES[name]
    if name == "softmax":  # whose attribute is called as this function's argument
        model, fed = one_node(op, inputs, stored=stored, domain="com.microsoft")
        model.graph.node[0].attribute.add(name="opset", i=13, type=onnx.AttributeProto.INT)
    else:
        model, fed = one_node(op, inputs, stored=stored, **attributes)
    for got, wanted in zip(run_mirror(model, fed), run_onnxruntime(model, fed), strict=True):
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
        if wanted.dtype.kind == "f" or wanted.dtype == np.int32:
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
        else:
            apart = np.abs(got.astype(int) - wanted.astype(int))
            assert apart.max() <= 1 and (apart > 0).mean() <= 0.02


def test_halves_are_rounded_to_even() -> None:
    op, inputs, stored, attributes = CASES["ties"]
    agree(*one_node(op, inputs, stored=stored, **attributes), atol=0)


QDQ = """
<ir_version: 8, opset_import: ["" : 13]>
agraph (float[N, 4, 6, 6] x) => (float[N, 3] y)
<float s = {0.05}, uint8 z = {128}, float sb = {0.0005}, int32 zb = {0}>
{
    q = QuantizeLinear(x, s, z)
    d = DequantizeLinear(q, s, z)
    wd = DequantizeLinear <axis = 0> (w, ws, wz)
    bd = DequantizeLinear(b, sb, zb)
    c = Conv <pads = [1, 1, 1, 1]> (d, wd, bd)
    r = Relu(c)
    rq = QuantizeLinear(r, s, z)
    p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (rq)
    pd = DequantizeLinear(p, s, z)
    y = ReduceMean <axes = [2, 3], keepdims = 0> (pd)
}
"""


def quantised_net() -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    model = onnx.parser.parse_model(QDQ)
    stored = {"w": W, "ws": SMALL, "wz": np.zeros(3, np.int8), "b": BIAS}
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in stored.items())
    return model, {"x": 2 * f(2, 4, 6, 6)}


def test_stored_integers_are_weights_in_real_units_that_can_be_written_back() -> None:
    model, fed = quantised_net()
    agree(model, fed)
    module = mirror(model)
    weights = dict(module.named_parameters())
    assert set(weights) == {"w", "b"}
    forms = module.meta["quantised"]
    np.testing.assert_allclose(weights["w"].detach(), W * SMALL[:, None, None, None], rtol=1e-6)
    for name, integers in (("w", W), ("b", BIAS)):
        written = forms[name].integers(weights[name].detach().numpy())
        assert written.dtype == integers.dtype
        np.testing.assert_array_equal(written, integers)
    np.testing.assert_array_equal(stored_values(module)["w",], W)
    moved = weights["w"].detach().numpy() + 3 * SMALL[:, None, None, None]
    np.testing.assert_array_equal(forms["w"].integers(moved), np.clip(W.astype(int) + 3, -128, 127))


def test_gradients_pass_through_the_rounding_where_nothing_is_cut_off() -> None:
    """They are those of the same network without rounding, at the rounded weights."""
    model, _ = one_node("QuantizeLinear", [f(6), s(0.02), z(120)], stored=(1, 2), opset=13)
    model.graph.node.add(op_type="DequantizeLinear", input=["y0", "x1", "x2"], output=["y"])
    model.graph.output[0].name = "y"
    x = torch.tensor([-9.0, -1.0, 0.013, 0.5, 2.0, 9.0], requires_grad=True)
    mirror(model)(x).sum().backward()
    assert x.grad is not None
    np.testing.assert_allclose(x.grad, [0, 1, 1, 1, 1, 0], rtol=1e-5)


def test_a_quantised_network_learns() -> None:
    model, fed = quantised_net()
    module = mirror(model)
    x = torch.from_numpy(fed["x"])
    wanted = module(x).detach() + 0.5
    steps = torch.optim.Adam(module.parameters(), lr=0.02)
    losses = []
    for _ in range(40):
        loss = (module(x) - wanted).square().mean()
        losses.append(loss.item())
        steps.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
        steps.step()
    assert losses[-1] < 0.1 * losses[0]


OPERATORS = """
<ir_version: 8, opset_import: ["" : 13]>
agraph (float[N, 4] x) => (float[N, 3] y)
<float ws = {0.01}, int8 wz = {0}>
{
    q, s, z = DynamicQuantizeLinear(x)
    i = MatMulInteger(q, w, z, wz)
    c = Cast <to = 1> (i)
    both = Mul(s, ws)
    y = Mul(c, both)
}
"""


def test_gradients_reach_weights_behind_integers_of_32_bits() -> None:
    model = onnx.parser.parse_model(OPERATORS)
    model.graph.initializer.append(numpy_helper.from_array(i8(4, 3), "w"))
    agree(model, {"x": f(5, 4)})
    module = mirror(model)
    x = torch.randn(5, 4, requires_grad=True)
    module(x).sum().backward()
    weight = next(module.parameters())
    assert weight.grad is not None and weight.grad.abs().sum() > 0
    real = 0.01 * numpy_helper.to_array(model.graph.initializer[-1]).astype(np.float32)
    np.testing.assert_allclose(x.grad, np.broadcast_to(real.sum(1), (5, 4)), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("columns", [False, True])
def test_a_quantised_lstm_is_near_to_onnxruntime_s(columns: bool) -> None:
    """Which rounds its state at every step, too."""
    hidden, shape = 6, (2, 24) if columns else (2,)
    scales = [RNG.uniform(0.004, 0.006, shape).astype(np.float32) for _ in range(2)]
    zeros = [np.zeros(shape, np.int8)] * 2
    inputs = [f(7, 2, 5), i8(2, 5, 24), i8(2, hidden, 24), f(2, 48), *[None] * 4]
    inputs += [scales[0], zeros[0], scales[1], zeros[1]]
    settings = {"hidden_size": hidden, "direction": "bidirectional", "count": 3, "symbolic": False}
    model, fed = one_node("DynamicQuantizeLSTM", inputs, stored=(1, 2, 3, 8, 9, 10, 11), **settings, **MS)
    agree(model, fed, rtol=0, atol=0.02)
    module = mirror(model)
    module(torch.from_numpy(fed["x0"]))[0].sum().backward()
    assert {n for n, p in module.named_parameters() if p.grad is not None} == {"x1", "x2", "x3"}
    np.testing.assert_array_equal(
        module.meta["quantised"]["x2"].integers(dict(module.named_parameters())["x2"].detach().numpy()), inputs[2]
    )


def test_four_bit_weights_stay_as_they_are() -> None:
    packed = onnx.helper.make_tensor("w", onnx.TensorProto.INT4, [4, 3], list(RNG.integers(-8, 8, 12)))
    model, fed = one_node("MatMul", [f(2, 4), f(4, 3)], opset=21)
    del model.graph.input[1]
    fed.pop("x1")
    model.graph.initializer.extend([packed, numpy_helper.from_array(s(0.1), "scale")])
    model.graph.node.insert(0, onnx.helper.make_node("DequantizeLinear", ["w", "scale"], ["x1"]))
    agree(model, fed)
    assert not list(mirror(model).parameters())
