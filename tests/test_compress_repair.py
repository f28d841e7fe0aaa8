"""`compress` with data and no training: what is left is repaired in closed form, and a sweep shares the work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from click.testing import Result as Run
from onnx import helper

import onnxprune
from onnxprune import cli
from onnxprune.errors import DataError, NotMirrored, UsageError
from onnxprune.repairs import REPAIRED_KEY
from onnxprune.report.document import compress_document
from onnxprune.result import Result
from onnxprune.train.settings import TrainSettings
from tests.report.test_document import valid

MODELS = Path(__file__).parent.parent / "models"
MNIST = MODELS / "transformer_mnist_rows.onnx"
FEW = 96


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def inputs() -> dict[str, np.ndarray]:
    """For the small convolutional network."""
    return {"image": np.random.default_rng(0).standard_normal((48, 3, 16, 16)).astype(np.float32)}


def images(begin: int, end: int) -> dict[str, np.ndarray]:
    with np.load(MODELS / "mnist_sample.npz") as stored:
        return {"rows": stored["image_u8"][begin:end].astype(np.float32) / np.float32(255)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few images, no labels."""
    path = tmp_path_factory.mktemp("data") / "few.npz"
    np.savez(path, **images(0, FEW))
    return path


def compress(output: Path | None = None, **more: Any) -> Result:
    recipe = onnxprune.Recipe(eval_data=images(500, 800))
    given = {"target": "macs=0.6", "evaluate": "agreement", "recipe": recipe} | more
    return onnxprune.compress(MNIST, output, **given)


