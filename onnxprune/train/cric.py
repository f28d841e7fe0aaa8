"""CRIC: redundant units are tried before they are believed (corrective redundancy identification, arXiv 2409.09085).

What a unit is worth is taken from one point, where it is still there; what counts is the way to where it is gone. So
the units that seem redundant are shrunk to zero for trial, all together, with the loss's gradient measured all along
that way: <x, mean gradient on it> is what the loss changes by. Then they are put back and all are judged anew, until
those chosen have all been tried. A trial takes steps and moves nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onnxprune.train.saliency import Statistics
from onnxprune.train.units import UnitTable

__all__ = ["Trials"]

JUDGED = tuple(f.name for f in fields(Statistics) if f.name not in ("counts", "families"))


class Trials:
    """The trials of a run, one after another. trial: the units in the present one, tried: in any; bool, per unit.

    known: what is known of all units from trials, once there was one: of those tried, from their own trial.
    """

    def __init__(self, table: UnitTable) -> None:
        self.table = table
        self.saved = table.storage()
        self.gradients = table.storage()
        self.trial = torch.zeros(table.units, dtype=torch.bool, device=table.device)
        self.tried = torch.zeros_like(self.trial)
        self.known: Statistics | None = None
        self.count = 0
        self.running = False

    def begin(self, units: Tensor) -> None:
        torch._foreach_copy_(self.saved.banks, self.table.x.banks)
        self.trial.copy_(units)
        self.count, self.running = self.count + 1, True

    def end(self, seen: Statistics | None) -> None:
        """Put everything back. seen: means over the trial's steps."""
        torch._foreach_copy_(self.table.x.banks, self.saved.banks)
        self.running = False
        if seen is not None:
            before = (self.tried & ~self.trial).cpu().numpy()
            if self.known is not None:
                values = {n: np.where(before, getattr(self.known, n), getattr(seen, n)) for n in JUDGED}
                seen = replace(seen, **values)
            self.known = seen
            self.tried |= self.trial

    def gradient(self) -> list[Tensor]:
        """The tensors' gradients, laid out as they are; 0 where there is none."""
        for bank in self.gradients.banks:
            bank.zero_()
        for tensor, view in zip(self.table.tensors, self.gradients.views, strict=True):
            if tensor.grad is not None:
                view.copy_(tensor.grad)
        return self.gradients.banks

    # state

    def state(self) -> dict[str, Any]:
        known = {} if self.known is None else {n: torch.from_numpy(getattr(self.known, n)) for n in JUDGED}
        return {
            "count": self.count,
            "running": self.running,
            "trial": self.trial,
            "tried": self.tried,
            "known": known,
            "saved": dict(enumerate(self.saved.views)) if self.running else {},
        }

    def load(self, state: Mapping[str, Any]) -> None:
        self.count, self.running = state["count"], state["running"]
        self.trial.copy_(state["trial"])
        self.tried.copy_(state["tried"])
        for k, view in state["saved"].items():
            self.saved.views[int(k)].copy_(view)
        if state["known"]:
            known = {n: state["known"][n].cpu().numpy() for n in JUDGED}
            counts = self.table.counts.double().cpu().numpy()
            self.known = Statistics(**known, counts=counts, families=self.table.slices)
