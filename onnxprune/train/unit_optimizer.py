"""What DHSPG and HESSO share: a torch optimizer whose parameters consist of units, some of which it drives to zero.

A step has two halves. `advance` is the host's: it follows the schedule, and chooses redundant units when their time has
come (the only moment that waits for the device). `move` is the device's: what it launches depends on the phase alone,
so that it can be captured or compiled, once per phase.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from onnxprune.errors import UsageError
from onnxprune.train.base_steps import DEFAULTS, BaseSteps
from onnxprune.train.saliency import Saliency, Statistics, per_family, per_network, saliency
from onnxprune.train.selection import least_share
from onnxprune.train.units import UnitTable

__all__ = ["FLOOR", "Choose", "UnitOptimizer"]

FLOOR = 0.05  # of every family stays, where the target is a share of all units
MEASURED = ("norm", "cosine", "inner", "inner_square")
PLAIN = ("steps", "samples", "_told", "_stride", "measures", "phase")

Removed = Mapping[str, np.ndarray]


class Choose(Protocol):
    """Which units are redundant, per family; `selection.Selection` is one. scores: the higher, the more a unit matters.
    share: of the way to the target. removed: units that are gone already."""

    def __call__(
        self, scores: Mapping[str, np.ndarray], *, share: float = 1.0, removed: Removed | None = None
    ) -> dict[str, np.ndarray]: ...


class Measured(NamedTuple):
    """x, and the direction d that it is about to move along. direction: as the table lays it out. a, ratio: see
    `UnitOptimizer.ratios`. Per unit: |x|, |d| and <x, d>."""

    direction: list[Tensor]
    a: float | Tensor
    ratio: Tensor | None
    norm: Tensor
    d_norm: Tensor
    inner: Tensor


class UnitOptimizer(Optimizer, ABC):
    """Base of the two. See DHSPG for the arguments.

    table: the units. redundant: those that are to go, dead: those that are zero for good; bool, per unit.
    time: of the next step on the schedule: the steps taken, or what `tell` said.
    """

    def __init__(
        self,
        params_and_groups: Iterable[dict[str, Any]],
        *,
        lr: float | Tensor,
        weight_decay: float,
        variant: str,
        target: float | Choose,
        criterion: str | Saliency,
        by_family: bool,
        window: float,
        **options: Any,
    ) -> None:
        if variant not in DEFAULTS:
            raise UsageError(f"variant '{variant}' is none of {', '.join(DEFAULTS)}")
        unknown = [name for name in options if name not in DEFAULTS[variant]]
        if unknown:
            known = ", ".join(DEFAULTS[variant])
            raise UsageError(f"the {variant} variant has no option {', '.join(unknown)}", f"it has {known}")
        if not callable(target) and not 0 <= target < 1:
            raise UsageError(f"target {target:g} is outside 0 to 1", "it is the share of all units that is to go")
        self._open = True
        super().__init__(params_and_groups, {"lr": lr, "weight_decay": weight_decay, **DEFAULTS[variant], **options})
        self._check_groups()
        tensors = [p for g in self.param_groups for p in g["params"]]
        parts = [part for g in self.param_groups for part in g.pop("parts", [()] * len(g["params"]))]
        for group in self.param_groups:
            group.pop("grouping", None)  # of no use here, and nothing for a state
        self._open = False
        self.table = UnitTable(tensors, parts)
        self.base = BaseSteps(self, self.table, variant)
        number = {id(p): k for k, group in enumerate(self.param_groups) for p in group["params"]}
        self._group_of = torch.tensor([number[id(t)] for t in self.table.tensors], device=self.table.device)
        self._ratio: tuple[list[float], Tensor] | None = None
        self._choose: Choose = target if callable(target) else _Share(target)
        self._criterion, self._normalise = criterion, per_family if by_family else per_network
        self.window = window
        units = self.table.units
        self.redundant = torch.zeros(units, dtype=torch.bool, device=self.table.device)
        self.dead = torch.zeros_like(self.redundant)
        self.cosine = self._per_unit()
        self._sums = {name: self._per_unit() for name in MEASURED}
        self._factor = torch.ones((), dtype=self.table.dtype, device=self.table.device)
        self.samples = 0
        self.steps = 0
        self._told: float | None = None
        self._stride = 1.0
        self.measures = False
        self.phase = "warm-up"

    def _per_unit(self) -> Tensor:
        return torch.zeros(self.table.units, dtype=self.table.dtype, device=self.table.device)

    def _check_groups(self) -> None:
        for group in self.param_groups:
            if len(group.get("parts", group["params"])) != len(group["params"]):
                raise UsageError(
                    f"a parameter group has {len(group['params'])} params and {len(group['parts'])} parts",
                    "onnxprune.train.params_and_groups makes them as long as each other",
                )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused once the optimizer is made: its units are laid out. Raises UsageError."""
        if not self._open:
            raise UsageError("the units of this optimizer are laid out", "make a new optimizer with all parameters")
        super().add_param_group(param_group)

    # schedule

    @property
    def time(self) -> float:
        return float(self.steps) if self._told is None else self._told

    def tell(self, time: float) -> None:
        """Where the next step stands on the schedule, for a schedule that is not in steps. Only forwards."""
        if self._told is not None and time > self._told:
            self._stride = time - self._told
        self._told = time

    def advance(self) -> None:
        """The host's half of a step."""
        if not torch.compiler.is_compiling():
            self.table.rebind()
        self.schedule(self.time, self.time + self._stride)
        self.samples += self.measures  # this step's are added by `move`
        self.steps += 1

    @abstractmethod
    def schedule(self, now: float, then: float) -> None:
        """Set `phase`, `measures` and the factor for a step from `now` to `then`; choose where it is time to."""

    @abstractmethod
    def move(self) -> None:
        """The device's half of a step."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step. closure: computes gradients and gives the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.advance()
        self.move()
        return loss

    @torch.no_grad()
    def finish(self) -> None:
        """End the schedule here: choose what is not chosen yet, and set all that is redundant to zero."""
        self.table.rebind()
        self.conclude()
        self.dead |= self.redundant
        self.table.keep_(~self.dead)

    @abstractmethod
    def conclude(self) -> None:
        """Choose all that the target wants."""

    # choosing

    def statistics(self) -> Statistics:
        """Means over the steps that were measured; where there are none, norms alone. Waits for the device."""
        sums = self._sums if self.samples else {**self._sums, "norm": self.table.square(self.table.x.banks).sqrt()}
        means = {name: s.double().cpu().numpy() / max(self.samples, 1) for name, s in sums.items()}
        return Statistics(**means, counts=self.table.counts.double().cpu().numpy(), families=self.table.slices)

    def scores(self, statistics: Statistics | None = None) -> dict[str, np.ndarray]:
        """How much each unit matters, per family; by the steps that were measured, where nothing else is given."""
        return saliency(statistics or self.statistics(), self._criterion, normalise=self._normalise)

    def choice(self, share: float, scores: Mapping[str, np.ndarray] | None = None) -> Mapping[str, np.ndarray]:
        """What the target wants to be redundant at this share of the way."""
        removed = {f: gone.astype(bool) for f, gone in self.table.by_family(self.redundant).items()}
        return self._choose(scores or self.scores(), share=share, removed=removed) if self.table.units else {}

    def _chosen(self, choice: Mapping[str, np.ndarray]) -> Tensor:
        return self.table.from_families({f: np.asarray(v, np.float32) for f, v in choice.items()}) > 0

    def choose(self, share: float) -> None:
        """Add to `redundant` what the target wants at this share of the way, and forget the statistics."""
        self.redundant |= self._chosen(self.choice(share))
        self.forget()

    def forget(self) -> None:
        for total in self._sums.values():
            total.zero_()
        self.samples = 0

    # the device's half

    def ratios(self) -> tuple[float | Tensor, Tensor | None]:
        """A rate a, and per row of the table its tensor's rate over a (None: 1 for all). Slices of one unit may lie in
        groups of different rates: d is then understood as what a multiplies."""
        rates = [g["lr"] for g in self.param_groups]
        tensors = any(isinstance(r, Tensor) for r in rates)
        if all(r is rates[0] for r in rates) or (not tensors and len({*rates}) == 1):
            return rates[0], None
        if tensors:
            on_device = [torch.as_tensor(r, device=self.table.device).to(self.table.dtype) for r in rates]
            all_rates = torch.stack(on_device)
            a = all_rates.max()
            return a, self.table.rows_of((all_rates / torch.where(a > 0, a, 1.0))[self._group_of])
        a = max(rates)
        shares = [r / a for r in rates]
        if self._ratio is None or self._ratio[0] != shares:
            per_group = torch.tensor(shares, dtype=self.table.dtype, device=self.table.device)
            self._ratio = shares, self.table.rows_of(per_group[self._group_of])
        return a, self._ratio[1]

    def measure(self) -> Measured:
        """The base's direction, and what it is to the weights; moves what is not in the table."""
        a, ratio = self.ratios()
        table, d = self.table, self.base.direct()
        norm = table.square(table.x.banks).sqrt()
        d_norm = table.square(d, weights=None if ratio is None else ratio.square()).sqrt()
        inner = table.dot(table.x.banks, d, weights=ratio)
        bound = norm * d_norm
        self.cosine.copy_(torch.where(bound > 0, inner / bound, 0.0))
        return Measured(d, a, ratio, norm, d_norm, inner)

    def apply(self, m: Measured, keep: Tensor | None = None, shrink: Tensor | None = None) -> None:
        """x <- keep ((1 - shrink) x - a d). keep, shrink: per row of the table; None: 1 and 0."""
        table = self.table
        along = m.ratio if m.ratio is not None else torch.ones(table.rows, dtype=table.dtype, device=table.device)
        along = along * (-m.a)
        if keep is not None:
            along = along * keep
            for x, scale in zip(
                table.x.banks, table.by_bank(keep if shrink is None else keep * (1 - shrink)), strict=True
            ):
                x.mul_(scale)
        for x, d, shift in zip(table.x.banks, m.direction, table.by_bank(along), strict=True):
            x.addcmul_(d, shift)

    def record(self, m: Measured) -> None:
        """Add to the statistics that units are chosen by."""
        values = (m.norm, self.cosine, m.inner, m.inner.square())
        for total, value in zip(self._sums.values(), values, strict=True):
            total.add_(value)

    # state

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"units": self.unit_state()}

    def unit_state(self) -> dict[str, Any]:
        """What a step depends on beside momenta: tensors and plain values."""
        return {
            **{name: getattr(self, name) for name in PLAIN},
            "redundant": self.redundant,
            "dead": self.dead,
            "cosine": self.cosine,
            "factor": self._factor,
            **{f"sum.{name}": total for name, total in self._sums.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state of an optimizer of the same parameters and options. Raises UsageError for another's."""
        state = state_dict.get("units")
        if state is None or state["redundant"].shape != self.redundant.shape:
            raise UsageError("the optimizer's state is of another optimizer or network")
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "units"})
        self.base.adopt()
        self.load_unit_state(state)

    def load_unit_state(self, state: Mapping[str, Any]) -> None:
        for name in PLAIN:
            setattr(self, name, state[name])
        for name, live in self.unit_state().items():
            if isinstance(live, Tensor):
                live.copy_(state[name])


class _Share:
    """The papers' target: of all units, this share goes."""

    def __init__(self, sparsity: float) -> None:
        self.sparsity = sparsity

    def __call__(
        self, scores: Mapping[str, np.ndarray], *, share: float = 1.0, removed: Removed | None = None
    ) -> dict[str, np.ndarray]:
        gone = removed or {}
        ranked = {f: np.where(gone[f], -np.inf, s) if f in gone else s for f, s in scores.items()}
        return least_share(ranked, self.sparsity * share, floor=FLOOR)
