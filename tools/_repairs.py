"""The repair that `compress` does on data, asked for by name, for tools that compare what it brings."""

from __future__ import annotations

import inspect
from typing import Any

from onnxprune import UsageError, compress

__all__ = ["REPAIRS", "repairing"]

REPAIRS = ("none", "mean", "ls", "affine", "auto")


def repairing(repair: str, data: object) -> dict[str, Any]:
    """Arguments of `compress` for this repair on this data. Raises UsageError where it can't repair."""
    if repair == "none":
        return {}
    if "repair" not in inspect.signature(compress).parameters:
        raise UsageError("this version of onnxprune does not repair", "--repair none")
    return {"data": data, "repair": repair}
