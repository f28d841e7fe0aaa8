"""The axis algebra: what an axis of a tensor is made of, and how two axes are made equal.

Every axis of every tensor is an expression over *atoms*; an atom is a set of n interchangeable indices that
live or die together across the whole graph. Equalities between axes are solved by unification, as in type
inference, so the cost is per operator and axis and never per channel.

    expr := Atom(n) | Product(expr, ...)   row-major, as in einops '(h d)'
                    | Sum(expr, ...)       concatenation

A *frozen* atom never loses an index. Equating anything with a frozen expression freezes it, so frozen is the
bottom of the algebra: whatever can't be expressed ends there, never in a guess.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

__all__ = [
    "Atom",
    "Barrier",
    "Expr",
    "Product",
    "Solution",
    "Sum",
    "atoms",
    "cut",
    "equal",
    "freeze",
    "is_frozen",
    "kept",
    "product",
    "resolve",
    "show",
    "split",
    "stretches",
    "sum_of",
]


@dataclass(frozen=True, slots=True)
class Barrier:
    """Why an axis is frozen: the node that stood in the way (its name may be empty), its operator, the reason."""

    node: str
    op_type: str
    reason: str


class Atom:
    """A set of `size` interchangeable indices. `bound` is what it turned out to be equal to (None for a root)."""

    __slots__ = ("barrier", "bound", "size")

    def __init__(self, size: int, barrier: Barrier | None = None) -> None:
        self.size = size
        self.bound: Expr | None = None
        self.barrier = barrier

    def __repr__(self) -> str:
        return show(self)


class Product:
    """Row-major product of factors: index = i0 * size(f1) * ... + i1 * ... + i_last."""

    __slots__ = ("factors", "size")

    def __init__(self, factors: tuple[Expr, ...]) -> None:
        self.factors = factors
        self.size: int = prod(f.size for f in factors)

    def __repr__(self) -> str:
        return show(self)


class Sum:
    """Concatenation of parts."""

    __slots__ = ("parts", "size")

    def __init__(self, parts: tuple[Expr, ...]) -> None:
        self.parts = parts
        self.size: int = sum(p.size for p in parts)

    def __repr__(self) -> str:
        return show(self)


Expr = Atom | Product | Sum


def resolve(expr: Expr) -> Expr:
    """The canonical form: atoms replaced by what they are bound to, nested products and sums flattened, factors
    of size 1 and parts of size 0 dropped, neighbouring frozen atoms merged."""
    if isinstance(expr, Atom):
        return _resolve_atom(expr)
    if isinstance(expr, Product):
        return _rebuild(expr, expr.factors, Product)
    return _rebuild(expr, expr.parts, Sum)


def _resolve_atom(atom: Atom) -> Expr:
    """Follow the links to the end, and let every atom on the way point there."""
    path: list[Atom] = []
    end: Expr = atom
    while isinstance(end, Atom) and end.bound is not None:
        path.append(end)
        end = end.bound
    root = end if isinstance(end, Atom) else resolve(end)
    for passed in path:
        passed.bound = root
    return root


def _rebuild(expr: Product | Sum, children: tuple[Expr, ...], kind: type[Product] | type[Sum]) -> Expr:
    flat: list[Expr] = []
    changed = False
    neutral = 1 if kind is Product else 0
    for child in children:
        root = resolve(child)
        changed |= root is not child
        if root.size == neutral:
            changed = True
        elif type(root) is kind:
            changed = True
            inner = root.factors if isinstance(root, Product) else root.parts
            for item in inner:
                _append(flat, item, kind)
        else:
            before = len(flat)
            _append(flat, root, kind)
            changed |= len(flat) == before
    if len(flat) == 1:
        return flat[0]
    if not flat:
        return Atom(neutral)
    return kind(tuple(flat)) if changed else expr


def _append(flat: list[Expr], item: Expr, kind: type[Product] | type[Sum]) -> None:
    last = flat[-1] if flat else None
    if isinstance(item, Atom) and item.barrier and isinstance(last, Atom) and last.barrier:
        merged = last.size * item.size if kind is Product else last.size + item.size
        flat[-1] = Atom(merged, last.barrier)
    else:
        flat.append(item)


def product(*factors: Expr) -> Expr:
    """Row-major product, in canonical form."""
    return resolve(Product(factors))


def sum_of(*parts: Expr) -> Expr:
    """Concatenation, in canonical form."""
    return resolve(Sum(parts))


def atoms(expr: Expr) -> Iterator[Atom]:
    """Root atoms of an expression, left to right, with repetitions."""
    stack = [resolve(expr)]
    while stack:
        top = stack.pop()
        if isinstance(top, Atom):
            yield top
        else:
            stack.extend(reversed(top.factors if isinstance(top, Product) else top.parts))


class Solution:
    """The expressions after the last equation was stated: canonical forms and free atoms, each found out once."""

    def __init__(self) -> None:
        self._roots: dict[Expr, Expr] = {}
        self._free: dict[Expr, frozenset[Atom]] = {}

    def of(self, expr: Expr) -> Expr:
        """The canonical form."""
        root = self._roots.get(expr)
        if root is None:
            root = self._roots[expr] = resolve(expr)
            self._roots[root] = root
        return root

    def free(self, expr: Expr) -> frozenset[Atom]:
        """The atoms that may lose units: not frozen, and of more than one unit."""
        found = self._free.get(expr)
        if found is None:
            root = self.of(expr)
            found = self._free.get(root)
            if found is None:
                found = frozenset(a for a in atoms(root) if a.barrier is None and a.size > 1)
                self._free[root] = found
            self._free[expr] = found
        return found


def is_frozen(expr: Expr) -> bool:
    """True where no index of the axis can ever be removed."""
    return all(a.barrier for a in atoms(expr))


def freeze(expr: Expr, barrier: Barrier) -> None:
    """Freeze every atom of an expression; the first barrier of an atom is the one that is kept."""
    for atom in atoms(expr):
        if atom.barrier is None:
            atom.barrier = barrier


def equal(a: Expr, b: Expr, barrier: Barrier) -> None:
    """State that two axes are the same set of indices. `barrier` is whom to blame where they can't line up."""
    a, b = resolve(a), resolve(b)
    if a is b:
        return
    if a.size != b.size:
        freeze(a, barrier)
        freeze(b, barrier)
    elif isinstance(a, Atom):
        _bind(a, b)
    elif isinstance(b, Atom):
        _bind(b, a)
    elif isinstance(a, Product) and isinstance(b, Product):
        _equal_products(a, b, barrier)
    elif isinstance(a, Sum) and isinstance(b, Sum):
        _equal_sums(a, b, barrier)
    elif isinstance(a, Sum):
        _equal_sum_product(a, b, barrier)  # type: ignore[arg-type]
    else:
        _equal_sum_product(b, a, barrier)  # type: ignore[arg-type]


