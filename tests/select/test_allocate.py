"""What groups lose decides what they give: the hull of their losses, the least total loss at a cost, and how it ends."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxprune.axes.analysis import Group
from onnxprune.axes.expr import Atom
from onnxprune.model.profile import Cost
from onnxprune.select.allocate import allocate, convex_hull, highest

losses = st.lists(st.floats(0, 100), min_size=1, max_size=12).map(np.array)


@given(losses)
def test_the_hull_is_convex_and_lies_below(values: np.ndarray) -> None:
    hull = convex_hull(values)
    assert np.all(hull <= values + 1e-9)
    assert np.all(np.diff(hull, 2) >= -1e-9)


@given(losses)
def test_no_convex_sequence_below_is_higher(values: np.ndarray) -> None:
    """At every place the hull is the lowest chord over it."""
    hull = convex_hull(values)
    for k in range(len(values)):
        chords = [
            values[i] + (values[j] - values[i]) * (k - i) / (j - i) if i < j else values[k]
            for i in range(k + 1)
            for j in range(k, len(values))
        ]
        assert hull[k] == pytest.approx(min(chords), abs=1e-9)


def groups_of(*sizes: int) -> list[Group]:
    return [Group(f"g{k}", Atom(n), "exact", "", (), 0) for k, n in enumerate(sizes)]


@given(st.lists(st.lists(st.floats(0.01, 1), min_size=6, max_size=6), min_size=2, max_size=3), st.integers(4, 14))
def test_convex_losses_are_shared_out_at_the_least_total(steps: list[list[float]], goal: int) -> None:
    """Units of equal cost: as good as the best of all ways to remove so many."""
    curves = {f"g{k}": np.concatenate([[0.0], np.cumsum(sorted(s))]) for k, s in enumerate(steps)}
    groups = groups_of(*[6] * len(steps))
    goal = min(goal, 6 * len(steps) - 1)
    cost = Cost(0.0, tuple((1.0, (g.atom,)) for g in groups))
    scores = {g.id: np.arange(1.0, 7.0) for g in groups}
    found = allocate(groups, scores, cost, goal, {g.id: 1 for g in groups}, floor=0.0, losses=curves)
    gone = {g.id: 6 - len(found.keep.get(g.id, range(6))) for g in groups}
    total = sum(curves[gid][n] for gid, n in gone.items())
    wanted = 6 * len(steps) - max(goal, len(steps))
    ways = product(range(6), repeat=len(steps))
    best = min(sum(curves[f"g{k}"][n] for k, n in enumerate(way)) for way in ways if sum(way) == wanted)
    assert sum(gone.values()) == wanted and total == pytest.approx(best)


def test_cost_counts_as_well_as_loss() -> None:
    """Of two groups that lose the same, the one whose units cost more gives them."""
    groups = groups_of(8, 8)
    cost = Cost(0.0, ((1.0, (groups[0].atom,)), (3.0, (groups[1].atom,))))
    curve = np.arange(9.0)
    scores = {g.id: np.ones(8) for g in groups}
    found = allocate(groups, scores, cost, 20, {"g0": 1, "g1": 1}, losses={"g0": curve, "g1": curve})
    assert "g0" not in found.keep and len(found.keep["g1"]) == 4


def test_groups_without_a_curve_go_by_their_importance() -> None:
    groups = groups_of(8, 8)
    cost = Cost(0.0, tuple((1.0, (g.atom,)) for g in groups))
    scores = {"g0": np.ones(8), "g1": np.array([1e-6] * 4 + [2.0] * 4)}
    found = allocate(groups, scores, cost, 12, {"g0": 1, "g1": 1}, losses={"g0": 10 * np.arange(9.0)})
    assert "g0" not in found.keep and found.keep["g1"].tolist() == [4, 5, 6, 7]


CURVES = {"g0": np.arange(9.0), "g1": 0.2 * np.arange(33.0)}
COARSE_AND_FINE = ((100.0, 8), (1.0, 32))  # a unit of the fine group loses 20 times as much per cost


def ended(goal: float, **options: float) -> tuple[int, int, float]:
    """Units kept of a group of 8 that cost 100 each and one of 32 that cost 1, and what remains of their 832."""
    groups = groups_of(*(n for _, n in COARSE_AND_FINE))
    cost = Cost(0.0, tuple((c, (g.atom,)) for g, (c, _) in zip(groups, COARSE_AND_FINE, strict=True)))
    scores = {g.id: np.ones(g.size) for g in groups}
    found = allocate(groups, scores, cost, goal, {"g0": 1, "g1": 1}, losses=CURVES, **options)  # type: ignore[arg-type]
    kept = [len(found.keep.get(g.id, range(g.size))) for g in groups]
    return kept[0], kept[1], found.remaining


def test_a_gap_is_not_filled_at_many_times_the_price() -> None:
    assert ended(728, settle=False) == (7, 32, 732)
    assert ended(728) == (7, 32, 732), "0.5 % above is near enough"
    assert ended(728, dear=np.inf, settle=False) == (7, 28, 728)


def test_a_block_goes_past_the_goal_where_that_is_nearer() -> None:
    assert ended(660, settle=False, meet=False) == (7, 32, 732)
    assert ended(660) == (6, 32, 632)
    assert ended(712) == (7, 32, 732), "20 above rather than 80 below"


def test_a_target_is_met_at_any_price_where_it_can_be() -> None:
    assert ended(560, settle=False, meet=False) == (6, 32, 632)
    assert ended(560, settle=False) == (5, 32, 532)


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 60)), min_size=1, max_size=4),
    st.floats(0.05, 0.99),
    st.sampled_from([0.0, 1.0, 6.0, np.inf]),
    st.booleans(),
    st.sampled_from(["global", "local"]),
    st.integers(0, 99),
)
def test_what_can_be_met_is_met(
    sizes: list[tuple[int, int]], goal: float, dear: float, settle: bool, scope: str, seed: int
) -> None:
    """Groups in a row, each layer's cost the product of both its sides."""
    groups = groups_of(*(n for n, _ in sizes))
    atoms = [g.atom for g in groups]
    pairs = zip(atoms, atoms[1:], strict=False)
    cost = Cost(1.0, (*((float(c), (a,)) for a, (_, c) in zip(atoms, sizes, strict=True)), *((3.0, p) for p in pairs)))
    rng = np.random.default_rng(seed)
    scores = {g.id: rng.exponential(size=g.size) for g in groups}
    wanted = goal * cost.total({})
    step = {g.id: int(rng.integers(1, 3)) for g in groups}
    found = allocate(groups, scores, cost, wanted, step, scope=scope, dear=dear, settle=settle)
    assert found.remaining <= max(highest(found.least, wanted), found.least)


