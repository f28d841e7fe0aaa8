"""The networks of the papers that the methods come from, as plain torch modules with seeded random weights.

Every network has a width, so that the same architecture exists at full size and in a tiny form that a test trains in
seconds. `export` writes one as ONNX with its BatchNorm kept and a free batch axis: what the methods start from.

CIFAR forms (images (N,3,32,32)):
    resnet20, resnet56      He et al. 2016, section 4.2: 3 stages of width, 2 width, 4 width
    resnet18, resnet50      the ImageNet networks with a 3x3 stem and no max-pool, as Only-Train-Once trains them
    vgg16, vgg16_bn         13 convolutions, three linear layers (512-512-512-10): Only-Train-Once's, without dropout
Others: a transformer encoder for sentences (pre-norm, heads of 64), and CARN x2 (Ahn et al. 2018) for super-resolution.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["CARN", "VGG16", "CifarResNet", "Encoder", "ResNet", "export", "seeded"]

CLASSES = 10
OPSET = 17


class Basic(nn.Module):
    """Two 3x3 convolutions. shortcut: 'conv', a 1x1 convolution where the shape changes, or 'pad' (option A)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, shortcut: str = "conv") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(inputs, width, stride, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1, the last four times as wide."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, shortcut: str = "conv") -> None:
        super().__init__()
        outputs = self.expansion * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(inputs, outputs, stride, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


class Pad(nn.Module):
    """Option A: every second pixel, and channels of zeros before and after."""

    def __init__(self, more: int, stride: int) -> None:
        super().__init__()
        self.more, self.stride = more, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))


def _shortcut(inputs: int, outputs: int, stride: int, kind: str) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    if kind == "pad":
        return Pad(outputs - inputs, stride)
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """A 3x3 stem of `width` channels, then stages of blocks: (multiple of the width, count, stride)."""

    def __init__(
        self,
        block: type[Basic] | type[Bottleneck],
        stages: Sequence[tuple[int, int, int]],
        width: int,
        shortcut: str = "conv",
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        blocks: list[nn.Module] = []
        inputs = width
        for multiple, count, stride in stages:
            for k in range(count):
                blocks.append(block(inputs, multiple * width, stride if k == 0 else 1, shortcut))
                inputs = multiple * width * block.expansion
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(inputs, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn1(self.conv1(image))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class CifarResNet(ResNet):
    """ResNet-20, -56, ...: 6 n + 2 layers, n blocks in each of three stages."""

    def __init__(self, depth: int, width: int = 16, shortcut: str = "conv") -> None:
        n = (depth - 2) // 6
        super().__init__(Basic, ((1, n, 1), (2, n, 2), (4, n, 2)), width, shortcut)


class ResNet18(ResNet):
    def __init__(self, width: int = 64) -> None:
        super().__init__(Basic, ((1, 2, 1), (2, 2, 2), (4, 2, 2), (8, 2, 2)), width)


class ResNet50(ResNet):
    def __init__(self, width: int = 64) -> None:
        super().__init__(Bottleneck, ((1, 3, 1), (2, 4, 2), (4, 6, 2), (8, 3, 2)), width)


class VGG16(nn.Module):
    """13 convolutions with He's initialisation, a max-pool after each of the five stages, three linear layers."""

    def __init__(self, width: int = 64, *, batch_norm: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for multiple, count in ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3)):
            for _ in range(count):
                layers.append(nn.Conv2d(inputs, multiple * width, 3, 1, 1, bias=not batch_norm))
                layers += [nn.BatchNorm2d(multiple * width)] if batch_norm else []
                layers.append(nn.ReLU())
                inputs = multiple * width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        hidden = [nn.Linear(inputs, inputs), nn.ReLU(), nn.Linear(inputs, inputs), nn.ReLU()]
        self.classifier = nn.Sequential(*hidden, nn.Linear(inputs, CLASSES))
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(image), 1))


