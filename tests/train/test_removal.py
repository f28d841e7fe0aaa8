"""Train, then remove what is zero: onnxruntime must not see a difference. DHSPG and HESSO, by hand in a user's loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from onnxprune.axes.analysis import analyse
from onnxprune.mirroring import mirror
from onnxprune.model.load import load
from onnxprune.select.target import parse_target
from onnxprune.train.dhspg import DHSPG
from onnxprune.train.families import trainable_groups
from onnxprune.train.hesso import HESSO
from onnxprune.train.selection import Selection
from onnxprune.train.unit_optimizer import UnitOptimizer
from tests.graphs import random_model
from tests.graphs.attention import attention, linear_attention
from tests.graphs.images import depthwise, grouped, residual, squeeze_excite
from tests.graphs.sequences import feed_forward, pre_norm, recurrent
from tests.train.removal import plan_of, removal_error, trained

MODELS = Path(__file__).parents[2] / "models"
STEPS = 12
SCHEDULE = {"target": 0.4, "start": 3, "stop": 10, "window": 2}


def dhspg(groups: list[dict[str, Any]], **changes: Any) -> UnitOptimizer:
    return DHSPG(groups, **({"lr": 0.01, "momentum": 0.9, **SCHEDULE} | changes))


def hesso(groups: list[dict[str, Any]], **changes: Any) -> UnitOptimizer:
    return HESSO(groups, **({"lr": 0.003, "variant": "adamw", "periods": 3, **SCHEDULE} | changes))


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check(model: Any, make: Any, path: Path, *, seed: int = 0) -> UnitOptimizer:
    """Exactly the redundant units are zero, and removing them changes nothing."""
    analysis, optimizer = trained(model, make, path, steps=STEPS, seed=seed)
    table = optimizer.table
    assert torch.equal(table.square(table.x.banks) == 0, optimizer.redundant)
    assert int(optimizer.redundant.sum()) == round(0.4 * table.units)
    assert removal_error(analysis, plan_of(optimizer), path) < 1e-5
    return optimizer


@pytest.mark.parametrize("make", [dhspg, hesso])
@pytest.mark.parametrize("name", ["resnet_cifar10_bn", "resnet_cifar10_folded", "transformer_mnist_rows"])
def test_a_trained_network(name: str, make: Any, tmp_path: Path) -> None:
    check(MODELS / f"{name}.onnx", make, tmp_path / "trained.onnx")


@pytest.mark.parametrize("make", [dhspg, hesso])
@pytest.mark.parametrize(
    ("kind", "seed"), [(k, s) for k in ("attention", "norms", "recurrent", "grouped") for s in range(3)]
)
def test_what_networks_are_made_of(kind: str, seed: int, make: Any, tmp_path: Path) -> None:
    blocks = {
        "attention": (attention, linear_attention),
        "norms": (pre_norm, feed_forward),
        "recurrent": (recurrent,),
        "grouped": (grouped, depthwise, residual, squeeze_excite),
    }
    check(random_model(seed, blocks=4, only=blocks[kind]), make, tmp_path / "trained.onnx", seed=seed)


def test_heads_and_their_dimensions_share_rows(tmp_path: Path) -> None:
    """Otherwise the tests above say nothing of overlapping families."""
    optimizer = check(MODELS / "transformer_mnist_rows.onnx", dhspg, tmp_path / "trained.onnx")
    assert optimizer.table.overlap


@pytest.mark.parametrize("kind", ["dhspg", "hesso"])
@pytest.mark.parametrize("target", ["macs=0.5", "params=0.4", "channels=0.6"])
def test_a_selection_meets_its_target(target: str, kind: str, tmp_path: Path) -> None:
    graph = load(MODELS / "resnet_cifar10_bn.onnx")
    analysis = analyse(graph)
    families = [g.id for g in trainable_groups(mirror(graph), analysis)]
    chosen = Selection(analysis, parse_target(target), families)
    make = dhspg if kind == "dhspg" else hesso
    again, optimizer = trained(
        MODELS / "resnet_cifar10_bn.onnx",
        lambda groups: make(groups, target=chosen, by_family=True),
        tmp_path / "trained.onnx",
        steps=STEPS,
    )
    assert chosen.choice is not None and chosen.choice.outcome.met
    assert chosen.choice.outcome.reached == pytest.approx(float(target.partition("=")[2]), abs=0.03)
    plan = plan_of(optimizer)
    assert {f: k.tolist() for f, k in plan.keep.items()} == {f: k.tolist() for f, k in chosen.choice.plan.keep.items()}
    assert removal_error(again, plan, tmp_path / "trained.onnx") < 1e-5
