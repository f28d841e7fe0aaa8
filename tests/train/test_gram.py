"""The Gram penalty in closed form against the paper's loss, written down per weight and differentiated by autograd."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from onnxprune.train.families import Grouping
from onnxprune.train.gram import GramPenalty
from onnxprune.train.units import Part

SLICES = {"a": slice(0, 6), "b": slice(6, 9)}


def weight(*shape: int, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def part(family: str, axis: int, units: Any) -> Part:
    return Part(family, axis, np.asarray(units))


# Each case: the weight's shape, its parts, its grouping, and by hand: the stacked matrices (blocks, rows, columns) that
# its Gram matrices are of, with the units of every row.
SIX, THREE = list(range(6)), list(range(3))
CASES: dict[str, tuple[tuple[int, ...], list[Part], Grouping | None, Any, list[list[list[str]]]]] = {
    "convolution": (
        (6, 4, 3, 3),
        [part("a", 0, SIX)],
        None,
        lambda w: w.reshape(1, 6, 36),
        [[[f"a{k}"] for k in SIX]],
    ),
    "transposed convolution": (
        (4, 6, 3, 3),
        [part("a", 1, SIX)],
        None,
        lambda w: w.transpose(0, 1).reshape(1, 6, 36),
        [[[f"a{k}"] for k in SIX]],
    ),
    "matrix product": ((5, 6), [part("a", 1, SIX)], None, lambda w: w.T[None], [[[f"a{k}"] for k in SIX]]),
    "three heads of two rows": (
        (6, 5),
        [part("b", 0, [0, 0, 1, 1, 2, 2])],
        None,
        lambda w: w[None],
        [[["b0"], ["b0"], ["b1"], ["b1"], ["b2"], ["b2"]]],
    ),
    "heads and their widths": (
        (6, 5),
        [part("b", 0, [0, 0, 1, 1, 2, 2]), part("a", 0, [0, 1, 0, 1, 0, 1])],
        None,
        lambda w: w[None],
        [[["b0", "a0"], ["b0", "a1"], ["b1", "a0"], ["b1", "a1"], ["b2", "a0"], ["b2", "a1"]]],
    ),
    "rows that are frozen": (
        (7, 5),
        [part("b", 0, [-1, -1, 0, 1, 2, -1, 1])],
        None,
        lambda w: w[None],
        [[[], [], ["b0"], ["b1"], ["b2"], [], ["b1"]]],
    ),
    "grouped convolution": (
        (6, 4, 3),
        [part("a", 0, SIX)],
        Grouping(3, 0),
        lambda w: w.reshape(3, 2, 12),
        [[["a0"], ["a1"]], [["a2"], ["a3"]], [["a4"], ["a5"]]],
    ),
    "grouped convolution, the groups": (
        (6, 4, 3),
        [part("b", 0, [0, 0, 1, 1, 2, 2])],
        Grouping(3, 0),
        lambda w: w.reshape(3, 2, 12),
        [[["b0"], ["b0"]], [["b1"], ["b1"]], [["b2"], ["b2"]]],
    ),
    "grouped transposed convolution": (
        (6, 3, 2),
        [part("b", 0, [0, 0, 1, 1, 2, 2]), part("a", 1, THREE)],
        Grouping(3, 1),
        lambda w: torch.stack([w[2 * g : 2 * g + 2].transpose(0, 1).reshape(3, 4) for g in THREE]),
        [[[f"b{g}", f"a{o}"] for o in THREE] for g in THREE],
    ),
}
GONE = {"a1", "a4", "b2"}
REDUNDANT = torch.tensor([f"a{k}" in GONE for k in SIX] + [f"b{k}" in GONE for k in THREE])


def factor(scale: str, rows: Tensor) -> float:
    if scale == "paper":
        return 1.0
    if scale == "code":
        return 2 * 1000 / (rows.shape[0] * rows.shape[1]) ** 2
    return 0.7 / float(torch.linalg.matrix_norm(rows.detach(), 2).max()) ** 2


def loss(rows: Tensor, units: list[list[list[str]]], a: float) -> Tensor:
    """Pair by pair, as the paper has it."""
    total = torch.zeros((), dtype=torch.float64)
    for block, owners in zip(rows, units, strict=True):
        for i, mine in enumerate(owners):
            for j, others in enumerate(owners):
                if GONE & {*mine, *others}:
                    total = total + (block[i] @ block[j]) ** 2
    return a / 2 * total


@pytest.mark.parametrize("scale", ["paper", "code", "auto"])
@pytest.mark.parametrize("name", CASES)
def test_gradient_and_value_are_those_of_the_loss(name: str, scale: Any) -> None:
    shape, parts, grouping, layout, units = CASES[name]
    w = weight(*shape)
    penalty = GramPenalty([w], [parts], [grouping], SLICES, scale=scale, rho=0.7)
    penalty.select(REDUNDANT)
    for _ in range(300):  # of the power iteration
        found = penalty.gradients()
    rows = layout(w)
    wanted = loss(rows, units, factor(scale, rows))
    wanted.backward()
    assert w.grad is not None and w.grad.abs().max() > 0
    assert len(found) == 1 and found[0][0] is w
    torch.testing.assert_close(found[0][1], w.grad, rtol=1e-6, atol=1e-6 * float(w.grad.abs().max()))
    assert float(penalty.value()) == pytest.approx(float(wanted.detach()), rel=1e-6)


def test_a_weight_with_units_on_two_axes_has_two_gram_matrices() -> None:
    w = weight(6, 3)
    penalty = GramPenalty([w], [[part("a", 0, SIX), part("b", 1, THREE)]], [None], SLICES, scale="paper")
    penalty.select(REDUNDANT)
    by_rows = [[f"a{k}"] for k in SIX], [[f"b{k}"] for k in THREE]
    (loss(w[None], [by_rows[0]], 1.0) + loss(w.T[None], [by_rows[1]], 1.0)).backward()
    torch.testing.assert_close(sum(g for _, g in penalty.gradients()), w.grad, rtol=1e-9, atol=1e-9)


def test_weights_of_one_form_are_stacked_and_agree_with_each_alone() -> None:
    weights = [weight(6, 4, 3, 3, seed=k) for k in range(3)] + [weight(6, 9, 2, 2, seed=3), weight(6, 5, seed=4)]
    parts = [[part("a", 0, SIX)] for _ in weights]
    together = GramPenalty(weights, parts, [None] * 5, SLICES)
    assert sorted(len(stack.tensors) for stack in together.stacks) == [1, 4]
    together.select(REDUNDANT)
    found = dict(together.gradients())
    for k, w in enumerate(weights):
        alone = GramPenalty([w], [parts[k]], [None], SLICES)
        alone.select(REDUNDANT)
        torch.testing.assert_close(found[w], alone.gradients()[0][1], rtol=1e-12, atol=1e-12)


def test_what_has_no_gram_matrix_worth_the_name_is_left_out() -> None:
    frozen = weight(6, 5).requires_grad_(False)
    tensors = [weight(6), weight(6, 1, 1), weight(6, 1, 3, 3), frozen, weight(6, 5)]
    parts = [[part("a", 0, SIX)] for _ in tensors[:4]] + [[]]
    groupings = [None, None, Grouping(6, 0), None, None]
    assert not GramPenalty(tensors, parts, groupings, SLICES).stacks


def test_nothing_redundant_is_no_penalty() -> None:
    penalty = GramPenalty([weight(6, 5)], [[part("a", 0, SIX)]], [None], SLICES)
    penalty.select(torch.zeros(9, dtype=torch.bool))
    assert float(penalty.value()) == 0 and not penalty.gradients()[0][1].any()


def test_weights_that_are_zero_have_no_gradient_and_leave_the_power_iteration_alive() -> None:
    w = weight(6, 5)
    kept = w.detach().clone()
    penalty = GramPenalty([w], [[part("a", 0, SIX)]], [None], SLICES)
    penalty.select(REDUNDANT)
    w.data.zero_()
    assert not penalty.gradients()[0][1].any()
    w.data.copy_(kept)
    for _ in range(300):
        found = penalty.gradients()[0][1]
    w.data.copy_(kept)
    loss(w[None], [[[f"a{k}"] for k in SIX]], 0.5 / float(torch.linalg.matrix_norm(kept, 2)) ** 2).backward()
    torch.testing.assert_close(found, w.grad, rtol=1e-6, atol=1e-9)


def test_auto_scale_does_not_depend_on_the_scale_of_a_layer() -> None:
    found = []
    for size in (1.0, 100.0):
        w = nn.Parameter(weight(6, 5).detach() * size)
        penalty = GramPenalty([w], [[part("a", 0, SIX)]], [None], SLICES)
        penalty.select(REDUNDANT)
        found.append(penalty.gradients()[0][1] / size)
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


def test_channels_last_storage_changes_nothing() -> None:
    w = weight(6, 4, 3, 3)
    last = nn.Parameter(w.detach().to(memory_format=torch.channels_last))
    found = []
    for one in (w, last):
        penalty = GramPenalty([one], [[part("a", 0, SIX)]], [None], SLICES, scale="paper")
        penalty.select(REDUNDANT)
        found.append(penalty.gradients()[0][1])
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


def test_the_state_goes_on_where_it_was() -> None:
    def fresh() -> tuple[nn.Parameter, GramPenalty]:
        w = weight(6, 5)
        penalty = GramPenalty([w], [[part("a", 0, SIX)]], [None], SLICES)
        penalty.select(REDUNDANT)
        return w, penalty

    one, other = fresh(), fresh()
    for _ in range(3):
        one[1].gradients()
    assert not torch.equal(one[1].gradients()[0][1], other[1].gradients()[0][1])
    one, other = fresh(), fresh()
    for _ in range(3):
        one[1].gradients()
    other[1].load_state_dict(one[1].state_dict())
    assert torch.equal(one[1].gradients()[0][1], other[1].gradients()[0][1])
