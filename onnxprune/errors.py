"""Every error a user can meet, with the exit code it ends with. Each says what is wrong and what to do about it."""

from __future__ import annotations

__all__ = [
    "DataError",
    "Diverged",
    "ModelRejected",
    "NotMirrored",
    "NothingPrunable",
    "OnnxPruneError",
    "TargetNotReached",
    "UsageError",
    "VerificationFailed",
]


class OnnxPruneError(Exception):
    """Base of all errors that onnxprune raises on purpose. `hint` says what to do; may be empty."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(OnnxPruneError):
    """An option or argument makes no sense (exit 2)."""

    exit_code = 2


class ModelRejected(OnnxPruneError):
    """The file is not a valid ONNX model, or onnxruntime can't run it (exit 3)."""

    exit_code = 3


class NothingPrunable(ModelRejected):
    """The model is valid but has no group that may be pruned (exit 3)."""


class NotMirrored(ModelRejected):
    """The model can't be trained: nodes of it have no form in torch (exit 3). operators: what they are."""

    operators: tuple[str, ...] = ()


class TargetNotReached(OnnxPruneError):
    """The groups don't allow the target (exit 4)."""

    exit_code = 4


class VerificationFailed(OnnxPruneError):
    """The pruned model does not equal the masked original; nothing was written (exit 5)."""

    exit_code = 5


class DataError(OnnxPruneError):
    """The user's data or a callable of theirs does not fit the model, or failed (exit 6)."""

    exit_code = 6


class Diverged(DataError):
    """Training lost its loss to nan or infinity, or for good, also at a quarter of the rate (exit 6)."""
