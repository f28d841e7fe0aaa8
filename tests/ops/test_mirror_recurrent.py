"""LSTM, GRU and RNN in the mirror: onnxruntime's numbers for every form, by torch's fused cells and step by step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from onnxprune.errors import NotMirrored
from onnxprune.mirroring import mirror
from tests.ops.mirroring import agree, differentiable, one_node, run_mirror

RNG = np.random.default_rng(0)
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
FEATURES, HIDDEN = 3, 5


def made(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) / 2).astype(np.float32)


def layer(
    op: str,
    direction: str = "forward",
    *,
    steps: int = 6,
    batch: int = 4,
    bias: bool = True,
    lengths: list[int] | None = None,
    states: bool = False,
    peepholes: bool = False,
    features: int = FEATURES,
    hidden: int = HIDDEN,
    **attributes: Any,
) -> tuple[list[np.ndarray | None], dict[str, Any]]:
    """Inputs of a layer and the attributes of its node."""
    ways, gates = 2 if direction == "bidirectional" else 1, GATES[op]
    inputs: list[np.ndarray | None] = [
        made(steps, batch, features),
        made(ways, gates * hidden, features),
        made(ways, gates * hidden, hidden),
        made(ways, 2 * gates * hidden) if bias else None,
        None if lengths is None else np.array(lengths, np.int32),
        *(
            [made(ways, batch, hidden) for _ in range(2 if op == "LSTM" else 1)]
            if states
            else [None] * (1 + (op == "LSTM"))
        ),
        *([made(ways, 3 * hidden)] if peepholes else []),
    ]
    while inputs[-1] is None:
        inputs.pop()
    more = {"direction": direction, "hidden_size": hidden, "count": 3 if op == "LSTM" else 2, **attributes}
    return inputs, more


def node(op: str, direction: str = "forward", **more: Any) -> Any:
    inputs, attributes = layer(op, direction, **more)
    stored = [k for k in (1, 2, 3, 7) if k < len(inputs) and inputs[k] is not None]
    return one_node(op, inputs, stored=stored, **attributes)


def fused(model: Any) -> bool:
    return "recurrent_fused" in mirror(model).code


DIRECTIONS = ["forward", "reverse", "bidirectional"]
FORMS: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"states": True},
    {"lengths": [6, 6, 6, 6]},
    {"lengths": [2, 6, 1, 4], "states": True},
]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("opset", [7, 14])
@pytest.mark.parametrize(
    ("op", "attributes"),
    [("LSTM", {}), ("GRU", {"linear_before_reset": 1}), ("RNN", {}), ("RNN", {"activations": ["Relu"]})],
)
def test_fused(op: str, attributes: dict[str, Any], form: dict[str, Any], direction: str, opset: int) -> None:
    if "activations" in attributes and direction == "bidirectional":
        attributes = {"activations": ["Relu", "Relu"]}
    model, fed = node(op, direction, opset=opset, **form, **attributes)
    assert fused(model)
    agree(model, fed)


ODD: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {"peepholes": True, "states": True}),
    ("LSTM", {"input_forget": 1}),
    ("LSTM", {"clip": 0.3}),
    ("LSTM", {"activations": ["HardSigmoid", "Softsign", "Tanh"], "activation_alpha": [0.3], "activation_beta": [0.4]}),
    ("LSTM", {"activations": ["Sigmoid", "LeakyRelu", "ScaledTanh"], "activation_alpha": [0.2, 1.2], "activation_beta": [0.7]}),
    ("GRU", {}),
    ("GRU", {"bias": False, "states": True}),
    ("GRU", {"clip": 0.3, "linear_before_reset": 1}),
    ("GRU", {"activations": ["HardSigmoid", "Elu"], "activation_alpha": [0.3, 0.9], "activation_beta": [0.4]}),
    ("RNN", {"clip": 0.2}),
    ("RNN", {"activations": ["Affine"], "activation_alpha": [0.4], "activation_beta": [0.1]}),
    ("RNN", {"activations": ["Softplus"]}),
    ("RNN", {"activations": ["ThresholdedRelu"], "activation_alpha": [0.1]}),
]  # fmt: skip


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("op", "form"), ODD)
@pytest.mark.parametrize("lengths", [None, [2, 6, 1, 4]])
def test_step_by_step(op: str, form: dict[str, Any], direction: str, lengths: list[int] | None) -> None:
    if direction == "bidirectional":
        doubled = {k: [*v, *v] for k, v in form.items() if k.startswith("activation")}
        form = {**form, **doubled}
    model, fed = node(op, direction, lengths=lengths, **form)
    assert not fused(model)
    agree(model, fed)


@pytest.mark.parametrize("op", ["LSTM", "GRU"])
def test_each_direction_has_its_own_activations(op: str) -> None:
    own = {"LSTM": ["Tanh", "Tanh"], "GRU": ["Tanh"]}[op]
    agree(*node(op, "bidirectional", activations=["Sigmoid", *own, "HardSigmoid", *["Softsign"] * len(own)]))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("op", "attributes"), [("LSTM", {}), ("GRU", {"linear_before_reset": 1}), ("GRU", {})])
def test_batch_first(op: str, attributes: dict[str, Any], direction: str) -> None:
    """onnxruntime has no such layout: it is the usual one, transposed."""
    inputs, more = layer(op, direction, states=True, lengths=[2, 6, 1, 4], **attributes)
    stored = (1, 2, 3)
    usual = run_mirror(*one_node(op, inputs, stored=stored, **more))
    first = [None if x is None else x.swapaxes(0, 1) if k in (0, 5, 6) else x for k, x in enumerate(inputs)]
    y, *last = run_mirror(*one_node(op, first, stored=stored, layout=1, **more))
    np.testing.assert_allclose(y, usual[0].transpose(2, 0, 1, 3), rtol=1e-5, atol=1e-6)
    for a, b in zip(last, usual[1:], strict=True):
        np.testing.assert_allclose(a, b.swapaxes(0, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("op", "attributes"), [("LSTM", {}), ("GRU", {"linear_before_reset": 1})])
def test_a_sequence_without_steps_keeps_its_states(op: str, attributes: dict[str, Any]) -> None:
    inputs, more = layer(op, states=True, lengths=[2, 0, 6, 4], **attributes)
    y, *last = run_mirror(*one_node(op, inputs, stored=(1, 2, 3), **more))
    assert not y[:, :, 1].any() and not y[2:, :, 0].any()
    for found, given in zip(last, inputs[5:], strict=True):
        assert given is not None
        np.testing.assert_array_equal(found[:, 1], given[:, 1])


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    ("op", "form"),
    [
        ("LSTM", {"states": True}),
        ("LSTM", {"lengths": [1, 3]}),
        ("LSTM", {"peepholes": True, "lengths": [1, 3]}),
        ("LSTM", {"input_forget": 1}),
        ("GRU", {"linear_before_reset": 1, "states": True}),
        ("GRU", {}),
        ("RNN", {}),
        ("RNN", {"clip": 0.6}),
    ],
)
def test_derivatives(op: str, form: dict[str, Any], direction: str) -> None:
    inputs, more = layer(op, direction, steps=3, batch=2, features=1, hidden=2, **form)
    differentiable(op, inputs, **more)


def test_gradients_are_those_of_the_torch_module() -> None:
    native = torch.nn.LSTM(FEATURES, HIDDEN, bidirectional=True)
    named = dict(native.named_parameters())

    def stacked(*names: str) -> np.ndarray:
        """Of both directions, torch's i f g o as ONNX's i o f c."""
        rows = [
            np.concatenate([named[n + way].detach().numpy().reshape(4, HIDDEN, -1)[[0, 3, 1, 2]].reshape(4 * HIDDEN, -1) for n in names])
            for way in ("", "_reverse")
        ]  # fmt: skip
        return np.stack(rows)

    w, r, b = stacked("weight_ih_l0"), stacked("weight_hh_l0"), stacked("bias_ih_l0", "bias_hh_l0")[:, :, 0]
    x = made(6, 4, FEATURES)
    model, _ = one_node("LSTM", [x, w, r, b], stored=(1, 2, 3), direction="bidirectional", hidden_size=HIDDEN)
    module = mirror(model)
    y = module(torch.from_numpy(x))
    wanted, _ = native(torch.from_numpy(x))
    torch.testing.assert_close(y.transpose(1, 2).flatten(2), wanted)
    y.square().sum().backward()
    wanted.square().sum().backward()
    found = module.get_parameter("x1").grad
    assert found is not None
    gradient = named["weight_ih_l0"].grad
    assert gradient is not None
    torch.testing.assert_close(found[0].view(4, HIDDEN, -1), gradient.view(4, HIDDEN, -1)[[0, 3, 1, 2]])


def test_an_activation_that_nobody_knows_is_named() -> None:
    with pytest.raises(NotMirrored, match="swirl"):
        mirror(node("RNN", activations=["Swirl"])[0])


def test_stored_initial_states_are_no_weights() -> None:
    inputs, more = layer("LSTM", states=True)
    module = mirror(one_node("LSTM", inputs, stored=(1, 2, 3, 5, 6), **more)[0])
    assert {n for n, _ in module.named_parameters()} == {"x1", "x2", "x3"}
    assert {n for n, _ in module.named_buffers()} == {"x5", "x6"}


@pytest.mark.parametrize("op", GATES)
def test_states_of_another_batch_are_refused(op: str) -> None:
    """torch's cells would read past the end of them."""
    inputs, more = layer(op, states=True, batch=1, **({"linear_before_reset": 1} if op == "GRU" else {}))
    model, _ = one_node(op, inputs, stored=(1, 2, 3), **more)
    x, *states = (torch.from_numpy(a) for a in (inputs[0], *inputs[5:]) if a is not None)
    with pytest.raises(RuntimeError, match="states of"):
        mirror(model).forward(x.expand(-1, 2, -1), *states)
