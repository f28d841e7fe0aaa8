"""A sweep, as a table and as a document."""

from __future__ import annotations

import os
from typing import Any

from onnxprune.report.document import compress_document, head, model_document
from onnxprune.report.text import bytes_text, change, count_text, table
from onnxprune.result import Result
from onnxprune.sweep import Sweep, SweepPoint

__all__ = ["sweep_document", "sweep_table"]


def sweep_table(found: Sweep) -> str:
    """A row per target; below it, what went wrong."""
    before = found.before
    judged = next((p.result.accuracy for p in found.points if p.result is not None and p.result.accuracy), None)
    first = ["original", count_text(before.macs), "", count_text(before.params), bytes_text(before.bytes), "", "", ""]
    if judged is not None:
        first[5] = _value(judged.before, judged.is_fraction)
    rows = [first, *(_row(p, before.macs) for p in found.points)]
    named = judged.metric if judged is not None else "metric"
    titles = ["target", "MACs", "change", "params", "size", named, "output error", "written"]
    text = table(titles, rows, widths=(16, 10, 10, 10, 10, 12, 20, 44), right={1, 2, 3, 4, 5})
    lines = [text]
    lines += [
        f"{p.target}: {p.error}" + (f" ({p.error.hint})" if p.error.hint else "") for p in found.points if p.error
    ]
    lines += [f"picture: {found.picture}"] if found.picture else []
    return "\n".join([*lines, *found.notes])


def sweep_document(found: Sweep) -> dict[str, Any]:
    """The curve: a document of `compress` per target, or the error."""
    return {
        **head("sweep"),
        "before": model_document(found.before),
        "points": [
            {
                "target": p.target,
                "result": None if p.result is None else compress_document(p.result),
                "error": None if p.error is None else {"message": str(p.error), "exit_code": p.error.exit_code},
            }
            for p in found.points
        ],
        "picture": found.picture,
        "notes": list(found.notes),
        "timing": dict(found.timing),
    }


def _row(point: SweepPoint, macs: int) -> list[str]:
    result = point.result
    if result is None:
        return [point.target, "–", "", "", "", "", "", "failed, see below"]
    after = result.after
    if after is None:
        return [point.target, "", change(1.0, result.target.reached), "", "", "", "", "planned"]
    cells = [count_text(after.macs), change(macs, after.macs), count_text(after.params), bytes_text(after.bytes)]
    value = "" if result.accuracy is None else _value(result.accuracy.after, result.accuracy.is_fraction)
    return [point.target, *cells, value, _repair(result), os.path.basename(result.output or "")]


def _repair(result: Result) -> str:
    """What is left of the error of the outputs."""
    r = result.repair
    if r is None or not r.samples:
        return ""
    return f"{r.before:.3g}, kept" if r.dropped else f"{r.before:.3g} to {r.after:.3g}"


def _value(value: float, is_fraction: bool) -> str:
    return f"{value:.2%}" if is_fraction else f"{value:.4g}"
