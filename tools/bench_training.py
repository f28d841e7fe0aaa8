"""How fast the mirror trains beside the torch module that it was exported from: forward, backward and an SGD step.

Both nets have the same weights and inputs, are in training mode, and take steps in turns (native, mirror, mirror,
native, ...) in one process; the ratio is the median over all turns of the time of the native step by the mirror's.

    python tools/bench_training.py                               on a CPU, a few minutes on 2 cores
    python tools/bench_training.py --device cuda                 with bf16 autocast and channels_last
    python tools/bench_training.py --models vit_s --exports ts-14 --batch 4 --seconds 5

Exports, in eval mode: `ts-N` is torch.onnx.export(dynamo=False, training=PRESERVE) with opset N, which keeps BatchNorm;
`dynamo` is the default of today, which folds it and takes onnxscript. Where it is folded, the mirror races with it put
back by `rebn` ("rebn"), against the native net that has it, and is compared with the native net with it folded.

Peak memory is what stays stored (parameters, buffers, gradients and momentum, once each) and the highest balance of
allocations and frees of a step: on a CPU as torch's profiler counts them, on CUDA by max_memory_allocated.
"outputs" and "gradients" are the largest difference between the nets by the largest number, over all outputs and over
the gradients of each parameter, in float64 (float32 where the export makes float32 numbers by itself). "matched" counts
parameters of the mirror that are a native one, as it is or transposed (LSTMs: with the gates in the other order).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import logging
import os
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from _common import amount, machine_note, milliseconds, print_table, verdict, write_json
from _torch_models import CLASSES, NETWORKS, Network
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse as fold_normalisation
from torch.nn import functional as F

from onnxprune import OnnxPruneError
from onnxprune.mirroring import mirror
from onnxprune.mirroring.rebn import channel_moments, rebn

SPEED, MEMORY = 0.95, 1.1
WARM_UP = 3
NEGLIGIBLE = 1e-6  # of the largest gradient: some gradients are zero but for rounding, such as those of keys' biases


@dataclass(frozen=True)
class Row:
    model: str
    export: str
    compared: str
    batch: int
    size: int
    native_s: float
    mirror_s: float
    ratio: float
    native_bytes: int
    mirror_bytes: int
    outputs: float
    gradients: float
    matched: str
    turns: int


@dataclass(frozen=True)
class Setting:
    device: torch.device
    amp: bool
    channels_last: bool
    cpu_time: bool = False

    def arithmetic(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.amp else contextlib.nullcontext()

    def placed(self, module: nn.Module) -> nn.Module:
        layout = {"memory_format": torch.channels_last} if self.channels_last else {}
        return module.to(self.device, **layout)  # type: ignore[call-overload]

    def given(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        def laid(x: Tensor) -> Tensor:
            return x.contiguous(memory_format=torch.channels_last) if self.channels_last and x.ndim == 4 else x

        return tuple(laid(x.to(self.device)) for x in inputs)

    def now(self) -> float:
        """Seconds, when the device has done what it was given."""
        self.wait()
        return time.process_time() if self.cpu_time else time.perf_counter()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Trainer:
    """One net that takes steps on one batch."""

    def __init__(self, module: nn.Module, inputs: Sequence[Tensor], target: Tensor, setting: Setting) -> None:
        self.module, self.inputs, self.target, self.setting = module.train(), inputs, target, setting
        self.optimizer = torch.optim.SGD(module.parameters(), lr=1e-4, momentum=0.9)

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with self.setting.arithmetic():
            loss = F.cross_entropy(self.module(*self.inputs), self.target)
        loss.backward()
        self.optimizer.step()

    def timed(self) -> float:
        start = self.setting.now()
        self.step()
        return self.setting.now() - start

    def peak(self) -> int:
        """Bytes: parameters, buffers and momentum, and what a step needs on top of them (gradients among it)."""
        stored = [*self.module.parameters(), *self.module.buffers()]
        stored += [s["momentum_buffer"] for s in self.optimizer.state.values()]
        held = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in stored}.values())
        self.optimizer.zero_grad(set_to_none=True)
        if self.setting.device.type == "cuda":
            self.setting.wait()
            torch.cuda.reset_peak_memory_stats(self.setting.device)
            before = torch.cuda.memory_allocated(self.setting.device)
            self.step()
            self.setting.wait()
            return held + torch.cuda.max_memory_allocated(self.setting.device) - before
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            self.step()
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
        balance = highest = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            balance += event.nbytes()
            highest = max(highest, balance)
        return held + highest


def exported(network: Network, module: nn.Module, inputs: tuple[Tensor, ...], export: str) -> onnx.ModelProto:
    """The module in eval mode as ONNX, with a dynamic batch."""
    names, file = list(network.names), io.BytesIO()
    module = copy.deepcopy(module).eval()
    with quiet():
        if export == "dynamo":
            free = tuple({0: torch.export.Dim.DYNAMIC} for _ in names)
            program = torch.onnx.export(
                module, inputs, dynamo=True, dynamic_shapes=free, input_names=names, verbose=False
            )
            assert program is not None
            return program.model_proto
        torch.onnx.export(
            module,
            inputs,
            file,  # type: ignore[arg-type]
            dynamo=False,
            training=torch.onnx.TrainingMode.PRESERVE,
            opset_version=int(export.removeprefix("ts-")),
            input_names=names,
            output_names=["y"],
            dynamic_axes={n: {0: "batch"} for n in names},
        )
    return onnx.load_model_from_string(file.getvalue())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' messages."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


# --- whether both compute the same


def gates_reordered(tensor: Tensor) -> Tensor:
    """The rows of an LSTM's input, forget, cell and output gate in the order that ONNX has: i, o, f, c."""
    i, f, c, o = tensor.chunk(4)
    return torch.cat([i, o, f, c])


