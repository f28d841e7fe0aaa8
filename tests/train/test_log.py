"""Rows of a run: in files, on a terminal, over a restart."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

from onnxprune.errors import UsageError
from onnxprune.train.log import LogFile, ProgressLine, Row
from tests.train.runs import run, settings

ROW = Row(
    step=30, steps=120, epoch=1, seconds=12.3456, loss=0.51237, lr=0.01, samples_per_s=812.345, eta_s=95.2, sparsity=0.25
)  # fmt: skip


def test_a_line_says_how_far_and_how_fast() -> None:
    assert ROW.line() == "step 30/120  loss 0.5124  sparsity 25.0%  812.3 samples/s  ETA 1:35"
    assert replace(ROW, metric=0.913, steps=None, eta_s=7265.0).line() == (
        "step 30  loss 0.5124  metric 0.913  sparsity 25.0%  812.3 samples/s  ETA 2:01:05"
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_line_is_written_over() -> None:
    stream = Terminal()
    line = ProgressLine(stream)
    line(ROW)
    line._last = 0.0
    line(replace(ROW, loss=0.5, sparsity=None))
    line.close()
    first, second = stream.getvalue().split("\r")[1:]
    assert second.endswith("\n") and len(second.rstrip("\n")) >= len(first)


def test_elsewhere_lines_are_few_and_the_last_is_there() -> None:
    stream = io.StringIO()
    line = ProgressLine(stream)
    for step in range(1, 121):
        line(replace(ROW, step=step))
    assert [text.split()[1] for text in stream.getvalue().splitlines()] == ["1/120", "120/120"]


def test_csv_and_jsonl_hold_the_same_numbers(tmp_path: Path) -> None:
    for name in ("log.csv", "log.jsonl"):
        log = LogFile(tmp_path / name)
        log(replace(ROW, more={"lambda": 0.5}))
        log.close()
    (row,) = csv.DictReader((tmp_path / "log.csv").read_text().splitlines())
    (line,) = [json.loads(text) for text in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert row["step"] == "30" and float(row["loss"]) == 0.51237 and row["metric"] == "" and row["seconds"] == "12.346"
    assert line == {"step": 30, "epoch": 1, "seconds": 12.346, "loss": 0.51237, "lr": 0.01, "samples_per_s": 812.35,
                    "eta_s": 95.2, "sparsity": 0.25, "lambda": 0.5}  # fmt: skip


@pytest.mark.parametrize("name", ["log.csv", "log.jsonl"])
def test_a_log_goes_on_at_the_step_of_the_checkpoint(tmp_path: Path, name: str) -> None:
    log = LogFile(tmp_path / name)
    for step in (10, 20, 30):
        log(replace(ROW, step=step))
    log.close()
    with open(tmp_path / name, "a") as file:
        file.write("40,1" if name == "log.csv" else '{"step": 4')  # what a killed process leaves
    log = LogFile(tmp_path / name, step=20)
    log(replace(ROW, step=30))
    log.close()
    text = (tmp_path / name).read_text().splitlines()
    if name == "log.csv":
        assert [line.split(",")[0] for line in text] == ["step", "10", "20", "30"]
    else:
        assert [json.loads(line)["step"] for line in text] == [10, 20, 30]


def test_a_log_can_only_be_csv_or_jsonl_and_where_there_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="suffix"):
        settings(log_file=tmp_path / "log.txt")
    with pytest.raises(UsageError, match="can't be written"):
        LogFile(tmp_path / "nowhere" / "log.csv")


def test_a_run_writes_its_losses(tmp_path: Path) -> None:
    lines: list[Row] = []
    _, result = run(steps=20, log_file=tmp_path / "log.jsonl", log_every=5, progress=lines.append)
    rows = [json.loads(text) for text in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [5, 10, 15, 20]
    assert sum(row["loss"] for row in rows) / 4 == pytest.approx(result.last_loss, rel=1e-6)
    assert lines[0].step == 1 and lines[-1].step == 20 and lines[0].loss == pytest.approx(result.first_loss)
