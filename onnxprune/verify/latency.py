"""How long models take in onnxruntime on this machine's CPU.

Fewer multiply-accumulates are not less time, so time is measured; and since a machine's clock and neighbours drift, the
models take turns (a, b, a, b, ...), so that drift meets all of them alike. A difference only counts where the spreads
don't overlap.

What other programs take of the processor is no latency of a model. With one thread, time is that which the processor
spent on it; and runs that the system interrupted for others don't count, as long as enough are left.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from onnxprune.errors import ModelRejected, UsageError
from onnxprune.model.graph import subgraphs
from onnxprune.model.load import load, open_model
from onnxprune.result import Latency, LatencyStats
from onnxprune.verify.inputs import Feed, draw, size_candidates

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

if TYPE_CHECKING:
    import onnxruntime as ort

__all__ = ["OPTIMISATION", "Bench", "bench", "compare", "measure", "open_session", "run_options", "sample"]

ModelLike = str | os.PathLike[str] | bytes

OPTIMISATION = {
    "none": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
"""Graph optimisation levels of onnxruntime by the name we give them."""

NCHWC = "com.microsoft.nchwc"  # domain of the blocked-layout kernels that x86 convolutions are rewritten to
UNKNOWN = -1  # kernel count where the optimised graph could not be written

LEAST_ROUNDS, MOST_ROUNDS = 10, 5000
SIZE_TRIES = 8

_PREFIX = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : (Load model from .*? failed:)?")


@dataclass(frozen=True)
class Bench:
    """Models measured turn by turn.

    significant: per model, whether its spread (10th to 90th percentile) lies apart from the first model's; false for
    the first itself. runtime: what ran them, for the reader of a report.
    """

    rows: tuple[LatencyStats, ...]
    significant: tuple[bool, ...]
    threads: int
    optimisation: str
    runtime: str

    def against_first(self, k: int) -> Latency:
        """Model k compared with the first."""
        return Latency(self.rows[0], self.rows[k], self.significant[k], self.threads, self.optimisation)


def bench(
    models: Sequence[ModelLike],
    *,
    threads: int = 1,
    warmup: int = 3,
    runs: int | None = None,
    seconds: float = 2.0,
    optimisation: str = "all",
    shapes: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
) -> Bench:
    """Measure models (paths or serialised) in turns.

    runs: rounds, each of which runs every model once; without it, rounds go on for `seconds` per model, at least
    LEAST_ROUNDS of them. warmup: rounds that don't count. shapes: sizes of inputs by name, instead of the usual ones.
    Raises ModelRejected where onnxruntime can't load or run a model, UsageError for an unknown input or level.
    """
    import onnxruntime

    if optimisation not in OPTIMISATION:
        raise UsageError(f"'{optimisation}' is no graph optimisation level", f"one of {', '.join(OPTIMISATION)}")
    if threads < 1 or warmup < 0 or not models or (runs is not None and runs < 1):
        raise UsageError("a benchmark needs a model, a thread and a run at least")
    opened = [_open(model, threads=threads, optimisation=optimisation) for model in models]
    sessions = [session for session, _ in opened]
    feeds = _feeds(models, sessions, shapes or {}, seed)
    clock = time.thread_time_ns if threads == 1 else time.perf_counter_ns
    taken = _in_turns(sessions, feeds, warmup=warmup, runs=runs, seconds=seconds, clock=clock)
    times = _undisturbed(taken)
    rows = tuple(_stats(t, kernels, len(whole)) for t, whole, (_, kernels) in zip(times, taken, opened, strict=True))
    significant = tuple(_apart(times[0], t) for t in times)
    return Bench(rows, significant, threads, optimisation, f"onnxruntime {onnxruntime.__version__} CPU")


def measure(
    paths: Sequence[ModelLike],
    *,
    threads: int = 1,
    warmup: int = 3,
    runs: int | None = None,
    seconds: float = 2.0,
    optimisation: str = "all",
    shapes: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
) -> list[LatencyStats]:
    """The figures of `bench`, without the comparison."""
    return list(
        bench(
            paths,
            threads=threads,
            warmup=warmup,
            runs=runs,
            seconds=seconds,
            optimisation=optimisation,
            shapes=shapes,
            seed=seed,
        ).rows
    )


def compare(
    a: ModelLike,
    b: ModelLike,
    *,
    threads: int = 1,
    warmup: int = 3,
    runs: int | None = None,
    seconds: float = 2.0,
    optimisation: str = "all",
    shapes: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
) -> Latency:
    """Two models, turn by turn: `a` before, `b` after."""
    return bench(
        [a, b],
        threads=threads,
        warmup=warmup,
        runs=runs,
        seconds=seconds,
        optimisation=optimisation,
        shapes=shapes,
        seed=seed,
    ).against_first(1)


def _label(model: ModelLike) -> str:
    return "the model" if isinstance(model, bytes) else os.fspath(model)


def _open(model: ModelLike, *, threads: int, optimisation: str) -> tuple[ort.InferenceSession, int]:
    """A session and the number of NCHWc kernels in it.

    The kernels are counted in the optimised graph that onnxruntime writes on the way; weights go to a file beside it
    that is never read, and both are gone when this returns.
    """
    if not isinstance(model, bytes):
        open_model(model)  # says what is wrong with a file more plainly than onnxruntime does
    if optimisation != "all":  # the levels below don't change layouts
        return open_session(model, run_options(threads, optimisation)), 0
    with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
        written = Path(folder, "optimised.onnx")
        options = run_options(threads, optimisation)
        options.optimized_model_filepath = str(written)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        try:
            session = open_session(model, options)
            return session, _count(onnx.load(written, load_external_data=False).graph.node)
        except (ModelRejected, OSError):  # a full disk, or a graph that can't be written: do without the count
            return open_session(model, run_options(threads, optimisation)), UNKNOWN


def run_options(threads: int, optimisation: str) -> ort.SessionOptions:
    """How sessions are opened whose time is taken."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, OPTIMISATION[optimisation])
    # Threads that spin after a run would take the processor away from the model whose turn it is.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def open_session(model: ModelLike, options: ort.SessionOptions) -> ort.InferenceSession:
    """A session on the CPU. Raises ModelRejected with onnxruntime's reason."""
    import onnxruntime

    source = model if isinstance(model, bytes) else os.fspath(model)
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base but this one
        raise ModelRejected(f"onnxruntime can't load {_label(model)}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """onnxruntime's message on one line, without its code and the path, which we have said."""
    text = _PREFIX.sub("", " ".join(str(error).split()))
    return text[:300] or type(error).__name__


def _count(nodes: Iterable[onnx.NodeProto]) -> int:
    return sum((node.domain == NCHWC) + sum(_count(body.node) for body in subgraphs(node)) for node in nodes)


def _feeds(
    models: Sequence[ModelLike],
    sessions: Sequence[ort.InferenceSession],
    shapes: Mapping[str, Sequence[int]],
    seed: int,
) -> list[Feed]:
    """Inputs per model; models with the same signature get the very same ones."""
    known: dict[Any, Feed] = {}
    found: list[Feed] = []
    _check_shapes(sessions, shapes)
    for model, session in zip(models, sessions, strict=True):
        signature = tuple((i.name, i.type, tuple(i.shape)) for i in session.get_inputs())
        if signature not in known:
            known[signature] = sample(model, session, shapes, seed)
        found.append(known[signature])
    return found


def _check_shapes(sessions: Sequence[ort.InferenceSession], shapes: Mapping[str, Sequence[int]]) -> None:
    """What the caller fixes must be there. Raises UsageError."""
    ranks = {i.name: len(i.shape) for session in sessions for i in session.get_inputs()}
    for name, shape in shapes.items():
        if name not in ranks:
            raise UsageError(f"there is no input '{name}'", f"the inputs are {', '.join(sorted(ranks))}")
        if len(shape) != ranks[name]:
            raise UsageError(f"input '{name}' has {ranks[name]} dimensions, not {len(shape)}")


def sample(model: ModelLike, session: ort.InferenceSession, shapes: Mapping[str, Sequence[int]], seed: int) -> Feed:
    """Random inputs of the likeliest sizes that the model accepts, one sample where the batch is free."""
    graph = load(onnx.ModelProto.FromString(model) if isinstance(model, bytes) else model)
    reason = "it has no inputs that can be made up"
    for pins in islice(size_candidates(graph, shapes, batch=(1, 2)), SIZE_TRIES):
        feed = draw(graph, pins, np.random.default_rng(seed), shapes)
        try:
            session.run(None, feed)
        except Exception as error:
            reason = _reason(error)
        else:
            return feed
    raise ModelRejected(f"onnxruntime can't run {_label(model)}: {reason}", "give sizes that fit with --input-shapes")


@dataclass(frozen=True)
class Taken:
    """Milliseconds of every run of a model, and how often the system interrupted it for somebody else."""

    milliseconds: np.ndarray
    interruptions: np.ndarray

    def __len__(self) -> int:
        return len(self.milliseconds)


def _in_turns(
    sessions: Sequence[ort.InferenceSession],
    feeds: Sequence[Feed],
    *,
    warmup: int,
    runs: int | None,
    seconds: float,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> list[Taken]:
    """Every run, per model."""
    times: list[list[float]] = [[] for _ in sessions]
    stops: list[list[int]] = [[] for _ in sessions]
    for _ in range(warmup):
        for session, feed in zip(sessions, feeds, strict=True):
            session.run(None, feed)
    end = time.perf_counter() + seconds * len(sessions)
    rounds = 0
    while rounds < runs if runs is not None else _go_on(rounds, end):
        for session, feed, taken, stopped in zip(sessions, feeds, times, stops, strict=True):
            before = _interruptions()
            start = clock()
            session.run(None, feed)
            taken.append((clock() - start) / 1e6)
            stopped.append(_interruptions() - before)
        rounds += 1
    return [Taken(np.asarray(t), np.asarray(s)) for t, s in zip(times, stops, strict=True)]


def _interruptions() -> int:
    """How often this process had to leave the processor to another, so far; 0 where the system does not say."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw if resource is not None else 0


def _undisturbed(taken: Sequence[Taken]) -> list[np.ndarray]:
    """Milliseconds of the runs that were interrupted least: of all models as seldom, and enough of each."""
    enough = min(LEAST_ROUNDS, *(len(t) for t in taken))
    most = max(int(np.sort(t.interruptions)[enough - 1]) for t in taken)
    return [t.milliseconds[t.interruptions <= most] for t in taken]


def _go_on(rounds: int, end: float) -> bool:
    return rounds < LEAST_ROUNDS or (rounds < MOST_ROUNDS and time.perf_counter() < end)


def _stats(times: np.ndarray, kernels: int, runs: int) -> LatencyStats:
    median, p90 = np.percentile(times, (50, 90))
    return LatencyStats(float(times.min()), float(median), float(p90), runs, kernels, runs - len(times))


def _apart(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether the spreads, 10th to 90th percentile, don't overlap."""
    (a10, a90), (b10, b90) = np.percentile(a, (10, 90)), np.percentile(b, (10, 90))
    return bool(a90 < b10 or b90 < a10)
