"""Killed at any moment and continued, a run ends with the weights of one that was left alone, bit for bit."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from onnxprune.errors import DataError, UsageError
from onnxprune.train.hooks import Hooks, Step
from tests.train.runs import ArraySource, Stateless, convnet, run, same

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def start(out: Path, **asked: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.train.runs", str(out), json.dumps(asked)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)


HARD: dict[str, Any] = {"steps": 60, "optimizer": "adamw", "lr": 0.01, "ema": 0.9, "clip": 1.0, "amp": "bf16"}


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """A run with everything that has a state: AdamW, average, BatchNorm, dropout, a criterion with a memory, and a
    source that draws from the global generators; killed three times on its way."""
    how = HARD | {"checkpoint_every_steps": 1, "device": "cpu"}
    dice = random.Random()
    moments = []
    for life in range(3):
        process = start(
            tmp_path / "out.pt", settings=how, run_dir=str(tmp_path / "run"), resume=life > 0, kind="drawing",
            dropout=0.3, pace_s=0.02,
        )  # fmt: skip
        before = set((tmp_path / "run" / "checkpoints").glob("*.json"))
        deadline = time.monotonic() + 60
        while set((tmp_path / "run" / "checkpoints").glob("*.json")) == before and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        moments.append(dice.uniform(0.0, 0.2))
        time.sleep(moments[-1])
        process.kill()
        process.communicate()
        assert process.returncode == -9, f"ended by itself: {moments}"
    options: dict[str, Any] = {"source": ArraySource(40, kind="drawing"), **how}
    rest, result = run(model=convnet(dropout=0.3), run_dir=tmp_path / "run", resume=True, **options)
    whole, _ = run(model=convnet(dropout=0.3), **options)
    assert result.resumed_from is not None and 3 <= result.resumed_from < 60
    assert same(whole, rest), moments


@pytest.mark.parametrize("rename", [5, 6])
def test_killed_between_writing_and_naming_a_checkpoint(tmp_path: Path, rename: int) -> None:
    """Every checkpoint is two renamings; these are those of the third one, before which a file lies there unnamed."""
    how = {"steps": 12, "lr": 0.05, "batch": 8, "amp": "none", "device": "cpu", "checkpoint_every_steps": 4}
    process = start(tmp_path / "out.pt", settings=how, run_dir=str(tmp_path / "run"), kill_at_rename=rename)
    process.communicate()
    assert process.returncode == -9
    assert len(list((tmp_path / "run" / "checkpoints").glob("*.tmp"))) == 1
    told: list[str] = []
    rest, result = run(**how, run_dir=tmp_path / "run", resume=True, notify=told.append)
    assert result.resumed_from == 4 and told == []
    assert not list((tmp_path / "run" / "checkpoints").glob("*.tmp"))
    assert same(rest, run(**how)[0])


class Breaking(Hooks):
    """Fails in the middle of a step, as a killed process does, but in this process."""

    def __init__(self, at: int) -> None:
        self.at = at

    def after_backward(self, step: Step) -> None:
        if step.index == self.at:
            raise ZeroDivisionError


def broken_off(
    path: Path, at: int, *, kind: str = "indexed", dropout: float = 0.0, known: bool = True, **how: Any
) -> None:
    with pytest.raises(ZeroDivisionError):
        run(
            model=convnet(dropout=dropout),
            source=ArraySource(40, kind=kind, known=known),
            run_dir=path,
            hooks=Breaking(at),
            **how,
        )


@pytest.mark.parametrize("kind", ["indexed", "drawing"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("every", [1, 4, 5])
def test_wherever_the_checkpoint_was(tmp_path: Path, kind: str, dropout: float, every: int) -> None:
    """Epochs have 5 batches: checkpoints fall at an epoch's beginning, within it and at its last batch."""
    how: dict[str, Any] = HARD | {"steps": 24, "checkpoint_every_steps": every}
    whole, _ = run(model=convnet(dropout=dropout), source=ArraySource(40, kind=kind), **how)
    for at in (3, 10, 22):
        broken_off(tmp_path / str(at), at, kind=kind, dropout=dropout, **how)
        rest, result = run(
            model=convnet(dropout=dropout),
            source=ArraySource(40, kind=kind),
            run_dir=tmp_path / str(at),
            resume=True,
            **how,
        )
        assert result.resumed_from == at - at % every and result.steps == 24
        assert same(whole, rest), at


