"""`compress` with a method in training: every method on every kind of network, what is proved, runs that end in another
way, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from click.testing import Result as Run
from jsonschema import Draft202012Validator
from onnx import numpy_helper
from torch import Tensor, nn

import onnxprune
from onnxprune import cli, sparsify, stages
from onnxprune.errors import NothingPrunable, TargetNotReached, UsageError, VerificationFailed
from onnxprune.train import log
from onnxprune.train.methods import METHODS, find_method
from onnxprune.verify.reference import not_zero
from tests.networks import NETWORKS, data_for, exported
from tests.shrinking import Shrinking

STEPS = 24


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Per kind of network, the file and its data."""
    folder = tmp_path_factory.mktemp("networks")
    return {
        name: (exported(kind, folder / f"{name}.onnx"), data_for(kind, folder / f"{name}.npz"))
        for name, kind in NETWORKS.items()
    }


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where to write, in a folder of its own."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "small.onnx"


def compress(model: Path, data: Path | None, out: Path | None, **more: Any) -> onnxprune.Result:
    settings = {"steps": STEPS, "batch": 16, "amp": "none", "device": "cpu"}
    chosen = {k: more.pop(k) for k in list(more) if k in onnxprune.TrainSettings.__dataclass_fields__}
    if {"epochs", "time_budget_s"} & chosen.keys():
        settings.pop("steps")
    train = None if data is None else onnxprune.TrainSettings(**(settings | chosen))
    given = {"target": "macs=0.5", "method": Shrinking, "align": 1, "force": True} | more
    return onnxprune.compress(model, out, data=None if data is None else str(data), train=train, **given)


def run(*args: object) -> Run:
    return CliRunner().invoke(cli.main, [str(a) for a in args], prog_name="onnxprune")


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# every method on every kind of network


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_it_trains_reaches_its_target_rewrites_and_verifies(
    files: dict[str, tuple[Path, Path]], out: Path, method: str, network: str
) -> None:
    model, data = files[network]
    found = compress(model, data, out, method=method)
    assert found.target.met and found.target.reached <= 0.525
    assert found.target.reached >= (0.42 if network == "grouped" else 0.495)  # one of its units is 9 % of the MACs
    assert found.after is not None and found.after.macs == pytest.approx(found.target.reached * found.before.macs)
    assert found.training is not None and found.training.steps == STEPS
    assert found.training.mirror_error_after is not None and found.training.mirror_error_after < 1e-5
    sparse, proof = found.sparsified, found.verification
    assert sparse is not None and proof is not None
    assert proof.max_rel_error < 1e-5 and sparse.max_rel_error is not None and sparse.max_rel_error < 1e-5
    removed = sum(g.size - len(found.plan.keep[g.id]) for g in found.analysis.groups if g.id in found.plan.keep)
    assert sparse.zero == removed > 0 and sparse.steps == round(sparse.share * STEPS)
    assert sum(f["units"] - f["left"] for f in sparse.families) == removed
    assert all(f["redundant"] == f["units"] - f["left"] for f in sparse.families)
    assert "trained: weights not compared" in onnxprune.verify(model, out).notes


# what a run says


