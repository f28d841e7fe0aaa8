"""Losses against numbers worked out by hand: ln 2 = 0.6931472, ln 3 = 1.0986123, ln 9 = 2.1972246."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from onnxprune.errors import DataError, UsageError  # noqa: E402
from onnxprune.model.outputs import OutputKind  # noqa: E402
from onnxprune.train.loss import Criterion, criterion, pair_targets  # noqa: E402

LOGITS = OutputKind("y", "logits", (1,))
PROBABILITIES = OutputKind("y", "probabilities", (1,))
LOG_PROBABILITIES = OutputKind("y", "probabilities", (1,), log=True)
SIGMOID = OutputKind("y", "sigmoid", (1,))
VALUES = OutputKind("y", "values")
CHANNELS = OutputKind("y", "values", (1,))
LABELS = OutputKind("label", "discrete")

ONE_COLUMN_EACH = torch.tensor([[1.0, 2.0], [-1.0, -2.0]]).repeat(8, 1)  # variances 1 and 4
LN3, LN9 = math.log(3), math.log(9)


def loss(criterion: Criterion, y: object, *, teacher: object = None, **targets: object) -> float:
    def tensor(x: object) -> torch.Tensor:
        return x if isinstance(x, torch.Tensor) else torch.tensor(x)

    return float(
        criterion(
            {"y": tensor(y)},
            teacher=None if teacher is None else {"y": tensor(teacher)},
            targets={n: tensor(t) for n, t in targets.items()},
        )
    )


# distillation


def test_probabilities_are_compared_by_their_divergence() -> None:
    # 1/4 ln(1/2) + 3/4 ln(3/2)
    auto = criterion("auto", outputs=[PROBABILITIES], temperature=1)
    assert loss(auto, [[0.5, 0.5]], teacher=[[0.25, 0.75]]) == pytest.approx(0.1308120, abs=1e-6)
    log = criterion("auto", outputs=[LOG_PROBABILITIES], temperature=1)
    got = loss(log, torch.tensor([[0.5, 0.5]]).log(), teacher=torch.tensor([[0.25, 0.75]]).log())
    assert got == pytest.approx(0.1308120, abs=1e-6)


def test_at_temperature_two_probabilities_become_square_roots_and_the_divergence_counts_fourfold() -> None:
    # (1/10, 9/10) is 1 : 9, at temperature 2 so 1 : 3, that is (1/4, 3/4) as above
    auto = criterion("auto", outputs=[PROBABILITIES], temperature=2)
    assert loss(auto, [[0.5, 0.5]], teacher=[[0.1, 0.9]]) == pytest.approx(4 * 0.1308120, abs=4e-6)


def test_logits_add_squared_errors_which_see_what_a_divergence_does_not() -> None:
    auto = criterion("auto", outputs=[LOGITS], temperature=2)
    auto.calibrate([{"y": ONE_COLUMN_EACH}])
    # the divergence as above, and (0 / 1 + (ln 9)^2 / 4) / 2 = 0.6034745
    assert loss(auto, [[0.0, 0.0]], teacher=[[0.0, LN9]]) == pytest.approx(0.5232481 + 0.6034745, abs=1e-5)
    # a common offset of 1, to which a softmax is blind: (1 / 1 + 1 / 4) / 2
    assert loss(auto, [[1.0, LN9 + 1]], teacher=[[0.0, LN9]]) == pytest.approx(0.625, abs=1e-5)


def test_match_takes_squared_errors_alone() -> None:
    match = criterion("match", outputs=[LOGITS])
    match.calibrate([{"y": ONE_COLUMN_EACH}])
    assert loss(match, [[0.0, 0.0]], teacher=[[0.0, LN9]]) == pytest.approx(0.6034745, abs=1e-6)


def test_errors_of_values_count_relative_to_the_originals_variance() -> None:
    whole = criterion("auto", outputs=[VALUES])
    whole.calibrate([{"y": torch.tensor([[0.0, 6.0]]).repeat(8, 1)}])  # variance 9
    assert loss(whole, [[1.0, 6.0]], teacher=[[0.0, 6.0]]) == pytest.approx(1 / 9 / 2)
    channels = criterion("auto", outputs=[CHANNELS])
    channels.calibrate([{"y": ONE_COLUMN_EACH}])
    assert loss(channels, [[3.0, 2.0]], teacher=[[0.0, 0.0]]) == pytest.approx((9 / 1 + 4 / 4) / 2)


def test_channels_lie_along_their_axis() -> None:
    auto = criterion("auto", outputs=[OutputKind("y", "values", (1,))])
    image = ONE_COLUMN_EACH.T.reshape(1, 2, 4, 4)  # channel 0 has variance 1, channel 1 variance 4
    auto.calibrate([{"y": image}])
    moved = image.clone()
    moved[:, 1] += 2
    assert loss(auto, moved, teacher=image) == pytest.approx((0 + 4 / 4) / 2)


def test_a_channel_that_never_changes_does_not_explode() -> None:
    auto = criterion("auto", outputs=[CHANNELS])
    still = ONE_COLUMN_EACH.clone()
    still[:, 1] = 0.0
    auto.calibrate([{"y": still}])
    # variance 1 and a hundredth of it: 0.1 off in the second is 0.01 / 0.01
    assert loss(auto, [[0.0, 0.1]], teacher=[[0.0, 0.0]]) == pytest.approx(0.5)
    constant = criterion("auto", outputs=[VALUES])
    constant.calibrate([{"y": torch.full((16, 2), 5.0)}])
    # the floor is 1e-4 of the mean square 25: 0.05 off is 0.0025 / 0.0025
    assert loss(constant, [[5.05, 5.05]], teacher=[[5.0, 5.0]]) == pytest.approx(1.0, rel=1e-4)
    nothing = criterion("auto", outputs=[VALUES])
    nothing.calibrate([{"y": torch.zeros(16, 2)}])
    assert loss(nothing, [[0.5, 0.5]], teacher=[[0.0, 0.0]]) == pytest.approx(0.25)


def test_outputs_weigh_the_same_and_discrete_ones_nothing() -> None:
    a, b = OutputKind("a", "values"), OutputKind("b", "probabilities", (1,))
    auto = criterion("auto", outputs=[a, LABELS, b], temperature=1)
    auto.calibrate([{"a": torch.tensor([[-1.0, 1.0]]).repeat(8, 1), "b": torch.ones(1, 2) / 2}])
    got = auto(
        {"a": torch.tensor([[1.0]]), "b": torch.tensor([[0.5, 0.5]]), "label": torch.tensor([1])},
        teacher={"a": torch.tensor([[0.0]]), "b": torch.tensor([[0.25, 0.75]]), "label": torch.tensor([2])},
    )
    assert float(got) == pytest.approx((1.0 + 0.1308120) / 2, abs=1e-6)


def test_a_softmax_over_channels_is_a_distribution_per_pixel() -> None:
    auto = criterion("auto", outputs=[PROBABILITIES], temperature=1)
    teacher = torch.tensor([0.25, 0.75]).reshape(1, 2, 1, 1).expand(1, 2, 2, 1)
    student = teacher.clone()
    student[0, :, 1, 0] = 0.5  # one of two pixels
    assert loss(auto, student, teacher=teacher) == pytest.approx(0.1308120 / 2, abs=1e-6)


def test_an_old_softmax_over_several_axes_is_one_distribution() -> None:
    auto = criterion("auto", outputs=[OutputKind("y", "probabilities", (1, 2))], temperature=1)
    # 1/2 ln 2 + 2 * 1/4 ln 1 + 0
    got = loss(auto, torch.full((1, 2, 2), 0.25), teacher=[[[0.5, 0.25], [0.25, 0.0]]])
    assert got == pytest.approx(0.3465736, abs=1e-6)


def test_a_class_that_is_masked_out_gives_no_nan() -> None:
    auto = criterion("auto", outputs=[LOG_PROBABILITIES], temperature=1)
    student = torch.tensor([[math.log(0.5), math.log(0.5), -math.inf]], requires_grad=True)
    value = auto({"y": student}, teacher={"y": torch.tensor([[math.log(0.25), math.log(0.75), -math.inf]])})
    value.backward()
    assert value.item() == pytest.approx(0.1308120, abs=1e-6)
    assert student.grad is not None and torch.isfinite(student.grad).all()


def test_without_calibration_the_first_batch_decides_and_stays() -> None:
    auto = criterion("auto", outputs=[CHANNELS])
    assert loss(auto, ONE_COLUMN_EACH + 1, teacher=ONE_COLUMN_EACH) == pytest.approx((1 + 1 / 4) / 2)
    assert loss(auto, [[1.0, 1.0]], teacher=[[0.0, 0.0]]) == pytest.approx((1 + 1 / 4) / 2)


def test_of_a_few_samples_channels_are_not_told_apart() -> None:
    auto = criterion("auto", outputs=[CHANNELS])
    auto.calibrate([{"y": torch.tensor([[0.0, 4.0]])}])  # per channel it would be 0: variance 4 of both numbers
    assert loss(auto, [[2.0, 2.0]], teacher=[[0.0, 0.0]]) == pytest.approx(1.0)


def test_calibration_sums_up_over_batches() -> None:
    auto = criterion("auto", outputs=[VALUES])
    auto.calibrate([{"y": torch.zeros(5, 1)}, {"y": torch.full((15, 1), 4.0)}])  # mean 3, variance (5*9 + 15*1) / 20
    assert float(auto.state_dict()["y"]) == pytest.approx(3.0)


def test_a_checkpoint_carries_the_variances() -> None:
    first = criterion("auto", outputs=[CHANNELS])
    first.calibrate([{"y": ONE_COLUMN_EACH}])
    second = criterion("auto", outputs=[CHANNELS])
    second.load_state_dict(first.state_dict())
    assert loss(second, [[3.0, 2.0]], teacher=[[0.0, 0.0]]) == pytest.approx(5.0)
    other = criterion("auto", outputs=[OutputKind("z", "values")])
    with pytest.raises(DataError, match="outputs 'y', this one has 'z'"):
        other.load_state_dict(first.state_dict())


def test_an_original_that_gives_nan_is_refused() -> None:
    auto = criterion("auto", outputs=[VALUES])
    with pytest.raises(DataError, match="no finite numbers in output 'y'"):
        auto.calibrate([{"y": torch.tensor([[1.0, math.nan]])}])
    with pytest.raises(DataError, match="no sample"):
        auto.calibrate([])


def test_outputs_of_other_shapes_than_the_originals_are_refused() -> None:
    auto = criterion("auto", outputs=[VALUES])
    with pytest.raises(DataError, match=r"'y' is \(1,2\), the original's is \(1,3\)"):
        loss(auto, [[1.0, 2.0]], teacher=[[1.0, 2.0, 3.0]])


# losses on targets


@pytest.mark.parametrize(
    "kind, output",
    [
        (LOGITS, [[0.0, LN3], [0.0, LN3]]),
        (VALUES, [[5.0, 5 + LN3], [-1.0, LN3 - 1]]),
        (PROBABILITIES, [[0.25, 0.75], [0.25, 0.75]]),
        (LOG_PROBABILITIES, [[math.log(0.25), math.log(0.75)], [math.log(0.25), math.log(0.75)]]),
    ],
)
def test_cross_entropy_of_class_indices(kind: OutputKind, output: list[list[float]]) -> None:
    ce = criterion("ce", outputs=[kind])
    # (ln 4/3 + ln 4) / 2
    assert loss(ce, output, label=[1, 0]) == pytest.approx(0.8369882, abs=1e-6)
    assert loss(ce, output, label=[[1], [0]]) == pytest.approx(0.8369882, abs=1e-6)
    assert loss(ce, output, label=torch.tensor([1, 0], dtype=torch.uint8)) == pytest.approx(0.8369882, abs=1e-6)


def test_cross_entropy_of_soft_targets() -> None:
    ce = criterion("ce", outputs=[LOGITS])
    assert loss(ce, [[0.0, LN3]], label=[[0.5, 0.5]]) == pytest.approx(0.8369882, abs=1e-6)
    assert loss(ce, [[0.0, LN3]], label=[[0, 1]]) == pytest.approx(0.2876821, abs=1e-6)


def test_cross_entropy_of_an_image_is_per_pixel() -> None:
    ce = criterion("ce", outputs=[OutputKind("y", "values", (1,))])
    image = torch.tensor([[[[0.0, 0.0]], [[LN3, LN3]]]])  # (1, 2 classes, 1, 2 pixels)
    assert loss(ce, image, mask=[[[1, 0]]]) == pytest.approx(0.8369882, abs=1e-6)
    last = criterion("ce", outputs=[OutputKind("y", "values", (3,))])
    assert loss(last, image.permute(0, 2, 3, 1), mask=[[[1, 0]]]) == pytest.approx(0.8369882, abs=1e-6)


def test_positions_without_a_class_add_nothing() -> None:
    ce = criterion("ce", outputs=[LOGITS])
    assert loss(ce, [[0.0, LN3], [0.0, 9.0]], label=[1, -100]) == pytest.approx(0.2876821 / 2, abs=1e-6)


def test_binary_cross_entropy() -> None:
    on_logits = criterion("bce", outputs=[VALUES])
    assert loss(on_logits, [[0.0], [LN3]], t=[[1.0], [0.0]]) == pytest.approx((0.6931472 + 1.3862944) / 2, abs=1e-6)
    on_sigmoids = criterion("bce", outputs=[SIGMOID])
    assert loss(on_sigmoids, [[0.8], [0.8]], t=[1, 0]) == pytest.approx((0.2231436 + 1.6094379) / 2, abs=1e-6)


def test_squared_and_absolute_error() -> None:
    assert loss(criterion("mse", outputs=[VALUES]), [[1.0], [2.0]], t=[3.0, 5.0]) == pytest.approx(6.5)
    assert loss(criterion("l1", outputs=[VALUES]), [[1.0], [2.0]], t=[3, 5]) == pytest.approx(2.5)


def test_distillation_is_added_with_its_weight() -> None:
    both = criterion("ce", outputs=[PROBABILITIES], distill=0.5, temperature=1)
    assert both.needs_teacher and both.needs_targets
    got = loss(both, [[0.5, 0.5]], teacher=[[0.25, 0.75]], label=[1])
    assert got == pytest.approx(0.6931472 + 0.5 * 0.1308120, abs=1e-6)


def test_beside_a_regression_logits_are_matched_as_numbers() -> None:
    both = criterion("mse", outputs=[LOGITS], distill=2.0)
    both.calibrate([{"y": ONE_COLUMN_EACH}])
    got = loss(both, [[0.0, 0.0]], teacher=[[0.0, LN9]], t=[[0.0, 1.0]])
    assert got == pytest.approx(0.5 + 2 * 0.6034745, abs=1e-5)


def test_targets_belong_to_outputs_of_their_name() -> None:
    a, b = OutputKind("a", "values"), OutputKind("b", "values")
    mse = criterion("mse", outputs=[a, b], targets=["b", "a"])
    outputs = {"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([0.0, 0.0])}
    got = mse(outputs, targets={"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([0.0, 0.0])})
    assert float(got) == pytest.approx(1.0)  # (2 + 0) / 2
    assert pair_targets([a, b], ["b"]) == {"b": b}
    assert pair_targets([LABELS, b], ["anything"]) == {"anything": b}
    with pytest.raises(UsageError, match="targets 'label' and outputs 'a', 'b' do not pair up"):
        criterion("mse", outputs=[a, b], targets=["label"])
    with pytest.raises(UsageError, match="the data has none"):
        criterion("mse", outputs=[a], targets=[])
    with pytest.raises(UsageError, match="do not pair up"):  # found out with the first batch
        criterion("mse", outputs=[a, b])(outputs, targets={"label": torch.zeros(2)})
    with pytest.raises(DataError, match="expects targets 'b', 'a', found 'a'"):
        mse(outputs, targets={"a": torch.zeros(2)})


@pytest.mark.parametrize(
    "spec, kind, output, target, message",
    [
        ("ce", LOGITS, [[0.0, 1.0]], [5], "holds class 5, the output has classes 0 to 1"),
        ("ce", LOGITS, [[0.0, 1.0]], [1.0], r"integer class indices, .* 'y' \(1,2\); found float32 \(1\)"),
        ("ce", LOGITS, [[0.0, 1.0]], [1, 0, 1], r"'y' \(1,2\); found int64 \(3\)"),
        ("ce", VALUES, [[0.3], [0.4]], [[1], [0]], "integer class indices"),
        ("bce", LOGITS, [[0.0, 1.0]], [[0.0, 3.0]], "within 0 to 1, found 0 to 3"),
        ("bce", LOGITS, [[0.0, 1.0]], [1], r"'t' should be \(1,2\) as output 'y', found \(1\)"),
        ("mse", VALUES, [[0.0, 1.0]], [[0.0], [1.0]], r"'t' should be \(1,2\) as output 'y', found \(2,1\)"),
        ("l1", VALUES, [[0.0, 1.0]], [1.0], r"'t' should be \(1,2\) as output 'y', found \(1\)"),
    ],
)
def test_targets_that_do_not_fit_are_named(
    spec: str, kind: OutputKind, output: object, target: object, message: str
) -> None:
    if spec == "mse":
        target = torch.zeros(3, 1)
        message = message.replace("2,1", "3,1")
    with pytest.raises(DataError, match=message):
        loss(criterion(spec, outputs=[kind]), output, t=target)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: criterion("hinge", outputs=[LOGITS]), "'hinge' is no loss"),
        (lambda: criterion("auto", outputs=[LABELS]), "no output can be learnt from: 'label'"),
        (lambda: criterion("auto", outputs=[LOGITS], distill=1.0), "is that already"),
        (lambda: criterion("ce", outputs=[LOGITS], distill=-1.0), "--distill -1.0"),
        (lambda: criterion("ce", outputs=[LOGITS], distill=math.nan), "--distill nan"),
        (lambda: criterion("auto", outputs=[LOGITS], temperature=0.0), "temperature of 0.0"),
        (lambda: criterion("ce", outputs=[SIGMOID], targets=["t"]), "is a sigmoid"),
        (lambda: criterion("bce", outputs=[PROBABILITIES], targets=["t"]), "is a softmax"),
    ],
)
def test_impossible_choices_are_refused_at_once(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


# all of them


BATCHES = {
    "auto logits": (criterion("auto", outputs=[LOGITS]), (8, 3), None),
    "auto values": (criterion("auto", outputs=[CHANNELS]), (8, 3, 2), None),
    "match": (criterion("match", outputs=[LOGITS]), (8, 3), None),
    "ce": (criterion("ce", outputs=[LOGITS], distill=1.0), (8, 3), torch.tensor([0, 2, 1, -1, 1, 0, 2, -1])),
    "bce": (criterion("bce", outputs=[VALUES]), (8, 3), torch.rand(8, 3, generator=torch.Generator().manual_seed(3))),
    "mse": (criterion("mse", outputs=[VALUES]), (8, 3), torch.ones(8, 3)),
    "l1": (criterion("l1", outputs=[VALUES]), (8, 3), torch.ones(8, 3)),
}


@pytest.mark.parametrize("name", BATCHES)
def test_the_mean_over_shards_is_the_loss_of_the_batch(name: str) -> None:
    function, shape, target = BATCHES[name]
    seeded = torch.Generator().manual_seed(7)
    student, teacher = (torch.randn(shape, generator=seeded, dtype=torch.float64) for _ in range(2))
    if function.needs_teacher:
        function.calibrate([{"y": teacher}])
    whole = loss(function, student, teacher=teacher, t=torch.zeros(()) if target is None else target)
    parts = [
        loss(function, student[k : k + 2], teacher=teacher[k : k + 2], t=0.0 if target is None else target[k : k + 2])
        for k in range(0, 8, 2)
    ]
    assert sum(parts) / 4 == pytest.approx(whole, rel=1e-9)
    assert max(parts) - min(parts) > 1e-3  # the shards are not alike


@pytest.mark.parametrize("name", BATCHES)
def test_gradients_are_those_of_differences(name: str) -> None:
    function, shape, target = BATCHES[name]
    seeded = torch.Generator().manual_seed(7)
    student, teacher = (torch.randn(shape, generator=seeded, dtype=torch.float64) for _ in range(2))
    if function.needs_teacher:
        function.calibrate([{"y": teacher}])
    targets = {} if target is None else {"t": target}
    assert torch.autograd.gradcheck(
        lambda y: function({"y": y}, teacher={"y": teacher}, targets=targets), (student.requires_grad_(),)
    )


def test_half_precision_is_computed_in_float32() -> None:
    auto = criterion("auto", outputs=[LOGITS], temperature=2)
    auto.calibrate([{"y": ONE_COLUMN_EACH}])
    student = torch.zeros(1, 2, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = auto({"y": student}, teacher={"y": torch.tensor([[0.0, 2.0]], dtype=torch.bfloat16)})
    assert value.dtype == torch.float32
    # softmax(0, 1) = (0.2689414, 0.7310586): 4 (0.2689414 ln 0.5378828 + 0.7310586 ln 1.4621172), and (4 / 4) / 2
    assert value.item() == pytest.approx(4 * 0.1109441 + 0.5, abs=1e-5)
    value.backward()
    assert student.grad is not None and student.grad.dtype == torch.bfloat16 and student.grad.abs().min() > 0


@pytest.mark.parametrize("spec", ["auto", "match", "ce", "bce", "mse", "l1"])
def test_no_step_waits_for_a_gpu(spec: str) -> None:
    """On a device that has no values, which raises where one is asked for."""
    function = criterion(spec, outputs=[LOGITS], distill=0.0 if spec in ("auto", "match") else 1.0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        function.load_state_dict({"y": torch.ones(3)})
        y, teacher = (torch.empty(8, 3, device="cuda") for _ in range(2))
        target = torch.empty(8, dtype=torch.int64, device="cuda") if spec == "ce" else teacher
        found = function({"y": y}, teacher={"y": teacher}, targets={"t": target})
        assert found.device.type == "cuda" and found.shape == ()
        with pytest.raises(RuntimeError):
            float(found)


def test_nothing_flows_into_the_original() -> None:
    auto = criterion("auto", outputs=[VALUES])
    teacher = torch.randn(16, 2, requires_grad=True)
    auto({"y": torch.randn(16, 2, requires_grad=True)}, teacher={"y": teacher}).backward()
    assert teacher.grad is None


# callables of the user


HOOK = """
import torch