def forms(module: nn.Module, of: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """What an exporter makes of each parameter, and of what `of` has under its name (gradients)."""
    named = {n: p.detach() for n, p in module.named_parameters()}
    found = [(p, of[n]) for n, p in named.items()]
    found += [(p.t(), of[n].t()) for n, p in named.items() if p.ndim == 2]
    for path, layer in module.named_modules():
        if isinstance(layer, nn.LSTM):
            for k in range(layer.num_layers):
                names = [f"{path}.{kind}_l{k}".lstrip(".") for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
                values, others = ([gates_reordered(held[n]) for n in names] for held in (named, of))
                found += [(v[None], g[None]) for v, g in zip(values[:2], others[:2], strict=True)]
                found.append((torch.cat(values[2:])[None], torch.cat(others[2:])[None]))
    return found


def compared(
    native: nn.Module, mirrored: nn.Module, inputs: Sequence[Tensor], target: Tensor
) -> tuple[float, float, str]:
    """Largest relative difference of outputs and of gradients, and how many parameters were matched."""
    try:
        wide = [x.double() if x.is_floating_point() else x for x in inputs]
        both = [trained(module, wide, target, torch.float64) for module in (native, mirrored)]
    except RuntimeError:  # the export makes float32 states by itself
        both = [trained(module, inputs, target, torch.float32) for module in (native, mirrored)]
    (expected, gradients), (found, others) = both
    known = forms(native, gradients)
    worst, matched = 0.0, 0
    floor = NEGLIGIBLE * max(float(g.abs().max()) for g in gradients.values())
    for name, parameter in mirrored.named_parameters():
        same = next((g for p, g in known if p.shape == parameter.shape and torch.allclose(p, parameter, 1e-5)), None)
        if same is not None:
            matched += 1
            worst = max(worst, difference(same, others[name], floor))
    return difference(expected, found), worst, f"{matched}/{len(others)}"


def trained(
    module: nn.Module, inputs: Sequence[Tensor], target: Tensor, dtype: torch.dtype
) -> tuple[Tensor, dict[str, Tensor]]:
    """The output and the gradients of all parameters."""
    module = copy.deepcopy(module).to(dtype)
    y = module(*inputs)
    F.cross_entropy(y, target).backward()
    named = module.named_parameters()
    return y.detach(), {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named}


def difference(a: Tensor, b: Tensor, floor: float = 1e-30) -> float:
    return float((a - b).abs().max() / a.abs().max().clamp_min(floor))


# --- one row


def compete(network: Network, export: str, setting: Setting, options: argparse.Namespace) -> Row:
    """Raises OnnxPruneError where the export can't be mirrored."""
    batch, size = options.batch or network.batch, options.size or network.size
    native = network.make(size).train()
    inputs = network.inputs(batch, size)
    target = torch.randint(0, CLASSES, (batch,))
    model = exported(network, native, inputs, export)
    mirrored = mirror(model)
    normalised = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in native.modules())
    folded = normalised and not any(n.op_type == "BatchNormalization" for n in model.graph.node)
    twin = fold_normalisation(native.eval()) if folded else native  # type: ignore[arg-type]
    twin.requires_grad_()
    errors = compared(twin.train(), mirrored.train(), inputs, target)
    if folded:
        rebn(mirrored.eval(), channel_moments(mirrored, [inputs]))
        with torch.no_grad():
            errors = (max(errors[0], difference(native(*inputs), mirrored(*inputs))), *errors[1:])
    inputs, target = setting.given(inputs), target.to(setting.device)
    trainers = [Trainer(setting.placed(m), inputs, target, setting) for m in (native, mirrored)]
    times = race(trainers, options.seconds)
    peaks = [t.peak() for t in trainers]
    return Row(
        network.title,
        export,
        "rebn" if folded else "as exported",
        batch,
        size,
        *(statistics.median(t) for t in times),
        statistics.median(a / b for a, b in zip(*times, strict=True)),
        *peaks,
        *errors,
        len(times[0]),
    )


def race(trainers: Sequence[Trainer], seconds: float) -> tuple[list[float], list[float]]:
    """Seconds of each step of both, in turns: for this many seconds in all, and ten turns at least."""
    for trainer in trainers:
        for _ in range(WARM_UP):
            trainer.timed()
    times: tuple[list[float], list[float]] = ([], [])
    start = time.perf_counter()
    while len(times[0]) < 10 or time.perf_counter() - start < seconds:
        order = (0, 1) if len(times[0]) % 2 else (1, 0)
        for k in order:
            times[k].append(trainers[k].timed())
    return times


def cells(row: Row) -> list[object]:
    memory = row.mirror_bytes / row.native_bytes
    return [
        row.model,
        row.export,
        row.compared,
        f"{row.batch}x{row.size}",
        milliseconds(row.native_s),
        milliseconds(row.mirror_s),
        row.turns,
        f"{row.ratio:.3f}",
        verdict(row.ratio, SPEED, at_least=True),
        amount(row.native_bytes, "B"),
        f"{memory:.3f}",
        verdict(memory, MEMORY),
        f"{row.outputs:.0e}",
        f"{row.gradients:.0e}",
        row.matched,
    ]


def chosen(options: argparse.Namespace) -> Iterator[tuple[Network, str]]:
    """Old opsets matter only where they take operators apart: LayerNormalization before 17, Gelu before 20."""
    for name in options.models:
        for export in options.exports or ["ts-20", *(["ts-14"] if name in ("vit_s", "bert") else []), "dynamo"]:
            yield NETWORKS[name], export


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--exports", nargs="+", metavar="ts-N|dynamo", help="default: ts-20, ts-14 and dynamo")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--amp", choices=("none", "bf16"), help="default: bf16 on CUDA, none on a CPU")
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction, help="default: on CUDA")
    parser.add_argument("--batch", type=int, help="samples per step; default: by model")
    parser.add_argument("--size", type=int, help="side of the images or length of the sequences; default: by model")
    parser.add_argument("--seconds", type=float, default=10, help="time per row")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: the process's CPU time, on a machine that is busy with other work (with --threads 1)",
    )
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    note = machine_note()
    torch.set_num_threads(options.threads)
    cuda = options.device == "cuda"
    amp = cuda if options.amp is None else options.amp == "bf16"
    laid = cuda if options.channels_last is None else options.channels_last
    setting = Setting(torch.device(options.device), amp, laid, options.clock == "cpu")
    rows, failed = [], []
    for network, export in chosen(options):
        try:
            rows.append(compete(network, export, setting, options))
        except (OnnxPruneError, ModuleNotFoundError) as error:
            failed.append([network.title, export, f"{type(error).__name__}: {error}"[:200]])
        print(f"{network.title} {export} done", file=sys.stderr, flush=True)
    head = ["model", "export", "mirror", "input", "native ms", "mirror ms", "turns", "speed", f">= {SPEED}"]
    head += ["native peak", "memory", f"<= {MEMORY}", "outputs", "gradients", "matched"]
    device = torch.cuda.get_device_name() if cuda else f"{options.threads} threads"
    how = f"{'bf16 autocast' if amp else 'float32'}{', channels_last' if laid else ''}, {options.clock} time"
    print_table(head, map(cells, rows), f"torch {torch.__version__}, {device}, {how}; {note}")
    if failed:
        print_table(["model", "export", "not measured because"], failed, "")
    write_json(options.json, {"machine": note, "device": device, "how": how, "rows": [asdict(r) for r in rows]})


if __name__ == "__main__":
    main()
