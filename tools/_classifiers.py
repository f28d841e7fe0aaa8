"""Trained image classifiers whose data is at hand, and that data as each of them takes it.

The data folder holds cifar_train.npz, cifar_test.npz, mnist_train.npz and mnist_test.npz as `unpack_data.py` writes
them: `image`, bytes of (N,C,H,W), and `label`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnxprune import OnnxPruneError, load
from onnxprune.data import Source, open_data, signature_of

__all__ = ["CLASSIFIERS", "Classifier", "known"]

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True)
class Classifier:
    """data: the set it was trained on. last: whether channels come last. low, peak: what 0 and 255 become. normalised:
    whether CIFAR-10's mean and deviation are taken out."""

    data: str
    last: bool = False
    low: float = 0.0
    peak: float = 1.0
    normalised: bool = False

    def source(self, model: Path, folder: Path, part: str, count: int | None = None) -> Source:
        """The first `count` images of a part (train, test), for this model. Raises DataError."""
        signature = signature_of(load(model))
        port = signature.inputs[0]
        with np.load(folder / f"{self.data}_{part}.npz") as stored:
            images, labels = stored["image"][:count], stored["label"][:count]
        values = images.astype(np.float32) * np.float32((self.peak - self.low) / 255) + np.float32(self.low)
        if self.normalised:
            values = (values - np.float32(MEAN).reshape(3, 1, 1)) / np.float32(STD).reshape(3, 1, 1)
        if self.last:
            values = values.transpose(0, 2, 3, 1)
        values = np.ascontiguousarray(values).reshape(-1, *(int(d or 0) for d in (port.shape or ())[1:]))
        return open_data({port.name: values, "label": labels}, signature)


CLASSIFIERS = {
    "resnet_cifar10_bn": Classifier("cifar"),
    "resnet_cifar10_folded": Classifier("cifar"),
    "transformer_mnist_rows": Classifier("mnist"),
    "vnn_cifar_small": Classifier("cifar", last=True),
    "vnn_cifar_medium": Classifier("cifar", last=True),
    "vnn_resnet_2b": Classifier("cifar", normalised=True),
    "vnn_mnistfc_256x4": Classifier("mnist"),
    "vnn_mnistfc_256x6": Classifier("mnist"),
    "vnn_verivital_avgpool": Classifier("mnist"),
    "mara_cnn_max_mnist2": Classifier("mnist", last=True),
    "mara_cnn_max_mnist3": Classifier("mnist", last=True),
    "mara_mnist5x20_leaky": Classifier("mnist"),
    "mara_selfattn_mnist": Classifier("mnist", last=True),
    "mnist_conv_cntk": Classifier("mnist", peak=255.0),
    "mara_yizhak": Classifier("mnist", low=-1.0),
    "mara_dropout": Classifier("mnist"),
    "occ_image_classifier32": Classifier("cifar", low=-1.0),
}
"""By the file's stem. The first three stand in `models`; the others are known by the names of their makers' files."""


def known(paths: list[Path]) -> list[Path]:
    """The files among these (folders: the files in them) whose classifier is known, in the order of the table."""
    files = {f.stem: f for p in paths for f in (sorted(p.glob("*.onnx")) if p.is_dir() else [p])}
    found = [files[stem] for stem in CLASSIFIERS if stem in files]
    if not found:
        raise OnnxPruneError(
            f"no known classifier among {', '.join(map(str, paths))}", f"known: {', '.join(CLASSIFIERS)}"
        )
    return found
