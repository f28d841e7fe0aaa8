"""`compress` with training: what it trains, what it says and writes when training ends in another way, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner, Result
from onnx import helper, numpy_helper

import onnxprune
from onnxprune import cli, stages
from onnxprune.accuracy import Recipe
from onnxprune.errors import UsageError
from onnxprune.train.settings import TrainSettings
from tests.conftest import tiny_cnn_proto

TARGET = ("--target", "macs=0.5", "--no-latency")


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """48 images in 10 classes."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((48, 3, 16, 16)).astype(np.float32)
    np.savez(tmp_path / "data.npz", image=images, label=rng.integers(0, 10, 48))
    return tmp_path / "data.npz"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where to write, in a folder of its own."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "small.onnx"


def run(*args: object) -> Result:
    return CliRunner().invoke(cli.main, [str(a) for a in args], prog_name="onnxprune")


def compress(model: Path, out: Path, data: object, *more: object, steps: object = 3) -> Result:
    return run("compress", model, out, *TARGET, "--data", data, "--steps", steps, "--batch-size", 8, *more)


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def failed(result: Result, code: int, error: str, hint: str = "") -> None:
    assert result.exit_code == code, result.output
    assert error in result.stderr and hint in result.stderr
    assert "Traceback" not in result.stderr


# what is trained


def test_the_weights_are_trained_and_the_file_is_the_network(tiny_cnn: Path, out: Path, data: Path) -> None:
    assert compress(tiny_cnn, out, data, "--importance", "l2", "--json", out.with_suffix(".json")).exit_code == 0
    plain = out.with_name("plain.onnx")
    assert run("compress", tiny_cnn, plain, *TARGET).exit_code == 0
    before, after = tensors(plain), tensors(out)
    assert before.keys() == after.keys()
    assert all(before[n].shape == after[n].shape for n in before)
    moved = {n for n in before if not np.array_equal(before[n], after[n])}
    assert {"conv1.weight", "bn.gamma", "bn.mean", "bn.var", "conv2.bias", "fc.weight"} <= moved
    training = json.loads(out.with_suffix(".json").read_text())["training"]
    assert training["steps"] == 3 and training["loss"] == "auto" and training["mirror_error_after"] < 1e-4


def test_a_trained_file_can_be_verified(tiny_cnn: Path, out: Path, data: Path) -> None:
    compress(tiny_cnn, out, data)
    found = run("verify", tiny_cnn, out)
    assert found.exit_code == 0 and "trained: weights not compared" in found.stdout


def test_the_same_seed_gives_the_same_file(tiny_cnn: Path, out: Path, data: Path) -> None:
    other = out.with_name("other.onnx")
    compress(tiny_cnn, out, data)
    compress(tiny_cnn, other, data, "--run-dir", out.with_name("run"))
    assert out.read_bytes() == other.read_bytes()
    compress(tiny_cnn, other, data, "--seed", 1, "--force")
    assert out.read_bytes() != other.read_bytes()


def test_the_metric_is_taken_three_times(tiny_cnn: Path, out: Path, data: Path) -> None:
    result = compress(tiny_cnn, out, data, "--eval", "top1", "--loss", "ce", "--json", "-")
    accuracy = json.loads(result.stdout)["accuracy"]
    assert accuracy["metric"] == "top1"
    assert all(0 <= accuracy[key] <= 1 for key in ("before", "pruned", "after"))


# a file of a fixed batch size


def fixed_batch(tmp_path: Path, *, reshape: bool, mixing: bool = False) -> Path:
    """The small network for one image at a time. reshape: Flatten as a Reshape to (1,64). mixing: with a mean over the
    batch, which makes samples depend on each other."""
    model = tiny_cnn_proto()
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    if reshape:
        flatten = next(n for n in model.graph.node if n.op_type == "Flatten")
        flatten.op_type = "Reshape"
        flatten.input.append("rows")
        model.graph.initializer.append(numpy_helper.from_array(np.array([1, 64]), "rows"))
    if mixing:
        last = model.graph.node[-1]
        last.output[0] = "apart"
        model.graph.node.append(helper.make_node("ReduceMean", ["apart"], ["mean"], "mean", axes=[0], keepdims=1))
        model.graph.node.append(helper.make_node("Add", ["apart", "mean"], ["logits"], "add"))
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, tmp_path / "fixed.onnx")
    return tmp_path / "fixed.onnx"