def test_epochs_of_unknown_length_and_parted_batches(tmp_path: Path) -> None:
    how: dict[str, Any] = {"epochs": 4, "steps": None, "accumulate": 3, "checkpoint_every_steps": 3}
    whole, one = run(source=ArraySource(43, known=False), **how)
    for at in (2, 7, 16):
        with pytest.raises(ZeroDivisionError):
            run(source=ArraySource(43, known=False), run_dir=tmp_path / str(at), hooks=Breaking(at), **how)
        rest, other = run(source=ArraySource(43, known=False), run_dir=tmp_path / str(at), resume=True, **how)
        assert same(whole, rest)
        assert (one.steps, one.epochs, one.first_loss, one.last_loss) == (
            other.steps, other.epochs, other.first_loss, other.last_loss,
        )  # fmt: skip


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    whole, _ = run(run_dir=tmp_path, ema=0.5)
    again, result = run(run_dir=tmp_path, ema=0.5, resume=True, source=_Unread(40))
    assert same(whole, again) and result.resumed_from == result.steps == 12


class _Unread(ArraySource):
    def batches(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("data was read")


def test_a_run_that_was_stopped_early_stays_so(tmp_path: Path) -> None:
    count = iter(range(99))
    one, _ = run(run_dir=tmp_path, should_stop=lambda: next(count) >= 4)
    again, result = run(run_dir=tmp_path, resume=True)
    assert result.stopped and result.steps == 5 and same(one, again)


def test_to_resume_nothing_is_to_begin(tmp_path: Path) -> None:
    student, result = run(run_dir=tmp_path / "new", resume=True)
    assert result.resumed_from is None and same(student, run()[0])


def test_a_truncated_checkpoint_costs_its_steps_and_nothing_else(tmp_path: Path) -> None:
    broken_off(tmp_path, 9, checkpoint_every_steps=4)
    last = max((tmp_path / "checkpoints").glob("*.pt"))
    last.write_bytes(last.read_bytes()[:-1000])
    told: list[str] = []
    rest, result = run(run_dir=tmp_path, resume=True, checkpoint_every_steps=4, notify=told.append)
    assert result.resumed_from == 4 and same(rest, run()[0])
    assert len(told) == 1 and last.name in told[0]


def test_other_settings_data_or_networks_are_refused(tmp_path: Path) -> None:
    broken_off(tmp_path, 9, checkpoint_every_steps=4, identity={"model": "abc"})
    same_settings: dict[str, Any] = {"checkpoint_every_steps": 4, "run_dir": tmp_path, "resume": True}
    with pytest.raises(UsageError, match=r"lr was 0\.05, is 0\.1; seed was 0, is 4; model was abc, is xyz"):
        run(**same_settings, lr=0.1, seed=4, identity={"model": "xyz"})
    with pytest.raises(
        UsageError, match=r"another network: '0\.weight' is \(6, 3, 3, 3\) there and \(5, 3, 3, 3\) here"
    ):
        run(**same_settings, identity={"model": "abc"}, model=convnet(width=5))
    with pytest.raises(UsageError, match="holds a run, stopped at step 8"):
        run(**(same_settings | {"resume": False}), identity={"model": "abc"})
    rest, _ = run(**same_settings, identity={"model": "abc"}, log_every=3, keep=4)
    assert same(rest, run()[0])


def test_going_back_is_remembered(tmp_path: Path) -> None:
    """A run that went back, and is then killed and continued, is the run that went back."""

    class Burst(Breaking):
        def __init__(self, at: int, burst: bool) -> None:
            super().__init__(at)
            self.burst = burst

        def after_step(self, step: Step) -> None:
            if step.index == 6 and self.burst:
                self.burst = False
                with torch.no_grad():
                    step.optimizer.param_groups[0]["params"][0].fill_(torch.nan)

    how: dict[str, Any] = {"checkpoint_every_steps": 4, "notify": lambda _: None}
    whole, result = run(hooks=Burst(-1, True), **how)
    assert result.backoffs == 1
    with pytest.raises(ZeroDivisionError):
        run(hooks=Burst(10, True), run_dir=tmp_path, **how)
    rest, result = run(hooks=Burst(-1, False), run_dir=tmp_path, resume=True, **how)
    assert result.resumed_from == 8 and result.backoffs == 1
    assert same(whole, rest)


def test_a_method_has_its_state_kept(tmp_path: Path) -> None:
    class Shrink(Breaking):
        scale = 1.0

        def after_step(self, step: Step) -> None:
            self.scale *= 0.97
            with torch.no_grad():
                step.optimizer.param_groups[0]["params"][0].mul_(self.scale)

        def state_dict(self) -> dict[str, Any]:
            return {"scale": self.scale}

        def load_state_dict(self, state: Any) -> None:
            self.scale = state["scale"]

    whole, _ = run(hooks=Shrink(-1))
    with pytest.raises(ZeroDivisionError):
        run(hooks=Shrink(9), run_dir=tmp_path, checkpoint_every_steps=4)
    rest, _ = run(hooks=Shrink(-1), run_dir=tmp_path, checkpoint_every_steps=4, resume=True)
    assert same(whole, rest)


def test_a_full_disk_does_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    class Fill(Hooks):
        def on_step_begin(self, step: Step) -> None:
            if step.index == 2:
                monkeypatch.setattr("onnxprune.train.checkpoint.os.fsync", full)

    told: list[str] = []
    student, _ = run(hooks=Fill(), run_dir=tmp_path, checkpoint_every_steps=4, notify=told.append)
    assert same(student, run()[0]) and "No space left" in told[0] and "step 4" in told[0]
    monkeypatch.undo()
    assert same(run(run_dir=tmp_path, resume=True, checkpoint_every_steps=4)[0], student)


def test_a_failing_source_and_a_nan_do_not_hide_each_other(tmp_path: Path) -> None:
    source = ArraySource(40)

    def fail(epoch: int, number: int) -> None:
        if number == 3:
            raise OSError("gone")

    source.before_batch = fail
    with pytest.raises(DataError, match="gone"):
        run(source=source, run_dir=tmp_path)
    manifest = json.loads(max((tmp_path / "checkpoints").glob("*.json")).read_text())
    assert manifest["step"] == 3


def test_divergence_is_noticed_at_the_same_step(tmp_path: Path) -> None:
    """The loss jumps at step 31 and stays up; steps of that state are not kept, and 20 of them send the run back."""

    class Jumping(Stateless):
        factor = 1.0

        def __call__(self, outputs: Any, *, teacher: Any, targets: Any) -> torch.Tensor:
            loss = super().__call__(outputs, teacher=teacher, targets=targets)
            return loss + (self.factor - 1) * loss.detach()

    class Jump(Breaking):
        def __init__(self, at: int) -> None:
            super().__init__(at)
            self.last, self.back = -1, False

        def on_step_begin(self, step: Step) -> None:
            self.back = self.back or step.index <= self.last
            self.last = step.index
            criterion.factor = 1e4 if step.index >= 30 and not self.back else 1.0

    how: dict[str, Any] = {"steps": 60, "patience": 20, "checkpoint_every_steps": 5}
    told: list[str] = []
    criterion = Jumping()
    whole, result = run(criterion=criterion, hooks=Jump(-1), notify=told.append, **how)
    assert result.backoffs == 1 and "at step 50: going back to step 30" in told[0]
    criterion = Jumping()
    with pytest.raises(ZeroDivisionError):
        run(criterion=criterion, hooks=Jump(42), run_dir=tmp_path, **how)
    again: list[str] = []
    rest, result = run(criterion=criterion, hooks=Jump(-1), run_dir=tmp_path, resume=True, notify=again.append, **how)
    assert result.resumed_from == 30 and again == told and same(whole, rest)
