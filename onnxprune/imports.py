"""What is not always installed, and what to say where it is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from onnxprune.errors import UsageError

__all__ = ["wants_torch"]


@contextmanager
def wants_torch(what: str, instead: str) -> Iterator[None]:
    """Around imports that want torch. what: is wanted it for; instead: what works without.

    Raises UsageError where it is missing.
    """
    try:
        yield
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "torch":
            raise
        missing = isinstance(error, ModuleNotFoundError) and error.name == "torch"
        why = "which is not installed" if missing else f"which can't be imported: {error}"
        raise UsageError(f"{what} wants torch, {why}", f"pip install 'onnxprune[train]'; or {instead}") from None
