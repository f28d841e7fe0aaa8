"""Trainability after pruning: MLP-7-Linear on MNIST, the controlled experiment of the TPP paper (arXiv 2207.12534).

    python tools/mlp7_linear.py --data-dir DATA
    python tools/mlp7_linear.py --data-dir DATA --seeds 0 --arms L1,TPP-auto --json rows.json

Seven linear layers, 1024-100-100-100-100-100-100-10, without activations, on MNIST resized to 32 x 32. Each of the six
hidden layers loses 80 of its 100 units, those of the lowest mean |w|; what is left is tuned for `--epochs` at two
learning rates (a tenth after each third). The network is linear: what it can be is a matter of its shape, and what
becomes of it in tuning is a matter of how well gradients pass, which the mean Jacobian singular value (JSV) says.

    L1          remove, and tune
    L1-equal    the same, and the steps that the arms below train before the removal are spent on tuning, too
    OrthP       L1, then the weights that stay are made orthogonal: perfect here, harmful in a network with activations
    FixReg      shrink the weights of what is to go, with a constant lambda = 1, and remove
    GReg        ... with a growing lambda, without a Gram penalty
    TPP-paper   ... and the Gram penalty as the paper has it; TPP-code: as the authors' program has it
    TPP-auto    ... scaled by the layers' largest singular values, and a ramp of 20 e-folds

The network is exported to ONNX; what is trained is its mirror, the groups are the analysis', and the removal is the
rewriter's. The arms with a penalty train for `--steps` at rate 1e-3, lambda grows by 1e-4 every 10 steps.
DATA holds MNIST's four IDX files (*.gz). A seed takes about 5 minutes on one thread of a machine with nothing else to
do. Exit code 1 where one of the signs of a faithful TPP is missing in the means of TPP-paper or of TPP-auto: at least
90 % right after the removal, where L1 has 20 % at most; 3 points more than L1 when tuned at the lower rate; at least
0.7 of the base's JSV, where L1 has 0.01 at most.
"""

from __future__ import annotations

import argparse
import gzip
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import machine_note, print_table, verdict, write_json
from _paper_networks import export
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

from onnxprune import Analysis, analyse, mirror
from onnxprune.model.load import load
from onnxprune.select.plan import Plan
from onnxprune.train.families import params_and_groups
from onnxprune.train.jacobian import mean_jsv
from onnxprune.train.shrink import shrink
from onnxprune.train.tpp import TPP, Growing, lowest

WIDTHS = (1024, 100, 100, 100, 100, 100, 100, 10)
RATIO = 0.8
BATCH, MOMENTUM, WEIGHT_DECAY = 100, 0.9, 5e-4
TUNING_RATES = (1e-2, 1e-3)
PENALTY_RATE = 1e-3
EFOLDS = 20.0
MEAN, STD = 0.1307, 0.3081
Row = dict[str, Any]


