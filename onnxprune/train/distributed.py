"""Several processes that train one network, started by torchrun: gloo on CPUs, nccl on CUDA.

Every process computes its share of the global batch, with its loss weighted by its share of the samples; gradients are
then *summed*. So the result is that of one process with the whole batch, to rounding, also where shares are uneven or a
parameter takes part in some processes only, and code that sees gradients (methods, clipping) sees the same everywhere.
Decisions are made from numbers that all processes have exchanged, never from one process's own.
"""

from __future__ import annotations

import atexit
import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from onnxprune.errors import OnnxPruneError
from onnxprune.ops.kernels.norm import batch_norm

__all__ = ["GradientSum", "Team", "batch_norm", "joined", "local_rank", "synchronised"]

BUCKET_BYTES = 25 * 2**20
PATIENCE = timedelta(days=1)
_LOST = ("closed by peer", "Connection reset", "Connection refused", "Broken pipe", "NCCL")  # what gloo and nccl say


def local_rank() -> int:
    """This process's number on its machine: the CUDA device it should use."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@dataclass(frozen=True)
class Team:
    """The processes that train together; alone: one. `control` is the group for small host-side messages."""

    rank: int = 0
    world: int = 1
    control: Any = None

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files and shows progress."""
        return self.rank == 0

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """The numbers of all processes, by rank. All give equally many. Does not touch the accelerator."""
        if self.world == 1:
            return [list(numbers)]
        mine = torch.tensor(list(numbers), dtype=torch.float64)
        everyone = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(everyone, mine, group=self.control)
        return [row.tolist() for row in everyone]

    def gather_objects(self, value: Any) -> list[Any]:
        """Any picklable value of all processes, by rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.control)
        return values

    def from_first(self, value: Any) -> Any:
        """The value of process 0, in all of them."""
        if self.world == 1:
            return value
        holder = [value]
        dist.broadcast_object_list(holder, src=0, group=self.control)
        return holder[0]

    @torch.no_grad()
    def align(self, tensors: Sequence[Tensor]) -> None:
        """Give all processes the tensors of process 0."""
        if self.world > 1:
            for tensor in tensors:
                whole = tensor.detach().contiguous()
                dist.broadcast(whole, src=0)
                tensor.copy_(whole)


@contextmanager
def joined(device: torch.device) -> Iterator[Team]:
    """The team of this process: of torch's process group where there is one, else of one that is made as torchrun's
    environment describes, else this process alone.

    The group is left at the process's end only: under torchrun, whose store outlives it, a second one can't be made.
    Processes wait for each other as long as it takes: one may evaluate a model meanwhile, and torchrun ends all of them
    where one fails. Raises OnnxPruneError where another process is lost meanwhile.
    """
    if not dist.is_available():
        yield Team()
        return
    if not dist.is_initialized() and "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
        atexit.register(_leave)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield Team()
        return
    control = dist.new_group(backend="gloo", timeout=PATIENCE)
    try:
        yield Team(dist.get_rank(), dist.get_world_size(), control)
    except RuntimeError as error:
        if not any(text in str(error) for text in _LOST):
            raise
        raise OnnxPruneError("another process ended before its time", "what it printed says why") from error
    finally:
        dist.destroy_process_group(control)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


class GradientSum:
    """Sums gradients over all processes while the backward pass still runs, a bucket of parameters at a time.

    `begin` before the last backward pass of a step (earlier ones of an accumulated step only add up), `finish` after
    it. Buckets start in one order everywhere, whatever order gradients come in. A parameter without a gradient in one
    process adds zeros; without one in any, it is left without.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], team: Team) -> None:
        self.active = team.world > 1
        self._team = team
        self._armed = False
        if not self.active:
            return
        self._parameters = list(parameters)
        self._buckets = _buckets(parameters)
        self._bucket_of = {p: i for i, bucket in enumerate(self._buckets) for p in bucket}
        self._hooks = [p.register_post_accumulate_grad_hook(self._arrived) for p in parameters]
        self._reset()

    def close(self) -> None:
        """Leave the parameters as they were found."""
        if self.active:
            for hook in self._hooks:
                hook.remove()

    def _reset(self) -> None:
        self._missing = [len(bucket) for bucket in self._buckets]
        self._running: list[tuple[Tensor, Any]] = []

    def begin(self) -> None:
        if self.active:
            self._armed = True
            self._reset()

    def _arrived(self, parameter: Tensor) -> None:
        if not self._armed:
            return
        self._missing[self._bucket_of[parameter]] -= 1  # type: ignore[index]
        while len(self._running) < len(self._buckets) and self._missing[len(self._running)] == 0:
            self._start()

    @torch.no_grad()
    def _start(self) -> None:
        bucket = self._buckets[len(self._running)]
        parts = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in bucket]
        flat = torch.cat(parts)
        self._running.append((flat, dist.all_reduce(flat, async_op=True)))

    @torch.no_grad()
    def finish(self) -> None:
        """Wait for the sums and put them in place."""
        if not self.active:
            return
        self._armed = False
        while len(self._running) < len(self._buckets):
            self._start()
        unused = self._unused()
        for bucket, (flat, work) in zip(self._buckets, self._running, strict=True):
            work.wait()
            parts = [x.view(p.shape) for p, x in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True)]
            for p, part in zip(bucket, parts, strict=True):
                if p in unused:
                    continue
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                p.grad.copy_(part)

    def _unused(self) -> set[nn.Parameter]:
        """The parameters that have no gradient in any process."""
        here = [float(p.grad is None) for p in self._parameters]
        if not any(row[0] for row in self._team.gather([sum(here)])):
            return set()
        everywhere = [all(marks) for marks in zip(*self._team.gather(here), strict=True)]
        return {p for p, unused in zip(self._parameters, everywhere, strict=True) if unused}


def _buckets(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters of one type and device together, from the last (whose gradients come first) to the first."""
    buckets: list[list[nn.Parameter]] = []
    room, kind = 0, None
    for p in reversed(parameters):
        size = p.numel() * p.element_size()
        if not buckets or size > room or kind != (p.dtype, p.device):
            buckets.append([])
            room, kind = BUCKET_BYTES, (p.dtype, p.device)
        buckets[-1].append(p)
        room -= size
    return buckets


# BatchNorm over the global batch


@contextmanager
def synchronised(module: nn.Module, team: Team) -> Iterator[None]:
    """Let torch's own BatchNorm modules inside `module` normalise over all processes meanwhile.

    A function that calls `batch_norm` needs no such help.
    """
    found = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)] if team.world > 1 else []
    for m in found:
        m.forward = functools.partial(_module_forward, m)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for m in found:
            del m.forward


def _module_forward(m: nn.modules.batchnorm._BatchNorm, x: Tensor) -> Tensor:
    if not m.training or m.running_mean is None or m.running_var is None or m.momentum is None:
        return type(m).forward(m, x)
    if m.num_batches_tracked is not None:
        m.num_batches_tracked.add_(1)
    return batch_norm(x, m.running_mean, m.running_var, m.weight, m.bias, True, m.momentum, m.eps)
