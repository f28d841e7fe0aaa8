"""Evaluating model files: small models whose outputs are plain to see, on data held in memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxprune.data.source import Batch
from onnxprune.errors import DataError, ModelRejected, UsageError
from onnxprune.evaluate import METRICS, Metric, Predictor, evaluate, parse_metric
from tests.graphs import from_text

TOP1, MSE, PSNR, AGREEMENT = (METRICS[n] for n in ("top1", "mse", "psnr", "agreement"))

ONE_HOT = np.eye(3, dtype=np.float32)[[0, 1, 2, 1, 0]]  # five samples; the identity names classes 0, 1, 2, 1, 0
LABELS = np.array([0, 1, 2, 0, 0])


@dataclass
class Memory:
    """A source over arrays. served: the sizes of the batches that were asked for."""

    inputs: dict[str, np.ndarray]
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    served: list[int] = field(default_factory=list)
    description: str = "arrays"

    @property
    def size(self) -> int:
        return len(next(iter(self.inputs.values())))

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(self.labels)

    def batches(self, size: int, **options: Any) -> Iterator[Batch]:
        self.served.append(size)
        for k in range(0, self.size, size):
            yield Batch(*({n: x[k : k + size] for n, x in part.items()} for part in (self.inputs, self.labels)))


@pytest.fixture
def data() -> Memory:
    return Memory({"x": ONE_HOT}, {"label": LABELS})


def saved(folder: Path, model: onnx.ModelProto, name: str = "model.onnx") -> Path:
    path = folder / name
    onnx.save(model, path)
    return path


def product(folder: Path, w: object, *, batch: object = "N", name: str = "model.onnx") -> Path:
    """y = x w, three wide."""
    matrix = np.asarray(w, np.float32)
    text = f"(float[{batch},3] x) => (float[{batch},{matrix.shape[1]}] y) {{ y = MatMul(x, w) }}"
    return saved(folder, from_text(text, w=matrix), name)


@pytest.fixture
def identity(tmp_path: Path) -> Path:
    return product(tmp_path, np.eye(3))


# built-in metrics


def test_top1_of_a_file(identity: Path, data: Memory) -> None:
    assert evaluate(identity, data, TOP1) == 0.8
    assert evaluate(identity, data, TOP1, batch=2) == 0.8


def test_a_limit_counts_samples(identity: Path, data: Memory) -> None:
    assert evaluate(identity, data, TOP1, limit=4) == 0.75
    assert evaluate(identity, data, TOP1, limit=4, batch=3) == 0.75
    assert evaluate(identity, data, TOP1, limit=100) == 0.8


def test_the_data_is_streamed_no_further_than_the_limit(identity: Path) -> None:
    class Endless(Memory):
        def batches(self, size: int, **options: Any) -> Iterator[Batch]:
            while True:
                yield Batch({"x": ONE_HOT}, {"label": LABELS})

    assert evaluate(identity, Endless({"x": ONE_HOT}, {"label": LABELS}), TOP1, limit=10) == 0.8


def test_a_fixed_batch_size_is_kept(tmp_path: Path) -> None:
    """Of five samples in fours, the last has company that does not count."""
    data = Memory({"x": ONE_HOT}, {"label": np.array([0, 1, 2, 0, 1])})
    assert evaluate(product(tmp_path, np.eye(3), batch=4), data, TOP1, batch=64) == 0.6
    assert data.served == [4]


def test_errors_of_numbers(tmp_path: Path) -> None:
    data = Memory({"x": ONE_HOT}, {"y": ONE_HOT})
    assert evaluate(product(tmp_path, np.eye(3) * 3), data, MSE) == pytest.approx(4 / 3)  # one of three is 2 off
    assert evaluate(product(tmp_path, np.eye(3) * 0.7), data, PSNR) == pytest.approx(15.228787)  # 10 log10(3 / 0.09)


def test_agreement_of_classifiers(tmp_path: Path, identity: Path, data: Memory) -> None:
    swapped = product(tmp_path, [[0, 1, 0], [1, 0, 0], [0, 0, 1]], name="swapped.onnx")
    assert evaluate(swapped, data, AGREEMENT, original=identity) == 0.2  # only the third sample is of class 2
    assert evaluate(identity, data, AGREEMENT, original=identity) == 1.0
    assert evaluate(product(tmp_path, np.eye(3) * 7, name="scaled.onnx"), data, AGREEMENT, original=identity) == 1.0


def test_agreement_of_other_models(tmp_path: Path) -> None:
    data = Memory({"x": np.array([[[0.0, 8.0]]], np.float32)})
    text = "(float[N,1,2] x) => (float[N,1,2] y) { y = Add(x, c) }"
    original = saved(tmp_path, from_text(text, c=np.zeros(1, np.float32)), "original.onnx")
    moved = saved(tmp_path, from_text(text, c=np.ones(1, np.float32)))
    # off by (1, 1), where the original lies (-4, 4) from its mean
    assert evaluate(moved, data, AGREEMENT, original=original) == pytest.approx(0.75)


def test_the_output_is_chosen(tmp_path: Path, data: Memory) -> None:
    model = saved(
        tmp_path,
        from_text(
            """(float[N,3] x) => (int64[N,1] first, float[N,3] zero, float[N,3] y) {
            first = ArgMax<axis=1>(x) zero = Sub(x, x) y = Identity(x) }"""
        ),
    )
    assert evaluate(model, data, TOP1) == 0.6  # 'zero', the first with floats, which always says 0
    assert evaluate(model, data, TOP1, output="y") == 0.8
    assert evaluate(model, data, TOP1, output="first") == 0.8
    assert evaluate(model, Memory({"x": ONE_HOT}, {"other": LABELS - 9, "y": LABELS}), TOP1) == 0.8  # by name
    with pytest.raises(UsageError, match=r"'z' is no output of model.onnx") as caught:
        evaluate(model, data, TOP1, output="z")
    assert caught.value.hint == "it has 'first', 'zero', 'y'"
    with pytest.raises(UsageError, match="none of the targets 'a', 'b' is called as output 'zero'"):
        evaluate(model, Memory({"x": ONE_HOT}, {"a": LABELS, "b": LABELS}), TOP1)


def test_what_a_metric_needs_is_asked_for(identity: Path, data: Memory) -> None:
    with pytest.raises(UsageError, match="metric 'top1' needs data"):
        evaluate(identity, None, TOP1)
    with pytest.raises(UsageError, match="'mse' needs targets and the data has none"):
        evaluate(identity, Memory({"x": ONE_HOT}), MSE)
    with pytest.raises(UsageError, match="'agreement' needs the original"):
        evaluate(identity, data, AGREEMENT)
    with pytest.raises(DataError, match="no sample"):
        evaluate(identity, Memory({"x": ONE_HOT[:0]}, {"label": LABELS[:0]}), TOP1)
    with pytest.raises(ModelRejected, match="onnxruntime can't load"):
        evaluate(identity.with_name("none.onnx"), data, TOP1)


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({"z": ONE_HOT}, "model.onnx expects inputs 'x', found 'z'"),
        ({"x": np.ones((5, 4), np.float32)}, r"can't be run on 'x' float32 \(5,4\)"),
        ({"x": np.ones((5, 3), complex)}, "expects float32 in input 'x', found complex128"),
    ],
)
def test_inputs_that_do_not_fit_are_named(identity: Path, inputs: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(DataError, match=message):
        evaluate(identity, Memory(inputs, {"label": LABELS}), TOP1)


# predict


def test_a_predictor_takes_any_number_of_samples(tmp_path: Path) -> None:
    predict = Predictor(product(tmp_path, np.eye(3) * 2, batch=4))
    for count in (1, 4, 9):
        x = np.arange(count * 3, dtype=np.float64).reshape(count, 3)  # float64 is made the model's float32
        found = predict({"x": x})
        assert list(found) == ["y"] and found["y"].dtype == np.float32
        np.testing.assert_array_equal(found["y"], x * 2)


def test_rows_per_sample_are_told_apart_and_sums_over_a_batch_are_not(tmp_path: Path) -> None:
    """A model with two rows per sample, as detectors have."""
    text = "(float[2,4] x) => (float[4,2] y, float s) { y = Reshape(x, to) s = ReduceSum<keepdims=0>(x) }"
    predict = Predictor(saved(tmp_path, from_text(text, to=np.array([4, 2]))))
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.testing.assert_array_equal(predict.run({"x": x}, "y"), x.reshape(6, 2))
    with pytest.raises(DataError, match="takes 2 samples at a time, and output 's'"):
        predict.run({"x": x}, "s")


# callables of the user


HOOK = """
import numpy as np

