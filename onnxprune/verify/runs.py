"""Running models in onnxruntime, on inputs that are found by trying."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from onnxprune.errors import ModelRejected
from onnxprune.model.graph import Graph
from onnxprune.model.pins import symbolic_inputs
from onnxprune.verify.inputs import SPREADS, Feed, draw, size_candidates

__all__ = ["SETS", "feeds_that_run", "run", "session"]

SETS = 3
TRIES = 14
Shapes = Mapping[str, Sequence[int]] | None


def session(path: Path | str, *, threads: int = 0) -> Any:
    """An onnxruntime session on the CPU that changes nothing in the graph and copies no weights it need not.

    Raises ModelRejected with onnxruntime's reason.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.enable_cpu_mem_arena = False
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises types of its own
        reason = str(error).splitlines()[0].split(" failed:", 1)[-1]
        raise ModelRejected(
            f"onnxruntime can't load the model: {reason[:300]}", "`onnxprune inspect` works all the same"
        ) from None


def run(runner: Any, feed: Feed) -> tuple[list[Any] | None, str]:
    """Outputs, or onnxruntime's reason why there are none."""
    try:
        return runner.run(None, feed), ""
    except Exception as error:  # onnxruntime raises types of its own
        return None, str(error).splitlines()[0][:300]


def feeds_that_run(graph: Graph, runner: Any, seed: int, shapes: Shapes) -> tuple[list[Feed], list[list[Any]]]:
    """At least three input sets that the model accepts, every dynamic dimension at two sizes where the model allows
    that, and the outputs. Raises ModelRejected where no input is accepted."""
    rng = np.random.default_rng(seed)
    feeds: list[Feed] = []
    outputs: list[list[Any]] = []
    sizes: list[Mapping[str, int]] = []
    reason = ""

    def attempt(pins: Mapping[str, int], spread: str) -> bool:
        nonlocal reason
        feed = draw(graph, pins, rng, shapes, spread=spread)
        found, why = run(runner, feed)
        if found is None:
            reason = reason or why
            return False
        feeds.append(feed)
        outputs.append(found)
        sizes.append(pins)
        return True

    spread = next(
        (s for s in SPREADS for pins in islice(size_candidates(graph, shapes), TRIES) if attempt(pins, s)), None
    )
    if spread is None:
        raise ModelRejected(
            f"onnxruntime can't run the model on inputs that onnxprune makes up: {reason}",
            "name sizes that it accepts with --input-shapes",
        )
    if any(isinstance(d, str) for dims in symbolic_inputs(graph).values() for d in dims):
        for pins in _other_sizes(graph, sizes[0], shapes):
            if _covered(sizes) or len(feeds) > SETS:
                break
            attempt(pins, spread)
    while len(feeds) < SETS and attempt(sizes[0], spread):
        pass
    return feeds, outputs


def _covered(sizes: Sequence[Mapping[str, int]]) -> bool:
    """Every dynamic dimension has been tried at two sizes."""
    return all(len({s[name] for s in sizes}) > 1 for name in sizes[0])


def _other_sizes(graph: Graph, first: Mapping[str, int], shapes: Shapes) -> Iterator[dict[str, int]]:
    """All dimensions changed at once, then one at a time."""
    for pins in islice(size_candidates(graph, shapes, batch=(3, 1)), 20):
        if all(pins[k] != first[k] for k in pins):
            yield pins
    for change in (1, 2, 8, -1, 32, 64):
        for name in first:
            if first[name] + change > 0:
                yield {**first, name: first[name] + change}
