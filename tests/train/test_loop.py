"""What a run does: its steps by hand, its ends, its failures."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from onnxprune.errors import DataError, Diverged, ModelRejected, OnnxPruneError, UsageError
from onnxprune.train.device import LossReader, arithmetic
from onnxprune.train.hooks import Hooks, Step
from onnxprune.train.schedule import rate
from tests.train.runs import Arrays, ArraySource, CrossEntropy, Stateless, convnet, run, same, settings


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def close(a: nn.Module, b: nn.Module, tolerance: float = 1e-6) -> bool:
    return all(
        torch.allclose(x, y, rtol=tolerance, atol=tolerance)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


# steps


def test_a_run_is_the_loop_that_one_would_write() -> None:
    student, result = run(criterion=Stateless(), steps=12, clip=0.5)
    by_hand, source = convnet().train(), ArraySource(40)
    optimizer = torch.optim.SGD(
        [
            {"params": [p for p in by_hand.parameters() if p.ndim > 1], "weight_decay": 1e-4},
            {"params": [p for p in by_hand.parameters() if p.ndim == 1]},
        ],
        lr=0.05,
        momentum=0.9,
    )
    losses = []
    for step in range(12):
        epoch, start = divmod(step, 5)
        batch = next(source.batches(8, epoch=epoch, seed=0, shuffle=True, start=start, rank=0, world=1, drop_last=True))
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * rate((step + 0.5) / 12, warmup=0.05, schedule="cosine")
        optimizer.zero_grad()
        output = by_hand(torch.from_numpy(batch.inputs["x"]))
        loss = nn.functional.cross_entropy(output, torch.from_numpy(batch.targets["label"]))
        loss.backward()
        nn.utils.clip_grad_norm_(by_hand.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    assert close(student, by_hand)
    assert result.first_loss == pytest.approx(losses[0], rel=1e-5)
    assert result.last_loss == pytest.approx(sum(losses) / 12, rel=1e-5)
    assert (result.steps, result.epochs, result.backoffs, result.stopped) == (12, 2, 0, False)


def test_clipping_bounds_the_common_norm() -> None:
    class Norms(Hooks):
        seen: list[float] = []

        def after_backward(self, step: Step) -> None:
            squares = [p.grad.square().sum() for g in step.optimizer.param_groups for p in g["params"]]
            self.seen.append(float(torch.stack(squares).sum().sqrt()))

    for clip, hooks in ((None, Norms()), (0.3, Norms())):
        hooks.seen = []
        run(steps=4, clip=clip, hooks=hooks)
        assert (max(hooks.seen) > 0.4) if clip is None else max(hooks.seen) == pytest.approx(0.3, rel=1e-4)


@pytest.mark.parametrize("accumulate", [2, 3, 8])
def test_a_batch_in_parts_is_the_whole_batch(accumulate: int) -> None:
    whole, result = run(model=convnet(norm=False), criterion=Stateless())
    parts, other = run(model=convnet(norm=False), criterion=Stateless(), accumulate=accumulate)
    assert close(whole, parts)
    assert other.last_loss == pytest.approx(result.last_loss, rel=1e-6)


def test_a_source_of_fixed_batches_fills_the_batch_with_several() -> None:
    whole, _ = run(model=convnet(norm=False), criterion=Stateless(), steps=10)
    pieces, result = run(model=convnet(norm=False), criterion=Stateless(), steps=10, source=ArraySource(40, fixed=2))
    assert close(whole, pieces)
    assert result.epochs == 2


def test_the_average_is_what_a_run_ends_with() -> None:
    class Watch(Hooks):
        def __init__(self) -> None:
            self.expected: dict[str, torch.Tensor] = {}
            self.steps = 0

        def on_step_begin(self, step: Step) -> None:
            self.take()

        def take(self) -> None:
            if self.steps:
                decay = min(0.5, (1 + self.steps) / (10 + self.steps))
                for name, p in student.named_parameters():
                    self.expected[name] = decay * self.expected[name] + (1 - decay) * p.detach()
            else:
                self.expected = {n: p.detach().clone() for n, p in student.named_parameters()}
            self.steps += 1

    student, watch = convnet(), Watch()
    run(model=student, steps=30, ema=0.5, hooks=watch)
    raw, _ = run(steps=30)
    last = dict(raw.named_parameters())
    for name, p in student.named_parameters():
        expected = 0.5 * watch.expected[name] + 0.5 * last[name].detach()
        torch.testing.assert_close(p.detach(), expected, rtol=1e-4, atol=1e-6)


def test_a_teacher_is_asked_where_the_loss_needs_it_and_is_not_trained() -> None:
    class Distil:
        needs_teacher = True
        calibrated: list[int] = []

        def calibrate(self, batches: Any) -> None:
            self.calibrated = [len(batch["y"]) for batch in batches]

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: Any) -> None:
            pass

        def __call__(self, outputs: Any, *, teacher: Any, targets: Any) -> torch.Tensor:
            assert not teacher["y"].requires_grad
            return (outputs["y"] - teacher["y"]).square().mean()

    teacher, student, criterion = convnet(), convnet(), Distil()
    with torch.no_grad():
        student[0].weight.mul_(0.5)  # type: ignore[union-attr,operator]
    before = {n: x.clone() for n, x in teacher.state_dict().items()}
    _, result = run(model=student, teacher=teacher, criterion=criterion, steps=60, epochs=None)
    assert result.last_loss < 0.5 * result.first_loss
    assert all(torch.equal(x, before[n]) for n, x in teacher.state_dict().items())
    assert criterion.calibrated == [8] * 5


def test_a_student_comes_back_in_the_mode_it_came_in_without_gradients() -> None:
    student = convnet().eval()
    state = torch.get_rng_state()
    run(model=student, channels_last=True)
    assert not any(m.training for m in student.modules())
    assert all(p.grad is None and p.is_contiguous() for p in student.parameters())
    assert torch.equal(torch.get_rng_state(), state) and not torch.are_deterministic_algorithms_enabled()


# determinism


@pytest.mark.parametrize("how", [{}, {"optimizer": "adamw", "lr": 0.001}, {"amp": "bf16"}, {"accumulate": 3}])
def test_the_same_seed_gives_the_same_weights(how: dict[str, Any]) -> None:
    def once(seed: int, kind: str) -> nn.Module:
        torch.rand(seed + 1)  # whatever was drawn before does not matter
        source = ArraySource(40, kind=kind)
        return run(model=convnet(dropout=0.3), source=source, seed=seed, **how)[0]

    for kind in ("indexed", "drawing"):
        one = once(0, kind)
        assert same(one, once(0, kind))
        assert not same(one, once(1, kind))


def test_bf16_is_chosen_where_the_processor_has_it() -> None:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    native = any(flag in flags for flag in ("avx512_bf16", "amx_bf16"))
    assert arithmetic("auto", torch.device("cpu")) is (torch.bfloat16 if native else None)
    with pytest.raises(UsageError, match="CUDA"):
        arithmetic("fp16", torch.device("cpu"))


# ends


def test_epochs_end_with_the_data_and_data_of_unknown_length_is_learnt() -> None:
    for known in (True, False):
        rates: list[float] = []

        class Rates(Hooks):
            def on_step_begin(self, step: Step, rates: list[float] = rates) -> None:
                rates.append(step.share)

        _, result = run(epochs=3, source=ArraySource(43, known=known), hooks=Rates())
        assert (result.steps, result.epochs) == (15, 3)
        later = [(1 + (i + 0.5) / 5) / 3 for i in range(10)]
        first = [(i + 0.5) / 15 for i in range(5)] if known else [0.5 / 3] * 5
        assert rates == pytest.approx(first + later)


@pytest.mark.parametrize("known", [True, False])
def test_less_data_than_a_batch_is_a_batch(known: bool) -> None:
    _, result = run(epochs=4, source=ArraySource(5, known=known))
    assert (result.steps, result.epochs) == (4, 4)


def test_a_time_budget_ends_in_time_and_moves_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(Hooks):
        now = 1000.0
        rates: list[float] = []

        def on_step_begin(self, step: Step) -> None:
            self.now += 3.0
            self.rates.append(step.lr)

    clock = Clock()
    monkeypatch.setattr("onnxprune.train.run.time.monotonic", lambda: clock.now)
    _, result = run(time_budget_s=30.0, hooks=clock, schedule="linear", warmup=0.2, lr=1.0)
    assert result.steps == 10 and result.seconds == 30.0
    assert clock.rates == pytest.approx([0, 0.5, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8], abs=1e-9)


def test_a_run_may_be_stopped_early() -> None:
    seen: list[int] = []
    _, result = run(should_stop=lambda: len(seen) >= 4, hooks=_Counting(seen))
    assert result.stopped and result.steps == 4


class _Counting(Hooks):
    def __init__(self, seen: list[int]) -> None:
        self.seen = seen

    def after_step(self, step: Step) -> None:
        self.seen.append(step.index)


@pytest.mark.parametrize("length", [{"steps": 12}, {"epochs": 3}])
def test_a_training_in_two_parts_is_as_long_as_one_and_meets_the_same_data_and_rates(
    tmp_path: Path, length: dict[str, int]
) -> None:
    """The optimizer starts anew, so the weights are others."""
    _, whole = run(log_file=tmp_path / "whole.jsonl", log_every=1, **length)
    student, parts, seen = convnet(), [], []
    source = ArraySource(40)
    source.before_batch = lambda epoch, number: seen.append((epoch, number))
    start = None
    for span in ((0.0, 0.6), (0.6, 1.0)):
        how = {"span": span, "start": start, "log_file": tmp_path / "parts.jsonl", "log_every": 1}
        _, result = run(model=student, source=source, **how, **length)
        parts.append(result)
        start = result.position
    assert [r.steps for r in parts] == [round(0.6 * whole.steps), whole.steps]
    assert parts[1].epochs == whole.epochs and parts[1].seconds > parts[0].seconds
    kept = [[(r["step"], r["epoch"], r["lr"]) for r in rows(tmp_path / f"{n}.jsonl")] for n in ("whole", "parts")]
    assert kept[0] == kept[1]
    assert sorted(set(seen)) == [(e, k) for e in range(3) for k in range(5)][: len(set(seen))]
    assert len(set(seen)) >= whole.steps


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_tensorboard_is_used_where_it_is_installed(tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorboard") is None:
        with pytest.raises(UsageError, match="tensorboard is not installed"):
            run(tensorboard=tmp_path / "board")
    else:
        run(tensorboard=tmp_path / "board")
        assert list((tmp_path / "board").iterdir())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"epochs": 2, "steps": 3}, "steps and epochs"),
        ({"steps": None}, "found none"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"lr": math.nan}, "lr must be above 0"),
        ({"warmup": 1.0}, "warmup must be within"),
        ({"accumulate": 9}, "can't be computed in 9 parts"),
        ({"optimizer": "lion"}, "sgd, adam, adamw"),
        ({"milestones": (0.5, 0.25)}, "milestones must rise"),
        ({"span": (0.5, 0.5)}, "a part of the training"),
        ({"seed": -1}, "seed"),
        ({"device": "tpu"}, "tpu"),
        ({"device": "cuda"}, "CUDA"),
    ],
)
def test_settings_that_make_no_sense(wrong: dict[str, Any], words: str) -> None:
    if wrong.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    with pytest.raises(UsageError, match=words):
        run(**wrong)


# failures


class _Bursting(Hooks):
    """Throws the weights away at one step, as often as asked."""

    def __init__(self, at: int, times: int, value: float = math.nan) -> None:
        self.at, self.times, self.value = at, times, value
        self.rates: list[tuple[int, float]] = []

    def on_step_begin(self, step: Step) -> None:
        self.rates.append((step.index, step.lr))

    def after_step(self, step: Step) -> None:
        if step.index == self.at and self.times:
            self.times -= 1
            with torch.no_grad():
                step.optimizer.param_groups[0]["params"][0].fill_(self.value)


@pytest.mark.parametrize("on_disk", [False, True])
def test_nan_goes_back_to_the_checkpoint_at_half_the_rate(tmp_path: Path, on_disk: bool) -> None:
    told: list[str] = []
    hooks = _Bursting(at=8, times=1)
    student, result = run(
        hooks=hooks,
        notify=told.append,
        checkpoint_every_steps=5,
        schedule="constant",
        warmup=0.0,
        run_dir=tmp_path / "run" if on_disk else None,
    )
    assert result.backoffs == 1 and result.steps == 12
    assert [index for index, _ in hooks.rates] == [*range(10), *range(5, 12)]
    assert {r for _, r in hooks.rates[:10]} == {0.05} and {r for _, r in hooks.rates[10:]} == {0.025}
    assert len(told) == 1 and "nan at step 10" in told[0] and "step 5" in told[0] and "0.5 of the rate" in told[0]
    # What follows is the run that has half the rate from step 5 on.
    expected, _ = run(hooks=_Halving(from_step=5), schedule="constant", warmup=0.0)
    assert same(student, expected)


class _Halving(Hooks):
    def __init__(self, from_step: int) -> None:
        self.from_step = from_step

    def on_step_begin(self, step: Step) -> None:
        for group in step.optimizer.param_groups:
            group["lr"] = 0.05 * (0.5 if step.index >= self.from_step else 1.0)


class Late(LossReader):
    """Gives losses out three steps late, as on CUDA."""

    def take(self, *, everything: bool = False) -> list[float]:
        keep = 0 if everything else 3
        return [float(self._waiting.popleft()[0]) for _ in range(len(self._waiting) - keep)]


def test_losses_that_arrive_late_change_nothing_but_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, one = run(checkpoint_every_steps=5)
    monkeypatch.setattr("onnxprune.train.run.LossReader", Late)
    rows: list[Any] = []
    student, other = run(checkpoint_every_steps=5, log_file=tmp_path / "log.csv", log_every=1, run_dir=tmp_path / "run")
    assert same(student, expected)
    assert (one.first_loss, one.last_loss, one.steps) == (other.first_loss, other.last_loss, other.steps)
    hooks = _Bursting(at=7, times=1)
    _, burst = run(hooks=hooks, checkpoint_every_steps=5, notify=rows.append)
    # Step 8 gives nan; at step 10 a checkpoint is due, for which all losses are waited for.
    assert burst.backoffs == 1 and [index for index, _ in hooks.rates] == [*range(10), *range(5, 12)]
    hooks = _Bursting(at=10, times=1)
    _, burst = run(hooks=hooks, checkpoint_every_steps=5, notify=rows.append)
    assert burst.backoffs == 1 and burst.steps == 12, "what arrives after the last step counts too"


def test_after_two_times_it_is_given_up() -> None:
    told: list[str] = []
    with pytest.raises(Diverged, match="nan at step 3, also after going back 2 times") as caught:
        run(hooks=_Bursting(at=1, times=9), notify=told.append)
    assert len(told) == 2 and caught.value.exit_code == 6 and "0.005" in caught.value.hint


def test_a_rate_that_is_far_too_high_is_divergence() -> None:
    class Explode(CrossEntropy):
        def __call__(self, outputs: Any, *, teacher: Any, targets: Any) -> torch.Tensor:
            return outputs["y"].square().mean()

    with pytest.raises(Diverged):
        run(
            model=convnet(norm=False),
            criterion=Explode(),
            lr=1e3,
            steps=500,
            schedule="constant",
            notify=lambda _: None,
        )


def test_no_checkpoint_holds_nan(tmp_path: Path) -> None:
    with pytest.raises(Diverged):
        run(hooks=_Bursting(at=3, times=9), checkpoint_every_steps=1, run_dir=tmp_path, notify=lambda _: None)
    for path in (tmp_path / "checkpoints").glob("*.pt"):
        weights = torch.load(path, weights_only=True)["network"]["weights"]
        assert all(bool(torch.isfinite(w).all()) for w in weights.values())


def test_nan_in_the_data_is_said_to_be_there() -> None:
    source = ArraySource(40)
    source.x[17, 1, 2, 3] = np.nan
    with pytest.raises(DataError, match=r"'x' holds nan in batch \d of epoch 0") as caught:
        run(source=source)
    assert not isinstance(caught.value, Diverged)


def test_a_model_with_nan_is_not_trained() -> None:
    student = convnet()
    with torch.no_grad():
        student[0].bias.fill_(math.nan)  # type: ignore[union-attr,operator]
    with pytest.raises(ModelRejected, match=r"'0\.bias' holds nan"):
        run(model=student)


def test_a_source_that_fails_leaves_a_checkpoint(tmp_path: Path) -> None:
    source = ArraySource(40)

    def fail(epoch: int, number: int) -> None:
        if (epoch, number) == (1, 2):
            raise OSError("the disk went away")

    source.before_batch = fail
    with pytest.raises(DataError, match="failed at batch 2 of epoch 1: OSError: the disk went away"):
        run(source=source, run_dir=tmp_path)
    whole, _ = run()
    rest, result = run(run_dir=tmp_path, resume=True)
    assert result.resumed_from == 7 and same(whole, rest)


def test_data_that_ends_at_once_or_on_its_second_pass() -> None:
    class Once(ArraySource):
        def batches(self, *args: Any, epoch: int, **more: Any) -> Any:
            return super().batches(*args, epoch=epoch, **more) if epoch == 0 else iter(())

    with pytest.raises(DataError, match="no batch in epoch 1"):
        run(source=ArraySource(0, known=False))
    with pytest.raises(DataError, match="no batch in epoch 2") as caught:
        run(source=Once(40))
    assert "read once" in caught.value.hint


def test_a_batch_without_the_inputs() -> None:
    class Other(ArraySource):
        def batches(self, *_: Any, **__: Any) -> Any:
            yield Arrays({"image": self.x}, {})

    with pytest.raises(DataError, match="it lacks x"):
        run(source=Other(8))


# signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_and_says_how_to_go_on(tmp_path: Path, number: signal.Signals) -> None:
    class Kill(Hooks):
        def on_step_begin(self, step: Step) -> None:
            if step.index == 6:
                os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt, match="stopped at step 7.*--resume"):
        run(hooks=Kill(), run_dir=tmp_path)
    assert signal.getsignal(number) is before
    whole, _ = run()
    rest, result = run(run_dir=tmp_path, resume=True)
    assert result.resumed_from == 7 and same(whole, rest)


def test_ctrl_c_while_waiting_for_data(tmp_path: Path) -> None:
    source = ArraySource(40)

    def block(epoch: int, number: int) -> None:
        time.sleep(0.03)  # slow enough to be fetched ahead
        if number == 3:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1.0)

    source.before_batch = block
    with pytest.raises(KeyboardInterrupt, match="stopped at step 3"):
        run(source=source, run_dir=tmp_path)
    whole, _ = run()
    rest, _ = run(run_dir=tmp_path, resume=True)
    assert same(whole, rest)


def test_every_error_is_one_of_ours() -> None:
    assert issubclass(Diverged, DataError) and issubclass(DataError, OnnxPruneError) and Diverged.exit_code == 6
    assert settings().decisive().keys() >= {"lr", "batch", "seed", "schedule"}
