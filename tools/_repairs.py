"""Prune a file and repair it on data, for tools that compare what that brings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onnxprune import Result, compress
from onnxprune.data import Source
from onnxprune.model.save import write

__all__ = ["REPAIRS", "pruned"]

REPAIRS = ("none", "mean", "ls", "affine")


def pruned(model: Path, out: Path, repair: str, data: Source, *, samples: int = 512, **arguments: Any) -> Result:
    """`compress` to a file, which is there already or not; with a repair on as many inputs where it isn't 'none'."""
    result = compress(model, out, force=True, **arguments)
    if repair != "none":
        from onnxprune.reconstruct import repair as repaired  # wants torch

        write(repaired(result.analysis, result.plan, data, mode=repair, samples=samples).model, out)
    return result
