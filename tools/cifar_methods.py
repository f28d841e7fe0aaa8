"""Methods side by side: one small ResNet on CIFAR-10, compressed to the same MACs in the same number of epochs.

    python tools/cifar_methods.py --data-dir DATA --work FOLDER
    python tools/cifar_methods.py ... --methods oneshot,tpp --ratios 0.25 --seeds 0,1,2 --epochs 8
    python tools/cifar_methods.py ... --set dhspg:epsilon=0.9 --lr imp=0.02

For each seed a base network is trained (`--base-epochs`); then each method makes it smaller, and has `--epochs` for
everything it does: sparsifying the whole network and tuning the small one. Beside them stand

    dense    the base trained on for as long, whole: what the epochs alone bring
    scratch  DHSPG from random weights, once for all: base epochs + epochs, with the base's learning rate

Accuracy is top-1 on the 10,000 test images, taken in onnxruntime of the written files. Images are cropped and flipped
at random in training. ResNet-20 of width 8 (stages of 8, 16 and 32 channels, 1x1 shortcuts) has 10.5 M MACs. Its
layers are narrow, so that single channels are counted (--align 1); for speed on a CPU one would keep multiples of 4.

DATA holds cifar10_train.npz and cifar10_test.npz (packed JPEG). FOLDER keeps the decoded images, the bases, every
written network, and rows.jsonl: what is there already is not computed again, so that the same command, after an
interruption or with more methods, goes on. The defaults take about a minute per epoch and network on one thread.
"""

from __future__ import annotations

import argparse
import ast
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from _common import machine_note, write_json
from _paper_data import Images, cifar
from _paper_networks import CifarResNet, export, seeded
from _paper_runs import Arm, Rows, compressed, trained
from torch import nn

from onnxprune import TrainSettings
from onnxprune.evaluate import evaluate
from onnxprune.metrics import METRICS

METHODS = ("oneshot", "imp", "tpp", "dhspg", "hesso")
FROM_SCRATCH = {"share": 0.5, "start": 0.4}  # a warm-up of a fifth of the training, as published
MORE = ("greg", "fixreg", "issp", "dense", "scratch")
EXAMPLE = torch.zeros(2, 3, 32, 32)
Row = dict[str, Any]


