"""How many units each group gives up, so that what remains meets the target.

The target is approached from above: blocks of least important units go, least importance lost per cost saved first,
as long as the model stays at or above the goal; where no block fits any more, the rest of the gap stays.

Importance lost is relative to what its group has left, log(before / after): the more a group has given, the dearer is
its next block. Summed absolutely, one costly layer would be stripped to its floor before another gives anything (the
residual CNN in models/ keeps 68 % accuracy at 90 % of the MACs this way, against 44 %).

Where losses were measured instead, their lower convex hulls are what a group's blocks cost. Taking the cheapest block
per cost saved, again and again, is then the minimum of loss + price * cost for every price on the way (a Lagrangian),
as far as one group's savings don't depend on the others'.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from onnxprune.axes.analysis import Group
from onnxprune.axes.expr import Atom

__all__ = ["Allocation", "Budget", "allocate"]

SLACK = 1e-9
TINY = 1e-9
BYPASS = 0.05  # what a residual stream carries past a branch, relative to the branch: it may go as a whole


class Budget(Protocol):
    """What is to become less: a constant, and terms that depend on how many units atoms keep. See `profile.Cost`."""

    @property
    def constant(self) -> float: ...

    @property
    def terms(self) -> Sequence[object]: ...

    def total(self, counts: Mapping[Atom, int]) -> float:
        """The whole at these sizes; atoms that are not named are whole."""

    def term(self, k: int, counts: Mapping[Atom, int]) -> float:
        """One term of it."""

    def by_atom(self) -> Mapping[Atom, Sequence[int]]:
        """The terms that each atom is in."""


@dataclass(frozen=True)
class Allocation:
    """Kept indices per group id, and what remains of the metric."""

    keep: Mapping[str, np.ndarray]
    remaining: float
    least: float  # what would remain if every group gave up all it may


class _State:
    """Unit counts of all groups, and the cost that they add up to."""

    def __init__(
        self, groups: list[Group], cost: Budget, step: Mapping[str, int], floor: float, whole: Collection[Atom]
    ) -> None:
        self.groups = {g.id: g for g in groups}
        self.cost = cost
        self.step = step
        self.counts: dict[Atom, int] = {g.atom: g.size for g in groups}
        self.where = cost.by_atom()
        self.value = [cost.term(k, self.counts) for k in range(len(cost.terms))]
        self.total = cost.constant + sum(self.value)
        self.lowest = {g.id: 0 if g.atom in whole else lowest(g.size, step[g.id], floor) for g in groups}

    def next_count(self, gid: str) -> int | None:
        """The group's size after one more block; None where it is at its floor."""
        now, step = self.counts[self.groups[gid].atom], self.step[gid]
        after = (now - 1) // step * step
        return after if after >= self.lowest[gid] else None

    def saving(self, gid: str, after: int) -> float:
        """What the metric loses when a group shrinks to `after` units."""
        atom = self.groups[gid].atom
        before, self.counts[atom] = self.counts[atom], after
        saved = sum(self.value[k] - self.cost.term(k, self.counts) for k in self.where.get(atom, ()))
        self.counts[atom] = before
        return saved

    def shrink(self, gid: str, after: int) -> None:
        atom = self.groups[gid].atom
        self.counts[atom] = after
        for k in self.where.get(atom, ()):
            now = self.cost.term(k, self.counts)
            self.total += now - self.value[k]
            self.value[k] = now


