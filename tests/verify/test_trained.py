"""What `verify` says of a file that was trained after the surgery: other weights are all that it may have."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import onnxprune
from onnxprune.accuracy import TRAINED_KEY
from onnxprune.errors import VerificationFailed
from onnxprune.verify.trained import NOTE


def array(rng: np.random.Generator, name: str, *shape: int) -> TensorProto:
    return numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)


def original() -> ModelProto:
    """(N,8) to (N,4): BatchNormalization, a weight in a Constant node, one in a branch, one of integers, a reshape."""
    rng = np.random.default_rng(0)
    branch = [
        helper.make_graph(
            [helper.make_node("Mul", ["h", f"gain_{name}"], [name], f"mul_{name}")],
            name,
            [],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)],
            [array(rng, f"gain_{name}", 4)],
        )
        for name in ("yes", "no")
    ]
    stored = numpy_helper.from_array(rng.integers(-100, 100, (8, 4)).astype(np.int8), "q")
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["g"], "fc1"),
        helper.make_node("BatchNormalization", ["g", "scale", "shift", "mean", "variance"], ["n"], "bn"),
        helper.make_node("Relu", ["n"], ["r"], "relu"),
        helper.make_node("Constant", [], ["w2"], "w2_node", value=array(rng, "w2_value", 32, 8)),
        helper.make_node("MatMul", ["r", "w2"], ["m"], "fc2"),
        helper.make_node("Reshape", ["m", "rows"], ["s"], "reshape"),
        helper.make_node("DequantizeLinear", ["q", "q_scale", "q_zero"], ["w3"], "dequantise"),
        helper.make_node("MatMul", ["s", "w3"], ["h"], "fc3"),
        helper.make_node("If", ["which"], ["y"], "if", then_branch=branch[0], else_branch=branch[1]),
    ]
    tensors = [array(rng, "w1", 8, 32), array(rng, "b1", 32)]
    tensors += [array(rng, name, 32) for name in ("scale", "shift", "mean")]
    tensors.append(numpy_helper.from_array(rng.uniform(0.5, 2, 32).astype(np.float32), "variance"))
    tensors += [
        stored,
        numpy_helper.from_array(np.float32(0.02), "q_scale"),
        numpy_helper.from_array(np.int8(3), "q_zero"),
    ]
    tensors += [numpy_helper.from_array(np.array([-1, 8]), "rows"), numpy_helper.from_array(np.array(True), "which")]
    graph = helper.make_graph(
        nodes,
        "mixed",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A model, and what it is pruned to, with the mark of one that was trained."""
    model, pruned = tmp_path / "model.onnx", tmp_path / "pruned.onnx"
    onnx.save(original(), model)
    onnxprune.compress(model, pruned, target="params=0.7", align=1)
    change(pruned, lambda m: m.metadata_props.add(key=TRAINED_KEY, value=json.dumps({"loss": "auto", "steps": 1})))
    return model, pruned


def change(path: Path, how: Callable[[ModelProto], object]) -> None:
    model = onnx.load(path)
    how(model)
    onnx.save(model, path)


def stored(model: ModelProto, name: str) -> TensorProto:
    return next(t for t in model.graph.initializer if t.name == name)


def node(model: ModelProto, name: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.name == name)


def moved(tensor: TensorProto, by: float = 1) -> None:
    """Other numbers in the same place."""
    old = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(old + np.array(by, old.dtype), tensor.name))


WEIGHTS: dict[str, Callable[[ModelProto], object]] = {
    "weight": lambda m: moved(stored(m, "w1")),
    "bias": lambda m: moved(stored(m, "b1")),
    "running statistics": lambda m: (moved(stored(m, "mean")), moved(stored(m, "variance"))),
    "Constant node": lambda m: moved(node(m, "w2_node").attribute[0].t),
    "integers": lambda m: moved(stored(m, "q")),
    "branch": lambda m: moved(node(m, "if").attribute[0].g.initializer[0]),
}


@pytest.mark.parametrize("what", WEIGHTS)
def test_other_weights_pass(files: tuple[Path, Path], what: str) -> None:
    change(files[1], WEIGHTS[what])
    found = onnxprune.verify(*files)
    assert found.passed and found.notes[-1] == NOTE == "trained: weights not compared"


def put_attribute(model: ModelProto) -> None:
    node(model, "bn").attribute.append(helper.make_attribute("epsilon", 0.1))


def take_last(model: ModelProto) -> None:
    """The If goes, and its input becomes the output."""
    del model.graph.node[-1]
    model.graph.node[-1].output[0] = "y"


OTHERS: dict[str, tuple[Callable[[ModelProto], object], str]] = {
    "attribute": (put_attribute, "the node 'bn' is another"),
    "name": (lambda m: setattr(node(m, "relu"), "name", "other"), "the node 'other' is another"),
    "operator": (lambda m: setattr(node(m, "relu"), "op_type", "Sigmoid"), "the node 'relu' is another"),
    "node inside": (lambda m: setattr(node(m, "if").attribute[0].g.node[0], "op_type", "Add"), "_branch: the node 'mul_"),
    "nodes": (take_last, "it has 7 nodes instead of 8"),
    "constant": (lambda m: stored(m, "rows").CopyFrom(numpy_helper.from_array(np.array([-1, 4]), "rows")), "'rows'"),
    "scale": (lambda m: moved(stored(m, "q_scale")), "the constant 'q_scale' has other values"),
    "zero point": (lambda m: moved(stored(m, "q_zero")), "the constant 'q_zero' has other values"),
    "unused": (lambda m: m.graph.initializer.append(numpy_helper.from_array(np.ones(3), "more")), "in one of them only"),
    "input": (lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[0], "dim_param", "B"), "inputs are others"),
    "nan": (lambda m: moved(stored(m, "w1"), np.nan), "'w1' holds nan"),
    "shape": (lambda m: stored(m, "b1").CopyFrom(numpy_helper.from_array(np.ones(5, np.float32), "b1")), "'b1'"),
}  # fmt: skip


@pytest.mark.parametrize("what", OTHERS)
def test_anything_else_fails(files: tuple[Path, Path], what: str) -> None:
    how, words = OTHERS[what]
    change(files[1], how)
    with pytest.raises(VerificationFailed) as caught:
        onnxprune.verify(*files)
    assert words in str(caught.value)


def test_a_file_that_does_not_say_that_it_was_trained_is_compared(files: tuple[Path, Path]) -> None:
    change(files[1], lambda m: moved(stored(m, "w1")))
    change(files[1], lambda m: m.metadata_props.pop())
    with pytest.raises(VerificationFailed, match="differs from the masked original"):
        onnxprune.verify(*files)


def test_the_surgery_is_proved_whatever_the_weights_are(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rewriter that does something else is found out, though the file is what it gives."""
    trained = sys.modules["onnxprune.verify.trained"]  # onnxprune.verify is the function
    rewrite = trained.rewrite

    def wrong(*given: object) -> object:
        model = rewrite(*given)  # type: ignore[arg-type]
        moved(stored(model.proto, "b1"))
        return model

    monkeypatch.setattr(trained, "rewrite", wrong)
    with pytest.raises(VerificationFailed, match="differs from the masked original"):
        onnxprune.verify(*files)
