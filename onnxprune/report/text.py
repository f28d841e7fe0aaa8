"""Pieces of what a person reads: tables, numbers with units, and text that fits."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TypeVar

__all__ = [
    "Row",
    "ascii_only",
    "bytes_text",
    "capped",
    "change",
    "count_text",
    "cut",
    "more",
    "ms",
    "one_line",
    "percent",
    "power",
    "share",
    "table",
]

Row = Sequence[str]
T = TypeVar("T")


def table(head: Row, rows: Sequence[Row], *, widths: Sequence[int], right: Collection[int] = ()) -> str:
    """A framed table. widths: the most that each column may take; right: columns that are aligned to the right."""
    cells = [[cut(one_line(cell), width) for cell, width in zip(row, widths, strict=False)] for row in (head, *rows)]
    wide = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = "+" + "+".join("-" * (w + 2) for w in wide) + "+"

    def line(row: Row, aligned: Collection[int]) -> str:
        padded = (c.rjust(w) if k in aligned else c.ljust(w) for k, (c, w) in enumerate(zip(row, wide, strict=True)))
        return "| " + " | ".join(padded) + " |"

    return "\n".join([rule, line(cells[0], ()), rule, *(line(row, right) for row in cells[1:]), rule])


def capped(rows: Sequence[T], limit: int, *, verbose: bool) -> tuple[Sequence[T], int]:
    """The rows to show, and how many are left out. One row too many is shown: a line saying so is no shorter."""
    if verbose or len(rows) <= limit + 1:
        return rows, 0
    return rows[:limit], len(rows) - limit


def more(left: int, what: str) -> str:
    return f"\n… and {left} more {what}; -v lists all" if left else ""


def one_line(text: str) -> str:
    """Names come from the model's file: no line breaks, no control characters."""
    return "".join(c if c.isprintable() else "?" for c in text)


def cut(text: str, width: int) -> str:
    """At most `width` characters; the middle goes, since names differ at both ends."""
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return text[: width - 1 - tail] + "…" + text[len(text) - tail :]


def count_text(n: float) -> str:
    """1234567 as `1.23 M`."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= limit * 0.99995:
            return f"{_three(n / limit)} {unit}"
    return f"{n:.0f}"


def bytes_text(n: float) -> str:
    """Bytes as `46.7 MB`, in steps of 1000, as `--target size=5MB` counts them."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n >= limit * 0.9995:
            return f"{n / limit:.1f} {unit}"
    return f"{n:.0f} B"


def _three(x: float) -> str:
    """Two decimals below 100, one above, as in `11.68` and `512.3`."""
    return f"{x:.2f}" if x < 99.995 else f"{x:.1f}"


def ms(x: float) -> str:
    return f"{x:.3f}" if x < 1 else f"{x:.2f}" if x < 100 else f"{x:.0f}"


def share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def percent(fraction: float) -> str:
    """`49.8 %`; never `100.0 %` for less than everything, nor `0.0 %` for more than nothing."""
    shown = round(fraction * 100, 1) + 0.0
    if shown >= 100 > fraction * 100:
        shown = 99.9
    if shown == 0 and fraction > 0:
        return "<0.1 %"
    return f"{shown:.1f} %".replace("-", "−")


def change(before: float, after: float) -> str:
    """`−49.8 %`, or `same`."""
    if before == after or not before:
        return "same"
    share = abs(after - before) / before
    return "about same" if share < 0.0005 else ("−" if after < before else "+") + percent(share)


def power(x: float) -> str:
    """`2.1e-6`, `0` for zero."""
    if not x:
        return "0"
    mantissa, mark, exponent = f"{x:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if mark else mantissa


_ASCII = str.maketrans({"−": "-", "–": "-", "×": "x", "…": "~"})


def ascii_only(text: str) -> str:
    """The same text for a terminal that can't show more than ASCII; the layout stays."""
    return text.translate(_ASCII).encode("ascii", "replace").decode()
