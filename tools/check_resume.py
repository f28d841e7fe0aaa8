"""`compress` that is killed, that runs in two processes, and that is given bad data.

    python tools/check_resume.py MODEL --data SPEC [--preprocess scale=1/255] [--only kills,team,data] [--method tpp]

kills  kill -9 at moments of every kind (before the first checkpoint, while one is written, between them, behind the
       last one; with a method also between sparsifying and tuning), then --resume: the file must be that of a run that
       was left alone, byte for byte
team   torchrun with two processes (gloo, CPU) against one: weights equal to 1e-5, one file, and nothing else; once as
       the model is and once with --rebn. In float32, by plain SGD at a low rate, so that what is compared is the
       computation and not how training amplifies rounding. Then the data fails in one of the two processes
data   sources that raise, hold NaN, have wrong names, dtypes or ranks, or end at once: exit 6, and what is said

Every run is a process of its own with one thread. Ends with 1 where anything is not as it should be.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
from _common import machine_note, print_table
from onnx import numpy_helper

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TOLERANCE = 1e-5
POLL_S = 0.001
KINDS = ("before the first checkpoint", "while a checkpoint is written", "in training", "behind the last checkpoint")
BETWEEN = "between the phases"
PHASES = ("", "sparsify", "tune")  # folders of a run directory: of oneshot, and of a method's two phases

SOURCES = """
import os
import numpy as np

SHAPE, DTYPE, NAME = {shape}, "{dtype}", "{name}"

def batch(shape=SHAPE, dtype=DTYPE):
    return np.ones(shape, dtype)

def raises():
    raise RuntimeError("the camera is unplugged")

def raises_later():
    for k in range(100):
        if k == 20:
            raise OSError("the disk is gone")
        yield {{NAME: np.random.default_rng(k).random(SHAPE).astype(DTYPE)}}

def nan():
    x = batch()
    x[(0,) * x.ndim] = np.nan
    yield {{NAME: x}}

def wrong_names():
    yield {{"something": batch(), "else": batch()}}

def wrong_dtype():
    yield {{NAME: batch(dtype="int64" if DTYPE.startswith("f") else "float32")}}

def wrong_rank():
    yield {{NAME: batch((SHAPE[0], 2, 3, 4, 5, 6, 7))}}

def ends_at_once():
    return iter(())

def empty_batch():
    yield {{NAME: batch((0, *SHAPE[1:]))}}

def no_iterable():
    return 42

def gives_none():
    pass

def exits():
    raise SystemExit(3)

def one_process_fails():
    for k in range(100):
        if k == 20 and os.environ.get("RANK") == "1":
            raise OSError("the disk of process 1 is gone")
        yield {{NAME: np.random.default_rng(k).random(SHAPE).astype(DTYPE)}}
