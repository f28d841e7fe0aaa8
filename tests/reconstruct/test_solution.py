"""A consumer's repair is the least-squares solution, found by brute force: the output is linear in the weight and in the
constant, so that running the layer on unit weights gives the design matrix, however the operator unfolds its input."""

from __future__ import annotations

import numpy as np
import pytest
from consumer_cases import Case, Function, model_of, planned, stored
from onnx import helper

from onnxprune.reconstruct import repair
from onnxprune.reconstruct.moments import Moments
from onnxprune.reconstruct.solve import ridge
from onnxprune.rewrite.rewrite import rewrite

node = helper.make_node
rng = np.random.default_rng(7)
r = rng.standard_normal


def conv(shape, w, outputs, *, bias=True, op="Conv", **attributes):
    weights = {"w": r(w), **({"b": r(outputs)} if bias else {})}
    nodes = [node(op, ["h", *weights], ["y"], "consumer", **attributes)]
    return Case(nodes, weights, shape, "conv", free="b" if bias else None)


def rows(nodes, weights, shape, **more):
    return Case(nodes, weights, shape, **more)


def moved(w, *moves):
    """A MatMul whose weight comes through static nodes: (operator, stored second input or None, attributes)."""
    weights, nodes, last = {"w": r(w), "b": r((2, 2))}, [], "w"
    for k, (op, value, attributes) in enumerate(moves):
        nodes.append(node(op, [last, *([f"c{k}"] if value is not None else [])], [f"w{k}"], f"move {k}", **attributes))
        weights |= {} if value is None else {f"c{k}": np.asarray(value)}
        last = f"w{k}"
    nodes += [
        node("MatMul", ["h", last], ["m"], "consumer"),
        node("Reshape", ["b", "flat"], ["b.flat"], "move b"),
        node("Add", ["m", "b.flat"], ["y"], "add"),
    ]
    return Case(nodes, weights | {"flat": np.array([4])}, (3, 5))


CASES = {
    "Conv": conv((5, 5, 6), (4, 6, 3, 3), 4, pads=[1, 1, 1, 1]),
    "Conv, strides, dilations, uneven pads": conv(
        (5, 7, 8), (4, 6, 3, 2), 4, pads=[0, 1, 2, 0], strides=[2, 1], dilations=[1, 2]
    ),
    "Conv, SAME_UPPER": conv((5, 5, 6), (4, 6, 2, 3), 4, auto_pad="SAME_UPPER", strides=[2, 2]),
    "Conv, SAME_LOWER": conv((5, 5, 6), (4, 6, 2, 3), 4, auto_pad="SAME_LOWER", strides=[1, 2]),
    "Conv, one axis": conv((5, 9), (4, 6, 3), 4, pads=[1, 1]),
    "Conv, three axes": conv((5, 3, 4, 3), (2, 6, 2, 2, 2), 2),
    "Conv, places in groups": conv((5, 5, 5), (4, 3, 3, 3), 4, group=2, pads=[1, 1, 1, 1]),
    "Conv without a bias": conv((5, 5, 6), (4, 6, 3, 3), 4, bias=False),
    "ConvTranspose": conv((5, 4, 3), (6, 4, 3, 3), 4, op="ConvTranspose"),
    "ConvTranspose, strides, output_padding": conv(
        (5, 4, 3), (6, 4, 3, 4), 4, op="ConvTranspose", strides=[2, 3], pads=[1, 0, 1, 2], output_padding=[1, 0]
    ),
    "ConvTranspose, groups, dilations": conv(
        (5, 4, 4), (6, 2, 2, 2), 4, op="ConvTranspose", group=2, dilations=[2, 1], strides=[1, 2]
    ),
    "Gemm": rows([node("Gemm", ["h", "w", "b"], ["y"], "consumer")], {"w": r((6, 4)), "b": r(4)}, (5,)),
    "Gemm, transposed and scaled": rows(
        [node("Gemm", ["h", "w", "b"], ["y"], "consumer", transB=1, alpha=0.5, beta=2.0)],
        {"w": r((4, 6)), "b": r((1, 4))},
        (5,),
    ),
    "MatMul": rows([node("MatMul", ["h", "w"], ["y"], "consumer")], {"w": r((6, 4))}, (3, 5), free=None),
    "MatMul and Add": rows(
        [node("MatMul", ["h", "w"], ["m"], "consumer"), node("Add", ["b", "m"], ["y"], "add")],
        {"w": r((6, 4)), "b": r(4)},
        (3, 5),
    ),
    "MatMul and Sub": rows(
        [node("MatMul", ["h", "w"], ["m"], "consumer"), node("Sub", ["m", "b"], ["y"], "sub")],
        {"w": r((6, 4)), "b": r((1, 1, 4))},
        (3, 5),
    ),
    "MatMul, weight on the left": rows(
        [
            node("Transpose", ["h"], ["t"], "turn", perm=[0, 2, 1]),
            node("MatMul", ["w", "t"], ["m"], "consumer"),
            node("Add", ["m", "b"], ["y"], "add"),
        ],
        {"w": r((4, 6)), "b": r((4, 1))},
        (3, 5),
    ),
    "MatMul, a weight per matrix": rows(
        [node("MatMul", ["h", "w"], ["y"], "consumer")], {"w": r((3, 6, 4))}, (3, 2, 5), free=None
    ),
    "Einsum": rows(
        [node("Einsum", ["h", "w"], ["y"], "consumer", equation="bsk,ok->bso")],
        {"w": r((4, 6))},
        (3, 5),
        free=None,
    ),
    "Einsum, a weight per position": rows(
        [node("Einsum", ["w", "h"], ["y"], "consumer", equation="ksno,bsk->bnos")],
        {"w": r((6, 3, 2, 2))},
        (3, 5),
        free=None,
    ),
    "MatMul, transposed weight": moved((4, 6), ("Transpose", None, {"perm": [1, 0]})),
    "MatMul, reshaped weight": moved((6, 2, 2), ("Reshape", np.array([-1, 4]), {})),
    "MatMul, weight turned, squeezed, scaled": moved(
        (4, 1, 6), ("Transpose", None, {}), ("Squeeze", np.array([1]), {}), ("Mul", np.array(0.5), {})
    ),
    "MatMul, constant behind a Transpose and a scale": rows(
        [
            node("MatMul", ["h", "w"], ["m"], "consumer"),
            node("Reshape", ["m", "heads"], ["m.r"], "heads"),
            node("Transpose", ["m.r"], ["m.t"], "turn", perm=[0, 2, 1, 3]),
            node("Mul", ["m.t", "half"], ["m.s"], "scale"),
            node("Sub", ["m.s", "b"], ["y"], "sub"),
        ],
        {"w": r((6, 4)), "b": r((2, 1, 2)), "heads": np.array([0, 0, 2, 2]), "half": np.array(0.5)},
        (3, 5),
    ),
    "Conv, turned weight and bias with an axis": Case(
        [
            node("Transpose", ["w"], ["w.t"], "turn", perm=[3, 2, 0, 1]),
            node("Squeeze", ["b", "first"], ["b.s"], "squeeze"),
            node("Conv", ["h", "w.t", "b.s"], ["y"], "consumer"),
        ],
        {"w": r((3, 3, 6, 4)), "b": r((1, 4)), "first": np.array([0])},
        (5, 5, 6),
        "conv",
    ),
}


