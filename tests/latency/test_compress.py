"""`compress` with a latency as its target, from the options to the report."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

import onnxprune
from onnxprune import cli
from onnxprune.errors import UsageError
from onnxprune.latency import search
from onnxprune.latency.keep import NAME
from onnxprune.train.settings import TrainSettings
from onnxprune.verify import latency


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(search, "SECONDS", 0.1)
    monkeypatch.setattr(search, "SURE_SECONDS", 0.2)
    monkeypatch.setattr(latency, "compare", partial(latency.compare, seconds=0.2))
    monkeypatch.setenv("ONNXPRUNE_CACHE", str(tmp_path / "cache"))


def run(*args: object) -> Result:
    return CliRunner().invoke(cli.main, [str(a) for a in args], prog_name="onnxprune")


def test_the_target_is_what_was_measured(tiny_cnn: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    result = run("compress", tiny_cnn, out, "--target", "latency=0.6", "--best-effort", "--json", "-")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    target, times = document["target"], document["latency"]
    assert (target["metric"], target["spec"]) == ("latency", "latency=0.6")
    assert target["wanted"] == pytest.approx(0.6)  # a quotient of milliseconds
    assert target["reached"] == pytest.approx(times["after_ms"] / times["before_ms"])
    assert times["after"]["runs"] > times["after"]["disturbed"] >= 0
    assert document["verification"]["passed"]
    assert len(list((tmp_path / "cache").glob("latency-*.json"))) == 1
    assert run("verify", tiny_cnn, out).exit_code == 0


def test_the_table_shows_it_also_in_a_dry_run(tiny_cnn: Path) -> None:
    before = set(tiny_cnn.parent.glob("*.onnx"))
    result = run("compress", tiny_cnn, "--target", "latency=50%", "--dry-run", "--best-effort", "--no-latency")
    assert result.exit_code == 0, result.output
    assert "target: latency=50% " in result.stdout and "Latency, 1 thread" in result.stdout
    assert set(tiny_cnn.parent.glob("*.onnx")) == before


def test_what_can_not_be_reached_is_exit_code_4_and_writes_nothing(tiny_cnn: Path, tmp_path: Path) -> None:
    result = run("compress", tiny_cnn, tmp_path / "out.onnx", "--target", "latency=0.01", "--floor", "0.7")
    assert result.exit_code == 4
    assert "error: target latency=0.01 was not met: the fastest of" in result.stderr
    assert "--best-effort" in result.stderr and not (tmp_path / "out.onnx").exists()


def test_a_method_that_plans_in_training_has_no_clock_to_plan_by(tiny_cnn: Path) -> None:
    with pytest.raises(UsageError, match="plans in training"):
        onnxprune.compress(tiny_cnn, target="latency=0.5", method="imp", data={"image": np.zeros((4, 3, 16, 16))})


def test_a_run_that_is_trained_goes_on_with_its_plan_and_is_measured_as_written(tiny_cnn: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", image=rng.standard_normal((16, 3, 16, 16)).astype(np.float32))

    def trained(*, resume: bool) -> onnxprune.Result:
        return onnxprune.compress(
            tiny_cnn,
            target="latency=0.6",
            best_effort=True,
            data=str(tmp_path / "data.npz"),
            train=TrainSettings(steps=2, batch=8, device="cpu"),
            run_dir=tmp_path / "run",
            resume=resume,
        )

    first = trained(resume=False)
    planned = json.loads((tmp_path / "run" / NAME).read_text())["latency"]["after"]["median_ms"]
    assert first.training is not None and first.latency is not None
    assert first.latency.after.median_ms != planned
    assert first.target.reached == first.latency.after.median_ms / first.latency.before.median_ms
    again = trained(resume=True)
    assert {g: k.tolist() for g, k in again.plan.keep.items()} == {g: k.tolist() for g, k in first.plan.keep.items()}