@dataclass(frozen=True)
class Experiment:
    """What is the same for all arms."""

    data: Path
    work: Path
    depth: int
    width: int
    base_epochs: int
    epochs: int
    images: int | None
    test_images: int | None
    base_lr: float
    lr: Mapping[str, float]
    batch: int
    align: int
    amp: str
    device: str
    threads: int
    sets: Mapping[str, Mapping[str, Any]]

    @cached_property
    def train(self) -> Images:
        return cifar(self.data, train=True, limit=self.images, cache_dir=self.work)

    @cached_property
    def test(self) -> Images:
        return cifar(self.data, train=False, limit=self.test_images, cache_dir=self.work)

    @cached_property
    def rows(self) -> Rows:
        return Rows(self.work / "rows.jsonl")

    def network(self, seed: int) -> nn.Module:
        return seeded(lambda: CifarResNet(self.depth, self.width), seed)

    def settings(self, epochs: int, lr: float, seed: int) -> TrainSettings:
        return TrainSettings(
            epochs=epochs,
            optimizer="sgd",
            lr=lr,
            momentum=0.9,
            weight_decay=5e-4,
            batch=self.batch,
            amp=self.amp,  # type: ignore[arg-type]
            channels_last=True,
            device=self.device,
            seed=seed,
        )

    def top1(self, path: Path) -> float:
        return evaluate(path, self.test, METRICS["top1"], threads=self.threads)

    def key(self, name: str, seed: int, **more: Any) -> Row:
        """What decides a result."""
        own = {"network": f"resnet{self.depth}", "width": self.width, "images": self.images, "test": self.test_images}
        own |= {"base_epochs": self.base_epochs, "base_lr": self.base_lr, "batch": self.batch, "amp": self.amp}
        return own | {"method": name, "seed": seed} | more

    # the networks that everything starts from

    def base(self, seed: int) -> Row:
        """The trained base; its file is in the row."""
        return self.rows.once(self.key("base", seed), lambda: self._trained(f"base-{seed}", seed, self.base_epochs))

    def _trained(self, name: str, seed: int, epochs: int) -> Row:
        module = self.network(seed)
        _, seconds = trained(module, self.train, "ce", self.settings(epochs, self.base_lr, seed))
        path = self.work / f"{self._stem(name)}.onnx"
        export(module, path, EXAMPLE)
        torch.save(module.state_dict(), path.with_suffix(".pt"))
        return {"file": path.name, "macs": 1.0, "params": 1.0, "top1": self.top1(path), "seconds": seconds}

    def dense(self, seed: int) -> Row:
        """The base trained on."""

        def work() -> Row:
            module = self.network(seed)
            start = self.work / self.base(seed)["file"]
            module.load_state_dict(torch.load(start.with_suffix(".pt"), weights_only=True))
            settings = self.settings(self.epochs, self._lr("dense"), seed + 1)
            _, seconds = trained(module, self.train, "ce", settings)
            path = self.work / f"{self._stem(f'dense-{self.epochs}-{seed}')}.onnx"
            export(module, path, EXAMPLE)
            return {"file": path.name, "macs": 1.0, "params": 1.0, "top1": self.top1(path), "seconds": seconds}

        return self.rows.once(self.key("dense", seed, epochs=self.epochs, lr=self._lr("dense"), ratio=1.0), work)

    # arms

    def arm(self, method: str, ratio: float, seed: int) -> Row:
        """One network made smaller by one method."""
        scratch = method == "scratch"
        lr = self.base_lr if scratch else self._lr(method)
        sets = {**(FROM_SCRATCH if scratch else {}), **self.sets.get(method, {})}
        how = Arm(
            method="dhspg" if scratch else method,
            target=f"macs={ratio:g}",
            options={"align": self.align},
            method_options=sets,
        )

        def work() -> Row:
            if scratch:
                start = self.work / f"{self._stem(f'random-{seed}')}.onnx"
                export(self.network(seed), start, EXAMPLE)
            else:
                start = self.work / self.base(seed)["file"]
            path = self.work / f"{self._stem(f'{method}-{ratio:g}-{self.epochs}-{seed}')}.onnx"
            settings = self.settings(self.epochs + self.base_epochs * scratch, lr, seed + 1)
            row = compressed(how, start, path, self.train, "ce", settings, seed=seed)
            return row | {"file": path.name, "top1": self.top1(path)}

        key = self.key(method, seed, epochs=self.epochs, lr=lr, ratio=ratio, align=self.align, set=sets)
        return self.rows.once(key, work)

    def _lr(self, method: str) -> float:
        return self.lr.get(method, self.lr[""])

    def _stem(self, name: str) -> str:
        return f"resnet{self.depth}-w{self.width}-e{self.base_epochs}-{name}"


def table(experiment: Experiment, methods: Sequence[str], ratios: Sequence[float], seeds: Sequence[int]) -> list[str]:
    """The results as Markdown, a row per method and ratio; computes what is not there yet, seed by seed."""
    bases, dense = [], []
    arms: dict[tuple[float, str], list[Row]] = {(r, m): [] for r in ratios for m in methods if m != "dense"}
    for seed in seeds:
        bases.append(_told("base", seed, experiment.base(seed)))
        if "failure" in bases[-1]:
            raise SystemExit(1)
        if "dense" in methods:
            dense.append(_told("base, trained on", seed, experiment.dense(seed)))
        for (ratio, method), rows in arms.items():
            rows.append(_told(f"{method} {ratio:g}", seed, experiment.arm(method, ratio, seed)))
    lines = ["| method | MACs wanted | MACs | params | top-1 | each seed | drop | seconds |", "|" + " --- |" * 8]
    lines.append(_line("base", "", bases, bases))
    if dense:
        lines.append(_line("base, trained on", "", dense, bases))
    for (ratio, method), rows in arms.items():
        lines.append(_line("dhspg from scratch" if method == "scratch" else method, f"{ratio:.0%}", rows, bases))
    return lines