def test_what_a_run_says(files: dict[str, tuple[Path, Path]], out: Path, tmp_path: Path) -> None:
    model, data = files["attention"]
    given = ("--target", "macs=0.6", "--align", 1, "--method", "tpp", "--method-option", "share=0.5", "--no-latency")
    length = ("--steps", 40, "--batch-size", 16, "--log-file", tmp_path / "log.csv", "--json", tmp_path / "doc.json")
    done = run("compress", model, out, "--data", data, *given, *length, "-v")
    assert done.exit_code == 0, done.output
    assert "method: tpp, 20 of 40 steps on the whole network, " in done.stdout and "least norm kept" in done.stdout
    document = json.loads((tmp_path / "doc.json").read_text())
    schema = json.loads((Path(onnxprune.__file__).parent / "report" / "schema-1.json").read_text())
    Draft202012Validator(schema).validate(document)
    assert document["sparsified"]["options"]["scale"] == "auto" and document["sparsified"]["share"] == 0.5
    text = (tmp_path / "log.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in text] == ["step", "10", "20", "30", "40"]
    families = rows(tmp_path / "log.families.jsonl")
    assert {r["family"] for r in families} == {f["family"] for f in document["sparsified"]["families"]}
    last = [r for r in families if r["step"] == 20]
    assert sum(r["units"] - r["left"] for r in last) == document["sparsified"]["zero"]
    assert all(r["largest_redundant"] == 0 for r in last if r["redundant"]) and all(r["loss"] > 0 for r in last)


def test_a_dry_run_says_what_could_go(files: dict[str, tuple[Path, Path]]) -> None:
    model, data = files["plain"]
    found = compress(model, data, None, dry_run=True)
    assert found.after is None and found.target.met
    assert found.warnings == ["method shrinking chooses units in training; those of the lowest l2 norm stand here"]


# the phases


def test_the_rate_falls_over_both_phases(files: dict[str, tuple[Path, Path]], out: Path, tmp_path: Path) -> None:
    model, data = files["recurrent"]
    logs = []
    for method in ("oneshot", Shrinking):
        path = tmp_path / f"{len(logs)}.jsonl"
        compress(model, data, out, method=method, log_file=path, log_every=1)
        logs.append([(row["step"], row["epoch"], row["lr"]) for row in rows(path)])
    assert logs[0] == logs[1] and len(logs[0]) == STEPS


@pytest.mark.parametrize("length", [{"epochs": 5}, {"steps": 21}])
def test_all_methods_train_for_as_long(files: dict[str, tuple[Path, Path]], out: Path, length: dict[str, int]) -> None:
    model, data = files["recurrent"]
    found = [compress(model, data, out, method=m, **length).training for m in ("oneshot", Shrinking)]
    assert found[0] is not None and found[1] is not None
    assert (found[0].steps, found[0].epochs) == (found[1].steps, found[1].epochs)


def test_a_time_budget_is_shared(files: dict[str, tuple[Path, Path]], out: Path) -> None:
    model, data = files["recurrent"]
    found = compress(model, data, out, time_budget_s=1.0)
    assert found.training is not None and found.sparsified is not None
    assert 0.5 <= found.sparsified.seconds < 0.9 and 1.0 <= found.training.seconds < 1.5
    assert 0 < found.sparsified.steps < found.training.steps


def test_all_of_it_may_come_before_the_surgery(files: dict[str, tuple[Path, Path]], out: Path) -> None:
    model, data = files["plain"]
    found = compress(model, data, out, method_options={"share": 1})
    assert found.training is not None and found.sparsified is not None
    assert found.sparsified.steps == found.training.steps == STEPS
    assert "trained: weights not compared" in onnxprune.verify(model, out).notes


@pytest.mark.parametrize("more", [{"ema": 0.9}, {"rebn": False}, {"optimizer": "sgd", "momentum": 0.9, "clip": 1.0}])
def test_units_are_zero_whatever_else_moves_the_weights(
    files: dict[str, tuple[Path, Path]], out: Path, more: dict[str, Any]
) -> None:
    """An average of the weights, BatchNormalization put back and folded again (by default here), momentum."""
    model, data = files["plain"]
    recipe = onnxprune.Recipe(rebn=more.pop("rebn", None))
    found = compress(model, data, out, recipe=recipe, **more)
    assert found.sparsified is not None and found.sparsified.zero > 0
    assert found.training is not None and (found.training.batchnorms_inserted == 0) == (recipe.rebn is False)


def test_inexact_groups_are_taken_only_where_that_is_allowed(files: dict[str, tuple[Path, Path]], out: Path) -> None:
    model, data = files["attention"]
    inexact = {g.id for g in onnxprune.analyse(model).groups if g.kind == "inexact"}
    found = compress(model, data, out, target="macs=0.7")
    assert inexact and not inexact & found.plan.keep.keys()
    assert found.sparsified is not None and not inexact & {f["family"] for f in found.sparsified.families}
    found = compress(model, data, out, target="macs=0.3", allow_inexact=True)
    assert inexact <= found.plan.keep.keys()
    assert found.sparsified is not None and found.sparsified.max_rel_error is None
    onnxprune.verify(model, out)


class Gate(nn.Module):
    """Units that are a half where nothing makes them, summed to one number. (N,12)"""

    example = (12,)

    def __init__(self) -> None:
        super().__init__()
        self.make, self.take = nn.Linear(12, 32), nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.take(torch.sigmoid(self.make(x)))


def test_what_dead_units_contributed_is_made_of_trained_weights(out: Path, tmp_path: Path) -> None:
    """A single number here, which would be a constant in another place."""
    model, data = exported(Gate, tmp_path / "gate.onnx"), data_for(Gate, tmp_path / "gate.npz")
    found = compress(model, data, out, target="params=0.5")
    assert [g.kind for g in found.analysis.groups] == ["compensated"]
    assert found.sparsified is not None and found.sparsified.max_rel_error is not None
    assert found.sparsified.max_rel_error < 1e-5
    assert "trained: weights not compared" in onnxprune.verify(model, out).notes


# what must not happen


class Careless(Shrinking):
    """Says that units are zero that are not."""

    def on_finish(self, student: nn.Module) -> None:
        super().on_finish(student)
        with torch.no_grad():
            self.table.tensors[0].add_(1e-30)


class Idle(Shrinking):
    """Removes fewer units than were asked for."""

    def on_finish(self, student: nn.Module) -> None:
        self.redundant[torch.nonzero(self.redundant)[1:]] = False
        self.dead = self.redundant.clone()
        super().on_finish(student)


def test_what_is_not_exactly_zero_is_not_removed(files: dict[str, tuple[Path, Path]], out: Path) -> None:
    model, data = files["plain"]
    with pytest.raises(VerificationFailed, match="not exactly zero"):
        compress(model, data, out, method=Careless, recipe=onnxprune.Recipe(rebn=False))
    assert list(out.parent.iterdir()) == []


def test_a_missed_target_is_an_error_unless_the_best_will_do(files: dict[str, tuple[Path, Path]], out: Path) -> None:
    model, data = files["plain"]
    with pytest.raises(TargetNotReached, match="the method shrinking left 9"):
        compress(model, data, out, method=Idle)
    assert list(out.parent.iterdir()) == []
    found = compress(model, data, out, method=Idle, best_effort=True)
    assert not found.target.met and found.sparsified is not None and found.sparsified.zero == 1
    found = compress(model, data, out, target="macs=0.01", best_effort=True)
    assert not found.target.met and found.sparsified is not None and found.sparsified.zero == 14 + 21


def test_the_stored_weights_are_looked_at(files: dict[str, tuple[Path, Path]]) -> None:
    analysis = onnxprune.analyse(files["plain"][0])
    plan = onnxprune.Plan({"g0": np.arange(1, 16)})
    assert set(not_zero(analysis, plan)) == {"first.weight", "first.bias", "third.weight", "third.bias"}
    assert not_zero(analysis, onnxprune.Plan({})) == []


# refused before any training


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*_: object, **__: object) -> None:
        raise AssertionError("the training has begun")

    monkeypatch.setattr(sparsify, "zeroed", reached)
    monkeypatch.setattr("onnxprune.accuracy.zeroed", reached)


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"method": "magic"}, UsageError, "'magic' is none of oneshot, dhspg"),
        ({"method_options": {"until": 2.0}}, UsageError, "until must be above 0"),
        ({"method_options": {"untl": 0.5}}, UsageError, "has no option 'untl'"),
        ({"method_options": {"until": "soon"}}, UsageError, "until must be a number, found 'soon'"),
        ({"method_options": {"share": 0}}, UsageError, "share must be above 0"),
        ({"method": "oneshot", "method_options": {"share": 0.5}}, UsageError, "oneshot has no option"),
        ({"steps": 1}, UsageError, "1 steps can't be parted into 50%"),
        ({"target": "macs=0.01"}, TargetNotReached, "macs=0.01 can't be reached"),
        ({"exclude": ["first.*", "second.*"]}, NothingPrunable, "nothing can be pruned"),
    ],
)
def test_refused_before_any_training(
    files: dict[str, tuple[Path, Path]], out: Path, more: dict[str, Any], error: type[Exception], message: str
) -> None:
    model, data = files["plain"]
    with pytest.raises(error, match=message):
        compress(model, data, out, **more)
    assert list(out.parent.iterdir()) == []


