"""TPP by hand: what it adds to gradients, what it shrinks, what it chooses, and that nothing is left of what goes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from onnxprune import UsageError, analyse, mirror
from onnxprune.train.families import Grouping, params_and_groups
from onnxprune.train.tpp import TPP, Growing, lowest
from onnxprune.train.units import Part

UNITS = np.arange(6)
GONE = np.array([True, False, False, True, False, False])


class Layer:
    """A convolution with scale and shift of a normalisation, and a second convolution that makes the same units."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = {"w": (6, 3, 3, 3), "v": (6, 4, 1, 1), "gamma": (6,), "beta": (6,)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)))
        self.other = nn.Parameter(torch.randn(5, generator=generator, dtype=torch.float64).to(dtype))

    w: nn.Parameter
    v: nn.Parameter
    gamma: nn.Parameter
    beta: nn.Parameter

    @property
    def own(self) -> list[nn.Parameter]:
        return [self.w, self.v, self.gamma, self.beta]

    @property
    def groups(self) -> list[dict[str, Any]]:
        part = (Part("g", 0, UNITS),)
        return [
            {"params": [self.w, self.v], "parts": [part, part]},
            {"params": [self.gamma, self.beta, self.other], "parts": [part, part, ()]},
        ]

    def tpp(self, **options: Any) -> TPP:
        return TPP(self.groups, redundant={"g": GONE}, **options)


def gram_loss(w: Tensor) -> Tensor:
    rows, m = w.flatten(1), torch.from_numpy(~GONE).to(w)
    return ((rows @ rows.T) * (1 - m[:, None] * m[None, :])).square().sum()


def test_the_loss_of_the_paper() -> None:
    """lambda / 2 of the Gram penalties, one per weight, and of the squares of scale and shift."""
    layer = Layer()
    tpp = layer.tpp(scale="paper", decay="gradient", reach="vectors")
    vectors = sum(p[torch.from_numpy(GONE)].square().sum() for p in (layer.gamma, layer.beta))
    loss = 0.3 / 2 * (gram_loss(layer.w) + gram_loss(layer.v) + vectors)
    wanted = torch.autograd.grad(loss, layer.own)
    tpp.add_gradients(0.3)
    for parameter, gradient in zip(layer.own, wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-6, atol=1e-9)
    assert layer.other.grad is None


def test_the_loss_of_the_authors_program() -> None:
    """1000 lambda times the mean of the Gram penalty, and lambda / 2 of the squares of all that makes the units."""
    layer = Layer()
    tpp = layer.tpp(scale="code", decay="gradient")
    squares = sum(p[torch.from_numpy(GONE)].square().sum() for p in layer.own)
    loss = 1000 * 0.3 / 36 * (gram_loss(layer.w) + gram_loss(layer.v)) + 0.3 / 2 * squares
    wanted = torch.autograd.grad(loss, layer.own)
    tpp.add_gradients(0.3)
    for parameter, gradient in zip(layer.own, wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-6, atol=1e-9)


def test_gradients_are_added_to_those_that_are_there() -> None:
    layer, before = Layer(), Layer()
    tpp = layer.tpp(scale="paper")
    for p in (*layer.own, layer.other):
        p.grad = torch.ones_like(p)
    tpp.add_gradients(2.0)
    loss = gram_loss(before.w) + gram_loss(before.v)
    for p, gradient in zip((layer.w, layer.v), torch.autograd.grad(loss, [before.w, before.v]), strict=True):
        torch.testing.assert_close(p.grad, 1 + gradient, rtol=1e-9, atol=1e-9)
    for p in (layer.gamma, layer.beta, layer.other):
        assert torch.equal(p.grad, torch.ones_like(p))


