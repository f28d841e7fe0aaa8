"""One training run: where it stands, and what happens between its steps.

A step is: fetch batches, forward and backward, sum gradients over processes, move the weights. Between two steps, and
only there, the run settles: losses are judged, processes agree, checkpoints are taken, signals are obeyed. Everything
that the next step depends on is in `Run._state`.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from onnxprune.data.source import Source
from onnxprune.errors import DataError, Diverged
from onnxprune.train.checkpoint import RunDir, Store
from onnxprune.train.device import LAG, LossReader
from onnxprune.train.distributed import Team
from onnxprune.train.feed import Feed, HostBatch, Interrupted, host_generators
from onnxprune.train.guard import Guard
from onnxprune.train.hooks import Step
from onnxprune.train.log import Reporter, Row
from onnxprune.train.schedule import Horizon, Position, rate
from onnxprune.train.settings import TrainSettings
from onnxprune.train.signals import Stop
from onnxprune.train.step import Stepper

__all__ = ["Run", "TrainResult"]

MOST_BACKOFFS = 2
CALIBRATION_SAMPLES = 512
# At most this share of the time goes into checkpoints that are taken by the clock.
CHECKPOINT_SHARE = 0.05
# fp16 skips steps whose gradients overflow; more losses in a row than this are no overflow.
TOLERATED_FP16 = 20
# What of a run is plain numbers, by its attributes' names.
POSITION = ("step", "epoch", "index", "epoch_steps", "seconds", "backoffs", "stopped", "first_loss")


@dataclass(frozen=True)
class TrainResult:
    """How a run went. steps, epochs: that were trained since the training began. seconds: likewise.

    first_loss, last_loss: of the first step, and the mean of the last 20. samples_per_s: of this part.
    backoffs: how often it went back and halved the rate. resumed_from: the step it was continued at.
    stopped: `should_stop` ended it before its time. position: where it ended.
    """

    steps: int
    epochs: int
    seconds: float
    first_loss: float
    last_loss: float
    samples_per_s: float
    backoffs: int
    resumed_from: int | None
    stopped: bool
    position: Position = field(default_factory=Position)


class Run:
    """One run: where it stands, and what happens between its steps."""

    def __init__(
        self,
        stepper: Stepper,
        source: Source,
        settings: TrainSettings,
        *,
        device: torch.device,
        team: Team,
        stop: Stop,
        store: Store | None,
        should_stop: Callable[[], bool],
        notify: Callable[[str], None],
        start: Position | None = None,
    ) -> None:
        self.source, self.should_stop = source, should_stop
        self.stepper, self.settings, self.device, self.team = stepper, settings, device, team
        self.stop, self.store, self.notify = stop, store, notify
        self.make_feed = lambda: Feed(
            source,
            batch=settings.batch,
            seed=settings.seed,
            input_names=stepper.input_names,
            rank=team.rank,
            world=team.world,
            pin=device.type == "cuda",
            interrupted=stop,
        )
        self.feed = self.make_feed()
        self.horizon = Horizon.of(settings, source.size)
        factor = None if stepper.hooks.loss_may_rise else settings.divergence
        tolerated = TOLERATED_FP16 if stepper.skips_overflows else 0
        self.guard = Guard(factor=factor, patience=settings.patience, tolerated=tolerated)
        self.report: Reporter | None = None
        self.pending = LossReader(device)
        start = start or Position()
        self.step, self.epoch, self.index, self.epoch_steps = start.step, start.epoch, start.index, start.epoch_steps
        self.horizon.steps_per_epoch = start.steps_per_epoch or self.horizon.steps_per_epoch
        if start.drop_last is not None:
            self.feed.drop_last = start.drop_last
        self.backoffs = 0
        self.stopped = False
        self._ended = False  # the epoch's last batch has been given
        self.resumed_from: int | None = None
        self.first_loss: float | None = None
        self.last_losses: deque[float] = deque(maxlen=20)
        self.seconds = start.seconds  # of training so far, as all processes know it
        self._seconds_before, self._began = start.seconds, time.monotonic()
        self._saved_step: int | None = None
        self._save_at = 0.0
        self._generators: Mapping[str, Any] | None = None  # to go on with after a restart
        self._last: deque[tuple[int, int, HostBatch]] = deque(maxlen=LAG + 1 if device.type == "cuda" else 1)
        self._stepped: tuple[float, int] | None = None  # rate and samples of the step that was taken last
        self._untold: list[float] = []
        self._samples = 0  # trained on in this part of the run

    # the run

    def begin(self, *, resume: bool) -> None:
        """From the newest checkpoint, where there is one to resume; else from the beginning, with a first one."""
        state = self.team.from_first(self.store.load() if resume and self.store is not None else None)
        if state is not None:
            self._restore(state)
            self.resumed_from = self._saved_step = self.step
            self._seconds_before = self.seconds
        else:
            self._calibrate()
        self._began = time.monotonic()
        if state is None:
            self._save()
        self._plan_save(0.0)

    def go(self) -> None:
        """Take steps until the end. See `train` for what is raised."""
        while True:
            if self.over:
                self._settle(everything=True)
                if not self.over:
                    continue  # it went back
                if self._saved_step != self.step:
                    self._save()
                return
            collected = self._collect()
            if collected is not None:
                self._take(*collected)
                self._settle()

    @property
    def over(self) -> bool:
        """Whether it has come to its end."""
        return self.stopped or self.horizon.over(
            step=self.step, epoch=self.epoch, index=self.epoch_steps, seconds=self.seconds
        )

    def _share(self) -> float:
        return self.horizon.share(step=self.step, epoch=self.epoch, index=self.epoch_steps, seconds=self.seconds)

    def _take(self, batches: Sequence[HostBatch], total: int, parts: int) -> None:
        share, how = self._share(), self.settings
        factor = rate(share, warmup=how.warmup, schedule=how.schedule, milestones=how.milestones) * 0.5**self.backoffs
        step = Step(self.step, self.epoch, self.horizon.within(share), how.lr * factor, self.stepper.optimizer)
        self._last.extend((self.epoch, self.index + i, batch) for i, batch in enumerate(batches))
        self.pending.put(self.stepper.take(batches, step, total=total, parts=parts, factor=factor))
        self.step += 1
        self.epoch_steps += 1
        self.index += len(batches)
        self._samples += total
        self._stepped = step.lr, total

    # data

    def _collect(self) -> tuple[list[HostBatch], int, int] | None:
        """This process's batches for a step, the samples of all processes', and the parts to compute each batch in.

        One batch is a step's, but where the source gives smaller ones than it is asked for, because the model's batch
        size is fixed or shapes differ: then as many as fit. None where an epoch has ended instead.
        """
        if self._ended:
            self._ended = False
            self._end_epoch()
            return None
        generators = host_generators() if self.feed.is_open and not self.feed.quiet else None
        batches: list[HostBatch] = []
        total = 0
        while True:
            fetched = self._fetch(generators)
            if fetched is None:
                break
            batch, samples, fewest = fetched
            batches.append(batch)
            total += samples
            if total + samples > self.settings.batch:
                parts = min(self.settings.accumulate, fewest) if len(batches) == 1 else 1
                return batches, total, parts
        self._ended = True
        return (batches, total, 1) if batches and not self.feed.drop_last else None

    def _fetch(self, generators: Mapping[str, Any] | None) -> tuple[HostBatch, int, int] | None:
        """This process's part of the next batch, the samples of the whole batch, and the fewest that a process has.
        None at the end of the epoch."""
        batch: HostBatch | None = None
        problem: DataError | None = None
        try:
            batch = self._next_batch()
        except Interrupted:
            pass
        except DataError as error:
            problem = error
        rows = self.team.gather([batch.samples if batch else 0, problem is not None, self.stop.asked])
        if any(row[1] for row in rows):
            self._data_failed(problem, generators)
        fewest = int(min(row[0] for row in rows))
        if batch is not None and fewest > 0:
            return batch, int(sum(row[0] for row in rows)), fewest
        if any(row[2] for row in rows):
            self._settle(everything=True, generators=generators)
        self.feed.close()
        return None

    def _next_batch(self) -> HostBatch | None:
        if not self.feed.is_open:
            self.feed.open(self.epoch, self.index, self._generators)
        try:
            return self.feed.next()
        except DataError:
            size = self.source.size
            if self.index or size is None or size >= self.settings.batch or not self.feed.take_rests():
                raise
        self.feed.open(self.epoch)  # a stream that turned out to be shorter than a batch
        return self.feed.next()

    def _data_failed(self, problem: DataError | None, generators: Mapping[str, Any] | None) -> None:
        problems = self.team.gather_objects(None if problem is None else str(problem))
        _, losses = self._agree([], everything=True)
        if self._judge(losses) is None and self._saved_step != self.step:
            self._save(generators)
        if problem is not None:
            raise problem
        rank = next(i for i, text in enumerate(problems) if text is not None)
        raise DataError(f"process {rank} stopped: {problems[rank]}")

    def _end_epoch(self) -> None:
        """Go on to the next epoch, or, where this one gave nothing, to its rests."""
        if self.epoch_steps:
            self.horizon.steps_per_epoch = self.epoch_steps
            self.epoch, self.index, self.epoch_steps, self._generators = self.epoch + 1, 0, 0, None
        elif not self.feed.take_rests():
            fewer = f" for {self.team.world} processes" if self.team.world > 1 else ""
            raise DataError(
                f"the data gave no batch{fewer} in epoch {self.epoch + 1}",
                "check that it holds samples; what can be read once only needs a function that makes a new one",
            )

    def _calibrate(self) -> None:
        """Let the criterion see what the teacher's outputs are like, if it wants to."""
        stepper = self.stepper
        calibrate = getattr(stepper.criterion, "calibrate", None)
        if calibrate is None or stepper.teacher is None or stepper.criterion.state_dict():  # type: ignore[attr-defined]
            return
        feed = self.make_feed()
        feed.take_rests()

        def outputs() -> Iterator[dict[str, Tensor]]:
            seen = 0
            feed.open(0)
            while seen < CALIBRATION_SAMPLES and (batch := feed.next()) is not None:
                yield stepper.teach(batch)
                seen += batch.samples * self.team.world

        try:
            calibrate(outputs())
        except Interrupted:
            raise KeyboardInterrupt("stopped before the first step") from None
        finally:
            feed.close()

    # between steps

    def _settle(self, *, everything: bool = False, generators: Mapping[str, Any] | None = None) -> None:
        """Agree on what has happened, and do what follows from it.

        everything: wait for all losses. generators: their states to save, where they are not the present ones.
        """
        now = self._seconds_before + time.monotonic() - self._began
        rows, losses = self._agree([self.stop.asked, self.should_stop(), self._due(), now], everything=everything)
        interrupted, due = any(row[0] for row in rows), bool(rows[0][2])
        self.stopped = self.stopped or any(row[1] for row in rows)
        self.seconds = rows[0][3]
        reason = self._judge(losses)
        self._tell(losses)
        if reason is not None:
            self._back_off(reason)
        elif (interrupted or due) and self.pending.waiting:
            self._settle(everything=True, generators=generators)
            return
        elif (interrupted or due) and self._saved_step != self.step:
            sound = self._save(generators)
            if not sound and not interrupted:
                self._back_off("the weights became nan or infinite")
        if interrupted:
            raise KeyboardInterrupt(self._farewell())

    def _agree(self, mine: Sequence[float], *, everything: bool) -> tuple[list[list[float]], list[float]]:
        """The numbers of all processes, and the losses (of the global batch) that have arrived."""
        rows = self.team.gather([*mine, *self.pending.take(everything=everything)])
        return rows, [sum(column) for column in zip(*(row[len(mine) :] for row in rows), strict=True)]

    def _judge(self, losses: Sequence[float]) -> str | None:
        """Why the run has to go back; None where it doesn't. Raises DataError where nan came with the data."""
        for loss in losses:
            reason = self.guard.feed(loss)
            if reason is not None:
                if not math.isfinite(loss):
                    self._blame()
                return reason
            if self.first_loss is None:
                self.first_loss = loss
            self.last_losses.append(loss)
        return None

    def _blame(self) -> None:
        here = [(e, i, name) for e, i, batch in self._last if (name := batch.unusable()) is not None]
        for epoch, index, name in itertools.chain(*self.team.gather_objects(here)):
            raise DataError(f"'{name}' holds nan in batch {index} of epoch {epoch}", "mend the data, or leave it out")

    def _tell(self, losses: Sequence[float]) -> None:
        self._untold.extend(losses)
        if self.report is None or self._stepped is None:
            return
        lr, samples = self._stepped
        self._stepped = None
        self.report.stepped(
            step=self.step,
            steps=self.horizon.total,
            epoch=self.epoch,
            seconds=self.seconds,
            share=self._share(),
            samples=samples,
            lr=lr,
            losses=self._untold,
        )
        self._untold.clear()

    def _back_off(self, reason: str) -> None:
        """Go back to the last good state, at half the rate."""
        where = f"{reason} at step {self.step}"
        if self.backoffs == MOST_BACKOFFS:
            raise Diverged(
                f"{where}, also after going back {MOST_BACKOFFS} times to a lower rate",
                f"try a rate of {self.settings.lr * 0.1:g} or lower (now {self.settings.lr:g}), or --clip 1",
            )
        state = self.team.from_first(self.store.load() if self.store is not None else None)
        if state is None:
            raise Diverged(f"{where}, and no checkpoint can be read to go back to")
        backoffs = self.backoffs + 1
        self._restore(state)
        self.backoffs = backoffs
        if self.team.first:
            self.notify(f"{where}: going back to step {self.step}, at {0.5**backoffs:g} of the rate")

    def _farewell(self) -> str:
        if isinstance(self.store, RunDir):
            return f"stopped at step {self.step}; the same command with --resume continues at {self._saved_step}"
        return f"stopped at step {self.step}; without a run directory nothing is kept"

    # states

    def _due(self) -> bool:
        """Whether a checkpoint should be taken. Only the first process's answer counts."""
        if self.guard.suspicious or self._saved_step == self.step:
            return False
        every = self.settings.checkpoint_every_steps
        if every is not None and self.step % every == 0:
            return True
        return self.settings.checkpoint_every_s is not None and time.monotonic() >= self._save_at

    def _save(self, generators: Mapping[str, Any] | None = None) -> bool:
        """Keep the present state. False where it is not finite, and so is not kept."""
        if not self.team.from_first(self.stepper.finite()):
            return False
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        random_states = self.team.gather_objects({"host": generators or host_generators(), "cuda": cuda})
        if self.store is not None:
            began = time.monotonic()
            try:
                self.store.save(self._state(random_states))
            except OSError as error:
                self.notify(f"no checkpoint at step {self.step}: {error}")
            self._plan_save(time.monotonic() - began)
        self._saved_step = self.step
        return True

    def _plan_save(self, cost_s: float) -> None:
        every = self.settings.checkpoint_every_s or 0.0
        self._save_at = time.monotonic() + max(every, cost_s / CHECKPOINT_SHARE)

    def _state(self, random_states: list[Any]) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in POSITION},
            "last_losses": list(self.last_losses),
            "steps_per_epoch": self.horizon.steps_per_epoch,
            "drop_last": self.feed.drop_last,
            "guard": self.guard.state_dict(),
            "random": random_states,
            "network": self.stepper.state(),
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        """Stand where the run stood when it was in this state; the time goes on."""
        self.feed.close()
        self.pending.clear()
        self._last.clear()
        self._ended = False
        self.stepper.load(state["network"])
        for name in POSITION:
            setattr(self, name, state[name])
        self.last_losses = deque(state["last_losses"], maxlen=self.last_losses.maxlen)
        self.horizon.steps_per_epoch = state["steps_per_epoch"]
        self.feed.drop_last = state["drop_last"]
        self.guard.load_state_dict(state["guard"])
        self._saved_step = self.step
        if len(state["random"]) != self.team.world:
            self.notify(
                f"the checkpoint was written by {len(state['random'])} processes, this is a run of {self.team.world}: "
                "it gives the same result to rounding only"
            )
            return
        mine = state["random"][self.team.rank]
        self._generators = mine["host"]
        if mine["cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(mine["cuda"], self.device)

    def reporter(self, progress: Callable[[Row], None] | None) -> Reporter:
        """What rows are made by, from where the run stands."""
        return Reporter(
            self.settings,
            progress=progress,
            hooks=self.stepper.hooks,
            step=self.step,
            share=self._share(),
            seconds=self.seconds,
        )

    def result(self) -> TrainResult:
        here = self.seconds - self._seconds_before
        return TrainResult(
            steps=self.step,
            epochs=self.epoch + (0 < (self.horizon.steps_per_epoch or 0) <= self.epoch_steps),
            seconds=self.seconds,
            first_loss=math.nan if self.first_loss is None else self.first_loss,
            last_loss=sum(self.last_losses) / len(self.last_losses) if self.last_losses else math.nan,
            samples_per_s=self._samples / here if here > 0 else 0.0,
            backoffs=self.backoffs,
            resumed_from=self.resumed_from,
            stopped=self.stopped,
            position=Position(
                self.step,
                self.epoch,
                self.index,
                self.epoch_steps,
                self.seconds,
                self.horizon.steps_per_epoch,
                self.feed.drop_last,
            ),
        )

    def close(self) -> None:
        self.feed.close()