def test_a_method_without_data_is_a_usage_error(files: dict[str, tuple[Path, Path]], out: Path) -> None:
    done = run("compress", files["plain"][0], out, "--target", "macs=0.5", "--method", "hesso")
    assert done.exit_code == 2 and "hesso works in training, which wants data" in done.stderr


@pytest.mark.parametrize(
    ("option", "message"),
    [("nonsense", "is no option of a method"), ("rhoo=1", "it has importance, "), ("rho=-1", "rho must be above 0")],
)
def test_options_of_methods_that_make_no_sense(
    files: dict[str, tuple[Path, Path]], out: Path, option: str, message: str
) -> None:
    model, data = files["plain"]
    how = ("--target", "macs=0.5", "--method", "tpp", "--method-option", option)
    done = run("compress", model, out, "--data", data, *how)
    assert done.exit_code == 2 and message in done.stderr, done.output


def test_one_epoch_of_unknown_length_cannot_be_parted(files: dict[str, tuple[Path, Path]], out: Path) -> None:
    model, _ = files["recurrent"]

    def batches() -> Iterator[dict[str, np.ndarray]]:
        for k in range(4):
            yield {"x": np.random.default_rng(k).standard_normal((16, 6, 12)).astype(np.float32)}

    settings = onnxprune.TrainSettings(epochs=1, batch=16, device="cpu", amp="none")
    how: dict[str, Any] = {"target": "macs=0.5", "method": Shrinking, "align": 1}
    with pytest.raises(UsageError, match="one epoch of data whose length isn't known"):
        onnxprune.compress(model, out, data=batches, train=settings, **how)
    settings = onnxprune.TrainSettings(epochs=3, batch=16, device="cpu", amp="none")
    found = onnxprune.compress(model, out, data=batches, train=settings, **how)
    assert found.training is not None and found.training.steps == 12
    assert found.sparsified is not None and found.sparsified.steps == 6


