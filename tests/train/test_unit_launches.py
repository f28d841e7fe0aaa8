"""What a step launches on the device: the same however many units there are, and nothing that waits for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from onnxprune.train.dhspg import DHSPG
from onnxprune.train.hesso import HESSO
from onnxprune.train.unit_optimizer import UnitOptimizer
from onnxprune.train.units import Part

WAIT = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal.default", "item")
PHASES = {
    "dhspg: warm-up": (DHSPG, {"start": 1000}, 2),
    "dhspg: measuring": (DHSPG, {"start": 1000, "window": 1000}, 2),
    "dhspg: projecting": (DHSPG, {"start": 1, "lmbda": 1e-6, "epsilon": 0.0}, 3),
    "dhspg: taper": (DHSPG, {"start": 1, "stop": 50, "taper": 49}, 3),
    "dhspg: done": (DHSPG, {"start": 1, "stop": 3}, 5),
    "hesso: shrinking": (HESSO, {"start": 1, "stop": 50, "periods": 1}, 3),
    "hesso: shrinking and measuring": (HESSO, {"start": 1, "stop": 50, "periods": 2, "window": 50}, 3),
    "hesso: trial": (HESSO, {"start": 1, "stop": 50, "trials": 2, "trial": 10}, 3),
    "hesso: done": (HESSO, {"start": 1, "stop": 3, "periods": 1}, 5),
}
BASES: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9, "weight_decay": 0.01},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "adamw": {"variant": "adamw", "weight_decay": 0.01},
}


class Launches(TorchDispatchMode):
    """The operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def optimizer(kind: type[UnitOptimizer], *, layers: int, units: int, lr: Any = 0.01, **how: Any) -> UnitOptimizer:
    """Over layers of a convolution and its normalisation, and heads that share rows with their dimensions."""
    torch.manual_seed(0)
    params, parts = [], []
    for layer in range(layers):
        for shape in ((units, 4, 3, 3), (units,)):
            params.append(torch.nn.Parameter(torch.randn(shape)))
            parts.append((Part(str(layer), 0, np.arange(units)),))
    params.append(torch.nn.Parameter(torch.randn(6 * units, 5)))
    parts.append((Part("head", 0, np.repeat(np.arange(6), units)), Part("dim", 0, np.tile(np.arange(units), 6))))
    for p in params:
        p.grad = torch.randn(p.shape)
    return kind([{"params": params, "parts": parts}], lr=lr, target=0.5, **how)


def launches(made: UnitOptimizer) -> list[str]:
    made.advance()
    with Launches() as seen, torch.no_grad():
        made.move()
    return seen.names


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("phase", PHASES)
def test_a_step_waits_for_nothing_and_does_not_count_units(phase: str, base: str) -> None:
    kind, how, steps = PHASES[phase]
    found = []
    for size in ({"layers": 2, "units": 6}, {"layers": 2, "units": 60}):
        made = optimizer(kind, **size, **how, **BASES[base])
        for _ in range(steps):
            made.step()
        assert made.phase == phase.partition(": ")[2].replace("measuring", "warm-up").replace(
            "taper", "projecting"
        ).replace("shrinking and warm-up", "shrinking")
        found.append(launches(made))
    assert found[0] == found[1]
    assert not [name for name in found[0] if any(word in name for word in WAIT)]


def test_layers_of_like_form_cost_no_more_launches() -> None:
    """But for the base's lists of tensors, which torch's own optimizer has, too."""
    few, many = (optimizer(DHSPG, layers=n, units=6, start=1, momentum=0.9, lmbda=1e-6, epsilon=0.0) for n in (2, 12))
    for made in (few, many):
        made.step()
        made.step()
    assert len(launches(few)) == len(launches(many)) < 150


def test_the_check_would_notice() -> None:
    with Launches() as seen:
        bool(torch.ones(2).any())
    assert any(word in name for name in seen.names for word in WAIT)


@pytest.mark.parametrize("phase", PHASES)
def test_the_devices_half_can_be_compiled(phase: str) -> None:
    """In one graph, and it gives the same."""
    kind, how, steps = PHASES[phase]
    plain, compiled = (optimizer(kind, layers=2, units=6, **how, **BASES["sgd"]) for _ in range(2))
    for made in (plain, compiled):
        for _ in range(steps):
            made.step()
    torch._dynamo.reset()
    move = torch.compile(compiled.move, backend="eager", fullgraph=True)
    for _ in range(3):
        plain.step()
        compiled.advance()
        move()
    for a, b in zip(plain.table.tensors, compiled.table.tensors, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", [DHSPG, HESSO])
def test_the_rate_may_be_a_tensor(kind: type[UnitOptimizer]) -> None:
    how: dict[str, Any] = {"start": 2, "stop": 9, "momentum": 0.9}
    one, other = (optimizer(kind, layers=1, units=4, lr=lr, **how) for lr in (0.02, torch.tensor(0.02)))
    for _ in range(10):
        one.step()
        other.step()
    for a, b in zip(one.table.tensors, other.table.tensors, strict=True):
        torch.testing.assert_close(a, b)
