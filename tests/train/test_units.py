"""The table of units against sums over masks, index by index."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from onnxprune.train.units import Part, UnitTable
from tests.train.unit_problems import disjoint, overlapping, part
from tests.train.unit_reference import Problem


def problem(tensors: list[Tensor], parts: list[tuple[Part, ...]]) -> Problem:
    return Problem(tensors, parts, [0] * len(tensors), [{}])


def channels_last() -> Problem:
    """A convolution with channels_last strides, one with a kernel of 1, a 3-d one, and a transposed matrix, beside
    contiguous tensors of the same shapes."""
    torch.manual_seed(0)
    own = (part("a", 0, 0, 1, 2, 3),)
    tensors = [
        torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last),
        torch.randn(4, 3, 3, 3),
        torch.randn(4, 6, 1, 1).to(memory_format=torch.channels_last),
        torch.randn(4, 2, 3, 3, 3).to(memory_format=torch.channels_last_3d),
        torch.randn(5, 4).T,
        torch.randn(4, 5),
    ]
    return problem(tensors, [own] * 6)


def inner_axes() -> Problem:
    """Units along the last axis (a MatMul's weight), in the middle, and of channels_last along the second."""
    torch.manual_seed(0)
    tensors = [torch.randn(6, 4), torch.randn(2, 4, 3), torch.randn(3, 4, 2, 2).to(memory_format=torch.channels_last)]
    tensors += [torch.randn(6, 4), torch.randn(5, 4, 2, 2)]
    return problem(tensors, [(part("a", 1, 0, 1, 2, 3),)] * 5)


def two_axes() -> Problem:
    """Both axes of a tensor free: of two families, of one family twice, and with an axis that is summed between."""
    torch.manual_seed(0)
    a, b = (0, 1, -1, 2), (1, 0, 2)
    tensors = [torch.randn(4, 3), torch.randn(4, 5, 3), torch.randn(3, 3), torch.randn(4, 3, 2, 2)]
    tensors[3] = tensors[3].to(memory_format=torch.channels_last)
    parts = [(part("a", 0, *a), part("b", 1, *b)), (part("b", 2, *b), part("a", 0, *a))]
    return problem(tensors, [*parts, (part("b", 0, *b), part("b", 1, *b)), (part("a", 0, *a), part("b", 1, *b))])


def nothing() -> Problem:
    return problem([torch.randn(3, 2), torch.randn(2)], [(), (part("a", 0, -1, -1),)])


def scalars() -> Problem:
    """Tensors of one axis, one number per row, and an empty row."""
    return problem([torch.randn(3), torch.randn(3, 1), torch.randn(3, 0)], [(part("a", 0, 2, 0, 1),)] * 3)


PROBLEMS = [disjoint, overlapping, channels_last, inner_axes, two_axes, scalars]


def made(of: Problem, dtype: torch.dtype = torch.float64) -> tuple[UnitTable, list[Tensor]]:
    tensors = [t.detach().clone(memory_format=torch.preserve_format).to(dtype) for t in of.tensors]
    return UnitTable(tensors, of.parts), tensors


def per_unit(of: Problem, values: list[Tensor]) -> Tensor:
    """Sums of the values over every unit, in float64."""
    sums = [
        sum(float(v.double()[m].sum()) for v, m in zip(values, own, strict=True) if m is not None) for own in of.units()
    ]
    return torch.tensor(sums, dtype=torch.float64)


@pytest.mark.parametrize("make", PROBLEMS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5), (torch.float16, 1e-5)],
)
def test_norms_and_inner_products_are_sums_over_the_units(make: Any, dtype: torch.dtype, tolerance: float) -> None:
    of = make()
    table, tensors = made(of, dtype)
    other = table.storage()
    torch.manual_seed(5)
    for view in other.views:
        view.copy_(torch.randn(view.shape))
    learnt = [k for k, own in enumerate(of.parts) if own]
    others = [torch.zeros_like(t) for t in tensors]
    for k, view in zip(learnt, other.views, strict=True):
        others[k] = view
    square = per_unit(of, [t.double() ** 2 for t in tensors])
    inner = per_unit(of, [t.double() * o.double() for t, o in zip(tensors, others, strict=True)])
    how: dict[str, Any] = {"rtol": tolerance, "atol": tolerance * 10}
    torch.testing.assert_close(table.square(table.x.banks).double(), square, **how)
    torch.testing.assert_close(table.dot(table.x.banks, other.banks).double(), inner, **how)
    assert table.counts.tolist() == per_unit(of, [torch.ones_like(t) for t in tensors]).tolist()
    assert table.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)


@pytest.mark.parametrize("make", PROBLEMS)
def test_weights_count_per_tensor(make: Any) -> None:
    of = make()
    table, tensors = made(of)
    per_tensor = torch.arange(1.0, len(table.tensors) + 1, dtype=torch.float64)
    weights = iter(per_tensor)
    scaled = [t**2 * next(weights) if own else t for t, own in zip(tensors, of.parts, strict=True)]
    found = table.square(table.x.banks, weights=table.rows_of(per_tensor))
    torch.testing.assert_close(found, per_unit(of, scaled))
    found = table.dot(table.x.banks, table.x.banks, weights=table.rows_of(per_tensor))
    torch.testing.assert_close(found, per_unit(of, scaled))