def test_descending_is_a_step_along_the_gram_penalty_alone() -> None:
    layer, before = Layer(), Layer()
    tpp = layer.tpp(scale="paper")
    tpp.descend(0.01, 0.5)
    gradients = torch.autograd.grad(0.5 / 2 * (gram_loss(before.w) + gram_loss(before.v)), [before.w, before.v])
    for p, b, gradient in zip((layer.w, layer.v), (before.w, before.v), gradients, strict=True):
        torch.testing.assert_close(p.detach(), (b - 0.01 * gradient).detach(), rtol=1e-9, atol=1e-12)
        assert p.grad is None
    assert torch.equal(layer.gamma, before.gamma)


def test_descending_at_full_strength_does_not_overshoot() -> None:
    """With the scale 'auto' a step of lr * strength = 1 is stable."""
    layer = Layer()
    tpp = layer.tpp()
    values = [float(tpp.gram.value())]
    for _ in range(20):
        tpp.descend(1.0, 1.0)
        values.append(float(tpp.gram.value()))
    assert all(b < a for a, b in zip(values, values[1:], strict=False))


def test_without_strength_nothing_happens() -> None:
    layer = Layer()
    tpp = layer.tpp()
    before = [p.detach().clone() for p in layer.own]
    tpp.add_gradients()
    tpp.shrink(0.1)
    assert all(p.grad is None for p in layer.own)
    assert all(torch.equal(p, b) for p, b in zip(layer.own, before, strict=True))


@pytest.mark.parametrize(("reach", "reached"), [("all", "wvgb"), ("weights", "wv"), ("vectors", "gb")])
def test_shrinking_divides_redundant_slices_alone(reach: Any, reached: str) -> None:
    layer = Layer()
    tpp = layer.tpp(reach=reach)
    before = [p.detach().clone() for p in layer.own]
    tpp.shrink(0.5, 3.0)
    for name, p, b in zip("wvgb", layer.own, before, strict=True):
        factor = torch.where(torch.from_numpy(GONE), 1 / 2.5 if name in reached else 1.0, 1.0)
        torch.testing.assert_close(p.detach(), b * factor.reshape(-1, *[1] * (p.ndim - 1)), rtol=1e-12, atol=0)


def test_shrinking_is_stable_whatever_the_rate_and_strength() -> None:
    layer = Layer()
    tpp = layer.tpp()
    before = tpp.norms()
    for _ in range(3):
        tpp.shrink(10.0, 1e6)
    assert bool((tpp.norms()[GONE] < 1e-20 * before[GONE]).all())
    assert torch.equal(tpp.norms()[~GONE], before[~GONE])
    assert all(bool(torch.isfinite(p).all()) for p in layer.own)


def test_shrinking_does_the_same_under_every_optimizer() -> None:
    """What Adam and clipping do to a gradient they don't do to it."""
    found = []
    for make in (torch.optim.SGD, torch.optim.Adam):
        layer = Layer()
        tpp, optimizer = layer.tpp(gram=False), make(layer.own, lr=0.1)
        for p in layer.own:
            p.grad = torch.zeros_like(p)
        tpp.strength = 1.0
        tpp.add_gradients()
        optimizer.step()
        tpp.shrink(0.1)
        found.append(tpp.norms())
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)


def test_removed_units_are_zero_and_stay_so() -> None:
    layer = Layer()
    tpp = layer.tpp()
    first = torch.tensor([True, True, True, False, False, False])
    tpp.remove(first)
    assert (tpp.norms() == 0).tolist() == [True, False, False, False, False, False]
    tpp.remove()
    optimizer = torch.optim.SGD(layer.own, lr=0.1, momentum=0.9)
    for _ in range(3):
        for p in layer.own:
            p.grad = torch.ones_like(p)
        optimizer.step()
        tpp.shrink(0.1)
    for p in layer.own:
        assert not p[torch.from_numpy(GONE)].any() and p[torch.from_numpy(~GONE)].all()


def test_removal_clears_infinities_too() -> None:
    layer = Layer()
    tpp = layer.tpp()
    with torch.no_grad():
        layer.w[0, 0, 0, 0] = float("inf")
    tpp.remove()
    assert not layer.w[0].any()


