"""What a program reads: JSON documents with a version.

`schema-1.json` beside this file describes them. Within a version fields are only added, never renamed or given another
meaning. Sizes are in bytes, times in seconds unless the name says `ms`, and a figure that is not finite is null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxprune.axes.analysis import Analysis, Group
    from onnxprune.result import Latency, LatencyStats, ModelSummary, Result, Verification
    from onnxprune.verify.latency import Bench

__all__ = [
    "SCHEMA",
    "bench_document",
    "compress_document",
    "head",
    "inspect_document",
    "model_document",
    "to_json",
    "verify_document",
]

SCHEMA = 1

Document = dict[str, Any]


def inspect_document(summary: ModelSummary, analysis: Analysis, *, timing: Mapping[str, float]) -> Document:
    """The model, how much of it is prunable, every group and every barrier."""
    return {
        **head("inspect"),
        "model": model_document(summary),
        "coverage": _coverage(analysis),
        "groups": [_group(group) for group in analysis.groups],
        "barriers": [
            {"node": b.barrier.node, "op_type": b.barrier.op_type, "reason": b.barrier.reason, "params": b.params}
            for b in analysis.barriers
        ],
        "timing": dict(timing),
    }


def compress_document(result: Result) -> Document:
    """The outcome of `compress`; parts that there are none of, such as `latency` or `training`, are null."""
    target, plan = result.target, result.plan.keep
    return {
        **head("compress"),
        "before": model_document(result.before),
        "after": model_document(result.after) if result.after is not None else None,
        "target": {
            "metric": target.metric,
            "spec": target.spec,
            "wanted": target.wanted,
            "reached": target.reached,
            "met": target.met,
        },
        "coverage": _coverage(result.analysis),
        "plan": [
            {"id": g.id, "size": g.size, "kept": len(plan[g.id]) if g.id in plan else g.size}
            for g in result.analysis.groups
        ],
        "verification": _verification(result.verification) if result.verification is not None else None,
        "ranking": result.ranking,
        "latency": _latency(result.latency) if result.latency is not None else None,
        "sparsified": asdict(result.sparsified) if result.sparsified is not None else None,
        "repair": asdict(result.repair) if result.repair is not None else None,
        "training": asdict(result.training) if result.training is not None else None,
        "accuracy": asdict(result.accuracy) if result.accuracy is not None else None,
        "timing": dict(result.timing),
        "warnings": list(result.warnings),
        "output": result.output,
    }


def verify_document(original: str, pruned: str, verification: Verification) -> Document:
    """The proof of a pruned model against its original."""
    return {**head("verify"), "original": original, "pruned": pruned, "verification": _verification(verification)}


def bench_document(names: Sequence[str], bench: Bench) -> Document:
    """Latencies, in the order in which the models were given; each compared with the first."""
    rows = []
    for k, (name, row) in enumerate(zip(names, bench.rows, strict=True)):
        against = None
        if k:
            latency = bench.against_first(k)
            against = {"speedup": latency.speedup, "significant": latency.significant}
        rows.append({"model": name, **_stats(row), "against_first": against})
    return {
        **head("bench"),
        "threads": bench.threads,
        "optimisation": bench.optimisation,
        "runtime": bench.runtime,
        "models": rows,
    }


def to_json(document: Document) -> str:
    """The document as text."""
    return json.dumps(_finite(document), indent=2, ensure_ascii=False, allow_nan=False)


def head(command: str) -> Document:
    """What every document begins with."""
    return {"schema": SCHEMA, "command": command}


def model_document(summary: ModelSummary) -> Document:
    """A model in numbers."""
    ports = {
        kind: [{"name": name, "type": dtype, "shape": shape} for name, dtype, shape in found]
        for kind, found in (("inputs", summary.inputs), ("outputs", summary.outputs))
    }
    return {
        "name": summary.name,
        "params": summary.params,
        "macs": summary.macs,
        "bytes": summary.bytes,
        "opset": summary.opset,
        "ir_version": summary.ir_version,
        "producer": summary.producer,
        **ports,
    }


def _coverage(analysis: Analysis) -> Document:
    c = analysis.coverage
    exact = c.params_exact / c.params_total if c.params_total else 0.0
    return {
        "params_total": c.params_total,
        "params_prunable": c.params_prunable,
        "fraction": c.fraction,
        "params_exact": c.params_exact,
        "fraction_exact": exact,
    }


def _group(group: Group) -> Document:
    """A group and its members. A member that only follows (a variance, a divisor) is removed with the unit like one
    that produces it, but is not zero in the masked original."""
    members = [
        {
            "initializer": m.initializer,
            "axis": m.axis,
            "role": "consumes" if m.role == "consumes" else "produces",
            "zeroed": m.zeroed,
        }
        for m in group.members
    ]
    return {
        "id": group.id,
        "size": group.size,
        "kind": group.kind,
        "reason": group.reason,
        "params": group.params,
        "members": members,
    }


def _verification(v: Verification) -> Document:
    return {
        "passed": v.passed,
        "max_abs_error": v.max_abs_error,
        "max_rel_error": v.max_rel_error,
        "tolerance": v.tolerance,
        "input_sets": v.input_sets,
        "shapes": [{name: list(shape) for name, shape in shapes.items()} for shapes in v.shapes],
        "notes": list(v.notes),
    }


def _latency(latency: Latency) -> Document:
    return {
        "before_ms": latency.before.median_ms,
        "after_ms": latency.after.median_ms,
        "significant": latency.significant,
        "speedup": latency.speedup,
        "threads": latency.threads,
        "optimisation": latency.optimisation,
        "before": _stats(latency.before),
        "after": _stats(latency.after),
    }


def _stats(stats: LatencyStats) -> Document:
    kernels = stats.nchwc_kernels if stats.nchwc_kernels >= 0 else None
    return {
        "min_ms": stats.min_ms,
        "median_ms": stats.median_ms,
        "p90_ms": stats.p90_ms,
        "runs": stats.runs,
        "nchwc_kernels": kernels,
        "disturbed": stats.disturbed,
    }


def _finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity, and nothing of numpy's numbers."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
