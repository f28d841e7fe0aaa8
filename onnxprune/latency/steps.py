"""What onnxruntime spends its time on in one model: the kernels that it runs, in place, and the nodes they stand for.

onnxruntime fuses nodes and changes layouts, so what runs is not the graph. Tensors keep their names through that, or
the kernel keeps the node's, and both lead back: nodes are renamed so that they can be told again, and a kernel stands
for the nodes between the tensor that it makes and those that other kernels make.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxprune.errors import ModelRejected
from onnxprune.model.graph import Graph, Model
from onnxprune.model.save import write
from onnxprune.verify.inputs import Feed
from onnxprune.verify.latency import open_session, run_options, sample

__all__ = ["Profile", "Step", "kernel_times", "profile", "token", "tokens", "typical"]

RUNS, WARMUP = 15, 3
LONG_S, LEAST_RUNS = 10.0, 5  # of a slow model, fewer runs do
NCHWC = "_nchwc"  # what onnxruntime appends to the name of a tensor, for the kernel that makes it in blocks

_TOKEN = re.compile(r"@(\d+)@")
_KERNEL = "_kernel_time"


@dataclass(frozen=True)
class Step:
    """A kernel: microseconds per run, the nodes with multiply-accumulates that it stands for, and the tensors of the
    original graph that it reads and makes, as far as they are known."""

    microseconds: float
    nodes: tuple[int, ...]
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Profile:
    """A model's kernels, the time of a whole run without a profiler in the way, and the inputs of both."""

    steps: tuple[Step, ...]
    total_us: float
    feed: Feed


def token(k: int) -> str:
    """A name by which node k is known again in whatever onnxruntime makes of it."""
    return f"@{k}@"


def tokens(name: str) -> list[int]:
    """The nodes that a kernel's name speaks of."""
    return [int(k) for k in _TOKEN.findall(name)]


def profile(
    graph: Graph,
    anchors: Collection[int],
    *,
    threads: int = 1,
    shapes: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
) -> Profile:
    """Run a model under onnxruntime's profiler. anchors: nodes that kernels are to be traced back to.

    There are no steps where there is no room for the optimised graph.

    Raises ModelRejected where onnxruntime can't load or run the model.
    """
    with tempfile.TemporaryDirectory(prefix="onnxprune-") as name:
        folder = Path(name)
        path = folder / "model.onnx"
        write(_renamed(graph), path)
        original = graph.model.source or path  # what is wrong with it is said in its own terms
        plain = open_session(original, run_options(threads, "all"))
        feed = sample(original, plain, shapes or {}, seed)
        total = _whole_us(plain, feed, threads)
        del plain
        try:
            steps = _steps(graph, set(anchors), path, threads, feed, _runs(total))
        except (ModelRejected, OSError):  # a full disk, or an optimised graph that can't be written
            steps = ()
        return Profile(steps, total, feed)


def _steps(graph: Graph, anchors: set[int], path: Path, threads: int, feed: Feed, runs: int) -> tuple[Step, ...]:
    """The kernels of the model in `path`, by name in the optimised graph, which is written beside it."""
    written = path.with_name("optimised.onnx")
    options = run_options(threads, "all")
    options.optimized_model_filepath = str(written)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    times = kernel_times(path, options, feed, path.parent, runs=runs)
    nodes = onnx.load(written, load_external_data=False).graph.node
    return _traced(graph, nodes, times, anchors)


