"""Opening a model: what is accepted, what is refused and why, and that nothing is copied or changed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxprune.errors import ModelRejected
from onnxprune.model.load import load
from tests.graphs import from_text

MODEL = "(float[N,40] x) => (float[N,4] y) { a = MatMul(x, w1)\n y = MatMul(a, w2) }"


@pytest.fixture
def model() -> onnx.ModelProto:
    return from_text(MODEL, w1=(40, 32), w2=(32, 4))


def test_a_file_and_a_proto_give_the_same_graph(model: onnx.ModelProto, tmp_path: Path) -> None:
    onnx.save(model, tmp_path / "m.onnx")
    for graph in (load(tmp_path / "m.onnx"), load(str(tmp_path / "m.onnx")), load(model)):
        assert graph.inputs == ("x",) and graph.outputs == ("y",)
        assert {k: p.shape for k, p in graph.parameters.items()} == {"w1": (40, 32), "w2": (32, 4)}
        assert np.array_equal(graph.array("w1"), numpy_helper.to_array(model.graph.initializer[0]))
        assert graph.shapes["a"][1] == 32 and not graph.problems


def test_weights_of_a_file_are_mapped_and_read_only(model: onnx.ModelProto, tmp_path: Path) -> None:
    onnx.save(model, tmp_path / "m.onnx")
    array = load(tmp_path / "m.onnx").array("w1")
    assert not array.flags.writeable and not array.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0


def test_external_data(model: onnx.ModelProto, tmp_path: Path) -> None:
    expected = numpy_helper.to_array(model.graph.initializer[0])
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.bin", size_threshold=0)
    graph = load(tmp_path / "m.onnx")
    assert np.array_equal(graph.array("w1"), expected)
    assert graph.model.nbytes == (tmp_path / "m.onnx").stat().st_size + (tmp_path / "m.bin").stat().st_size


class TestRefused:
    """ModelRejected says what was expected and what was found."""

    def refused(self, source: object, *words: str) -> None:
        with pytest.raises(ModelRejected) as caught:
            load(source)  # type: ignore[arg-type]
        for word in words:
            assert word in str(caught.value), f"'{word}' is not in: {caught.value}"

    def test_no_file_a_folder_or_an_empty_one(self, tmp_path: Path) -> None:
        (tmp_path / "empty.onnx").touch()
        self.refused(tmp_path / "none.onnx", "none.onnx", "does not exist")
        self.refused(tmp_path, "folder")
        self.refused(tmp_path / "empty.onnx", "empty")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_a_file_without_permission(self, model: onnx.ModelProto, tmp_path: Path) -> None:
        onnx.save(model, tmp_path / "m.onnx")
        (tmp_path / "m.onnx").chmod(0)
        self.refused(tmp_path / "m.onnx", "can't be read")

    @pytest.mark.parametrize(
        "content", [b"\x89PNG\r\n", b"PK\x03\x04zip", b"{}", b"version https://git-lfs.github.com"]
    )
    def test_files_of_other_kinds(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "m.onnx").write_bytes(content * 20)
        self.refused(tmp_path / "m.onnx", "not an ONNX model")

    def test_a_truncated_file(self, model: onnx.ModelProto, tmp_path: Path) -> None:
        data = model.SerializeToString()
        (tmp_path / "m.onnx").write_bytes(data[: len(data) // 2])
        self.refused(tmp_path / "m.onnx", "not an ONNX model")

    def test_a_model_without_graph_or_opset(self, tmp_path: Path) -> None:
        (tmp_path / "m.onnx").write_bytes(onnx.ModelProto(ir_version=8, producer_name="x").SerializeToString())
        self.refused(tmp_path / "m.onnx", "no graph")

    def test_an_old_opset(self) -> None:
        self.refused(from_text("(float[5] x) => (float[5] y) { y = Relu(x) }", opset=6), "opset 6", "older")

    def test_a_tensor_that_nothing_makes(self) -> None:
        self.refused(from_text("(float[5] x) => (float[5] y) { y = Add(x, ghost) }"), "ghost", "nothing makes")
        self.refused(from_text("(float[5] x) => (float[5] y, float[5] z) { y = Relu(x) }"), "'z'")

    def test_two_initializers_of_one_name(self, model: onnx.ModelProto) -> None:
        model.graph.initializer.append(model.graph.initializer[0])
        self.refused(model, "w1", "two initializers")

    def test_two_nodes_that_make_one_tensor(self) -> None:
        self.refused(from_text("(float[5] x) => (float[5] y) { t = Relu(x)\n t = Neg(x)\n y = Abs(t) }"), "'t'")

    def test_a_cycle(self) -> None:
        self.refused(from_text("(float[5] x) => (float[5] y) { a = Add(x, b)\n b = Relu(a)\n y = Abs(b) }"))

    def test_a_tensor_shorter_than_its_shape(self, tmp_path: Path) -> None:
        model = from_text(MODEL, w2=(32, 4))
        model.graph.initializer.append(TensorProto(name="w1", data_type=1, dims=[40, 32], raw_data=b"\0" * 4000))
        onnx.save(model, tmp_path / "m.onnx")
        with pytest.raises(ModelRejected, match="4000"):
            load(tmp_path / "m.onnx").array("w1")

    def test_external_data_outside_of_the_folder(self, model: onnx.ModelProto, tmp_path: Path) -> None:
        secret = tmp_path / "secret.bin"
        secret.write_bytes(bytes(40 * 32 * 4))
        folder = tmp_path / "models"
        folder.mkdir()
        for location in ("../secret.bin", str(secret)):
            onnx.save(self.pointing(model, location), folder / "m.onnx")
            self.refused(folder / "m.onnx", "outside")
        (folder / "link.bin").symlink_to(secret)
        onnx.save(self.pointing(model, "link.bin"), folder / "m.onnx")
        self.refused(folder / "m.onnx", "outside")

    def test_external_data_that_is_missing_or_too_short(self, model: onnx.ModelProto, tmp_path: Path) -> None:
        onnx.save(self.pointing(model, "w.bin"), tmp_path / "m.onnx")
        self.refused(tmp_path / "m.onnx", "w.bin", "missing")
        (tmp_path / "w.bin").write_bytes(b"\0" * 100)
        self.refused(tmp_path / "m.onnx", "w1", "5120", "100")

    @pytest.mark.parametrize(("key", "value"), [("offset", "-4"), ("offset", "x"), ("length", "12"), ("length", "y")])
    def test_external_data_with_wrong_numbers(
        self, model: onnx.ModelProto, tmp_path: Path, key: str, value: str
    ) -> None:
        (tmp_path / "w.bin").write_bytes(bytes(40 * 32 * 4))
        onnx.save(self.pointing(model, "w.bin", **{key: value}), tmp_path / "m.onnx")
        self.refused(tmp_path / "m.onnx", "w1")

    def test_a_proto_whose_data_lie_elsewhere(self, model: onnx.ModelProto) -> None:
        self.refused(self.pointing(model, "w.bin"), "w1", "external")

    @staticmethod
    def pointing(model: onnx.ModelProto, location: str, **entries: str) -> onnx.ModelProto:
        changed = onnx.ModelProto()
        changed.CopyFrom(model)
        tensor = changed.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": location, **entries}.items():
            tensor.external_data.add(key=key, value=value)
        return changed


class TestShapes:
    """What is known of tensors without running the model."""

    def test_symbolic_dimensions_are_pinned_and_may_be_given(self) -> None:
        model = from_text("(float[N,T,5] x) => (float[N,T,4] y) { y = MatMul(x, w) }", w=(5, 4))
        graph = load(model)
        assert graph.shapes["y"] == (graph.pins["N"], graph.pins["T"], 4)
        assert load(model, pins={"N": 3, "T": 6}).shapes["y"] == (3, 6, 4)

    def test_shape_arithmetic_folds_to_values(self) -> None:
        graph = load(
            from_text(
                """(float[N,6] x) => (float[N,2,3] y) {
            s = Shape(x)
            n = Gather(s, zero)
            u = Unsqueeze(n, axis)
            t = Concat<axis=0>(u, rest)
            y = Reshape(x, t)
        }""",
                zero=np.array(0),
                axis=np.array([0]),
                rest=np.array([2, 3]),
            )
        )
        assert graph.values["t"].tolist() == [graph.pins["N"], 2, 3]
        assert graph.shapes["y"] == (graph.pins["N"], 2, 3)

    def test_scalars_stay_scalars(self) -> None:
        graph = load(
            from_text(
                """(float[5] x) => (float[5] y) {
            r = Range(zero, five, one)
            y = Mul(x, r)
        }""",
                zero=np.array(0, np.float32),
                five=np.array(5, np.float32),
                one=np.array(1, np.float32),
            )
        )
        assert graph.shapes["r"] == (5,) and not graph.problems

    def test_an_operator_without_inference_takes_the_declared_shape(self) -> None:
        model = from_text(
            "(float[N,5] x) => (float[N,4] y) <float[N,8] a> { a = com.microsoft.Mystery(x)\n y = MatMul(a, w) }",
            microsoft=True,
            w=(8, 4),
        )
        graph = load(model)
        assert graph.shapes["a"] == (graph.pins["N"], 8)

    def test_nodes_are_indexed_in_topological_order(self) -> None:
        model = from_text("(float[5] x) => (float[5] y) { a = Relu(x)\n b = Abs(a)\n y = Neg(b) }")
        nodes = list(model.graph.node)
        del model.graph.node[:]
        model.graph.node.extend(nodes[::-1])
        assert [n.op for n in load(model).nodes] == ["Relu", "Abs", "Neg"]

    def test_a_tensor_that_a_body_captures_comes_before_it(self) -> None:
        body = helper.make_graph(
            [helper.make_node("Neg", ["a"], ["t"])],
            "body",
            [],
            [helper.make_tensor_value_info("t", TensorProto.FLOAT, [5])],
        )
        model = from_text("(float[5] x, bool c) => (float[5] y) { a = Relu(x) }")
        model.graph.node.insert(0, helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body))
        graph = load(model)
        assert [n.op for n in graph.nodes] == ["Relu", "If"] and graph.nodes[1].captured == ("a",)
