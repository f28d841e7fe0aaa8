"""What the tools share: plain tables, readable numbers, JSON output, and a note on how busy the machine was."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["amount", "machine_note", "milliseconds", "print_table", "repeat", "verdict", "write_json"]

BELOW_TEXT = frozenset("0123456789-")


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> None:
    """A table of plain text: columns padded to their widest cell, numbers to the right."""
    cells = [[str(c) for c in row] for row in rows]
    widths = [max(len(header[k]), *(len(r[k]) for r in cells)) if cells else len(header[k]) for k in range(len(header))]
    right = [all(not r[k] or r[k][0] in BELOW_TEXT for r in cells) for k in range(len(header))]
    if title:
        print(f"\n{title}")
    for row in [list(header), ["-" * w for w in widths], *cells]:
        print("  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)).rstrip())


def amount(number: float, unit: str = "") -> str:
    """1234567 as '1.23 M'."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g} {prefix}{unit}"
    return f"{number:.3g} {unit}".strip()


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds with three figures or so."""
    ms = seconds * 1e3
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"


def verdict(value: float | None, limit: float, *, at_least: bool = False) -> str:
    """Whether a figure meets its target."""
    if value is None:
        return "not measured"
    return "met" if (value >= limit if at_least else value <= limit) else "MISSED"


def repeat(work: Callable[[], Any], runs: int) -> list[float]:
    """Seconds of each of `runs` calls."""
    taken = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return taken


def median(values: Sequence[float]) -> float | None:
    """The median; None of nothing."""
    return statistics.median(values) if values else None


def machine_note() -> str:
    """Cores and load: what a reader needs to judge a wall time."""
    try:
        load = f"{os.getloadavg()[0]:.1f}"
    except OSError:
        load = "unknown"
    return f"{len(os.sched_getaffinity(0))} cores, load average {load} at the start"


def write_json(path: Path | None, document: Any) -> None:
    """The figures as JSON, where asked for."""
    if path is not None:
        path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")
