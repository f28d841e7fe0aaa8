"""Where a model may be written, found out before any work."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryFile

from onnxprune.errors import UsageError
from onnxprune.model.graph import Model
from onnxprune.model.payload import Mapped

__all__ = ["free", "spare_external_data"]


def free(path: Path, model: object, force: bool) -> Path:
    """Refuse an output that can't or must not be written, before any work."""
    if isinstance(model, (str, os.PathLike)) and path.exists() and Path(model).exists() and path.samefile(model):
        raise UsageError(f"{path} is the input itself", "name another output")
    if path.is_dir():
        raise UsageError(f"{path} is a folder", "name a file in it")
    for taken in (path, path.with_name(f"{path.name}.data")):
        if taken.exists() and not force:
            raise UsageError(f"{taken} exists already", "--force overwrites it")
    if not path.parent.is_dir():
        raise UsageError(f"{path.parent} is no folder", "create it first")
    try:
        with TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UsageError(f"{path.parent} can't be written to: {error.strerror}", "name an output elsewhere") from None
    return path


def spare_external_data(path: Path, model: Model) -> None:
    """The input's own external data is never replaced, whatever --force says."""
    data = path.with_name(f"{path.name}.data")
    for payload in model.payloads.values():
        if isinstance(payload, Mapped) and data.exists() and data.samefile(payload.file.path):
            raise UsageError(f"{data} holds the input's own weights", "name another output")