def plain(outputs, targets):
    return ((outputs["y"] - targets["t"]) ** 2).sum()

def with_teacher(outputs, targets, teacher):
    return (outputs["y"] - teacher["y"]).abs().sum() + plain(outputs, targets)

def raises(outputs, targets):
    return outputs["y"][99]

def number(outputs, targets):
    return 1.0

def vector(outputs, targets):
    return outputs["y"]

def detached(outputs, targets):
    return outputs["y"].detach().sum()

def half(outputs, targets):
    product = outputs["y"] @ outputs["y"].T
    assert product.dtype == torch.float32
    return product.half().sum()
"""


@pytest.fixture
def hooks(tmp_path: Path) -> Path:
    path = tmp_path / "myloss.py"
    path.write_text(HOOK)
    return path


def test_a_callable_gets_outputs_and_targets(hooks: Path) -> None:
    plain = criterion(f"{hooks}:plain", outputs=[VALUES])
    assert not plain.needs_teacher
    assert loss(plain, [[1.0, 4.0]], t=[[0.0, 2.0]]) == pytest.approx(5.0)
    more = criterion(f"{hooks}:with_teacher", outputs=[VALUES])
    assert more.needs_teacher
    assert loss(more, [[1.0, 4.0]], teacher=[[0.0, 1.0]], t=[[0.0, 2.0]]) == pytest.approx(9.0)
    distilled = criterion(f"{hooks}:plain", outputs=[PROBABILITIES], distill=2.0, temperature=1)
    got = loss(distilled, [[0.5, 0.5]], teacher=[[0.25, 0.75]], t=[[0.5, 1.5]])
    assert got == pytest.approx(1.0 + 2 * 0.1308120, abs=1e-6)


def test_a_callable_computes_in_float32_and_may_return_less(hooks: Path) -> None:
    half = criterion(f"{hooks}:half", outputs=[VALUES])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = half({"y": torch.tensor([[3.0, 4.0]], dtype=torch.bfloat16, requires_grad=True)})
    assert value.dtype == torch.float32 and value.item() == 25.0


@pytest.mark.parametrize(
    "name, message",
    [
        ("raises", r"myloss.py:raises' failed: IndexError: .*myloss.py, line 11"),
        ("number", "should return a tensor of one number, it returned float"),
        ("vector", r"should return a tensor of one number, it returned a tensor \(1,2\)"),
        ("detached", "does not depend on the outputs"),
    ],
)
def test_a_callable_that_fails_is_named(hooks: Path, name: str, message: str) -> None:
    function = criterion(f"{hooks}:{name}", outputs=[VALUES])
    with pytest.raises(DataError, match=message):
        function({"y": torch.tensor([[1.0, 4.0]], requires_grad=True)}, targets={})


# several processes


WORKER = """
import sys, torch, torch.distributed as dist
from onnxprune.model.outputs import OutputKind
from onnxprune.train.loss import criterion
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
auto = criterion("auto", outputs=[OutputKind("y", "values")])
teacher = torch.full((4, 1), 4.0 * rank)
auto({"y": teacher + 1}, teacher={"y": teacher})
print(float(auto.state_dict()["y"]))
dist.destroy_process_group()
"""


def test_processes_agree_on_the_variance(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WORKER]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    found = [float(process.communicate(timeout=120)[0].split()[-1]) for process in processes]
    assert found == [4.0, 4.0]  # of zeros on one and fours on the other; each by itself has none
