"""The command line as its users meet it: what it prints, what it writes, and the code it ends with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper

import onnxprune
from onnxprune import cli, output, pipeline, stages
from onnxprune.accuracy import Recipe
from onnxprune.errors import VerificationFailed

TARGET = ("--target", "macs=0.5")
QUICK = (*TARGET, "--no-latency")


def run(*args: object) -> Result:
    return CliRunner().invoke(cli.main, [str(a) for a in args], prog_name="onnxprune")


def python(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=120, check=False
    )


def failed(result: Result, code: int, *words: str) -> None:
    """The run ended with this code, one `error:` line that says so, at most one `hint:`, and nothing else."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert lines[0].startswith("error: ")
    assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("hint: "))
    for word in words:
        assert word in result.stderr


def reached(*_: object, **__: object) -> None:
    raise AssertionError("the work has begun")


# compress


def test_compress_writes_a_smaller_model_that_runs(tiny_cnn: Path) -> None:
    import onnxruntime

    result = run("compress", tiny_cnn, *TARGET)
    assert result.exit_code == 0, result.output
    out = tiny_cnn.with_name("tiny.pruned.onnx")
    assert out.stat().st_size < tiny_cnn.stat().st_size
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    assert session.run(None, {"image": np.zeros((4, 3, 16, 16), np.float32)})[0].shape == (4, 10)
    for text in ("tiny.pruned.onnx", "Latency, 1 thread", "target: macs=0.5 met", "verify: passed"):
        assert text in result.stdout
    assert result.stderr == ""


def test_the_output_can_be_named(tiny_cnn: Path, tmp_path: Path) -> None:
    assert run("compress", tiny_cnn, tmp_path / "out.onnx", *QUICK).exit_code == 0
    assert (tmp_path / "out.onnx").exists()
    assert not (tmp_path / "tiny.pruned.onnx").exists()


def test_latency_can_be_left_out(tiny_cnn: Path) -> None:
    assert "Latency" not in run("compress", tiny_cnn, *QUICK).stdout


