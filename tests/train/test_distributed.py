"""Two processes train as one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from onnxprune.errors import UsageError
from onnxprune.train.dhspg import DHSPGTraining
from onnxprune.train.distributed import Team, _buckets
from onnxprune.train.hesso import HESSOTraining
from onnxprune.train.sparsify import Sparsifier
from tests.train.method_runs import trained
from tests.train.runs import Stateless, convnet, run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes saw in every scenario of tests/train/team.py."""
    folder = tmp_path_factory.mktemp("team")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "tests.train.team", str(folder)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[n].double() - b[n].double()).abs().max()) for n in a)


def alone(name: str) -> nn.Module:
    os.environ.setdefault("RANK", "0")  # tests.train.team asks for it when it is imported
    from tests.train.team import Part

    how: dict[str, dict[str, Any]] = {
        "norm": {"batch": 9, "clip": 0.5},
        "parts": {"model": convnet(norm=False), "batch": 9, "ema": 0.9},
        "adamw": {"model": convnet(norm=False), "batch": 8, "optimizer": "adamw", "lr": 0.001},
        "part": {"model": Part(), "batch": 2, "accumulate": 2, "weight_decay": 0.1, "steps": 40},
    }
    try:
        return run(criterion=Stateless(), **how[name])[0]
    finally:
        del os.environ["RANK"]


@pytest.mark.parametrize("name", ["norm", "parts", "adamw", "part"])
def test_two_processes_give_the_result_of_one(seen: list[dict[str, Any]], name: str) -> None:
    """BatchNorm over uneven shares (5 and 4); accumulation and average; AdamW; parameters that are used nowhere, or in
    one process only."""
    one = alone(name).state_dict()
    two = [found[name]["weights"] for found in seen]
    assert largest_difference(two[0], two[1]) == 0.0
    assert largest_difference(two[0], one) < 1e-5
    assert seen[0][name]["losses"] == seen[1][name]["losses"]


@pytest.mark.parametrize(("name", "kind"), [("dhspg", DHSPGTraining), ("hesso", HESSOTraining)])
def test_methods_choose_alike_in_all_processes(seen: list[dict[str, Any]], name: str, kind: type[Sparsifier]) -> None:
    module, hooks, _ = trained(kind, on="plain", criterion=Stateless())
    first, second = (found[name] for found in seen)
    assert first["removed"] == second["removed"] == {f: r.tolist() for f, r in hooks.removed.items()}
    assert any(any(gone) for gone in first["removed"].values())
    assert largest_difference(first["weights"], second["weights"]) == 0.0
    assert largest_difference(first["weights"], module.state_dict()) < 1e-4


def test_the_comparison_would_notice(seen: list[dict[str, Any]]) -> None:
    """One process on its share alone is far from the result."""
    half, _ = run(criterion=Stateless(), batch=5, clip=0.5)
    assert largest_difference(seen[0]["norm"]["weights"], half.state_dict()) > 1e-3


def test_one_signal_stops_all_and_all_go_on(seen: list[dict[str, Any]]) -> None:
    for found in (s["signalled"] for s in seen):
        assert found["raised"].startswith("stopped at step 6") and found["from"] == 6
        assert largest_difference(found["rest"], found["whole"]) == 0.0
    assert "--resume" in seen[0]["signalled"]["raised"]


def test_data_that_fails_in_one_process_ends_all(seen: list[dict[str, Any]]) -> None:
    assert "process 1 stopped" in seen[0]["failing_data"]["raised"] and "gone" in seen[0]["failing_data"]["raised"]
    assert seen[1]["failing_data"]["raised"].startswith("DataError: the data source failed at batch 3 of epoch 0")
    for found in seen:
        assert found["nan_data"]["raised"] == "DataError: 'x' holds nan in batch 2 of epoch 0"


def test_all_go_back_together(seen: list[dict[str, Any]]) -> None:
    for found in (s["nan_in_one"] for s in seen):
        assert found["backoffs"] == 1 and found["steps"] == 12
    assert largest_difference(seen[0]["nan_in_one"]["weights"], seen[1]["nan_in_one"]["weights"]) == 0.0


def test_all_end_at_the_same_step(seen: list[dict[str, Any]]) -> None:
    assert seen[0]["budget"]["steps"] == seen[1]["budget"]["steps"] > 0
    assert largest_difference(seen[0]["budget"]["weights"], seen[1]["budget"]["weights"]) == 0.0
    for found in seen:
        assert found["few"] == {"dropped": 4, "small": 2}


def test_all_raise_what_the_first_one_refuses(seen: list[dict[str, Any]]) -> None:
    for found in seen:
        assert found["refused"]["raised"].startswith("UsageError") and "holds a run" in found["refused"]["raised"]


def test_buckets_hold_one_type_from_the_last_parameter_to_the_first() -> None:
    wide, narrow = torch.zeros(4_000_000), torch.zeros(10, dtype=torch.bfloat16)
    parameters = [nn.Parameter(x) for x in (wide, wide, wide, narrow, narrow, torch.zeros(5))]
    sizes = [[p.numel() for p in bucket] for bucket in _buckets(parameters)]
    assert sizes == [[5], [10, 10], [4_000_000], [4_000_000], [4_000_000]]


def test_more_processes_than_samples_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import nullcontext

    monkeypatch.setattr("onnxprune.train.loop.joined", lambda device: nullcontext(Team(rank=0, world=3)))
    with pytest.raises(UsageError, match="too small for 3 processes") as caught:
        run(batch=5, accumulate=2)
    assert "--batch 6" in caught.value.hint
