"""Ctrl-C and SIGTERM while training: noted, and obeyed between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Stop", "noted"]


class Stop:
    """Whether the process has been asked to stop."""

    asked = False

    def __call__(self) -> bool:
        return self.asked


@contextmanager
def noted() -> Iterator[Stop]:
    """Note SIGINT and SIGTERM meanwhile. A second Ctrl-C interrupts at once. Outside of the main thread, which gets
    the signals, nothing is changed."""
    stop = Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.asked = True

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
