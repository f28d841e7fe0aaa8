"""Rows of results: computed once, failures again."""

from __future__ import annotations

from pathlib import Path

import pytest
from _paper_runs import Rows

from onnxprune import UsageError


def test_a_row_is_computed_once(tmp_path: Path) -> None:
    calls = []

    def work() -> dict[str, object]:
        calls.append(1)
        return {"top1": 0.5}

    key = {"method": "tpp", "ratio": 0.5, "set": {"a": (1, 2)}}
    first = Rows(tmp_path / "rows.jsonl").once(key, work)
    again = Rows(tmp_path / "rows.jsonl").once(key, work)
    assert first["top1"] == again["top1"] == 0.5
    assert len(calls) == 1
    Rows(tmp_path / "rows.jsonl").once({**key, "ratio": 0.25}, work)
    assert len(calls) == 2


def test_a_failure_is_a_row_and_is_tried_again(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "rows.jsonl")

    def fails() -> dict[str, object]:
        raise UsageError("no such thing")

    assert "no such thing" in rows.once({"method": "x"}, fails)["failure"]
    assert rows.once({"method": "x"}, lambda: {"top1": 1.0})["top1"] == 1.0
    assert len(rows.all()) == 2


def test_other_errors_are_not_rows(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "rows.jsonl")
    with pytest.raises(ZeroDivisionError):
        rows.once({"method": "x"}, lambda: {"top1": 1 / 0})
    assert rows.all() == []
