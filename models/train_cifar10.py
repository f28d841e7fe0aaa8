"""Train a small residual CNN on CIFAR-10 on the CPU and export it to ONNX, with and without BatchNorm nodes.

Usage::

    python models/train_cifar10.py --data DATA_DIR --out models

``DATA_DIR`` holds ``cifar10_train.npz`` and ``cifar10_test.npz``: CIFAR-10 re-encoded as JPEG, where every
image is a shared header followed by its own scan (arrays ``header``, ``scan``, ``length`` and ``label``).

The network has a 3x3 stem and three stages of two basic residual blocks; stages two and three open with a
stride-2 block whose shortcut is a 1x1 projection, the other shortcuts are identities. The normalisation of
the pixels is part of the graph: the input ``image`` is float32 (N, 3, 32, 32), RGB in 0..1, and the output
is ``logits``.

Written to ``--out``:

* ``resnet_cifar10_bn.onnx``: BatchNormalization kept as nodes, in inference form;
* ``resnet_cifar10_folded.onnx``: the same network with BatchNormalization folded into the convolutions;
* ``cifar10_sample.npz``: a class-balanced part of the test set (``image_u8``: uint8 NCHW, ``label``: int64).

The weights are those of the last epoch: the test set is only measured on, it selects nothing. Needs torch,
numpy, pillow, onnx and onnxruntime.
"""

from __future__ import annotations

import argparse
import io
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 10
PIXEL_MEAN = (0.4914, 0.4822, 0.4465)
PIXEL_STD = (0.2470, 0.2435, 0.2616)
PAD = 4  # pixels added on every side before the random crop
OPSET = 17


class Block(nn.Module):
    """Two 3x3 convolutions with a shortcut: the identity, or a 1x1 projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class SmallResNet(nn.Module):
    """Stem, three stages of two blocks, global average pooling and one linear layer."""

    mean: Tensor
    std: Tensor

    def __init__(self, widths: tuple[int, ...] = (16, 48, 96)) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(PIXEL_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(PIXEL_STD).view(1, 3, 1, 1))
        self.stem = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.stem_bn = nn.BatchNorm2d(widths[0])
        stages: list[nn.Module] = []
        inputs = widths[0]
        for i, width in enumerate(widths):
            stages.append(nn.Sequential(Block(inputs, width, 1 if i == 0 else 2), Block(width, width, 1)))
            inputs = width
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(inputs, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        x = (image - self.mean) / self.std
        x = F.relu(self.stem_bn(self.stem(x)))
        return self.head(torch.flatten(self.pool(self.stages(x)), 1))


def load_split(path: Path) -> tuple[Tensor, Tensor]:
    """Decode one packed JPEG file into images (N, 32, 32, 3) uint8 and labels (N,) int64."""
    with np.load(path) as packed:
        ends = np.cumsum(packed["length"].astype(np.int64))
        header, scan = packed["header"].tobytes(), packed["scan"].tobytes()
        labels = packed["label"].astype(np.int64)
    images = np.empty((len(ends), 32, 32, 3), np.uint8)
    begin = 0
    for i, end in enumerate(ends):
        images[i] = np.asarray(Image.open(io.BytesIO(header + scan[begin:end])).convert("RGB"))
        begin = int(end)
    return torch.from_numpy(images), torch.from_numpy(labels)


def to_input(images: Tensor) -> Tensor:
    """Turn NHWC uint8 into the network's input: float32 (N, 3, 32, 32) in 0..1, channels-last in memory."""
    return images.permute(0, 3, 1, 2).float().div_(255)


def augment(padded: Tensor, pick: Tensor, generator: torch.Generator) -> Tensor:
    """Cut a random 32x32 window out of each picked padded image, and mirror half of them."""
    n = len(pick)
    offset = torch.randint(0, 2 * PAD + 1, (2, n, 1), generator=generator)
    flip = torch.rand(n, 1, generator=generator) < 0.5
    span = torch.arange(32).expand(n, 32)
    rows = offset[0] + span
    columns = offset[1] + torch.where(flip, 31 - span, span)
    return padded[pick[:, None, None], rows[:, :, None], columns[:, None, :]]


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, bf16: bool) -> float:
    """Top-1 accuracy of the PyTorch model, in evaluation mode."""
    model.eval()
    right = 0
    for begin in range(0, len(images), 500):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(to_input(images[begin : begin + 500]))
        right += int((logits.argmax(1) == labels[begin : begin + 500]).sum())
    return right / len(images)


