"""Prune a file and repair it on data, for tools that compare what that brings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onnxprune import Result, compress
from onnxprune.data import Source

__all__ = ["REPAIRS", "pruned"]

REPAIRS = ("none", "mean", "ls", "affine")


def pruned(model: Path, out: Path, repair: str, data: Source, *, samples: int = 512, **arguments: Any) -> Result:
    """`compress` to a file, which is there already or not; ranked and repaired on as many inputs."""
    return compress(model, out, force=True, data=data, samples=samples, repair=repair, **arguments)