def test_a_dry_run_writes_nothing_and_minds_no_existing_output(tiny_cnn: Path, tmp_path: Path) -> None:
    out = tmp_path / "tiny.pruned.onnx"
    out.write_text("kept")
    result = run("compress", tiny_cnn, *QUICK, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "planned" in result.stdout
    assert out.read_text() == "kept"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny.onnx", "tiny.pruned.onnx"]


def test_json_to_stdout_is_nothing_but_json(tiny_cnn: Path) -> None:
    result = run("compress", tiny_cnn, *QUICK, "--json", "-")
    assert result.exit_code == 0, result.output
    read = json.loads(result.stdout)
    assert (read["schema"], read["command"]) == (1, "compress")
    assert read["output"].endswith("tiny.pruned.onnx")


def test_json_to_a_file_comes_with_the_table(tiny_cnn: Path, tmp_path: Path) -> None:
    result = run("compress", tiny_cnn, *QUICK, "--json", tmp_path / "out.json")
    assert "Params / size" in result.stdout
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["target"]["met"]


def test_quiet_prints_nothing(tiny_cnn: Path) -> None:
    result = run("compress", tiny_cnn, *QUICK, "-q")
    assert (result.exit_code, result.output) == (0, "")


def test_verbose_prints_the_groups_and_the_stages(tiny_cnn: Path) -> None:
    out = run("compress", tiny_cnn, *QUICK, "-v").stdout
    assert "conv1.weight" in out
    assert "time: load" in out


def test_options_reach_the_pipeline(tiny_cnn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def note(model: str, output: Path | None, **options: Any) -> Any:
        seen.update(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "compress", note)
    run(
        "compress",
        tiny_cnn,
        "--target",
        "params=40%",
        "--method",
        "hesso",
        "--method-option",
        "share=0.2",
        "--method-option",
        "periods = 3",
        "--importance",
        "fpgm",
        "--allocate",
        "sensitivity",
        "--sensitivity",
        "curves.json",
        "--scope",
        "local",
        "--floor",
        "0.25",
        "--deploy",
        "none",
        "--align",
        "4",
        "--exclude",
        "a.*",
        "--exclude",
        "b",
        "--allow-inexact",
        "--best-effort",
        "--input-shapes",
        "image:[2,3,16,16]",
        "--input-shapes",
        "ids:0:1,5",
        "--threads",
        "2",
        "--seed",
        "7",
        "--force",
        "--no-latency",
    )
    assert callable(seen.pop("progress"))
    assert callable(seen.pop("on_step"))
    names = ("data", "samples", "calibrate", "train", "run_dir", "evaluate", "max_drop")
    trained = {name: seen.pop(name) for name in names}
    assert set(trained.values()) == {None}
    assert (seen.pop("recipe"), seen.pop("resume")) == (Recipe(), False)
    assert seen == {
        "target": "params=40%",
        "method": "hesso",
        "method_options": {"share": "0.2", "periods": "3"},
        "importance": "fpgm",
        "allocate": "sensitivity",
        "sensitivity": "curves.json",
        "repair": "auto",
        "scope": "local",
        "floor": 0.25,
        "deploy": "none",
        "align": 4,
        "exclude": ("a.*", "b"),
        "allow_inexact": True,
        "best_effort": True,
        "seed": 7,
        "dry_run": False,
        "force": True,
        "latency": False,
        "threads": 2,
        "input_shapes": {"image": (2, 3, 16, 16), "ids:0": (1, 5)},
    }


def test_warnings_come_last_on_stderr_even_when_quiet(tiny_cnn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = pipeline.compress(tiny_cnn, target="macs=0.5")
    done.warnings = ["the widths are odd"]
    monkeypatch.setattr(pipeline, "compress", lambda *_, **__: done)
    result = run("compress", tiny_cnn, *QUICK, "-q")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "warning: the widths are odd\n")


def test_the_same_seed_gives_the_same_file(tiny_cnn: Path, tmp_path: Path) -> None:
    for name in ("a.onnx", "b.onnx"):
        run("compress", tiny_cnn, tmp_path / name, *QUICK, "--importance", "random", "--seed", 3)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


# Exit code 2: usage


@pytest.mark.parametrize(
    "args",
    [
        ("frobnicate",),
        ("compress",),
        ("compress", "MODEL"),
        ("compress", "MODEL", "--frobnicate"),
        ("compress", "MODEL", "--target", "speed=2"),
        ("compress", "MODEL", "--target", "macs=0"),
        ("compress", "MODEL", "--target", "macs"),
        ("compress", "MODEL", *TARGET, "--target", "params=0.5"),
        ("compress", "MODEL", *TARGET, "--importance", "l7"),
        ("compress", "MODEL", *TARGET, "--floor", "1"),
        ("compress", "MODEL", *TARGET, "--align", "0"),
        ("compress", "MODEL", *TARGET, "--seed", "-1"),
        ("compress", "MODEL", *TARGET, "--input-shapes", "1,3,16,16"),
        ("compress", "MODEL", *TARGET, "--input-shapes", "image:1,-3"),
        ("compress", "MODEL", *TARGET, "--input-shapes", "picture:1,3,16,16"),
        ("compress", "MODEL", *TARGET, "--exclude", "no such name"),
        ("compress", "MODEL", *TARGET, "--exclude", "("),
        ("inspect",),
        ("inspect", "MODEL", "--exclude", "no such name"),
        ("verify", "MODEL"),
        ("bench",),
        ("bench", "MODEL", "--runs", "0"),
        ("bench", "MODEL", "--optimisation", "most"),
        ("bench", "MODEL", "--input-shapes", "picture:1,3,16,16"),
    ],
)
def test_usage_errors(tiny_cnn: Path, args: tuple[str, ...]) -> None:
    failed(run(*(str(tiny_cnn) if a == "MODEL" else a for a in args)), 2)


def test_without_a_command_the_help_is_shown(tiny_cnn: Path) -> None:
    result = run()
    assert result.exit_code == 2
    assert "compress" in result.stderr


def test_an_existing_output_is_kept_without_force(
    tiny_cnn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.onnx"
    out.write_text("kept")
    with monkeypatch.context() as patch:
        patch.setattr(stages, "open_model", reached)
        failed(run("compress", tiny_cnn, out, *QUICK), 2, "exists", "--force")
    assert out.read_text() == "kept"
    assert run("compress", tiny_cnn, out, *QUICK, "--force").exit_code == 0
    assert onnx.load(out).graph.node


def test_the_model_is_never_its_own_output(tiny_cnn: Path) -> None:
    before = tiny_cnn.read_bytes()
    failed(run("compress", tiny_cnn, tiny_cnn, *QUICK, "--force"), 2)
    assert tiny_cnn.read_bytes() == before


@pytest.mark.parametrize("out", ["missing/out.onnx", "tiny.onnx/out.onnx"])
def test_a_folder_that_is_none_is_seen_before_the_work(
    tiny_cnn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    monkeypatch.setattr(stages, "open_model", reached)
    failed(run("compress", tiny_cnn, tmp_path / out, *QUICK), 2)


def refused(**where: object) -> None:
    raise PermissionError(13, "Permission denied")


def test_a_read_only_folder_is_seen_before_the_work(
    tiny_cnn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    if os.geteuid() == 0:  # who may write anywhere
        monkeypatch.setattr(output, "TemporaryFile", refused)
    monkeypatch.setattr(stages, "open_model", reached)
    failed(run("compress", tiny_cnn, folder / "out.onnx", *QUICK), 2, "locked")


@pytest.mark.parametrize("command", ["compress", "inspect", "bench"])
@pytest.mark.parametrize("target", ["tiny.onnx", "other.onnx", "missing/a.json", "."])
def test_json_never_replaces_a_model_and_must_be_writable(
    tiny_cnn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, target: str
) -> None:
    before = tiny_cnn.read_bytes()
    monkeypatch.setattr(stages, "open_model", reached)
    failed(run(command, tiny_cnn, *(QUICK if command == "compress" else ()), "--json", tmp_path / target), 2)
    assert tiny_cnn.read_bytes() == before
    assert not (tmp_path / "other.onnx").exists()


# Exit code 3: model rejected


def spoiled(path: Path, how: str) -> Path:
    """A file that is no model, or a model that is not all there."""
    bad = path.with_name("bad.onnx")
    if how == "text":
        bad.write_text("this is not a model\n" * 20)
    elif how == "empty":
        bad.touch()
    elif how == "folder":
        bad.mkdir()
    elif how == "truncated":
        data = path.read_bytes()
        bad.write_bytes(data[: len(data) // 2])
    elif how in ("external data gone", "external data elsewhere", "external data cut short"):
        onnx.save(onnx.load(path), bad, save_as_external_data=True, location="bad.data", size_threshold=0)
        data_file = path.with_name("bad.data")
        if how == "external data gone":
            data_file.unlink()
        elif how == "external data cut short":
            data_file.write_bytes(data_file.read_bytes()[:100])
        else:
            model = onnx.load(bad, load_external_data=False)
            for tensor in model.graph.initializer:
                tensor.external_data[0].value = "../bad.data"
            bad.write_bytes(model.SerializeToString())
    return bad


SPOILED = [
    "missing",
    "text",
    "empty",
    "folder",
    "truncated",
    "external data gone",
    "external data elsewhere",
    "external data cut short",
]


@pytest.mark.parametrize("command", ["compress", "inspect", "bench", "verify"])
@pytest.mark.parametrize("how", SPOILED)
def test_what_is_no_model_is_rejected(tiny_cnn: Path, command: str, how: str) -> None:
    bad = spoiled(tiny_cnn, how)
    args = {"compress": (bad, *QUICK), "verify": (tiny_cnn, bad)}.get(command, (bad,))
    before = sorted(tiny_cnn.parent.iterdir())
    failed(run(command, *args), 3, "bad.")
    assert sorted(tiny_cnn.parent.iterdir()) == before


def relu_only(path: Path) -> Path:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"], "act")],
        "g",
        [value("x", TensorProto.FLOAT, ["N", 4])],
        [value("y", TensorProto.FLOAT, ["N", 4])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_a_model_with_nothing_to_prune_is_rejected_with_the_reason(tmp_path: Path) -> None:
    failed(run("compress", relu_only(tmp_path / "relu.onnx"), *QUICK), 3, "nothing can be pruned")


def test_a_model_with_nothing_to_prune_can_be_inspected(tmp_path: Path) -> None:
    result = run("inspect", relu_only(tmp_path / "relu.onnx"))
    assert result.exit_code == 0
    assert "in 0 groups" in result.stdout


def test_excluding_everything_leaves_nothing_to_prune(tiny_cnn: Path) -> None:
    failed(run("compress", tiny_cnn, *QUICK, "--exclude", "."), 3, "excluded by '.'")


def test_verify_wants_a_model_that_holds_a_plan(tiny_cnn: Path) -> None:
    failed(run("verify", tiny_cnn, tiny_cnn), 3, "plan")


# Exit codes 4, 5, 1 and 130


def test_a_target_out_of_reach_writes_nothing(tiny_cnn: Path, tmp_path: Path) -> None:
    failed(run("compress", tiny_cnn, "--target", "macs=0.0001", "--no-latency"), 4, "--best-effort")
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.onnx"]


def test_without_data_the_report_says_what_would_repair(tiny_cnn: Path) -> None:
    line = "repair: none, for there is no data"
    how = ("compress", tiny_cnn, "--target", "macs=0.5", "--no-latency", "--force")
    said = " ".join(run(*how).stdout.split())
    assert f"{line} (--data FEW.npz wins accuracy back, no labels needed; without any: --calibrate bn)" in said
    assert line not in run(*how, "--repair", "none").stdout
    assert line not in run(*how, "--dry-run").stdout


def test_best_effort_writes_what_comes_closest_and_says_so(tiny_cnn: Path, tmp_path: Path) -> None:
    result = run("compress", tiny_cnn, "--target", "macs=0.0001", "--no-latency", "--best-effort")
    assert result.exit_code == 0, result.output
    assert "NOT met" in result.stdout
    assert (tmp_path / "tiny.pruned.onnx").exists()


def test_a_pruned_model_that_was_tampered_with_fails_verification(tiny_cnn: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    assert run("compress", tiny_cnn, out, *QUICK).exit_code == 0
    assert run("verify", tiny_cnn, out).exit_code == 0
    model = onnx.load(out)
    bias = next(t for t in model.graph.initializer if t.name == "fc.bias")
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + 1, bias.name))
    onnx.save(model, out)
    failed(run("verify", tiny_cnn, out), 5, "differs")


def test_a_failed_proof_writes_nothing(tiny_cnn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise VerificationFailed("the pruned model differs", "please report it")

    monkeypatch.setattr(stages, "prove", fail)
    failed(run("compress", tiny_cnn, *QUICK), 5, "differs", "report")
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.onnx"]


def test_a_bug_is_an_internal_error_with_its_traceback_on_demand(
    tiny_cnn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr(pipeline, "inspect", fail)
    failed(run("inspect", tiny_cnn), 1, "internal: ZeroDivisionError: two lines", "-vv")
    failed(run("inspect", tiny_cnn, "-v"), 1)
    detailed = run("inspect", tiny_cnn, "-vv")
    assert detailed.exit_code == 1
    assert "Traceback" in detailed.stderr
    assert "error: internal: ZeroDivisionError" in detailed.stderr


def test_an_interruption_ends_with_130_and_leaves_nothing(
    tiny_cnn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "prove", interrupt)
    result = run("compress", tiny_cnn, *QUICK)
    assert result.exit_code == 130
    assert result.stderr.strip() == "error: interrupted"
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.onnx"]


# inspect, verify, bench


def test_inspect_shows_groups_and_barriers(tiny_cnn: Path) -> None:
    out = run("inspect", tiny_cnn).stdout
    for text in ("opset 17", "in 2 groups", "conv1.weight", "graph output 'logits'"):
        assert text in out


@pytest.mark.parametrize("json_option", [("--json", "-"), ("--json",)])
def test_inspect_json(tiny_cnn: Path, json_option: tuple[str, ...]) -> None:
    read = json.loads(run("inspect", tiny_cnn, *json_option).stdout)
    assert [group["size"] for group in read["groups"]] == [64, 64]


def test_inspect_exclude_freezes(tiny_cnn: Path) -> None:
    out = run("inspect", tiny_cnn, "--exclude", r"^conv1\.weight$").stdout
    assert "in 1 group" in out
    assert "excluded by" in out


def test_verify_repeats_the_proof(tiny_cnn: Path, tmp_path: Path) -> None:
    run("compress", tiny_cnn, tmp_path / "out.onnx", *QUICK)
    assert run("verify", tiny_cnn, tmp_path / "out.onnx").stdout.startswith("verify: passed (onnxruntime, ")
    read = json.loads(run("verify", tiny_cnn, tmp_path / "out.onnx", "--json", "-").stdout)
    assert read["verification"]["passed"]


def test_bench_takes_any_number_of_models(tiny_cnn: Path) -> None:
    one = run("bench", tiny_cnn, "--runs", "5", "--threads", "2", "--optimisation", "basic")
    assert "2 threads, graph optimisation 'basic'" in one.stdout
    read = json.loads(run("bench", tiny_cnn, tiny_cnn, tiny_cnn, "--runs", "5", "--json", "-").stdout)
    assert [m["runs"] for m in read["models"]] == [5, 5, 5]
    assert read["models"][0]["against_first"] is None


# the process


@pytest.mark.parametrize("command", ["compress", "inspect", "verify", "bench", "sensitivity"])
def test_every_help_lists_the_exit_codes(command: str) -> None:
    for result in (run("--help"), run(command, "-h")):
        assert result.exit_code == 0
        for line in ("3  model rejected", "5  verification failed", "130  interrupted"):
            assert line in result.stdout


def test_the_version_is_the_packages() -> None:
    assert run("--version").stdout == f"onnxprune {onnxprune.__version__}\n"


def test_the_choices_are_those_of_the_stages() -> None:
    from onnxprune import options, repairs
    from onnxprune.ranking import ALLOCATIONS
    from onnxprune.select.align import DEPLOYMENTS
    from onnxprune.select.importance import IMPORTANCE
    from onnxprune.verify.latency import OPTIMISATION

    assert set(cli.IMPORTANCE) == set(IMPORTANCE)
    assert cli.ALLOCATIONS == ALLOCATIONS
    assert (options.REPAIRS, options.CALIBRATIONS) == (repairs.REPAIRS, repairs.CALIBRATIONS)
    assert cli.DEPLOYMENTS == DEPLOYMENTS
    assert tuple(OPTIMISATION) == cli.OPTIMISATION


LOADED = """
import sys
from onnxprune.cli import main
try:
    main(sys.argv[1:], prog_name="onnxprune")
finally:
    print("LOADED", *(m for m in ("torch", "onnxruntime") if m in sys.modules), file=sys.stderr)
"""


def test_help_loads_neither_torch_nor_onnxruntime() -> None:
    assert python(LOADED, "compress", "--help").stderr.split() == ["LOADED"]


def test_inspect_and_verify_do_without_torch(tiny_cnn: Path, tmp_path: Path) -> None:
    run("compress", tiny_cnn, tmp_path / "out.onnx", *QUICK)
    assert python(LOADED, "inspect", tiny_cnn).stderr.split() == ["LOADED"]
    assert python(LOADED, "verify", tiny_cnn, tmp_path / "out.onnx").stderr.split() == ["LOADED", "onnxruntime"]


def test_python_m_onnxprune(tiny_cnn: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "onnxprune", "inspect", str(tiny_cnn)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "in 2 groups" in done.stdout


def test_a_reader_that_leaves_early_is_no_error(tiny_cnn: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "onnxprune", "inspect", str(tiny_cnn)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_a_terminal_without_unicode_gets_ascii(tiny_cnn: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "onnxprune", "compress", str(tiny_cnn), *QUICK],
        capture_output=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )
    assert done.returncode == 0, done.stderr
    assert "| -" in done.stdout.decode("ascii")


@pytest.mark.parametrize("quiet", [False, True])
def test_progress_is_shown_where_somebody_watches(tiny_cnn: Path, quiet: bool) -> None:
    import pty

    ours, theirs = pty.openpty()
    subprocess.run(
        [sys.executable, "-m", "onnxprune", "compress", str(tiny_cnn), *QUICK, *(["-q"] * quiet)],
        stdout=subprocess.DEVNULL,
        stderr=theirs,
        timeout=120,
        check=True,
    )
    os.write(theirs, b"END")
    shown = ""
    while not shown.endswith("END"):
        shown += os.read(ours, 65536).decode()
    os.close(ours)
    os.close(theirs)
    assert ("analyse ..." in shown) is not quiet
    assert shown.endswith("\x1b[KEND" if not quiet else "END")


def test_progress_is_off_where_nobody_watches(tiny_cnn: Path) -> None:
    assert run("compress", tiny_cnn, *QUICK).stderr == ""
