"""The proof: a wrong surgery is detected, a right one passes, and a stored plan lets anyone repeat it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxprune.axes.analysis import Analysis, analyse
from onnxprune.errors import ModelRejected, VerificationFailed
from onnxprune.model.load import load
from onnxprune.model.save import to_proto, write
from onnxprune.pipeline import compress, verify
from onnxprune.rewrite.rewrite import rewrite
from onnxprune.select.plan import METADATA_KEY, Plan
from onnxprune.verify.compare import difference
from onnxprune.verify.equivalence import TOLERANCES, prove, tolerance
from onnxprune.verify.reference import masked
from tests.graphs import from_text

MODEL = """(float[N,3,T,6] x) => (float[N,4,T,6] y) {
    a = Conv(x, w1, b1)
    r = Relu(a)
    c = Conv<pads=[1,1,1,1]>(r, w2)
    s = Sigmoid(c)
    y = Conv(s, w3, b3)
}"""
SHAPES = {"w1": (8, 3, 1, 1), "b1": (8,), "w2": (9, 8, 3, 3), "w3": (4, 9, 1, 1), "b3": (4,)}
KEEP = {"g0": np.array([0, 2, 3, 7]), "g1": np.array([1, 4, 5, 6, 8])}


@pytest.fixture
def model() -> onnx.ModelProto:
    return from_text(MODEL, **SHAPES)


@pytest.fixture
def surgery(model: onnx.ModelProto, tmp_path: Path) -> tuple[Analysis, Plan, Path]:
    """An analysis, a plan, and the pruned file, all in order."""
    analysis, plan = analyse(load(model)), Plan(KEEP)
    write(rewrite(analysis, plan), tmp_path / "pruned.onnx")
    return analysis, plan, tmp_path / "pruned.onnx"


def edited(path: Path, change: Callable[[onnx.ModelProto], object]) -> None:
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)


def weight(model: onnx.ModelProto, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), name))


def nudged(array: np.ndarray) -> np.ndarray:
    """One element off by a hundredth of the tensor's scale."""
    array.reshape(-1)[array.size // 2] += 0.01 * np.abs(array).max()
    return array


def test_a_right_surgery_passes_at_several_sizes(surgery: tuple[Analysis, Plan, Path]) -> None:
    result = prove(*surgery)
    assert result.passed and result.max_rel_error < 1e-5 and result.input_sets >= 3
    for axis, name in ((0, "N"), (2, "T")):
        assert len({shape["x"][axis] for shape in result.shapes}) >= 2, f"{name} was tried at one size only"


@pytest.mark.parametrize("name", ["w1", "b1", "w2", "w3", "b3"])
def test_one_wrong_number_is_detected(surgery: tuple[Analysis, Plan, Path], name: str) -> None:
    edited(surgery[2], lambda m: weight(m, name, nudged))
    with pytest.raises(VerificationFailed, match="differs") as caught:
        prove(*surgery)
    assert caught.value.exit_code == 5


def test_the_right_units_in_the_wrong_order_are_detected(surgery: tuple[Analysis, Plan, Path]) -> None:
    edited(surgery[2], lambda m: weight(m, "w1", lambda a: a[[1, 0, 2, 3]]))
    with pytest.raises(VerificationFailed, match="differs"):
        prove(*surgery)


def test_other_units_than_the_plan_says_are_detected(surgery: tuple[Analysis, Plan, Path]) -> None:
    analysis, _, path = surgery
    with pytest.raises(VerificationFailed, match="differs"):
        prove(analysis, Plan({**KEEP, "g0": np.array([0, 2, 3, 6])}), path)


def test_a_forgotten_compensation_is_detected(surgery: tuple[Analysis, Plan, Path]) -> None:
    """sigmoid(0) = 1/2 of the removed units went into the output by an Add: without it the proof fails."""

    def forget(m: onnx.ModelProto) -> None:
        added = next(n for n in m.graph.node if n.op_type == "Add")
        constant = next(i for i in added.input if any(t.name == i for t in m.graph.initializer))
        weight(m, constant, np.zeros_like)

    if not any(n.op_type == "Add" for n in onnx.load(surgery[2]).graph.node):
        pytest.skip("folded into a bias instead")
    edited(surgery[2], forget)
    with pytest.raises(VerificationFailed, match="differs"):
        prove(*surgery)


def test_a_model_that_does_not_load_or_run_is_detected(surgery: tuple[Analysis, Plan, Path]) -> None:
    edited(surgery[2], lambda m: weight(m, "w2", lambda a: a[:, :3]))
    with pytest.raises(VerificationFailed):
        prove(*surgery)


def test_a_model_that_is_invalid_is_detected(surgery: tuple[Analysis, Plan, Path]) -> None:
    edited(surgery[2], lambda m: m.graph.node.append(helper.make_node("Relu", ["nothing"], ["z"])))
    with pytest.raises(VerificationFailed):
        prove(*surgery)


def test_nan_where_a_number_should_be_is_detected(surgery: tuple[Analysis, Plan, Path]) -> None:
    edited(surgery[2], lambda m: weight(m, "b3", lambda a: np.full_like(a, np.nan)))
    with pytest.raises(VerificationFailed):
        prove(*surgery)


def test_a_mistake_that_shows_at_one_size_only_is_detected(model: onnx.ModelProto, tmp_path: Path) -> None:
    """A Reshape that froze the batch at the size of the first try."""
    model = from_text(
        """(float[N,5] x) => (float[N,4] y) {
        a = MatMul(x, w1)
        r = Reshape(a, target)
        y = MatMul(r, w2)
    }""",
        w1=(5, 8),
        w2=(8, 4),
        target=np.array([-1, 8]),
    )
    analysis, plan = analyse(load(model)), Plan({"g0": np.array([1, 2, 5])})
    path = tmp_path / "pruned.onnx"
    write(rewrite(analysis, plan), path)
    batch = prove(analysis, plan, path).shapes[0]["x"][0]
    edited(path, lambda m: weight(m, "target", lambda a: np.array([batch, 3])))
    with pytest.raises(VerificationFailed):
        prove(analysis, plan, path)


class TestMasked:
    """The reference is the original with zeros, and is not smaller."""

    def test_only_what_produces_a_unit_is_zeroed(self, model: onnx.ModelProto) -> None:
        reference = {
            t.name: numpy_helper.to_array(t)
            for t in to_proto(masked(analyse(load(model)), Plan(KEEP))).graph.initializer
        }
        before = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        dead = [1, 4, 5, 6]
        for name in ("w1", "b1"):
            assert not reference[name][dead].any()
            assert np.array_equal(np.delete(reference[name], dead, 0), np.delete(before[name], dead, 0))
        assert not reference["w2"][[0, 2, 3, 7]].any() and reference["w2"].shape == before["w2"].shape
        assert np.array_equal(reference["w2"][KEEP["g1"]], before["w2"][KEEP["g1"]]), "consumers keep their values"
        assert np.array_equal(reference["w3"], before["w3"])

    def test_a_quantised_zero_is_the_zero_point(self) -> None:
        rng = np.random.default_rng(0)
        model = from_text(
            """(float[N,5] x) => (float[N,4] y) {
            w = DequantizeLinear<axis=1>(w1, s, z)
            a = MatMul(x, w)
            y = MatMul(a, w2)
        }""",
            w1=rng.integers(-99, 99, (5, 8)).astype(np.int8),
            s=np.full(8, 0.02, np.float32),
            z=np.arange(8).astype(np.int8),
            w2=(8, 4),
        )
        reference = to_proto(masked(analyse(load(model)), Plan({"g0": np.array([0, 1, 2])})))
        found = next(numpy_helper.to_array(t) for t in reference.graph.initializer if t.name == "w1")
        assert np.array_equal(found[:, 3:], np.broadcast_to(np.arange(3, 8), (5, 5)))


class TestTolerance:
    """What rounding explains, by the formats that a model computes in."""

    def of(self, model: onnx.ModelProto) -> float:
        analysis = analyse(load(model))
        return tolerance(analysis.graph, analysis.registry)

    def test_float32(self, model: onnx.ModelProto) -> None:
        assert self.of(model) == TOLERANCES["float32"] == 1e-4

    def test_weights_that_are_only_stored_smaller_are_no_excuse(self) -> None:
        model = from_text(
            "(float[N,5] x) => (float[N,4] y) { w = Cast<to=1>(h)\n y = MatMul(x, w) }", h=np.ones((5, 4), np.float16)
        )
        assert self.of(model) == TOLERANCES["float32"]

    def test_float16_and_integer_arithmetic(self) -> None:
        half = from_text("(float16[N,5] x) => (float16[N,4] y) { y = MatMul(x, h) }", h=np.ones((5, 4), np.float16))
        assert self.of(half) == TOLERANCES["float16"]
        quantised = from_text(
            """(float[N,5] x) => (float[N,5] y) {
            q = QuantizeLinear(x, s, z)
            y = DequantizeLinear(q, s, z)
        }""",
            s=np.array(0.1, np.float32),
            z=np.array(3, np.uint8),
        )
        assert self.of(quantised) == TOLERANCES["int8"]


class TestDifference:
    """Errors are relative to the largest output, and nothing slips through."""

    def test_scale(self) -> None:
        a = np.array([100.0, 0.0, -3.0], np.float32)
        assert difference(a, a) == (0.0, 0.0)
        assert difference(a, a + np.float32(1.0)) == pytest.approx((1.0, 0.01))

    @pytest.mark.parametrize("b", [np.zeros((3, 1)), np.array([np.nan, 0, 0]), np.array([np.inf, 0, 0])])
    def test_shapes_nan_and_infinity_are_infinitely_far(self, b: np.ndarray) -> None:
        assert difference(np.zeros(3), b)[1] == float("inf")

    def test_the_same_nan_and_infinity_are_the_same(self) -> None:
        a = np.array([np.nan, np.inf, -np.inf, 2.0])
        assert difference(a, a.copy()) == (0.0, 0.0)

    def test_integers_booleans_strings_and_empty_tensors(self) -> None:
        assert difference(np.array([1, 2]), np.array([1, 2]))[1] == 0
        assert difference(np.array([True]), np.array([False]))[1] > 0.5
        assert difference(np.array(["a"], object), np.array(["b"], object))[1] == float("inf")
        assert difference(np.zeros((0, 3)), np.zeros((0, 3)))[1] == 0


class TestVerify:
    """From the plan that is stored in a pruned model."""

    @pytest.fixture
    def files(self, model: onnx.ModelProto, tmp_path: Path) -> tuple[Path, Path]:
        onnx.save(model, tmp_path / "m.onnx")
        compress(tmp_path / "m.onnx", tmp_path / "small.onnx", target="params=0.6", deploy="none")
        return tmp_path / "m.onnx", tmp_path / "small.onnx"

    def test_it_passes_again(self, files: tuple[Path, Path]) -> None:
        assert verify(*files).passed

    def test_with_other_seeds_and_given_shapes(self, files: tuple[Path, Path]) -> None:
        result = verify(*files, seed=5, input_shapes={"x": (7, 3, 11, 6)})
        assert result.passed and any(s["x"] == (7, 3, 11, 6) for s in result.shapes)

    def test_it_needs_no_exclusions_to_be_given_again(self, model: onnx.ModelProto, tmp_path: Path) -> None:
        onnx.save(model, tmp_path / "m.onnx")
        compress(tmp_path / "m.onnx", tmp_path / "small.onnx", target="params=0.9", deploy="none", exclude=["w1"])
        assert verify(tmp_path / "m.onnx", tmp_path / "small.onnx").passed

    @pytest.mark.parametrize("name", ["w1", "w3"])
    def test_a_pruned_model_that_was_changed_afterwards_fails(self, files: tuple[Path, Path], name: str) -> None:
        edited(files[1], lambda m: weight(m, name, nudged))
        with pytest.raises(VerificationFailed):
            verify(*files)

    def test_another_original_fails(self, files: tuple[Path, Path]) -> None:
        edited(files[0], lambda m: weight(m, "w2", lambda a: a * 1.1))
        with pytest.raises(VerificationFailed):
            verify(*files)

    def test_an_original_of_another_shape_is_refused(self, files: tuple[Path, Path], tmp_path: Path) -> None:
        other = from_text(MODEL, **{**SHAPES, "w1": (10, 3, 1, 1), "b1": (10,), "w2": (9, 10, 3, 3)})
        onnx.save(other, tmp_path / "other.onnx")
        with pytest.raises(ModelRejected):
            verify(tmp_path / "other.onnx", files[1])

    def test_a_model_without_a_plan_is_refused(self, files: tuple[Path, Path]) -> None:
        with pytest.raises(ModelRejected, match="no plan"):
            verify(files[1], files[0])

    def test_a_damaged_plan_is_refused(self, files: tuple[Path, Path]) -> None:
        def damage(m: onnx.ModelProto) -> None:
            next(p for p in m.metadata_props if p.key == METADATA_KEY).value = "{"

        edited(files[1], damage)
        with pytest.raises(ModelRejected):
            verify(*files)


def test_an_original_that_onnxruntime_cannot_run_is_refused_and_not_a_failure(tmp_path: Path) -> None:
    model = from_text(
        """(float[N,5] x) => (float[N,4] y) <float[N,8] b> {
        a = MatMul(x, w1)
        b = com.microsoft.Mystery(a)
        c = MatMul(b, w2)
        y = MatMul(c, w3)
    }""",
        microsoft=True,
        w1=(5, 8),
        w2=(8, 6),
        w3=(6, 4),
    )
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ModelRejected, match="onnxruntime"):
        compress(tmp_path / "m.onnx", tmp_path / "small.onnx", target="params=0.8", deploy="none")
    assert not (tmp_path / "small.onnx").exists()


