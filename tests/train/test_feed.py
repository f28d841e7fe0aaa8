"""Batches as tensors: one ahead, in order, without hangs, and the same after a restart."""

from __future__ import annotations

import threading
import time
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from onnxprune.errors import DataError
from onnxprune.train.feed import Feed, HostBatch, Interrupted
from tests.train.runs import Arrays, ArraySource


def feed(source: Any, **more: Any) -> Feed:
    return Feed(source, **({"batch": 4, "seed": 1, "input_names": ["x"]} | more))


def rest(opened: Feed) -> list[torch.Tensor]:
    found = []
    while (batch := opened.next()) is not None:
        found.append(batch.inputs["x"])
    return found


def test_batches_come_in_order_and_one_ahead() -> None:
    source = ArraySource(40)
    made: list[tuple[int, str]] = []
    source.before_batch = lambda epoch, number: made.append((number, threading.current_thread().name))
    one = feed(source)
    one.open(0)
    for _ in range(4):
        assert one.next() is not None
    deadline = time.monotonic() + 5
    while len(made) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert [number for number, _ in made] == [0, 1, 2, 3, 4], "not more than one ahead"
    assert made[-1][1] == "onnxprune-data"
    one.close()
    expected = [
        b.inputs["x"]
        for b in source.batches(4, epoch=0, seed=1, shuffle=True, start=0, rank=0, world=1, drop_last=True)
    ]
    again = feed(source)
    again.open(0)
    np.testing.assert_array_equal(np.stack(rest(again)), np.stack(expected))


@pytest.mark.parametrize("kind", ["indexed", "drawing"])
@pytest.mark.parametrize("start", [0, 1, 2, 5])
def test_an_epoch_goes_on_in_its_middle(kind: str, start: int) -> None:
    whole = feed(ArraySource(40, kind=kind))
    whole.open(2)
    for _ in range(start):
        whole.next()
    from onnxprune.train.feed import host_generators

    states = host_generators()
    expected = rest(whole)
    np.random.seed(99)
    torch.manual_seed(99)
    again = feed(ArraySource(40, kind=kind))
    again.open(2, start, states)
    found = rest(again)
    assert len(found) == 10 - start
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_a_source_that_draws_stays_in_step_and_another_does_not() -> None:
    for kind, in_step in (("indexed", False), ("drawing", True)):
        one = feed(ArraySource(40, kind=kind))
        one.open(0)
        for _ in range(3):
            one.next()
        assert one.in_step is in_step
        one.close()


def test_a_model_that_draws_keeps_the_source_in_step() -> None:
    one = feed(ArraySource(40))
    one.open(0)
    for _ in range(3):
        one.next()
        torch.rand(1)
    assert one.in_step


class Failing(ArraySource):
    def __init__(self, error: BaseException, at: int) -> None:
        super().__init__(40)

        def fail(epoch: int, number: int) -> None:
            if number == at:
                raise error

        self.before_batch = fail


@pytest.mark.parametrize("at", [0, 1, 2, 6])
@pytest.mark.parametrize("error", [ZeroDivisionError("1/0"), SystemExit(3)])
def test_what_a_source_raises_comes_out_in_its_turn(at: int, error: BaseException) -> None:
    one = feed(Failing(error, at))
    one.open(0)
    for _ in range(at):
        assert one.next() is not None
    expected: Any = DataError if isinstance(error, Exception) or at > 1 else SystemExit
    begun = time.monotonic()
    with pytest.raises(expected) as caught:
        one.next()
    assert time.monotonic() - begun < 2
    if expected is DataError:
        assert f"batch {at} of epoch 0" in str(caught.value) and type(error).__name__ in str(caught.value)
    one.close()


def test_data_errors_pass_unchanged() -> None:
    error = DataError("row 7 is odd", "even it")
    one = feed(Failing(error, 5))
    one.open(0)
    with pytest.raises(DataError) as caught:
        rest(one)
    assert caught.value is error


def test_a_wait_for_data_can_be_broken_off() -> None:
    source, stop = ArraySource(40), threading.Event()
    gate = threading.Event()

    def block(epoch: int, number: int) -> None:
        if number == 3:
            stop.set()
            gate.wait(20)

    source.before_batch = block
    one = feed(source, interrupted=stop.is_set)
    one.open(0)
    begun = time.monotonic()
    with pytest.raises(Interrupted):
        rest(one)
    assert time.monotonic() - begun < 5
    gate.set()
    one.close()


def test_tensors_are_copies_in_native_types() -> None:
    class Odd(ArraySource):
        def batches(self, *_: Any, **__: Any) -> Any:
            self.x = np.arange(8, dtype=">f4").reshape(4, 2)
            half = np.array([1.5, -2.0, 3.0, 4.0]).astype(ml_dtypes.bfloat16)
            yield Arrays({"x": self.x[:, ::-1]}, {"half": half, "flag": np.array([True] * 4)})

    source = Odd(4)
    one = feed(source)
    one.open(0)
    batch = one.next()
    assert isinstance(batch, HostBatch) and batch.samples == 4
    source.x[:] = 0
    assert batch.inputs["x"].tolist() == [[1, 0], [3, 2], [5, 4], [7, 6]]
    assert batch.targets["half"].dtype is torch.bfloat16 and batch.targets["half"].tolist() == [1.5, -2.0, 3.0, 4.0]
    assert batch.targets["flag"].dtype is torch.bool


def test_text_and_missing_inputs_are_told() -> None:
    class Text(ArraySource):
        def batches(self, *_: Any, **__: Any) -> Any:
            yield Arrays({"x": np.array(["a", "b"])}, {})

    for names, words in ((["x"], "'x' should hold numbers"), (["x", "mask"], "it lacks mask")):
        one = feed(Text(4), input_names=names)
        one.open(0)
        with pytest.raises(DataError, match=words):
            one.next()
