"""What a person reads in a terminal: functions from values to text, none of which prints.

Every cell has a width limit, so that a model with long names or a hundred inputs still makes a table that fits; the
JSON documents (see `document`) are where nothing is cut.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from onnxprune.report.text import (
    ascii_only,
    bytes_text,
    capped,
    change,
    count_text,
    cut,
    more,
    ms,
    one_line,
    percent,
    power,
    share,
    table,
)

if TYPE_CHECKING:
    from onnxprune.axes.analysis import Analysis, Group
    from onnxprune.result import (
        Accuracy,
        Latency,
        LatencyStats,
        ModelSummary,
        Repair,
        Result,
        Sparsified,
        Training,
        Verification,
    )
    from onnxprune.verify.latency import Bench

__all__ = [
    "ascii_only",
    "bench_table",
    "bytes_text",
    "compress_report",
    "count_text",
    "first_member",
    "inspect_report",
    "summary_table",
    "verify_line",
]

ROWS = 20  # of a table, unless asked for more
PORTS = 8  # inputs, and outputs, unless asked for more

Port = tuple[str, str, str]  # name, type, shape


def compress_report(result: Result, *, verbose: bool = False, unrepaired: bool = False) -> str:
    """The whole report of `compress`: table, target, verification, latency. Warnings are the caller's.

    unrepaired: whether to say what a repair would want, where there was none.
    """
    parts = [summary_table(result, verbose=verbose), _target_line(result)]
    if " on " in result.ranking:
        parts.append(f"ranked by: {result.ranking}")
    if result.verification is not None:
        parts.append(verify_line(result.verification))
    if result.sparsified is not None:
        parts.append(_method_line(result.sparsified, result.training))
    if result.repair is not None:
        parts.append(_repair_line(result.repair))
    elif unrepaired and result.after is not None:
        parts.append(_unrepaired_line(result))
    if result.training is not None:
        parts.append(_training_line(result.training))
    if result.latency is not None:
        parts.append(_latency_line(result.latency))
    if result.output is not None:
        parts.append(f"written: {result.output}")
    elif result.after is None:
        parts.append("dry run: nothing was written")
    if verbose:
        parts += ["", _plan_table(result)]
        parts += [_family_table(result.sparsified)] if result.sparsified is not None else []
        parts += [_consumer_table(result.repair)] if result.repair is not None else []
        parts += [_timing_line(result.timing)]
    return "\n".join(parts)


def summary_table(result: Result, *, verbose: bool = False) -> str:
    """Before, after and change, a row each. After a dry run the column holds what is planned."""
    before, after = result.before, result.after
    name = "planned" if after is None else os.path.basename(result.output or "") or after.name
    rows = [["Opset / IR", *_same(_versions(before), None if after is None else _versions(after))]]
    rows += _port_rows("IN ", before.inputs, None if after is None else after.inputs, verbose=verbose)
    rows += _port_rows("OUT", before.outputs, None if after is None else after.outputs, verbose=verbose)
    rows += [_cost_row(result, "Params / size"), _cost_row(result, "MACs (batch 1)")]
    if result.latency is not None:
        rows.append(_latency_row(result.latency))
    if result.accuracy is not None:
        rows += _accuracy_rows(result.accuracy)
    aligned, channels, aligned_after, channels_after = result.aligned
    if channels:
        block = f" (block {result.align})" if result.align > 1 else ""
        rows.append(["Aligned channels", f"{aligned}/{channels}{block}", f"{aligned_after}/{channels_after}", ""])
    rows.append(["Groups pruned", "–", _groups_pruned(result), ""])
    return table(["", os.path.basename(before.name), name, "change"], rows, widths=(22, 28, 28, 12))


def verify_line(verification: Verification) -> str:
    """One line, and one more for every note."""
    v = verification
    sets = f"{v.input_sets} input set{'s' * (v.input_sets != 1)}"
    outcome = "passed" if v.passed else "FAILED"
    limit = "" if v.passed else f", tolerance {power(v.tolerance)}"
    line = (
        f"verify: {outcome} (onnxruntime, {sets}, max relative error {power(v.max_rel_error)} "
        f"against the masked original{limit})"
    )
    return "\n".join([line, *(f"        {note}" for note in v.notes)])


def _accuracy_rows(a: Accuracy) -> list[list[str]]:
    """The metric before and after; right after the surgery too, where something came after it."""

    def shown(value: float) -> str:
        return f"{value:.2%}" if a.is_fraction else f"{value:.4g}"

    gained = a.after - a.before
    lost = f"{gained * 100:+.1f} pp" if a.is_fraction else f"{gained:+.3g}"
    rows = [["Accuracy", f"{a.metric} {shown(a.before)}", shown(a.after), lost.replace("-", "−")]]
    steps = {"  after removal": a.pruned, "  after repair": a.repaired}
    rows += [[label, "", shown(value), ""] for label, value in steps.items() if value is not None]
    return rows


def _method_line(s: Sparsified, training: Training | None) -> str:
    """What a method in training did to the whole network, and that removing its zero units changed nothing."""
    of = f" of {training.steps}" if training is not None else ""
    proof = "" if s.max_rel_error is None else f", removed at a relative error of {power(s.max_rel_error)}"
    return f"method: {s.method}, {s.steps}{of} steps on the whole network, {s.zero} of {s.units} units zero{proof}"


def _unrepaired_line(result: Result) -> str:
    from onnxprune.repairs import has_statistics

    without = ""
    if has_statistics(result.analysis.graph, result.analysis.registry):
        without = "; without any: --calibrate bn"
    return f"repair: none, for there is no data (--data FEW.npz wins accuracy back, no labels needed{without})"


def _repair_line(r: Repair) -> str:
    """What was solved for, on what, and whether it helped."""
    changed = sum(c["mode"] != "none" for c in r.consumers)
    of = changed + sum(c["mode"] == "none" for c in r.consumers) + len(r.left)
    if not r.samples:
        return "repair: nothing lies behind the surgery that could be solved for"
    on = f"{r.samples} samples of {r.data}" if "random" not in r.data else f"{r.samples} {r.data}"
    judged = f"output error {r.before:.3g} to {r.after:.3g} of the variance on {r.held_out} of them, held out"
    if r.dropped:
        return f"repair: {r.mode} was no better and is left out ({on}, {judged})"
    return f"repair: {r.mode}, {changed} of {of} layers in {r.seconds:.1f} s on {on}\n        {judged}"


def _consumer_table(r: Repair) -> str:
    """A row per layer behind the surgery."""
    rows = [
        [cut(c["label"], 36), c["op"], c["mode"], f"{c['before']:.3g}", f"{c['after']:.3g}", str(c["columns"])]
        for c in r.consumers
    ]
    rows += [[cut(c["label"], 36), c["op"], cut(c["reason"], 48), "", "", ""] for c in r.left]
    head = ["layer", "operator", "repair", "error", "repaired", "inputs"]
    return table(head, rows, widths=(36, 16, 48, 10, 10, 8), right={3, 4, 5})


def _family_table(s: Sparsified) -> str:
    """A row per family."""

    def norm(value: float) -> str:
        return f"{value:.3g}" if value == value else "–"

    angles = list(dict.fromkeys(name for f in s.families for name in f["angles"]))
    rows = [
        [
            f["family"],
            str(f["units"]),
            str(f["left"]),
            percent(f["sparsity"]),
            norm(f["smallest_kept"]),
            norm(f["largest_redundant"]),
            *(norm(f["angles"].get(name, float("nan"))) for name in angles),
        ]
        for f in s.families
    ]
    head = ["group", "units", "left", "zero", "least norm kept", "largest norm gone", *angles]
    return table(head, rows, widths=(8, 8, 8, 8, 16, 18, *[16] * len(angles)), right=set(range(1, len(head))))


def _training_line(t: Training) -> str:
    """What was trained on what, for how long, and whether the file is what was trained."""
    resumed = f", continued at step {t.resumed_from}" if t.resumed_from else ""
    inserted = f", {t.batchnorms_inserted} BatchNorms put in and folded again" if t.batchnorms_inserted else ""
    error = t.mirror_error_after if t.mirror_error_after is not None else t.mirror_error_before
    return (
        f"trained: {t.steps} steps in {t.seconds:.0f} s on {t.data}, loss '{t.loss}' {t.first_loss:.3g} to "
        f"{t.last_loss:.3g}{resumed}{inserted}\n"
        f"        the trained network equals the file in onnxruntime: relative error {power(error)}"
    )


def inspect_report(summary: ModelSummary, analysis: Analysis, *, verbose: bool = False) -> str:
    """The model in numbers, what is prunable, the groups and what stands in the way of the rest."""
    s, c = summary, analysis.coverage
    made = f", made by {cut(s.producer, 60)}" if s.producer else ""
    figures = f"{count_text(s.params)} parameters, {count_text(s.macs)} MACs (batch 1), {bytes_text(s.bytes)}"
    lines = [f"{cut(os.path.basename(s.name), 40)}: {figures}", f"  opset {s.opset}, IR {s.ir_version}{made}"]
    for kind, ports in (("IN ", s.inputs), ("OUT", s.outputs)):
        shown, left = capped(ports, PORTS, verbose=verbose)
        lines += [f"  {kind} {cut(name, 30)}  {dtype} {cut(shape, 40)}" for name, dtype, shape in shown]
        lines += [f"  {kind} … and {left} more"] if left else []
    n = len(analysis.groups)
    exact = f", {percent(share(c.params_exact, c.params_total))} exactly" if c.params_exact < c.params_prunable else ""
    lines += ["", f"prunable: {percent(c.fraction)} of the parameters{exact}, in {n} group{'s' * (n != 1)}"]
    if analysis.groups:
        lines += ["", _group_table(analysis.groups, verbose=verbose)]
    if analysis.barriers:
        lost = count_text(sum(b.params for b in analysis.barriers))
        lines += ["", f"not prunable: {lost} parameters, by reason", _barrier_table(analysis, verbose=verbose)]
    return "\n".join(lines)


def bench_table(names: Sequence[str], bench: Bench) -> str:
    """A row per model; the last column compares it with the first."""
    rows = []
    for k, (name, row) in enumerate(zip(_told_apart(names), bench.rows, strict=True)):
        against = "–" if k == 0 else _speedup(bench.against_first(k))
        rows.append(
            [
                name,
                *(f"{ms(t)} ms" for t in (row.min_ms, row.median_ms, row.p90_ms)),
                str(row.runs),
                str(row.nchwc_kernels) if row.nchwc_kernels >= 0 else "?",
                against,
            ]
        )
    head = ["model", "min", "p50", "p90", "runs", "NCHWc", "against the first"]
    turns = ", in turns" if len(rows) > 1 else ""
    note = f"{bench.runtime}, {_threads(bench.threads)}, graph optimisation '{bench.optimisation}'{turns}"
    return table(head, rows, widths=(36, 12, 12, 12, 6, 6, 24), right={1, 2, 3, 4, 5}) + f"\n{note}"


def _versions(summary: ModelSummary) -> str:
    return f"{summary.opset} / {summary.ir_version}"


def _same(before: str, after: str | None) -> tuple[str, str, str]:
    """Before, after and whether they are the same."""
    return (before, "–", "") if after is None else (before, after, "same" if before == after else "changed")


def _port_rows(kind: str, before: Sequence[Port], after: Sequence[Port] | None, *, verbose: bool) -> list[list[str]]:
    """A row per input or output, the first few where there are many."""
    there = {name: _port(dtype, shape) for name, dtype, shape in after or ()}
    shown, left = capped(before, PORTS, verbose=verbose)
    rows = [
        [f"{kind} {name}", *_same(_port(dtype, shape), None if after is None else there.get(name, "missing"))]
        for name, dtype, shape in shown
    ]
    return rows + ([[f"{kind} … and {left} more", "", "", ""]] if left else [])


def _port(dtype: str, shape: str) -> str:
    return f"{dtype} {shape}"


def _cost_row(result: Result, label: str) -> list[str]:
    """Parameters and size, or MACs. A dry run knows only the figure that it was asked for, and says `about`."""
    metric = "params" if label.startswith("Params") else "macs"
    text = _params_and_size if metric == "params" else _macs
    before, after, target = result.before, result.after, result.target
    if after is not None:
        return [label, text(before), text(after), change(getattr(before, metric), getattr(after, metric))]
    if target.metric != metric:
        return [label, text(before), "–", ""]
    reached = getattr(before, metric) * target.reached
    return [label, text(before), f"about {count_text(reached)}", change(1.0, target.reached)]


def _params_and_size(summary: ModelSummary) -> str:
    return f"{count_text(summary.params)} / {bytes_text(summary.bytes)}"


def _macs(summary: ModelSummary) -> str:
    return count_text(summary.macs)


def _latency_row(latency: Latency) -> list[str]:
    faster = _speedup(latency) if latency.significant else "no change"
    return [f"Latency, {_threads(latency.threads)}", _spread(latency.before), _spread(latency.after), faster]


def _spread(stats: LatencyStats) -> str:
    """`min / p50 / p90 ms`."""
    return " / ".join(ms(t) for t in (stats.min_ms, stats.median_ms, stats.p90_ms)) + " ms"


def _groups_pruned(result: Result) -> str:
    """`12 of 14 (2: inexact)`."""
    whole = [g for g in result.analysis.groups if g.id not in result.plan.keep]
    pruned, total = len(result.analysis.groups) - len(whole), len(result.analysis.groups)
    reasons = Counter("inexact" if g.kind == "inexact" else "kept" for g in whole)
    left = ", ".join(f"{n}: {reason}" for reason, n in reasons.items())
    return f"{pruned} of {total}" + (f" ({left})" if left else "")


def _target_line(result: Result) -> str:
    t = result.target
    outcome = "met" if t.met else "NOT met"
    return (
        f"target: {t.spec} {outcome}, {percent(t.reached)} kept, {percent(1 - t.reached)} removed "
        f"(asked for {percent(t.wanted)} kept)"
    )


def _latency_line(latency: Latency) -> str:
    """How the table's row came about."""
    kernels = f"NCHWc kernels {_kernels(latency.before)} -> {_kernels(latency.after)}"
    disturbed = max(latency.before.disturbed, latency.after.disturbed)
    left_out = f", {disturbed} disturbed ones left out" if disturbed else ""
    return (
        f"latency: {_speedup(latency)} (min / median / p90 of {latency.before.runs} runs in turns{left_out}, "
        f"graph optimisation '{latency.optimisation}', {kernels})"
    )


