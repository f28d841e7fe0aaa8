"""Time and memory of `compress`, stage by stage, in a child process.

    python tools/bench_memory.py --work DIR --model resnet50.onnx    about 100 MB: <= 15 s, peak <= 3 x its size
    python tools/bench_memory.py --work DIR --gigabytes 3            a made decoder with external data: everything but
                                                                     onnxruntime's verification in <= 1.5 GB

Peak is the resident set at its largest (VmHWM, reset at each stage where the kernel allows it), which counts pages of
the memory-mapped model that happen to be resident although they can be dropped at any time; `private` leaves those out
(RssAnon, sampled every few milliseconds). 'start' is the process with everything imported, onnxruntime too. 'rewrite'
includes writing the pruned model; 'verify' is onnxruntime holding the masked original and then the pruned model.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import machine_note, print_table, verdict, write_json
from _graphs import decoder

SECONDS_TARGET, SIZES_TARGET, LARGE_TARGET_MB = 15.0, 3.0, 1500.0
BEFORE_VERIFY = ("load", "analyse", "select", "rewrite")
DECODER = {"hidden": 2048, "heads": 16, "mlp": 8192, "vocabulary": 32000}
SAMPLE_S = 0.004
MB = 1e6


@dataclass
class Stage:
    """Peaks in bytes; `seconds` may add up several stretches of the same name."""

    peak: int = 0
    private: int = 0
    seconds: float = 0.0


def status_of(pid: int | str) -> dict[str, int]:
    """Memory fields of /proc/PID/status, in bytes."""
    found = {}
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name in ("VmRSS", "VmHWM", "RssAnon"):
            found[name] = int(value.split()[0]) * 1024
    return found


def child(model: str, output: str, target: str, best_effort: bool) -> None:
    """Run compress and say at each stage what the one before it took."""
    import onnxruntime  # noqa: F401  imported first, so that its code is not put down to a stage

    from onnxprune import OnnxPruneError, compress

    state: dict[str, Any] = {"stage": "start", "since": time.perf_counter()}

    def enter(stage: str) -> None:
        peak, now = status_of("self")["VmHWM"], time.perf_counter()
        fresh = True
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            fresh = False  # peaks only grow from here on
        print(
            json.dumps(
                {
                    "left": state["stage"],
                    "peak": peak,
                    "seconds": now - state["since"],
                    "entered": stage,
                    "fresh": fresh,
                }
            ),
            flush=True,
        )
        state.update(stage=stage, since=now)

    enter("load")
    start = time.perf_counter()
    summary: dict[str, Any] = {}
    try:
        result = compress(model, output, target=target, force=True, best_effort=best_effort, progress=enter)
        assert result.after is not None and result.verification is not None
        summary.update(
            exit=0,
            params=result.before.params,
            params_after=result.after.params,
            error=result.verification.max_rel_error,
        )
    except OnnxPruneError as error:
        summary.update(exit=error.exit_code, reason=f"{type(error).__name__}: {error}")
    summary["wall_s"] = time.perf_counter() - start
    enter("end")
    print(json.dumps({"summary": summary}), flush=True)


def measure(model: Path, output: Path, target: str, best_effort: bool) -> tuple[dict[str, Stage], dict[str, Any]]:
    """Run the child and watch it."""
    command = [sys.executable, __file__, "--child", str(model), str(output), "--target", target]
    process = subprocess.Popen(
        [*command, *(["--best-effort"] if best_effort else [])], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    stages: dict[str, Stage] = {"start": Stage()}
    current = ["start"]

    def watch() -> None:
        while process.poll() is None:
            try:
                seen = status_of(process.pid)
            except OSError:
                return
            stage = stages[current[0]]
            stage.private = max(stage.private, seen.get("RssAnon", 0))
            time.sleep(SAMPLE_S)

    watcher = threading.Thread(target=watch)
    watcher.start()
    summary: dict[str, Any] = {}
    for line in process.stdout:
        said = json.loads(line) if line.startswith("{") else {}
        if "summary" in said:
            summary = said["summary"]
        elif "left" in said:
            left = stages[said["left"]]
            left.peak, left.seconds = max(left.peak, said["peak"]), left.seconds + said["seconds"]
            stages.setdefault(said["entered"], Stage())
            current[0] = said["entered"]
            summary.setdefault("fresh", said["fresh"])
    code = process.wait()
    watcher.join()
    stages.pop("end", None)
    if not summary.get("wall_s"):
        summary = {"exit": f"died ({code})", "reason": "", "wall_s": sum(s.seconds for s in stages.values())}
    return stages, summary


def report(title: str, size: int, stages: dict[str, Stage], summary: dict[str, Any]) -> None:
    rows = [
        [name, f"{s.seconds:.2f}", f"{s.peak / MB:.0f}", f"{s.private / MB:.0f}", f"{s.peak / size:.2f}"]
        for name, s in stages.items()
    ]
    print_table(["stage", "seconds", "peak MB", "private MB", "x model"], rows, title)
    outcome = (
        f"{summary['params']:,} -> {summary['params_after']:,} parameters, relative error {summary['error']:.1e}"
        if summary["exit"] == 0
        else summary["reason"]
    )
    print(f"exit {summary['exit']}: {outcome}")


def size_of(model: Path) -> int:
    """Bytes of a model and the data file beside it."""
    data = model.with_name(f"{model.name}.data")
    return model.stat().st_size + (data.stat().st_size if data.exists() else 0)


def small(options: argparse.Namespace, output: Path) -> dict[str, Any]:
    rows, runs = [], []
    size = size_of(options.model)
    for k in range(options.runs):
        stages, summary = measure(options.model, output, options.target, options.best_effort)
        report(f"{options.model.name}, {size / MB:.0f} MB, {options.target}, run {k + 1}", size, stages, summary)
        runs.append({"stages": {n: vars(s) for n, s in stages.items()}, "summary": summary})
        peak = max(s.peak for s in stages.values())
        rows.append(
            [
                str(k + 1),
                f"{summary['wall_s']:.1f}",
                verdict(summary["wall_s"], SECONDS_TARGET),
                f"{peak / MB:.0f}",
                f"{peak / size:.2f}",
                verdict(peak / size, SIZES_TARGET),
            ]
        )
    print_table(["run", "wall s", f"<= {SECONDS_TARGET:.0f}", "peak MB", "x model", f"<= {SIZES_TARGET:.0f}"], rows)
    return {"bytes": size, "runs": runs}


def large(options: argparse.Namespace, output: Path) -> dict[str, Any]:
    path = options.work / f"decoder_{options.gigabytes:g}gb.onnx"
    hidden, mlp = DECODER["hidden"], DECODER["mlp"]
    per_layer = 4 * (4 * hidden**2 + 3 * hidden * mlp)
    ends = 8 * hidden * DECODER["vocabulary"]
    layers = max(round((options.gigabytes * 1e9 - ends) / per_layer), 1)
    if not path.exists():
        print(f"writing {path.name}: {layers} layers", file=sys.stderr, flush=True)
        decoder(path, layers=layers, hollow=False, **DECODER)
    size = size_of(path)
    stages, summary = measure(path, output, options.target, options.best_effort)
    report(f"{path.name}, {layers} layers, {size / MB:.0f} MB, {options.target}", size, stages, summary)
    ours = max(stages[n].peak for n in BEFORE_VERIFY if n in stages) / MB
    private = max(stages[n].private for n in BEFORE_VERIFY if n in stages) / MB
    print(
        f"up to and including the rewrite: peak {ours:.0f} MB ({verdict(ours, LARGE_TARGET_MB)}: "
        f"<= {LARGE_TARGET_MB:.0f}), of it private {private:.0f} MB; "
        f"verification: {stages['verify'].peak / MB if 'verify' in stages else 0:.0f} MB"
    )
    return {"bytes": size, "stages": {n: vars(s) for n, s in stages.items()}, "summary": summary}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="measure this model")
    parser.add_argument("--gigabytes", type=float, help="make a decoder of this size and measure it")
    parser.add_argument("--work", type=Path, help="folder for made models and for what is written")
    parser.add_argument("--target", default="params=0.7", help="what is to remain")
    parser.add_argument("--best-effort", action="store_true", help="take the closest model where the target isn't met")
    parser.add_argument("--runs", type=int, default=3, help="runs of --model")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], options.child[1], options.target, options.best_effort)
        return
    if not options.work or not (options.model or options.gigabytes):
        parser.error("--work and one of --model and --gigabytes are needed")
    note = machine_note()
    print(note)
    document: dict[str, Any] = {"machine": note, "target": options.target}
    output = options.work / "bench-memory-out"
    output.mkdir(parents=True, exist_ok=True)
    try:
        if options.model:
            document["model"] = small(options, output / "pruned.onnx")
        if options.gigabytes:
            document["large"] = large(options, output / "pruned.onnx")
    finally:
        shutil.rmtree(output)
    write_json(options.json, document)


if __name__ == "__main__":
    main()
