"""How many units each group gives up, so that what remains meets the target.

The target is approached from above: blocks of least important units go, least importance lost per cost saved first,
as long as the model stays at or above the goal. That price per cost is what settles the end, which is a knapsack. Once
a block is larger than the gap, smaller ones go on filling it, but none that is far dearer: stripping cheap layers to
their floor saves little and ruins the model. Where more than 1 % of the goal is still left then, blocks that go past
it are tried, each with whatever needn't be gone any more given back, dearest first. The plan is taken in which loss
and distance to the goal, on either side, add up to the least; distance counts several times the price. A plan that
still ends farther above the goal than a target allows goes past it at whatever price: that is what was asked for.

Importance lost is relative to what its group has left, log(before / after): the more a group has given, the dearer is
its next block. Summed absolutely, one costly layer would be stripped to its floor before another gives anything (the
residual CNN in models/ keeps 68 % accuracy at 90 % of the MACs this way, against 44 %).

Where losses were measured instead, their lower convex hulls are what a group's blocks cost. Taking the cheapest block
per cost saved, again and again, is then the minimum of loss + price * cost for every price on the way (a Lagrangian),
as far as one group's savings don't depend on the others'.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from onnxprune.axes.analysis import Group
from onnxprune.axes.expr import Atom

__all__ = ["DEAR", "ROUGHLY", "TOLERANCE", "Allocation", "Budget", "allocate", "highest"]

SLACK = 1e-9
TINY = 1e-9
BYPASS = 0.05  # what a residual stream carries past a branch, relative to the branch: it may go as a whole
TOLERANCE = 0.01  # how far from a target a plan may end, as a share of it; a smaller gap needs no search
ROUGHLY = 0.05  # where smaller blocks would be slow, or there are none
DEAR = 6.0  # what it is worth to come nearer to the goal, in prices of the block at which the way to it ends
TRIED, ROUNDS = 8, 4  # blocks that are taken past the goal to see what comes of it, and how often


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
    """Unit counts of all groups, and the cost and the loss that they add up to."""

    def __init__(
        self,
        groups: list[Group],
        losses: Mapping[str, np.ndarray],
        cost: Budget,
        step: Mapping[str, int],
        lowest: Mapping[str, int],
    ) -> None:
        self.groups = {g.id: g for g in groups}
        self.losses = losses
        self.cost = cost
        self.step = step
        self.counts: dict[Atom, int] = {g.atom: g.size for g in groups}
        self.where = cost.by_atom()
        self.value = [cost.term(k, self.counts) for k in range(len(cost.terms))]
        self.total = cost.constant + sum(self.value)
        self.lowest = lowest

    def next_count(self, gid: str) -> int | None:
        """The group's size after one more block; None where it is at its floor."""
        now, step = self.counts[self.groups[gid].atom], self.step[gid]
        after = (now - 1) // step * step
        return after if after >= self.lowest[gid] else None

    def last_count(self, gid: str) -> int | None:
        """The group's size with one block back; None where it is whole."""
        group, step = self.groups[gid], self.step[gid]
        now = self.counts[group.atom]
        return min(group.size, (now // step + 1) * step) if now < group.size else None

    def saving(self, gid: str, after: int) -> float:
        """What the metric loses when a group shrinks to `after` units."""
        atom = self.groups[gid].atom
        before, self.counts[atom] = self.counts[atom], after
        saved = sum(self.value[k] - self.cost.term(k, self.counts) for k in self.where.get(atom, ()))
        self.counts[atom] = before
        return saved

    def block(self, gid: str, *, back: bool = False) -> _Block | None:
        """The next one that may go, or come back; None where there is none, or going saves nothing."""
        after = self.last_count(gid) if back else self.next_count(gid)
        if after is None:
            return None
        saved = self.saving(gid, after)
        return _Block(gid, after, self.lost(gid, after) - self.lost(gid), saved) if back or saved > 0 else None

    def lost(self, gid: str, count: int | None = None) -> float:
        """What is lost with the units that the group lacks, or would lack."""
        group = self.groups[gid]
        return float(self.losses[gid][group.size - (self.counts[group.atom] if count is None else count)])

    def loss(self) -> float:
        return sum(map(self.lost, self.groups))

    def restore(self, counts: Mapping[Atom, int]) -> None:
        for g in self.groups.values():
            if self.counts[g.atom] != counts[g.atom]:
                self.shrink(g.id, counts[g.atom])

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
    dear: float = DEAR,
    settle: bool = True,
    overshoot: bool = True,
    meet: bool = True,
    whole: Collection[Atom] = (),
    losses: Mapping[str, np.ndarray] | None = None,
) -> Allocation:
    """Choose what to keep. scope: 'global' ranks all groups together, 'local' takes the same share of each first.

    losses: per group id what is lost with 0, 1, ... units; by default -log of the share of the importance that stays.
    whole: atoms that may lose all of their units.
    dear: at how many times the price at which the way ended smaller blocks go on filling the gap.
    settle: whether blocks that go past the goal are tried where others leave more than 1 % of it.
    overshoot: where nothing at all would go, take the smallest block rather than do nothing in silence.
    meet: whether a plan that is not within the target (`highest`) goes past the goal at whatever price.
    """
    may = {g.id: 0 if g.atom in whole else lowest(g.size, step[g.id], floor) for g in groups}
    order = {g.id: np.argsort(scores[g.id], kind="stable") for g in groups}
    lost = {gid: _lost(scores[gid][o], bypass=may[gid] == 0) for gid, o in order.items()}
    lost |= {gid: convex_hull(loss) for gid, loss in (losses or {}).items() if gid in lost}
    state = _State(groups, lost, cost, step, may)
    least = _least(state)
    if scope == "local":
        _same_share(state, goal)
    price = _greedy(state, goal, dear)
    if settle and state.total > goal * (1 + TOLERANCE):
        _settle(state, goal, price)
    if meet and least <= highest(least, goal) < state.total:
        _pass(state, highest(least, goal), price)
    if overshoot and state.total >= cost.total({}) * (1 - SLACK):
        _smallest_step(state)
    keep = {}
    for g in groups:
        n = state.counts[g.atom]
        if n < g.size:
            keep[g.id] = np.sort(order[g.id][g.size - n :])
    return Allocation(keep, state.total, least)


def highest(least: float, goal: float) -> float:
    """What may remain at most for a target to be met: 1 % more, or, where only the size of the blocks is in the way,
    5 % more.

    least: what would remain with every group at its floor.
    """
    return goal * (1 + (ROUGHLY if least <= goal else TOLERANCE))


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


@dataclass(frozen=True)
class _Block:
    """Units of one group that may go, or come back (then `lost` and `saved` are below zero)."""

    group: str
    after: int
    lost: float
    saved: float

    @property
    def price(self) -> float:
        return self.lost / self.saved if self.saved else math.inf


def _walk(state: _State, taken: Callable[[_Block], bool], *, back: bool = False, but: str = "") -> None:
    """Offer the groups' next blocks, the cheapest first, or, where they come back, the dearest. A group whose block is
    not taken is offered no more."""
    heap: list[tuple[float, str]] = []

    def key(block: _Block) -> float:
        return -block.price if back else block.price

    def push(gid: str) -> None:
        block = state.block(gid, back=back)
        if block is not None:
            heapq.heappush(heap, (key(block), gid))

    for gid in state.groups:
        if gid != but:
            push(gid)
    while heap:
        was, gid = heapq.heappop(heap)
        block = state.block(gid, back=back)
        if block is None:
            continue
        if key(block) > was + SLACK * abs(was) and heap and key(block) > heap[0][0]:
            heapq.heappush(heap, (key(block), gid))
        elif taken(block):
            state.shrink(gid, block.after)
            push(gid)


def _greedy(state: _State, goal: float, dear: float) -> float:
    """Take what fits, and return the price at which the first block didn't."""
    price, ends = 0.0, False
    nothing = SLACK * max(map(np.ptp, state.losses.values()), default=0.0) / state.total

    def taken(block: _Block) -> bool:
        nonlocal price, ends
        fits = state.total - block.saved >= goal * (1 - SLACK)
        ends = ends or not fits
        if ends and price <= nothing:  # what costs nothing says nothing of the price
            price = max(block.price, 0.0)
        return fits and (not ends or dear == math.inf or block.price <= dear * price)

    _walk(state, taken)
    return price


def _settle(state: _State, goal: float, price: float) -> None:
    """Go past the goal where that is better than to stay above it: a local search whose steps are a block that doesn't
    fit, and what may come back for it."""
    worth = _worth(price)
    least = SLACK * worth * goal

    def better(block: _Block) -> bool:
        nearer = abs(state.total - goal) - abs(state.total - block.saved - goal)
        needless = block.saved < 0 <= block.lost  # it would come back, and nothing is won
        return not needless and block.lost < worth * nearer - least

    def total() -> float:
        return state.loss() + worth * abs(state.total - goal)

    best = total()
    for _ in range(ROUNDS):
        start, found = dict(state.counts), dict(state.counts)
        past = [b for gid in state.groups if (b := state.block(gid)) and state.total - b.saved < goal]
        for block in sorted(past, key=lambda b: (b.price, b.group))[:TRIED]:
            state.shrink(block.group, block.after)
            _walk(state, better, back=True, but=block.group)
            _walk(state, better)
            if total() < best - least:
                best, found = total(), dict(state.counts)
            state.restore(start)
        if found == start:
            break
        state.restore(found)


def _pass(state: _State, limit: float, price: float) -> None:
    """Go below the limit with the block after which loss and distance add up to the least, once what needn't be gone
    any more is back. There is such a block as long as a group is above its floor: what is smaller is gone, or dearer
    than one that didn't fit."""
    worth, start, ends = _worth(price), dict(state.counts), []
    past = [b for gid in state.groups if (b := state.block(gid)) and state.total - b.saved <= limit]
    for block in past:
        state.shrink(block.group, block.after)
        _walk(state, lambda b: b.lost < 0 and state.total - b.saved <= limit, back=True, but=block.group)
        ends.append((state.loss() + worth * (limit - state.total), dict(state.counts)))
        state.restore(start)
    if ends:
        state.restore(min(ends, key=lambda end: end[0])[1])


def _worth(price: float) -> float:
    """What a step nearer to the goal is worth."""
    return DEAR * price if price > 0 else 1.0


def _smallest_step(state: _State) -> None:
    """Take the smallest block there is."""
    options = [
        (state.saving(gid, after), gid, after) for gid in state.groups if (after := state.next_count(gid)) is not None
    ]
    options = [o for o in options if o[0] > 0]
    if options:
        _, gid, after = min(options)
        state.shrink(gid, after)
