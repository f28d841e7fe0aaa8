"""What the papers ran, as far as it can be run here: networks, data, schedules, targets, and what they published.

Only-Train-Once (OTOv1 arXiv 2107.07467, OTOv2 arXiv 2303.06862, HESSO arXiv 2409.09085) and its notebooks; TPP
(arXiv 2207.12534) and the logs that go with it; CARN (arXiv 1803.08664).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _paper_data import Pairs, cifar, luma, sentences, super_resolution
from _paper_networks import CARN, VGG16, CifarResNet, Encoder, ResNet18, ResNet50
from _paper_runs import Arm
from torch import Tensor, nn

from onnxprune.data.source import Source
from onnxprune.evaluate import Predictor, evaluate
from onnxprune.metrics import METRICS

__all__ = ["CONFIGS", "Config", "PaperArm", "Published", "Task"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A network and its data, at full size or tiny.

    example: an input to export with; free: its axes of any size, the batch aside. values: the metrics of a model file,
    with so many threads; scale: what they are multiplied by to be printed. options: what `compress` is told always.
    """

    network: Callable[[], nn.Module]
    example: Tensor
    train: Source
    loss: str
    metrics: tuple[str, ...]
    values: Callable[[Path, int], dict[str, float]]
    scale: float = 100.0
    input_name: str = "image"
    output_name: str = "logits"
    free: tuple[int, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Published:
    """Percent of MACs and of parameters that are left, the metric and what was lost, as they stand in print."""

    macs: str = "-"
    params: str = "-"
    value: str = "-"
    drop: str = "-"


UNPUBLISHED = Published()


@dataclass(frozen=True, kw_only=True)
class PaperArm:
    """A row. settings: of the training, as `TrainSettings` has them. scratch: from random weights."""

    name: str
    arm: Arm
    settings: Mapping[str, Any]
    scratch: bool = False
    published: Published = UNPUBLISHED


@dataclass(frozen=True, kw_only=True)
class Config:
    """A table. task: from the data folder, the work folder, and whether it is a dry run. base: settings of the network
    that is trained whole."""

    title: str
    task: Callable[[Path, Path, bool], Task]
    base: Mapping[str, Any]
    published_base: str
    arms: tuple[PaperArm, ...]
    note: str = ""


# tasks

ALONE = {"align": 1, "floor": 0.01}  # the papers know neither blocks nor floors


def _cifar(
    build: Callable[[int], nn.Module], width: int, tiny: int, data: Path, work: Path, dry: bool, *, mixup: float = 0.0
) -> Task:
    limits = (96, 64) if dry else (None, None)
    kept = None if dry else work
    test = cifar(data, train=False, limit=limits[1], cache_dir=kept)
    return Task(
        network=lambda: build(tiny if dry else width),
        example=torch.zeros(2, 3, 32, 32),
        train=cifar(data, train=True, limit=limits[0], cache_dir=kept, mixup=mixup),
        loss="ce",
        metrics=("top-1",),
        values=lambda path, threads: {"top-1": evaluate(path, test, METRICS["top1"], threads=threads)},
        options=ALONE,
    )


def _sst2(data: Path, work: Path, dry: bool) -> Task:
    longest, limits = (16, (96, 64)) if dry else (64, (None, None))
    train, words = sentences(data, train=True, longest=longest, limit=limits[0])
    test, _ = sentences(data, train=False, longest=longest, limit=limits[1])
    width, layers = (32, 2) if dry else (256, 4)
    return Task(
        network=lambda: Encoder(words, width, layers, heads=4, longest=longest),
        example=torch.ones(2, longest, dtype=torch.long),
        train=train,
        loss="ce",
        metrics=("top-1",),
        values=lambda path, threads: {"top-1": evaluate(path, test, METRICS["top1"], threads=threads)},
        input_name="tokens",
        options=ALONE,
    )


def _carn(data: Path, work: Path, dry: bool) -> Task:
    side = 12 if dry else 64
    train, sets = super_resolution(data, patch=side, count=64 if dry else 6400, limit=2 if dry else None)
    return Task(
        network=lambda: CARN(8 if dry else 64),
        example=torch.rand(1, 3, side, side + 4),
        train=train,
        loss="l1",
        metrics=("PSNR Set14", "PSNR Set5"),
        values=lambda path, threads: {f"PSNR {n}": luma_psnr(path, sets[n], threads) for n in ("Set14", "Set5")},
        scale=1.0,
        output_name="target",
        free=(2, 3),
        options={**ALONE, "input_shapes": {"image": (1, 3, side, side)}, "exclude": [r"^exit\.weight$"]},
    )


def luma_psnr(path: Path, pairs: Pairs, threads: int, border: int = 2) -> float:
    """PSNR in dB of the Y channel, without a border, the mean over images: as super-resolution is reported."""
    model = Predictor(path, threads=threads)
    found = []
    for batch in pairs.batches(1):
        made = np.clip(model.run(batch.inputs, "target"), 0, 1)
        made = np.round(made * 255) / 255
        difference = (luma(made) - luma(batch.targets["target"]))[..., border:-border, border:-border]
        found.append(10 * np.log10(255**2 / np.square(difference).mean()))
    return float(np.mean(found))


# recipes


def _sgd(
    epochs: int, milestones: Sequence[float], weight_decay: float, *, lr: float = 0.1, batch: int = 64, **more: Any
) -> dict[str, Any]:
    """SGD whose rate is divided by 10 at these shares of the run."""
    schedule = {"warmup": 0.0, "schedule": "steps", "milestones": tuple(milestones)}
    own = {"epochs": epochs, "optimizer": "sgd", "lr": lr, "batch": batch, "weight_decay": weight_decay}
    return own | schedule | more


def _adam(lr: float, batch: int, weight_decay: float = 0.0, **more: Any) -> dict[str, Any]:
    return {"optimizer": "adamw", "lr": lr, "batch": batch, "weight_decay": weight_decay, **more}


QUARTERS = (0.25, 0.5, 0.75)
HALF = 0.5  # of the training, until when DHSPG's redundant units have to be zero; then they are removed


def _dhspg(start: float, epsilon: float = 0.95) -> dict[str, Any]:
    """start: of the whole training."""
    return {"share": HALF, "start": start / HALF, "epsilon": epsilon, "saliency": "dhspg"}


HESSO = {"share": 0.2, "start": 0.5, "stop": 1.0, "saliency": "mixture"}  # from a tenth of the whole to a fifth


def _once(
    method: str,
    target: str,
    settings: Mapping[str, Any],
    options: Mapping[str, Any],
    published: Published = UNPUBLISHED,
) -> PaperArm:
    """Trained and pruned once, from random weights."""
    arm = Arm(method=method, target=target, method_options=options)
    return PaperArm(name=f"{method} {target}", arm=arm, settings=settings, scratch=True, published=published)


def _tuned(
    method: str,
    target: str,
    settings: Mapping[str, Any],
    *,
    name: str = "",
    published: Published = UNPUBLISHED,
    method_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> PaperArm:
    """From the trained network."""
    arm = Arm(method=method, target=target, options=options, method_options=method_options or {})
    return PaperArm(name=f"{name or method} {target}", arm=arm, settings=settings, published=published)


# Only-Train-Once on CIFAR-10: by the published share of groups, and to the published share of MACs


def _vgg16() -> Config:
    recipe = _sgd(300, QUARTERS, 5e-4, lr=0.05, clip=1.0)
    how = _dhspg(50 / 300)
    return Config(
        title="VGG16, CIFAR-10",
        task=partial(_cifar, partial(VGG16, batch_norm=False), 64, 8),
        base=recipe,
        published_base="91.6",
        arms=(
            _once("dhspg", "macs=0.163", recipe, how, Published("16.3", "2.5", "91.0", "0.6")),
            _once("dhspg", "macs=0.134", recipe, how, Published("13.4", "2.5")),
            _once("hesso", "macs=0.163", recipe, HESSO),
        ),
        note="Published: OTOv1 (16.3 %) and OTOv2 (13.4 %). Rate 0.05 and not 0.1, and gradients clipped at 1.",
    )


def _vgg16_bn() -> Config:
    recipe = _sgd(300, QUARTERS, 5e-4)
    how = _dhspg(50 / 300, 0.9)
    theirs = Published("26.6", "5.0", "93.1", "0.1")
    return Config(
        title="VGG16-BN, CIFAR-10",
        task=partial(_cifar, partial(VGG16, batch_norm=True), 64, 8, mixup=1.0),
        base=recipe,
        published_base="93.2",
        arms=(
            _once("dhspg", "channels=0.21", recipe, how, theirs),
            _once("dhspg", "macs=0.266", recipe, how, theirs),
            _once("hesso", "macs=0.266", recipe, HESSO),
        ),
        note="Published: OTOv2's notebook, whose base is not given (OTOv1's is 93.2). Trained with mix-up.",
    )


def _resnet18() -> Config:
    recipe = _sgd(300, QUARTERS, 5e-4)
    short = _sgd(100, (0.5,), 1e-4)
    how = _dhspg(50 / 300)
    theirs = Published("20.3", "8.8", "92.86", "0.16")
    return Config(
        title="ResNet-18, CIFAR-10",
        task=partial(_cifar, ResNet18, 64, 8),
        base=recipe,
        published_base="93.02",
        arms=(
            _once("dhspg", "channels=0.3", recipe, how, theirs),
            _once("dhspg", "macs=0.203", recipe, how, theirs),
            _once("hesso", "channels=0.3", short, HESSO, Published("-", "8", "92.85", "0.17")),
            _once("hesso", "macs=0.203", recipe, HESSO),
        ),
        note="Published: OTOv2's notebook, and HESSO in 100 epochs.",
    )


def _resnet50() -> Config:
    recipe = _sgd(300, QUARTERS, 1e-3)
    how = _dhspg(10 / 300)
    theirs = Published("10.0", "3.6", "94.3", "-0.7")
    return Config(
        title="ResNet-50, CIFAR-10",
        task=partial(_cifar, ResNet50, 64, 8),
        base=recipe,
        published_base="93.62",
        arms=(
            _once("dhspg", "channels=0.2", recipe, how, theirs),
            _once("dhspg", "macs=0.1", recipe, how, theirs),
            _once("dhspg", "macs=0.078", recipe, how, Published("7.8", "4.1")),
            _once("hesso", "macs=0.1", recipe, HESSO),
        ),
        note="Published: OTOv2's notebook (10.0 %) and article (7.8 %).",
    )


# TPP on ResNet-56: per ratio, (left of the MACs, published accuracies of L1, FixReg and TPP)

TPP_RATIOS = {0.7: (1 / 3.59, 92.26, 92.38, 92.35), 0.9: (1 / 11.41, 86.75, 89.24, 89.63)}
TPP_RATIOS[0.95] = (1 / 19.31, 83.03, 85.90, 85.86)
TPP_BASE = 93.78
RELEASED = {"scale": "code", "ramp": "paper", "by": 1e-3, "hold": 1000}  # lambda grows ten times as fast as there
INSIDE = r"^/blocks/blocks\.\d+/bn2|^/bn1"  # normalisations of the residual stream: what is excluded


def _tpp_said(macs: float, value: float) -> Published:
    return Published(f"{100 * macs:.1f}", "-", f"{value:.2f}", f"{TPP_BASE - value:.2f}")


def _resnet56() -> Config:
    tuning, whole = (_sgd(n, (0.5, 0.75), 5e-4, lr=1e-2, batch=128) for n in (120, 150))
    arms: list[PaperArm] = []
    for ratio, (macs, l1, fixed, tpp) in TPP_RATIOS.items():
        target, more = f"macs={macs:.4f}", {"scope": "local", "importance": "l1", "exclude": [INSIDE]}
        said = partial(_tpp_said, macs)
        arms.append(_tuned("oneshot", target, tuning, name=f"{ratio} L1", published=said(l1), **more))
        arms.append(_tuned("oneshot", target, whole, name=f"{ratio} L1, epochs of TPP", **more))
        share = {"share": 30 / 150}
        for name, method, options, published in (
            ("FixReg", "fixreg", share, said(fixed)),
            ("GReg", "greg", share, UNPUBLISHED),
            ("TPP", "tpp", share, said(tpp)),
            ("TPP as released", "tpp", share | RELEASED, UNPUBLISHED),
        ):
            how = {"name": f"{ratio} {name}", "published": published, "method_options": options}
            arms.append(_tuned(method, target, whole, **how, **more))
    return Config(
        title="ResNet-56 (option A), CIFAR-10, ratio per layer inside the blocks",
        task=partial(_cifar, lambda width: CifarResNet(56, width, "pad"), 16, 16),
        base=_sgd(200, (0.5, 0.75), 5e-4, batch=128),
        published_base=str(TPP_BASE),
        arms=tuple(arms),
        note="Published: lr 1e-2, best test epoch, mean of 3. TPP's regularised part there was 256 epochs, here 30.",
    )


# a transformer, and super-resolution


def _transformer() -> Config:
    base, tuned = (_adam(5e-4, 64, 0.01, epochs=n, schedule="cosine") for n in (10, 6))
    arms = [_tuned(m, f"macs={left}", tuned) for left in (0.5, 0.25) for m in ("oneshot", "dhspg", "hesso", "tpp")]
    return Config(
        title="Transformer encoder, SST-2",
        task=_sst2,
        base=base,
        published_base="-",
        arms=tuple(arms),
        note="Nothing is published of this network; OTOv1's BERT-base on SQuAD keeps 40 % of parameters at -7.2 F1.",
    )


def _super_resolution() -> Config:
    recipe = _adam(1e-4, 64, steps=600_000, warmup=0.0, schedule="steps", milestones=(2 / 3,))
    theirs = Published("18.4", "18.0", "33.05")
    return Config(
        title="CARN x2, T91",
        task=_carn,
        base=recipe,
        published_base="-",
        arms=(
            _once("hesso", "channels=0.4", recipe, HESSO, theirs),
            _once("hesso", "macs=0.184", recipe, HESSO, theirs),
            _once("dhspg", "macs=0.184", recipe, _dhspg(0.1)),
            _tuned("oneshot", "macs=0.184", _adam(1e-4, 64, steps=200_000, warmup=0.0, schedule="cosine")),
        ),
        note="Published: HESSO on DIV2K, Set14.",
    )


CONFIGS: dict[str, Callable[[], Config]] = {
    "vgg16": _vgg16,
    "vgg16_bn": _vgg16_bn,
    "resnet18": _resnet18,
    "resnet50": _resnet50,
    "resnet56": _resnet56,
    "sst2": _transformer,
    "carn": _super_resolution,
}