def _bind(atom: Atom, expr: Expr) -> None:
    if atom.barrier is not None:
        freeze(expr, atom.barrier)
    atom.bound = expr


def _equal_products(a: Product, b: Product, barrier: Barrier) -> None:
    """Pair the shortest stretches of equal size; inside a stretch refine the larger factor where sizes divide."""
    for left, right in stretches([f.size for f in a.factors], [f.size for f in b.factors]):
        mine, theirs = list(a.factors[left]), list(b.factors[right])
        if len(mine) == 1 or len(theirs) == 1:
            equal(product(*mine), product(*theirs), barrier)
            continue
        while mine and theirs:
            x, y = mine.pop(0), theirs.pop(0)
            if x.size > y.size and x.size % y.size == 0:
                outer, inner = split(x, y.size, barrier)
                equal(outer, y, barrier)
                mine.insert(0, inner)
            elif y.size > x.size and y.size % x.size == 0:
                outer, inner = split(y, x.size, barrier)
                equal(outer, x, barrier)
                theirs.insert(0, inner)
            elif x.size == y.size:
                equal(x, y, barrier)
            else:
                for rest in (x, y, *mine, *theirs):
                    freeze(rest, barrier)
                break


def stretches(left: Sequence[int], right: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Shortest pairs of stretches whose sizes have equal products; both sides have the same total."""
    i = j = 0
    while i < len(left) or j < len(right):
        start_i, start_j = i, j
        p = q = 1
        if i < len(left):
            p, i = left[i], i + 1
        if j < len(right):
            q, j = right[j], j + 1
        while p != q:
            if p < q and i < len(left):
                p, i = p * left[i], i + 1
            elif j < len(right):
                q, j = q * right[j], j + 1
            else:
                i = len(left)
                break
        yield slice(start_i, i), slice(start_j, j)


def split(expr: Expr, outer: int, barrier: Barrier) -> tuple[Expr, Expr]:
    """Factor an axis into (outer, rest); `outer` divides its size."""
    expr = resolve(expr)
    a, b = Atom(outer), Atom(expr.size // outer)
    equal(expr, Product((a, b)), barrier)
    return resolve(a), resolve(b)


def _equal_sums(a: Sum, b: Sum, barrier: Barrier) -> None:
    """Common refinement of the cut points."""
    mine, theirs = list(a.parts), list(b.parts)
    while mine and theirs:
        x, y = mine.pop(0), theirs.pop(0)
        if x.size > y.size:
            x, rest = cut(x, y.size, barrier)
            mine.insert(0, rest)
        elif y.size > x.size:
            y, rest = cut(y, x.size, barrier)
            theirs.insert(0, rest)
        equal(x, y, barrier)


def cut(expr: Expr, at: int, barrier: Barrier) -> tuple[Expr, Expr]:
    """Cut an axis in two at index `at` (0 < at < size)."""
    expr = resolve(expr)
    if isinstance(expr, Atom):
        left, right = Atom(at, expr.barrier), Atom(expr.size - at, expr.barrier)
        expr.bound = Sum((left, right))
        return left, right
    if isinstance(expr, Sum):
        return _cut_sum(expr, at, barrier)
    return _cut_product(expr, at, barrier)


def _cut_product(expr: Product, at: int, barrier: Barrier) -> tuple[Expr, Expr]:
    """Cut the outer factor. Where the cut falls inside one of its units, that unit stays and the rest is cut there."""
    outer, inner = expr.factors[0], product(*expr.factors[1:])
    units, inside = divmod(at, inner.size)
    if not inside:
        left, right = cut(outer, units, barrier)
        return product(left, inner), product(right, inner)
    before, outer = cut(outer, units, barrier) if units else (Atom(0), outer)
    middle, after = cut(outer, 1, barrier) if outer.size > 1 else (outer, Atom(0))
    freeze(middle, barrier)
    low, high = cut(inner, inside, barrier)
    inner = resolve(inner)
    return sum_of(product(before, inner), low), sum_of(high, product(after, inner))


def _cut_sum(expr: Sum, at: int, barrier: Barrier) -> tuple[Expr, Expr]:
    before = 0
    for k, part in enumerate(expr.parts):
        if at == before:
            return sum_of(*expr.parts[:k]), sum_of(*expr.parts[k:])
        if at < before + part.size:
            left, right = cut(part, at - before, barrier)
            return sum_of(*expr.parts[:k], left), sum_of(right, *expr.parts[k + 1 :])
        before += part.size
    raise AssertionError("cut outside the axis")


def _equal_sum_product(a: Sum, b: Product, barrier: Barrier) -> None:
    """Cut the product at the Sum's boundaries. k parts against k * c leave k single indices of the outer factor,
    which are no units of anything: an atom of size 1 is never pruned."""
    rest: Expr = b
    for part in a.parts[:-1]:
        piece, rest = cut(rest, part.size, barrier)
        equal(part, piece, barrier)
    equal(a.parts[-1], rest, barrier)


def kept(expr: Expr, keep: Mapping[Atom, np.ndarray]) -> np.ndarray | None:
    """Kept positions of an axis, ascending, given the kept indices of its atoms; None where all are kept."""
    expr = resolve(expr)
    if isinstance(expr, Atom):
        return keep.get(expr)
    if isinstance(expr, Product):
        masks = [kept(f, keep) for f in expr.factors]
        if all(m is None for m in masks):
            return None
        index = np.zeros(1, np.int64)
        for factor, mask in zip(expr.factors, masks, strict=True):
            mask = np.arange(factor.size) if mask is None else mask
            index = (index[:, None] * factor.size + mask[None, :]).reshape(-1)
        return index
    pieces, start, touched = [], 0, False
    for part in expr.parts:
        mask = kept(part, keep)
        touched |= mask is not None
        pieces.append(start + (np.arange(part.size) if mask is None else mask))
        start += part.size
    return np.concatenate(pieces) if touched else None


def show(expr: Expr, names: Mapping[Atom, str] | None = None) -> str:
    """Readable form: `g3:64`, `(h:12 d:64)`, `[a:24 + b:40]`; frozen atoms are bare numbers."""
    expr = resolve(expr)
    if isinstance(expr, Atom):
        if expr.barrier is not None:
            return str(expr.size)
        return f"{(names or {}).get(expr, '_')}:{expr.size}"
    if isinstance(expr, Product):
        return "(" + " ".join(show(f, names) for f in expr.factors) + ")"
    return "[" + " + ".join(show(p, names) for p in expr.parts) + "]"
