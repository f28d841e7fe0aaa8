"""Writing a model: byte for byte what was meant, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxprune.errors import UsageError, VerificationFailed
from onnxprune.model.load import open_model, stored_tensors
from onnxprune.model.payload import Computed
from onnxprune.model.save import place, to_proto, write
from tests.graphs import from_text


@pytest.fixture
def model() -> onnx.ModelProto:
    made = from_text(
        """(float[N,40] x) => (float[N,4] y) {
        a = MatMul(x, w1)
        h = Cast<to=1>(half)
        b = Mul(a, h)
        y = MatMul(b, w2)
    }""",
        w1=(40, 32),
        w2=(32, 4),
        half=np.linspace(0, 1, 32).astype(np.float16),
    )
    big = np.arange(3000, dtype=np.float32)
    made.graph.node.append(helper.make_node("Constant", [], ["unread"], value=numpy_helper.from_array(big, "inner")))
    made.graph.initializer[0].doc_string = "the first weight"
    made.metadata_props.add(key="k", value="v")
    return made


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("source", ["file", "proto"])
def test_what_is_written_is_what_was_read(model: onnx.ModelProto, tmp_path: Path, external: bool, source: str) -> None:
    onnx.save(model, tmp_path / "in.onnx")
    opened = open_model(tmp_path / "in.onnx" if source == "file" else model)
    size = write(opened, tmp_path / "out.onnx", external=external)
    files = sorted(p.name for p in tmp_path.glob("out*"))
    assert files == (["out.onnx", "out.onnx.data"] if external else ["out.onnx"])
    assert size == sum((tmp_path / f).stat().st_size for f in files)
    found = onnx.load(tmp_path / "out.onnx")
    for tensor in stored_tensors(found.graph):
        tensor.ClearField("data_location")  # onnx.load leaves it set
    assert found == model
    onnx.checker.check_model(str(tmp_path / "out.onnx"))


def test_in_memory_it_is_the_same_model(model: onnx.ModelProto, tmp_path: Path) -> None:
    onnx.save(model, tmp_path / "in.onnx")
    assert to_proto(open_model(tmp_path / "in.onnx")) == model


def test_external_tensors_start_at_page_boundaries(model: onnx.ModelProto, tmp_path: Path) -> None:
    write(open_model(model), tmp_path / "out.onnx", external=True)
    proto = onnx.load(tmp_path / "out.onnx", load_external_data=False)
    entries = [{e.key: e.value for e in t.external_data} for t in proto.graph.initializer if t.external_data]
    assert entries and all(int(e["offset"]) % 4096 == 0 and e["location"] == "out.onnx.data" for e in entries)


@pytest.mark.parametrize(
    "elem",
    [
        TensorProto.FLOAT16,
        TensorProto.BFLOAT16,
        TensorProto.INT8,
        TensorProto.UINT4,
        TensorProto.INT4,
        TensorProto.FLOAT8E4M3FN,
        TensorProto.BOOL,
        TensorProto.INT64,
    ],
)
def test_every_element_type_survives(tmp_path: Path, elem: int) -> None:
    dtype = helper.tensor_dtype_to_np_dtype(elem)
    array = (np.arange(4001) % 7).astype(dtype)
    proto = from_text("(float[5] x) => (float[5] y) { y = Relu(x) }", opset=21, ir=10)
    tensor = numpy_helper.from_array(array, "w")
    assert tensor.data_type == elem
    proto.graph.initializer.append(tensor)
    opened = open_model(proto)
    stored = opened.proto.graph.initializer[0]
    opened.attach(stored, Computed(lambda: array[:3001]))
    stored.dims[0] = 3001
    write(opened, tmp_path / "out.onnx")
    found = onnx.load(tmp_path / "out.onnx").graph.initializer[0]
    assert found.raw_data == numpy_helper.from_array(array[:3001], "w").raw_data


def test_a_payload_of_the_wrong_size_is_never_written_as_if_it_fitted(model: onnx.ModelProto, tmp_path: Path) -> None:
    opened = open_model(model)
    opened.attach(opened.proto.graph.initializer[0], Computed(lambda: np.zeros(7, np.float32)))
    with pytest.raises(AssertionError, match="28 bytes, not 5120"):
        write(opened, tmp_path / "out.onnx")


class TestPlace:
    """The output appears whole or not at all."""

    def test_files_appear_with_their_content(self, tmp_path: Path) -> None:
        def produce(path: Path) -> None:
            path.write_bytes(b"model")
            (path.parent / f"{path.name}.data").write_bytes(b"data")

        place(tmp_path / "m.onnx", produce)
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"m.onnx": b"model", "m.onnx.data": b"data"}

    @pytest.mark.parametrize(
        "error", [VerificationFailed("no"), KeyboardInterrupt(), RuntimeError("bug"), OSError(28, "full")]
    )
    def test_a_failure_leaves_nothing_and_keeps_what_was_there(self, tmp_path: Path, error: BaseException) -> None:
        target = tmp_path / "m.onnx"
        target.write_bytes(b"old")

        def produce(path: Path) -> None:
            path.write_bytes(b"half a model")
            raise error

        with pytest.raises((type(error), UsageError)):
            place(target, produce)
        assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("m.onnx", b"old")]

    def test_an_existing_output_is_replaced_at_once(self, tmp_path: Path) -> None:
        target = tmp_path / "m.onnx"
        target.write_bytes(b"old")
        with target.open("rb") as reader:
            place(target, lambda path: path.write_bytes(b"new") and None)
            assert reader.read() == b"old", "a reader of the old file is not disturbed"
        assert target.read_bytes() == b"new"