def test_text_becomes_what_the_option_is() -> None:
    chosen = find_method("fixreg", {"lmbda": "1e-2", "reselect": "2"})
    assert chosen is not None and (chosen.chosen.lmbda, chosen.chosen.reselect) == (0.01, 2)
    chosen = find_method("fixreg", {"lmbda": "none"})
    assert chosen is not None and chosen.chosen.lmbda is None
    with pytest.raises(UsageError, match="scale must be one of paper, code, auto, found 'large'"):
        find_method("tpp", {"scale": "large"})
    with pytest.raises(UsageError, match="reselect must be a whole number, found 1.5"):
        find_method("tpp", {"reselect": 1.5})


# interrupted, and continued


class Stopped(Exception):
    """In place of a process that is killed."""


@pytest.mark.parametrize("network", ["plain", "grouped"])
@pytest.mark.parametrize("at", [3, 11, "between", 17, 24])
def test_a_run_that_was_stopped_anywhere_ends_with_the_same_file(
    files: dict[str, tuple[Path, Path]],
    out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at: int | str,
    network: str,
) -> None:
    model, data = files[network]
    more = {"checkpoint_every_steps": 4, "ema": 0.9}
    compress(model, data, out, **more)
    expected, again = out.read_bytes(), out.with_name("again.onnx")
    how = {"run_dir": tmp_path / "run", "log_file": tmp_path / "log.jsonl", "log_every": 1, **more}

    def stop(row: Any, *_: object) -> None:
        if at in ("between", getattr(row, "step", None)):
            raise Stopped

    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(log, "PROGRESS_EVERY_S", 0.0)
        if at == "between":
            patched.setattr(stages, "rewrite", stop)
        compress(model, data, again, **how, on_step=None if at == "between" else stop)
    assert not again.exists()
    with pytest.raises(UsageError, match="holds a run, stopped at step"):
        compress(model, data, again, **how)
    found = compress(model, data, again, **how, resume=True)
    assert again.read_bytes() == expected
    assert found.training is not None and found.training.steps == STEPS
    assert [row["step"] for row in rows(tmp_path / "log.jsonl")] == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"method_options": {"until": 0.5}}, "shrinking until was 0.8, is 0.5"),
        ({"method_options": {"share": 0.6}}, "span was"),
        ({"target": "macs=0.6"}, "target was macs=0.5, is macs=0.6"),
        ({"method": "oneshot"}, "holds a run with a method in training"),
        ({"lr": 0.5}, "lr was 0.001, is 0.5"),
    ],
)
def test_a_run_is_continued_as_it_was_begun_only(
    files: dict[str, tuple[Path, Path]], out: Path, tmp_path: Path, more: dict[str, Any], message: str
) -> None:
    model, data = files["recurrent"]
    compress(model, data, out, run_dir=tmp_path / "run", steps=4)
    with pytest.raises(UsageError, match=message):
        compress(model, data, out, run_dir=tmp_path / "run", resume=True, steps=4, **more)


