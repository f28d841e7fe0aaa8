"""The rewriter changes what must change, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxprune.axes.analysis import Analysis, analyse
from onnxprune.model.load import load
from onnxprune.model.save import to_proto, write
from onnxprune.rewrite.rewrite import rewrite
from onnxprune.select.plan import METADATA_KEY, Plan, plan_from_text
from onnxprune.verify.equivalence import prove
from tests.graphs import from_text


def plan_for(analysis: Analysis, keep: dict[str, Sequence[int]]) -> Plan:
    """Kept units of the group that an initializer is the first member of."""
    chosen = {}
    for name, units in keep.items():
        group = next(g for g in analysis.groups if g.members[0].initializer == name and g.id not in chosen)
        chosen[group.id] = np.array(units)
    return Plan(chosen)


@pytest.fixture
def prune(tmp_path: Path):  # type: ignore[no-untyped-def]
    """Prune a model to the given units, prove it, and return the result."""

    def apply(model: onnx.ModelProto, **keep: Sequence[int]) -> onnx.ModelProto:
        analysis = analyse(load(model))
        plan = plan_for(analysis, keep)
        pruned = rewrite(analysis, plan)
        write(pruned, tmp_path / "pruned.onnx")
        assert prove(analysis, plan, tmp_path / "pruned.onnx").max_rel_error < 1e-4
        return to_proto(pruned)

    return apply


def weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def run(model: onnx.ModelProto, **feed: np.ndarray) -> list[np.ndarray]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feed)


def operators(model: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in model.graph.node]


CHAIN = """(float[N,5] x) => (float[N,4] y) {
    [first] a = Gemm(x, w1, b1)
    [act] r = Relu(a)
    [second] y = Gemm(r, w2)
}"""
SHAPES = {"w1": (5, 8), "b1": (8,), "w2": (8, 4)}


class TestWhatStays:
    """Everything that carries no unit of the plan."""

    def test_an_empty_plan_changes_nothing_but_the_metadata(self) -> None:
        model = from_text(CHAIN, **SHAPES)
        analysis = analyse(load(model))
        after = to_proto(rewrite(analysis, Plan({})))
        del after.metadata_props[:]
        assert after.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)

    def test_names_order_and_graph_interface(self, prune) -> None:
        model = from_text(CHAIN, **SHAPES)
        after = prune(model, w1=[0, 3, 4])
        assert [(n.name, n.op_type, list(n.input), list(n.output)) for n in after.graph.node] == [
            (n.name, n.op_type, list(n.input), list(n.output)) for n in model.graph.node
        ]
        assert list(after.graph.input) == list(model.graph.input)
        assert list(after.graph.output) == list(model.graph.output)
        assert [t.name for t in after.graph.initializer] == [t.name for t in model.graph.initializer]
        assert after.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"

    def test_versions_producer_metadata_and_doc_strings(self, prune) -> None:
        model = from_text(CHAIN, **SHAPES)
        model.producer_name, model.producer_version, model.domain = "maker", "1.2.3", "org.example"
        model.model_version, model.doc_string, model.graph.doc_string = 7, "about the model", "about the graph"
        model.graph.name = "the graph"
        model.metadata_props.add(key="author", value="someone")
        model.graph.node[0].doc_string = "about a node"
        model.graph.node[0].metadata_props.add(key="source", value="line 3")
        model.graph.initializer[0].doc_string = "about a weight"
        model.graph.input[0].doc_string = "about an input"
        after = prune(model, w1=[1, 2])
        for field in ("ir_version", "producer_name", "producer_version", "domain", "model_version", "doc_string"):
            assert getattr(after, field) == getattr(model, field), field
        assert list(after.opset_import) == list(model.opset_import)
        assert (after.graph.name, after.graph.doc_string) == ("the graph", "about the graph")
        assert after.graph.node[0].doc_string == "about a node"
        assert list(after.graph.node[0].metadata_props) == list(model.graph.node[0].metadata_props)
        assert after.graph.initializer[0].doc_string == "about a weight"
        assert after.graph.input[0].doc_string == "about an input"
        kept = {p.key: p.value for p in after.metadata_props}
        assert kept.pop(METADATA_KEY) and kept == {"author": "someone"}

    def test_quantization_annotations(self, prune) -> None:
        model = from_text(CHAIN, **SHAPES)
        note = model.graph.quantization_annotation.add(tensor_name="a")
        note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="b1")
        after = prune(model, w1=[1, 2])
        assert list(after.graph.quantization_annotation) == list(model.graph.quantization_annotation)

    def test_declared_shapes_of_inner_tensors_follow_and_symbols_stay(self, prune) -> None:
        model = from_text(CHAIN, **SHAPES)
        model.graph.value_info.append(helper.make_tensor_value_info("a", TensorProto.FLOAT, ["N", 8]))
        after = prune(model, w1=[1, 2])
        dims = after.graph.value_info[0].type.tensor_type.shape.dim
        assert (dims[0].dim_param, dims[1].dim_value) == ("N", 2)

    def test_weights_that_no_group_touches_keep_their_bytes(self, prune) -> None:
        model = from_text(
            """(float[N,5] x) => (float[N,4] y) {
            a = Gemm(x, w1)
            b = Gemm(a, w2)
            c = Gemm(b, w3)
            y = Gemm(c, w4)
        }""",
            w1=(5, 8),
            w2=(8, 6),
            w3=(6, 7),
            w4=(7, 4),
        )
        before, after = weights(model), weights(prune(model, w1=[1, 2]))
        assert np.array_equal(after["w1"], before["w1"][:, [1, 2]]) and np.array_equal(
            after["w2"], before["w2"][[1, 2]]
        )
        assert np.array_equal(after["w3"], before["w3"]) and np.array_equal(after["w4"], before["w4"])

    def test_the_original_is_not_touched(self, prune) -> None:
        model = from_text(CHAIN, **SHAPES)
        before = model.SerializeToString()
        prune(model, w1=[1, 2])
        assert model.SerializeToString() == before

    def test_the_plan_in_the_metadata_is_the_plan(self, prune) -> None:
        model = from_text(CHAIN, **SHAPES)
        analysis = analyse(load(model))
        plan = plan_for(analysis, {"w1": [0, 3, 4, 5, 7]})
        text = next(p.value for p in rewrite(analysis, plan).proto.metadata_props if p.key == METADATA_KEY)
        again = plan_from_text(text, analysis)
        assert {k: v.tolist() for k, v in again.keep.items()} == {k: v.tolist() for k, v in plan.keep.items()}

    def test_a_weight_in_a_constant_node_stays_in_one(self, prune) -> None:
        model = from_text(CHAIN, b1=(8,), w2=(8, 4))
        array = np.arange(40, dtype=np.float32).reshape(5, 8)
        made = helper.make_node("Constant", [], ["w1"], "const", value=numpy_helper.from_array(array, "inner"))
        model.graph.node.insert(0, made)
        after = prune(model, w1=[2, 5])
        node = after.graph.node[0]
        assert (node.op_type, node.name, list(node.output)) == ("Constant", "const", ["w1"])
        assert np.array_equal(numpy_helper.to_array(node.attribute[0].t), array[:, [2, 5]])
        assert "w1" not in weights(after)

    @pytest.mark.parametrize("elem", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE])
    @pytest.mark.parametrize("raw", [True, False])
    def test_weights_are_read_in_whatever_form_they_are_stored(self, elem: int, raw: bool) -> None:
        model = from_text(
            """(float[N,5] x) => (float[N,4] y) {
            w = Cast<to=1>(w1)
            a = MatMul(x, w)
            y = MatMul(a, w2)
        }""",
            w2=(8, 4),
        )
        values = np.linspace(-2, 2, 40).reshape(5, 8)
        array = values.astype(helper.tensor_dtype_to_np_dtype(elem))
        tensor = numpy_helper.from_array(array, "w1") if raw else helper.make_tensor("w1", elem, (5, 8), values.ravel())
        model.graph.initializer.append(tensor)
        analysis = analyse(load(model))
        after = to_proto(rewrite(analysis, plan_for(analysis, {"w1": [0, 7]})))
        assert next(t for t in after.graph.initializer if t.name == "w1").data_type == elem
        found = weights(after)["w1"].astype(np.float64)
        assert np.array_equal(found, numpy_helper.to_array(tensor)[:, [0, 7]].astype(np.float64))


class TestSharedInitializers:
    """A use that asks for another slice gets a tensor of its own."""

    MODEL = """(float[N,5] x) => (float[N,4] y) {
        a = Gemm(x, w1, b)
        r = Relu(a)
        c = Gemm(r, w2, b)
        s = Relu(c)
        y = Gemm(s, w3)
    }"""
    SHAPES = {"w1": (5, 8), "w2": (8, 8), "w3": (8, 4), "b": (8,)}

    def test_a_bias_that_two_groups_slice_differently_is_split(self, prune) -> None:
        model = from_text(self.MODEL, **self.SHAPES)
        bias = weights(model)["b"]
        after = prune(model, w1=[0, 1, 2], w2=[5, 7])
        first, second = (after.graph.node[k].input[2] for k in (0, 2))
        assert first != second
        assert np.array_equal(weights(after)[first], bias[:3])
        assert np.array_equal(weights(after)[second], bias[[5, 7]])

    def test_uses_that_ask_for_the_same_slice_keep_sharing(self, prune) -> None:
        model = from_text(self.MODEL, **self.SHAPES)
        after = prune(model, w1=[0, 1, 2], w2=[0, 1, 2])
        assert after.graph.node[0].input[2] == after.graph.node[2].input[2] == "b"
        assert len(after.graph.initializer) == 4

    def test_a_use_that_stays_whole_keeps_the_original(self, prune) -> None:
        model = from_text(self.MODEL, **self.SHAPES)
        after = prune(model, w2=[0, 1, 2])
        assert after.graph.node[0].input[2] == "b" and weights(after)["b"].shape == (8,)
        assert weights(after)[after.graph.node[2].input[2]].shape == (3,)

    def test_new_names_collide_with_nothing(self, prune) -> None:
        model = from_text(self.MODEL.replace("Relu(c)", "Add(c, b_1)"), b_1=(8,), **self.SHAPES)
        after = prune(model, w2=[0, 1, 2])
        names = [t.name for t in after.graph.initializer]
        assert len(set(names)) == len(names) and {"b", "b_1"} <= set(names)


class TestSizes:
    """Sizes that the graph computes follow by themselves; constants are exchanged; nothing is patched twice."""

    CHUNK = """(float[N,5] x) => (float[N,4] y) {
        a = MatMul(x, w1)
        s = Shape(a)
        n = Gather(s, one)
        half = Div(n, two)
        h = Unsqueeze(half, zero1)
        full = Mul(h, two1)
        left = Slice(a, zero1, h, one1)
        right = Slice(a, h, full, one1)
        g = Sigmoid(right)
        m = Mul(left, g)
        y = MatMul(m, w2)
    }"""

    def test_cut_points_computed_from_the_shape_need_no_patch(self, prune) -> None:
        model = from_text(
            self.CHUNK,
            w1=(5, 12),
            w2=(6, 4),
            one=np.array(1),
            two=np.array(2),
            zero1=np.array([0]),
            one1=np.array([1]),
            two1=np.array([2]),
        )
        after = prune(model, w1=[0, 2, 5])
        assert operators(after) == operators(model)
        assert [list(n.input) for n in after.graph.node] == [list(n.input) for n in model.graph.node]
        assert weights(after)["w1"].shape == (5, 6)
        assert all(
            np.array_equal(weights(after)[k], weights(model)[k]) for k in ("one", "two", "zero1", "one1", "two1")
        )

    def test_cut_points_that_no_longer_follow_are_corrected(self, prune) -> None:
        """Two layers of the same width side by side: after pruning one, Shape/2 is no longer the boundary."""
        text = self.CHUNK.replace(
            "a = MatMul(x, w1)", "p = MatMul(x, wa)\n q = MatMul(x, wb)\n a = Concat<axis=1>(p, q)"
        )
        text = text.replace("m = Mul(left, g)", "m = Concat<axis=1>(left, g)")
        model = from_text(
            text,
            wa=(5, 6),
            wb=(5, 6),
            w2=(12, 4),
            one=np.array(1),
            two=np.array(2),
            zero1=np.array([0]),
            one1=np.array([1]),
            two1=np.array([2]),
        )
        after = prune(model, wa=[0, 3])
        assert weights(after)["wa"].shape == (5, 2) and weights(after)["wb"].shape == (5, 6)

    def test_constant_cut_points_move_to_the_same_units(self, prune) -> None:
        model = from_text(
            """(float[N,5] x) => (float[N,4] y) {
            a = MatMul(x, w1)
            left = Slice(a, c0, c6, c1)
            right = Slice(a, c6, far, c1)
            m = Mul(left, right)
            y = MatMul(m, w2)
        }""",
            w1=(5, 12),
            w2=(6, 4),
            c0=np.array([0]),
            c6=np.array([6]),
            c1=np.array([1]),
            far=np.array([2**63 - 1]),
        )
        after = prune(model, w1=[0, 2, 3, 5])
        bounds = [weights(after)[n].tolist() for k in (1, 2) for n in after.graph.node[k].input[1:3]]
        assert bounds == [[0], [4], [4], [2**63 - 1]]

    @pytest.mark.parametrize(
        ("target", "expected"),
        [([0, 3, 4], [0, 3, 2]), ([0, 3, -1], [0, 3, -1]), ([-1, 3, 4], [-1, 3, 2]), ([0, -1, 4], [0, -1, 2])],
    )
    def test_reshape_targets_change_only_where_a_pruned_size_is_spelled_out(
        self, prune, target: list[int], expected: list[int]
    ) -> None:
        model = from_text(
            """(float[N,5] x) => (float[N,3,6] y) {
            a = MatMul(x, w1)
            r = Reshape(a, target)
            y = MatMul(r, w2)
        }""",
            w1=(5, 12),
            w2=(4, 6),
            target=np.array(target),
        )
        analysis = analyse(load(model))
        assert [g.size for g in analysis.groups] == [4], "the 3 is a graph output's axis"
        assert weights(prune(model, w1=[1, 3]))["target"].tolist() == expected

    def test_a_split_in_equal_parts_gets_sizes_once_the_parts_differ(self, prune) -> None:
        model = from_text(
            """(float[N,5] x) => (float[N,4] y) {
            a = MatMul(x, w1)
            p, q = Split<axis=1>(a)
            r = Relu(q)
            c = Concat<axis=1>(r, p)
            y = MatMul(c, w2)
        }""",
            w1=(5, 12),
            w2=(12, 4),
        )
        after = prune(model, w1=[0, 5])
        split = next(n for n in after.graph.node if n.op_type == "Split")
        assert weights(after)[split.input[1]].tolist() == [2, 6]

    def test_group_counts_and_hidden_sizes_are_attributes_that_follow(self, prune) -> None:
        grouped = from_text(
            """(float[N,3,8,8] x) => (float[N,4,8,8] y) {
            a = Conv(x, w1)
            b = Conv<group=3>(a, w2)
            y = Conv(b, w3)
        }""",
            w1=(12, 3, 1, 1),
            w2=(6, 4, 1, 1),
            w3=(4, 6, 1, 1),
        )
        after = prune(grouped, w1=[0, 2])
        assert helper.get_node_attr_value(after.graph.node[1], "group") == 2
        cell = from_text(
            """(float[7,N,5] x) => (float[7,N,4] y) {
            h = GRU<hidden_size=6>(x, w, r)
            s = Squeeze(h, one)
            y = MatMul(s, w2)
        }""",
            w=(1, 18, 5),
            r=(1, 18, 6),
            w2=(6, 4),
            one=np.array([1]),
        )
        after = prune(cell, w=[0, 2, 3, 5])
        assert helper.get_node_attr_value(after.graph.node[0], "hidden_size") == 4


class TestNumbers:
    """What dead units contributed is made up for; a number computed from a size keeps its value."""

    def test_an_attention_scale_computed_from_the_shape_keeps_its_value(self, prune) -> None:
        model = from_text(
            """(float[N,5,16] x) => (float[N,5,7] y) {
            q = MatMul(x, wq)
            k = MatMul(x, wk)
            v = MatMul(x, wv)
            shape = Shape(q)
            d = Gather(shape, two)
            f = Cast<to=1>(d)
            root = Sqrt(f)
            kt = Transpose<perm=[0,2,1]>(k)
            s = MatMul(q, kt)
            scaled = Div(s, root)
            p = Softmax(scaled)
            o = MatMul(p, v)
            y = MatMul(o, wo)
        }""",
            wq=(16, 8),
            wk=(16, 8),
            wv=(16, 6),
            wo=(6, 7),
            two=np.array(2),
        )
        after = prune(model, wq=[0, 4, 6])
        x = np.random.default_rng(0).standard_normal((2, 5, 16)).astype(np.float32)
        wq, wk, wv, wo = (weights(model)[k] for k in ("wq", "wk", "wv", "wo"))
        scores = (x @ wq[:, [0, 4, 6]]) @ (x @ wk[:, [0, 4, 6]]).transpose(0, 2, 1) / sqrt(8)
        e = np.exp(scores - scores.max(-1, keepdims=True))
        expected = e / e.sum(-1, keepdims=True) @ (x @ wv) @ wo
        np.testing.assert_allclose(run(after, x=x)[0], expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("op", ["Gemm", "MatMul", "Conv"])
    def test_the_constant_of_dead_units_goes_into_the_output(self, prune, op: str) -> None:
        """sigmoid(0) = 1/2: what the removed half-ones added, the pruned model adds as a constant."""
        image = op == "Conv"
        size = ",1,1" if image else ""
        first = "Conv(x, w1)" if image else "Gemm(x, w1)"
        model = from_text(
            f"""(float[N,5{size}] x) => (float[N,4{size}] y) {{
            a = {first}
            s = Sigmoid(a)
            y = {op}(s, w2)
        }}""",
            w1=(8, 5, 1, 1) if image else (5, 8),
            w2=(4, 8, 1, 1) if image else (8, 4),
        )
        after = prune(model, w1=[1, 2, 6])
        x = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
        w1 = weights(model)["w1"].reshape(8, 5).T if image else weights(model)["w1"]
        w2 = weights(model)["w2"].reshape(4, 8).T if image else weights(model)["w2"]
        alive, dead = [1, 2, 6], [0, 3, 4, 5, 7]
        expected = 1 / (1 + np.exp(-(x @ w1[:, alive]))) @ w2[alive] + 0.5 * w2[dead].sum(0)
        found = run(after, x=x.reshape(3, 5, 1, 1) if image else x)[0].reshape(3, 4)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal([n for n in operators(after) if n == "Sigmoid"], ["Sigmoid"])

    def test_a_mean_over_units_is_rescaled(self, prune) -> None:
        model = from_text(
            """(float[N,5,6] x) => (float[N,1,6] y) {
            a = Conv(x, w1)
            y = ReduceMean<axes=[1]>(a)
        }""",
            w1=(8, 5, 1),
        )
        after = prune(model, w1=[0, 3])
        x = np.random.default_rng(0).standard_normal((2, 5, 6)).astype(np.float32)
        expected = np.einsum("oi,nit->not", weights(model)["w1"][[0, 3], :, 0], x).sum(1, keepdims=True) / 8
        np.testing.assert_allclose(run(after, x=x)[0], expected, rtol=1e-5, atol=1e-6)

    def test_a_mean_down_to_a_scalar_stays_a_scalar(self, prune) -> None:
        model = from_text(
            """(float[2,5] x) => (float y) {
            a = MatMul(x, w1)
            y = ReduceMean<keepdims=0>(a)
        }""",
            w1=(5, 8),
        )
        after = prune(model, w1=[0, 3])
        assert run(after, x=np.ones((2, 5), np.float32))[0].shape == ()

    def test_a_root_mean_square_norm_keeps_dividing_by_the_original_size(self, prune) -> None:
        model = from_text(
            """(float[N,5] x) => (float[N,4] y) {
            a = MatMul(x, w1)
            n = RMSNormalization<axis=-1, epsilon=0.1>(a, gamma)
            y = MatMul(n, w2)
        }""",
            opset=23,
            ir=11,
            w1=(5, 8),
            gamma=(8,),
            w2=(8, 4),
        )
        after = prune(model, w1=[0, 3, 5])
        x = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
        a = x @ weights(model)["w1"][:, [0, 3, 5]]
        normed = a / np.sqrt((a**2).sum(1, keepdims=True) / 8 + 0.1) * weights(model)["gamma"][[0, 3, 5]]
        np.testing.assert_allclose(run(after, x=x)[0], normed @ weights(model)["w2"][[0, 3, 5]], rtol=1e-4, atol=1e-6)

    def test_a_product_of_two_parameters_is_recomputed_and_not_held(self, prune) -> None:
        """It is known without running the model, but it is no number that was computed from a size."""
        model = from_text(
            """(float[N,6] x) => (float[N,4] y) {
            w = MatMul(w1, w2)
            y = MatMul(x, w)
        }""",
            w1=(6, 8),
            w2=(8, 4),
        )
        analysis = analyse(load(model))
        if analysis.groups:
            after = prune(model, w1=[0, 3, 5])
            assert operators(after) == ["MatMul", "MatMul"]


class TestForms:
    """Models that are valid but unusual."""

    def test_initializers_that_are_listed_as_graph_inputs(self, prune) -> None:
        """IR version 3 required it."""
        model = from_text(TestSharedInitializers.MODEL, ir=3, opset=11, **TestSharedInitializers.SHAPES)
        for t in model.graph.initializer:
            model.graph.input.append(helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)))
        after = prune(model, w1=[0, 1, 2], w2=[5, 7])
        onnx.checker.check_model(after)
        listed = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in after.graph.input}
        assert after.graph.input[0].name == "x"
        for t in after.graph.initializer:
            assert listed[t.name] == list(t.dims), t.name

    def test_nodes_out_of_order(self, prune) -> None:
        model = from_text(CHAIN, **SHAPES)
        nodes = list(model.graph.node)[::-1]
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        after = prune(model, w1=[1, 2])
        onnx.checker.check_model(after)
        assert [n.name for n in after.graph.node] == ["first", "act", "second"]

    def test_model_local_functions_are_inlined(self, prune) -> None:
        model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        graph (float[N,5] x) => (float[N,4] y) {
            a = local.layer(x, w1)
            y = local.layer(a, w2)
        }
        <opset_import: ["" : 17], domain: "local">
        layer (x, w) => (y) {
            m = MatMul(x, w)
            y = Relu(m)
        }""")
        rng = np.random.default_rng(0)
        for name, shape in (("w1", (5, 8)), ("w2", (8, 4))):
            model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
        after = prune(model, w1=[1, 2])
        assert operators(after) == ["MatMul", "Relu"] * 2 and not after.functions

    def test_an_optional_input_that_is_left_out(self, prune) -> None:
        model = from_text(
            """(float[N,5] x) => (float[N,4] y) {
            a = MatMul(x, w1)
            c = Clip(a, , top)
            y = MatMul(c, w2)
        }""",
            w1=(5, 8),
            w2=(8, 4),
            top=np.array(1, np.float32),
        )
        after = prune(model, w1=[1, 2])
        assert list(after.graph.node[1].input) == ["a", "", "top"]

    def test_an_unread_initializer_and_an_unread_node_stay(self, prune) -> None:
        model = from_text(CHAIN.replace("[second]", "unread = Neg(r)\n [second]"), spare=(3, 3), **SHAPES)
        after = prune(model, w1=[1, 2])
        assert "spare" in weights(after) and "Neg" in operators(after)

    def test_a_group_down_to_one_unit(self, prune) -> None:
        after = prune(from_text(CHAIN, **SHAPES), w1=[6])
        assert weights(after)["w1"].shape == (5, 1)

    def test_a_weight_larger_than_what_is_kept_in_the_skeleton(self, prune) -> None:
        model = from_text(
            """(float[N,40] x) => (float[N,4] y) {
            a = MatMul(x, w1)
            b = MatMul(a, w2)
            y = MatMul(b, w3)
        }""",
            w1=(40, 64),
            w2=(64, 48),
            w3=(48, 4),
        )
        keep = list(range(0, 64, 3))
        after = prune(model, w1=keep, w2=list(range(5, 48)))
        assert np.array_equal(weights(after)["w2"], weights(model)["w2"][keep][:, 5:])
