"""The axis algebra by itself: what unification may conclude, against single indices counted one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxprune.axes.expr import (
    Atom,
    Barrier,
    Expr,
    Product,
    Sum,
    atoms,
    cut,
    equal,
    freeze,
    is_frozen,
    kept,
    product,
    resolve,
    show,
    split,
    stretches,
    sum_of,
)

NOBODY = Barrier("node", "Op", "a test")
LARGEST = 24


def names(*exprs: Expr) -> dict[Atom, str]:
    """Letters for the free atoms, in the order in which they are met."""
    free = dict.fromkeys(a for e in exprs for a in atoms(e) if a.barrier is None)
    return dict(zip(free, "abcdefghijklm", strict=False))


def shown(*exprs: Expr) -> list[str]:
    return [show(e, names(*exprs)) for e in exprs]


class TestEqual:
    """The examples of the design, and the corners of each case."""

    def test_products_refine_the_larger_factor_where_sizes_divide(self) -> None:
        x, y = product(Atom(12), Atom(64)), product(Atom(6), Atom(128))
        equal(x, y, NOBODY)
        assert shown(x, y) == ["(a:6 b:2 c:64)"] * 2

    def test_products_with_equal_factors_pair_them(self) -> None:
        x, y = product(Atom(12), Atom(64)), product(Atom(12), Atom(64))
        equal(x, y, NOBODY)
        assert shown(x, y) == ["(a:12 b:64)"] * 2

    def test_a_common_stretch_is_paired_before_the_rest_is_refined(self) -> None:
        x, y = product(Atom(4), Atom(6), Atom(5)), product(Atom(8), Atom(3), Atom(5))
        equal(x, y, NOBODY)
        assert shown(x, y) == ["(a:4 b:2 c:3 d:5)"] * 2

    def test_factors_that_do_not_divide_freeze_their_stretch_only(self) -> None:
        x, y = product(Atom(4), Atom(9), Atom(5)), product(Atom(6), Atom(6), Atom(5))
        equal(x, y, NOBODY)
        assert shown(x, y) == ["(36 a:5)"] * 2

    def test_sums_get_the_common_refinement_of_their_cuts(self) -> None:
        x, y = sum_of(Atom(24), Atom(40)), sum_of(Atom(32), Atom(32))
        equal(x, y, NOBODY)
        assert shown(x, y) == ["[a:24 + b:8 + c:32]"] * 2

    def test_equal_parts_against_a_product_unify_with_the_inner_factor_and_freeze_the_outer(self) -> None:
        q, k, v = Atom(48), Atom(48), Atom(48)
        inner = Atom(48)
        equal(sum_of(q, k, v), product(Atom(3), inner), NOBODY)
        assert resolve(q) is resolve(k) is resolve(v) is resolve(inner)
        assert resolve(inner).size == 48 and not is_frozen(inner)

    def test_uneven_parts_cut_the_outer_factor_at_unit_boundaries(self) -> None:
        x, y = product(Atom(6), Atom(10)), sum_of(Atom(20), Atom(40))
        equal(x, y, NOBODY)
        assert shown(x)[0] in ("([a:2 + b:4] c:10)", "[(a:2 b:10) + (c:4 b:10)]")
        first, second = y.parts
        assert shown(first, second) == ["(a:2 b:10)", "(c:4 b:10)"]

    def test_a_misaligned_part_freezes_only_the_unit_that_it_cuts_through(self) -> None:
        heads, width = Atom(4), Atom(6)
        equal(product(heads, width), sum_of(Atom(9), Atom(15)), NOBODY)
        free = {a.size for a in atoms(heads) if a.barrier is None}
        assert free == {1, 2}, "head 1 is cut through and stays; heads 0, and 2 to 3, are free"
        assert shown(width) == ["[a:3 + b:3]"]

    def test_different_sizes_freeze_both_sides_and_name_the_culprit(self) -> None:
        a, b = Atom(3), Atom(4)
        equal(a, b, NOBODY)
        assert a.barrier == b.barrier == NOBODY

    def test_frozenness_flows_from_either_side(self) -> None:
        for flipped in (False, True):
            frozen, free = Atom(6, NOBODY), Atom(6)
            pair = (free, frozen) if flipped else (frozen, free)
            equal(*pair, Barrier("", "", "someone else"))
            assert next(atoms(free)).barrier == NOBODY, "the first barrier is the one that is kept"

    def test_frozenness_flows_into_every_factor_and_part(self) -> None:
        inside = sum_of(product(Atom(2), Atom(3)), Atom(4))
        equal(inside, Atom(10, NOBODY), NOBODY)
        assert is_frozen(inside) and shown(inside) == ["10"]

    def test_an_axis_equals_itself(self) -> None:
        a = Atom(5)
        equal(a, a, NOBODY)
        assert resolve(a) is a and a.barrier is None

    def test_a_swapped_concatenation_makes_its_parts_periodic(self) -> None:
        """[a b] = [b a] with sizes 2 and 3: index i equals index i + 2 modulo 5, so all are one."""
        a, b = Atom(2), Atom(3)
        equal(sum_of(a, b), sum_of(b, a), NOBODY)
        assert {x.size for x in atoms(sum_of(a, b))} == {1}
        assert len(set(atoms(sum_of(a, b)))) == 1


class TestCut:
    """Cutting an axis in two."""

    def test_an_atom_becomes_two(self) -> None:
        a = Atom(10)
        left, right = cut(a, 3, NOBODY)
        assert (left.size, right.size) == (3, 7) and shown(a) == ["[a:3 + b:7]"]

    def test_a_frozen_atom_stays_frozen(self) -> None:
        left, right = cut(Atom(10, NOBODY), 3, NOBODY)
        assert is_frozen(left) and is_frozen(right)

    def test_a_sum_is_cut_at_and_inside_its_parts(self) -> None:
        parts = Atom(4), Atom(6)
        left, right = cut(sum_of(*parts), 4, NOBODY)
        assert (resolve(left), resolve(right)) == parts
        left, right = cut(sum_of(*parts), 7, NOBODY)
        assert shown(left, right) == ["[a:4 + b:3]", "c:3"]

    def test_a_product_is_cut_at_its_units(self) -> None:
        left, right = cut(product(Atom(4), Atom(6)), 18, NOBODY)
        assert shown(left, right) == ["(a:3 b:6)", "(c:1 b:6)"] or shown(left, right) == ["(a:3 b:6)", "b:6"]


class TestSplit:
    """Factoring an axis."""

    def test_an_atom_becomes_a_product(self) -> None:
        a = Atom(24)
        outer, inner = split(a, 4, NOBODY)
        assert (outer.size, inner.size) == (4, 6) and shown(a) == ["(a:4 b:6)"]

    def test_what_is_factored_already_is_used(self) -> None:
        heads, width = Atom(4), Atom(6)
        outer, inner = split(product(heads, width), 4, NOBODY)
        assert resolve(heads) is outer and resolve(width) is inner

    def test_by_one_and_by_all(self) -> None:
        a = Atom(6)
        assert [e.size for e in split(a, 1, NOBODY)] == [1, 6] and resolve(a).size == 6
        assert [e.size for e in split(a, 6, NOBODY)] == [6, 1]


class TestStretches:
    """Shortest stretches of equal product."""

    @pytest.mark.parametrize(
        ("left", "right", "expected"),
        [
            ([4, 6], [4, 6], [([4], [4]), ([6], [6])]),
            ([12, 64], [768], [([12, 64], [768])]),
            ([2, 12, 5], [24, 5], [([2, 12], [24]), ([5], [5])]),
            ([6, 4], [4, 6], [([6, 4], [4, 6])]),
            ([8], [2, 2, 2], [([8], [2, 2, 2])]),
            ([], [], []),
        ],
    )
    def test_examples(self, left: list[int], right: list[int], expected: list[tuple[list[int], list[int]]]) -> None:
        assert [(left[a], right[b]) for a, b in stretches(left, right)] == expected

    @given(st.lists(st.integers(2, 6), min_size=1, max_size=6), st.data())
    def test_they_partition_both_sides_into_equal_products(self, left: list[int], data: st.DataObject) -> None:
        cuts = data.draw(st.lists(st.booleans(), min_size=len(left) - 1, max_size=len(left) - 1))
        right = [left[0]]
        for n, merged in zip(left[1:], cuts, strict=True):
            right = [*right[:-1], right[-1] * n] if merged else [*right, n]
        pairs = list(stretches(left, right))
        assert [n for a, _ in pairs for n in left[a]] == left and [n for _, b in pairs for n in right[b]] == right
        assert all(np.prod(left[a]) == np.prod(right[b]) for a, b in pairs)
        for a, b in pairs:  # none can be made shorter
            starts = {int(np.prod(left[a][:k])) for k in range(1, a.stop - a.start)}
            assert not starts & {int(np.prod(right[b][:k])) for k in range(1, b.stop - b.start)}


class TestShow:
    """The readable form."""

    def test_names_sizes_and_nesting(self) -> None:
        h, d, c = Atom(12), Atom(64), Atom(5, NOBODY)
        expr = sum_of(product(h, d), c)
        assert show(expr, {h: "h", d: "d"}) == "[(h:12 d:64) + 5]"
        assert show(h) == "_:12"

    def test_canonical_form_drops_ones_and_empties_and_flattens(self) -> None:
        a, b, c = Atom(2), Atom(3), Atom(4)
        assert shown(product(a, Atom(1), product(b, c))) == ["(a:2 b:3 c:4)"]
        assert shown(sum_of(a, Atom(0), sum_of(b, c))) == ["[a:2 + b:3 + c:4]"]
        assert product(a) is a and sum_of(a) is a
        assert (product().size, sum_of().size) == (1, 0)


class TestKept:
    """Positions that stay, given those of the atoms."""

    def test_a_product_is_row_major_and_a_sum_is_shifted(self) -> None:
        a, b = Atom(3), Atom(2)
        keep = {a: np.array([0, 2])}
        assert kept(product(a, b), keep).tolist() == [0, 1, 4, 5]
        assert kept(product(b, a), keep).tolist() == [0, 2, 3, 5]
        assert kept(sum_of(b, a), keep).tolist() == [0, 1, 2, 4]

    def test_nothing_removed_is_none(self) -> None:
        a, b = Atom(3), Atom(2)
        assert kept(product(a, b), {}) is None and kept(sum_of(a, b), {Atom(4): np.array([0])}) is None


# The oracle: every index of every axis by itself


class Indices:
    """Axes under construction and, beside the algebra, what each step says about single indices."""

    def __init__(self) -> None:
        self.axes: list[Expr] = []
        self.sizes: list[int] = []
        self.parent: dict[tuple[int, int], tuple[int, int]] = {}
        self.products: list[tuple[int, list[int]]] = []
        self.frozen: list[int] = []

    def add(self, expr: Expr, n: int) -> int:
        self.axes.append(expr)
        self.sizes.append(n)
        return len(self.axes) - 1

    def root(self, index: tuple[int, int]) -> tuple[int, int]:
        while index in self.parent:
            index = self.parent[index]
        return index

    def same(self, axis: int, positions: Sequence[int], other: int) -> None:
        """Index positions[k] of `axis` is index k of `other`."""
        for k, position in enumerate(positions):
            a, b = self.root((axis, position)), self.root((other, k))
            if a != b:
                self.parent[a] = b

    # the operations of the algebra, each with what it means

    def fresh(self, n: int) -> int:
        return self.add(Atom(n), n)

    def freeze(self, axis: int) -> None:
        freeze(self.axes[axis], NOBODY)
        self.frozen.append(axis)

    def equate(self, a: int, b: int) -> None:
        equal(self.axes[a], self.axes[b], NOBODY)
        self.same(a, range(self.sizes[a]), b)

    def merge(self, factors: Sequence[int]) -> int:
        merged = self.add(product(*(self.axes[k] for k in factors)), int(np.prod([self.sizes[k] for k in factors])))
        self.products.append((merged, list(factors)))
        return merged

    def factor(self, axis: int, outer: int) -> tuple[int, int]:
        a, b = split(self.axes[axis], outer, NOBODY)
        made = self.add(a, outer), self.add(b, self.sizes[axis] // outer)
        self.products.append((axis, list(made)))
        return made

    def concat(self, parts: Sequence[int]) -> int:
        total = sum(self.sizes[k] for k in parts)
        joined = self.add(sum_of(*(self.axes[k] for k in parts)), total)
        start = 0
        for k in parts:
            self.same(joined, range(start, start + self.sizes[k]), k)
            start += self.sizes[k]
        return joined

    def cut(self, axis: int, at: int) -> tuple[int, int]:
        left, right = cut(self.axes[axis], at, NOBODY)
        n = self.sizes[axis]
        made = self.add(left, at), self.add(right, n - at)
        self.same(axis, range(at), made[0])
        self.same(axis, range(at, n), made[1])
        return made

    # what must hold

    def masks(self, keep: Mapping[Atom, np.ndarray]) -> list[np.ndarray]:
        """Per axis, which indices stay according to the algebra."""
        result = []
        for expr, n in zip(self.axes, self.sizes, strict=True):
            positions = kept(expr, keep)
            mask = np.ones(n, bool)
            if positions is not None:
                assert np.all(np.diff(positions) > 0), "kept positions ascend"
                mask[:] = False
                mask[positions] = True
            result.append(mask)
        return result

    def check(self, masks: Sequence[np.ndarray]) -> None:
        fates: dict[tuple[int, int], bool] = {}
        for axis, mask in enumerate(masks):
            for k, alive in enumerate(mask):
                root = self.root((axis, k))
                assert fates.setdefault(root, bool(alive)) == alive, f"index {k} of axis {axis} parts from its class"
        for whole, factors in self.products:
            expected = np.ones(1, bool)
            for k in factors:
                expected = (expected[:, None] & masks[k][None, :]).reshape(-1)
            assert np.array_equal(masks[whole], expected), f"axis {whole} is not the product of {factors}"
        for axis in self.frozen:
            assert masks[axis].all(), f"frozen axis {axis} lost an index"

    def free_atoms(self) -> list[Atom]:
        return list(dict.fromkeys(a for e in self.axes for a in atoms(e) if a.barrier is None))


def random_step(data: st.DataObject, world: Indices, *, products: bool) -> None:
    """One more operation between axes that exist already."""
    axes = st.integers(0, len(world.axes) - 1)
    steps = ["fresh", "equate", "concat", "cut", "freeze"] + (["merge", "factor"] if products else [])
    step = data.draw(st.sampled_from(steps))
    if step == "fresh":
        world.fresh(data.draw(st.integers(1, 12)))
        return
    axis = data.draw(axes)
    n = world.sizes[axis]
    if step == "freeze":
        if data.draw(st.integers(0, 4)) == 0:
            world.freeze(axis)
    elif step == "equate":
        partners = [k for k, m in enumerate(world.sizes) if m == n]
        world.equate(axis, data.draw(st.sampled_from(partners)))
    elif step == "cut":
        if n > 1:
            world.cut(axis, data.draw(st.integers(1, n - 1)))
    elif step == "factor":
        world.factor(axis, data.draw(st.sampled_from([d for d in range(1, n + 1) if n % d == 0])))
    else:
        other = data.draw(axes)
        if step == "merge" and n * world.sizes[other] <= LARGEST:
            world.merge([axis, other])
        if step == "concat" and n + world.sizes[other] <= LARGEST:
            world.concat([axis, other])


def random_world(data: st.DataObject, *, products: bool) -> Indices:
    world = Indices()
    for _ in range(data.draw(st.integers(1, 3))):
        world.fresh(data.draw(st.sampled_from([2, 3, 4, 6, 8, 12])))
    for _ in range(data.draw(st.integers(1, 12))):
        random_step(data, world, products=products)
    return world


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_what_lives_or_dies_together_is_kept_or_dropped_together(data: st.DataObject) -> None:
    """Whatever is kept of the free atoms, every axis obeys every equality, product, concatenation and freeze."""
    world = random_world(data, products=True)
    assert [resolve(e).size for e in world.axes] == world.sizes
    for _ in range(3):
        keep = {}
        for atom in world.free_atoms():
            units = data.draw(st.sets(st.sampled_from(range(atom.size)), min_size=1)) if atom.size else set()
            keep[atom] = np.array(sorted(units), np.int64)
        world.check(world.masks(keep))


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_without_products_a_unit_is_exactly_one_class_of_indices(data: st.DataObject) -> None:
    """Concatenations, cuts and equalities lose nothing: removing one unit removes one class of the oracle, whole,
    and every class without a frozen index is a unit."""
    world = random_world(data, products=False)
    classes: dict[tuple[int, int], set[tuple[int, int]]] = {}
    for axis, n in enumerate(world.sizes):
        for k in range(n):
            classes.setdefault(world.root((axis, k)), set()).add((axis, k))
    stuck = {world.root((axis, k)) for axis in world.frozen for k in range(world.sizes[axis])}
    expected = {frozenset(c) for root, c in classes.items() if root not in stuck}
    found = set()
    for atom in world.free_atoms():
        for unit in range(atom.size):
            masks = world.masks({atom: np.delete(np.arange(atom.size), unit)})
            found.add(frozenset((axis, int(k)) for axis, m in enumerate(masks) for k in np.flatnonzero(~m)))
    found.discard(frozenset())
    assert found == expected


@given(st.lists(st.sampled_from([2, 3, 4, 6]), min_size=1, max_size=4), st.data())
def test_a_product_of_free_factors_can_be_factored_along_any_of_its_boundaries(
    sizes: list[int], data: st.DataObject
) -> None:
    factors = [Atom(n) for n in sizes]
    at = data.draw(st.integers(0, len(sizes)))
    outer, inner = split(product(*factors), int(np.prod(sizes[:at])), NOBODY)
    assert [a.size for a in atoms(product(outer, inner))] == sizes or len(sizes) == 1
    assert list(atoms(product(outer, inner))) == [a for f in factors for a in atoms(f)]
    assert not any(f.barrier for f in factors)


@given(st.integers(2, 6), st.integers(1, 6), st.data())
def test_equality_is_symmetric(k: int, c: int, data: st.DataObject) -> None:
    """Which side is written first makes no difference to what can be removed."""
    cuts = sorted(data.draw(st.sets(st.sampled_from(range(1, k * c)), max_size=3)) if k * c > 1 else [])
    bounds = [0, *cuts, k * c]

    def dead_sets(flipped: bool) -> set[frozenset[int]]:
        x = product(Atom(k), Atom(c))
        y = sum_of(*(Atom(b - a) for a, b in zip(bounds, bounds[1:], strict=False)))
        equal(*((y, x) if flipped else (x, y)), NOBODY)
        found = set()
        for atom in dict.fromkeys(a for a in atoms(x) if a.barrier is None and a.size > 1):
            for unit in range(atom.size):
                positions = kept(x, {atom: np.delete(np.arange(atom.size), unit)})
                found.add(frozenset(range(k * c)) - frozenset(positions.tolist()))
        return found

    assert dead_sets(False) == dead_sets(True)


def test_deep_chains_of_equalities_stay_shallow() -> None:
    """Thousands of layers that carry the same axis resolve without running out of stack, and to one atom."""
    axes = [Atom(8) for _ in range(3000)]
    for a, b in zip(axes, axes[1:], strict=False):
        equal(a, b, NOBODY)
    assert len({id(resolve(a)) for a in axes}) == 1


def test_an_axis_may_stay_symbolically_large() -> None:
    """The cost is per factor and not per index."""
    heads, width = Atom(10**6), Atom(10**6)
    equal(product(heads, width), sum_of(Atom(10**9), Atom(10**12 - 10**9)), NOBODY)
    assert sorted(a.size for a in set(atoms(heads))) == [10**3, 10**6 - 10**3]


def test_pairs_of_all_small_factorisations_agree_on_positions() -> None:
    """Every way to write 12 as a product against every other: kept positions are those of both."""
    ways = [(12,), (2, 6), (6, 2), (3, 4), (4, 3), (2, 2, 3), (2, 3, 2), (3, 2, 2)]
    for left, right in combinations(ways, 2):
        x, y = product(*(Atom(n) for n in left)), product(*(Atom(n) for n in right))
        equal(x, y, NOBODY)
        for atom in dict.fromkeys(a for a in atoms(x) if a.barrier is None):
            keep = {atom: np.arange(atom.size - 1)}
            a, b = kept(x, keep), kept(y, keep)
            assert a is not None and b is not None and np.array_equal(a, b), (left, right)


def test_products_and_sums_are_shown_by_repr_too() -> None:
    assert repr(Product((Atom(2), Atom(3)))) == "(_:2 _:3)" and repr(Sum((Atom(2), Atom(3)))) == "[_:2 + _:3]"
