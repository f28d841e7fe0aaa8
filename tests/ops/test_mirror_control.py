"""Control flow, sequences and optional values in the mirror."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import onnx.parser
import pytest
import torch

from onnxprune.errors import NotMirrored
from onnxprune.mirroring import mirror
from tests.ops.mirroring import agree, one_node, run_mirror, run_onnxruntime

RNG = np.random.default_rng(0)


def f(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def text(graph: str, opset: int = 17) -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> {graph}')


BRANCHES = """
agraph (float[N, 3] x, bool flag) => (float[N, 2] y)
<float[3, 2] W = {1, 2, 3, 4, 5, 6}>
{
    y = If (flag) <
        then_branch = g1 () => (float[N, 2] t)
            <float[3, 2] own = {0.5, -1, 2, 0.25, 1, 3}> { t = MatMul(x, own) },
        else_branch = g2 () => (float[N, 2] e)
            <float[2] own = {10, 20}> { h = MatMul(x, W)  e = Add(h, own) }
    >
}
"""

LOOP = """
agraph (float[N, 2] x, int64 n) => (float[N, 2] y, float[T, N, 2] steps)
<float[2, 2] W = {0.5, -1, 2, 0.25}, bool yes = {1}>
{
    y, steps = Loop (n, yes, x) <
        body = step (int64 i, bool going, float[N, 2] h) => (bool on, float[N, 2] next, float[N, 2] out)
            <float[2] bias = {0.1, 0.2}> {
                on = Identity(going)
                product = MatMul(h, W)
                next = Add(product, bias)
                out = Mul(next, next)
            }
    >
}
"""

UNTIL = """
agraph (float[N] x, float limit) => (float[N] y, int64 count)
<bool yes = {1}, int64 zero = {0}, int64 one = {1}>
{
    y, count = Loop (, yes, x, zero) <
        body = step (int64 i, bool going, float[N] h, int64 c) => (bool on, float[N] next, int64 d) {
            next = Add(h, h)
            d = Add(c, one)
            most = ReduceMax<keepdims = 0>(next)
            on = Less(most, limit)
        }
    >
}
"""

NESTED = """
agraph (float[N] x, int64 n, bool flag) => (float[N] y)
<bool yes = {1}, float[1] two = {2}>
{
    y = Loop (n, yes, x) <
        body = step (int64 i, bool going, float[N] h) => (bool on, float[N] next) {
            on = Identity(going)
            next = If (flag) <
                then_branch = g1 () => (float[N] t) { t = Mul(h, two) },
                else_branch = g2 () => (float[N] e) { e = Add(h, x) }
            >
        }
    >
}
"""

SCAN = """
agraph (float[2] start, float[A, T, 2] xs) => (float[2] last, float[P, Q, R] sums)
<float[2] scale = {0.5, 2}>
{
    last, sums = Scan <num_scan_inputs = 1, scan_input_axes = [1], scan_input_directions = [1],
                       scan_output_axes = [-1], scan_output_directions = [1],
        body = step (float[2] s, float[A, 2] x) => (float[2] t, float[A, 2] out) {
            scaled = Mul(x, scale)
            total = ReduceSum<keepdims = 0>(scaled, axis)
            t = Add(s, total)
            out = Add(x, t)
        }> (start, xs)
}
"""


def test_one_of_two_bodies_runs() -> None:
    model = text(BRANCHES)
    for flag in (True, False):
        agree(model, {"x": f(5, 3), "flag": np.array(flag)})


def test_weights_in_bodies_are_parameters_that_can_be_found_again() -> None:
    module = mirror(text(BRANCHES))
    paths = module.meta["parameters"]
    named = dict(module.named_parameters())
    assert {paths[t] for t in named} == {("W",), ("y", "then_branch", "own"), ("y", "else_branch", "own")}
    x = torch.ones(2, 3)
    module(x, torch.tensor(False)).sum().backward()
    learned = {paths[t] for t, p in named.items() if p.grad is not None}
    assert learned == {("W",), ("y", "else_branch", "own")}
    twin = copy.deepcopy(module)
    twin.load_state_dict({k: 2 * v for k, v in module.state_dict().items()})
    assert torch.allclose(twin(x, torch.tensor(True)), 2 * module(x, torch.tensor(True)))


@pytest.mark.parametrize("flag", [True, False])
def test_where_the_condition_is_known_only_that_body_is_recorded(flag: bool) -> None:
    model = text(BRANCHES)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(flag), "flag"))
    del model.graph.input[1]
    module = mirror(model)
    assert not [n for n in module.graph.nodes if n.op == "call_module"]
    assert ("y", "then_branch" if flag else "else_branch", "own") in module.meta["parameters"].values()
    agree(model, {"x": f(5, 3)})


@pytest.mark.parametrize("count", [0, 1, 4])
def test_a_loop_carries_and_collects(count: int) -> None:
    fed = {"x": f(3, 2), "n": np.array(count)}
    found, wanted = run_mirror(text(LOOP), fed), run_onnxruntime(text(LOOP), fed)
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
    if count:
        np.testing.assert_allclose(found[1], wanted[1], rtol=1e-5)
    assert len(found[1]) == count


def test_gradients_flow_through_the_iterations_of_a_loop() -> None:
    module = mirror(text(LOOP)).double()
    names = [n for n, _ in module.named_parameters()]
    assert len(names) == 2

    def function(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        given = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(module, given, (x, torch.tensor(3)))

    weights = [p.detach().clone().requires_grad_() for p in module.parameters()]
    assert torch.autograd.gradcheck(function, (torch.randn(2, 2, dtype=torch.float64, requires_grad=True), *weights))


def test_a_loop_ends_by_its_condition() -> None:
    agree(text(UNTIL), {"x": np.array([0.5, 1.0], np.float32), "limit": np.array(30, np.float32)})


def test_bodies_lie_in_bodies() -> None:
    for flag in (True, False):
        agree(text(NESTED), {"x": f(4), "n": np.array(3), "flag": np.array(flag)})


def test_a_scan_runs_along_axes_and_backwards() -> None:
    model = text(SCAN)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0]), "axis"))
    agree(model, {"start": f(2), "xs": f(3, 4, 2)})
    assert mirror(model).meta["parameters"]["scale"] == ("scale",)


def test_what_a_body_lacks_is_named_with_the_rest() -> None:
    model = text(BRANCHES.replace("t = MatMul(x, own)", "t = Unheard(x, own)").replace("e = Add", "e = Unknown"))
    with pytest.raises(NotMirrored, match=r"2 nodes .*Unheard.*Unknown"):
        mirror(model)


SEQUENCES = """
agraph (float[N, 3] x, float[M, 3] z) => (float[K, 3] y, int64 n, float[L, 3] s, float[P, 3] last)
<int64 first = {0}, int64 back = {-2}, int64[2] sizes = {1, 2}, int64 two = {2}>
{
    empty = SequenceEmpty ()
    one = SequenceInsert (empty, x)
    both = SequenceInsert (one, z, first)
    three = SequenceInsert (both, x, back)
    n = SequenceLength (three)
    less = SequenceErase (three, first)
    y = ConcatFromSequence <axis = 0> (less)
    parts = SplitToSequence <axis = 0> (x, sizes)
    s = SequenceAt (parts, back)
    halves = SplitToSequence <axis = 0> (z, two)
    made = SequenceConstruct (x, z)
    gone = SequenceErase (made)
    last = SequenceAt (gone, first)
}
"""


def test_sequences_are_lists() -> None:
    agree(text(SEQUENCES), {"x": f(3, 3), "z": f(4, 3)})


@pytest.mark.parametrize("centred", [0, 1])
def test_non_maximum_suppression(centred: int) -> None:
    boxes = RNG.uniform(0, 1, (2, 30, 4)).astype(np.float32)
    scores = RNG.uniform(0, 1, (2, 3, 30)).astype(np.float32).round(1)  # with equal ones
    limits = [np.array([5]), np.array([0.3], np.float32), np.array([0.25], np.float32)]
    inputs = [boxes, scores, *limits]
    agree(*one_node("NonMaxSuppression", inputs, stored=(2, 3, 4), center_point_box=centred))
    agree(*one_node("NonMaxSuppression", inputs, center_point_box=centred))
    agree(*one_node("NonMaxSuppression", inputs[:2], center_point_box=centred))