def test_magnitudes_are_means_over_the_weights() -> None:
    layer = Layer()
    wanted = torch.cat([layer.w.flatten(1), layer.v.flatten(1)], 1).abs().mean(1)
    np.testing.assert_allclose(layer.tpp().magnitudes()["g"], wanted.detach().numpy(), rtol=1e-6)


def test_magnitudes_of_units_without_weights() -> None:
    gamma, beta = nn.Parameter(torch.tensor([1.0, -2.0])), nn.Parameter(torch.tensor([3.0, 4.0]))
    part = (Part("g", 0, np.arange(2)),)
    tpp = TPP([{"params": [gamma, beta], "parts": [part, part]}])
    np.testing.assert_allclose(tpp.magnitudes()["g"], [2, 3])


def test_the_lowest_of_every_family_but_never_all() -> None:
    found = lowest({"a": np.array([3.0, 1.0, 2.0, 4.0, 5.0]), "b": np.array([2.0, 1.0])}, 0.6)
    assert found["a"].tolist() == [True, True, True, False, False]
    assert found["b"].tolist() == [False, True]
    assert lowest({"a": np.ones(3)}, 1.0)["a"].sum() == 2


def test_lambda_grows_in_steps_and_is_held() -> None:
    ramp = Growing(by=0.25, limit=1.0, every=3, hold=5)
    assert [ramp.at(k) for k in range(13)] == [0.25] * 3 + [0.5] * 3 + [0.75] * 3 + [1.0] * 4
    assert ramp.steps == 14
    published = Growing()
    assert published.at(99_989) == pytest.approx(0.9999) and published.at(99_990) == pytest.approx(1.0)
    assert published.steps == 99_990 + 10_000


def test_a_choice_that_does_not_fit_is_refused() -> None:
    tpp = Layer().tpp()
    with pytest.raises(UsageError, match="family 'h' is none of g"):
        tpp.choose({"h": GONE})
    with pytest.raises(UsageError, match=r"family 'g' has 6 units, found \(5,\)"):
        tpp.choose({"g": GONE[:5]})
    tpp.choose({})
    assert not tpp.redundant.any()


def test_unknown_words_are_refused() -> None:
    for options in ({"scale": "none"}, {"decay": "l1"}, {"reach": "biases"}):
        with pytest.raises(UsageError, match="must be one of"):
            Layer().tpp(**options)


def test_it_goes_on_from_its_state() -> None:
    def steps(layer: Layer, tpp: TPP, count: int) -> None:
        for _ in range(count):
            for p in layer.own:
                p.grad = None
            tpp.add_gradients(0.5)
            with torch.no_grad():
                for p in (layer.w, layer.v):
                    p.sub_(0.1 * p.grad)
            tpp.shrink(0.1, 0.5)

    whole = Layer(torch.float32)
    tpp = whole.tpp()
    tpp.remove(torch.tensor([True] + [False] * 5))
    steps(whole, tpp, 2)
    state = copy.deepcopy(tpp.state_dict())
    rest = Layer(torch.float32)
    with torch.no_grad():
        for p, q in zip(rest.own, whole.own, strict=True):
            p.copy_(q)
    again = TPP(rest.groups)
    again.load_state_dict(state)
    steps(whole, tpp, 3)
    steps(rest, again, 3)
    assert all(torch.equal(p, q) for p, q in zip(rest.own, whole.own, strict=True))
    assert not rest.w[0].any()


# over a mirror