def design(layer, x, values):
    """Columns: the output for unit values of these stored tensors, less the output at zero, which comes second."""
    zero = layer(x, **values)
    columns = []
    for name, value in values.items():
        for k in range(value.size):
            unit = value.copy()
            unit.reshape(-1)[k] = 1
            columns.append((layer(x, **{**values, name: unit}) - zero).reshape(-1))
    return np.stack(columns, 1), zero.reshape(-1)


@pytest.mark.parametrize("mode", ["affine", "ls"])
@pytest.mark.parametrize("name", CASES)
def test_solution_is_that_of_brute_force(name, mode):
    case = CASES[name]
    model = model_of(case)
    analysis, plan = planned(model)
    x = rng.standard_normal((60, *case.shape))
    small = rewrite(analysis, plan)
    before = stored(small)
    free = ["w", *([case.free] if case.free is not None and mode == "affine" else [])]
    matrix, zero = design(Function(small), x, {n: np.zeros_like(before[n]) for n in free})
    wanted = np.linalg.lstsq(matrix, Function(model)(x).reshape(-1) - zero, rcond=None)[0]

    repaired = repair(analysis, plan, [{"x": x}], mode=mode, ridges=(0.0,), samples=60)

    found = stored(repaired.model)
    assert [c.mode for c in repaired.consumers] == ["ls" if case.free is None else mode]
    np.testing.assert_allclose(np.concatenate([found[n].reshape(-1) for n in free]), wanted, rtol=0, atol=1e-8)


def test_a_constant_goes_into_rows_of_its_own():
    """Of what is added to the layer's output, every row gets it; so it does where that is added inside another node."""
    skip = node(
        "SkipLayerNormalization", ["m", "x.4", "gamma", "beta", "b"], ["n", "", "", "y"], domain="com.microsoft"
    )
    place = node("Add", ["m", "places"], ["m.p"], "places")
    weights = {"w": r((6, 4)), "gamma": r(4), "beta": r(4), "b": r(4), "places": r((1, 3, 4))}
    some = {"starts": np.array([0]), "ends": np.array([4]), "axis": np.array([2])}
    first = [node("Slice", ["x", *some], ["x.4"]), node("MatMul", ["h", "w"], ["m"], "consumer")]
    for name, last in (("b", [skip]), ("places", [place, node("Identity", ["m.p"], ["y"])])):
        model = model_of(Case([*first, *last], weights | some, (3, 5)))
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
        analysis, plan = planned(model)
        x = r((20, 3, 5))
        h = np.tanh(x @ stored(analysis.graph.model)["p.w"] + stored(analysis.graph.model)["p.b"]).reshape(60, 6)

        found = stored(repair(analysis, plan, [{"x": x}], ridges=(0.0,), turns=0).model)

        wanted = np.linalg.lstsq(np.column_stack([h[:, [0, 2, 3]], np.ones(60)]), h @ weights["w"], rcond=None)[0]
        np.testing.assert_allclose(found["w"], wanted[:3], atol=1e-8)
        np.testing.assert_allclose(found[name], weights[name] + wanted[3], atol=1e-8)