@pytest.mark.parametrize("reshape", [False, True])
def test_a_file_for_one_image_is_trained_on_batches(tmp_path: Path, out: Path, data: Path, reshape: bool) -> None:
    """It gives the weights that the file without a fixed batch gives, and stays fixed."""
    model = fixed_batch(tmp_path, reshape=reshape)
    how = ("--amp", "none", "--repair", "none")  # which sees the data in other batches
    result = compress(model, out, data, *how)
    assert result.exit_code == 0, result.output
    assert "8 at a time, where the file takes 1" in " ".join(result.stdout.split())
    free, free_out = tmp_path / "free.onnx", out.with_name("free.onnx")
    onnx.save(tiny_cnn_proto(), free)
    assert compress(free, free_out, data, *how).exit_code == 0
    one, other = tensors(out), tensors(free_out)
    for name in other:
        np.testing.assert_allclose(one[name], other[name], atol=1e-5, err_msg=name)
    assert onnx.load(out).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    if reshape:
        assert one["rows"][0] == 1


def test_samples_that_depend_on_each_other_are_not_joined(tmp_path: Path, out: Path, data: Path) -> None:
    """The mean over one sample is that sample; statistics of normalisation are frozen."""
    model = fixed_batch(tmp_path, reshape=False, mixing=True)
    result = compress(model, out, data, "--importance", "l2")
    assert result.exit_code == 0, result.output
    assert "at a time" not in result.stdout
    plain = out.with_name("plain.onnx")
    run("compress", model, plain, *TARGET)
    before, after = tensors(plain), tensors(out)
    assert np.array_equal(before["bn.mean"], after["bn.mean"])
    assert not np.array_equal(before["conv1.weight"], after["conv1.weight"])


# runs that end in another way


