"""Heads whose query and key columns lost some: the products come as near to the original's as a matrix per head between
the two can bring them, by brute force, however the graph writes them; and the layers that can't absorb it are named."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from consumer_cases import Case, Function, model_of, stored
from onnx import helper, numpy_helper

from onnxprune import compress
from onnxprune.axes.analysis import Analysis, analyse
from onnxprune.axes.expr import atoms
from onnxprune.model.graph import Model
from onnxprune.model.infer import infer
from onnxprune.model.load import load
from onnxprune.ops import OPERATORS
from onnxprune.reconstruct import repair
from onnxprune.reconstruct.bilinear import Grams
from onnxprune.rewrite.rewrite import rewrite
from onnxprune.select.plan import Plan

node = helper.make_node
rng = np.random.default_rng(11)
r = rng.standard_normal

LENGTH, WIDTH, HEADS, COLUMNS = 7, 6, 2, 5
ALL = HEADS * COLUMNS
SHAPE = {"heads": np.array([0, LENGTH, HEADS, COLUMNS])}
KEPT = np.array([0, 2, 3])


def layer(name: str, source: str = "h", outputs: int = ALL) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    nodes = [
        node("MatMul", [source, f"w{name}"], [f"{name}.m"], f"layer {name}"),
        node("Add", [f"b{name}", f"{name}.m"], [name], f"bias {name}"),
    ]
    return nodes, {f"w{name}": r((WIDTH, outputs)), f"b{name}": r(outputs)}


def by_heads(name: str, perm: Sequence[int] = (0, 2, 1, 3)) -> list[onnx.NodeProto]:
    return [
        node("Reshape", [name, "heads"], [f"{name}.r"], f"heads of {name}"),
        node("Transpose", [f"{name}.r"], [f"{name}.t"], f"turn {name}", perm=perm),
    ]


def separate(between: Sequence[onnx.NodeProto] = (), q: str = "q.t", k: str = "k.t", **more: np.ndarray) -> Case:
    """Two layers; `between` turns q.t and k.t (already transposed) into what is multiplied."""
    (first, a), (second, b) = layer("q"), layer("k")
    nodes = [*first, *second, *by_heads("q"), *by_heads("k", (0, 2, 3, 1)), *between]
    return case([*nodes, node("MatMul", [q, k], ["y"], "product")], a | b | more)


def case(nodes: Sequence[onnx.NodeProto], weights: dict[str, np.ndarray]) -> Case:
    return Case(nodes, weights, (LENGTH, WIDTH), units=WIDTH)


def packed_split() -> Case:
    nodes, weights = layer("all", outputs=3 * ALL)
    nodes += [
        node("Split", ["all"], ["q", "k", "v"], "parts", axis=-1),
        node("ReduceSum", ["v"], ["v.sum"], keepdims=0),
    ]
    nodes += [*by_heads("q"), *by_heads("k", (0, 2, 3, 1)), node("MatMul", ["q.t", "k.t"], ["s"], "product")]
    return case([*nodes, node("Add", ["s", "v.sum"], ["y"], "rest")], weights)


def packed_bias() -> Case:
    """A bias that is put together, in which keys have none: nothing can be absorbed into the queries'."""
    of = packed_split()
    weights = {n: w for n, w in of.weights.items() if n != "ball"} | {"bq": r(ALL), "bk": np.zeros(ALL), "bv": r(ALL)}
    return case([node("Concat", ["bq", "bk", "bv"], ["ball"], "biases", axis=0), *of.nodes], weights)


def packed_gather() -> Case:
    nodes, weights = layer("all", outputs=3 * ALL)
    nodes += [
        node("Reshape", ["all", "five"], ["all.r"], "five"),
        node("Transpose", ["all.r"], ["all.t"], "turn", perm=[2, 0, 3, 1, 4]),
        *(node("Gather", ["all.t", f"at{k}"], [n], f"part {n}", axis=0) for k, n in enumerate(("q", "k"))),
        node("Transpose", ["k"], ["k.t"], "turn k", perm=[0, 1, 3, 2]),
        node("Mul", ["q", "scale"], ["q.s"], "scaled"),
        node("MatMul", ["q.s", "k.t"], ["y"], "product"),
    ]
    return case(nodes, weights)


