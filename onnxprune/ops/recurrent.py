"""LSTM, GRU and RNN: a hidden unit is a row in every gate of W, R and B, and a column of R.

A unit whose rows are zero stays at zero: the candidate is tanh(0) = 0 and the state decays from an initial zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from onnxprune.axes.expr import Expr
from onnxprune.ops.lazy import kernels
from onnxprune.ops.quantised import real_table
from onnxprune.ops.registry import Operator
from onnxprune.ops.rules import AxisContext, Kind, Linear, MirrorContext, NodeView, PatchContext, Shape, Term

__all__ = ["OPERATORS"]

_run = kernels("recurrent")
_quant = kernels("quant")

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1, "com.microsoft::DynamicQuantizeLSTM": 4}
AT_REST = {"tanh", "relu", "affine", "leakyrelu", "thresholdedrelu", "elu", "softsign", "scaledtanh"}
CANDIDATES = {"LSTM": (1, 2), "GRU": (1,), "RNN": (0,), "com.microsoft::DynamicQuantizeLSTM": (1, 2)}


def recurrent_axes(c: AxisContext) -> None:
    """Inputs X, W, R, B, lengths, h0, c0, P; outputs Y, Y_h, Y_c. layout=1 puts the batch first."""
    gates = GATES[c.node.op]
    x, w, r = c.axes(0), c.axes(1), c.axes(2)
    transposed = c.node.op.startswith("com.microsoft")  # DynamicQuantizeLSTM keeps W and R transposed
    rows, columns = (2, 1) if transposed else (1, 2)
    hidden = c.note("hidden", c.fresh(r[columns].size))
    c.contract(Kind.PRODUCT, (0, 2), (1, columns))
    c.equal(r[columns], hidden)
    c.contract(Kind.STATE, (2, columns))
    gate = c.frozen(gates, "the gates of a recurrent cell")
    c.equal(w[rows], c.product(gate, hidden))
    c.equal(r[rows], c.product(gate, hidden))
    if c.has(3):
        both = c.frozen(2 * gates, "the gates of a recurrent cell")
        c.equal(c.axes(3)[1], c.product(both, hidden))
        c.freeze("the directions of a recurrent cell", c.axes(3)[0])
    c.freeze("the directions of a recurrent cell", w[0], r[0])
    batch_first = bool(c.attr("layout", 0))
    seq, batch = (x[1], x[0]) if batch_first else (x[0], x[1])
    c.freeze("a recurrent cell runs over it", seq)
    if c.has(4):
        c.equal(c.axes(4)[0], batch)
    for i in (5, 6):
        if c.has(i):
            c.equal(c.axes(i)[2], hidden)
            c.equal(c.axes(i)[0 if batch_first else 1], batch)
            c.freeze("the directions of a recurrent cell", c.axes(i)[1 if batch_first else 0])
    if c.has(7):
        c.equal(c.axes(7)[1], c.product(c.frozen(3, "the gates of a recurrent cell"), hidden))
        c.freeze("the directions of a recurrent cell", c.axes(7)[0])
    if transposed:
        per_row(c, rows, gates, hidden)
    states: list[tuple[Expr, ...]] = [(batch, w[0], hidden) if batch_first else (w[0], batch, hidden)] * 2
    states.insert(0, (batch, seq, w[0], hidden) if batch_first else (seq, w[0], batch, hidden))
    for j, _ in enumerate(c.node.outputs):
        c.output(*states[j], j=j)


def per_row(c: AxisContext, rows: int, gates: int, hidden: Expr) -> None:
    """Scales and zero points of the quantised W and R: per direction, or per direction and row."""
    for i in range(8, 12):
        if c.has(i) and len(c.axes(i)) == 2 and c.axes(i)[1].size == gates * hidden.size:
            c.equal(c.axes(i)[1], c.product(c.frozen(gates, "the gates of a recurrent cell"), hidden))


def recurrent_dead(node: NodeView, states: Sequence[float | None]) -> float | None:
    candidates = CANDIDATES[node.op]
    listed = node.attributes.get("activations")
    if listed:
        per_direction = max(candidates) + 1
        if any(name.lower() not in AT_REST for k, name in enumerate(listed) if k % per_direction in candidates):
            return None
        if any(float(b) for b in node.attributes.get("activation_beta", [])):
            return None
    zero = [1, 2, *(k for k in (3, 5, 6) if k < len(node.inputs) and node.inputs[k])]
    return 0.0 if all(states[k] == 0 for k in zero) else None


def recurrent_macs(
    node: NodeView, inputs: Sequence[tuple[Expr, ...]], outputs: Sequence[tuple[Expr, ...]]
) -> list[Term]:
    steps = inputs[0][:2]
    return [(1.0, (*steps, *inputs[1])), (1.0, (*steps, *inputs[2]))]


def patch_hidden(p: PatchContext) -> None:
    p.set_attr("hidden_size", p.noted("hidden"))


def quantised_lstm_shape(node, inputs):
    elem, x = inputs[0]
    directions, hidden = inputs[2][1][0], inputs[2][1][1]
    state = (elem, (directions, x[1], hidden))
    return [(elem, (x[0], directions, x[1], hidden)), state, state][: len(node.outputs)]


ACTIVATIONS = {"LSTM": ("sigmoid", "tanh", "tanh"), "GRU": ("sigmoid", "tanh"), "RNN": ("tanh",)}
PARAMETERS: dict[str, tuple[float, ...]] = {  # defaults of alpha and beta, where an activation has them
    "affine": (1.0, 0.0),
    "leakyrelu": (0.01,),
    "thresholdedrelu": (1.0,),
    "scaledtanh": (1.0, 1.0),
    "hardsigmoid": (0.2, 0.5),
    "elu": (1.0,),
}
KNOWN = {*PARAMETERS, "sigmoid", "tanh", "relu", "softsign", "softplus"}


def activations(m: MirrorContext, op: str, directions: int) -> list[tuple[str, float, float]]:
    """(name, alpha, beta) of every direction's activations. `activation_alpha` and `activation_beta` list only the
    numbers of those that have any."""
    names = [str(n).lower() for n in m.attr("activations") or ACTIVATIONS[op] * directions]
    alphas, betas = (iter(m.attr(name) or ()) for name in ("activation_alpha", "activation_beta"))
    found = []
    for name in names:
        if name not in KNOWN:
            raise m.unsupported(f"the activation {name}")
        defaults = PARAMETERS.get(name, ())
        alpha = float(next(alphas, defaults[0])) if defaults else 0.0
        beta = float(next(betas, defaults[1])) if len(defaults) > 1 else 0.0
        found.append((name, alpha, beta))
    return found


def recurrent_mirror(m: MirrorContext) -> Any:
    """Inputs X, W, R, B, lengths, h0, c0, P."""
    return recurrent(m, m.node.op, m.tensor(0), m.tensor(1), m.tensor(2))


def quantised_lstm_mirror(m: MirrorContext) -> Any:
    """An LSTM whose W and R are integers, and transposed, with scales and zero points behind its inputs. X is rounded
    after its range, as onnxruntime does; the state, which it rounds as well at every step, is not."""
    w, r = (real_table(m, i, 8 + k, 9 + k).mT for i, k in ((1, 0), (2, 2)))
    return recurrent(m, "LSTM", m.call(_quant.rounded, m.tensor(0)), w, r)


def recurrent(m: MirrorContext, op: str, x: Any, w: Any, r: Any) -> Any:
    """One fused layer of torch where that computes the same."""
    direction = m.attr("direction", "forward")
    functions = activations(m, op, 2 if direction == "bidirectional" else 1)
    clip = float(m.attr("clip", 0.0)) or None
    count = 2 if op == "LSTM" else 1
    states = tuple(m.optional(i) for i in range(5, 5 + count))
    inputs = (x, w, r, m.optional(3), m.optional(4), states)
    layout = (direction, bool(m.attr("layout", 0)))
    more: dict[str, Any] = {}
    if op == "LSTM" and m.has(7):
        more["peepholes"] = m.tensor(7)
    if op == "LSTM" and m.attr("input_forget", 0):
        more["coupled"] = True
    if op == "GRU" and m.attr("linear_before_reset", 0):
        more["linear_before_reset"] = True
    names = tuple(name for name, *_ in functions)
    kind = names[0].capitalize() if op == "RNN" and len(set(names)) == 1 else op
    plain = names == ACTIVATIONS[op] * (len(names) // len(ACTIVATIONS[op])) or kind in ("Tanh", "Relu")
    same = {"LSTM": not more, "GRU": bool(more), "RNN": True}[op]
    if plain and same and clip is None:
        found = m.call(_run.fused, kind, *inputs, *layout)
    else:
        found = m.call(_run.stepwise, op, *inputs, *layout, functions, clip, **more)
    return [found[j] for j in range(len(m.node.outputs))]


def recurrent_linear(node: NodeView, w: int, shapes: Sequence[Shape]) -> Linear | None:
    """What X gives to the gates. A constant goes into W's half of B."""
    weight = shapes[w]
    if w != 1 or weight is None or None in weight:
        return None
    directions, gates, width = (int(n or 0) for n in weight)

    def lay(c: np.ndarray) -> np.ndarray:
        return np.concatenate([c.reshape(directions, gates), np.zeros((directions, gates))], 1)

    bias = 3 if len(node.inputs) > 3 and node.inputs[3] else None
    terms = (("s", "b", "k"), ("d", "o", "k"), ("s", "b", "d", "o"))
    return Linear(0, 1, terms, (directions, gates, width), bias=bias, inside=True, lay=lay)


OPERATORS = (
    *(
        Operator(
            name,
            recurrent_axes,
            recurrent_dead,
            recurrent_macs,
            patch_hidden,
            mirror=recurrent_mirror,
            fixed=frozenset({5, 6}),  # where a sequence starts: stored zeros are no weights
            linear=recurrent_linear,
        )
        for name in ("LSTM", "GRU", "RNN")
    ),
    Operator(
        "com.microsoft::DynamicQuantizeLSTM",
        recurrent_axes,
        recurrent_dead,
        recurrent_macs,
        patch_hidden,
        shape=quantised_lstm_shape,
        rounds=True,
        keeps=frozenset({8, 9, 10, 11}),
        quantised=((1, 9), (2, 11)),
        mirror=quantised_lstm_mirror,
        fixed=frozenset({8, 10}),
    ),
)