def started(model: Path, out: Path, data: Path, run_dir: Path, steps: int) -> subprocess.Popen[str]:
    arguments = ["compress", model, out, *TARGET, "--data", data, "--steps", steps, "--batch-size", 8]
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from onnxprune.cli import main; "
    )
    return subprocess.Popen(
        [sys.executable, "-c", code + "main(sys.argv[1:])", *map(str, arguments), "--run-dir", str(run_dir)],
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(what: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def test_ctrl_c_keeps_a_checkpoint_and_says_how_to_go_on(tiny_cnn: Path, out: Path, data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = started(tiny_cnn, out, data, run_dir, 100_000)
    try:
        wait_for(lambda: list((run_dir / "checkpoints").glob("*.json")), process)
        busy = compress(tiny_cnn, out, data, "--run-dir", run_dir, "--resume", steps=100_000)
        failed(busy, 2, f"is in use by process {process.pid}", "give another --run-dir")
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 130, error
    assert "error: interrupted: stopped at step" in error and "hint: the same command with --resume" in error
    assert list(out.parent.iterdir()) == []
    again = compress(tiny_cnn, out, data, "--run-dir", run_dir, steps=100_000)
    failed(again, 2, "holds a run, stopped at step", "continue it with --resume")
    other = compress(tiny_cnn, out, data, "--run-dir", run_dir, "--resume", "--lr", 0.5, "--temperature", 2, steps=9)
    failed(other, 2, "steps was 100000, is 9; lr was 0.001, is 0.5; temperature was 4.0, is 2.0")


def test_sigterm_leaves_nothing_half_done(
    tiny_cnn: Path, out: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also outside of training: here while the surgery is proved."""
    monkeypatch.setattr(stages, "prove", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    handler = signal.getsignal(signal.SIGTERM)
    failed(compress(tiny_cnn, out, data), 130, "error: interrupted")
    assert list(out.parent.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is handler


def test_other_settings_are_refused_before_the_work(
    tiny_cnn: Path, out: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reached(*_: object, **__: object) -> None:
        raise AssertionError("the work has begun")

    how = ("--run-dir", tmp_path / "run")
    assert compress(tiny_cnn, out, data, *how).exit_code == 0
    onnx.save(tiny_cnn_proto(classes=7), tmp_path / "other.onnx")
    other = compress(tmp_path / "other.onnx", out, data, *how, "--resume", "--force")
    failed(other, 2, "pruned model was", "parameters")
    monkeypatch.setattr(stages, "analyse_graph", reached)
    failed(compress(tiny_cnn, out, data, *how, "--force"), 2, "holds a run")
    np.savez(tmp_path / "more.npz", image=np.zeros((50, 3, 16, 16), np.float32))
    other = compress(tiny_cnn, out, tmp_path / "more.npz", *how, "--force", "--resume", "--loss", "match")
    failed(other, 2, "data was data.npz (48 samples), is more.npz (50 samples); loss was auto, is match")


def test_killed_and_resumed_gives_the_same_file(tiny_cnn: Path, out: Path, data: Path, tmp_path: Path) -> None:
    run_dir, whole = tmp_path / "run", out.with_name("whole.onnx")
    process = started(tiny_cnn, out, data, run_dir, 100)
    wait_for(lambda: list((run_dir / "checkpoints").glob("*.json")), process)
    time.sleep(0.1)
    process.kill()
    process.communicate()
    assert process.returncode == -9 and not out.exists()
    assert compress(tiny_cnn, out, data, "--run-dir", run_dir, "--resume", steps=100).exit_code == 0
    assert compress(tiny_cnn, whole, data, steps=100).exit_code == 0
    assert out.read_bytes() == whole.read_bytes()


def test_divergence_names_a_lower_rate(tiny_cnn: Path, out: Path, data: Path) -> None:
    result = compress(tiny_cnn, out, data, "--lr", "1e6", "--optimizer", "sgd", "--amp", "none", steps=50)
    failed(result, 6, "also after going back 2 times to a lower rate", "hint: try a rate of 100000 or lower")
    assert result.stderr.count("warning: the loss became") == 2
    assert list(out.parent.iterdir()) == []


def test_a_result_that_lost_too_much_is_not_written(tiny_cnn: Path, out: Path, data: Path) -> None:
    result = compress(tiny_cnn, out, data, "--eval", "agreement", "--max-drop", "0.1%", "--lr", "1", steps=2)
    failed(result, 4, "agreement goes from 1 to", "--max-drop")
    assert list(out.parent.iterdir()) == []


# data and options that are refused

SOURCES = """
import numpy as np

def raises():
    raise RuntimeError("the camera is unplugged")

def raises_later():
    for k in range(9):
        if k == 5:
            raise OSError("the disk is gone")
        yield np.random.rand(8, 3, 16, 16).astype("f")

def nan():
    yield np.full((8, 3, 16, 16), np.nan, "f")

def nan_later():
    for k in range(9):
        yield np.full((8, 3, 16, 16), np.nan if k == 5 else 1, "f")

def names():
    yield {"img": np.ones((8, 3, 16, 16), "f")}

def dtype():
    yield np.ones((8, 3, 16, 16), np.uint8)

def text():
    yield np.full((8, 3, 16, 16), "x")

def rank():
    yield np.ones((8, 768), "f")

def number():
    yield 42

def ends():
    return iter(())

def empty():
    yield np.ones((0, 3, 16, 16), "f")

def no_iterable():
    return 42

def gives_none():
    pass

def path():
    return "nowhere.npz"

def exits():
    raise SystemExit(3)

def exits_later():
    yield np.ones((8, 3, 16, 16), "f")
    raise SystemExit(3)
"""
SAID = {
    "raises": "failed: RuntimeError: the camera is unplugged",
    "raises_later": "(at item 5) failed: OSError: the disk is gone",
    "nan": "item 0 of bad.py:nan, sample 0: input 'image' holds NaN",
    "nan_later": "item 5 of bad.py:nan_later, sample 0: input 'image' holds NaN",
    "names": "hint: rename 'img' to 'image'",
    "dtype": "hint: pixels? try --preprocess scale=1/255",
    "text": "hint: give numbers",
    "rank": "hint: the same number of values: x.reshape(-1, 3, 16, 16)",
    "number": "item 0 of bad.py:number gives a single value",
    "ends": "ended at once: it gave no data",
    "empty": "gave batches without a single sample",
    "no_iterable": "int is nothing to iterate over",
    "gives_none": "hint: does the function return what it makes?",
    "path": "bad.py:path gives the path 'nowhere.npz', which does not exist",
    "exits": "failed: SystemExit: 3",
    "exits_later": "(at item 1) failed: SystemExit: 3",
}


@pytest.mark.parametrize("name", SAID)
def test_bad_data_ends_with_6_and_a_reason(
    tiny_cnn: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.py").write_text(SOURCES)
    failed(compress(tiny_cnn, out, f"bad.py:{name}", steps=20), 6, SAID[name])
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--steps", 3), "--steps is about training"),
        (("--batch-size", 3), "--batch-size is about training"),
        (("--time-budget", "3m"), "--time-budget is about training"),
        (("--checkpoint-every", 3), "--checkpoint-every is about training"),
        (("--run-dir", "x"), "--run-dir is about training"),
        (("--loss", "ce"), "training wants data"),
        (("--max-drop", "1%"), "a limit to the drop wants a metric"),
        (("--eval", "top1"), "needs data"),
        (("--data", "DATA", "--resume"), "--resume wants the folder of the run"),
        (("--data", "DATA", "--steps", 3, "--epochs", 3), "found steps and epochs"),
        (("--data", "DATA", "--steps", 3, "--loss", "cross"), "'cross' is no loss"),
        (("--data", "DATA", "--loss", "ce"), "a loss is about training, which is not asked for"),
        (("--data", "DATA", "--lr", 0.1), "--lr is about training, which is not asked for"),
        (("--data", "DATA", "--run-dir", "x"), "--run-dir is about training, which is not asked for"),
        (("--data", "DATA", "--eval", "topp"), "topp"),
    ],
)
def test_options_that_make_no_sense(
    tiny_cnn: Path, out: Path, data: Path, options: tuple[object, ...], message: str
) -> None:
    given = [data if o == "DATA" else o for o in options]
    failed(run("compress", tiny_cnn, out, *TARGET, *given), 2, message)
    assert list(out.parent.iterdir()) == []


def test_from_python(tiny_cnn: Path, data: Path) -> None:
    how: dict[str, Any] = {"target": "macs=0.5", "train": TrainSettings(steps=2, batch=8)}
    result = onnxprune.compress(tiny_cnn, data=str(data), recipe=Recipe(loss="ce", distill=0.5), **how)
    assert result.training is not None and result.training.steps == 2
    with pytest.raises(UsageError, match="training wants data"):
        onnxprune.compress(tiny_cnn, **how)


# without torch

BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")

sys.meta_path.insert(0, Blocker())
from onnxprune.cli import main
main(sys.argv[1:], prog_name="onnxprune")
"""


def blocked(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCKED, *map(str, args)], capture_output=True, text=True, timeout=120, check=False
    )


def test_without_torch_only_training_and_repair_are_refused(
    tiny_cnn: Path, out: Path, data: Path, tmp_path: Path
) -> None:
    trained, evaluation = tmp_path / "trained.onnx", ("--eval", "top1", "--eval-data", data)
    assert compress(tiny_cnn, trained, data).exit_code == 0
    for what, asked in (("training", ("--steps", 3)), ("repair", ())):
        refused = blocked("compress", tiny_cnn, out, *TARGET, "--data", data, *asked)
        assert refused.returncode == 2 and not out.exists()
        assert f"error: {what} wants torch, which is not installed" in refused.stderr
        assert "hint: pip install 'onnxprune[train]'" in refused.stderr
    done = blocked("compress", tiny_cnn, out, *TARGET, *evaluation)
    assert done.returncode == 0 and "Accuracy" in done.stdout, done.stderr
    for command in (("inspect", out), ("verify", tiny_cnn, out), ("verify", tiny_cnn, trained), ("compress", "--help")):
        assert blocked(*command).returncode == 0
    assert blocked("bench", tiny_cnn, out, "--runs", "3").returncode == 0


def test_no_help_loads_torch_or_onnxruntime() -> None:
    code = """
import sys
from onnxprune.cli import main
for command in ([], ["compress"], ["verify"], ["inspect"], ["bench"]):
    try:
        main([*command, "--help"], prog_name="onnxprune")
    except SystemExit:
        pass
print(*(m for m in ("torch", "onnxruntime") if m in sys.modules), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.split() == []
