"""Two networks run side by side, as far as each step wants and no further, over all batches before the next step.

A step asks for tensors of both; only what leads to them and was not run yet is run, and only what a later step reads is
kept. Over all steps every node runs once per batch, so that the cost is that of one pass of each network, and between
two steps the weights in front of what has not run may change.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.fx import GraphModule, Node, Proxy
from torch.fx.node import map_arg

from onnxprune.mirroring.build import Builder
from onnxprune.mirroring.quantised import Quantised
from onnxprune.model.graph import Graph
from onnxprune.ops.registry import Operator
from onnxprune.ops.rules import MALFORMED
from onnxprune.reconstruct.frontier import Frontier
from onnxprune.workers import in_order

__all__ = ["Lockstep", "Side"]

Key = tuple[int, str]


class Side:
    """One network: its mirror, and which node of it computes which tensor of the model. Nothing is fused, so that every
    tensor of the model is one of the mirror's."""

    def __init__(self, graph: Graph, registry: Mapping[str, Operator]) -> None:
        self.graph = graph
        builder = Builder(graph, registry, half=torch.float32)
        self.module: GraphModule = builder.build().eval()
        self.nodes: list[Node] = list(self.module.graph.nodes)
        alive = set(self.nodes)
        self.places = {n: v.node for n, v in builder.values.items() if isinstance(v, Proxy) and v.node in alive}
        self.inputs = [n for n in self.nodes if n.op == "placeholder"]
        self.names: tuple[str, ...] = self.module.meta["inputs"]
        self.by_name = {n.name: n for n in self.nodes}
        self.static: set[Node] = set()  # what needs no data: cheap, and never kept
        self.weights: dict[Node, str] = {}
        paths = self.module.meta["parameters"]
        for node in self.nodes:
            if node.op == "get_attr" and node.target in paths:
                self.weights[node] = paths[node.target][-1]
            if node.op not in ("placeholder", "output") and all(a in self.static for a in node.all_input_nodes):
                self.static.add(node)
        self.targets = {path[-1]: target for target, path in paths.items()}

    def tensor(self, name: str) -> torch.Tensor:
        """The stored tensor of that name, as the mirror holds it."""
        return self.attribute(self.targets[name]).detach()

    def stored(self, name: str, values: np.ndarray) -> np.ndarray:
        """As the model stores a tensor of these values: the integers that stand for them, where it stores such."""
        form = self.form(name)
        return values if form is None else form.integers(values)

    def form(self, name: str) -> Quantised | None:
        """How integers stand for a stored tensor's values; None where it stores them as they are."""
        return self.module.meta["quantised"].get(self.targets[name])

    def outputs(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        """Of the whole network; None for what is no tensor. Raises RuntimeError where it can't be run."""
        with _running("the network"):
            found = self.module.forward(*inputs)  # called, it would print a traceback
        listed = list(found) if len(self.graph.outputs) > 1 else [found]
        return [x if isinstance(x, torch.Tensor) else None for x in listed]

    @torch.no_grad()
    def run(self, nodes: Iterable[Node], env: Mapping[Node, Any]) -> Iterator[tuple[Node, Any]]:
        """The nodes' values, one after the other. env: of the nodes that they read, as it is by then. Raises
        RuntimeError where one can't be run.

        Not by an fx.Interpreter, which holds its values itself: batches run side by side, and into several steps."""
        for node in nodes:
            with _running(node.name):
                arguments: Any = map_arg(node.args, env.__getitem__)
                options: Any = map_arg(node.kwargs, env.__getitem__)
                if node.op == "call_function":
                    value = node.target(*arguments, **options)  # type: ignore[operator]
                elif node.op == "call_method":
                    value = getattr(arguments[0], str(node.target))(*arguments[1:], **options)
                else:
                    value = self.attribute(str(node.target))
                    if node.op == "call_module":
                        value = value.forward(*arguments, **options)  # called, it would print a traceback
            yield node, value

    def attribute(self, target: str) -> Any:
        """Of the module, by its path."""
        value: Any = self.module
        for part in target.split("."):
            value = getattr(value, part)
        return value

    def levels(self, solved: Collection[str], turned: Collection[Node] = ()) -> dict[Node, int]:
        """How many of the weights in `solved` lie one behind another in front of each node, its own included. turned:
        nodes whose values change afterwards, which counts for what reads them."""
        level: dict[Node, int] = {}
        holds: dict[Node, set[str]] = {}  # weights that static nodes give, perhaps turned
        for node in self.nodes:
            held = set().union(*(holds.get(a, ()) for a in node.all_input_nodes))
            if node in self.static:
                holds[node] = held | ({self.weights[node]} if node in self.weights else set())
                held = set()
            changed = bool(held & set(solved)) or any(a in turned for a in node.all_input_nodes)
            level[node] = max((level[a] for a in node.all_input_nodes), default=0) + changed
        return level

    def ancestors(self, wanted: Collection[Node]) -> set[Node]:
        """These nodes and all that leads to them."""
        found = set(wanted)
        for node in reversed(self.nodes):
            if node in found:
                found.update(node.all_input_nodes)
        return found


class Lockstep:
    """The original (side 0) and the pruned network (side 1), over batches that are held between the steps."""

    def __init__(self, sides: Sequence[Side], frontier: Frontier) -> None:
        self.sides = sides
        self.frontier = frontier
        self.done: list[set[Node]] = [set(s.inputs) for s in sides]
        self.lost: set[int] = set()  # batches that one of the networks can't be run on

    def append(self, inputs: Sequence[torch.Tensor]) -> None:
        """A batch of inputs, in the models' order."""
        self.frontier.append(
            {(k, n.name): x for k, s in enumerate(self.sides) for n, x in zip(s.inputs, inputs, strict=True)}
        )

    def step(
        self,
        now: Sequence[Collection[Node]],
        later: Sequence[Collection[Node]],
        visit: Callable[[int, Sequence[Mapping[Node, Any]]], None],
        tried: Sequence[Collection[Node]] = ((), ()),
    ) -> None:
        """Run both sides up to the nodes of `now`, and show their values batch by batch: visit(batch, values by node).
        later: what is still to be asked for after this step. tried: nodes that are run and shown as well, but not kept,
        for weights in front of them are still to change. A batch that a network can't be run on is left out from then
        on. Raises RuntimeError where there is no other."""
        runs, keeps, ends = [], [], []
        for side, done, wanted, after, also in zip(self.sides, self.done, now, later, tried, strict=False):
            ahead = side.ancestors(wanted) - done
            beyond = side.ancestors(also) - done - ahead
            done |= ahead - side.static
            still = side.ancestors(after) - done
            keep = {n for n in done if n in after or any(u in still for u in n.users)}
            run = [n for n in side.nodes if n in ahead or n in beyond]
            runs.append(run)
            keeps.append(keep)
            ends.append(_last_uses(run, {*wanted, *also, *keep}))

        def computed(held: Mapping[Any, Any]) -> list[dict[Node, Any]] | RuntimeError:
            try:
                return [self._run(k, runs[k], ends[k], held) for k in range(len(self.sides))]
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                return error

        batches = [b for b in range(len(self.frontier)) if b not in self.lost]
        for batch, values in zip(batches, in_order(computed, map(self.frontier.take, batches)), strict=True):
            if isinstance(values, RuntimeError):
                self.lost.add(batch)
                if len(self.lost) == len(self.frontier):
                    raise values
                continue
            with torch.no_grad():
                visit(batch, values)
            kept: dict[Any, Any] = {(k, n.name): env[n] for k, env in enumerate(values) for n in keeps[k] if n in env}
            self.frontier.put(batch, kept)

    def turn(self, k: int, node: Node, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Exchange the values of a node that has run on side k, where they are still held."""
        for batch in range(len(self.frontier)):
            self.frontier.change(batch, (k, node.name), change)

    def _run(self, k: int, run: list[Node], ends: list[list[Node]], held: Mapping[Any, Any]) -> dict[Node, Any]:
        side = self.sides[k]
        env: dict[Node, Any] = {side.by_name[key[1]]: v for key, v in held.items() if key[0] == k}
        for (node, value), over in zip(side.run(run, env), ends, strict=True):
            env[node] = value
            for n in over:
                env.pop(n, None)
        return env


@contextmanager
def _running(name: str) -> Iterator[None]:
    """Whatever stops torch is a RuntimeError."""
    try:
        yield
    except MALFORMED as error:
        raise RuntimeError(f"{name}: {error}") from error


def _last_uses(run: list[Node], wanted: Collection[Node]) -> list[list[Node]]:
    """Per node, whose values are not needed after it."""
    last: dict[Node, int] = {}
    for k, node in enumerate(run):
        last[node] = k
        for a in node.all_input_nodes:
            last[a] = k
    ends: list[list[Node]] = [[] for _ in run]
    for node, k in last.items():
        if node not in wanted:
            ends[k].append(node)
    return ends
