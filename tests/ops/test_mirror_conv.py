"""Convolutions in the mirror: every way of padding, at sizes that the model does not state, and their derivatives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from onnxprune.errors import NotMirrored
from onnxprune.mirroring import mirror
from tests.ops.mirroring import agree, differentiable, one_node

RNG = np.random.default_rng(0)


def made(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


CONV: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((4, 3, 3, 3), (7, 9), {"pads": [1, 1, 1, 1]}),
    ((4, 3, 3, 3), (7, 8), {"pads": [0, 1, 2, 0], "strides": [2, 1]}),
    ((4, 3, 3, 2), (7, 8), {"auto_pad": "SAME_UPPER"}),
    ((4, 3, 4, 3), (7, 8), {"auto_pad": "SAME_LOWER", "strides": [2, 3]}),
    ((4, 3, 3, 3), (9, 8), {"auto_pad": "SAME_UPPER", "strides": [2, 2], "dilations": [1, 1]}),
    ((4, 3, 3, 3), (9, 8), {"auto_pad": "VALID", "dilations": [2, 1]}),
    ((6, 1, 3, 3), (9, 8), {"group": 3, "pads": [2, 2, 2, 2], "dilations": [2, 2]}),
    ((4, 3, 5), (11,), {"pads": [3, 1], "strides": [2]}),
    ((4, 3, 2, 3, 3), (5, 6, 7), {"pads": [1, 0, 1, 0, 0, 2]}),
    ((4, 3, 1, 1), (5, 6), {"kernel_shape": [1, 1], "strides": [2, 2]}),
]


@pytest.mark.parametrize(("weight", "image", "attributes"), CONV)
@pytest.mark.parametrize("batch", [1, 3])
def test_conv(weight: tuple[int, ...], image: tuple[int, ...], attributes: dict[str, Any], batch: int) -> None:
    image = tuple(n + batch for n in image)
    inputs = [made(batch, weight[1] * attributes.get("group", 1), *image), made(*weight), made(weight[0])]
    agree(*one_node("Conv", inputs, stored=(1, 2), **attributes))
    agree(*one_node("Conv", inputs[:2], **attributes, opset=11))


TRANSPOSED: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((3, 4, 3, 3), (4, 5), {}),
    ((3, 4, 3, 3), (4, 5), {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]}),
    ((3, 4, 4, 4), (4, 5), {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
    ((3, 4, 3, 3), (4, 5), {"strides": [2, 2], "pads": [0, 0, 1, 1]}),
    ((3, 4, 3, 3), (4, 5), {"strides": [2, 3], "pads": [1, 0, 0, 1]}),
    ((3, 4, 3, 3), (4, 5), {"strides": [3, 2], "auto_pad": "SAME_UPPER"}),
    ((3, 4, 4, 3), (4, 5), {"strides": [2, 2], "auto_pad": "SAME_LOWER"}),
    ((3, 4, 3, 3), (4, 5), {"strides": [3, 2], "output_shape": [10, 8]}),
    ((3, 4, 3, 3), (4, 5), {"strides": [3, 2], "output_shape": [11, 10], "auto_pad": "SAME_UPPER"}),
    ((3, 4, 3, 3), (4, 5), {"strides": [2, 2], "dilations": [2, 2], "pads": [2, 2, 2, 2], "output_padding": [1, 0]}),
    ((4, 2, 3, 3), (4, 5), {"group": 2, "strides": [2, 2], "pads": [1, 0, 0, 0]}),
    ((3, 4, 5), (7,), {"strides": [3], "pads": [1, 2]}),
    ((3, 2, 2, 3, 2), (3, 4, 3), {"strides": [2, 1, 2], "pads": [0, 1, 0, 0, 1, 1]}),
]


@pytest.mark.parametrize(("weight", "image", "attributes"), TRANSPOSED)
@pytest.mark.parametrize("batch", [1, 3])
def test_conv_transpose(
    weight: tuple[int, ...], image: tuple[int, ...], attributes: dict[str, Any], batch: int
) -> None:
    if "output_shape" not in attributes:
        image = tuple(n + batch for n in image)
    inputs = [made(batch, weight[0], *image), made(*weight), made(weight[1] * attributes.get("group", 1))]
    agree(*one_node("ConvTranspose", inputs, stored=(1, 2), **attributes))
    agree(*one_node("ConvTranspose", inputs[:2], stored=(1,), **attributes, opset=11))


FUSED = [
    ("Relu", []),
    ("Tanh", []),
    ("Sigmoid", []),
    ("LeakyRelu", [0.3]),
    ("Clip", [-0.5, 0.7]),
    ("HardSigmoid", [0.3, 0.4]),
]


@pytest.mark.parametrize(("activation", "parameters"), FUSED)
@pytest.mark.parametrize("added", [False, True])
def test_fused_conv(activation: str, parameters: list[float], added: bool) -> None:
    inputs = [made(2, 3, 6, 7), made(4, 3, 3, 3), made(4), *([made(2, 4, 6, 7)] if added else [])]
    more = {"activation": activation, "pads": [1, 1, 1, 1], **({"activation_params": parameters} if parameters else {})}
    agree(*one_node("FusedConv", inputs, stored=(1, 2), domain="com.microsoft", **more))


DEFORM: list[dict[str, Any]] = [
    {},
    {"pads": [1, 0, 1, 1], "strides": [2, 1], "dilations": [1, 2]},
    {"group": 2, "offset_group": 2, "pads": [1, 1, 1, 1]},
]

SMALL = {"group": 2, "offset_group": 2, "pads": [1, 0, 0, 0]}


def deformed(
    attributes: dict[str, Any], *, mask: bool, batch: int = 2, channels: int = 4, size: tuple[int, int] = (6, 7)
) -> list[np.ndarray | None]:
    """Inputs whose offsets keep away from whole pixels, where bilinear interpolation has no derivative."""
    x, w = made(batch, channels, *size), made(4, channels // attributes.get("group", 1), 3, 2)
    pads, strides, dilations = (
        attributes.get(k, d) for k, d in (("pads", [0] * 4), ("strides", [1, 1]), ("dilations", [1, 1]))
    )
    rows, columns = (
        (n + pads[k] + pads[2 + k] - dilations[k] * (w.shape[2 + k] - 1) - 1) // strides[k] + 1
        for k, n in enumerate(size)
    )
    taps = 6 * attributes.get("offset_group", 1)
    shape = (batch, 2 * taps, rows, columns)
    offset = RNG.integers(-2, 2, shape) + RNG.uniform(0.2, 0.8, shape)
    scale = RNG.uniform(0.2, 1, (batch, taps, rows, columns)).astype(np.float32) if mask else None
    return [x, w, offset.astype(np.float32), made(4), scale]


@pytest.mark.parametrize("attributes", DEFORM)
@pytest.mark.parametrize("mask", [False, True])
def test_deform_conv(attributes: dict[str, Any], mask: bool) -> None:
    inputs = deformed(attributes, mask=mask)
    agree(*one_node("DeformConv", inputs if mask else inputs[:4], stored=(1, 3), opset=19, **attributes))


def test_whole_offsets_shift_the_kernel() -> None:
    x, w = made(1, 2, 6, 6), made(3, 2, 1, 1)
    offset = np.broadcast_to(np.float32([[[[1]], [[2]]]]), (1, 2, 6, 6))
    model, fed = one_node("DeformConv", [x, w, offset], stored=(1,), opset=19)
    moved = np.zeros_like(x)
    moved[:, :, :5, :4] = x[:, :, 1:, 2:]
    wanted = torch.nn.functional.conv2d(torch.from_numpy(moved), torch.from_numpy(w))
    torch.testing.assert_close(mirror(model)(*map(torch.from_numpy, map(np.array, fed.values()))), wanted)


@pytest.mark.parametrize(
    ("op", "inputs", "attributes"),
    [
        (
            "Conv",
            [made(1, 2, 4, 3), made(2, 1, 3, 2), made(2)],
            {"group": 2, "auto_pad": "SAME_UPPER", "strides": [2, 1]},
        ),
        ("ConvTranspose", [made(2, 2, 3, 2), made(2, 2, 3, 2), made(2)], {"strides": [2, 3], "pads": [2, 0, 0, 1]}),
        ("ConvTranspose", [made(1, 2, 3, 2), made(2, 2, 3, 2), made(2)], {"strides": [2, 3], "output_shape": [8, 6]}),
        ("DeformConv", deformed(SMALL, mask=True, batch=1, channels=2, size=(2, 3)), {**SMALL, "opset": 19}),
    ],
)
def test_derivatives(op: str, inputs: list[np.ndarray | None], attributes: dict[str, Any]) -> None:
    differentiable(op, inputs, **attributes)


def test_what_torch_has_stays_one_call() -> None:
    model, _ = one_node("Conv", [made(1, 3, 8, 8), made(4, 3, 3, 3)], stored=(1,), pads=[1, 1, 1, 1])
    assert [n.target for n in mirror(model).graph.nodes if n.op == "call_function"] == [torch.conv2d]
    model, _ = one_node(
        "ConvTranspose", [made(1, 3, 8, 8), made(3, 4, 3, 3)], stored=(1,), pads=[1, 1, 0, 0], strides=[2, 2]
    )
    assert "conv_transpose2d" in mirror(model).code and "pad(" not in mirror(model).code


def test_a_convolution_over_four_axes_is_named() -> None:
    model, _ = one_node("Conv", [made(1, 2, 3, 3, 3, 3), made(2, 2, 1, 1, 1, 1)], stored=(1,))
    with pytest.raises(NotMirrored, match="4 axes"):
        mirror(model)