def test_a_reference_in_which_a_unit_does_not_vanish_is_detected(tmp_path: Path) -> None:
    """Were a rule wrong about zero-invariance, the proof would show it: an exact group's consumers are not masked."""
    model = from_text(
        "(float[N,5] x) => (float[N,4] y) { a = MatMul(x, w1)\n s = Cos(a)\n y = MatMul(s, w2) }", w1=(5, 8), w2=(8, 4)
    )
    analysis = analyse(load(model))
    analysis.verdicts.constants.clear()  # as if cos(0) were 0
    plan = Plan({"g0": np.array([0, 1, 2])})
    write(rewrite(analysis, plan), tmp_path / "pruned.onnx")
    with pytest.raises(VerificationFailed, match="differs"):
        prove(analysis, plan, tmp_path / "pruned.onnx")


def test_float_inputs_of_float16_models_are_drawn_in_their_type(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    model = from_text(
        "(float16[N,5] x) => (float16[N,4] y) { a = MatMul(x, w1)\n y = MatMul(a, w2) }",
        w1=rng.standard_normal((5, 8)).astype(np.float16),
        w2=rng.standard_normal((8, 4)).astype(np.float16),
    )
    analysis, plan = analyse(load(model)), Plan({"g0": np.array([0, 1, 2])})
    write(rewrite(analysis, plan), tmp_path / "pruned.onnx")
    assert prove(analysis, plan, tmp_path / "pruned.onnx").passed
    assert onnx.load(tmp_path / "pruned.onnx").graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT16
