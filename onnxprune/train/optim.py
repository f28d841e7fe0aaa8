"""Optimizers, gradient clipping and the running average of the weights, each in torch's multi-tensor form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from onnxprune.train.settings import TrainSettings

__all__ = ["Average", "make_optimizer", "set_rate"]


def make_optimizer(parameters: Iterable[nn.Parameter], settings: TrainSettings) -> Optimizer:
    """SGD with momentum, Adam or AdamW, without weight decay for parameters of less than two dimensions."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for p in parameters:
        (decayed if p.ndim > 1 else free).append(p)
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": free, "weight_decay": 0.0}]
    groups = [g for g in groups if g["params"]]
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in (*decayed, *free))
    how: dict[str, Any] = {"fused": True} if fused else {"foreach": True}
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr, **how)
    if settings.optimizer == "adam":
        return torch.optim.Adam(groups, lr=settings.lr, **how)
    return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, **how)


def set_rate(optimizer: Optimizer, factor: float) -> None:
    """Give every parameter group its own first learning rate times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor


class Average:
    """An exponential moving average of a module's parameters and floating-point buffers.

    After update t (from 1) the decay is min(decay, (1 + t) / (10 + t)), so that a short run is not held back by the
    weights that it began with. Buffers that are not finite or not floating point are constants or counters and are
    taken as they are.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        self._live = {n: x for n, x in named.items() if x.is_floating_point() and bool(torch.isfinite(x).all())}
        self.shadow = {n: x.detach().clone() for n, x in self._live.items()}
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take in the module's present weights."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        live: list[Tensor] = [x.detach() for x in self._live.values()]
        torch._foreach_lerp_(list(self.shadow.values()), live, 1 - decay)

    @torch.no_grad()
    def place(self) -> None:
        """Write the average into the module."""
        for name, x in self._live.items():
            x.copy_(self.shadow[name])

    def state_dict(self) -> dict[str, Tensor | int]:
        return {"updates": self.updates, **{f"shadow.{n}": x for n, x in self.shadow.items()}}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor | int]) -> None:
        self.updates = int(state["updates"])
        for name, x in self.shadow.items():
            saved = state[f"shadow.{name}"]
            assert isinstance(saved, Tensor)
            x.copy_(saved)
