"""Trains a network on a source's batches, and ends with the same weights whether or not it was killed on the way.

`train` puts together what a run needs and leaves everything as it found it; the run itself is in run.py, a step in
step.py.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onnxprune.data.source import Source
from onnxprune.errors import UsageError
from onnxprune.train.checkpoint import Memory, RunDir, Store
from onnxprune.train.device import choose_device, prepared
from onnxprune.train.distributed import Team, joined, synchronised
from onnxprune.train.hooks import Hooks
from onnxprune.train.log import Row
from onnxprune.train.run import Run, TrainResult
from onnxprune.train.schedule import Position
from onnxprune.train.settings import TrainSettings
from onnxprune.train.signals import noted
from onnxprune.train.step import Stepper

__all__ = ["TrainResult", "train"]


def train(
    student: nn.Module,
    source: Source,
    criterion: Callable[..., Tensor],
    settings: TrainSettings,
    *,
    input_names: Sequence[str],
    output_names: Sequence[str],
    teacher: nn.Module | None = None,
    run_dir: Path | None = None,
    resume: bool = False,
    start: Position | None = None,
    identity: Mapping[str, Any] | None = None,
    hooks: Hooks | None = None,
    progress: Callable[[Row], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    notify: Callable[[str], None] = warnings.warn,
) -> TrainResult:
    """Train `student` in place; afterwards it holds the weights that the run ends with.

    student, teacher: called as student(*inputs in the order of input_names), give a tensor or a tuple in the order of
        output_names. The teacher is not trained; it is called where the criterion needs it.
    criterion: (outputs, *, teacher, targets) to a scalar, a mean over samples. Its `state_dict`, where it has one, is
        kept in checkpoints (the first process's: it should be the same in all). Its `calibrate`, where nothing has been
        calibrated yet, is given the teacher's outputs.
    run_dir: where checkpoints go; without one the last state is kept in memory, to go back to. resume: continue what
        stands there (from the beginning, where that is nothing). identity: plain values that tell this run from
        others (the model, the data, the loss): it is continued under the same ones only.
    start: where the run before this one ended, of a training that is parted into several (`settings.span`); steps,
        epochs and seconds are counted on.
    progress: gets a `Row` a few times a second. should_stop: asked after every step. notify: is told warnings.

    Raises DataError for what goes wrong in the data, after a checkpoint; Diverged where the loss is lost at a quarter
    of the rate too; UsageError where settings or the run directory don't fit; KeyboardInterrupt, with a message that
    says how to go on, after Ctrl-C or SIGTERM and a checkpoint.
    """
    device = choose_device(settings.device)
    home = next((p.device for p in student.parameters()), torch.device("cpu"))
    modes = {m: m.training for m in student.modules()}
    hooks = hooks or Hooks()
    names = tuple(input_names), tuple(output_names)
    with contextlib.ExitStack() as stack:
        team = stack.enter_context(joined(device))
        stack.enter_context(prepared(settings, device, team.rank))
        stop = stack.enter_context(noted())
        if team.world > settings.batch // settings.accumulate:
            raise UsageError(
                f"a batch of {settings.batch} in {settings.accumulate} parts is too small for {team.world} processes",
                f"--batch {team.world * settings.accumulate} at least",
            )
        store = _store(stack, team, run_dir, settings, identity or {}, resume, notify)
        stack.enter_context(synchronised(student, team))
        stack.callback(_restore_form, student, home, modes, settings)
        stepper = Stepper(student, teacher, criterion, settings, names=names, device=device, team=team, hooks=hooks)
        stack.callback(stepper.close)
        run = Run(
            stepper,
            source,
            settings,
            device=device,
            team=team,
            stop=stop,
            store=store,
            should_stop=should_stop or (lambda: False),
            notify=notify,
            start=start,
        )
        stack.callback(run.close)
        run.begin(resume=resume and run_dir is not None)
        if team.first and not run.over:
            run.report = stack.enter_context(contextlib.closing(run.reporter(progress)))
        run.go()
        stepper.finish()
        if run.report is not None:
            run.report.finished(run.step)
        return run.result()


def _restore_form(
    student: nn.Module, home: torch.device, modes: Mapping[nn.Module, bool], settings: TrainSettings
) -> None:
    """Bring the student back to the device, memory layout and mode that it came in."""
    student.to(home)
    if settings.channels_last:
        student.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    for module, mode in modes.items():
        module.training = mode


def _store(
    stack: contextlib.ExitStack,
    team: Team,
    run_dir: Path | None,
    settings: TrainSettings,
    identity: Mapping[str, Any],
    resume: bool,
    notify: Callable[[str], None],
) -> Store | None:
    """Where states are kept, in the first process; None in the others. All raise where the first one does."""
    store: Store | None = None
    refusal: UsageError | None = None
    if team.first:
        store = Memory()
        if run_dir is not None:
            about = {**settings.decisive(), **identity}
            folder = RunDir(run_dir, about=about, keep=settings.keep, notify=notify)
            try:
                store = stack.enter_context(folder.held(resume=resume))
            except UsageError as error:
                refusal = error
    refusal = team.from_first(refusal)
    if refusal is not None:
        raise refusal
    return store
