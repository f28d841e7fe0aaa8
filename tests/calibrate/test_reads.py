"""Where units are read."""

from __future__ import annotations

from onnxprune.axes.analysis import analyse
from onnxprune.calibrate.reads import reads_of
from onnxprune.model.load import load
from onnxprune.ops.rules import Kind
from tests.graphs import from_text


def test_a_residual_stream_is_read_by_every_layer_behind_it() -> None:
    model = from_text(
        """(float[N,3,6,6] x) => (float[N,2,6,6] y) {
            a = Conv(x, w1)
            b = Conv(a, w2)
            s = Add(a, b)
            r = Relu(s)
            y = Conv(r, w3)
        }""",
        w1=(8, 3, 1, 1),
        w2=(8, 8, 1, 1),
        w3=(2, 8, 1, 1),
    )
    analysis = analyse(load(model))
    (reads,) = reads_of(analysis).values()
    assert [(r.operands[0].tensor, r.operands[0].axis, r.weight) for r in reads] == [("a", 1, (1, 1)), ("r", 1, (1, 1))]


def test_both_factors_of_a_product_of_activations_read_the_units() -> None:
    model = from_text(
        """(float[N,5,7] x) => (float[N,5,5] y) {
            q = MatMul(x, wq)
            k = MatMul(x, wk)
            t = Transpose<perm=[0,2,1]>(k)
            y = MatMul(q, t)
        }""",
        wq=(7, 6),
        wk=(7, 6),
    )
    analysis = analyse(load(model))
    (reads,) = reads_of(analysis).values()
    assert [(o.tensor, o.axis) for o in reads[0].operands] == [("q", 2), ("t", 1)] and reads[0].weight is None


def test_a_recurrent_unit_is_read_by_its_own_state_and_by_the_layer_behind() -> None:
    model = from_text(
        """(float[5,N,4] x) => (float[1,N,3] y) {
            s, h = GRU<hidden_size=6>(x, w, r)
            y = MatMul(h, v)
        }""",
        w=(1, 18, 4),
        r=(1, 18, 6),
        v=(6, 3),
    )
    analysis = analyse(load(model))
    (reads,) = reads_of(analysis).values()
    assert {r.kind for r in reads} == {Kind.STATE, Kind.PRODUCT}
    state = next(r for r in reads if r.kind is Kind.STATE)
    assert (state.operands[0].tensor, state.operands[0].axis, state.operands[0].input) == ("s", 3, None)