def kernel_times(model: Path | bytes, options: Any, feed: Feed, folder: Path, *, runs: int) -> dict[str, np.ndarray]:
    """Microseconds of every run, after a warm-up, per kernel by the node's name in the optimised graph.

    Raises ModelRejected where the model can't be loaded or run.
    """
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    running = open_session(model, options)
    try:
        for _ in range(WARMUP + runs):
            running.run(None, feed)
    except Exception as error:  # onnxruntime's exceptions share no base but this one
        running.end_profiling()
        raise ModelRejected(f"onnxruntime can't run it: {str(error).splitlines()[0][:200]}") from None
    events = json.loads(Path(running.end_profiling()).read_text(encoding="utf-8", errors="replace"))
    found: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_KERNEL):
            found.setdefault(event["name"].removesuffix(_KERNEL), []).append(float(event["dur"]))
    return {
        name: np.asarray(durations)[WARMUP * len(durations) // (WARMUP + runs) :] for name, durations in found.items()
    }


def _renamed(graph: Graph) -> Model:
    """The model with every node of its main graph called by its token."""
    source = graph.model
    model = Model(onnx.ModelProto(), dict(source.payloads), source.source)
    model.proto.CopyFrom(source.proto)
    made = {name: node.index for node in graph.nodes for name in node.outputs if name}
    for node in model.proto.graph.node:
        k = next((made[name] for name in node.output if name in made), None)
        node.name = token(k) if k is not None else ""
    return model


def _whole_us(running: Any, feed: Feed, threads: int) -> float:
    """Whole runs, by the clock that `verify.latency` reads."""
    clock = time.thread_time_ns if threads == 1 else time.perf_counter_ns
    taken: list[float] = []
    for _ in range(WARMUP):
        running.run(None, feed)
    while len(taken) < 2 * RUNS and (len(taken) < LEAST_RUNS or sum(taken) < LONG_S * 1e6):
        start = clock()
        running.run(None, feed)
        taken.append((clock() - start) / 1e3)
    return typical(np.asarray(taken))


def typical(durations: np.ndarray) -> float:
    """The mean of the faster half: what slows a run down is somebody else, and a profiler counts whole microseconds."""
    return float(np.sort(durations)[: (len(durations) + 1) // 2].mean())


def _runs(total_us: float) -> int:
    return int(min(RUNS, max(LEAST_RUNS, LONG_S * 1e6 / max(total_us, 1))))


def _traced(
    graph: Graph, nodes: Sequence[onnx.NodeProto], times: Mapping[str, np.ndarray], anchors: set[int]
) -> tuple[Step, ...]:
    """Kernels in the order in which they run, each with what it stands for."""
    known = set(graph.producers)
    made = [_original(node, known) for node in nodes]
    rim = set(filter(None, made)) | set(graph.inputs)
    unclaimed = set(anchors)
    for node in nodes:
        unclaimed -= set(tokens(node.name))
    steps = []
    for node, tensor in zip(nodes, made, strict=True):
        durations = times.get(node.name)
        if durations is None or not len(durations):
            continue
        own = [k for k in tokens(node.name) if k in anchors]
        if tensor is not None:
            own += sorted(_behind(graph, tensor, rim, unclaimed))
            unclaimed -= set(own)
        named = [n for k in tokens(node.name) for n in graph.nodes[k].outputs]
        seen = [n for n in (*node.input, *([tensor] if tensor else ()), *named) if n in known or n in graph.inputs]
        steps.append(Step(typical(durations), tuple(dict.fromkeys(own)), tuple(dict.fromkeys(seen))))
    return tuple(steps)


def _original(node: onnx.NodeProto, known: set[str]) -> str | None:
    """The tensor of the original graph that a kernel makes."""
    for name in (*node.output, node.name.removesuffix(NCHWC)):
        if name in known:
            return name
    return None


def _behind(graph: Graph, tensor: str, rim: set[str], wanted: set[int]) -> set[int]:
    """The wanted nodes between a tensor and those that other kernels make."""
    found: set[int] = set()
    pending, seen = [tensor], {tensor}
    while pending:
        node = graph.producers.get(pending.pop())
        if node is None:
            continue
        if node.index in wanted:
            found.add(node.index)
        for name in node.inputs:
            if name and name not in rim and name not in seen and name not in graph.static:
                seen.add(name)
                pending.append(name)
    return found
