"""Time and memory of the closed-form repair, each run in a process of its own.

    python tools/bench_repair.py --work DIR                       ResNet-50 at 224 x 224, and a 12-layer encoder of
                                                                  BERT-base's size with 128 tokens; 64 to 256 inputs
    python tools/bench_repair.py --work DIR --only encoder --samples 256

Networks are exported from `_torch_models.py` with random weights, for which every layer costs what it costs with
trained ones; inputs are made up. `repair` is all of `reconstruct.repair`: both networks over the data, moments and
solutions. `per input` is the slope between the fewest and the most inputs, which the other rows should lie on. Peak is
the resident set at its largest (VmHWM), libraries and the model included; `in files` is what was written to temporary
ones because of `--memory-limit`. Targets: under 10 minutes and 6 GB for 256 inputs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from _common import machine_note, print_table, verdict, write_json

SECONDS_TARGET, PEAK_TARGET = 600.0, 6e9
OPSET = 17
BATCH = 16
SIZES = {"resnet50": 224, "encoder": 128}


def network(name: str) -> Any:
    """A network of `_torch_models`; 'encoder' is its BERT at the size of BERT-base."""
    from _torch_models import NETWORKS, Bert

    if name != "encoder":
        return NETWORKS[name]
    return replace(NETWORKS["bert"], title="12-layer encoder", build=lambda _: Bert(layers=12, width=768, heads=12))


def export(name: str, path: Path) -> None:
    import torch

    chosen = network(name)
    size = SIZES[name]
    torch.onnx.export(
        chosen.make(size).eval(),
        chosen.inputs(2, size),
        str(path),
        input_names=list(chosen.names),
        output_names=["out"],
        opset_version=OPSET,
        dynamo=False,
        dynamic_axes={n: {0: "N"} for n in (*chosen.names, "out")},
    )


def batches(name: str, samples: int) -> Iterator[dict[str, np.ndarray]]:
    import torch

    chosen = network(name)
    torch.manual_seed(1)
    for start in range(0, samples, BATCH):
        inputs = chosen.inputs(min(BATCH, samples - start), SIZES[name])
        yield {n: x.numpy() for n, x in zip(chosen.names, inputs, strict=True)}


def peak() -> int:
    """VmHWM in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def child(path: str, name: str, samples: int, options: argparse.Namespace) -> None:
    import torch

    from onnxprune.axes.analysis import analyse
    from onnxprune.model.load import load
    from onnxprune.reconstruct import repair
    from onnxprune.select.choose import choose
    from onnxprune.select.target import parse_target

    torch.set_num_threads(options.threads)
    analysis = analyse(load(path))
    plan = choose(analysis, parse_target(options.target), align=16).plan
    before, start, cpu = peak(), time.perf_counter(), time.process_time()
    found = repair(
        analysis, plan, batches(name, samples), samples=samples, memory_limit=int(options.memory_limit * 1e9)
    )
    said = {
        "seconds": time.perf_counter() - start,
        "cpu_s": time.process_time() - cpu,
        "before": before,
        "peak": peak(),
        "held": found.peak_bytes,
        "files": found.spilled_bytes,
        "steps": found.steps,
        "consumers": len(found.consumers),
        "widest": max((c.columns for c in found.consumers), default=0),
        "solving_s": sum(c.seconds for c in found.consumers),
    }
    print(json.dumps(said))


def measure(path: Path, name: str, samples: int, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", str(path), "--only", name, "--samples", str(samples)]
    for option in ("threads", "target", "memory_limit"):
        command += [f"--{option.replace('_', '-')}", str(getattr(options, option))]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(options.threads))
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | threads)
    return {"network": name, "samples": samples, **json.loads(done.stdout.splitlines()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for the exported models")
    parser.add_argument("--only", choices=SIZES)
    parser.add_argument("--samples", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--target", default="macs=0.5")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory-limit", type=float, default=2.0, help="GB of activations between steps, in memory")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.only, options.samples[0], options)
        return
    if options.work is None:
        parser.error("--work is wanted")
    options.work.mkdir(parents=True, exist_ok=True)
    rows, lines, lasts = [], [], []
    for name in [options.only] if options.only else list(SIZES):
        path = options.work / f"{name}.onnx"
        if not path.exists():
            export(name, path)
        found = [measure(path, name, n, options) for n in sorted(options.samples)]
        first, last = found[0], found[-1]
        more = max(last["samples"] - first["samples"], 1)
        slope = (last["seconds"] - first["seconds"]) / more
        for f in found:
            lines.append(
                (
                    network(name).title,
                    f["samples"],
                    f"{f['seconds']:.0f}",
                    f"{f['cpu_s']:.0f}",
                    f"{f['solving_s']:.0f}",
                    f"{slope:.2f}" if f is last and len(found) > 1 else "",
                    f"{f['peak'] / 1e9:.2f}",
                    f"{f['files'] / 1e9:.2f}",
                    f["consumers"],
                    f["steps"],
                    f["widest"],
                )
            )
        rows += found
        lasts.append(last)
    header = ("network", "inputs", "repair s", "cpu s", "of it moments and solving", "s per input", "peak GB")
    print_table((*header, "in files GB", "consumers", "steps", "widest"), lines, f"repair after {options.target}")
    print(machine_note())
    print(f"under 10 minutes: {verdict(max(f['seconds'] for f in lasts), SECONDS_TARGET)}")
    print(f"under 6 GB: {verdict(max(f['peak'] for f in lasts), PEAK_TARGET)}")
    write_json(options.json, rows)


if __name__ == "__main__":
    main()
