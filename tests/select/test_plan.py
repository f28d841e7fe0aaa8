"""Plans as text: what is stored in a pruned model is what comes out again."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxprune.axes.analysis import Analysis, analyse
from onnxprune.errors import ModelRejected
from onnxprune.model.load import load
from onnxprune.select.plan import Plan, plan_from_text, plan_to_text
from tests.graphs import from_text

UNITS = 40


def made(width: int = UNITS, name: str = "w1") -> Analysis:
    text = f"(float[N,5] x) => (float[N,4] y) {{ a = MatMul(x, {name})\n y = MatMul(a, w2) }}"
    return analyse(load(from_text(text, **{name: (5, width), "w2": (width, 4)})))


ANALYSIS = made()


@given(st.sets(st.integers(0, UNITS - 1), min_size=1))
def test_a_plan_survives_as_text(units: set[int]) -> None:
    plan = Plan({"g0": np.array(sorted(units))})
    again = plan_from_text(plan_to_text(plan, ANALYSIS), ANALYSIS)
    assert {k: v.tolist() for k, v in again.keep.items()} == {"g0": sorted(units)}


def test_runs_of_units_are_written_as_ranges() -> None:
    text = plan_to_text(Plan({"g0": np.array([0, 1, 2, 5, 7, 8])}), ANALYSIS)
    assert json.loads(text)["groups"][0]["kept"] == "0-2,5,7-8"


@pytest.mark.parametrize(
    "other", [made(width=UNITS + 1), made(name="renamed")], ids=["another width", "another initializer"]
)
def test_a_plan_for_another_model_is_refused(other: Analysis) -> None:
    text = plan_to_text(Plan({"g0": np.array([1, 2])}), ANALYSIS)
    with pytest.raises(ModelRejected) as caught:
        plan_from_text(text, other)
    assert "g0" in str(caught.value) and caught.value.hint


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no json",
        "[]",
        "{}",
        '{"groups": 3}',
        '{"groups": [3]}',
        '{"groups": [{"id": "g0"}]}',
        "null",
        '{"groups": [{"id": "g0", "size": 40, "member": "w1", "axis": 1, "kept": "a-b"}]}',
        '{"groups": [{"id": "g0", "size": 40, "member": "w1", "axis": 1, "kept": "0-99"}]}',
        '{"groups": [{"id": "g0", "size": 40, "member": "w1", "axis": 1, "kept": "5,3"}]}',
        '{"groups": [{"id": "g0", "size": 40, "member": "w1", "axis": 1, "kept": "3,3"}]}',
        '{"groups": [{"id": "g0", "size": 40, "member": "w1", "axis": 1, "kept": "-1"}]}',
        '{"groups": [{"id": "g0", "size": 40, "member": "w1", "axis": 1, "kept": 7}]}',
        '{"groups": [{"id": "g0", "size": 40, "member": "w1", "axis": 1, "kept": "0-999999999999"}]}',
    ],
)
def test_a_stored_plan_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(ModelRejected):
        plan_from_text(text, ANALYSIS)
