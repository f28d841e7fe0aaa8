"""What a run shows while it goes on: a progress line, rows in a CSV or JSONL file, TensorBoard scalars.

All of them take the same `Row`, some of whose numbers may be None (nothing known, an empty field).
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TextIO

from onnxprune.errors import UsageError
from onnxprune.train.hooks import Hooks
from onnxprune.train.settings import TrainSettings

__all__ = ["Board", "LogFile", "ProgressLine", "Reporter", "Row"]

PROGRESS_EVERY_S = 0.5
FAMILIES_EVERY, FAMILIES_EVERY_S = 10, 60.0  # logged rows; seconds


@dataclass(frozen=True)
class Row:
    """The state of a run after a step.

    loss: mean since the row before. seconds: of training so far. eta_s: seconds still to go.
    sparsity, metric: from 0 to 1, and in the metric's unit, where a method gives them. more: what else it gives.
    """

    step: int
    steps: int | None
    epoch: int
    seconds: float
    loss: float | None
    lr: float
    samples_per_s: float
    eta_s: float | None
    sparsity: float | None = None
    metric: float | None = None
    more: Mapping[str, float] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """As the log file has it, rounded to what is worth reading."""
        values = asdict(self)
        more = values.pop("more")
        values.pop("steps")
        for name, digits in (("seconds", 3), ("samples_per_s", 2), ("eta_s", 1)):
            if values[name] is not None:
                values[name] = round(values[name], digits)
        return values | more

    def line(self) -> str:
        """In one line for a terminal."""
        of = f"/{self.steps}" if self.steps else ""
        parts = [f"step {self.step}{of}"]
        if self.loss is not None:
            parts.append(f"loss {self.loss:.4g}")
        if self.metric is not None:
            parts.append(f"metric {self.metric:.4g}")
        if self.sparsity is not None:
            parts.append(f"sparsity {self.sparsity:.1%}")
        parts.append(f"{self.samples_per_s:.4g} samples/s")
        if self.eta_s is not None:
            parts.append(f"ETA {_clock(self.eta_s)}")
        return "  ".join(parts)


class ProgressLine:
    """Shows rows on a stream: one line that is rewritten on a terminal, elsewhere a line every `every_s` seconds."""

    def __init__(self, stream: TextIO | None = None, *, every_s: float = 10.0) -> None:
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._every_s = 0.1 if self._live else every_s
        self._last = -float("inf")
        self._width = 0

    def __call__(self, row: Row) -> None:
        now = time.monotonic()
        if now - self._last < self._every_s and row.step != row.steps:
            return
        self._last = now
        line = row.line()
        if self._live:
            self._stream.write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Leave the line, so that what follows begins on one of its own."""
        if self._live and self._width:
            self._stream.write("\n")
            self._stream.flush()
            self._width = 0


