"""Train a tiny transformer that reads MNIST digits row by row, on the CPU, and export it to ONNX.

Usage::

    python models/train_mnist_rows.py --data DATA_DIR --out models

``DATA_DIR`` holds the four MNIST files in IDX format, gzipped (``mnist-train-images-idx3-ubyte.gz`` and so
on).

An image is a sequence of 28 tokens of 28 pixels: a linear embedding, learned positions, two pre-norm
encoder layers with four heads and a GELU feed-forward, the mean over the tokens and a linear head. Queries,
keys and values are separate linear layers. The input ``rows`` is float32 (N, 28, 28) in 0..1, and the
output is ``logits``.

Written to ``--out``: ``transformer_mnist_rows.onnx`` and ``mnist_sample.npz``, a class-balanced part of the
test set (``image_u8``: uint8 (N, 28, 28), ``label``: int64). The weights are those of the last epoch: the
test set is only measured on, it selects no epoch. Needs torch, numpy, onnx and onnxruntime.
"""

from __future__ import annotations

import argparse
import gzip
import math
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 10
SIDE = 28  # tokens in a sequence, and pixels in a token
SHIFT = 2  # the training images are moved by up to this many pixels either way
OPSET = 17


class Attention(nn.Module):
    """Multi-head self-attention over a sequence of fixed length, with separate projections."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def split(self, x: Tensor) -> Tensor:
        return x.reshape(-1, SIDE, self.heads, self.size).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        weights = torch.softmax(query @ key.transpose(2, 3) / math.sqrt(self.size), dim=-1)
        return self.output((weights @ value).transpose(1, 2).reshape(-1, SIDE, self.heads * self.size))


class Layer(nn.Module):
    """One pre-norm encoder layer."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class RowTransformer(nn.Module):
    """Embedding of the rows, encoder layers, mean over the tokens, linear head."""

    def __init__(self, width: int = 64, heads: int = 4, hidden: int = 128, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(SIDE, width)
        self.position = nn.Parameter(0.02 * torch.randn(1, SIDE, width))
        self.layers = nn.Sequential(*(Layer(width, heads, hidden) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, rows: Tensor) -> Tensor:
        x = self.layers(self.embed(rows) + self.position)
        return self.head(self.norm(x).mean(dim=1))


def load_split(folder: Path, name: str) -> tuple[Tensor, Tensor]:
    """Read images (N, 28, 28) uint8 and labels (N,) int64 of ``train`` or ``t10k``."""
    with gzip.open(folder / f"mnist-{name}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, SIDE, SIDE)
    with gzip.open(folder / f"mnist-{name}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8).astype(np.int64)
    return torch.from_numpy(images.copy()), torch.from_numpy(labels)


def to_input(images: Tensor) -> Tensor:
    return images.float().div_(255)


def augment(padded: Tensor, pick: Tensor, generator: torch.Generator) -> Tensor:
    """Cut a randomly placed 28x28 window out of each picked padded image."""
    offset = torch.randint(0, 2 * SHIFT + 1, (2, len(pick), 1), generator=generator) + torch.arange(SIDE)
    return padded[pick[:, None, None], offset[0][:, :, None], offset[1][:, None, :]]


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy of the PyTorch model, in evaluation mode."""
    model.eval()
    parts = [model(to_input(chunk)).argmax(1) for chunk in images.split(1000)]
    return float((torch.cat(parts) == labels).float().mean())


def train(
    model: nn.Module,
    train_set: tuple[Tensor, Tensor],
    test_set: tuple[Tensor, Tensor],
    args: argparse.Namespace,
) -> None:
    """AdamW under a one-cycle learning rate; prints one line per epoch."""
    images, labels = train_set
    padded = F.pad(images, (SHIFT,) * 4)
    steps = len(images) // args.batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=args.epochs * steps, pct_start=0.2, cycle_momentum=False
    )
    generator = torch.Generator().manual_seed(args.seed)
    started = time.perf_counter()
    for epoch in range(args.epochs):
        model.train()
        order = torch.randperm(len(images), generator=generator)
        total = 0.0
        for step in range(steps):
            pick = order[step * args.batch : (step + 1) * args.batch]
            loss = F.cross_entropy(model(to_input(augment(padded, pick, generator))), labels[pick])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        score = accuracy(model, *test_set)
        took = time.perf_counter() - started
        line = f"epoch {epoch + 1}/{args.epochs}  loss {total / steps:.4f}  test {score:.4f}  {took:.0f} s"
        print(line, flush=True)


def export(model: nn.Module, path: Path) -> None:
    """Write the model with a dynamic batch."""
    model.eval()
    torch.onnx.export(
        model,
        (torch.rand(2, SIDE, SIDE),),
        str(path),
        dynamo=False,
        opset_version=OPSET,
        input_names=["rows"],
        output_names=["logits"],
        dynamic_axes={"rows": {0: "batch"}, "logits": {0: "batch"}},
    )
    onnx.checker.check_model(onnx.load(path), full_check=True)


def save_sample(path: Path, images: Tensor, labels: Tensor, count: int) -> None:
    """Save the first ``count / 10`` images of each class, in the order of the test set."""
    firsts = [torch.nonzero(labels == c).flatten()[: count // CLASSES] for c in range(CLASSES)]
    keep = torch.cat(firsts).sort().values
    np.savez_compressed(path, image_u8=images[keep].numpy(), label=labels[keep].numpy())


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a tiny transformer on MNIST rows and export it to ONNX.")
    parser.add_argument("--data", type=Path, required=True, help="folder of the gzipped MNIST files")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="more pays only on an idle machine")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--sample", type=int, default=1000, help="test images in mnist_sample.npz")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    train_set, test_set = load_split(args.data, "train"), load_split(args.data, "t10k")
    model = RowTransformer()
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(train_set[0])} training images")
    train(model, train_set, test_set, args)

    args.out.mkdir(parents=True, exist_ok=True)
    save_sample(args.out / "mnist_sample.npz", *test_set, count=args.sample)
    path = args.out / "transformer_mnist_rows.onnx"
    export(model, path)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    logits = session.run(["logits"], {"rows": to_input(test_set[0]).numpy()})[0]
    with torch.inference_mode():
        gap = float(np.abs(logits[:500] - model(to_input(test_set[0][:500])).numpy()).max())
    score = float((logits.argmax(1) == test_set[1].numpy()).mean())
    print(f"{path.name}: {path.stat().st_size} bytes, test {score:.4f}, max |onnx - torch| {gap:.1e}")


if __name__ == "__main__":
    main()