def _told(name: str, seed: int, row: Row) -> Row:
    """The row, said when it is there."""
    print(f"{name}, seed {seed}: {_said(row)}", flush=True)
    return row


def _said(row: Row) -> str:
    if "failure" in row:
        return row["failure"]
    return f"top-1 {row['top1']:.2%}, MACs {row['macs']:.1%}, params {row['params']:.1%}, {row['seconds']:.0f} s"


def _line(name: str, wanted: str, rows: Sequence[Row], bases: Sequence[Row]) -> str:
    done = [(r, b) for r, b in zip(rows, bases, strict=True) if "failure" not in r]
    if not done:
        return f"| {name} | {wanted} | failed: {rows[0]['failure']} |" + " |" * 5

    def mean(values: Iterable[float]) -> float:
        return statistics.fmean(values)

    each = " ".join(f"{r['top1']:.2%}" if "failure" not in r else "failed" for r in rows)
    cells = [name, wanted, f"{mean(r['macs'] for r, _ in done):.1%}", f"{mean(r['params'] for r, _ in done):.1%}"]
    cells += [f"{mean(r['top1'] for r, _ in done):.2%}", each, f"{mean(b['top1'] - r['top1'] for r, b in done):.2%}"]
    return f"| {' | '.join(cells)} | {mean(r['seconds'] for r, _ in done):.0f} |"


def _sets(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """['dhspg:epsilon=0.9'] as {'dhspg': {'epsilon': 0.9}}."""
    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        method, _, setting = text.partition(":")
        name, _, value = setting.partition("=")
        own = found.setdefault(method, {})
        try:
            own[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            own[name] = value
    return found


def _names(text: str) -> list[str]:
    found = text.split(",")
    unknown = set(found) - {*METHODS, *MORE}
    if unknown:
        raise argparse.ArgumentTypeError(f"no method {', '.join(sorted(unknown))}: there are {(*METHODS, *MORE)}")
    return found


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for what is kept")
    parser.add_argument("--methods", type=_names, default=[*METHODS], help=f"of {', '.join((*METHODS, *MORE))}")
    parser.add_argument("--ratios", type=lambda t: [float(x) for x in t.split(",")], default=[0.5, 0.25])
    parser.add_argument("--seeds", type=lambda t: [int(x) for x in t.split(",")], default=[0, 1])
    parser.add_argument("--depth", type=int, default=20, help="of the ResNet: 6 n + 2")
    parser.add_argument("--width", type=int, default=8, help="channels of the first stage")
    parser.add_argument("--base-epochs", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=4, help="of each arm, all that it does together")
    parser.add_argument("--train-size", type=int, help="take so many training images only")
    parser.add_argument("--test-size", type=int, help="take so many test images only")
    parser.add_argument("--base-lr", type=float, default=0.1)
    parser.add_argument("--lr", action="append", default=[], metavar="[METHOD=]RATE", help="0.05 for all by default")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--align", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="METHOD:NAME=VALUE", help="an option of a method")
    parser.add_argument("--amp", choices=("auto", "bf16", "fp16", "none"), default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the rows here")
    return parser.parse_args()


def main() -> None:
    o = _options()
    torch.set_num_threads(o.threads)
    o.work.mkdir(parents=True, exist_ok=True)
    lr = {"": 0.05} | {t.rpartition("=")[0]: float(t.rpartition("=")[2]) for t in o.lr}
    experiment = Experiment(
        data=o.data_dir,
        work=o.work,
        depth=o.depth,
        width=o.width,
        base_epochs=o.base_epochs,
        epochs=o.epochs,
        images=o.train_size,
        test_images=o.test_size,
        base_lr=o.base_lr,
        lr=lr,
        batch=o.batch,
        align=o.align,
        amp=o.amp,
        device=o.device,
        threads=o.threads,
        sets=_sets(o.set),
    )
    print(f"{machine_note()}; {o.threads} thread(s)", flush=True)
    lines = table(experiment, o.methods, o.ratios, o.seeds)
    print("\n" + "\n".join(lines))
    write_json(o.json, experiment.rows.all())


if __name__ == "__main__":
    main()
