"""Resize in the mirror: every mode and coordinate of every version, against onnxruntime."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper

from onnxprune.mirroring import mirror
from tests.ops.mirroring import agree, differentiable, one_node, run_mirror, run_onnxruntime

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 3, 6, 7)).astype(np.float32)
NONE = np.zeros(0, np.float32)
SCALES = [(1, 1, 2, 2), (1, 1, 3, 1.5), (1, 1, 0.6, 2.3), (1, 1, 0.4, 0.7)]
SIZES = [(2, 3, 12, 14), (2, 3, 9, 5), (2, 3, 1, 20)]


def scaled(scales: tuple[float, ...], *, x: np.ndarray = X, **attributes: Any) -> Any:
    return one_node("Resize", [x, NONE, np.float32(scales)], stored=(1, 2), **attributes)


def sized(sizes: tuple[int, ...], *, x: np.ndarray = X, **attributes: Any) -> Any:
    return one_node("Resize", [x, NONE, NONE, np.array(sizes)], stored=(1, 2, 3), **attributes)


COORDINATES = ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"]


@pytest.mark.parametrize("coordinates", [*COORDINATES, "tf_half_pixel_for_nn", "half_pixel_symmetric"])
@pytest.mark.parametrize("rule", ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"])
def test_nearest(coordinates: str, rule: str) -> None:
    opset = {"tf_half_pixel_for_nn": 11, "half_pixel_symmetric": 19}.get(coordinates, 13)
    more = {"coordinate_transformation_mode": coordinates, "nearest_mode": rule, "mode": "nearest", "opset": opset}
    for scales in SCALES:
        agree(*scaled(scales, **more))
    for sizes in SIZES:
        agree(*sized(sizes, **more))


@pytest.mark.parametrize("coordinates", [*COORDINATES, "half_pixel_symmetric"])
@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_smooth(mode: str, coordinates: str) -> None:
    opset = 19 if coordinates == "half_pixel_symmetric" else 13
    more = {"coordinate_transformation_mode": coordinates, "mode": mode, "opset": opset}
    for scales in SCALES:
        agree(*scaled(scales, **more))
    for sizes in SIZES:
        agree(*sized(sizes, **more))


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("outside", [0, 1])
@pytest.mark.parametrize("a", [-0.75, -0.5])
def test_cubic(coordinates: str, outside: int, a: float) -> None:
    more = {"coordinate_transformation_mode": coordinates, "exclude_outside": outside, "cubic_coeff_a": a}
    for scales in SCALES:
        agree(*scaled(scales, mode="cubic", **more))


@pytest.mark.parametrize("shape", [(2, 3, 7), (2, 3, 4, 5, 6)])
@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_other_ranks(shape: tuple[int, ...], mode: str) -> None:
    x = RNG.standard_normal(shape).astype(np.float32)
    if len(shape) == 5 or mode == "nearest":
        agree(*scaled((1, 1, 2, 0.7, 1.5)[: len(shape)], x=x, mode=mode))
    plane = RNG.standard_normal((5, 6)).astype(np.float32)
    agree(*scaled((2, 0.7), x=plane, mode=mode))


@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("outside", [0, 1])
@pytest.mark.parametrize("coordinates", ["half_pixel", "align_corners"])
def test_antialias(mode: str, outside: int, coordinates: str) -> None:
    for scales in [(1, 1, 0.4, 0.7), (1, 1, 0.3, 2.0)]:
        more = {"mode": mode, "exclude_outside": outside, "coordinate_transformation_mode": coordinates}
        agree(*scaled(scales, antialias=1, opset=18, **more))


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("policy", ["not_larger", "not_smaller"])
def test_aspect_ratio(mode: str, policy: str) -> None:
    sizes = np.array([13, 9])
    inputs = [X, None, None, sizes]
    model, fed = one_node(
        "Resize", inputs, stored=(3,), axes=[2, 3], keep_aspect_ratio_policy=policy, mode=mode, opset=18
    )
    agree(model, fed)


def test_some_axes_in_any_order() -> None:
    more = {"axes": [3, 2], "mode": "linear", "opset": 18}
    agree(*one_node("Resize", [X, None, np.float32([2.0, 0.7])], stored=(2,), **more))
    agree(*one_node("Resize", [X, None, None, np.array([5, 13])], stored=(3,), **more))


@pytest.mark.parametrize("mode", ["linear", "nearest"])
def test_a_region_of_interest(mode: str) -> None:
    roi = np.float32([0, 0, 0.2, -0.3, 1, 1, 0.8, 1.2])
    more = {"coordinate_transformation_mode": "tf_crop_and_resize", "extrapolation_value": 7.5, "mode": mode}
    agree(*one_node("Resize", [X, roi, None, np.array([2, 3, 5, 8])], stored=(1, 3), **more))
    agree(*one_node("Resize", [X, roi, None, np.array([2, 3, 5, 8])], symbolic=False, **more))


@pytest.mark.parametrize("op", ["Resize", "Upsample"])
@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_before_opset_11(op: str, mode: str) -> None:
    opsets = {"Resize": (10,), "Upsample": (7, 9)}[op]
    scales = [(1, 1, 2, 3), (1, 1, 1.5, 2.3), *([(1, 1, 0.6, 2)] if op == "Resize" else [])]
    for opset, s in product(opsets, scales):
        inputs = [X] if opset == 7 else [X, np.float32(s)]
        more = {"scales": [float(v) for v in s]} if opset == 7 else {"stored": (1,)}
        agree(*one_node(op, inputs, opset=opset, mode=mode, **more))


def test_scales_and_sizes_that_are_computed() -> None:
    agree(*one_node("Resize", [X, None, np.float32([1, 1, 1.7, 2])], mode="linear", symbolic=False))
    agree(*one_node("Resize", [X, None, None, np.array([2, 3, 9, 8])], mode="linear", symbolic=False))
    agree(*one_node("Resize", [X, NONE, NONE, np.array([2, 3, 9, 8])], stored=(1, 2, 3), opset=11, mode="nearest"))


def test_sizes_that_follow_another_input() -> None:
    """A feature pyramid: the batch and the channels of one tensor, the height and width of another."""
    nodes = [
        helper.make_node("Shape", ["x"], ["xs"]),
        helper.make_node("Shape", ["like"], ["ls"]),
        helper.make_node("Slice", ["xs", "zero", "two"], ["front"]),
        helper.make_node("Slice", ["ls", "two", "four"], ["back"]),
        helper.make_node("Concat", ["front", "back"], ["sizes"], axis=0),
        helper.make_node("Resize", ["x", "", "", "sizes"], ["y"], mode="linear"),
    ]
    constants = [helper.make_tensor(n, TensorProto.INT64, [1], [v]) for n, v in (("zero", 0), ("two", 2), ("four", 4))]
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 3, f"h{n}", f"w{n}"]) for n in ("x", "like")]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "pyramid", inputs, [output], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    for n, size in ((1, (9, 5)), (3, (13, 14))):
        fed = {"x": X[:1].repeat(n, 0), "like": np.zeros((n, 3, *size), np.float32)}
        agree(model, fed)


@pytest.mark.parametrize("dtype", ["uint8", "int32"])
def test_integers(dtype: str) -> None:
    x = RNG.integers(0, 100, (1, 2, 5, 6)).astype(dtype)
    for mode in ("nearest", "linear"):
        model, fed = scaled((1, 1, 2, 2), x=x, mode=mode)
        found, wanted = run_mirror(model, fed)[0], run_onnxruntime(model, fed)[0]
        assert found.dtype == wanted.dtype and np.abs(found.astype(int) - wanted.astype(int)).max() <= (
            mode == "linear"
        )


DERIVED: list[dict[str, Any]] = [
    {"mode": "nearest"},
    {"mode": "linear"},
    {"mode": "linear", "coordinate_transformation_mode": "asymmetric"},
    {"mode": "cubic", "coordinate_transformation_mode": "align_corners"},
    {"mode": "cubic", "exclude_outside": 1},
    {"mode": "linear", "antialias": 1, "opset": 18},
]


@pytest.mark.parametrize("attributes", DERIVED)
def test_derivatives(attributes: dict[str, Any]) -> None:
    x = RNG.standard_normal((1, 2, 4, 3)).astype(np.float32)
    for scales in ((1, 1, 2, 3), (1, 1, 0.6, 1.4)):
        differentiable("Resize", [x, None, np.float32(scales)], stored=(2,), **attributes)


def test_derivatives_of_a_region() -> None:
    x = RNG.standard_normal((1, 1, 4, 3)).astype(np.float32)
    roi = np.float32([0, 0, 0.2, -0.3, 1, 1, 0.8, 1.2])
    more = {"coordinate_transformation_mode": "tf_crop_and_resize", "mode": "linear"}
    differentiable("Resize", [x, roi, None, np.array([1, 1, 5, 4])], stored=(1, 3), **more)


@pytest.mark.parametrize(
    ("scales", "attributes"),
    [
        ((1, 1, 2, 2), {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}),
        ((1, 1, 2, 2), {"mode": "linear", "coordinate_transformation_mode": "pytorch_half_pixel"}),
        ((1, 1, 1.5, 0.25), {"mode": "linear"}),
        ((1, 1, 2, 2), {"mode": "cubic"}),
    ],
)
def test_the_common_forms_are_one_call_of_torch(scales: tuple[float, ...], attributes: dict[str, Any]) -> None:
    model, _ = scaled(scales, **attributes)
    calls = [n for n in mirror(model).graph.nodes if n.op == "call_function"]
    assert [n.target for n in calls] == [torch.nn.functional.interpolate]


def test_whole_factors_repeat_pixels_at_any_size() -> None:
    """What lets a nearest Resize by a whole factor be torch's: it never reads a neighbour's pixel."""
    for factor in range(1, 17):
        x = torch.arange(4096.0).reshape(1, 1, -1)
        found = torch.nn.functional.interpolate(x, scale_factor=(float(factor),), mode="nearest")
        assert torch.equal(found, x.repeat_interleave(factor, 2))
