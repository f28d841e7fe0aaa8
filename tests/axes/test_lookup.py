"""A table that is read at constant positions: what is read stays, what nothing reads may go."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxprune.axes.analysis import Analysis, analyse
from onnxprune.model.load import load
from onnxprune.model.save import to_proto, write
from onnxprune.rewrite.rewrite import rewrite
from onnxprune.select.plan import Plan
from onnxprune.verify.equivalence import prove
from tests.graphs import from_text

POSITIONS = """(float[N,4,8] x) => (float[N,4,8] y) {
    p = Gather(table, positions)
    y = Add(x, p)
}"""


def model(positions: list[list[int]], rows: int = 16) -> onnx.ModelProto:
    """Position embeddings, looked up with a leading batch axis of 1 as BERT does."""
    return from_text(POSITIONS, table=(rows, 8), positions=np.array(positions))


def pruned(analysis: Analysis, path: Path) -> onnx.ModelProto:
    """All but the last unit of every group go."""
    plan = Plan({g.id: np.array([g.size - 1]) for g in analysis.groups})
    result = rewrite(analysis, plan)
    write(result, path)
    assert prove(analysis, plan, path).max_rel_error < 1e-6
    return to_proto(result)


@pytest.mark.parametrize(
    ("positions", "unread"),
    [
        ([[0, 1, 2, 3]], [12]),
        ([[2, 3, 4, 5]], [2, 10]),
        ([[9, 1, 1, 8]], [6, 6]),
        ([[0, -1, 0, 0]], [14]),
    ],
)
def test_rows_that_no_constant_index_reads_may_go(
    tmp_path: Path, positions: list[list[int]], unread: list[int]
) -> None:
    original = model(positions)
    analysis = analyse(load(original))
    assert [(g.size, g.kind) for g in analysis.groups] == [(n, "exact") for n in unread]
    after = {t.name: numpy_helper.to_array(t) for t in pruned(analysis, tmp_path / "p.onnx").graph.initializer}
    before = {t.name: numpy_helper.to_array(t) for t in original.graph.initializer}
    assert len(after["table"]) == 16 - sum(unread) + len(unread)
    assert after["positions"].shape == (1, 4), "the indices keep their shape"
    assert np.array_equal(after["table"][after["positions"]], before["table"][before["positions"]])


def test_a_table_that_is_read_as_a_whole_stays(tmp_path: Path) -> None:
    assert not analyse(load(model([[3, 1, 2, 0]], rows=4))).groups


def test_a_table_read_at_positions_that_vary_stays() -> None:
    """The table is cut to the length of the sequence, which is dynamic: every row may be read."""
    found = from_text(
        """(float[N,T,8] x) => (float[N,T,8] y) {
            s = Shape(x)
            t = Gather(s, one)
            r = Range(zero, t, one)
            r2 = Unsqueeze(r, axis)
            p = Gather(table, r2)
            y = Add(x, p)
        }""",
        table=(16, 8),
        one=np.array(1),
        zero=np.array(0),
        axis=np.array([0]),
    )
    assert not analyse(load(found)).groups


def test_a_table_that_is_also_read_elsewhere_keeps_what_is_read_there(tmp_path: Path) -> None:
    """Rows 0 to 3 are read by one look-up, rows 6 and 7 by the other."""
    both = from_text(
        """(float[N,4,8] x) => (float[N,4,8] y) {
            p = Gather(table, first)
            q = Gather(table, second)
            s = Add(p, q)
            y = Add(x, s)
        }""",
        table=(16, 8),
        first=np.array([[0, 1, 2, 3]]),
        second=np.array([[6, 7, 6, 7]]),
    )
    analysis = analyse(load(both))
    assert [g.size for g in analysis.groups] == [2, 8]
    after = {t.name: numpy_helper.to_array(t) for t in pruned(analysis, tmp_path / "p.onnx").graph.initializer}
    assert after["table"].shape == (4 + 1 + 2 + 1, 8)
    assert after["second"].tolist() == [[5, 6, 5, 6]]


def test_looked_up_queries_and_unread_rows_go_at_once(tmp_path: Path) -> None:
    """Indices of rank 2 lose a row of their own while the table loses what nobody reads."""
    found = from_text(
        """(float[N,3,8] x) => (float[N,5] y) {
            e = Gather(table, which)
            f = Reshape(e, flat)
            m = MatMul(x, u)
            t = Transpose<perm=[0,2,1]>(m)
            a = Add(t, bias)
            b = MatMul(f, a)
            c = ReduceSum<keepdims=0>(b, last)
            r = Reshape(c, rows)
            y = MatMul(r, w)
        }""",
        table=(9, 2),
        which=np.array([[1, 2], [3, 1], [2, 2], [5, 1]]),
        flat=np.array([4, 4]),
        u=(8, 4),
        bias=(4, 1),
        last=np.array([2]),
        rows=np.array([-1, 4]),
        w=(4, 5),
    )
    analysis = analyse(load(found))
    pruned(analysis, tmp_path / "p.onnx")
    assert {g.members[0].initializer for g in analysis.groups} >= {"table"}