def einsum() -> Case:
    weights = {"wq": r((WIDTH, HEADS, COLUMNS)), "wk": r((WIDTH, HEADS, COLUMNS)), "bq": r((HEADS, COLUMNS))}
    nodes = [
        node("Einsum", ["h", "wq"], ["q.m"], "layer q", equation="bsc,chd->bshd"),
        node("Add", ["q.m", "bq"], ["q"], "bias q"),
        node("Einsum", ["h", "wk"], ["k"], "layer k", equation="bsc,chd->bshd"),
        node("Einsum", ["k", "q"], ["y"], "product", equation="bjhd,bihd->bhij"),
    ]
    return case(nodes, weights)


def convolutions() -> Case:
    weights = {"wq": r((ALL, WIDTH, 1)), "wk": r((ALL, WIDTH, 1)), "bq": r(ALL), "bk": r(ALL)}
    nodes = [node("Transpose", ["h"], ["h.t"], "channels first", perm=[0, 2, 1])]
    for n in "qk":
        nodes += [
            node("Conv", ["h.t", f"w{n}", f"b{n}"], [n], f"layer {n}", strides=[1 + (n == "k")]),
            node("Reshape", [n, "split"], [f"{n}.r"], f"heads of {n}"),
        ]
    nodes += [node("Transpose", ["q.r"], ["q.t"], "turn q", perm=[0, 1, 3, 2])]
    return case([*nodes, node("MatMul", ["q.t", "k.r"], ["y"], "product")], weights)


def shared_keys() -> Case:
    """Two heads of queries and one of keys."""
    (first, a), (second, b) = layer("q"), layer("k", outputs=COLUMNS)
    nodes = [
        *first,
        *second,
        *by_heads("q"),
        node("Transpose", ["k"], ["k.t"], "turn k", perm=[0, 2, 1]),
        node("Unsqueeze", ["k.t", "one"], ["k.u"], "a head"),
        node("Expand", ["k.u", "twice"], ["k.e"], "both heads"),
    ]
    return case([*nodes, node("MatMul", ["q.t", "k.e"], ["y"], "product")], a | b)


def rotary() -> Case:
    """Pairs of columns are turned by angles that depend on the place."""
    (first, a), (second, b) = layer("q", outputs=4 * HEADS), layer("k", outputs=4 * HEADS)
    nodes = [*first, *second]
    for n in "qk":
        nodes += [
            node("Reshape", [n, "fours"], [f"{n}.r"], f"heads of {n}"),
            node("Transpose", [f"{n}.r"], [f"{n}.t"], f"turn {n}", perm=[0, 2, 1, 3]),
            node("Split", [f"{n}.t"], [f"{n}.1", f"{n}.2"], f"halves of {n}", axis=-1),
            node("Neg", [f"{n}.2"], [f"{n}.-2"], f"negative {n}"),
            node("Concat", [f"{n}.-2", f"{n}.1"], [f"{n}.21"], f"other halves of {n}", axis=-1),
            node("Mul", [f"{n}.t", "cos"], [f"{n}.cos"], f"cos {n}"),
            node("Mul", [f"{n}.21", "sin"], [f"{n}.sin"], f"sin {n}"),
            node("Add", [f"{n}.cos", f"{n}.sin"], [f"{n}.turned"], f"rotated {n}"),
        ]
    nodes += [
        node("Transpose", ["k.turned"], ["k.across"], "across", perm=[0, 1, 3, 2]),
        node("MatMul", ["q.turned", "k.across"], ["y"], "product"),
    ]
    angles = np.tile(np.arange(LENGTH)[:, None] * [1.0, 0.1], 2)
    return case(nodes, a | b | {"cos": np.cos(angles), "sin": np.sin(angles)})


