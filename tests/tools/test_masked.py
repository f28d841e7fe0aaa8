"""Pruned networks put back into the original's shapes: right surgery equals them, wrong surgery does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from _masked import embedded, error_of, places, put_back
from onnx import TensorProto, helper, numpy_helper

RNG = np.random.default_rng(0)
W, V = RNG.normal(size=(8, 5)).astype(np.float32), RNG.normal(size=(3, 8)).astype(np.float32)
B = np.ones(8, np.float32)  # equal values: nobody can tell which are left
KEPT = np.array([0, 3, 4, 7])


def net(w: np.ndarray, b: np.ndarray, v: np.ndarray) -> onnx.ModelProto:
    """x (N,5) -> Gemm -> Sigmoid, which makes no zero of a zero -> Gemm -> y (N,3)."""
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["x", "w", "b"], ["h"], transB=1),
            helper.make_node("Sigmoid", ["h"], ["a"]),
            helper.make_node("Gemm", ["a", "v"], ["y"], transB=1),
        ],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])],
        [numpy_helper.from_array(np.ascontiguousarray(a), n) for n, a in (("w", w), ("b", b), ("v", v))],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def error(folder: Path, pruned: onnx.ModelProto) -> float:
    onnx.save(net(W, B, V), folder / "whole.onnx")
    onnx.save(pruned, folder / "small.onnx")
    return error_of(folder / "whole.onnx", folder / "small.onnx")


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1)])
def test_values_tell_from_where_a_part_came(axes: tuple[int, ...]) -> None:
    kept = [np.sort(RNG.permutation(size)[:3]) if k in axes else np.arange(size) for k, size in enumerate(W.shape)]
    found = places(W, W[np.ix_(*kept)])
    assert found is not None
    for expected, got in zip(kept, found, strict=True):
        np.testing.assert_array_equal(expected, got)


def test_a_pointwise_kernel_is_found() -> None:
    whole = np.random.default_rng(1).normal(size=(128, 256, 1, 1)).astype(np.float32)
    found = places(whole, whole[1::2])
    assert found is not None
    np.testing.assert_array_equal(found[0], np.arange(1, 128, 2))


@pytest.mark.parametrize("part", [W[:4] + 1, np.ones((4, 5), np.float32), W[:4, None]])
def test_what_is_no_part_has_no_place(part: np.ndarray) -> None:
    assert places(W, part) is None


def test_equal_values_have_no_place() -> None:
    assert places(B, B[:4]) is None


def test_groups_of_a_convolution_may_be_cut_each_at_its_own_places() -> None:
    whole = RNG.normal(size=(4, 6, 3, 3)).astype(np.float32)
    part = np.stack([whole[0, [0, 2]], whole[1, [0, 2]], whole[2, [1, 5]], whole[3, [1, 5]]])
    back = put_back(whole, part)
    assert back is not None
    np.testing.assert_array_equal(
        np.abs(back).sum(axis=(2, 3)) > 0, [[1, 0, 1, 0, 0, 0]] * 2 + [[0, 1, 0, 0, 0, 1]] * 2
    )
    np.testing.assert_array_equal(back[back != 0], part.ravel())
    assert put_back(whole, part + 1) is None


def test_right_surgery_equals_the_original_with_zeros(tmp_path: Path) -> None:
    assert error(tmp_path, net(W[KEPT], B[KEPT], V[:, KEPT])) < 1e-6


def test_surgery_that_keeps_other_inputs_than_outputs_is_found_out(tmp_path: Path) -> None:
    assert error(tmp_path, net(W[KEPT], B[KEPT], V[:, :4])) > 0.01


def test_weights_that_come_from_nowhere_are_told() -> None:
    with pytest.raises(ValueError, match="'v' .* is no part of the original's"):
        embedded(net(W, B, V), net(W[KEPT], B[KEPT], V[:, KEPT] + 1))
