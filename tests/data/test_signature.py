"""What of a model's declarations the data is checked against."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxprune import DataError, load
from onnxprune.data import Port, Signature, signature_of


def test_ports_are_the_declared_ones(tiny_cnn_model: onnx.ModelProto) -> None:
    signature = signature_of(load(tiny_cnn_model))
    assert signature.inputs == (Port("image", np.dtype(np.float32), (None, 3, 16, 16)),)
    assert signature.outputs == (Port("logits", np.dtype(np.float32), (None, 10)),)
    assert str(signature.inputs[0]) == "(N,3,16,16)"


def model(inputs: list[onnx.ValueInfoProto]) -> onnx.ModelProto:
    nodes = [helper.make_node("Identity", [v.name], [f"{v.name}_out"]) for v in inputs]
    outputs = [onnx.ValueInfoProto() for _ in inputs]
    for out, value in zip(outputs, inputs, strict=True):
        out.CopyFrom(value)
        out.name = f"{value.name}_out"
    made = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs), opset_imports=[helper.make_opsetid("", 17)]
    )
    made.ir_version = 8
    return made


def test_sizes_that_are_no_number_above_zero_are_free() -> None:
    value = helper.make_tensor_value_info("ids", TensorProto.INT64, [-1, 0, "seq", None, 4])
    text = helper.make_tensor_value_info("text", TensorProto.STRING, ["n"])
    ids, words = signature_of(load(model([value, text]))).inputs
    assert (ids.dtype, ids.shape) == (np.int64, (None, None, None, None, 4))
    assert (words.dtype, words.shape) == (object, (None,))


def test_an_input_that_is_no_tensor_is_named() -> None:
    value = helper.make_tensor_sequence_value_info("boxes", TensorProto.FLOAT, None)
    with pytest.raises(DataError, match=r"input 'boxes' of the model is a sequence"):
        signature_of(load(model([value])))


@pytest.mark.parametrize(
    ("shapes", "batch", "whole"),
    [
        ([(None, 3), (None, 4)], None, False),
        ([(8, 3), (8, 4)], 8, False),
        ([(1, 3)], 1, False),
        ([(None, 5), (2, None, 128), ()], None, True),  # a voice activity detector: audio, state, sample rate
        ([(None, 5), ()], None, True),
        ([(4, 5), (2, 5)], None, True),
        ([(None, 5), (1, 5)], None, True),
        ([None, (None, 2)], None, False),
    ],
)
def test_the_batch_axis_is_the_leading_one_that_inputs_share(shapes: list, batch: int | None, whole: bool) -> None:
    ports = tuple(Port(f"i{k}", np.dtype(np.float32), s) for k, s in enumerate(shapes))
    signature = Signature(ports, ())
    assert (signature.batch, signature.whole) == (batch, whole)


def test_a_caller_may_free_or_fix_the_batch() -> None:
    signature = Signature((Port("x", np.dtype(np.float32), (1, 3)),), ())
    assert signature.with_batch(None).inputs[0].shape == (None, 3)
    assert signature.with_batch(16).batch == 16
    with pytest.raises(DataError, match="share no batch axis"):
        Signature((Port("x", np.dtype(np.float32), ()),), ()).with_batch(2)
