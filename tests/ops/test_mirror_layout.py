"""What rearranges, in the mirror: at sizes that the model does not state, with axes and sizes from anywhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from tests.ops.mirroring import agree, differentiable, one_node

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 3, 4)).astype(np.float32)
ONES = RNG.standard_normal((1, 3, 1, 4)).astype(np.float32)
IMAGE = RNG.standard_normal((2, 12, 4, 6)).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


CASES: list[tuple[str, list[Any], dict[str, Any]]] = [
    ("Reshape", [X, ints(0, -1)], {}),
    ("Reshape", [X, ints(4, 0, 2)], {}),
    ("Reshape", [X, ints(-1)], {"opset": 7}),
    ("Reshape", [np.zeros((0, 3), np.float32), ints(3, 0)], {"allowzero": 1}),
    *(("Flatten", [X], {"axis": axis}) for axis in (-3, -1, 0, 1, 2, 3)),
    ("Flatten", [X], {"opset": 7}),
    ("Transpose", [X], {}),
    ("Transpose", [X], {"perm": [1, 2, 0]}),
    ("Squeeze", [ONES], {}),
    ("Squeeze", [ONES, ints(-2)], {}),
    ("Squeeze", [ONES, ints(0, 2)], {}),
    ("Squeeze", [ONES], {"axes": [0], "opset": 11}),
    ("Unsqueeze", [X, ints(-1)], {}),
    ("Unsqueeze", [X, ints(3, 0)], {}),
    ("Unsqueeze", [X, ints(0, -2)], {}),
    ("Unsqueeze", [X], {"axes": [1, 3], "opset": 11}),
    ("Expand", [ONES, ints(2, 3, 5, 4)], {}),
    ("Expand", [ONES, ints(5, 1)], {}),
    ("Expand", [X, ints(2, 1, 1, 3, 4)], {}),
    ("Expand", [X, ints(2, 1, 4)], {"opset": 8}),
    ("Tile", [X, ints(1, 2, 3)], {}),
    ("DepthToSpace", [IMAGE], {"blocksize": 2}),
    ("DepthToSpace", [IMAGE], {"blocksize": 2, "mode": "CRD"}),
    ("SpaceToDepth", [IMAGE], {"blocksize": 2}),
]


@pytest.mark.parametrize(("op", "inputs", "attributes"), CASES)
def test_as_onnxruntime(op: str, inputs: list[Any], attributes: dict[str, Any]) -> None:
    agree(*one_node(op, inputs, stored=tuple(range(1, len(inputs))), **attributes))
    if len(inputs) > 1 and op not in ("Squeeze", "Unsqueeze"):  # whose rank would be unknown
        agree(*one_node(op, inputs, **attributes))


@pytest.mark.parametrize(("op", "axes"), [("Squeeze", ints(2)), ("Unsqueeze", ints(-1, 0))])
def test_axes_that_are_computed(op: str, axes: np.ndarray) -> None:
    agree(*one_node(op, [ONES, axes]))


@pytest.mark.parametrize(("sizes", "axes"), [((3, 2, 9), None), ((1, 6), [-1, 1]), ((2, 3, 4), None)])
def test_center_crop_pad(sizes: tuple[int, ...], axes: list[int] | None) -> None:
    more = {} if axes is None else {"axes": axes}
    for stored in ((), (1,)):
        agree(*one_node("CenterCropPad", [X, ints(*sizes)], stored=stored, opset=18, **more))


@pytest.mark.parametrize("batch", [1, 3])
def test_sizes_that_follow_the_input(batch: int) -> None:
    """Heads are split off, and a class token is repeated, for any number of samples and positions."""
    nodes = [
        helper.make_node("Shape", ["x"], ["n"], start=0, end=1),
        helper.make_node("Shape", ["x"], ["t"], start=1, end=2),
        helper.make_node("Concat", ["n", "t", "heads"], ["split"], axis=0),
        helper.make_node("Reshape", ["x", "split"], ["parts"]),
        helper.make_node("Transpose", ["parts"], ["y"], perm=[0, 2, 1, 3]),
        helper.make_node("Concat", ["n", "one", "one"], ["tokens"], axis=0),
        helper.make_node("Expand", ["token", "tokens"], ["z"]),
        helper.make_node("Tile", ["token", "tokens"], ["w"]),
    ]
    constants = [
        helper.make_tensor("heads", TensorProto.INT64, [2], [2, 4]),
        helper.make_tensor("one", TensorProto.INT64, [1], [1]),
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", "T", 8]),
        helper.make_tensor_value_info("token", TensorProto.FLOAT, [1, 1, 8]),
    ]
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("y", "z", "w")]
    graph = helper.make_graph(nodes, "heads", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    x = RNG.standard_normal((batch, 4 + batch, 8)).astype(np.float32)
    agree(model, {"x": x, "token": x[:1, :1]})


@pytest.mark.parametrize(
    ("op", "inputs", "attributes"),
    [c for c in CASES if c[1][0].size in range(1, 30)],
)
def test_derivatives(op: str, inputs: list[Any], attributes: dict[str, Any]) -> None:
    differentiable(op, inputs, stored=tuple(range(1, len(inputs))), **attributes)


def test_derivatives_of_blocks() -> None:
    small = IMAGE[:1, :4, :2, :2]
    for op, mode in (("DepthToSpace", "DCR"), ("DepthToSpace", "CRD"), ("SpaceToDepth", None)):
        differentiable(op, [small], blocksize=2, **({} if mode is None else {"mode": mode}))
    differentiable("CenterCropPad", [X, ints(3, 2, 6)], stored=(1,), opset=18)