@pytest.mark.parametrize("op, gates", [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
@pytest.mark.parametrize("directions", [1, 2])
def test_recurrent_input_matrix_gives_the_gates_what_the_original_gave(op, gates, directions):
    hidden = 3
    names = ["w", "r", "b"]
    shapes = [(directions, gates * hidden, 6), (directions, gates * hidden, hidden), (directions, 2 * gates * hidden)]
    weights = {n: r(s) for n, s in zip(names, shapes, strict=True)}
    direction = {"direction": "bidirectional" if directions == 2 else "forward", "hidden_size": hidden}
    case = Case([node(op, ["h", *names], ["y"], "consumer", **direction)], weights, (7, 5))
    model = model_of(case)
    analysis, plan = planned(model)
    x = r((4, 7, 5))
    h = np.tanh(x @ stored(analysis.graph.model)["p.w"] + stored(analysis.graph.model)["p.b"]).reshape(28, 6)

    repaired = repair(analysis, plan, [{"x": x}], ridges=(0.0,))

    found = stored(repaired.model)
    matrix = np.column_stack([h[:, [0, 2, 3]], np.ones(28)])
    half = gates * hidden
    for d in range(directions):
        wanted = np.linalg.lstsq(matrix, h @ weights["w"][d].T, rcond=None)[0]
        np.testing.assert_allclose(found["w"][d], wanted[:3].T, atol=1e-8)
        np.testing.assert_allclose(found["b"][d, :half], weights["b"][d, :half] + wanted[3], atol=1e-8)
        np.testing.assert_array_equal(found["b"][d, half:], weights["b"][d, half:])
    np.testing.assert_array_equal(found["r"], weights["r"])


def test_packed_attention_gives_its_heads_what_the_original_gave():
    weights = {"w": r((6, 18)), "b": r(18)}
    attended = node("Attention", ["h", "w", "b"], ["y"], "consumer", num_heads=2, domain="com.microsoft")
    model = model_of(Case([attended], weights, (7, 5)))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    analysis, plan = planned(model)
    x = r((4, 7, 5))
    h = np.tanh(x @ stored(analysis.graph.model)["p.w"] + stored(analysis.graph.model)["p.b"]).reshape(28, 6)

    found = stored(repair(analysis, plan, [{"x": x}], ridges=(0.0,)).model)

    wanted = np.linalg.lstsq(np.column_stack([h[:, [0, 2, 3]], np.ones(28)]), h @ weights["w"], rcond=None)[0]
    np.testing.assert_allclose(found["w"], wanted[:3], atol=1e-8)
    np.testing.assert_allclose(found["b"], weights["b"] + wanted[3], atol=1e-8)


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0])
def test_ridge_pulls_towards_the_weight_there_was(size):
    """As rows of their own: the penalty is n r |w' - w|^2, with r in units of the covariance's mean diagonal."""
    x, y, w = r((2, 40, 5)) + 1, r((2, 40, 3)), r((2, 3, 5))
    moments = Moments.zeros(2, 5, 3)
    moments.add(x[:, :15], y[:, :15])
    moments.add(x[:, 15:], y[:, 15:])

    found, _ = ridge(moments, w, None, size)

    for g in range(2):
        xc, yc = x[g] - x[g].mean(0), y[g] - y[g].mean(0)
        root = np.sqrt(40 * size * np.square(xc).sum() / 40 / 5)
        matrix, wanted = np.vstack([xc, root * np.eye(5)]), np.vstack([yc, root * w[g].T])
        np.testing.assert_allclose(found[g], np.linalg.lstsq(matrix, wanted, rcond=None)[0].T, atol=1e-8)


def test_error_is_the_sum_of_squares():
    x, y, w, offset = r((2, 30, 4)), r((2, 30, 3)), r((2, 3, 4)), r((2, 3))
    moments = Moments.zeros(2, 4, 3)
    moments.add(x, y)

    wanted = np.square(np.einsum("gop,gnp->gno", w, x) + offset[:, None] - y).sum()

    assert moments.error(w, offset) == pytest.approx(wanted, rel=1e-10)
    assert moments.spread() == pytest.approx(np.square(y - y.mean(1, keepdims=True)).sum(), rel=1e-10)