"""
BAD = [name for name in re.findall(r"^def (\w+)", SOURCES, re.M) if name not in ("batch", "one_process_fails")]


def command(given: argparse.Namespace, out: Path, *more: object, data: str | None = None, steps: int = 0) -> list[str]:
    """The arguments of a run, behind `python`."""
    parts = ["-m", "onnxprune", "compress", given.model, out, "--target", given.target, "--no-latency", "-q"]
    parts += ["--best-effort", "--device", "cpu", "--data", data or given.data, "--steps", steps or given.steps]
    parts += ["--batch-size", given.batch_size, "--method", given.method]
    parts += [text for option in given.method_option for text in ("--method-option", option)]
    if given.preprocess and data is None:
        parts += ["--preprocess", given.preprocess]
    return [str(part) for part in (*parts, *more)]


def run(arguments: Sequence[str], launcher: Sequence[str] = (sys.executable,)) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*launcher, *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=1200)


def must(arguments: Sequence[str], launcher: Sequence[str] = (sys.executable,)) -> None:
    done = run(arguments, launcher)
    if done.returncode != 0:
        sys.exit(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stderr}")


# kills


def found(run_dir: Path, pattern: str) -> list[Path]:
    """Files of checkpoints, phase by phase."""
    return [path for phase in PHASES for path in sorted((run_dir / phase / "checkpoints").glob(pattern))]


def newest(run_dir: Path) -> int:
    """The step of the newest checkpoint, -1 where there is none."""
    manifests = found(run_dir, "*.json")
    return int(json.loads(manifests[-1].read_text())["step"]) if manifests else -1


def moment(kind: str, run_dir: Path, steps: int, dice: random.Random, whole_s: float) -> Callable[[], bool]:
    """Asked again and again: whether the moment has come."""
    begun = time.monotonic()
    if kind == KINDS[0]:
        delay = dice.uniform(0.05, 0.4) * whole_s
        return lambda: time.monotonic() - begun > delay or newest(run_dir) >= 0
    if kind == KINDS[1]:
        left = dice.randrange(1, steps)
        return lambda: newest(run_dir) >= left and bool(found(run_dir, "*.tmp"))
    if kind == KINDS[2]:
        left = dice.randrange(1, steps)
        return lambda: newest(run_dir) >= left
    if kind == BETWEEN:  # or a little before or behind
        first = dice.randrange(steps // 3, 2 * steps // 3)
        return lambda: newest(run_dir) >= first or (run_dir / PHASES[2]).exists()
    pause = dice.uniform(0, 0.02) * whole_s
    ended: list[float] = []

    def behind() -> bool:
        if newest(run_dir) == steps and not ended:
            ended.append(time.monotonic())
        return bool(ended) and time.monotonic() - ended[0] > pause

    return behind


def check_kills(given: argparse.Namespace, folder: Path) -> bool:
    dice = random.Random(given.seed)
    more = ("--checkpoint-every", 1, "--ema", 0.9)
    whole = folder / "whole.onnx"
    begun = time.monotonic()
    must(command(given, whole, *more))
    whole_s, expected = time.monotonic() - begun, whole.read_bytes()
    rows, good = [], True
    kinds = KINDS if given.method == "oneshot" else (*KINDS, BETWEEN)
    for k in range(given.kills):
        out, run_dir, kind = folder / f"out{k}" / "model.onnx", folder / f"run{k}", kinds[k % len(kinds)]
        out.parent.mkdir()
        arguments = command(given, out, *more, "--run-dir", run_dir)
        process = subprocess.Popen([sys.executable, *arguments], env=ENVIRONMENT, stderr=subprocess.DEVNULL)
        come = moment(kind, run_dir, given.steps, dice, whole_s)
        while process.poll() is None and not come():
            time.sleep(POLL_S)
        process.kill()
        killed = process.wait() == -9
        left = [p.name for p in found(run_dir, "*.tmp")]
        at, there, tuning = newest(run_dir), out.exists(), (run_dir / PHASES[2]).exists()
        half = there and out.read_bytes() != expected
        done = run([*arguments, "--resume", *(["--force"] if there else [])])
        same = done.returncode == 0 and out.read_bytes() == expected
        good = good and same and not half
        rows.append(
            [
                k + 1,
                kind if killed else "too late: it had ended",
                "none" if at < 0 else f"step {at}{', tuning' if tuning else ''}",
                ", ".join(left) or "-",
                "HALF" if half else "whole" if there else "no",
                done.returncode,
                "identical" if same else "ANOTHER FILE",
            ]
        )
        if done.returncode:
            print(done.stderr)
    header = ["kill", "moment", "checkpoint", "unfinished", "output there", "exit of --resume", "final file"]
    print_table(header, rows, f"kill -9, then --resume ({given.steps} steps, {whole_s:.1f} s when left alone)")
    return good


# team


def largest_difference(one: Path, two: Path) -> float:
    """Of all stored floats, absolute."""
    a, b = ({t.name: numpy_helper.to_array(t) for t in onnx.load(p).graph.initializer} for p in (one, two))
    if a.keys() != b.keys():
        return float("inf")
    floats = [n for n in a if a[n].dtype.kind == "f"]
    return max(float(np.abs(a[n].astype(np.float64) - b[n]).max(initial=0)) for n in floats)


def check_team(given: argparse.Namespace, folder: Path, sources: Path) -> bool:
    rows, good = [], True
    gentle = ("--optimizer", "sgd", "--lr", 1e-4, "--amp", "none", "--weight-decay", 0)
    for name, more in (("as it is", ()), ("with --rebn", ("--rebn",))):
        one, two = folder / f"one{len(rows)}" / "model.onnx", folder / f"two{len(rows)}" / "model.onnx"
        for out, launcher in ((one, [sys.executable]), (two, TORCHRUN)):
            out.parent.mkdir()
            arguments = command(given, out, *gentle, *more, steps=given.team_steps)
            must(arguments, launcher)
        gap, files = largest_difference(one, two), [p.name for p in two.parent.iterdir()]
        fine = gap <= TOLERANCE and files == ["model.onnx"]
        good = good and fine
        rows.append([name, given.team_steps, f"{gap:.1e}", " ".join(files), "ok" if fine else "NOT EQUAL"])
    print_table(["model", "steps", "largest difference", "written", ""], rows, "two processes against one")
    out = folder / "failing" / "model.onnx"
    out.parent.mkdir()
    done = run(command(given, out, data=f"{sources}:one_process_fails"), TORCHRUN)
    said = [line for line in done.stderr.splitlines() if line.startswith(("error", "hint"))]
    codes = re.findall(r"exitcode\s*:\s*(-?\d+)", done.stderr)
    fine = done.returncode != 0 and "6" in codes and not list(out.parent.iterdir())
    print(f"\ndata fails in process 1: torchrun ends with {done.returncode}, exit codes {', '.join(codes)}")
    print("\n".join(f"  {line}" for line in said))
    return good and fine


# data


def write_sources(given: argparse.Namespace, path: Path) -> None:
    """The bad sources for this model's first input."""
    from onnxprune.data import signature_of
    from onnxprune.model.load import load

    port = signature_of(load(given.model)).inputs[0]
    shape = [n or 16 for n in port.shape or (8, 8)]
    if port.shape and port.shape[0] is None:
        shape[0] = given.batch_size
    path.write_text(SOURCES.format(shape=shape, dtype=port.dtype.name, name=port.name))