def one_axis(*, heads_first: bool) -> Case:
    """Samples and heads lie in one axis."""
    (first, a), (second, b) = layer("q"), layer("k")
    nodes = [*first, *second]
    for n, last in (("q", [1, 2]), ("k", [2, 1])):
        outer = [2, 0] if heads_first else [0, 2]
        perm = [*outer, *({1: 1, 2: 3}[k] for k in last)]
        nodes += [
            *by_heads(n, perm),
            node("Reshape", [f"{n}.t", f"flat {n}"], [f"{n}.f"], f"one axis of {n}"),
        ]
    return case([*nodes, node("MatMul", ["q.f", "k.f"], ["y"], "product")], a | b)


CASES = {
    "two layers": separate(),
    "scaled, both": separate(
        [node("Mul", ["q.t", "scale"], ["q.s"], "scale q"), node("Div", ["k.t", "scale"], ["k.s"], "scale k")],
        "q.s",
        "k.s",
    ),
    "nothing but the keys' layer can take it": separate([node("Tanh", ["q.t"], ["q.b"], "bend")], "q.b"),
    "places of their own": separate(
        [node("Add", ["q.t", "place"], ["q.p"], "places")], "q.p", place=r((LENGTH, COLUMNS))
    ),
    "places of their own, per head": separate(
        [node("Sub", ["q.t", "place"], ["q.p"], "places")], "q.p", place=r((1, HEADS, LENGTH, COLUMNS))
    ),
    "FusedMatMul": case(
        [
            *layer("q")[0],
            *layer("k")[0],
            *by_heads("q"),
            *by_heads("k"),
            node("FusedMatMul", ["q.t", "k.t"], ["y"], "product", domain="com.microsoft", transB=1, alpha=0.25),
        ],
        layer("q")[1] | layer("k")[1],
    ),
    "packed, split": packed_split(),
    "packed, with a bias that is put together": packed_bias(),
    "packed, turned and gathered": packed_gather(),
    "samples and heads in one axis": one_axis(heads_first=False),
    "heads and samples in one axis": one_axis(heads_first=True),
    "Einsum": einsum(),
    "convolutions": convolutions(),
    "shared keys": shared_keys(),
}


def made(of: Case) -> onnx.ModelProto:
    model = model_of(of)
    constants = {
        **SHAPE,
        "flat q": np.array([-1, LENGTH, COLUMNS]),
        "flat k": np.array([-1, COLUMNS, LENGTH]),
        "fours": np.array([0, LENGTH, HEADS, 4]),
        "five": np.array([0, LENGTH, 3, HEADS, COLUMNS]),
        "split": np.array([0, HEADS, COLUMNS, -1]),
        "at0": np.array(0),
        "at1": np.array(1),
        "at2": np.array(2),
        "one": np.array([1]),
        "twice": np.array([1, HEADS, 1, 1]),
    }
    model.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in constants.items())
    model.graph.initializer.append(numpy_helper.from_array(np.array(0.5), "scale"))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


def columns_removed(model: onnx.ModelProto) -> tuple[Analysis, Plan]:
    """The plan that keeps the same query and key columns of every head."""
    analysis = analyse(load(model))
    product = next(n for n in analysis.graph.nodes if n.label == "product")
    over = [a for c in analysis.contractions[product.index] for a in atoms(c.over)]
    group = next(g for g in analysis.groups if g.atom in over)
    return analysis, Plan({group.id: np.array([k for k in KEPT if k < group.size])})


def tensor(model: onnx.ModelProto | Model, name: str, x: np.ndarray) -> np.ndarray:
    """A tensor of a model by name."""
    graph = Function(model).graph
    proto = onnx.ModelProto()
    proto.CopyFrom(graph.model.proto)
    del proto.graph.output[:]
    proto.graph.output.append(onnx.ValueInfoProto(name=name))
    return Function(Model(proto, graph.model.payloads))(x)


