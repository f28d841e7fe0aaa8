"""Unsigned integers of 16 bits and more: torch stores them, but has hardly any arithmetic for them.

A widened mirror rule sees them as int64, and its results go back to the declared type. Values from 2**63 on wrap: sums,
products and bit operations survive that, comparisons and divisions don't.
"""

from __future__ import annotations

from typing import Any

from onnxprune.ops.lazy import torch
from onnxprune.ops.rules import MirrorContext, MirrorRule

__all__ = ["widened"]

_NARROW = frozenset({"torch.uint16", "torch.uint32", "torch.uint64"})


def widened(rule: MirrorRule) -> MirrorRule:
    """The rule, for a node that reads or makes such integers as well."""

    def mirror(m: MirrorContext) -> Any:
        if not any(str(m.dtype(i)) in _NARROW for i in range(len(m.node.inputs))):
            return rule(m)
        found = rule(Wide(m))
        if not isinstance(found, (tuple, list)):
            return back(m, found, 0)
        return [back(m, result, j) for j, result in enumerate(found)]

    return mirror


def back(m: MirrorContext, result: Any, j: int) -> Any:
    """Output j in its declared type."""
    dtype = m.output_dtype(j)
    return result.to(dtype) if str(dtype) in _NARROW else result


class Wide:
    """A node of which integers that torch can't compute with look like int64."""

    def __init__(self, m: MirrorContext) -> None:
        self.m = m

    def __getattr__(self, name: str) -> Any:
        return getattr(self.m, name)

    def tensor(self, i: int) -> Any:
        x = self.m.tensor(i)
        return x.to(torch.int64) if str(self.m.dtype(i)) in _NARROW else x

    def optional(self, i: int) -> Any:
        return self.tensor(i) if self.m.has(i) else None

    def operand(self, i: int) -> Any:
        value = self.m.operand(i)
        return value if isinstance(value, (bool, int, float)) else self.tensor(i)

    def dtype(self, i: int) -> Any:
        dtype = self.m.dtype(i)
        return torch.int64 if str(dtype) in _NARROW else dtype

    def output_dtype(self, j: int = 0) -> Any:
        dtype = self.m.output_dtype(j)
        return torch.int64 if str(dtype) in _NARROW else dtype