def check_data(given: argparse.Namespace, folder: Path, sources: Path) -> bool:
    good = True
    print("\ndata that is not what it should be")
    for name in BAD:
        out = folder / f"{name}.onnx"
        done = run(
            command(given, out, data=f"{sources.name}:{name}"), ["env", "-C", str(sources.parent), sys.executable]
        )
        fine = done.returncode == 6 and not out.exists() and "Traceback" not in done.stderr
        good = good and fine
        print(f"{name}: exit {done.returncode}{'' if fine else '   NOT AS IT SHOULD BE'}")
        print("".join(f"    {line}\n" for line in done.stderr.splitlines()), end="")
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=lambda p: Path(p).resolve())
    parser.add_argument("--data", required=True, help="as compress takes it; a path is made absolute")
    parser.add_argument("--preprocess")
    parser.add_argument("--target", default="macs=0.5")
    parser.add_argument("--method", default="oneshot")
    parser.add_argument("--method-option", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--steps", type=int, default=30, help="of the runs that are killed")
    parser.add_argument("--team-steps", type=int, default=10, help="of the runs of two processes")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--only", default="kills,team,data")
    given = parser.parse_args()
    if Path(given.data).exists():
        given.data = str(Path(given.data).resolve())
    print(machine_note())
    asked, good = given.only.split(","), True
    with tempfile.TemporaryDirectory(prefix="check-resume-") as name:
        folder = Path(name)
        sources = folder / "bad.py"
        write_sources(given, sources)
        if "kills" in asked:
            good = check_kills(given, folder) and good
        if "team" in asked:
            good = check_team(given, folder, sources) and good
        if "data" in asked:
            good = check_data(given, folder, sources) and good
    print("\nall as it should be" if good else "\nFAILED")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
