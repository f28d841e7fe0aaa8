"""How long a step of DHSPG and HESSO takes beside torch.optim.SGD, on the mirrors of the papers' networks.

    python tools/bench_optimizers.py                                  three networks, minutes on 2 cores
    python tools/bench_optimizers.py --models resnet18 --threads 1
    python tools/bench_optimizers.py --device cuda --json rows.json

Every phase is an optimizer of its own over a copy of the mirror, with gradients that stay the same; all of them step
in turns in one process, in an order that changes from turn to turn. A figure is the median over the turns of a step's
time, a ratio the median of what a step takes by what SGD(foreach) takes in the same turn. All have momentum and weight
decay.

phases: warm-up; measuring (statistics are taken, in the last steps before a choice); projecting (DHSPG) or
shrinking (HESSO), with no redundant unit at zero yet; done, with all of them at zero. On CUDA, the time is that of the
device, many steps in a row, and `launch` that of the host.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import machine_note, milliseconds, print_table, verdict, write_json
from _paper_networks import VGG16, ResNet18, ResNet50, export, seeded
from torch import nn
from torch.fx import GraphModule

from onnxprune.axes.analysis import Analysis, analyse
from onnxprune.mirroring import mirror
from onnxprune.model.load import load
from onnxprune.train.dhspg import DHSPG
from onnxprune.train.families import params_and_groups
from onnxprune.train.hesso import HESSO
from onnxprune.train.unit_optimizer import UnitOptimizer

MODELS: dict[str, Callable[[int], nn.Module]] = {
    "resnet18": ResNet18,
    "resnet50": ResNet50,
    "vgg16_bn": lambda width: VGG16(width, batch_norm=True),
}
LIMITS = {"warm-up": 1.15, "projecting": 1.3, "shrinking": 1.3}
DECAY, MOMENTUM, RATE, TARGET = 1e-4, 0.9, 1e-4, 0.7
FAR = 10**9  # steps: a time that does not come
REFERENCE = "SGD(foreach)"


def reference(module: GraphModule, **how: bool) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=DECAY, **how)


def arms(analysis: Analysis, module: GraphModule) -> dict[str, torch.optim.Optimizer]:
    """Optimizers by what they do, each over its own copy of the module; the gradients are set."""

    def ours(kind: type[UnitOptimizer], **how: Any) -> UnitOptimizer:
        groups = params_and_groups(with_gradients(module), analysis, weight_decay=DECAY)
        return kind(groups, lr=RATE, momentum=MOMENTUM, target=TARGET, **how)

    return {
        REFERENCE: reference(with_gradients(module), foreach=True),
        "SGD(fused)": reference(with_gradients(module), fused=True),
        "DHSPG warm-up": ours(DHSPG, start=FAR),
        "DHSPG warm-up, measuring": ours(DHSPG, start=FAR, window=FAR),
        "DHSPG projecting": ours(DHSPG, start=1, lmbda=1e-9, epsilon=0.0),
        "DHSPG done": ours(DHSPG, start=1, stop=2),
        "HESSO warm-up": ours(HESSO, start=FAR, stop=2 * FAR),
        "HESSO shrinking": ours(HESSO, start=1, stop=FAR, periods=1),
        "HESSO shrinking, measuring": ours(HESSO, start=1, stop=FAR, periods=2, window=FAR),
        "HESSO done": ours(HESSO, start=1, stop=2, periods=1),
    }


def with_gradients(module: GraphModule) -> GraphModule:
    """A copy with small gradients."""
    own = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(0)
    for p in own.parameters():
        p.grad = (1e-3 * torch.randn(p.shape, generator=generator)).to(p)
    return own


def seconds_of(optimizer: torch.optim.Optimizer, steps: int, device: torch.device) -> tuple[float, float]:
    """Of a step: in all, and on the host."""
    start = time.perf_counter()
    for _ in range(steps):
        optimizer.step()
    launched = time.perf_counter() - start
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / steps, launched / steps


def measured(name: str, width: int, turns: int, steps: int, device: torch.device, folder: Path) -> list[dict[str, Any]]:
    path = folder / f"{name}.onnx"
    export(seeded(lambda: MODELS[name](width), 0), path, torch.zeros(1, 3, 32, 32))
    graph = load(path)
    analysis = analyse(graph)
    module = mirror(graph).to(device).train()
    optimizers = arms(analysis, module)
    for optimizer in optimizers.values():
        seconds_of(optimizer, 4, device)
    times: dict[str, list[tuple[float, float]]] = {arm: [] for arm in optimizers}
    order = list(optimizers)
    shuffled = random.Random(0)
    for _ in range(turns):
        shuffled.shuffle(order)
        for arm in order:
            times[arm].append(seconds_of(optimizers[arm], steps, device))
    rows = []
    for arm, taken in times.items():
        optimizer = optimizers[arm]
        phase = arm.partition(" ")[2].partition(",")[0]
        if isinstance(optimizer, UnitOptimizer):
            assert optimizer.phase == phase, (arm, optimizer.phase)
            assert phase in ("warm-up", "done") or bool(optimizer.redundant.any() and not optimizer.dead.any())
        ratios = [own[0] / sgd[0] for own, sgd in zip(taken, times[REFERENCE], strict=True)]
        row = {"model": name, "arm": arm, "phase": phase, "ms": 1e3 * statistics.median(t[0] for t in taken)}
        row |= {"launch_ms": 1e3 * statistics.median(t[1] for t in taken), "ratio": statistics.median(ratios)}
        units = optimizer.table.units if isinstance(optimizer, UnitOptimizer) else None
        params = sum(p.numel() for p in module.parameters())
        rows.append(row | {"units": units, "params": params, "device": str(device), "threads": torch.get_num_threads()})
    return rows


def shown(rows: list[dict[str, Any]]) -> None:
    def limit(row: dict[str, Any]) -> str:
        bound = None if "measuring" in row["arm"] else LIMITS.get(row["phase"])
        return "" if bound is None else f"{bound:g}: {verdict(row['ratio'], bound)}"

    cells = [
        (
            r["model"],
            r["arm"],
            milliseconds(r["ms"] / 1e3),
            milliseconds(r["launch_ms"] / 1e3),
            f"{r['ratio']:.2f}",
            limit(r),
        )
        for r in rows
    ]
    print_table(("model", "optimizer", "ms", "launch ms", f"by {REFERENCE}", "at most"), cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--width", type=int, default=64, help="channels of the first stage; less for a dry run")
    parser.add_argument("--turns", type=int, default=31)
    parser.add_argument("--steps", type=int, help="in a row: 1 by default, 20 on CUDA")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    parser.add_argument("--json", type=Path, help="write the rows here")
    o = parser.parse_args()
    if o.threads:
        torch.set_num_threads(o.threads)
    device = torch.device(o.device)
    steps = o.steps or (20 if o.device == "cuda" else 1)
    where = torch.cuda.get_device_name(device) if o.device == "cuda" else machine_note()
    print(f"{where}; {torch.get_num_threads()} threads; torch {torch.__version__}", flush=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in o.models.split(","):
            rows += measured(name, o.width, o.turns, steps, device, Path(folder))
    shown(rows)
    write_json(o.json, rows)


if __name__ == "__main__":
    main()
