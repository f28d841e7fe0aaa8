"""The latency table: what it keeps, and what it does with files that are not as they should be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from onnxprune.latency import table
from onnxprune.latency.table import Table, cache_folder


def test_what_was_measured_is_known_in_the_next_run(tmp_path: Path) -> None:
    Table(1, tmp_path).add({"Conv": 12.5})
    assert Table(1, tmp_path).get("Conv") == 12.5
    assert Table(1, tmp_path).get("Gemm") is None


def test_nothing_but_the_file_is_left(tmp_path: Path) -> None:
    kept = Table(1, tmp_path / "new" / "folder")
    kept.add({"Conv": 12.5})
    assert list((tmp_path / "new" / "folder").iterdir()) == [kept.path]


def test_other_threads_another_version_and_another_machine_are_other_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    Table(1, tmp_path).add({"Conv": 12.5})
    assert Table(2, tmp_path).get("Conv") is None
    with monkeypatch.context() as changed:
        changed.setattr(onnxruntime, "__version__", "0.0.1")
        assert Table(1, tmp_path).get("Conv") is None
    with monkeypatch.context() as changed:
        changed.setattr(table, "machine", lambda: "another")
        assert Table(1, tmp_path).get("Conv") is None
    assert Table(1, tmp_path).get("Conv") == 12.5


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[]", b"null", b'{"schema": 1}', b'{"microseconds": {"Conv": 1}}'],
    ids=["empty", "cut off", "no text", "a list", "null", "a head only", "no head"],
)
def test_a_file_that_is_none_of_ours_is_measured_anew_and_replaced(tmp_path: Path, content: bytes) -> None:
    path = Table(1, tmp_path).path
    assert path is not None
    path.write_bytes(content)
    again = Table(1, tmp_path)
    assert again.microseconds == {}
    again.add({"Conv": 3.0})
    assert Table(1, tmp_path).microseconds == {"Conv": 3.0}


def test_times_that_make_no_sense_are_left_out(tmp_path: Path) -> None:
    known = Table(1, tmp_path)
    known.add({"Conv": 3.0})
    assert known.path is not None
    document = json.loads(known.path.read_text())
    document["microseconds"] |= {"negative": -1.0, "none": 0, "infinite": float("inf"), "nan": float("nan")}
    known.path.write_text(json.dumps(document))
    assert Table(1, tmp_path).microseconds == {"Conv": 3.0}


def test_two_runs_at_a_time_lose_nothing(tmp_path: Path) -> None:
    one, other = Table(1, tmp_path), Table(1, tmp_path)
    one.add({"Conv": 1.0})
    other.add({"Gemm": 2.0})
    assert Table(1, tmp_path).microseconds == {"Conv": 1.0, "Gemm": 2.0}


def test_a_folder_that_can_not_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    blocked = Table(1, tmp_path / "file" / "below")
    blocked.add({"Conv": 1.0})
    assert blocked.get("Conv") == 1.0


def test_without_a_folder_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kept = Table(1, None)
    kept.add({"Conv": 1.0})
    assert kept.get("Conv") == 1.0 and list(tmp_path.iterdir()) == []


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONNXPRUNE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "onnxprune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "onnxprune"
    monkeypatch.setenv("ONNXPRUNE_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.setenv("ONNXPRUNE_CACHE", "")
    assert cache_folder() is None
