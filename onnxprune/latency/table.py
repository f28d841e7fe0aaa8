"""The latency table: microseconds per operator and shape on this machine, kept between runs.

It spares time and nothing else: what is not in it is measured, a file that can't be read or is none of ours is measured
anew, and one that can't be written stays unwritten. There is a file per processor, version of onnxruntime and number of
threads, in the folder that the environment variable ONNXPRUNE_CACHE names (empty: keep none), else in the user's cache.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["Table", "cache_folder", "machine"]

SCHEMA = 1
_FEATURES = ("sse4_1", "avx", "avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd")


class Table:
    """Times that were measured here before, by `Kernel.key`."""

    def __init__(self, threads: int, folder: Path | None) -> None:
        """folder: where the files are; None: keep nothing."""
        import onnxruntime

        self.head = {
            "schema": SCHEMA,
            "machine": machine(),
            "onnxruntime": onnxruntime.__version__,
            "threads": threads,
        }
        digest = hashlib.sha256(json.dumps(self.head, sort_keys=True).encode()).hexdigest()[:16]
        self.path = None if folder is None else folder / f"latency-{digest}.json"
        self.microseconds = self._stored()

    def get(self, key: str) -> float | None:
        """Microseconds, where they are known."""
        return self.microseconds.get(key)

    def add(self, measured: Mapping[str, float]) -> None:
        """Take up what was measured, and keep it together with what others have kept meanwhile."""
        if not measured:
            return
        self.microseconds = {**self._stored(), **self.microseconds, **measured}
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _replace(self.path, json.dumps({**self.head, "microseconds": self.microseconds}, indent=0))
        except OSError:
            return

    def _stored(self) -> dict[str, float]:
        """What the file holds, as far as it is ours and makes sense."""
        try:
            document: Any = json.loads(self.path.read_text(encoding="utf-8")) if self.path is not None else self.head
            if any(document[name] != value for name, value in self.head.items()):
                return {}
            return {str(key): float(us) for key, us in document["microseconds"].items() if 0 < float(us) < math.inf}
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return {}


def cache_folder() -> Path | None:
    """ONNXPRUNE_CACHE where it is set (None where it is empty), else `onnxprune` in the user's cache folder."""
    named = os.environ.get("ONNXPRUNE_CACHE")
    if named is not None:
        return Path(named) if named else None
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "onnxprune"
    except RuntimeError:  # there is no home
        return None


def machine() -> str:
    """The processor, as far as it decides how fast onnxruntime is."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = dict(re.findall(r"^([\w ]+?)\s*:\s*(.*)$", text.split("\n\n")[0], re.MULTILINE))
    flags = set((found.get("flags") or found.get("Features") or "").split())
    parts = [found.get(name, "") for name in ("model name", "cpu family", "model", "stepping")]
    parts += [name for name in _FEATURES if name in flags]
    return " ".join([platform.system(), platform.machine(), *filter(None, parts or [platform.processor()])])


def _replace(path: Path, text: str) -> None:
    """Readers see the old file or the new one."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
