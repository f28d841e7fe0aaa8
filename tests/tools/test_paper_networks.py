"""The papers' networks: parameters as published, and exports in which nothing is shared that isn't."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from _paper_networks import CARN, VGG16, CifarResNet, ResNet18, ResNet50, export, seeded

import onnxprune


@pytest.mark.parametrize(
    "build, millions",
    [
        (lambda: CifarResNet(20, shortcut="pad"), 0.27),  # He et al. 2016, table 6
        (lambda: CifarResNet(56, shortcut="pad"), 0.85),
        (lambda: VGG16(batch_norm=True), 15.25),
        (ResNet18, 11.17),
        (ResNet50, 23.52),
        (CARN, 0.964),
    ],
    ids=["resnet20", "resnet56", "vgg16_bn", "resnet18", "resnet50", "carn"],
)
def test_sizes_are_the_published_ones(build: object, millions: float) -> None:
    count = sum(p.numel() for p in build().parameters())  # type: ignore[operator]
    assert count / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize("shortcut", ["conv", "pad"])
def test_a_new_network_keeps_a_tensor_per_layer(tmp_path: Path, shortcut: str) -> None:
    module = seeded(lambda: CifarResNet(20, 8, shortcut), 0)
    before = {n: p.clone() for n, p in module.state_dict().items()}
    export(module, tmp_path / "new.onnx", torch.zeros(2, 3, 32, 32))
    graph = onnxprune.load(tmp_path / "new.onnx")
    norms = [node for node in graph.nodes if node.op == "BatchNormalization"]
    stored = [name for node in norms for name in node.inputs[1:]]
    assert len(norms) == (21 if shortcut == "conv" else 19)
    assert len(set(stored)) == len(stored) == 4 * len(norms)
    assert all(torch.equal(p, before[n]) for n, p in module.state_dict().items())


def test_a_seed_is_a_network() -> None:
    state = torch.get_rng_state()
    a, b, c = (seeded(lambda: CifarResNet(8, 4), s).conv1.weight for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(state, torch.get_rng_state())