def test_what_a_large_block_makes_needless_comes_back() -> None:
    """The fine group is the cheaper one and gives its units first; they come back for the block that closes the gap."""
    groups = groups_of(2, 30)
    cost = Cost(0.0, ((40.0, (groups[0].atom,)), (1.0, (groups[1].atom,))))
    curves = {"g0": 0.5 * 40 * np.arange(3.0), "g1": 0.4 * np.arange(31.0)}
    curves["g1"][21:] += 100 * np.arange(1.0, 11.0)
    scores = {g.id: np.ones(g.size) for g in groups}
    how = {"step": {"g0": 1, "g1": 1}, "floor": 0.0, "losses": curves}
    above = allocate(groups, scores, cost, 60, settle=False, meet=False, **how)
    assert above.remaining == 90 and {gid: len(kept) for gid, kept in above.keep.items()} == {"g1": 10}
    found = allocate(groups, scores, cost, 60, **how)
    assert found.remaining == 60 and {gid: len(kept) for gid, kept in found.keep.items()} == {"g0": 1, "g1": 20}


def test_units_that_cost_nothing_stay_gone() -> None:
    """A large block goes past the goal; what a method in training has removed before does not come back for that."""
    groups = groups_of(2, 20)
    cost = Cost(0.0, ((100.0, (groups[0].atom,)), (1.0, (groups[1].atom,))))
    scores = {"g0": np.ones(2), "g1": np.array([0.0] * 10 + [50.0] * 10)}
    found = allocate(groups, scores, cost, 125, {"g0": 1, "g1": 1}, floor=0.0)
    assert len(found.keep["g0"]) == 1 and found.keep["g1"].tolist() == list(range(10, 20))


sizes = st.lists(st.tuples(st.integers(1, 40), st.integers(2, 8)), min_size=1, max_size=5)


@given(sizes, st.floats(0.2, 0.95))
def test_where_all_cost_is_lost_alike_the_end_is_within_a_block(made: list[tuple[int, int]], share: float) -> None:
    """Nothing but the distance to the goal tells plans apart: the nearest block on either side of it is found."""
    groups = groups_of(*(n for _, n in made))
    cost = Cost(0.0, tuple((float(c), (g.atom,)) for g, (c, _) in zip(groups, made, strict=True)))
    curves = {g.id: c * np.arange(g.size + 1.0) for g, (c, _) in zip(groups, made, strict=True)}
    goal = max(share * cost.total({}), sum(c for c, _ in made))
    scores = {g.id: np.ones(g.size) for g in groups}
    found = allocate(groups, scores, cost, goal, {g.id: 1 for g in groups}, floor=0.0, losses=curves)
    left = [c for g, (c, _) in zip(groups, made, strict=True) if len(found.keep.get(g.id, range(g.size))) > 1]
    gone = [c for g, (c, _) in zip(groups, made, strict=True) if g.id in found.keep]
    if found.remaining > goal * 1.01 and gone:
        assert found.remaining - goal <= 0.6 * min(left)
    if found.remaining < goal * (1 - 1e-9):
        assert goal - found.remaining <= min(gone)
