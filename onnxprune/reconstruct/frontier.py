"""Activations between two steps of a repair: for every batch, what later nodes still read.

In memory up to a limit, in files beyond it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Frontier"]


@dataclass(frozen=True, slots=True)
class _Spilled:
    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> Tensor:
        found = np.fromfile(self.path, np.uint8)
        return torch.from_numpy(found).view(self.dtype).reshape(self.shape)


class Frontier:
    """Values by batch and key. limit: bytes of tensors that are held in memory."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = self.peak = self.spilled = 0
        self._values: list[dict[Hashable, Any]] = []
        self._folder: TemporaryDirectory[str] | None = None
        self._files = 0

    def __len__(self) -> int:
        return len(self._values)

    def append(self, values: dict[Hashable, Any]) -> None:
        """A batch's first values."""
        self._values.append({})
        self.put(len(self._values) - 1, values)

    def take(self, batch: int) -> dict[Hashable, Any]:
        """Everything of a batch, which is no longer held then."""
        found, self._values[batch] = self._values[batch], {}
        return {key: self._fetched(value) for key, value in found.items()}

    def put(self, batch: int, values: dict[Hashable, Any]) -> None:
        for key, value in values.items():
            self._values[batch][key] = self._stored(value) if isinstance(value, Tensor) else value

    def change(self, batch: int, key: Hashable, function: Callable[[Tensor], Tensor]) -> None:
        """Exchange one tensor, where there is one."""
        if key in self._values[batch]:
            found = self._fetched(self._values[batch].pop(key))
            self.put(batch, {key: function(found)})

    def _fetched(self, value: Any) -> Any:
        if isinstance(value, _Spilled):
            found = value.read()
            value.path.unlink()
            return found
        if isinstance(value, Tensor):
            self.held -= value.nbytes
        return value

    def _stored(self, tensor: Tensor) -> Tensor | _Spilled:
        if self.held + tensor.nbytes > self.limit:
            return self._spill(tensor)
        if tensor.untyped_storage().nbytes() > tensor.nbytes:  # a view would keep the whole of it
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        self.held += tensor.nbytes
        self.peak = max(self.peak, self.held)
        return tensor

    def _spill(self, tensor: Tensor) -> _Spilled:
        if self._folder is None:
            self._folder = TemporaryDirectory(prefix="onnxprune-")
        path = Path(self._folder.name) / str(self._files)
        self._files += 1
        tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tofile(path)
        self.spilled += tensor.nbytes
        return _Spilled(path, tuple(tensor.shape), tensor.dtype)

    def close(self) -> None:
        """Remove the files."""
        self._values.clear()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