def factors(model: onnx.ModelProto | Model, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The product's inputs, (samples, heads, rows, columns), and its output."""
    graph = Function(model).graph
    product = next(n for n in graph.nodes if n.label == "product")
    found = [tensor(model, name, x) for name in (*product.inputs, product.outputs[0])]
    if found[0].ndim == 3:  # samples and heads lie in one axis
        turn = next(n for n in graph.nodes if n.label == "turn q").attributes["perm"]
        heads = len(found[0]) // len(x)
        by = [f.reshape(heads, -1, *f.shape[1:]) if turn[0] == 2 else f.reshape(-1, heads, *f.shape[1:]) for f in found]
        found = [f.swapaxes(0, 1) if turn[0] == 2 else f for f in by]
    q, k, y = found
    if product.op == "Einsum":
        q, k = k.transpose(0, 2, 1, 3), q.transpose(0, 2, 1, 3)
    elif "Fused" not in product.op:
        k = k.swapaxes(-1, -2)
    return q, k, y


@pytest.mark.parametrize("name", CASES)
def test_products_are_those_of_brute_force(name):
    model = made(CASES[name])
    analysis, plan = columns_removed(model)
    x = r((9, LENGTH, WIDTH))
    q, k, _ = factors(rewrite(analysis, plan), x)
    wanted = factors(model, x)[2]

    repaired = repair(analysis, plan, [{"x": x}], ridges=(0.0,))

    assert [(c.label, c.mode) for c in repaired.consumers if c.columns == len(KEPT)] == [("product", "ls")]
    assert not repaired.left
    found = factors(repaired.model, x)[2]
    for h in range(HEADS):
        matrix = np.einsum("bic,bjd->bijcd", q[:, h], k[:, h]).reshape(-1, len(KEPT) ** 2)
        best = np.linalg.lstsq(matrix, wanted[:, h].reshape(-1), rcond=None)[0]
        np.testing.assert_allclose(found[:, h].reshape(-1), matrix @ best, rtol=0, atol=1e-8)


def attention(of: Case) -> onnx.ModelProto:
    """What a case multiplies, as the logits of an attention, with values and a projection behind it."""
    model = made(of)
    model.graph.node[-1].output[0] = "logits"
    flat = any(n.output[0] == "q.f" for n in model.graph.node)
    (values, weights), perm = layer("v"), [0, 2, 1, 3]
    for turn in (n for n in model.graph.node if n.name == "turn q"):
        perm = list(helper.get_node_attr_value(turn, "perm"))
    rest = [*values, *by_heads("v", perm)]
    if any(n.output[0] == "all.t" for n in model.graph.node):
        rest, weights = [node("Gather", ["all.t", "at2"], ["v.t"], "part v", axis=0)], {}
    if flat:
        rest.append(node("Reshape", ["v.t", "flat q"], ["v.f"], "one axis of v"))
    rest += [
        node("Softmax", ["logits"], ["shares"], "softmax", axis=-1),
        node("MatMul", ["shares", "v.f" if flat else "v.t"], ["mixed"], "mix"),
    ]
    if flat:
        rest.append(node("Reshape", ["mixed", "apart"], ["mixed.a"], "two axes"))
    turned = np.argsort(perm)
    rest += [
        node("Transpose", ["mixed.a" if flat else "mixed"], ["mixed.t"], "turn back", perm=[int(k) for k in turned]),
        node("Reshape", ["mixed.t", "rows"], ["rows of heads"], "heads together"),
        node("MatMul", ["rows of heads", "wo"], ["y"], "out"),
    ]
    model.graph.node.extend(rest)
    apart = [HEADS, -1, LENGTH, COLUMNS] if perm[0] == 2 else [-1, HEADS, LENGTH, COLUMNS]
    shapes = {"apart": np.array(apart), "rows": np.array([0, 0, ALL])}
    weights = {**weights, "wo": r((ALL, 4)), **shapes}
    model.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in weights.items())
    return model


