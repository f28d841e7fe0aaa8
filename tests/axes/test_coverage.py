"""What counts as a parameter: what was learnt, and not the positions that an exporter stored beside it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxprune.axes.analysis import analyse
from onnxprune.model.load import load
from tests.graphs import from_text

SAMPLED = """(float[2,3,4,4] x) => (float[2,2,4,4] y) {{
    c = Conv(x, w)
    {grid}
    s = GridSample(c, g)
    y = Conv(s, u)
}}"""


def sampled(grid: str, *, learnt: bool = False) -> onnx.ModelProto:
    """A stored grid of sampling points, one of which each pixel of two images takes."""
    model = from_text(SAMPLED.format(grid=grid), w=(6, 3, 1, 1), u=(2, 6, 1, 1), t=(2, 4, 4, 2), two=())
    if not learnt:
        points = np.stack(np.meshgrid(*[np.linspace(-1, 1, 4, dtype=np.float32)] * 2), -1)
        table = next(t for t in model.graph.initializer if t.name == "t")
        table.CopyFrom(numpy_helper.from_array(np.stack([points, points]), "t"))
    return model


@pytest.mark.parametrize(
    "grid",
    [
        "g = Identity(t)",
        "a, b = Split<axis=3>(t)\n d = Div(a, two)\n g = Concat<axis=3>(d, b)",
        "m = Mul(t, two)\n n = Transpose<perm=[0,2,1,3]>(m)\n g = Sub(n, two)",
    ],
)
def test_a_stored_sampling_grid_is_no_parameter_however_it_is_prepared(grid: str) -> None:
    """One exporter folds the arithmetic on positions, another leaves it in the graph."""
    analysis = analyse(load(sampled(grid)))
    assert analysis.coverage.params_total in (18 + 12, 18 + 12 + 1)  # a stored 2 is counted
    assert analysis.coverage.params_prunable == 18 + 12


def test_a_learnt_table_of_positions_is_a_parameter() -> None:
    analysis = analyse(load(sampled("g = Identity(t)", learnt=True)))
    assert analysis.coverage.params_total == 18 + 12 + 64


def test_a_scaled_weight_is_a_parameter_although_it_meets_an_elementwise_operator_first() -> None:
    """A kernel of the graph input's channels and the output's: nothing in it can go, and yet it was learnt."""
    model = from_text(
        """(float[2,3,4,4] x) => (float[2,2,4,4] y) {
            v = Mul(w, two)
            y = Conv(x, v)
        }""",
        w=(2, 3, 1, 1),
        two=(),
    )
    analysis = analyse(load(model))
    assert (analysis.coverage.params_total, analysis.coverage.params_prunable) == (6 + 1, 0)