@pytest.fixture(scope="module")
def repaired(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    torch.set_num_threads(1)
    return compress(tmp_path_factory.mktemp("out") / "small.onnx", data=str(data))


def run(*args: object) -> Run:
    return CliRunner().invoke(cli.main, [str(a) for a in args], prog_name="onnxprune")


def test_data_alone_repairs_and_trains_nothing(repaired: Result) -> None:
    accuracy, repair = repaired.accuracy, repaired.repair
    assert repaired.training is None and accuracy is not None and repair is not None
    assert accuracy.pruned is not None and accuracy.repaired is None
    assert accuracy.pruned < 0.95 < accuracy.after  # agreement with the original on images that nothing has seen
    assert (repair.mode, repair.samples, repair.dropped) == ("affine", FEW, False)
    assert repair.after < 0.5 * repair.before and 0 < repair.held_out < FEW
    assert any(c["mode"] == "affine" and c["after"] < c["before"] for c in repair.consumers)


def test_without_repair_the_plan_is_the_same(repaired: Result, data: Path) -> None:
    plain = compress(data=str(data), repair="none", importance="obs")
    assert plain.repair is None and plain.accuracy is not None and repaired.accuracy is not None
    assert plain.accuracy.after == repaired.accuracy.pruned
    assert all(np.array_equal(plain.plan.keep[g], kept) for g, kept in repaired.plan.keep.items())


def test_the_written_file_can_be_verified(repaired: Result, tmp_path: Path) -> None:
    assert repaired.output is not None
    found = run("verify", MNIST, repaired.output)
    assert found.exit_code == 0 and "repaired: weights not compared" in found.stdout
    model = onnx.load(repaired.output)
    mark = json.loads(next(p.value for p in model.metadata_props if p.key == REPAIRED_KEY))
    assert mark == {"mode": "affine", "samples": FEW}
    model.graph.node.append(helper.make_node("Identity", [model.graph.output[0].name], ["more"]))
    onnx.save(model, tmp_path / "other.onnx")
    assert run("verify", MNIST, tmp_path / "other.onnx").exit_code == 5


def test_the_document_is_described_by_the_schema(repaired: Result) -> None:
    from onnxprune.report.document import to_json

    read = valid(to_json(compress_document(repaired)))
    assert read["repair"]["samples"] == FEW and read["training"] is None


def test_the_report_tells_of_the_repair(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.onnx"
    done = run("compress", MNIST, out, "--target", "macs=0.6", "--data", data, "--samples", 64, "--no-latency", "-v")
    assert done.exit_code == 0, done.output
    assert "repair: affine, " in done.stdout and "on 64 samples of few.npz" in done.stdout
    assert "trained:" not in done.stdout and "| repaired |" in done.stdout


def test_training_begins_at_the_repaired_weights(tiny_cnn: Path, inputs: dict[str, np.ndarray]) -> None:
    how: dict[str, Any] = {"target": "macs=0.5", "data": inputs, "evaluate": "agreement"}
    how["train"] = TrainSettings(steps=2, batch=8, lr=1e-9)
    found = onnxprune.compress(tiny_cnn, **how)
    assert found.repair is not None and found.training is not None and found.accuracy is not None
    assert found.accuracy.repaired == found.accuracy.after >= (found.accuracy.pruned or 0)
    plain = onnxprune.compress(tiny_cnn, **how, repair="none")
    assert plain.training is not None and plain.training.first_loss > 2 * found.training.first_loss


def test_random_inputs_are_used_when_asked_for_and_named(tiny_cnn: Path) -> None:
    assert onnxprune.compress(tiny_cnn, target="macs=0.5").repair is None
    found = onnxprune.compress(tiny_cnn, target="macs=0.5", calibrate="random", samples=40).repair
    assert found is not None and found.data == "inputs drawn at random" and found.samples == 40
    assert found.mode == "ls"  # the means of noise are not those of data
    assert found.after < found.before


def test_inputs_are_fitted_to_stored_statistics_when_asked_for(tiny_cnn: Path, tmp_path: Path) -> None:
    files = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    results = [onnxprune.compress(tiny_cnn, f, target="macs=0.5", calibrate="bn", samples=40) for f in files]
    found = results[0].repair
    assert found is not None and (found.mode, found.samples) == ("ls", 40) and found.after < found.before
    assert found.data == "random inputs fitted to the stored statistics of 1 BatchNormalization node"
    assert files[0].read_bytes() == files[1].read_bytes()
    assert run("verify", tiny_cnn, files[0]).exit_code == 0


def test_an_int8_model_is_repaired_in_its_integers(
    tiny_cnn: Path, inputs: dict[str, np.ndarray], tmp_path: Path
) -> None:
    from onnxruntime.quantization import QuantType, quantize_static

    from onnxprune.data import CalibrationReader

    small, out = tmp_path / "int8.onnx", tmp_path / "out.onnx"
    how = {"weight_type": QuantType.QInt8, "per_channel": True}
    quantize_static(tiny_cnn, small, CalibrationReader.open(tiny_cnn, inputs), **how)
    found = onnxprune.compress(small, out, target="macs=0.5", data=inputs, importance="l2")
    assert found.repair is not None and found.repair.after < 0.7 * found.repair.before
    assert found.repair.consumers[0]["mode"] == "affine" and not found.repair.left, found.repair
    assert run("verify", small, out).exit_code == 0
    plain = onnxprune.compress(small, target="macs=0.5", data=inputs, importance="l2", repair="none")
    assert plain.model is not None and found.model is not None
    before, after = ({t.name: t for t in r.model.proto.graph.initializer} for r in (plain, found))
    changed = {n for n in before if before[n].SerializeToString() != after[n].SerializeToString()}
    assert {after[n].data_type for n in changed} == {onnx.TensorProto.INT8, onnx.TensorProto.INT32}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repair": "best"}, "none of auto, affine"),
        ({"repair": "affine"}, "wants inputs"),
        ({"samples": 5}, "--samples counts inputs"),
        ({"calibrate": "noise"}, "none of random"),
        ({"calibrate": "bn"}, "wants BatchNormalization nodes with stored statistics"),
        ({"calibrate": "random", "data": "DATA"}, "where there is no data"),
        ({"calibrate": "random", "repair": "none"}, "about repair"),
        ({"method": "imp", "data": "DATA", "repair": "affine"}, "nothing to repair"),
    ],
)
def test_what_makes_no_sense_is_refused(data: Path, options: dict[str, Any], message: str) -> None:
    given = {k: str(data) if v == "DATA" else v for k, v in options.items()}
    with pytest.raises(UsageError, match=message):
        onnxprune.compress(MNIST, target="macs=0.6", **given)


def test_a_model_without_a_form_in_torch_is_pruned_without_repair(tmp_path: Path) -> None:
    from tests.graphs import from_text

    proto = from_text(
        """(float[N,6] x) => (float[N,4] y) { a = Gemm<transB=1>(x, w1) r = Relu(a) y = Gemm<transB=1>(r, w2)
        s = StringNormalizer(t) }""",
        w1=(32, 6),
        w2=(4, 32),
        t=np.array(["a"], object),
    )
    given = {"x": np.random.default_rng(0).standard_normal((20, 6)).astype(np.float32)}
    with pytest.raises(NotMirrored) as refused:
        onnxprune.compress(proto, target="macs=0.5", data=given)
    assert refused.value.hint == "--repair none prunes it without repair"
    assert onnxprune.compress(proto, target="macs=0.5", data=given, repair="none").after is not None


