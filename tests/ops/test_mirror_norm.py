"""Normalisations in the mirror: onnxruntime's numbers in every version, what training does to statistics, derivatives."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from onnxprune.mirroring import mirror
from tests.ops.mirroring import agree, differentiable, one_node, run_mirror

RNG = np.random.default_rng(0)


def made(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def positive(*shape: int) -> np.ndarray:
    return RNG.uniform(0.5, 1.5, shape).astype(np.float32)


def as_defined(model: onnx.ModelProto, fed: dict[str, Any]) -> None:
    """The mirror's outputs are those of ONNX's own definition, where onnxruntime has no such version."""
    for got, wanted in zip(run_mirror(model, fed), ReferenceEvaluator(model).run(None, fed), strict=True):
        assert got.shape == wanted.shape
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def statistics(*shape: int) -> list[np.ndarray]:
    """Scale, bias, mean and variance."""
    return [positive(*shape), made(*shape), made(*shape), positive(*shape)]


@pytest.mark.parametrize("opset", [7, 9, 14, 15])
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 5), (2, 3, 4, 5), (2, 3, 2, 4, 3)])
def test_batch_norm(shape: tuple[int, ...], opset: int) -> None:
    agree(
        *one_node("BatchNormalization", [made(*shape), *statistics(3)], stored=(1, 2, 3, 4), opset=opset, epsilon=1e-3)
    )


def test_batch_norm_of_every_place() -> None:
    inputs = [made(2, 3, 4, 5), *statistics(3, 4, 5)]
    model, fed = one_node("BatchNormalization", inputs, stored=(1, 2, 3, 4), opset=7, spatial=0)
    x, scale, bias, mean, variance = inputs
    wanted = (x - mean) / np.sqrt(variance + 1e-5) * scale + bias
    np.testing.assert_allclose(run_mirror(model, fed)[0], wanted, rtol=1e-4, atol=1e-5)


def test_batch_norm_in_onnx_training_mode() -> None:
    inputs = [made(4, 3, 5), *statistics(3)]
    more = {"stored": (1, 2, 3, 4), "count": 3, "opset": 15, "training_mode": 1, "momentum": 0.8}
    model, fed = one_node("BatchNormalization", inputs, **more)
    as_defined(model, fed)
    module = mirror(model)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    module.train()(torch.from_numpy(fed["x0"]))
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


def test_batch_norm_in_onnx_training_mode_whose_statistics_nothing_reads() -> None:
    """It is one call of torch then, also for a single number per channel."""
    for shape in ((4, 3, 5), (1, 3)):
        inputs = [made(*shape), *statistics(3)]
        more = {"stored": (1, 2, 3, 4), "opset": 15, "training_mode": 1}
        whole, fed = one_node("BatchNormalization", inputs, count=3, **more)
        alone, _ = one_node("BatchNormalization", inputs, **more)
        found, expected = run_mirror(alone, fed)[0], run_mirror(whole, fed)[0]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)  # rounding by 1 / sqrt(eps) = 316


def test_training_moves_the_stored_statistics_as_torch_does() -> None:
    inputs = [made(4, 3, 5, 6), *statistics(3)]
    module = mirror(one_node("BatchNormalization", inputs, stored=(1, 2, 3, 4), momentum=0.7, epsilon=1e-3)[0])
    native = torch.nn.BatchNorm2d(3, eps=1e-3, momentum=0.3)
    with torch.no_grad():
        places = (native.weight, native.bias, native.running_mean, native.running_var)
        for place, value in zip(places, inputs[1:], strict=True):
            place.copy_(torch.from_numpy(value))
    x = torch.from_numpy(inputs[0])
    torch.testing.assert_close(module.train()(x), native.train()(x))
    assert {n for n, _ in module.named_parameters()} == {"x1", "x2"}
    torch.testing.assert_close(module.get_buffer("x3"), native.running_mean)
    torch.testing.assert_close(module.get_buffer("x4"), native.running_var)
    torch.testing.assert_close(module.eval()(x), native.eval()(x))


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 3, 4, 5), (2, 3, 1, 1), (2, 3, 2, 4, 3)])
def test_instance_norm(shape: tuple[int, ...]) -> None:
    agree(*one_node("InstanceNormalization", [made(*shape), positive(3), made(3)], stored=(1, 2), epsilon=1e-2))


@pytest.mark.parametrize("axis", [-1, -2, 1, 0])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm(axis: int, count: int, bias: bool) -> None:
    shape = (2, 3, 4)
    inputs = [made(*shape), positive(*shape[axis:]), *([made(*shape[axis:])] if bias else [])]
    for stored in ((), (1, 2)[: 1 + bias]):
        agree(*one_node("LayerNormalization", inputs, stored=stored, count=count, axis=axis, epsilon=1e-2))


def test_layer_norm_with_broadcast_parameters() -> None:
    for affine in ((1, 4), (4,), (1,)):
        model, fed = one_node(
            "LayerNormalization", [made(2, 3, 4), positive(*affine), made(*affine)], stored=(1, 2), axis=1
        )
        as_defined(model, fed)


@pytest.mark.parametrize("op", ["RMSNormalization", "SimplifiedLayerNormalization"])
@pytest.mark.parametrize("axis", [-1, 1])
def test_rms_norm(op: str, axis: int) -> None:
    inputs = [made(2, 3, 4), positive(*(2, 3, 4)[axis:])]
    for stored in ((), (1,)):
        model, fed = one_node(op, inputs, stored=stored, axis=axis, epsilon=1e-2, opset=23 if op[0] == "R" else 17)
        axes = tuple(range(axis % 3, 3))
        wanted = inputs[0] / np.sqrt(np.mean(inputs[0] ** 2, axes, keepdims=True) + 1e-2) * inputs[1]
        np.testing.assert_allclose(run_mirror(model, fed)[0], wanted, rtol=1e-5, atol=1e-6)
    if op[0] == "S":
        agree(*one_node(op, [made(2, 3, 4), positive(4)], stored=(1,), count=2, axis=-1))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("beta", [True, False])
def test_skip_layer_norm(beta: bool, bias: bool) -> None:
    inputs = [made(2, 3, 4), made(2, 3, 4), positive(4), made(4) if beta else None, *([made(4)] if bias else [])]
    more = {"domain": "com.microsoft", "epsilon": 1e-2}
    agree(*one_node("SkipLayerNormalization", inputs, stored=(2, 3, 4)[: len(inputs) - 2], **more))
    model, fed = one_node("SkipLayerNormalization", inputs, stored=(2, 3, 4)[: len(inputs) - 2], count=4, **more)
    _, mean, inverse, total = run_mirror(model, fed)
    wanted = inputs[0] + inputs[1] + (inputs[4] if bias else 0)
    np.testing.assert_allclose(total, wanted, rtol=1e-6)
    np.testing.assert_allclose(mean, wanted.mean(-1, keepdims=True), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(inverse, 1 / np.sqrt(wanted.var(-1, keepdims=True) + 1e-2), rtol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_skip_rms_norm(bias: bool) -> None:
    inputs = [made(2, 3, 4), made(2, 3, 4), positive(4), *([made(4)] if bias else [])]
    more = {"domain": "com.microsoft", "epsilon": 1e-2, "stored": (2, 3)[: len(inputs) - 2]}
    agree(*one_node("SkipSimplifiedLayerNormalization", inputs, **more))


def test_a_sum_that_is_used_as_well() -> None:
    """The further outputs that the fused residual connections of transformers use."""
    inputs = [made(2, 3, 4), made(2, 3, 4), positive(4)]
    node = onnx.helper.make_node(
        "SkipSimplifiedLayerNormalization", ["x", "s", "g"], ["y", "", "", "sum"], domain="com.microsoft"
    )
    infos = [onnx.helper.make_tensor_value_info(n, 1, ["N", 3, 4]) for n in ("x", "s", "y", "sum")]
    graph = onnx.helper.make_graph([node], "g", infos[:2], infos[2:], [onnx.numpy_helper.from_array(inputs[2], "g")])
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    agree(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8), dict(zip("xs", inputs, strict=False)))


@pytest.mark.parametrize(("opset", "affine"), [(18, 2), (21, 6)])
@pytest.mark.parametrize("shape", [(2, 6, 5), (2, 6, 4, 5)])
def test_group_norm(shape: tuple[int, ...], opset: int, affine: int) -> None:
    inputs = [made(*shape), positive(affine), made(affine)]
    agree(*one_node("GroupNormalization", inputs, stored=(1, 2), num_groups=2, epsilon=1e-2, opset=opset))


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax", "Hardmax"])
@pytest.mark.parametrize(
    ("opset", "axis"),
    [*product((7, 11, 13), (None, 0, 1, 2)), (11, -1), (13, -1)],  # negative axes are of opset 11
)
def test_softmax(op: str, opset: int, axis: int | None) -> None:
    agree(*one_node(op, [made(2, 3, 4)], opset=opset, **({} if axis is None else {"axis": axis})))


@pytest.mark.parametrize("size", [1, 3, 4, 5])
def test_lrn(size: int) -> None:
    model, fed = one_node("LRN", [made(2, 6, 3, 4)], size=size, alpha=0.3, beta=0.6, bias=1.5)
    square = fed["x0"] ** 2
    sums = [square[:, max(c - (size - 1) // 2, 0) : c + size // 2 + 1].sum(1) for c in range(6)]
    wanted = fed["x0"] / (1.5 + 0.3 / size * np.stack(sums, 1)) ** 0.6
    np.testing.assert_allclose(run_mirror(model, fed)[0], wanted, rtol=1e-4, atol=1e-5)
    if size % 2:
        agree(model, fed)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_lp_normalization(axis: int, p: int) -> None:
    x = made(2, 3, 4)
    x[0, 0] = 0
    agree(*one_node("LpNormalization", [x], p=p, axis=axis))


def test_mean_variance_normalization() -> None:
    agree(*one_node("MeanVarianceNormalization", [made(2, 3, 4, 5)]))
    agree(*one_node("MeanVarianceNormalization", [made(2, 3, 4, 5)], axes=[1, -1]))


FIXED = {"stored": (3, 4)}
DERIVED: list[tuple[str, list[Any], dict[str, Any]]] = [
    ("BatchNormalization", [made(2, 2, 3), *statistics(2)], FIXED),
    ("BatchNormalization", [made(3, 2, 3), *statistics(2)], {**FIXED, "training_mode": 1, "opset": 15, "count": 3}),
    ("BatchNormalization", [made(2, 2, 2), *statistics(2, 2)], {**FIXED, "opset": 7, "spatial": 0}),
    ("InstanceNormalization", [made(2, 2, 4), positive(2), made(2)], {}),
    ("LayerNormalization", [made(2, 3, 4), positive(4), made(4)], {"count": 3}),
    ("LayerNormalization", [made(2, 2, 3), positive(1, 3), made(3)], {"axis": 1}),
    ("RMSNormalization", [made(2, 2, 3), positive(3)], {"opset": 23}),
    ("SimplifiedLayerNormalization", [made(2, 2, 3), positive(3)], {"count": 2}),
    (
        "SkipLayerNormalization",
        [made(1, 2, 3), made(1, 2, 3), positive(3), made(3), made(3)],
        {"domain": "com.microsoft"},
    ),
    ("SkipSimplifiedLayerNormalization", [made(1, 2, 3), made(1, 2, 3), positive(3)], {"domain": "com.microsoft"}),
    ("GroupNormalization", [made(1, 4, 3), positive(2), made(2)], {"num_groups": 2, "opset": 18}),
    ("GroupNormalization", [made(1, 4, 3), positive(4), made(4)], {"num_groups": 2, "opset": 21}),
    ("Softmax", [made(2, 2, 3)], {"opset": 11}),
    ("Softmax", [made(2, 2, 3)], {"axis": 1}),
    ("LogSoftmax", [made(2, 2, 3)], {"opset": 11}),
    ("LRN", [made(1, 4, 2, 2)], {"size": 3}),
    ("LRN", [made(1, 4, 2, 2)], {"size": 4}),
    ("LpNormalization", [made(2, 3)], {"p": 1}),
    ("LpNormalization", [made(2, 3)], {}),
    ("MeanVarianceNormalization", [made(2, 2, 2, 2)], {}),
]


@pytest.mark.parametrize(("op", "inputs", "attributes"), DERIVED)
def test_derivatives(op: str, inputs: list[Any], attributes: dict[str, Any]) -> None:
    differentiable(op, inputs, **attributes)


def test_derivatives_of_a_batch_norm_that_trains() -> None:
    inputs = [x.astype(np.float64) for x in (made(3, 2, 3), *statistics(2))]
    module = mirror(one_node("BatchNormalization", inputs, stored=(3, 4))[0]).train()
    given = [torch.from_numpy(x).requires_grad_() for x in inputs[:3]]
    assert torch.autograd.gradcheck(module, given)


@pytest.mark.parametrize("op", ["LpNormalization", "MeanVarianceNormalization"])
def test_nothing_has_a_gradient(op: str) -> None:
    x = torch.zeros(1, 2, 3, 4, requires_grad=True)
    mirror(one_node(op, [made(1, 2, 3, 4)])[0])(x).square().sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


def test_what_torch_has_stays_one_call() -> None:
    for op, inputs, more, function in (
        ("LayerNormalization", [made(2, 3, 4), positive(4), made(4)], {}, "layer_norm"),
        ("RMSNormalization", [made(2, 3, 4), positive(4)], {"opset": 23}, "rms_norm"),
        ("Softmax", [made(2, 3, 4)], {"opset": 11, "axis": 2}, "softmax"),
        ("GroupNormalization", [made(2, 4, 4), positive(4), made(4)], {"opset": 21, "num_groups": 2}, "group_norm"),
    ):
        model, _ = one_node(op, inputs, stored=range(1, len(inputs)), symbolic=False, **more)  # type: ignore[arg-type]
        calls = [n for n in mirror(model).graph.nodes if n.op == "call_function"]
        assert [n.target.__module__.startswith("onnxprune") for n in calls] == [False]
        assert calls[0].name == function