@dataclass(frozen=True)
class Digits:
    """images: (N, 1024), normalised. labels: (N,)."""

    images: Tensor
    labels: Tensor

    @classmethod
    def read(cls, folder: Path, part: str) -> Digits:
        """part: 'train' or 't10k'."""
        images = torch.from_numpy(_idx(folder, f"{part}-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28).copy())
        labels = torch.from_numpy(_idx(folder, f"{part}-labels-idx1-ubyte.gz", 8).astype(np.int64))
        large = F.interpolate(images.float() / 255, size=(32, 32), mode="bilinear", align_corners=False)
        return cls(((large - MEAN) / STD).flatten(1), labels)

    def batches(self, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled anew in each epoch."""
        generator = torch.Generator().manual_seed(seed)
        done = 0
        while True:
            for index in torch.randperm(len(self.labels), generator=generator).split(BATCH):
                if done == steps:
                    return
                yield self.images[index], self.labels[index]
                done += 1


def _idx(folder: Path, name: str, header: int) -> np.ndarray:
    found = next(iter(sorted(folder.glob(f"*{name}"))), folder / name)
    with gzip.open(found) as file:
        return np.frombuffer(file.read(), np.uint8, offset=header)


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(WIDTHS)))


def sgd(module: nn.Module, lr: float) -> torch.optim.SGD:
    return torch.optim.SGD(module.parameters(), lr=lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)


def tune(module: nn.Module, data: Digits, steps: int, lr: float, seed: int) -> None:
    """Train with a rate that falls to a tenth after each third."""
    optimizer = sgd(module, lr)
    for step, (x, y) in enumerate(data.batches(steps, seed)):
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.1 ** (3 * step // steps)
        optimizer.zero_grad()
        F.cross_entropy(module(x), y).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(module: nn.Module, data: Digits) -> float:
    """In percent."""
    return 100 * float((module(data.images).argmax(1) == data.labels).float().mean())


# what the arms do before the removal

Prepare = Callable[[TPP, GraphModule, Digits, int, int], None]


def penalise(
    tpp: TPP,
    module: GraphModule,
    data: Digits,
    steps: int,
    seed: int,
    *,
    strength: Callable[[int, int], float],
) -> None:
    """Train with a penalty. strength: lambda, of the step and their number."""
    optimizer = sgd(module, PENALTY_RATE)
    for step, (x, y) in enumerate(data.batches(steps, seed)):
        optimizer.zero_grad()
        F.cross_entropy(module(x), y).backward()
        tpp.strength = strength(step, steps)
        tpp.add_gradients()
        optimizer.step()
        tpp.shrink(PENALTY_RATE / (1 - MOMENTUM))


def growing(step: int, steps: int) -> float:
    return Growing().at(step)


def constant(step: int, steps: int) -> float:
    return 1.0


def budgeted(step: int, steps: int) -> float:
    """E-folds 2 E t / T^2 in step t of T, E in all."""
    return EFOLDS * (2 * step + 1) / steps**2 / (PENALTY_RATE / (1 - MOMENTUM))


@dataclass(frozen=True)
class Arm:
    """penalty: how `TPP` is made, and lambda; None: units are removed as they are. orthogonal: see OrthP. equal:
    tuning takes the penalty's steps as well."""

    penalty: tuple[Callable[..., TPP], Callable[[int, int], float]] | None = None
    orthogonal: bool = False
    equal: bool = False


ARMS = {
    "L1": Arm(),
    "L1-equal": Arm(equal=True),
    "OrthP": Arm(orthogonal=True),
    "FixReg": Arm((partial(TPP, gram=False, reach="weights"), constant)),
    "GReg": Arm((partial(TPP, gram=False), growing)),
    "TPP-paper": Arm((partial(TPP, scale="paper"), growing)),
    "TPP-code": Arm((partial(TPP, scale="code"), growing)),
    "TPP-auto": Arm((partial(TPP, scale="auto"), budgeted)),
}


JUDGED = ("TPP-paper", "TPP-auto")


def make_orthogonal(module: nn.Module) -> None:
    """Every weight matrix by the nearest that QR gives: orthonormal rows or columns."""
    for weight in module.parameters():
        if weight.ndim == 2:
            tall = weight.data if weight.shape[0] >= weight.shape[1] else weight.data.T
            q, r = torch.linalg.qr(tall)
            q = q * torch.sign(torch.diagonal(r))
            weight.data.copy_(q if weight.shape[0] >= weight.shape[1] else q.T)


# a seed


@dataclass
class Trial:
    """The base of a seed, and what the arms make of it."""

    train: Digits
    test: Digits
    seed: int
    epochs: int
    base_epochs: int
    steps: int

    @property
    def per_epoch(self) -> int:
        return len(self.train.labels) // BATCH

    def base(self, folder: Path) -> Row:
        module = network(self.seed)
        tune(module, self.train, self.base_epochs * self.per_epoch, TUNING_RATES[0], self.seed)
        self.path = folder / f"mlp7-{self.seed}.onnx"
        export(module, self.path, self.test.images[:2])
        return {"arm": "base", "seed": self.seed, "accuracy": accuracy(module, self.test), "jsv": self._jsv(module)}

    def arm(self, name: str) -> Row:
        start, arm = time.perf_counter(), ARMS[name]
        graph = load(self.path)
        analysis, module = analyse(graph), mirror(graph)
        small = self._removed(arm, module, analysis)
        if arm.orthogonal:
            make_orthogonal(small)
        row = {"arm": name, "seed": self.seed, "accuracy": accuracy(small, self.test), "jsv": self._jsv(small)}
        weights = {k: v.clone() for k, v in small.state_dict().items()}
        for lr in TUNING_RATES:
            small.load_state_dict(weights)
            more = self.steps if arm.equal else 0
            tune(small, self.train, self.epochs * self.per_epoch + more, lr, self.seed + 1)
            row[f"tuned_{lr:g}"] = accuracy(small, self.test)
        return row | {"seconds": time.perf_counter() - start}

    def _removed(self, arm: Arm, module: GraphModule, analysis: Analysis) -> GraphModule:
        make, strength = arm.penalty or (TPP, None)
        tpp = make(params_and_groups(module, analysis))
        redundant = lowest(tpp.magnitudes(), RATIO)
        tpp.choose(redundant)
        if strength is not None:
            penalise(tpp, module, self.train, self.steps, self.seed, strength=strength)
        tpp.remove()
        plan = Plan({family: np.flatnonzero(~gone) for family, gone in redundant.items()})
        small, _ = shrink(module, analysis, plan)
        return small

    def _jsv(self, module: nn.Module) -> float:
        return mean_jsv(module, self.test.images[:20])


def signs(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """What a faithful TPP shows, and whether it does, in those of the `JUDGED` arms that were run."""

    def mean(arm: str, what: str) -> float:
        return statistics.fmean(r[what] for r in rows if r["arm"] == arm)

    there = {r["arm"] for r in rows}
    if not {"base", "L1"} <= there:
        return []
    slow, base = f"tuned_{TUNING_RATES[1]:g}", mean("base", "jsv")
    found = [
        ("L1: at most 20 % right after removal", verdict(mean("L1", "accuracy"), 20)),
        ("L1: JSV at most 0.01", verdict(mean("L1", "jsv"), 0.01)),
    ]
    for arm in (a for a in JUDGED if a in there):
        gain = mean(arm, slow) - mean("L1", slow)
        found += [
            (f"{arm}: at least 90 % right after removal", verdict(mean(arm, "accuracy"), 90, at_least=True)),
            (f"{arm}: 3 points more than L1 when tuned at {TUNING_RATES[1]:g}", verdict(gain, 3, at_least=True)),
            (f"{arm}: at least 0.7 of the base's JSV", verdict(mean(arm, "jsv") / base, 0.7, at_least=True)),
        ]
    return found


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Means over seeds, and the spread."""
    lines = []
    for arm in ("base", *ARMS):
        own = [r for r in rows if r["arm"] == arm]
        if own:
            cells = [
                _mean([r[what] for r in own if what in r], 4 if what == "jsv" else 2)
                for what in ("accuracy", "jsv", *(f"tuned_{x:g}" for x in TUNING_RATES))
            ]
            lines.append([arm, *cells, str(len(own))])
    return lines


def _mean(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{digits}f} ± {spread:.{digits}f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--arms", type=lambda t: t.split(","), default=list(ARMS), help=f"of {', '.join(ARMS)}")
    parser.add_argument("--seeds", type=lambda t: [int(x) for x in t.split(",")], default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=15, help="of tuning")
    parser.add_argument("--base-epochs", type=int, default=15)
    parser.add_argument("--steps", type=int, default=11_000, help="with a penalty")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the rows here")
    o = parser.parse_args()
    unknown = set(o.arms) - set(ARMS)
    if unknown:
        parser.error(f"no arm {', '.join(sorted(unknown))}")
    torch.set_num_threads(o.threads)
    print(f"{machine_note()}; {o.threads} thread(s)", flush=True)
    start, rows = time.perf_counter(), []
    train, test = (Digits.read(o.data_dir, part) for part in ("train", "t10k"))
    with tempfile.TemporaryDirectory() as folder:
        for seed in o.seeds:
            trial = Trial(train, test, seed, o.epochs, o.base_epochs, o.steps)
            rows.append(trial.base(Path(folder)))
            print(rows[-1], flush=True)
            for name in o.arms:
                rows.append(trial.arm(name))
                print(rows[-1], flush=True)
    header = ["arm", "after removal", "mean JSV", *(f"tuned, {x:g}" for x in TUNING_RATES), "seeds"]
    print_table(header, table(rows), f"MLP-7-Linear, MNIST 32 x 32, ratio {RATIO:g}: top-1 in %")
    found = signs(rows)
    print_table(["sign", ""], found)
    print(f"\n{time.perf_counter() - start:.0f} s")
    write_json(o.json, rows)
    return 1 if any(word != "met" for _, word in found) else 0


if __name__ == "__main__":
    sys.exit(main())
