"""Seconds per stage of a long work."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["Clock"]


class Clock:
    """Seconds per stage, by name. progress: called with the name of each stage that begins."""

    def __init__(self, progress: Callable[[str], None] | None) -> None:
        self.seconds: dict[str, float] = {}
        self.progress = progress
        self.stage = ""
        self.since = time.perf_counter()

    def start(self, stage: str) -> None:
        now = time.perf_counter()
        if self.stage:
            self.seconds[f"{self.stage}_s"] = now - self.since
        self.stage, self.since = stage, now
        if stage and self.progress is not None:
            self.progress(stage)

    def stop(self) -> dict[str, float]:
        self.start("")
        return self.seconds
