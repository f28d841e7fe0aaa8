"""Torch-Pruning's side of `bench_analysis.py`. Runs in a Python that has torch, torchvision and torch-pruning, and
knows nothing of onnxprune: what it finds out goes to stdout, one JSON document per line.

    python _rival_torch_pruning.py export --out DIR --models resnet50 swin_t    seeded, untrained, 224x224, batch 1
    python _rival_torch_pruning.py export --out DIR --models swin_t --raw       without the exporter's constant folding
    python _rival_torch_pruning.py time --model resnet50 --repeats 3            graph build and all groups

A line is printed as soon as a repeat is done, so that a reader who stops waiting still has the earlier ones.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

# torchvision's native library in the wheel is built for CUDA; beside a CPU torch it does not load, and the Python part
# then fails for want of two schemas. Classification models call none of the native operators.
_library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
for _name in () if torch.cuda.is_available() else ("nms", "qnms"):
    _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import torchvision  # noqa: E402

SIZE = 224
OPSET = 17


def build(name: str) -> torch.nn.Module:
    """A torchvision classifier with seeded random weights, in evaluation mode.

    It is made to look like a trained one: tensors of a single value (BatchNorm's, biases) get several, since equal
    ones would be merged; and BatchNorm's statistics are measured, since the signal would fade on its way otherwise.
    """
    torch.manual_seed(0)
    torch.backends.mha.set_fastpath_enabled(False)  # an operator of its own, which the exporter doesn't know
    model: torch.nn.Module = torchvision.models.get_model(name, weights=None)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and bool((tensor == tensor.flatten()[0]).all()):
                tensor.mul_(torch.rand_like(tensor) * 0.4 + 0.8).add_(torch.rand_like(tensor) * 0.1)
        norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
        if norms:
            model.train()(torch.randn(8, 3, SIZE, SIZE))
    return model.eval()


def export(name: str, folder: Path, raw: bool) -> None:
    path = folder / (f"{name}.raw.onnx" if raw else f"{name}.onnx")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            build(name),
            (torch.zeros(1, 3, SIZE, SIZE),),
            str(path),
            dynamo=False,
            opset_version=OPSET,
            do_constant_folding=not raw,
            input_names=["input"],
            output_names=["logits"],
        )
    say(model=name, path=path.name, bytes=path.stat().st_size)


def classifier(model: torch.nn.Module) -> torch.nn.Module:
    """The last linear layer, whose outputs are the classes and must stay."""
    return [m for m in model.modules() if isinstance(m, torch.nn.Linear)][-1]


def time_groups(name: str, repeats: int) -> None:
    import torch_pruning as tp

    logging.disable(logging.WARNING)
    say(version=version("torch-pruning"), torch=torch.__version__)
    model = build(name)
    example = torch.zeros(1, 3, SIZE, SIZE)
    roots = (torch.nn.Conv2d, torch.nn.Linear)
    for _ in range(repeats):
        start = time.perf_counter()
        graph = tp.DependencyGraph().build_dependency(model, example_inputs=example)
        built = time.perf_counter()
        groups = sum(1 for _ in graph.get_all_groups(ignored_layers=[classifier(model)], root_module_types=roots))
        done = time.perf_counter()
        say(
            build_s=built - start,
            groups_s=done - built,
            groups=groups,
            peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        )


def say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    exporting = commands.add_parser("export")
    exporting.add_argument("--out", type=Path, required=True)
    exporting.add_argument("--models", nargs="+", required=True)
    exporting.add_argument("--raw", action="store_true")
    timing = commands.add_parser("time")
    timing.add_argument("--model", required=True)
    timing.add_argument("--repeats", type=int, default=3)
    timing.add_argument("--memory", type=float, help="gigabytes of address space at most")
    options = parser.parse_args()
    if options.command == "export":
        options.out.mkdir(parents=True, exist_ok=True)
        for name in options.models:
            export(name, options.out, options.raw)
    else:
        if options.memory:
            limit = int(options.memory * 1e9)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        time_groups(options.model, options.repeats)


if __name__ == "__main__":
    main()