def lowest(size: int, step: int, floor: float) -> int:
    """The least that a group may keep: its floor, rounded up to whole blocks, and one block at least."""
    if size <= step:
        return size
    return min(max(step, -(-int(np.ceil(floor * size)) // step) * step), size)


def allocate(
    groups: list[Group],
    scores: Mapping[str, np.ndarray],
    cost: Budget,
    goal: float,
    step: Mapping[str, int],
    *,
    scope: str = "global",
    floor: float = 0.1,
    overshoot: bool = True,
    whole: Collection[Atom] = (),
    losses: Mapping[str, np.ndarray] | None = None,
) -> Allocation:
    """Choose what to keep. scope: 'global' ranks all groups together, 'local' takes the same share of each first.

    losses: per group id what is lost with 0, 1, ... units; by default -log of the share of the importance that stays.
    whole: atoms that may lose all of their units.
    overshoot: where every block is larger than the gap, take the smallest rather than do nothing in silence.
    """
    state = _State(groups, cost, step, floor, whole)
    order = {g.id: np.argsort(scores[g.id], kind="stable") for g in groups}
    lost = {gid: _lost(scores[gid][o], bypass=state.lowest[gid] == 0) for gid, o in order.items()}
    lost |= {gid: convex_hull(loss) for gid, loss in (losses or {}).items() if gid in lost}
    least = _least(state)
    if scope == "local":
        _same_share(state, goal)
    _greedy(state, lost, goal)
    if overshoot and state.total >= cost.total({}) * (1 - SLACK):
        _smallest_step(state)
    keep = {}
    for g in groups:
        n = state.counts[g.atom]
        if n < g.size:
            keep[g.id] = np.sort(order[g.id][g.size - n :])
    return Allocation(keep, state.total, least)


def _lost(ascending: np.ndarray, *, bypass: bool) -> np.ndarray:
    """-log of what stays when the first 0, 1, ... units go."""
    total = float(ascending.sum())
    left = total - np.concatenate([[0.0], np.cumsum(ascending)])
    return -np.log(left + (total * BYPASS if bypass else TINY))


def convex_hull(losses: np.ndarray) -> np.ndarray:
    """The largest convex sequence that nowhere lies above `losses`."""
    corners: list[int] = []
    for k, value in enumerate(losses):
        while len(corners) > 1:
            i, j = corners[-2:]
            if (losses[j] - losses[i]) * (k - i) < (value - losses[i]) * (j - i):
                break
            corners.pop()
        corners.append(k)
    return np.interp(np.arange(len(losses)), corners, losses[corners])


def _least(state: _State) -> float:
    counts = {g.atom: state.lowest[g.id] for g in state.groups.values()}
    return state.cost.total(counts)


def _same_share(state: _State, goal: float) -> None:
    """The smallest common share of units that stays at or above the goal."""
    low, high = 0.0, 1.0
    for _ in range(30):
        share = (low + high) / 2
        counts = {g.atom: _shared(state, g, share) for g in state.groups.values()}
        if state.cost.total(counts) >= goal:
            high = share
        else:
            low = share
    for g in state.groups.values():
        state.shrink(g.id, _shared(state, g, high))


def _shared(state: _State, group: Group, share: float) -> int:
    step = state.step[group.id]
    return min(group.size, max(state.lowest[group.id], -(-int(np.ceil(share * group.size)) // step) * step))


def _greedy(state: _State, losses: Mapping[str, np.ndarray], goal: float) -> None:
    def price(gid: str) -> tuple[float, float, int] | None:
        after = state.next_count(gid)
        if after is None:
            return None
        group = state.groups[gid]
        lost = losses[gid][group.size - after] - losses[gid][group.size - state.counts[group.atom]]
        saved = state.saving(gid, after)
        return (float(lost) / saved, saved, after) if saved > 0 else None

    heap: list[tuple[float, str]] = []
    for gid in state.groups:
        first = price(gid)
        if first is not None:
            heapq.heappush(heap, (first[0], gid))
    while heap:
        was, gid = heapq.heappop(heap)
        now = price(gid)
        if now is None:
            continue
        rate, saved, after = now
        if rate > was * (1 + 1e-9) and heap and rate > heap[0][0]:
            heapq.heappush(heap, (rate, gid))
            continue
        if state.total - saved < goal * (1 - SLACK):
            continue  # this block is larger than the gap; smaller ones may still fit
        state.shrink(gid, after)
        following = price(gid)
        if following is not None:
            heapq.heappush(heap, (following[0], gid))


def _smallest_step(state: _State) -> None:
    """Take the smallest block there is."""
    options = [
        (state.saving(gid, after), gid, after) for gid in state.groups if (after := state.next_count(gid)) is not None
    ]
    options = [o for o in options if o[0] > 0]
    if options:
        _, gid, after = min(options)
        state.shrink(gid, after)