@pytest.mark.parametrize("make", PROBLEMS)
def test_what_is_laid_out_keeps_its_values_and_strides(make: Any) -> None:
    of = make()
    table, tensors = made(of, torch.float32)
    for tensor, before in zip(tensors, of.tensors, strict=True):
        assert torch.equal(tensor, before)
        if before.is_contiguous() or before.is_contiguous(memory_format=torch.channels_last):
            assert tensor.stride() == before.stride()
    for tensor, view in zip(table.tensors, table.x.views, strict=True):
        assert tensor.data_ptr() == view.data_ptr() and tensor.stride() == view.stride()
        assert tensor.is_contiguous() or torch.empty_like(tensor).stride() == tensor.stride()


@pytest.mark.parametrize("make", PROBLEMS)
def test_a_number_per_unit_reaches_all_its_slices_and_nothing_else(make: Any) -> None:
    of = make()
    table, tensors = made(of)
    torch.manual_seed(7)
    factor = torch.rand(table.units, dtype=torch.float64) + 0.5
    expected = [t.clone() for t in tensors]
    for unit, own in enumerate(of.units()):
        for t, mask in zip(expected, own, strict=True):
            if mask is not None:
                t[mask] *= factor[unit]
    table.scale_(factor)
    for t, e in zip(tensors, expected, strict=True):
        torch.testing.assert_close(t, e)


@pytest.mark.parametrize("make", PROBLEMS)
def test_sums_reach_rows_of_several_units(make: Any) -> None:
    of = make()
    table, tensors = made(of)
    number = torch.arange(1.0, table.units + 1, dtype=torch.float64)
    expected = [torch.zeros_like(t) for t in tensors]
    for unit, own in enumerate(of.units()):
        for t, mask in zip(expected, own, strict=True):
            if mask is not None:
                t[mask] += number[unit]
    for bank, rows in zip(table.x.banks, table.spread(number, combine="sum"), strict=True):
        bank.zero_().add_(rows)
    for t, e, own in zip(tensors, expected, of.parts, strict=True):
        assert not own or torch.equal(t, e)


@pytest.mark.parametrize("make", PROBLEMS)
def test_what_is_not_alive_becomes_zero_whatever_it_holds(make: Any) -> None:
    of = make()
    table, tensors = made(of)
    alive = torch.arange(table.units) % 2 == 0
    expected = [t.clone() for t in tensors]
    for unit, own in enumerate(of.units()):
        for t, e, mask in zip(tensors, expected, own, strict=True):
            if mask is not None and not alive[unit]:
                t[mask], e[mask] = torch.nan, 0.0
    table.keep_(alive)
    for t, e in zip(tensors, expected, strict=True):
        assert torch.equal(t, e)


def test_families_are_numbered_in_the_order_in_which_they_come_up() -> None:
    table, _ = made(overlapping())
    assert table.slices == {"head": slice(0, 3), "dim": slice(3, 7), "other": slice(7, 11)}
    per = table.by_family(torch.arange(11))
    assert {f: v.tolist() for f, v in per.items()} == {"head": [0, 1, 2], "dim": [3, 4, 5, 6], "other": [7, 8, 9, 10]}
    back = table.from_families({"dim": np.array([1, 2, 3, 4]), "head": np.array([9, 9, 9])}, missing=-1)
    assert back.tolist() == [9, 9, 9, 1, 2, 3, 4, -1, -1, -1, -1]
    assert table.family_of.tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]


def test_sizes_name_units_that_nothing_produces() -> None:
    table = UnitTable([torch.ones(2, 3)], [(part("a", 0, 0, 1),)], sizes={"a": 4})
    assert table.units == 4 and table.square(table.x.banks).tolist() == [3.0, 3.0, 0.0, 0.0]


def test_without_units_there_is_nothing_to_do() -> None:
    for of in (nothing(), problem([], [])):
        table, _ = made(of)
        assert table.units == 0 and table.square(table.x.banks).shape == (0,)
        table.scale_(torch.ones(0))
        table.keep_(torch.ones(0, dtype=torch.bool))


def test_like_tensors_share_banks() -> None:
    """However many layers there are: what counts is how many forms they have."""
    layers = [torch.randn(k + 2, 8, 3, 3) for k in range(10)] + [torch.randn(k + 2) for k in range(10)]
    parts = [(part(str(k % 10), 0, *range(k % 10 + 2)),) for k in range(20)]
    assert len(UnitTable(layers, parts).x.banks) == 2


def test_exchanged_storage_is_taken_up() -> None:
    of = disjoint()
    table, tensors = made(of)
    tensors[0].data = 2 * tensors[0].data
    before = table.square(table.x.banks)
    table.rebind()
    assert tensors[0].data_ptr() == table.x.views[0].data_ptr()
    assert not torch.equal(table.square(table.x.banks), before)
    torch.testing.assert_close(table.square(table.x.banks), per_unit(of, [t**2 for t in tensors]))


def test_a_part_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="has 3 indices"):
        UnitTable([torch.ones(3, 2)], [(part("a", 0, 0, 1),)])
    with pytest.raises(ValueError, match="2 tensors, and parts of 1"):
        UnitTable([torch.ones(3), torch.ones(2)], [()])
