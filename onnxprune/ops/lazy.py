"""torch, imported when it is first used.

The torch implementation of an operator stands beside its axis rule, but analysis, one-shot compression and
verification look up the same entries and must run where torch is not installed.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["F", "kernels", "torch"]


class _Lazy:
    """A module that is imported when an attribute of it is asked for."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


def kernels(family: str) -> Any:
    """`onnxprune.ops.kernels.<family>`: what is computed when the mirror runs and isn't one call of torch."""
    return _Lazy(f"onnxprune.ops.kernels.{family}")


torch: Any = _Lazy("torch")
F: Any = _Lazy("torch.nn.functional")
