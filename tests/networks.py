"""Small networks of the kinds that methods in training have to cope with, exported by torch, and data for them."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["NETWORKS", "Attention", "Grouped", "Plain", "Recurrent", "data_for", "exported"]

CLASSES = 5


class Plain(nn.Module):
    """Convolutions without normalisation, a residual sum among them. (N,3,8,8)"""

    example = (3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 24, 3, padding=1)
        self.third = nn.Conv2d(24, 16, 3, padding=1)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = x + self.third(F.relu(self.second(x)))
        return self.head(F.relu(x).mean((2, 3)))


class Attention(nn.Module):
    """A block of a transformer: LayerNorm, four heads, an MLP. (N,6,12)"""

    example = (6, 12)

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 16)
        self.norms = nn.ModuleList([nn.LayerNorm(16) for _ in range(2)])
        self.qkv = nn.Linear(16, 3 * 32)
        self.project = nn.Linear(32, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        n, t, _ = x.shape
        q, k, v = self.qkv(self.norms[0](x)).reshape(n, t, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q @ k.transpose(-2, -1)) * 8**-0.5
        x = x + self.project((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, t, 32))
        x = x + self.down(F.gelu(self.up(self.norms[1](x))))
        return self.head(x.mean(1))


class Recurrent(nn.Module):
    """An LSTM between linear layers. (N,6,12)"""

    example = (6, 12)

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 16)
        self.lstm = nn.LSTM(16, 24, batch_first=True)
        self.between, self.head = nn.Linear(24, 16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.lstm(F.relu(self.embed(x)))
        return self.head(F.relu(self.between(x[:, -1])))


class Grouped(nn.Module):
    """Grouped and depthwise convolutions, with BatchNorm and without. (N,3,8,8)"""

    example = (3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 24, 3, padding=1, groups=4, bias=False)
        self.norm = nn.BatchNorm2d(24)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.pointwise = nn.Conv2d(24, 16, 1)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.grouped(F.relu(self.first(x)))))
        x = F.relu6(self.pointwise(F.relu(self.depthwise(x))))
        return self.head(x.mean((2, 3)))


NETWORKS = {"plain": Plain, "attention": Attention, "recurrent": Recurrent, "grouped": Grouped}


def exported(kind: type[nn.Module], path: Path) -> Path:
    """A network of the same weights every time, as a file with one input, 'x', of any number of samples."""
    torch.manual_seed(4)
    module = kind().eval()
    with torch.no_grad():  # statistics and scales that are not those of a new network
        for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.running_mean.normal_(std=0.1)
            norm.weight.uniform_(0.5, 1.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (torch.randn(2, *kind.example),),
            str(path),
            dynamo=False,
            opset_version=17,
            input_names=["x"],
            output_names=["y"],
            dynamic_axes={"x": {0: "N"}, "y": {0: "N"}},
        )
    return path


def data_for(kind: type[nn.Module], path: Path, *, count: int = 64) -> Path:
    """Random samples, with classes."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((count, *kind.example)).astype(np.float32)
    np.savez(path, x=x, label=rng.integers(0, CLASSES, count))
    return path
