"""A source as onnxruntime's quantizers read it, and as `open_data` takes it back."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import quantization

from onnxprune.data import CalibrationReader, Source, open_data
from tests.data.ports import marked, one

SIGNATURE = one(None, 2)


def reader(
    count: int = 5, *, batch: int = 1, samples: int | None = None, fixed: int | None = None
) -> CalibrationReader:
    data = {"x": marked(count, 2), "label": np.arange(count)}
    return CalibrationReader(open_data(data, one(fixed, 2)), batch=batch, samples=samples)


def numbers(given: CalibrationReader) -> list[list[int]]:
    """The samples of every feed up to the None."""
    return [[int(v) for v in feed["x"][:, 0]] for feed in iter(given.get_next, None)]


def test_feeds_hold_the_inputs_and_no_targets() -> None:
    feed = reader().get_next()
    assert feed is not None and set(feed) == {"x"} and feed["x"].dtype == np.float32


def test_a_pass_ends_with_none_and_another_begins() -> None:
    given = reader(3)
    assert numbers(given) == [[0], [1], [2]]
    assert numbers(given) == [[0], [1], [2]]


def test_rewinding_begins_anew() -> None:
    given = reader(3)
    given.get_next()
    given.rewind()
    assert numbers(given) == [[0], [1], [2]]


def test_iterating_leaves_get_next_where_it_is() -> None:
    given = reader(3)
    given.get_next()
    assert [int(f["x"][0, 0]) for f in given] == [0, 1, 2]
    assert numbers(given) == [[1], [2]]


@pytest.mark.parametrize(
    ("batch", "samples", "fixed", "feeds"),
    [
        (2, None, None, [[0, 1], [2, 3], [4]]),
        (2, 3, None, [[0, 1], [2, 3]]),
        (1, 2, None, [[0], [1]]),
        (1, 99, None, [[0], [1], [2], [3], [4]]),
        (1, None, 2, [[0, 1], [2, 3]]),
        (4, 2, 2, [[0, 1]]),
    ],
)
def test_feeds_have_the_size_asked_for_or_the_models_own(
    batch: int, samples: int | None, fixed: int | None, feeds: list[list[int]]
) -> None:
    given = reader(batch=batch, samples=samples, fixed=fixed)
    assert numbers(given) == feeds
    assert len(given) == len(feeds)


def test_a_range_of_feeds_as_strided_calibration_asks_for_it() -> None:
    given = reader(5)
    given.set_range(start_index=1, end_index=3)
    assert numbers(given) == [[1], [2]]
    given.set_range(start_index=3, end_index=5)
    assert numbers(given) == [[3], [4]]
    assert len(given) == 5


def test_a_deep_copy_reads_the_same_source_from_the_beginning() -> None:
    given = reader(3)
    given.get_next()
    other = copy.deepcopy(given)
    assert other.source is given.source
    assert numbers(other) == [[0], [1], [2]]
    assert numbers(given) == [[1], [2]]


def test_open_data_takes_the_source_of_a_reader_with_its_targets() -> None:
    given = reader(3)
    source = open_data(given, SIGNATURE)
    assert isinstance(source, Source) and source is given.source and source.targets == ("label",)


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"samples": 0}])
def test_there_are_no_feeds_of_nothing(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="no feeds of"):
        reader(**wrong)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """x (N,2) -> Gemm -> Relu -> Gemm -> y (N,3)."""
    rng = np.random.default_rng(0)
    arrays = {"w": (8, 2), "b": (8,), "v": (3, 8), "c": (3,)}
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["x", "w", "b"], ["h"], transB=1),
            helper.make_node("Relu", ["h"], ["a"]),
            helper.make_node("Gemm", ["a", "v", "c"], ["y"], transB=1),
        ],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])],
        [numpy_helper.from_array(rng.normal(size=s).astype(np.float32), n) for n, s in arrays.items()],
    )
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.mark.parametrize("strided", [False, True])
def test_onnxruntime_quantises_several_models_with_one_reader(model: Path, tmp_path: Path, strided: bool) -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(64, 2)).astype(np.float32)
    given = CalibrationReader.open(model, {"x": x}, samples=32)
    plain = ort.InferenceSession(str(model)).run(None, {"x": x})[0]
    for k in range(2):
        out = tmp_path / f"int8-{k}.onnx"
        extra = {"CalibStridedMinMax": 8} if strided else {}
        quantization.quantize_static(str(model), str(out), given, extra_options=extra)
        quantised = ort.InferenceSession(str(out)).run(None, {"x": x})[0]
        assert 0 < np.abs(quantised - plain).max() < 0.1 * np.abs(plain).max()
