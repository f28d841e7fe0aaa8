"""The skeleton of a serialised model is the model without the bytes of its large tensors; garbage is Malformed."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxprune.errors import OnnxPruneError
from onnxprune.model.load import stored_tensors
from onnxprune.model.wire import INLINE_LIMIT, Malformed, field, reference, skeleton, varint
from onnxprune.pipeline import inspect
from tests.graphs import from_text

LARGE = INLINE_LIMIT // 4 + 1  # float32 elements that no longer fit


def with_weights(*tensors: TensorProto) -> onnx.ModelProto:
    model = from_text("(float[N,5] x) => (float[N,5] y) { y = Relu(x) }")
    model.graph.initializer.extend(tensors)
    return model


def restored(data: bytes) -> onnx.ModelProto:
    """The skeleton with every payload put back as raw data."""
    bare, payloads = skeleton(memoryview(data))
    model = onnx.ModelProto.FromString(bare)
    places = {reference(k): place for k, place in enumerate(payloads)}
    for tensor in stored_tensors(model.graph):
        if tensor.data_location == TensorProto.EXTERNAL:
            at, length = places.pop(tensor.external_data[0].value)
            del tensor.external_data[:]
            tensor.ClearField("data_location")
            tensor.raw_data = data[at : at + length]
    assert not places, "every payload is referred to once"
    return model


class TestSkeleton:
    """Large payloads are left out, and nothing else."""

    def test_a_model_of_small_tensors_is_its_own_skeleton(self) -> None:
        data = with_weights(numpy_helper.from_array(np.zeros(8, np.float32), "w")).SerializeToString()
        assert skeleton(memoryview(data)) == (data, [])

    @pytest.mark.parametrize("count", [LARGE - 1, LARGE, 10 * LARGE])
    def test_raw_data_above_the_limit_is_referenced(self, count: int) -> None:
        array = np.arange(count, dtype=np.float32)
        model = with_weights(numpy_helper.from_array(array, "w"))
        data = model.SerializeToString()
        bare, payloads = skeleton(memoryview(data))
        assert len(payloads) == (count * 4 > INLINE_LIMIT)
        for at, length in payloads:
            assert data[at : at + length] == array.tobytes()
            assert len(bare) < len(data) - length + 200
        assert restored(data) == model

    def test_packed_float_data_are_the_same_bytes_as_raw_data(self) -> None:
        values = np.linspace(-1, 1, LARGE, dtype=np.float32)
        model = with_weights(helper.make_tensor("w", TensorProto.FLOAT, [LARGE], values))
        tensor = restored(model.SerializeToString()).graph.initializer[0]
        assert tensor.raw_data == values.tobytes() and not tensor.float_data

    def test_constants_attributes_and_bodies_are_reached(self) -> None:
        array = np.arange(2 * LARGE, dtype=np.float32)
        inner = helper.make_graph(
            [helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(array, "c"))],
            "body",
            [],
            [helper.make_tensor_value_info("c", TensorProto.FLOAT, [2 * LARGE])],
            [numpy_helper.from_array(array + 1, "i")],
        )
        model = with_weights()
        model.graph.node.append(helper.make_node("If", ["b"], ["z"], then_branch=inner, else_branch=inner))
        data = model.SerializeToString()
        assert len(skeleton(memoryview(data))[1]) == 4
        assert restored(data) == model

    def test_fields_from_the_future_are_carried_along(self) -> None:
        data = with_weights(numpy_helper.from_array(np.zeros(LARGE, np.float32), "w")).SerializeToString()
        unknown = field(999, b"from a later version") + varint(998 << 3) + varint(77)
        bare, payloads = skeleton(memoryview(data + unknown))
        assert bare.endswith(unknown) and len(payloads) == 1


def arrays() -> st.SearchStrategy[np.ndarray]:
    types = st.sampled_from([np.float32, np.float64, np.float16, np.int64, np.int8, np.bool_])
    return st.builds(lambda n, t: np.arange(n).astype(t), st.sampled_from([0, 1, 7, 256, 257, 1025, 2000]), types)


@given(st.lists(arrays(), max_size=5), st.text(max_size=300))
@settings(deadline=None)
def test_a_skeleton_with_its_payloads_is_the_model(tensors: list[np.ndarray], note: str) -> None:
    model = with_weights(*(numpy_helper.from_array(a, f"w{k}") for k, a in enumerate(tensors)))
    model.doc_string = note
    assert restored(model.SerializeToString()) == model


@given(st.binary(max_size=400))
@example(b"")
@example(b"\xff" * 20)
@example(b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f")
@settings(deadline=None, max_examples=300)
def test_any_bytes_are_a_message_or_malformed(data: bytes) -> None:
    try:
        bare, payloads = skeleton(memoryview(data))
    except Malformed:
        return
    assert bare == data and payloads == []


SAMPLE = with_weights(
    numpy_helper.from_array(np.arange(2 * LARGE, dtype=np.float32), "w"),
    numpy_helper.from_array(np.arange(5, dtype=np.float32), "v"),
).SerializeToString()


@given(st.integers(0, len(SAMPLE) - 1))
@settings(deadline=None, max_examples=200)
def test_a_truncated_model_is_malformed_unless_it_ends_between_two_fields(length: int) -> None:
    try:
        bare, _ = skeleton(memoryview(SAMPLE[:length]))
    except Malformed:
        return
    onnx.ModelProto.FromString(bare)


DAMAGED = from_text(
    """(float[N,5] x) => (float[N,4] y) {
        a = MatMul(x, w1)
        s = Shape(a)
        r = Reshape(a, s)
        e = Einsum<equation="ij,jk->ik">(r, w2)
        y = Add(e, b)
    }""",
    w1=(5, LARGE),
    w2=(LARGE, 4),
    b=(4,),
).SerializeToString()


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_a_damaged_file_is_inspected_or_refused_with_a_reason(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Bytes changed, removed or added anywhere: never anything but ModelRejected."""
    path = tmp_path_factory.getbasetemp() / "damaged.onnx"
    damaged = bytearray(DAMAGED)
    skip = data.draw(st.booleans(), label="leave the weights alone")
    readable = [k for k in range(len(damaged)) if not skip or k < 400 or k > len(damaged) - 300]
    for _ in range(data.draw(st.integers(1, 4))):
        at = min(data.draw(st.sampled_from(readable)), len(damaged) - 1)
        way = data.draw(st.sampled_from(["change", "remove", "insert", "truncate"]))
        if way == "change":
            damaged[at] = data.draw(st.integers(0, 255))
        elif way == "remove":
            del damaged[at : at + data.draw(st.integers(1, 9))]
        elif way == "insert":
            damaged[at:at] = data.draw(st.binary(min_size=1, max_size=9))
        else:
            del damaged[max(at, 1) :]
        damaged = damaged or bytearray(b"\0")
    path.write_bytes(damaged)
    try:
        inspect(path)
    except OnnxPruneError as error:
        assert error.exit_code == 3 and str(error)


@given(st.integers(0, 2**63))
def test_varints_are_protobufs(value: int) -> None:
    """field 1, wire type 0, as protobuf itself writes it."""
    known = onnx.OperatorSetIdProto(version=value if value < 2**63 else 0)
    if value < 2**63 and value:
        assert known.SerializeToString() == varint(2 << 3) + varint(value)


def test_protobuf_agrees_on_what_is_no_message() -> None:
    """Whatever skeleton takes for malformed, protobuf does not parse either."""
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(2000):
        data = rng.integers(0, 256, rng.integers(1, 40)).astype(np.uint8).tobytes()
        try:
            skeleton(memoryview(data))
        except Malformed:
            refused += 1
            with pytest.raises(DecodeError):
                onnx.ModelProto.FromString(data)
    assert refused > 100
