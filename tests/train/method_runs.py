"""A method in training on a small convolutional network, for tests of the methods' hooks."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from onnxprune import Analysis, analyse, mirror, parse_target
from onnxprune.model.graph import Graph
from onnxprune.model.load import load
from onnxprune.train.hooks import Hooks, Step
from onnxprune.train.selection import Selection
from onnxprune.train.sparsify import Sparsifier
from tests.networks import NETWORKS, exported
from tests.train.runs import ArraySource, run

__all__ = ["Watched", "macs_left", "network", "trained"]


@cache
def network(kind: str = "grouped") -> tuple[Graph, Analysis]:
    with tempfile.TemporaryDirectory() as folder:
        graph = load(exported(NETWORKS[kind], Path(folder) / "n.onnx"))
        for name in graph.parameters:  # they are read when they are asked for
            graph.array(name)
    return graph, analyse(graph)


class Watched(Hooks):
    """Another's hooks, looked at after every step; `fail_at`: a step in which the run breaks off."""

    def __init__(
        self, hooks: Sparsifier, look: Callable[[Step], Any] = lambda step: None, fail_at: int | None = None
    ) -> None:
        self.hooks, self.look, self.fail_at = hooks, look, fail_at
        self.seen: list[Any] = []
        self.loss_may_rise = True
        for name in ("optimizer", "after_backward", "on_finish", "values", "state_dict", "load_state_dict"):
            setattr(self, name, getattr(hooks, name))

    def on_step_begin(self, step: Step) -> None:
        self.hooks.on_step_begin(step)
        if step.index == self.fail_at:
            raise ZeroDivisionError

    def after_step(self, step: Step) -> None:
        self.hooks.after_step(step)
        self.seen.append(self.look(step))


def trained(
    kind: type[Sparsifier],
    options: Any = None,
    *,
    look: Callable[[Step], Any] = lambda step: None,
    fail_at: int | None = None,
    target: str = "macs=0.5",
    on: str = "grouped",
    **settings: Any,
) -> tuple[GraphModule, Any, list[Any]]:
    """The mirror, the hooks, and what `look` saw. Steps: 40 of 8 images."""
    graph, analysis = network(on)
    module = mirror(graph)
    selection = Selection(analysis, parse_target(target), [g.id for g in analysis.groups])
    hooks = kind(analysis, selection, options) if options is not None else kind(analysis, selection)  # type: ignore[call-arg]
    watched = Watched(hooks, look, fail_at)
    torch.manual_seed(0)
    run(model=module, source=ArraySource(64), hooks=watched, **({"steps": 40, "lr": 0.02} | settings))
    return module, hooks, watched.seen


def macs_left(hooks: Sparsifier) -> float:
    """What the selection's last choice leaves of the MACs."""
    assert hooks.selection.choice is not None
    return hooks.selection.choice.outcome.reached