@pytest.mark.parametrize("name", ["two layers", "samples and heads in one axis", "heads and samples in one axis"])
def test_heads_that_go_as_a_whole_are_left_out_of_the_products(name):
    model = attention(CASES[name])
    analysis, plan = columns_removed(model)
    heads = next(g for g in analysis.groups if g.size == HEADS and any(m.initializer == "wq" for m in g.members))
    plan = Plan({**plan.keep, heads.id: np.array([1])})
    x = r((9, LENGTH, WIDTH))
    q, k, _ = factors(rewrite(analysis, plan), x)
    wanted = factors(model, x)[2][:, 1]

    repaired = repair(analysis, plan, [{"x": x}], ridges=(0.0,))

    assert {c.label: c.mode for c in repaired.consumers} == {"product": "ls", "out": "ls"} and not repaired.left
    found = factors(repaired.model, x)[2]
    matrix = np.einsum("bic,bjd->bijcd", q[:, 0], k[:, 0]).reshape(-1, len(KEPT) ** 2)
    best = np.linalg.lstsq(matrix, wanted.reshape(-1), rcond=None)[0]
    np.testing.assert_allclose(found.reshape(-1), matrix @ best, rtol=0, atol=1e-8)
    # and what comes behind is solved for on what the product gives now
    rows = tensor(repaired.model, "rows of heads", x).reshape(9 * LENGTH, -1)
    best = np.linalg.lstsq(rows, Function(model)(x).reshape(len(rows), -1), rcond=None)[0]
    np.testing.assert_allclose(stored(repaired.model)["wo"], best, rtol=0, atol=1e-8)


def fused(op: str, *, flat: bool = True, shared: int = HEADS, **attributes: object) -> onnx.ModelProto:
    """Queries of all heads and keys and values of `shared` ones, and an operator that does the rest."""
    weights: dict[str, np.ndarray] = {}
    nodes: list[onnx.NodeProto] = []
    for n, heads in (("q", HEADS), ("k", shared), ("v", shared)):
        more, stored_weights = layer(n, outputs=heads * COLUMNS)
        nodes += more if flat else [*more, *by_heads(n)]
        weights |= stored_weights
    inputs = list("qkv") if flat else ["q.t", "k.t", "v.t"]
    nodes.append(
        node(op.rpartition("::")[2], inputs, ["mixed"], "product", domain=op.rpartition("::")[0], **attributes)
    )
    if not flat:
        nodes += [
            node("Transpose", ["mixed"], ["mixed.t"], "turn back", perm=[0, 2, 1, 3]),
            node("Reshape", ["mixed.t", "rows"], ["mixed.r"], "heads together"),
        ]
    nodes.append(node("MatMul", ["mixed" if flat else "mixed.r", "wo"], ["y"], "out"))
    model = made(case(nodes, {**weights, "wo": r((ALL, 4))}))
    model.graph.initializer.append(numpy_helper.from_array(np.array([0, 0, ALL]), "rows"))
    model.opset_import[0].version = 23
    return model


FUSED = {
    "MultiHeadAttention": {"op": "com.microsoft::MultiHeadAttention", "num_heads": HEADS},
    "Attention": {"op": "Attention", "q_num_heads": HEADS, "kv_num_heads": HEADS, "is_causal": 1},
    "Attention, shared keys": {"op": "Attention", "q_num_heads": HEADS, "kv_num_heads": 1, "shared": 1},
    "Attention, by heads": {"op": "Attention", "flat": False},
}


@pytest.mark.parametrize("name", FUSED)
def test_fused_attention_as_if_it_were_a_product_of_its_own(name):
    model = fused(**FUSED[name], scale=0.4)
    analysis, plan = columns_removed(model)
    before, original = stored(rewrite(analysis, plan)), stored(analysis.graph.model)
    x = r((9, LENGTH, WIDTH))
    h = np.tanh(x @ original["p.w"] + original["p.b"])

    repaired = repair(analysis, plan, [{"x": x}], ridges=(0.0,))

    assert {c.label: c.mode for c in repaired.consumers} == {"product": "ls", "out": "ls"} and not repaired.left
    after = stored(repaired.model)
    np.testing.assert_array_equal(before["wk"], after["wk"])

    def by_head(weights: dict[str, np.ndarray], n: str, columns: int) -> np.ndarray:
        return (h @ weights[f"w{n}"] + weights[f"b{n}"]).reshape(9, LENGTH, -1, columns).transpose(2, 0, 1, 3)

    q, k, new = (by_head(w, n, len(KEPT)) for w, n in ((before, "q"), (before, "k"), (after, "q")))
    wanted = by_head(original, "q", COLUMNS) @ by_head(original, "k", COLUMNS).swapaxes(2, 3)
    for head in range(HEADS):
        keys = k[head % len(k)]
        matrix = np.einsum("bic,bjd->bijcd", q[head], keys).reshape(-1, len(KEPT) ** 2)
        best = np.linalg.lstsq(matrix, wanted[head].reshape(-1), rcond=None)[0]
        found = new[head] @ keys.swapaxes(1, 2)
        np.testing.assert_allclose(found.reshape(-1), matrix @ best, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["packed, split", "packed, turned and gathered"])