def _kernels(stats: LatencyStats) -> str:
    return str(stats.nchwc_kernels) if stats.nchwc_kernels >= 0 else "?"


def _speedup(latency: Latency) -> str:
    """`1.52×`, with a word where that is within the noise."""
    return f"{latency.speedup:.2f}×" + ("" if latency.significant else ", not significant")


def _threads(n: int) -> str:
    return f"{n} thread{'s' * (n != 1)}"


def _timing_line(timing: Mapping[str, float]) -> str:
    return "time: " + ", ".join(f"{name.removesuffix('_s')} {seconds:.2f} s" for name, seconds in timing.items())


def _plan_table(result: Result) -> str:
    rows = []
    for group in result.analysis.groups:
        kept = len(result.plan.keep[group.id]) if group.id in result.plan.keep else group.size
        rows.append([group.id, str(group.size), str(kept), change(group.size, kept), first_member(group)])
    return table(["group", "units", "kept", "change", "made by"], rows, widths=(8, 8, 8, 10, 60), right={1, 2})


def _group_table(groups: Sequence[Group], *, verbose: bool) -> str:
    shown, left = capped(sorted(groups, key=lambda g: -g.params), ROWS, verbose=verbose)
    rows = [[g.id, str(g.size), count_text(g.params), g.kind, first_member(g)] for g in shown]
    head = ["group", "units", "params", "kind", "made by"]
    text = table(head, rows, widths=(8, 8, 9, 11, 60), right={1, 2})
    return text + more(left, "groups") + _reasons(shown)


