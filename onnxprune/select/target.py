"""Targets: how much of what is to remain."""

from __future__ import annotations

import re
from dataclasses import dataclass

from onnxprune.errors import UsageError

__all__ = ["METRICS", "Target", "parse_target"]

METRICS = ("macs", "params", "size", "channels", "latency")
_UNITS = {
    "": 1.0,
    "k": 1e3,
    "m": 1e6,
    "g": 1e9,
    "t": 1e12,
    "kb": 1e3,
    "mb": 1e6,
    "gb": 1e9,
    "kib": 2.0**10,
    "mib": 2.0**20,
    "gib": 2.0**30,
}
_TIMES = {"us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3}  # in milliseconds


@dataclass(frozen=True)
class Target:
    """`fraction` of `metric` that is to remain, or an `absolute` amount of it: bytes of size, ms of latency."""

    metric: str
    fraction: float | None
    absolute: float | None
    text: str

    def goal(self, total: float) -> float:
        """The amount that is to remain, of a model that has `total`."""
        return self.fraction * total if self.fraction is not None else self.absolute or 0.0


def parse_target(text: str) -> Target:
    """`macs=0.5`, `params=40%`, `size=5MB`, `macs=1.2G`, `channels=0.5`, `latency=0.6`, `latency=12ms`.

    Raises UsageError.
    """
    hint = "write it as macs=0.5, params=40%, size=5MB, macs=1.2G, channels=0.5, latency=0.6 or latency=12ms"
    hint += ": what is to remain"
    metric, equals, amount = text.strip().partition("=")
    metric = metric.strip().lower()
    if not equals or metric not in METRICS:
        raise UsageError(f"target '{text}' is none of {', '.join(METRICS)}", hint)
    units = {"": 1.0, **_TIMES} if metric == "latency" else _UNITS
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*(%|[a-zµ]*)\s*", amount.lower())
    if match is None or (match[2] != "%" and match[2] not in units):
        raise UsageError(f"target '{text}' has no amount that can be read", hint)
    value = float(match[1])
    if match[2] == "%":
        value, relative = value / 100, True
    else:
        relative = match[2] == "" and value <= 1
        value *= units[match[2]]
    if relative and not 0 < value < 1:
        raise UsageError(f"target '{text}' is outside 0 to 1", hint)
    if not 0 < value < float("inf"):
        raise UsageError(f"target '{text}' is no amount that can remain", hint)
    if not relative and metric == "latency" and match[2] == "":
        raise UsageError(f"target '{text}' has no unit of time", hint)
    if not relative and metric == "channels":
        raise UsageError(f"target '{text}': channels are given as a fraction", hint)
    return Target(metric, value if relative else None, None if relative else value, text)