def test_of_a_packed_layer_the_queries_alone_change(name):
    model = made(CASES[name])
    analysis, plan = columns_removed(model)
    before = stored(rewrite(analysis, plan))
    after = stored(repair(analysis, plan, [{"x": r((9, LENGTH, WIDTH))}]).model)
    of_queries = HEADS * len(KEPT)
    for n in ("wall", "ball"):
        assert not np.isclose(before[n][..., :of_queries], after[n][..., :of_queries]).any()
        np.testing.assert_array_equal(before[n][..., of_queries:], after[n][..., of_queries:])


LEFT = {
    "both are bent": (
        separate([node("Tanh", [n], [f"{n}.b"], f"bend {n}") for n in ("q.t", "k.t")], "q.t.b", "k.t.b"),
        "Tanh 'bend q.t' lies between a layer and the product",
    ),
    "scaled place by place": (
        separate(
            [node("Mul", ["q.t", "down"], ["q.s"], "scale q"), node("Mul", ["k.t", "across"], ["k.s"], "scale k")],
            "q.s",
            "k.s",
            down=r((LENGTH, 1)),
            across=r(LENGTH),
        ),
        "Mul 'scale q' lies between a layer and the product",
    ),
    "rotated": (rotary(), "lies between a layer and the product"),
    "read twice": (
        separate([node("Tanh", [n], [f"{n}.b"], f"bend {n}") for n in ("q.t", "k.t")]),
        "reads the same outputs",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_absorb_it_is_left_with_the_reason(name):
    of, reason = LEFT[name]
    model = made(of)
    if name == "read twice":
        extra = [node("ReduceSum", [f"{n}.b"], [f"{n}.sum"], keepdims=0) for n in ("q.t", "k.t")]
        model.graph.node[-1].output[0] = "scores"
        model.graph.node.extend([*extra, node("Sum", ["scores", *(n.output[0] for n in extra)], ["y"], "sum")])
    analysis, plan = columns_removed(model)
    repaired = repair(analysis, plan, [{"x": r((9, LENGTH, WIDTH))}])
    assert [x.label for x in repaired.left] == ["product"]
    assert reason in repaired.left[0].reason
    assert "product" not in [c.label for c in repaired.consumers]


def test_moments_that_do_not_fit_are_of_fewer_samples():
    model = made(CASES["two layers"])
    analysis, plan = columns_removed(model)
    data = [{"x": r((6, LENGTH, WIDTH))} for _ in range(10)]
    room = 4 * 20 * Grams.nbytes(1, HEADS, len(KEPT))
    rows = [repair(analysis, plan, data, memory_limit=m).consumers[0].rows for m in (1 << 30, room)]
    assert rows == [60, 20]


def test_compress_repairs_heads_and_their_columns():
    """From the command's own entry: proved, repaired, and nearer to the original on inputs of its own."""
    model = attention(packed_gather())
    given = {"x": r((64, LENGTH, WIDTH))}
    how = {"target": "channels=0.6", "align": 1, "data": given}
    plain, repaired = (compress(model, **how, repair=mode) for mode in ("none", "affine"))
    assert repaired.verification is not None and repaired.verification.passed
    consumers = {c["label"]: c for c in repaired.repair.consumers}
    assert set(consumers) == {"layer all", "product", "out"} and not repaired.repair.left
    assert consumers["product"]["mode"] == "ls" and consumers["product"]["after"] < consumers["product"]["before"]
    others = r((50, LENGTH, WIDTH))
    wanted = Function(model)(others)
    errors = [np.square(Function(infer(f.model, OPERATORS).model)(others) - wanted).sum() for f in (plain, repaired)]
    assert errors[1] < errors[0]