def _reasons(groups: Sequence[Group]) -> str:
    """Why groups are not exact, in full below their table; groups that share a reason share its line."""
    by_reason: dict[str, list[str]] = {}
    for group in groups:
        if group.reason:
            by_reason.setdefault(group.reason, []).append(group.id)
    return "".join(f"\n{_list(ids)}: {one_line(reason)}" for reason, ids in by_reason.items())


def _list(ids: Sequence[str]) -> str:
    return ", ".join(ids[:6]) + (f" and {len(ids) - 6} more" if len(ids) > 6 else "")


def _told_apart(paths: Sequence[str]) -> Sequence[str]:
    """File names, or the paths where two files have the same name."""
    names = [os.path.basename(path) for path in paths]
    return names if len(set(names)) == len(names) else paths


def first_member(group: Group) -> str:
    """The parameter that makes the units, and in how many more they have a slice."""
    made = next((m.initializer for m in group.members if m.zeroed), group.members[0].initializer)
    others = len({m.initializer for m in group.members}) - 1
    beside = f" +{others}" if others else ""
    return cut(made, 60 - len(beside)) + beside


def _barrier_table(analysis: Analysis, *, verbose: bool) -> str:
    shown, left = capped(analysis.barriers, ROWS, verbose=verbose)
    total = analysis.coverage.params_total
    rows = [
        [count_text(b.params), percent(share(b.params, total)), b.barrier.op_type, b.barrier.node, b.barrier.reason]
        for b in shown
    ]
    head = ["params", "share", "operator", "node", "reason"]
    return table(head, rows, widths=(9, 8, 18, 28, 44), right={0, 1}) + more(left, "reasons")
