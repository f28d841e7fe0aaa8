"""A model trained for a few steps by an optimizer over units, and what onnxruntime says with and without its zero units."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onnxprune.axes.analysis import Analysis, analyse
from onnxprune.mirroring import mirror
from onnxprune.mirroring.values import stored_values
from onnxprune.model.infer import infer
from onnxprune.model.load import load
from onnxprune.model.save import write
from onnxprune.rewrite.rewrite import rewrite
from onnxprune.rewrite.weights import with_weights
from onnxprune.select.plan import Plan
from onnxprune.train.families import params_and_groups
from onnxprune.train.unit_optimizer import UnitOptimizer
from onnxprune.verify.compare import difference
from onnxprune.verify.equivalence import prove
from onnxprune.verify.runs import feeds_that_run, session

Make = Callable[[list[dict[str, Any]]], UnitOptimizer]


def trained(model: Any, make: Make, path: Path, *, steps: int, seed: int = 0) -> tuple[Analysis, UnitOptimizer]:
    """The analysis of the model with its trained weights, which is in `path`, and the optimizer.

    It learns to give random numbers for random inputs, by a loop as users write them.
    """
    graph = load(model)
    write(graph.model, path)
    feeds, outputs = feeds_that_run(graph, session(path), seed, None)
    student = mirror(graph, half=torch.float32).train()
    optimizer = make(params_and_groups(student, analyse(graph), weight_decay=1e-3))
    rng = torch.Generator().manual_seed(seed)
    wanted = [[torch.randn(o.shape, generator=rng) for o in row] for row in outputs]
    for step in range(steps):
        inputs = [torch.from_numpy(np.array(feeds[step % len(feeds)][name])) for name in graph.inputs]
        found = student(*inputs)
        found = (found,) if isinstance(found, Tensor) else found
        learnt = [(a, b) for a, b in zip(found, wanted[step % len(feeds)], strict=True) if a.requires_grad]
        optimizer.zero_grad()
        loss = torch.stack([(a - b).square().mean() for a, b in learnt]).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
    again = infer(with_weights(graph, stored_values(student.eval())), analyse(graph).registry, graph.pins)
    write(again.model, path)
    return analyse(again), optimizer


def plan_of(optimizer: UnitOptimizer) -> Plan:
    """What is left where all units are gone that are zero."""
    zero = optimizer.table.by_family(optimizer.table.square(optimizer.table.x.banks) == 0)
    return Plan({family: np.flatnonzero(~gone) for family, gone in zero.items() if gone.any()})


def removal_error(analysis: Analysis, plan: Plan, path: Path) -> float:
    """Largest difference that removing the plan's units makes, relative to the largest output. The surgery is proved
    on the way, too."""
    small = path.with_name("small.onnx")
    write(rewrite(analysis, plan), small)
    prove(analysis, plan, small)
    feeds, before = feeds_that_run(analysis.graph, session(path), 1, None)
    runner = session(small)
    after = [runner.run(None, feed) for feed in feeds]
    pairs = [(a, b) for old, new in zip(before, after, strict=True) for a, b in zip(old, new, strict=True)]
    return max(difference(a, b)[1] for a, b in pairs)
