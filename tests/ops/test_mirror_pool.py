"""Pooling, sampling and regions in the mirror: onnxruntime's windows at sizes that the model does not state."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from onnxprune.errors import NotMirrored
from onnxprune.mirroring import mirror
from tests.ops.mirroring import agree, differentiable, one_node, run_mirror

RNG = np.random.default_rng(0)


def made(*shape: int) -> np.ndarray:
    """Numbers of which no two are close, so that the largest stays the largest under a small step."""
    count = int(np.prod(shape))
    return RNG.permutation(np.linspace(-2, 2, count)).reshape(shape).astype(np.float32)


MAX: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((7, 8), {"kernel_shape": [2, 2], "strides": [2, 2]}),
    ((7, 8), {"kernel_shape": [3, 2], "strides": [2, 2], "ceil_mode": 1}),
    ((7, 8), {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    ((7, 8), {"kernel_shape": [3, 3], "strides": [2, 3], "pads": [1, 1, 1, 1], "ceil_mode": 1}),
    ((7, 8), {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 1, 2, 0], "ceil_mode": 1}),
    ((7, 8), {"kernel_shape": [2, 2], "strides": [3, 2], "pads": [0, 0, 1, 1]}),
    ((7, 8), {"kernel_shape": [3, 2], "dilations": [2, 3], "pads": [2, 1, 2, 1]}),
    ((7, 8), {"kernel_shape": [3, 2], "auto_pad": "SAME_UPPER", "strides": [2, 1]}),
    ((7, 8), {"kernel_shape": [4, 3], "auto_pad": "SAME_LOWER", "strides": [2, 3]}),
    ((7, 8), {"kernel_shape": [3, 2], "auto_pad": "VALID", "strides": [2, 1]}),
    ((9,), {"kernel_shape": [3], "pads": [2, 1], "strides": [2]}),
    ((5, 6, 7), {"kernel_shape": [2, 3, 2], "pads": [1, 0, 1, 0, 1, 0], "strides": [2, 1, 2]}),
]


@pytest.mark.parametrize(("image", "attributes"), MAX)
@pytest.mark.parametrize("more", [0, 1])
def test_max_pool(image: tuple[int, ...], attributes: dict[str, Any], more: int) -> None:
    x = made(2, 3, *(n + more for n in image))
    agree(*one_node("MaxPool", [x], **attributes))
    agree(*one_node("MaxPool", [x], count=2, opset=12, **attributes))


def test_positions_count_columns_first_where_asked() -> None:
    for shape in ((2, 2, 6, 7), (2, 2, 4, 5, 6)):
        model, fed = one_node("MaxPool", [made(*shape)], count=2, kernel_shape=[2] * (len(shape) - 2), storage_order=1)
        agree(model, fed)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "float64"])
def test_max_pool_of_other_types(dtype: str) -> None:
    agree(*one_node("MaxPool", [(made(1, 2, 5, 6) * 50 + 100).astype(dtype)], kernel_shape=[3, 2], pads=[1, 0, 1, 0]))


AVERAGE = [
    *(c for c in MAX if "dilations" not in c[1] and c[1].get("ceil_mode", 0) == 0),
    ((7, 8), {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}),
    ((7, 8), {"kernel_shape": [3, 3], "strides": [2, 3], "pads": [1, 1, 1, 1], "ceil_mode": 1}),
    ((7, 8), {"kernel_shape": [3, 2], "dilations": [2, 3], "pads": [2, 1, 2, 1], "opset": 19}),
]


@pytest.mark.parametrize(("image", "attributes"), AVERAGE)
@pytest.mark.parametrize("counted", [0, 1])
@pytest.mark.parametrize("more", [0, 1])
def test_average_pool(image: tuple[int, ...], attributes: dict[str, Any], counted: int, more: int) -> None:
    x = made(2, 3, *(n + more for n in image))
    agree(*one_node("AveragePool", [x], count_include_pad=counted, **attributes))


def test_padding_to_the_same_size_counts_dilation() -> None:
    """onnxruntime does not, and gives fewer results than the definition."""
    model, fed = one_node(
        "AveragePool", [made(1, 1, 7, 8)], kernel_shape=[3, 1], dilations=[2, 1], auto_pad="SAME_UPPER", opset=19
    )
    (found,) = run_mirror(model, fed)
    x = fed["x0"][0, 0]
    np.testing.assert_allclose(found[0, 0, 0], (x[0] + x[2]) / 2, rtol=1e-6)
    np.testing.assert_allclose(found[0, 0, 3], (x[1] + x[3] + x[5]) / 3, rtol=1e-6)
    assert found.shape == (1, 1, 7, 8)


@pytest.mark.parametrize(("image", "attributes"), AVERAGE[:8])
@pytest.mark.parametrize("p", [1, 2, 3])
def test_lp_pool(image: tuple[int, ...], attributes: dict[str, Any], p: int) -> None:
    agree(*one_node("LpPool", [made(2, 3, *image)], p=p, **attributes))


@pytest.mark.parametrize("image", [(5,), (5, 6), (3, 4, 5)])
@pytest.mark.parametrize("op", ["GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"])
def test_global_pools(op: str, image: tuple[int, ...]) -> None:
    agree(*one_node(op, [made(2, 3, *image)]))


def test_max_unpool() -> None:
    x, positions = made(1, 2, 2, 2), np.array([[[[1, 3], [9, 11]], [[16, 18], [24, 26]]]])
    agree(*one_node("MaxUnpool", [x, positions], kernel_shape=[2, 2], strides=[2, 2]))


def test_what_was_pooled_goes_back_to_its_place() -> None:
    x = made(2, 3, 6, 8)
    pooled, at = run_mirror(*one_node("MaxPool", [x], count=2, kernel_shape=[2, 2], strides=[2, 2]))
    (back,) = run_mirror(*one_node("MaxUnpool", [pooled, at], kernel_shape=[2, 2], strides=[2, 2]))
    np.testing.assert_array_equal(back, np.where(np.isin(x, pooled), x, 0))


@pytest.mark.parametrize("edges", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("align", [0, 1])
@pytest.mark.parametrize(
    ("mode", "opset"), [("bilinear", 16), ("nearest", 16), ("bicubic", 16), ("linear", 20), ("cubic", 20)]
)
def test_grid_sample(mode: str, opset: int, align: int, edges: str) -> None:
    x, grid = made(2, 3, 5, 6), made(2, 4, 7, 2) * 0.6
    agree(*one_node("GridSample", [x, grid], mode=mode, padding_mode=edges, align_corners=align, opset=opset))


def test_grid_sample_in_three_dimensions() -> None:
    x, grid = made(2, 3, 4, 5, 6), made(2, 3, 4, 5, 3) * 0.6
    for mode in ("linear", "nearest"):
        agree(*one_node("GridSample", [x, grid], mode=mode, opset=20))
    with pytest.raises(NotMirrored, match="cubic"):
        mirror(one_node("GridSample", [x, grid], mode="cubic", opset=20)[0])


@pytest.mark.parametrize("align", [0, 1])
@pytest.mark.parametrize("sizes", [(2, 3, 4, 5), (2, 3, 4, 5, 6)])
def test_affine_grid(sizes: tuple[int, ...], align: int) -> None:
    theta = made(2, len(sizes) - 2, len(sizes) - 1)
    for stored in ((), (1,)):
        model, fed = one_node("AffineGrid", [theta, np.array(sizes)], stored=stored, align_corners=align, opset=20)
        agree(model, fed)


ROIS = np.float32([[0.3, 0.7, 6.1, 5.2], [-3, 1, 4, 9], [5.5, 5.5, 5.6, 5.7], [1, 2, 9, 8]])
IMAGES = np.array([0, 1, 1, 0])


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("sampling", [0, 2])
@pytest.mark.parametrize(("opset", "coordinates"), [(10, None), (16, "half_pixel"), (16, "output_half_pixel")])
def test_roi_align(mode: str, sampling: int, opset: int, coordinates: str | None) -> None:
    more = {} if coordinates is None else {"coordinate_transformation_mode": coordinates}
    inputs = [made(2, 3, 9, 8), ROIS, IMAGES]
    model, fed = one_node(
        "RoiAlign", inputs, mode=mode, sampling_ratio=sampling, output_height=2, output_width=3, spatial_scale=0.8, opset=opset, **more
    )  # fmt: skip
    agree(model, fed)


def test_max_roi_pool() -> None:
    rois = np.concatenate([IMAGES[:, None].astype(np.float32), np.abs(ROIS)], 1)
    agree(*one_node("MaxRoiPool", [made(2, 3, 9, 8), rois], pooled_shape=[3, 2], spatial_scale=0.7))


@pytest.mark.parametrize(
    ("x", "image", "block", "attributes"),
    [
        ((1, 8, 6), (3, 4), (2, 2), {}),
        ((2, 12, 6), (5, 6), (2, 3), {"strides": [3, 2], "pads": [0, 1, 1, 0], "dilations": [2, 1]}),
        ((1, 4, 7), (8,), (2,), {}),
    ],
)
def test_col2im(x: tuple[int, ...], image: tuple[int, ...], block: tuple[int, ...], attributes: dict[str, Any]) -> None:
    inputs = [made(*x), np.array(image), np.array(block)]
    for stored in ((), (1, 2)):
        agree(*one_node("Col2Im", inputs, stored=stored, opset=18, **attributes))


DERIVED: list[tuple[str, list[Any], dict[str, Any]]] = [
    ("MaxPool", [made(1, 2, 4, 5)], {"kernel_shape": [2, 3], "pads": [1, 0, 0, 2], "ceil_mode": 1, "strides": [2, 2]}),
    ("MaxPool", [made(1, 2, 4, 5)], {"kernel_shape": [2, 2], "count": 2}),
    (
        "AveragePool",
        [made(1, 2, 4, 5)],
        {"kernel_shape": [2, 3], "pads": [1, 0, 0, 2], "ceil_mode": 1, "strides": [2, 2]},
    ),
    ("AveragePool", [made(1, 2, 4, 5)], {"kernel_shape": [2, 3], "pads": [1, 1, 1, 1]}),
    ("LpPool", [made(1, 2, 4, 5)], {"kernel_shape": [2, 2], "p": 3}),
    ("LpPool", [made(1, 2, 4, 5)], {"kernel_shape": [2, 2]}),
    ("GlobalAveragePool", [made(2, 2, 3, 2)], {}),
    ("GlobalMaxPool", [made(2, 2, 3, 2)], {}),
    ("GlobalLpPool", [made(2, 2, 3, 2)], {}),
    ("MaxUnpool", [made(1, 1, 2, 2), np.array([[[[1, 3], [9, 11]]]])], {"kernel_shape": [2, 2], "strides": [2, 2]}),
    ("GridSample", [made(1, 2, 3, 4), made(1, 2, 3, 2) * 0.4], {"mode": "bicubic"}),
    ("GridSample", [made(1, 2, 3, 4), made(1, 2, 3, 2) * 0.4], {"mode": "bilinear"}),
    ("AffineGrid", [made(2, 2, 3), np.array([2, 1, 3, 2])], {"opset": 20}),
    ("Col2Im", [made(1, 8, 6), np.array([3, 4]), np.array([2, 2])], {"opset": 18, "stored": (1, 2)}),
    ("Col2Im", [made(1, 4, 7), np.array([8]), np.array([2])], {"opset": 18, "stored": (1, 2)}),
    ("RoiAlign", [made(2, 2, 5, 6), ROIS[:2] * 0.6, IMAGES[:2]], {"output_height": 2, "stored": (1,)}),
    ("RoiAlign", [made(2, 2, 5, 6), ROIS[:2] * 0.6, IMAGES[:2]], {"output_height": 2, "mode": "max", "stored": (1,)}),
    ("MaxRoiPool", [made(1, 2, 5, 6), np.float32([[0, 1, 1, 4, 3]])], {"pooled_shape": [2, 2], "stored": (1,)}),
]


@pytest.mark.parametrize(("op", "inputs", "attributes"), DERIVED)
def test_derivatives(op: str, inputs: list[Any], attributes: dict[str, Any]) -> None:
    differentiable(op, inputs, **attributes)


@pytest.mark.parametrize("op", ["LpPool", "GlobalLpPool"])
def test_the_norm_of_nothing_has_a_gradient(op: str) -> None:
    more = {"kernel_shape": [2, 2]} if op == "LpPool" else {}
    model, _ = one_node(op, [made(1, 1, 4, 4)], **more)
    x = torch.zeros(1, 1, 4, 4, requires_grad=True)
    mirror(model)(x).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


@pytest.mark.parametrize(("op", "function"), [("MaxPool", "max_pool2d"), ("AveragePool", "avg_pool2d")])
def test_what_torch_has_stays_one_call(op: str, function: str) -> None:
    model, _ = one_node(op, [made(1, 3, 8, 8)], kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2])
    calls = [n for n in mirror(model).graph.nodes if n.op == "call_function"]
    assert [n.name for n in calls] == [function]