x = np.eye(3, dtype=np.float32)

def diagonal(predict):
    return predict({"x": x})["y"].trace()

def right(predict, batches):
    found = [(predict(b.inputs)["y"].argmax(1) == b.targets["label"]) for b in batches]
    return np.concatenate(found).mean()
right.is_fraction = True

def error(predict):
    return np.float32(0.25)
error.lower_is_better = True

class Thing:
    def __call__(self, predict):
        return 3
thing = Thing()

def scaled(predict, factor=2.0):
    return factor

def either(predict, batches=None):
    return 0 if batches is None else len(list(batches))

def raises(predict):
    return predict({"x": x})["z"]

def refused(predict):
    return predict({"wrong": x})["y"]

def leaves(predict):
    raise SystemExit(0)

def nothing(predict):
    pass

def nan(predict):
    return float("nan")
"""


def line(text: str) -> int:
    """Where it stands in the user's file."""
    return next(k for k, found in enumerate(HOOK.splitlines(), 1) if text in found)


@pytest.fixture
def hooks(tmp_path: Path) -> Path:
    path = tmp_path / "mymetric.py"
    path.write_text(HOOK)
    return path


def hooked(hooks: Path, name: str) -> Metric:
    return parse_metric(f"{hooks}:{name}")


def test_a_callable_gets_predict_and_the_batches_where_it_takes_them(hooks: Path, identity: Path, data: Memory) -> None:
    assert evaluate(identity, None, hooked(hooks, "diagonal")) == 3.0
    assert evaluate(identity, data, hooked(hooks, "diagonal")) == 3.0
    assert evaluate(identity, data, hooked(hooks, "right")) == 0.8
    assert evaluate(identity, data, hooked(hooks, "right"), limit=4, batch=3) == 0.75
    assert evaluate(identity, None, hooked(hooks, "thing")) == 3.0
    assert evaluate(identity, data, hooked(hooks, "scaled")) == 2.0
    assert evaluate(identity, None, hooked(hooks, "either")) == 0.0
    assert evaluate(identity, data, hooked(hooks, "either"), batch=2) == 3.0
    with pytest.raises(UsageError, match="mymetric.py:right' wants the batches"):
        evaluate(identity, None, hooked(hooks, "right"))


def test_a_callable_says_what_its_number_means(hooks: Path) -> None:
    plain, error, right = (hooked(hooks, n) for n in ("diagonal", "error", "right"))
    assert plain.higher_is_better and not plain.is_fraction
    assert not error.higher_is_better
    assert right.higher_is_better and right.is_fraction


@pytest.mark.parametrize(
    "name, message",
    [
        ("raises", r"mymetric.py:raises' failed: KeyError: 'z' \(.*mymetric.py, line %d\)" % line('["z"]')),
        ("leaves", r"mymetric.py:leaves' failed: SystemExit: 0 \(.*mymetric.py, line %d\)" % line("SystemExit")),
        ("refused", "model.onnx expects inputs 'x', found 'wrong'"),
        ("nothing", "mymetric.py:nothing' should return a number, it returned NoneType"),
        ("nan", "mymetric.py:nan' returned nan"),
    ],
)
def test_a_callable_that_fails_is_named(hooks: Path, identity: Path, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        evaluate(identity, None, hooked(hooks, name))


def test_torch_is_not_needed() -> None:
    code = "import sys, onnxprune.evaluate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
