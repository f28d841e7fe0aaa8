"""Which device computes, in which arithmetic, and how numbers get there and back without making it wait."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from onnxprune.errors import UsageError
from onnxprune.train.distributed import local_rank
from onnxprune.train.feed import HostBatch, host_generators, set_host_generators
from onnxprune.train.settings import TrainSettings

__all__ = ["LossReader", "Upload", "arithmetic", "choose_device", "prepared"]

# On CUDA a loss is read when this many later steps have been queued: by then it is there, and nothing waits.
LAG = 3


def choose_device(name: str) -> torch.device:
    """The device of this process: 'auto' is CUDA where there is one. Raises UsageError where it is missing."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"'{name}' is no device", "give auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"training runs on cpu or cuda, not on {name}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError("torch finds no CUDA device", "--device cpu, or install torch with CUDA")
        if device.index is None:
            device = torch.device("cuda", local_rank())
    return device


def arithmetic(amp: str, device: torch.device) -> torch.dtype | None:
    """The type that the forward pass is computed in by autocast; None: float32 throughout."""
    if amp == "none":
        return None
    if amp == "fp16":
        if device.type == "cpu":
            raise UsageError("fp16 needs CUDA", "on a CPU: --amp bf16, or none")
        return torch.float16
    if amp == "bf16":
        return torch.bfloat16
    native = torch.cuda.get_device_capability(device) >= (8, 0) if device.type == "cuda" else _cpu_has_bf16()
    return torch.bfloat16 if native else None


def _cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 natively; where it is emulated it is slower than float32."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


@contextmanager
def prepared(settings: TrainSettings, device: torch.device, rank: int) -> Iterator[None]:
    """Seed torch and set its global switches for a run; everything global is put back afterwards, random states too."""
    host, cuda = host_generators(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    benchmark, cudnn = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    try:
        if settings.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = not settings.deterministic
        torch.manual_seed(int(np.random.SeedSequence([settings.seed, rank]).generate_state(1)[0]))
        yield
    finally:
        torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = benchmark, cudnn
        set_host_generators(host)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)


class Upload:
    """Brings batches to the device; on CUDA on a stream of its own, beside the step that still runs."""

    def __init__(self, device: torch.device, *, channels_last: bool) -> None:
        self.device, self.channels_last = device, channels_last
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: HostBatch) -> HostBatch:
        if self._stream is None:
            return HostBatch({n: self._laid(x) for n, x in batch.inputs.items()}, batch.targets, batch.samples)
        with torch.cuda.stream(self._stream):
            inputs = {n: x.to(self.device, non_blocking=True) for n, x in batch.inputs.items()}
            targets = {n: x.to(self.device, non_blocking=True) for n, x in batch.targets.items()}
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self._stream)
        for x in (*inputs.values(), *targets.values()):
            x.record_stream(computing)
        return HostBatch({n: self._laid(x) for n, x in inputs.items()}, targets, batch.samples)

    def _laid(self, x: Tensor) -> Tensor:
        if self.channels_last and x.ndim == 4 and x.is_floating_point():
            return x.contiguous(memory_format=torch.channels_last)
        return x


class LossReader:
    """Losses of steps on their way to the host, in order: `put` one, `take` those that have arrived.

    On a CPU at once. On CUDA they are copied behind the step into pinned memory, and given out LAG steps later; which
    ones does not depend on timing, so that all processes see losses of the same steps.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._waiting: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def put(self, loss: Tensor) -> None:
        if not self._cuda:
            self._waiting.append((loss, None))
            return
        host = torch.empty((), dtype=loss.dtype, pin_memory=True)
        host.copy_(loss, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._waiting.append((host, event))

    def take(self, *, everything: bool = False) -> list[float]:
        keep = LAG if self._cuda and not everything else 0
        losses = []
        while len(self._waiting) > keep:
            host, event = self._waiting.popleft()
            if event is not None:
                event.synchronize()
            losses.append(float(host))
        return losses

    def clear(self) -> None:
        self._waiting.clear()