class LogFile:
    """Rows as CSV (fixed columns) or JSONL (what a method adds as well), told apart by the suffix.

    step: that the run goes on from; rows of later steps, left from before a restart, are dropped. 0 begins a new file.
    """

    COLUMNS = tuple(f.name for f in fields(Row) if f.name not in ("steps", "more"))

    def __init__(self, path: Path, *, step: int = 0) -> None:
        self._csv = Path(path).suffix == ".csv"
        try:
            kept = _kept(Path(path), step, self._csv) if step else ""
            if not kept and self._csv:
                kept = ",".join(self.COLUMNS) + "\n"
            temporary = Path(f"{path}.tmp")
            temporary.write_text(kept)
            os.replace(temporary, path)
            self._file = open(path, "a", newline="")  # noqa: SIM115  (closed in close)
        except OSError as error:
            raise UsageError(f"the log file {path} can't be written: {error}") from error

    def __call__(self, row: Row) -> None:
        plain = row.plain()
        if self._csv:
            line = io.StringIO()
            csv.writer(line, lineterminator="\n").writerow("" if plain[c] is None else plain[c] for c in self.COLUMNS)
            self._file.write(line.getvalue())
        else:
            self.line(plain)
        self._file.flush()

    def line(self, values: Mapping[str, Any]) -> None:
        """Values as a line of JSON; what is not known or no number is left out."""
        known = {k: v for k, v in values.items() if v is not None and not (isinstance(v, float) and v != v)}
        self._file.write(json.dumps(known) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class FamilyLog:
    """What a method in training tells of every family of units, as JSONL beside the log file: a row per family at the
    first logged row, then at every tenth or after a while, and when the run is over (asking waits for the device).

    states: gives the families' states, each with a `row()` of plain values. step: as `LogFile` has it.
    """

    def __init__(self, log_file: Path, states: Callable[[], Sequence[Any]], *, step: int = 0) -> None:
        self._file = LogFile(Path(log_file).with_suffix(".families.jsonl"), step=step)
        self._states = states
        self._rows, self._asked = 0, -float("inf")

    def __call__(self, row: Row) -> None:
        now = time.monotonic()
        if self._rows % FAMILIES_EVERY == 0 or now - self._asked >= FAMILIES_EVERY_S:
            self.write(row.step, row.loss)
            self._asked = now
        self._rows += 1

    def write(self, step: int, loss: float | None) -> None:
        """Write the present states. loss: of the task, as the log has it."""
        for state in self._states():
            self._file.line({"step": step, "loss": loss, **state.row()})

    def close(self) -> None:
        self._file.close()


class Board:
    """The numbers of each row as TensorBoard scalars in a folder. Raises UsageError where tensorboard is missing."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UsageError("tensorboard is not installed", "pip install tensorboard, or leave it out") from error
        self._writer = SummaryWriter(str(folder))

    def __call__(self, row: Row) -> None:
        for name, value in row.plain().items():
            if value is not None and name not in ("step", "eta_s"):
                self._writer.add_scalar(name, value, row.step)

    def close(self) -> None:
        self._writer.close()


class Reporter:
    """Makes rows of what the loop tells it: for the log file every `log_every` steps, for `progress` twice a second.

    step, share, seconds: where this part of the run begins.
    """

    def __init__(
        self,
        settings: TrainSettings,
        *,
        progress: Callable[[Row], None] | None,
        hooks: Hooks,
        step: int,
        share: float,
        seconds: float,
    ) -> None:
        self._progress, self._hooks, self._every = progress, hooks, settings.log_every
        self._sinks: list[LogFile | FamilyLog | Board] = []
        self._families: FamilyLog | None = None
        if settings.log_file is not None:
            self._sinks.append(LogFile(settings.log_file, step=step))
            if hasattr(hooks, "families"):
                self._families = FamilyLog(settings.log_file, hooks.families, step=step)
                self._sinks.append(self._families)
        if settings.tensorboard is not None:
            self._sinks.append(Board(settings.tensorboard))
        self._begun = (share, seconds)
        self._budget = settings.time_budget_s
        self._window: deque[tuple[float, int]] = deque(
            [(seconds, 0)], maxlen=50
        )  # when, and samples since the beginning
        self._samples = 0
        self._shown = -float("inf")
        self._filed: list[float] = []
        self._last: float | None = None  # loss
        self._live: list[float] = []

    def stepped(
        self,
        *,
        step: int,
        steps: int | None,
        epoch: int,
        seconds: float,
        share: float,
        samples: int,
        lr: float,
        losses: Sequence[float],
    ) -> None:
        """A step is over, `share` of the run is done, and the losses of some steps have arrived."""
        if self._sinks:
            self._filed.extend(losses)
        self._last = losses[-1] if losses else self._last
        if self._progress is not None:
            self._live.extend(losses)
        self._samples += samples
        self._window.append((seconds, self._samples))
        filed = bool(self._sinks) and step % self._every == 0
        shown = self._progress is not None and (seconds - self._shown >= PROGRESS_EVERY_S or step == steps)
        if not filed and not shown:
            return
        values = dict(self._hooks.values())
        row = Row(
            step=step,
            steps=steps,
            epoch=epoch,
            seconds=seconds,
            loss=None,
            lr=lr,
            samples_per_s=self._speed(),
            eta_s=self._left(share, seconds),
            sparsity=values.pop("sparsity", None),
            metric=values.pop("metric", None),
            more=values,
        )
        if filed:
            for sink in self._sinks:
                sink(replace(row, loss=_mean(self._filed)))
            self._filed.clear()
        if shown and self._progress is not None:
            self._shown = seconds
            self._progress(replace(row, loss=_mean(self._live)))
            self._live.clear()

    def _speed(self) -> float:
        (begun, before), (now, samples) = self._window[0], self._window[-1]
        return (samples - before) / (now - begun) if now > begun else 0.0

    def _left(self, share: float, seconds: float) -> float | None:
        if self._budget is not None:
            return max(0.0, self._budget - seconds)
        done = share - self._begun[0]
        return (seconds - self._begun[1]) / done * max(0.0, 1 - share) if done > 0 else None

    def finished(self, step: int) -> None:
        """The run is over, and the weights that it ends with are in place."""
        if self._families is not None:
            self._families.write(step, self._last)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _kept(path: Path, step: int, is_csv: bool) -> str:
    """The whole lines of a log up to a step."""
    if not path.exists():
        return ""
    lines = path.read_text().splitlines(keepends=True)
    head = lines[:1] if is_csv else []
    return "".join(head + [line for line in lines[len(head) :] if _step(line, is_csv) <= step])


def _step(line: str, is_csv: bool) -> float:
    """The step of a line; infinite where it is not whole."""
    try:
        if not line.endswith("\n"):
            return float("inf")
        return int(line.partition(",")[0]) if is_csv else int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
