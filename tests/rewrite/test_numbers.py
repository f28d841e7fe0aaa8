"""Numbers that come from sizes keep their value; what comes from weights is a tensor, and its value goes with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxprune.axes.analysis import analyse
from onnxprune.axes.vanish import removable
from onnxprune.model.load import load
from onnxprune.model.save import to_proto, write
from onnxprune.rewrite.rewrite import rewrite
from onnxprune.select.plan import Plan
from onnxprune.verify.equivalence import prove
from tests.graphs import from_text


def pruned(model: onnx.ModelProto, path: Path, **keep: list[int]) -> onnx.ModelProto:
    """Prune the groups whose first member has these names, prove the result and return it."""
    analysis = analyse(load(model))
    chosen = {}
    for name, units in keep.items():
        group = next(g for g in analysis.groups if g.members[0].initializer == name and g.id not in chosen)
        chosen[group.id] = np.array(units, np.int64)
    plan = Plan(chosen)
    write(rewrite(analysis, plan), path)
    assert prove(analysis, plan, path).max_rel_error < 1e-5
    return to_proto(rewrite(analysis, plan))


ROOT = """s = Shape(h)
        d = Gather(s, one)
        f = Cast<to=1>(d)
        q = Sqrt(f)"""


@pytest.mark.parametrize(
    "weights",
    ["v = Mul(a, q)", "v = Div(a, q)", "p = MatMul(a, b)  v = Mul(p, q)", "p = Concat<axis=1>(a, a)  v = Mul(q, p)"],
)
def test_a_number_computed_from_a_size_is_held_where_it_meets_weights(tmp_path: Path, weights: str) -> None:
    """Number and weights are both known, so that their product is too, and nothing behind it sees the number."""
    lines = "\n".join(weights.split("  "))
    model = from_text(
        f"(float[N,5] x) => (float[N,M] y) {{ h = MatMul(x, w)\n r = Relu(h)\n {ROOT}\n {lines}\n y = MatMul(r, v) }}",
        w=(5, 8),
        a=(8, 3),
        b=(3, 3),
        one=np.array(1),
    )
    pruned(model, tmp_path / "p.onnx", w=[0, 3, 4])


def test_a_vector_of_numbers_is_held_where_it_meets_a_weight(tmp_path: Path) -> None:
    model = from_text(
        """(float[2,5] x) => (float[2,3] y) {
            h = MatMul(x, w)
            s = Shape(h)
            f = Cast<to=1>(s)
            v = Mul(b, f)
            a = ReduceSum<keepdims=1>(v)
            m = MatMul(h, u)
            y = Add(m, a)
        }""",
        w=(5, 8),
        u=(8, 3),
        b=(2,),
    )
    pruned(model, tmp_path / "p.onnx", w=[1, 2, 7])


def test_an_expanded_product_of_weights_is_pruned_along_each_of_its_axes(tmp_path: Path) -> None:
    """Learned queries through a projection, repeated over the batch: a value that is known, and yet no size."""
    model = from_text(
        """(float[2,4,5] x) => (float[2,3,7] y) {
            q = MatMul(learned, w)
            e = Expand(q, target)
            k = MatMul(x, u)
            t = Transpose<perm=[0,2,1]>(k)
            scores = MatMul(e, t)
            v = MatMul(x, o)
            m = MatMul(scores, v)
            y = MatMul(m, z)
        }""",
        learned=(1, 3, 6),
        w=(6, 6),
        u=(5, 6),
        o=(5, 8),
        z=(8, 7),
        target=np.array([2, 3, 6]),
    )
    analysis = analyse(load(model))
    inner = next(g for g in analysis.groups if any((m.initializer, m.axis) == ("learned", 2) for m in g.members))
    assert inner.atom not in removable(analysis), "its product has no bias that could stand in for it"
    after = pruned(model, tmp_path / "p.onnx", learned=[2], w=[0, 5], o=[1, 2, 3])
    shapes = {t.name: tuple(t.dims) for t in after.graph.initializer}
    assert (shapes["learned"], shapes["w"], shapes["u"]) == ((1, 3, 1), (1, 2), (5, 2))


def test_scores_of_learned_queries_outlive_all_but_one_unit(tmp_path: Path) -> None:
    """The product of two weights has rank 3 and is read by a product with data of another batch size."""
    model = from_text(
        """(float[2,3,6] x) => (float[2,3,2] y) {
            wt = Transpose<perm=[1,0]>(w)
            q = MatMul(learned, wt)
            k = MatMul(x, u)
            kb = Add(b, k)
            t = Transpose<perm=[0,2,1]>(kb)
            scores = MatMul(q, t)
            p = Softmax<axis=2>(scores)
            v = MatMul(x, o)
            y = MatMul(p, v)
        }""",
        learned=(1, 3, 4),
        w=(4, 4),
        u=(6, 4),
        b=(4,),
        o=(6, 2),
    )
    analysis = analyse(load(model))
    assert not removable(analysis)
    for group in analysis.groups:
        plan = Plan({group.id: np.array([group.size - 1])})
        write(rewrite(analysis, plan), tmp_path / "p.onnx")
        assert prove(analysis, plan, tmp_path / "p.onnx").max_rel_error < 1e-5


def flagged(values: list[int]) -> onnx.ModelProto:
    """Where the sizes of h, (N, 6), are those that are listed, a row of b is added."""
    return from_text(
        """(float[N,5] x) => (float[N,3] y) {
            h = MatMul(x, w)
            s = Shape(h)
            flags = Equal(s, values)
            chosen = Where(flags, b, zero)
            c = ReduceSum<keepdims=1>(chosen)
            m = MatMul(h, u)
            y = Add(m, c)
        }""",
        w=(5, 6),
        u=(6, 3),
        b=(2,),
        zero=np.zeros(2, np.float32),
        values=np.array(values),
    )


@pytest.mark.parametrize("values", [[4, 6], [4, 2], [0, 6]])
def test_a_truth_about_a_size_stays_while_that_about_the_batch_varies(tmp_path: Path, values: list[int]) -> None:
    """The first flag depends on the batch, and must not become a constant when the second is put right."""
    after = pruned(flagged(values), tmp_path / "p.onnx", w=[0, 5])
    assert any(n.op_type == "Xor" for n in after.graph.node)


def test_a_number_that_becomes_zero_is_put_right_by_a_difference(tmp_path: Path) -> None:
    """No factor leads from 0 back to 4, and the batch beside it must not become a constant."""
    model = from_text(
        """(float[N,5] x) => (float[N,3] y) {
            h = MatMul(x, w)
            s = Shape(h)
            left = Sub(s, two)
            f = Cast<to=1>(left)
            v = Mul(b, f)
            c = ReduceSum<keepdims=1>(v)
            m = MatMul(h, u)
            y = Add(m, c)
        }""",
        w=(5, 6),
        u=(6, 3),
        b=(2,),
        two=np.array(2),
    )
    pruned(model, tmp_path / "p.onnx", w=[0, 5])


def test_sizes_scaled_by_a_stored_factor_are_still_sizes(tmp_path: Path) -> None:
    """An upsampling whose target is computed from a shape and stored factors: shape arithmetic, although it holds
    stored numbers."""
    model = from_text(
        """(float[N,3,4,4] x) => (float[N,2,8,8] y) {
            c = Conv(x, w)
            s = Shape(c)
            f = Cast<to=1>(s)
            g = Mul(f, factors)
            t = Cast<to=7>(g)
            r = Resize<mode="nearest">(c, , , t)
            y = Conv(r, u)
        }""",
        w=(6, 3, 1, 1),
        u=(2, 6, 1, 1),
        factors=np.array([1, 1, 2, 2], np.float32),
    )
    pruned(model, tmp_path / "p.onnx", w=[1, 4, 5])