class EncoderLayer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.norm1(x)
        shape = (x.shape[0], x.shape[1], self.heads, x.shape[2] // self.heads)
        q, k, v = (layer(y).view(shape).transpose(1, 2) for layer in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(x.shape)
        x = x + self.out(y)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Encoder(nn.Module):
    """A sentence as token numbers (N, longest), 0 where it has ended; the mean over its tokens is classified."""

    def __init__(
        self, words: int, width: int = 256, layers: int = 4, heads: int = 4, longest: int = 64, classes: int = 2
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.positions = nn.Parameter(torch.zeros(longest, width))
        self.layers = nn.ModuleList(EncoderLayer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, classes)
        nn.init.normal_(self.words.weight, std=0.05)
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        valid = (tokens != 0).to(self.positions.dtype)
        x = self.words(tokens) + self.positions
        mask = ((1.0 - valid) * -1e4)[:, None, None, :]
        for layer in self.layers:
            x = layer(x, mask)
        weight = valid[:, :, None]
        return self.classifier((self.norm(x) * weight).sum(1) / weight.sum(1))


class CarnBlock(nn.Module):
    """Three residual units, each followed by a 1x1 convolution of everything so far (cascading)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.units = nn.ModuleList(Residual(width) for _ in range(3))
        self.joins = nn.ModuleList(nn.Conv2d((k + 2) * width, width, 1) for k in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return _cascade(x, self.units, self.joins)


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, 1, 1)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))) + x)


def _cascade(x: Tensor, parts: nn.ModuleList, joins: nn.ModuleList) -> Tensor:
    gathered = x
    for part, join in zip(parts, joins, strict=True):
        gathered = torch.cat([gathered, part(x)], 1)
        x = F.relu(join(gathered))
    return x


class CARN(nn.Module):
    """CARN x2: RGB images in 0..1, (N,3,H,W) to (N,3,2H,2W). DIV2K's mean colour is taken off and put back."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.entry = nn.Conv2d(3, width, 3, 1, 1)
        self.blocks = nn.ModuleList(CarnBlock(width) for _ in range(3))
        self.joins = nn.ModuleList(nn.Conv2d((k + 2) * width, width, 1) for k in range(3))
        self.up = nn.Conv2d(width, 4 * width, 3, 1, 1)
        self.exit = nn.Conv2d(width, 3, 3, 1, 1)
        self.register_buffer("mean", torch.tensor([0.4488, 0.4371, 0.4040]).reshape(1, 3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        x = _cascade(self.entry(image - self.mean), self.blocks, self.joins)
        return self.exit(F.pixel_shuffle(F.relu(self.up(x)), 2)) + self.mean


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A network with the weights of this seed. The global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def export(
    module: nn.Module,
    path: Path,
    example: Tensor,
    *,
    name: str = "image",
    output: str = "logits",
    free: Sequence[int] = (),
) -> None:
    """Write as ONNX: BatchNorm as it is, the batch axis and the axes in `free` of any size.

    Tensors that are equal (scales of 1 in a network that is not trained yet) differ by a thousandth in the file: the
    exporter stores equal ones once, and what is one tensor is trained as one.
    """
    axes = {0: "N"} | {k: f"S{k}" for k in free}
    module = copy.deepcopy(module).cpu().eval()
    _tell_apart(module)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (example,),
            str(path),
            dynamo=False,
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
            opset_version=OPSET,
            input_names=[name],
            output_names=[output],
            dynamic_axes={name: axes, output: axes},
        )


@torch.no_grad()
def _tell_apart(module: nn.Module) -> None:
    seen: set[tuple[tuple[int, ...], bytes]] = set()
    generator = torch.Generator().manual_seed(0)
    for tensor in (*module.parameters(), *module.buffers()):
        if not tensor.is_floating_point():
            continue
        key = tuple(tensor.shape), tensor.numpy().tobytes()
        if key in seen:
            tensor += torch.randn(tensor.shape, generator=generator) / 1000
        seen.add(key)
