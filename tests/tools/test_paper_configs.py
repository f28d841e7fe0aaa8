"""The papers' configurations: what they ask for exists. A typing error would show after a day on a GPU otherwise."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from _paper_configs import CONFIGS, INSIDE, TPP_RATIOS
from _paper_networks import CifarResNet, export
from torch import zeros

import onnxprune
from onnxprune import TrainSettings
from onnxprune.train.methods import find_method


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_methods_and_targets_are_known(name: str) -> None:
    config = CONFIGS[name]()
    TrainSettings(**config.base)
    for row in config.arms:
        TrainSettings(**row.settings)
        find_method(row.arm.method, row.arm.method_options)
        onnxprune.parse_target(row.arm.target)


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_are_told_apart(name: str) -> None:
    names = [re.sub("[^a-z0-9.=]+", "-", row.name.lower()) for row in CONFIGS[name]().arms]
    assert len(set(names)) == len(names)


def test_pruning_inside_the_blocks_reaches_the_published_macs(tmp_path: Path) -> None:
    path = tmp_path / "resnet56.onnx"
    export(CifarResNet(56, 16, "pad"), path, zeros(2, 3, 32, 32))
    analysis = onnxprune.analyse(path, exclude=[INSIDE])
    assert [g.size for g in analysis.groups] == [16] * 9 + [32] * 9 + [64] * 9
    for macs, *_ in TPP_RATIOS.values():
        target = onnxprune.parse_target(f"macs={macs:.4f}")
        found = onnxprune.choose(analysis, target, importance="l1", scope="local", floor=0.01)
        assert found.outcome.met and found.outcome.reached == pytest.approx(macs, rel=0.02)
