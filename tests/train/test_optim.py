"""Optimizers and the running average, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from onnxprune.train.optim import Average, make_optimizer, set_rate
from tests.train.runs import settings


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_biases_and_scales_are_not_decayed(optimizer: str) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    made = make_optimizer(model.parameters(), settings(optimizer=optimizer, weight_decay=0.5, lr=0.1))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = [p.detach().clone() for p in model.parameters()]
    made.step()
    for p, was in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), was * (0.95 if p.ndim > 1 else 1.0), rtol=1e-6, atol=1e-9)


def test_sgd_is_the_textbook_rule() -> None:
    p = nn.Parameter(torch.tensor([[2.0]]))
    made = make_optimizer([p], settings(lr=0.1, momentum=0.9, weight_decay=0.01))
    x, velocity = 2.0, 0.0
    for gradient in (1.0, -3.0, 0.5):
        p.grad = torch.tensor([[gradient]])
        made.step()
        velocity = 0.9 * velocity + gradient + 0.01 * x
        x -= 0.1 * velocity
        assert float(p.detach()) == pytest.approx(x, rel=1e-6)


def test_every_group_keeps_its_own_rate() -> None:
    made = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": r} for r in (0.1, 0.4)], lr=1.0)
    for factor in (0.5, 0.25):
        set_rate(made, factor)
        assert [g["lr"] for g in made.param_groups] == pytest.approx([0.1 * factor, 0.4 * factor])


def test_the_average_begins_quickly_and_ends_at_its_decay() -> None:
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(8.0)
    average = Average(model, decay=0.3)
    expected = 8.0
    for update, value in enumerate((4.0, -2.0, 6.0, 0.0), start=1):
        with torch.no_grad():
            model.weight.fill_(value)
        average.update()
        decay = min(0.3, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * value
        assert float(average.shadow["weight"]) == pytest.approx(expected, rel=1e-6)
    average.place()
    assert float(model.weight.detach()) == pytest.approx(expected, rel=1e-6)


def test_the_average_leaves_constants_and_counters_alone() -> None:
    model = nn.BatchNorm1d(2)
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    average = Average(model, decay=0.9)
    assert model.num_batches_tracked is not None and model.running_mean is not None
    model.num_batches_tracked.fill_(7)
    model.running_mean.fill_(11.0)
    average.update()
    average.place()
    assert model.mask.tolist() == [0.0, -torch.inf]
    assert int(model.num_batches_tracked) == 7
    assert model.running_mean.tolist() == pytest.approx([9.0, 9.0])  # 11 * (1 - 2/11)