def model_of_all_kinds(path: Path) -> Path:
    """Conv, grouped Conv, depthwise Conv, grouped ConvTranspose, ConvTranspose, MatMul, Gemm: (N,3,8,8) to (N,5)."""
    rng = np.random.default_rng(0)
    shapes = {
        "conv.w": (8, 3, 3, 3),
        "conv.b": (8,),
        "grouped.w": (12, 2, 3, 3),
        "depthwise.w": (12, 1, 3, 3),
        "turned.w": (12, 4, 2, 2),
        "up.w": (8, 6, 2, 2),
        "product.w": (6, 7),
        "gemm.w": (5, 7),
    }
    weights = {n: (rng.standard_normal(s) / np.sqrt(np.prod(s[1:]) or 1)).astype(np.float32) for n, s in shapes.items()}
    pads = {"pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["x", "conv.w", "conv.b"], ["a"], **pads),
        helper.make_node("Relu", ["a"], ["ar"]),
        helper.make_node("Conv", ["ar", "grouped.w"], ["b"], group=4, **pads),
        helper.make_node("Relu", ["b"], ["br"]),
        helper.make_node("Conv", ["br", "depthwise.w"], ["c"], group=12, **pads),
        helper.make_node("ConvTranspose", ["c", "turned.w"], ["d"], group=2),
        helper.make_node("Relu", ["d"], ["dr"]),
        helper.make_node("ConvTranspose", ["dr", "up.w"], ["e"]),
        helper.make_node("Relu", ["e"], ["er"]),
        helper.make_node("GlobalAveragePool", ["er"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("MatMul", ["f", "product.w"], ["m"]),
        helper.make_node("Relu", ["m"], ["mr"]),
        helper.make_node("Gemm", ["mr", "gemm.w"], ["y"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "kinds",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 5])],
        [numpy_helper.from_array(w, n) for n, w in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, path)
    return path


def test_groupings_of_a_mirror_and_the_rows_of_its_weights(tmp_path: Path) -> None:
    path = model_of_all_kinds(tmp_path / "kinds.onnx")
    module = mirror(path)
    groups = params_and_groups(module, analyse(path))
    names = {p: n for n, p in module.named_parameters()}
    groupings = {
        module.meta["parameters"][names[p]][0]: grouping
        for g in groups
        for p, grouping in zip(g["params"], g["grouping"], strict=True)
    }
    assert groupings["grouped.w"] == Grouping(4, 0) and groupings["depthwise.w"] == Grouping(12, 0)
    assert groupings["turned.w"] == Grouping(2, 1)
    assert all(groupings[n] is None for n in ("conv.w", "conv.b", "up.w", "product.w", "gemm.w"))
    tpp = TPP(groups)
    forms = {
        module.meta["parameters"][names[t]][0]: layout.form
        for stack in tpp.gram.stacks
        for t, layout in zip(stack.tensors, stack.layouts, strict=True)
    }
    # of the last layer nothing can go; of the depthwise one there is no Gram matrix
    assert forms == {
        "conv.w": (1, 8, 27),
        "grouped.w": (4, 3, 18),
        "turned.w": (2, 4, 24),
        "up.w": (1, 6, 32),
        "product.w": (1, 7, 6),
    }


@pytest.mark.parametrize("scale", ["auto", "paper"])
def test_a_loop_of_ones_own_takes_redundant_units_out_of_the_function(tmp_path: Path, scale: Any) -> None:
    """While it learns something else, the network comes to need the redundant units no more."""
    torch.manual_seed(0)
    path = model_of_all_kinds(tmp_path / "kinds.onnx")
    module, teacher = mirror(path), mirror(path)
    tpp = TPP(params_and_groups(module, analyse(path)), scale=scale)
    tpp.choose(lowest(tpp.magnitudes(), 0.4))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.02, momentum=0.9)
    x = torch.randn(64, 3, 8, 8)
    wanted = teacher(x).detach()
    for step in range(150):
        optimizer.zero_grad()
        (F.mse_loss(module(x), wanted) / wanted.var()).backward()
        tpp.strength = 1.0 * step
        tpp.add_gradients(min(tpp.strength, 2.0))
        optimizer.step()
        tpp.shrink(0.02)
    before = module(x).detach()
    tpp.remove()
    assert F.mse_loss(module(x), before) < 1e-2 * wanted.var()
    assert F.mse_loss(before, wanted) < 0.1 * wanted.var()
    norms = tpp.norms()
    assert not norms[tpp.redundant].any() and bool((norms[~tpp.redundant] > 0).all())
