"""A plan that the clock decided, kept with the run that trains it.

Measured twice, a latency gives two plans; a run that was killed and goes on must go on with the one that it began with.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from onnxprune.axes.analysis import Analysis
from onnxprune.errors import ModelRejected, UsageError
from onnxprune.latency.search import Reached
from onnxprune.result import Latency, LatencyStats, TargetOutcome
from onnxprune.select.choose import Choice
from onnxprune.select.plan import plan_from_text, plan_to_text
from onnxprune.select.target import Target

__all__ = ["NAME", "reached_once"]

NAME = "latency-plan.json"


def reached_once(
    reach: Callable[[], Reached],
    analysis: Analysis,
    target: Target,
    *,
    run_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
) -> Reached:
    """What `reach` finds, kept in a run directory; where the run goes on, what it found there.

    Raises UsageError in one of several processes, which would not agree on a plan; and what `reach` raises.
    """
    if int(os.environ.get("WORLD_SIZE", "1") or 1) > 1:
        raise UsageError(
            f"target {target.text} is planned by the clock of one process, and this is one of several",
            "find out what it takes with --dry-run in one process, and ask for that with macs= here",
        )
    if run_dir is None:
        return reach()
    path = Path(run_dir, NAME)
    known = _read(path, analysis, target) if resume else None
    if known is None:
        known = reach()
        _keep(path, analysis, known)
    return known


def _read(path: Path, analysis: Analysis, target: Target) -> Reached | None:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        outcome = TargetOutcome(**stored["target"])
        if outcome.spec != target.text:
            return None
        times = stored["latency"]
        before, after = (LatencyStats(**times.pop(name)) for name in ("before", "after"))
        plan = plan_from_text(stored["plan"], analysis)
        return Reached(Choice(plan, outcome, stored["align"], stored["least"]), Latency(before, after, **times), ())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ModelRejected):
        return None


def _keep(path: Path, analysis: Analysis, found: Reached) -> None:
    choice = found.choice
    document = {
        "target": asdict(choice.outcome),
        "align": choice.align,
        "least": choice.least,
        "plan": plan_to_text(choice.plan, analysis),
        "latency": asdict(found.latency),
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(document), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise UsageError(f"{path} can't be written: {error.strerror or error}") from None