def test_a_model_that_torch_cannot_run_is_left_as_the_surgery_made_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error where repair was asked for, a warning where it was not."""

    def fails(*_: Any, **__: Any) -> Any:
        raise IndexError("index 7 is out of bounds")

    monkeypatch.setattr("onnxprune.reconstruct.lockstep.Side.run", fails)
    with pytest.raises(DataError, match="index 7 is out of bounds") as refused:
        compress(data=str(data), repair="affine")
    assert refused.value.hint == "--repair none prunes it without repair"
    found = compress(tmp_path / "out.onnx", data=str(data))
    assert found.repair is None and (tmp_path / "out.onnx").is_file()
    (warning,) = (w for w in found.warnings if "repaired" in w)
    assert warning.startswith("nothing was repaired: the model can't be computed on a sample at once")


# a sweep


def test_a_sweep_writes_a_model_per_target_and_goes_on_after_an_error(
    tiny_cnn: Path, tmp_path: Path, inputs: dict[str, np.ndarray]
) -> None:
    np.savez(tmp_path / "data.npz", **inputs)
    folder = tmp_path / "out"
    folder.mkdir()
    how = ("--data", tmp_path / "data.npz", "--eval", "agreement", "--no-latency", "--json", tmp_path / "curve.json")
    done = run("compress", tiny_cnn, folder, "--sweep", "macs=0.7,0.0001,0.5", *how)
    assert done.exit_code == 4, done.output
    assert {p.name for p in folder.glob("*.onnx")} == {"tiny.macs0.7.onnx", "tiny.macs0.5.onnx"}
    assert "error: macs=0.0001: target macs=0.0001 can't be reached" in done.stderr
    read = valid((tmp_path / "curve.json").read_text())
    assert [p["target"] for p in read["points"]] == ["macs=0.7", "macs=0.0001", "macs=0.5"]
    larger, failed, smaller = read["points"]
    assert failed["result"] is None and failed["error"]["exit_code"] == 4
    assert larger["result"]["after"]["macs"] > smaller["result"]["after"]["macs"]
    assert read["picture"] is not None or "matplotlib" in done.stdout
    alone = tmp_path / "alone.onnx"
    given = ("--target", "macs=0.5", "--data", tmp_path / "data.npz", "--no-latency")
    assert run("compress", tiny_cnn, alone, *given).exit_code == 0
    assert alone.read_bytes() == (folder / "tiny.macs0.5.onnx").read_bytes()


def test_points_stand_beside_the_named_file(tiny_cnn: Path, tmp_path: Path) -> None:
    done = run("compress", tiny_cnn, tmp_path / "small.onnx", "--sweep", "params=80%,50%", "--no-latency")
    assert done.exit_code == 0, done.output
    names = {p.name for p in tmp_path.glob("*.onnx")}
    assert names == {"tiny.onnx", "small.params80pct.onnx", "small.params50pct.onnx"}
    again = run("compress", tiny_cnn, tmp_path / "small.onnx", "--sweep", "params=50%", "--no-latency")
    assert again.exit_code == 2 and "exists already" in again.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give a --target, or a --sweep"),
        (("--target", "macs=0.5", "--sweep", "macs=0.5"), "give a --target, or a --sweep"),
        (("--sweep", "macs=0.5,0.5"), "is no sweep"),
        (("--sweep", "macs"), "is no sweep"),
        (("--sweep", "speed=1,2"), "speed"),
    ],
)
def test_sweeps_that_make_no_sense(tiny_cnn: Path, options: tuple[str, ...], message: str) -> None:
    done = run("compress", tiny_cnn, *options)
    assert done.exit_code == 2 and message in done.stderr
    assert [p.name for p in tiny_cnn.parent.iterdir()] == ["tiny.onnx"]


def test_a_sweep_takes_what_compress_takes() -> None:
    import inspect
    from dataclasses import fields

    from onnxprune.request import Request

    taken = inspect.signature(onnxprune.compress).parameters
    assert {f.name for f in fields(Request)} == set(taken) - {"model", "output", "target"}
    default = Request()
    assert all(taken[f.name].default == getattr(default, f.name) for f in fields(Request))
