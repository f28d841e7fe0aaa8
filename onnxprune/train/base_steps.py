"""The steps that DHSPG and HESSO build on: SGD, Adam and AdamW, by torch's fused kernels, and with their direction.

The direction d of a step (x <- x - a d) is what the methods decide by, before x moves. SGD's with momentum is its
momentum buffer, updated by the kernel at the rate 0. All others are found by letting the kernel move zeros at the rate
-1, which makes them d itself. No difference of weights is taken anywhere, so that nothing is lost to rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from onnxprune.errors import UsageError
from onnxprune.train.units import Storage, UnitTable

__all__ = ["DEFAULTS", "BaseSteps"]

DEFAULTS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.0, "nesterov": False},
    "adam": {"betas": (0.9, 0.999), "eps": 1e-8},
    "adamw": {"betas": (0.9, 0.999), "eps": 1e-8},
}
"""Options of a parameter group, beside `lr` and `weight_decay`."""

FUSED = ("cpu", "cuda", "xpu", "mps")


class BaseSteps:
    """Moves an optimizer's parameters. Momenta lie in the optimizer's `state`, under torch's names.

    table: the parameters that consist of units; their momenta lie as it lays them out.
    """

    def __init__(self, optimizer: Optimizer, table: UnitTable, variant: str) -> None:
        self.optimizer, self.table, self.variant = optimizer, table, variant
        self.place = {id(t): k for k, t in enumerate(table.tensors)}
        groups = optimizer.param_groups
        names: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
        if variant == "sgd":
            names = ("momentum_buffer",) if any(g["momentum"] for g in groups) else ()
        self._momenta = {name: table.storage() for name in names}
        self._at_hand = variant == "sgd" and all(g["momentum"] and not g["nesterov"] for g in groups)
        self._scratch: Storage | None = None
        self.fused = all(p.is_floating_point() and p.device.type in FUSED for g in groups for p in g["params"])
        for p in (p for g in groups for p in g["params"]):
            self._state(p)

    def _state(self, p: Tensor) -> dict[str, Any]:
        state = self.optimizer.state[p]
        if not state and (p.requires_grad or id(p) in self.place):
            k = self.place.get(id(p))
            for name, stored in self._momenta.items():
                state[name] = torch.zeros_like(p) if k is None else stored.views[k]
            if self.variant != "sgd":
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device if self.fused else "cpu")
        return state

    def adopt(self) -> None:
        """Take over momenta that were put into the optimizer's state (by `load_state_dict`)."""
        for p, state in self.optimizer.state.items():
            k = self.place.get(id(p))
            for name, stored in self._momenta.items():
                if k is not None and name in state and state[name] is not stored.views[k]:
                    stored.views[k].copy_(state[name])
                    state[name] = stored.views[k]

    # steps

    def move(self) -> None:
        """x <- x - a d for all parameters that have a gradient."""
        for group in self.optimizer.param_groups:
            self._move(group, [p for p in group["params"] if p.grad is not None])

    def direct(self) -> list[Tensor]:
        """Update the momenta, move all that is not in the table, and give the direction of what is, as the table lays
        it out: valid until the next step, not to be changed. It is 0 where there is no gradient."""
        found = self._momenta["momentum_buffer"] if self._at_hand else self._zeros()
        for group in self.optimizer.param_groups:
            learnt = [p for p in group["params"] if p.grad is not None]
            self._move(group, [p for p in learnt if id(p) not in self.place])
            inside = [p for p in learnt if id(p) in self.place]
            if inside and self._at_hand:
                self._kernel(group, inside, lr=0.0, decay=group["weight_decay"])
            elif inside:
                self._draw(group, inside, [found.views[self.place[id(p)]] for p in inside])
        still = [k for k, t in enumerate(self.table.tensors) if t.requires_grad and t.grad is None]
        return self._without(found, still) if still and self._at_hand else found.banks

    def _zeros(self) -> Storage:
        if self._scratch is None:
            self._scratch = self.table.storage()
        for bank in self._scratch.banks:
            bank.zero_()
        return self._scratch

    def _without(self, buffers: Storage, still: Sequence[int]) -> list[Tensor]:
        """The buffers, with 0 for the tensors that don't move in this step."""
        found = self.table.storage()
        torch._foreach_copy_(found.banks, buffers.banks)
        torch._foreach_zero_([found.views[k] for k in still])
        return found.banks

    def _draw(self, group: dict[str, Any], parameters: list[Tensor], into: list[Tensor]) -> None:
        """Write the direction into zeros."""
        decay = group["weight_decay"]
        values = [p.detach() for p in parameters]
        gradients = _gradients(parameters)
        if decay and self.variant != "adamw":
            gradients = list(torch._foreach_add(gradients, values, alpha=decay))
        self._kernel(group, parameters, lr=-1.0, decay=0.0, into=into, gradients=gradients)
        if decay and self.variant == "adamw":
            torch._foreach_add_(into, values, alpha=decay)

    def _move(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        if parameters:
            self._kernel(group, parameters, lr=group["lr"], decay=group["weight_decay"])

    def _kernel(
        self,
        group: dict[str, Any],
        parameters: list[Tensor],
        *,
        lr: float | Tensor,
        decay: float,
        into: list[Tensor] | None = None,
        gradients: list[Tensor] | None = None,
    ) -> None:
        """Torch's step, with these momenta. into: what is moved in the parameters' place."""
        states = [self._state(p) for p in parameters]
        gradients = _gradients(parameters) if gradients is None else gradients
        moved = parameters if into is None else into
        fused = self.fused and not torch.compiler.is_compiling()  # the compiler fuses the other form itself
        how: dict[str, Any] = {"fused": fused, "foreach": not fused, "weight_decay": decay, "lr": lr}
        if self.variant == "sgd":
            buffers = [s.get("momentum_buffer") for s in states]
            momentum, nesterov = group["momentum"], group["nesterov"]
            sgd(
                moved,
                gradients,
                buffers,
                momentum=momentum,
                nesterov=nesterov,
                dampening=0.0,
                maximize=False,
                **how,
            )
            return
        rule = adam if self.variant == "adam" else adamw
        beta1, beta2 = group["betas"]
        rule(
            moved,
            gradients,
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            maximize=False,
            **how,
        )


def _gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """In the parameters' own memory layout, as the kernels go through both by address."""
    found = []
    for p in parameters:
        gradient = p.grad
        assert gradient is not None
        if gradient.is_sparse:
            raise UsageError("a gradient is sparse", "the optimizers of onnxprune take dense ones")
        if gradient.stride() != p.stride() and not _laid_alike(gradient, p):
            gradient = torch.empty_like(p).copy_(gradient)
        found.append(gradient)
    return found


def _laid_alike(a: Tensor, b: Tensor) -> bool:
    """Whether strides differ only along axes of length 1."""
    return all(s == t for s, t, n in zip(a.stride(), b.stride(), b.shape, strict=True) if n > 1)