def train(
    model: nn.Module,
    train_set: tuple[Tensor, Tensor],
    test_set: tuple[Tensor, Tensor],
    args: argparse.Namespace,
) -> None:
    """SGD with Nesterov momentum under a one-cycle learning rate; prints one line per epoch."""
    images, labels = train_set
    padded = F.pad(images.permute(0, 3, 1, 2), (PAD,) * 4).permute(0, 2, 3, 1).contiguous()
    steps = len(images) // args.batch
    optimizer = torch.optim.SGD(
        model.parameters(), lr=args.lr, momentum=0.9, weight_decay=args.weight_decay, nesterov=True
    )
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
            batch = to_input(augment(padded, pick, generator))
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                logits = model(batch)
            loss = F.cross_entropy(logits.float(), labels[pick], label_smoothing=args.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        score = accuracy(model, *test_set, bf16=args.bf16)
        took = time.perf_counter() - started
        line = f"epoch {epoch + 1}/{args.epochs}  loss {total / steps:.4f}  test {score:.4f}  {took:.0f} s"
        print(line, flush=True)


def export(model: nn.Module, path: Path, fold: bool) -> None:
    """Write the model with a dynamic batch, and check that BatchNormalization is kept or gone as asked."""
    model.eval()
    mode = torch.onnx.TrainingMode.EVAL if fold else torch.onnx.TrainingMode.PRESERVE
    torch.onnx.export(
        model,
        (torch.rand(2, 3, 32, 32),),
        str(path),
        dynamo=False,
        opset_version=OPSET,
        training=mode,
        do_constant_folding=fold,
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
    )
    graph = onnx.load(path)
    onnx.checker.check_model(graph, full_check=True)
    norms = [node for node in graph.graph.node if node.op_type == "BatchNormalization"]
    if fold:
        assert not norms, "BatchNormalization left in the folded model"
    else:
        assert len(norms) == sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        for node in norms:
            assert len(node.output) == 1, "BatchNormalization in training form"
            assert not any(a.name == "training_mode" and a.i for a in node.attribute)


def onnx_logits(path: Path, images: Tensor) -> np.ndarray:
    """Run an exported model over NHWC uint8 images with onnxruntime."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    parts = []
    for begin in range(0, len(images), 500):
        batch = np.ascontiguousarray(to_input(images[begin : begin + 500]).numpy())
        parts.append(session.run(["logits"], {"image": batch})[0])
    return np.concatenate(parts)


def save_sample(path: Path, images: Tensor, labels: Tensor, count: int) -> None:
    """Save the first ``count / 10`` images of each class, in the order of the test set."""
    firsts = [torch.nonzero(labels == c).flatten()[: count // CLASSES] for c in range(CLASSES)]
    keep = torch.cat(firsts).sort().values
    image_u8 = np.ascontiguousarray(images[keep].permute(0, 3, 1, 2).numpy())
    np.savez_compressed(path, image_u8=image_u8, label=labels[keep].numpy())


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small CIFAR-10 ResNet and export it to ONNX.")
    parser.add_argument("--data", type=Path, required=True, help="folder of the packed CIFAR-10 files")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--epochs", type=int, default=18)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="more pays only on an idle machine")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1, help="peak learning rate")
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    parser.add_argument("--sample", type=int, default=1000, help="test images in cifar10_sample.npz")
    parser.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="train under bfloat16 autocast (the weights stay float32)",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    train_set = load_split(args.data / "cifar10_train.npz")
    test_set = load_split(args.data / "cifar10_test.npz")
    model = SmallResNet()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(train_set[0])} training images")
    train(model, train_set, test_set, args)

    args.out.mkdir(parents=True, exist_ok=True)
    save_sample(args.out / "cifar10_sample.npz", *test_set, count=args.sample)
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    print(f"float32 in PyTorch: test {accuracy(model, *test_set, bf16=False):.4f}")
    with torch.inference_mode():
        expected = model(to_input(test_set[0][:500]).contiguous()).numpy()
    for name, fold in (("resnet_cifar10_bn.onnx", False), ("resnet_cifar10_folded.onnx", True)):
        path = args.out / name
        export(model, path, fold)
        logits = onnx_logits(path, test_set[0])
        score = float((logits.argmax(1) == test_set[1].numpy()).mean())
        gap = float(np.abs(logits[:500] - expected).max())
        print(f"{name}: {path.stat().st_size} bytes, test {score:.4f}, max |onnx - torch| {gap:.1e}")


if __name__ == "__main__":
    main()
