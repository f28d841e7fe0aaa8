"""Print the top-1 accuracy of ONNX models on the test images stored beside this file.

Usage::

    python models/evaluate.py MODEL.onnx [MODEL2.onnx ...]

A model whose input is called ``image`` is measured on ``cifar10_sample.npz``, one whose input is called
``rows`` on ``mnist_sample.npz``; ``--sample`` names another file. Both hold ``image_u8`` (uint8, fed as
float32 in 0..1) and ``label``. Needs numpy and onnxruntime only.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnxruntime as ort

SAMPLES = {"image": "cifar10_sample.npz", "rows": "mnist_sample.npz"}


def accuracy(model: Path, sample: Path | None = None, batch: int = 250) -> tuple[int, int]:
    """Return how many images the model classifies rightly, and how many there are."""
    session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    feed = session.get_inputs()[0].name
    if sample is None:
        if feed not in SAMPLES:
            raise SystemExit(f"{model}: no sample is known for the input {feed!r}, name one with --sample")
        sample = Path(__file__).resolve().parent / SAMPLES[feed]
    with np.load(sample) as data:
        images, labels = data["image_u8"], data["label"]
    right = 0
    for begin in range(0, len(images), batch):
        x = images[begin : begin + batch].astype(np.float32) / np.float32(255)
        logits = session.run(None, {feed: x})[0]
        right += int((logits.argmax(axis=1) == labels[begin : begin + batch]).sum())
    return right, len(images)


def main() -> None:
    parser = argparse.ArgumentParser(description="Top-1 accuracy of ONNX models on a stored sample of test images.")
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL.onnx")
    parser.add_argument("--sample", type=Path, help="npz file with image_u8 and label")
    args = parser.parse_args()
    for model in args.models:
        right, count = accuracy(model, args.sample)
        print(f"{model}: top-1 {right / count:.4f} ({right}/{count}), {model.stat().st_size} bytes")


if __name__ == "__main__":
    main()
