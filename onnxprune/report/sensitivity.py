"""What groups cost, as a table."""

from __future__ import annotations

from onnxprune.axes.analysis import Analysis
from onnxprune.report.terminal import first_member
from onnxprune.report.text import capped, more, table
from onnxprune.sensitivity import Sensitivity

__all__ = ["sensitivity_table"]

ROWS = 40


def sensitivity_table(analysis: Analysis, found: Sensitivity, *, verbose: bool = False) -> str:
    """A row per group, the dearest first: loss and metric with more and more of its units gone."""
    groups = {g.id: g for g in analysis.groups}
    ordered = sorted(found.curves, key=lambda gid: -found.curves[gid].loss[len(found.curves[gid].loss) // 2])
    most = max((len(c.loss) - 1 for c in found.curves.values()), default=0)
    rows = []
    shown, left = capped(ordered, ROWS, verbose=verbose)
    for gid in shown:
        curve, size = found.curves[gid], groups[gid].size
        cells = [
            f"{n / size:.0%}: {loss:.3g} ({metric:.3g})"
            for n, loss, metric in list(zip(curve.removed, curve.loss, curve.metric, strict=True))[1:]
        ]
        rows.append([gid, str(size), first_member(groups[gid]), *cells, *[""] * (most - len(cells))])
    head = ["group", "units", "first member", *(["gone: loss (metric)"] if most else []), *[""] * (most - 1)]
    text = table(head, rows, widths=(6, 6, 32, *[24] * most), right={1}) + more(left, "groups")
    note = f"{found.metric} of the original: {found.before:.4g}; on {found.samples} samples, units in the order of"
    return f"{text}\n{note} '{found.importance}', {found.seconds:.1f} s"