def test_a_run_of_oneshot_is_not_taken_for_one_of_a_method(
    files: dict[str, tuple[Path, Path]], out: Path, tmp_path: Path
) -> None:
    model, data = files["recurrent"]
    compress(model, data, out, method="oneshot", run_dir=tmp_path / "run", steps=4)
    with pytest.raises(UsageError, match="holds a run with --method oneshot"):
        compress(model, data, out, run_dir=tmp_path / "run", steps=4, resume=True)


# what exporters fill in


def padded(tmp_path: Path) -> Path:
    """A shortcut that zeros are joined to, filled by one node, and a bias filled by another; for one image at a time."""
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    padded (float[1,3,8,8] x) => (float[1,5] y)
    <int64[4] padding = {1, 4, 8, 8}, int64[1] wide = {16}> {
        zeros = ConstantOfShape <value = float[1] {0}> (padding)
        bias = ConstantOfShape <value = float[1] {0.5}> (wide)
        a = Conv <pads = [1, 1, 1, 1]> (x, first, bias)
        b = Relu(a)
        c = Conv (b, second)
        d = Concat <axis = 1> (c, zeros)
        e = Add(b, d)
        f = GlobalAveragePool(e)
        g = Flatten(f)
        y = Gemm <transB = 1> (g, head)
    }
    """
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for name, shape in (("first", (16, 3, 3, 3)), ("second", (12, 16, 1, 1)), ("head", (5, 16))):
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    onnx.save(model, tmp_path / "padded.onnx")
    return tmp_path / "padded.onnx"


@pytest.mark.parametrize("method", ["oneshot", Shrinking])
def test_padding_is_not_trained_and_what_is_filled_in_may_be(out: Path, tmp_path: Path, method: Any) -> None:
    model = padded(tmp_path)
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(2).standard_normal((48, 3, 8, 8)).astype(np.float32))
    found = compress(model, tmp_path / "x.npz", out, method=method, target="params=0.6")
    assert found.target.met and "trained: weights not compared" in onnxprune.verify(model, out).notes
    written = onnx.load(out)
    filled = [n.output[0] for n in written.graph.node if n.op_type == "ConstantOfShape"]
    assert filled == ["zeros"]
    assert len(np.unique(tensors(out)["bias"])) > 1
