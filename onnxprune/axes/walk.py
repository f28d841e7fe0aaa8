"""The pass over the nodes that collects what the operators' rules state about axes.

A parameter used at several places has axes of its own at each: a small one (a bias that an exporter shared because the
values were equal) is pruned for each use apart, a matrix is tied where all of its uses allow that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from onnx import TensorProto

from onnxprune.axes.dead import Use
from onnxprune.axes.expr import (
    Atom,
    Barrier,
    Expr,
    Solution,
    equal,
    freeze,
    resolve,
)
from onnxprune.errors import UsageError
from onnxprune.model.graph import Graph, Node
from onnxprune.ops.registry import Operator
from onnxprune.ops.rules import MALFORMED, AxisContext, Contraction, GiveUp, Kind

__all__ = ["NO_PARAMETERS", "OUTPUT", "Walk", "parameter_of"]

SIZES = "sizes and positions"
OUTPUT = -1  # stands for the node index where a parameter is a graph output
TIED_FROM = 2  # rank from which a shared parameter is one tensor and not several equal ones
NO_PARAMETERS = frozenset({TensorProto.INT64, TensorProto.BOOL, TensorProto.STRING})


def parameter_of(graph: Graph, use: Use) -> str:
    """The parameter at a use; a negative input index is a tensor that a control-flow body captures."""
    n, i = use
    if n == OUTPUT:
        return graph.outputs[i]
    node = graph.nodes[n]
    return node.inputs[i] if i >= 0 else node.captured[-1 - i]


class Walk:
    """The pass that collects what the operators' rules state."""

    def __init__(self, graph: Graph, registry: Mapping[str, Operator]) -> None:
        self.graph = graph
        self.registry = registry
        self.axes: dict[str, tuple[Expr, ...]] = {}
        self.uses: dict[Use, tuple[Expr, ...]] = {}
        self.contractions: dict[int, list[Contraction]] = {}
        self.noted: dict[int, dict[str, Expr]] = {}
        self.arithmetic: set[int] = set()
        self.lost: dict[str, str] = {}
        self.read_outside = set(graph.outputs)
        self.read_outside |= {n for node in graph.nodes for n in node.captured}

    def run(self) -> None:
        graph = self.graph
        for name in graph.inputs:
            self.whole(name, Barrier("", "input", f"graph input '{name}'"))
        for node in graph.nodes:
            self.visit(node)
        for name in graph.outputs:
            barrier = Barrier("", "output", f"graph output '{name}'")
            if name in graph.sized:
                self.keep_sizes(name, barrier)
            for expr in self.axes.get(name, ()):
                freeze(expr, barrier)
            if name in graph.parameters:
                self.uses[OUTPUT, graph.outputs.index(name)] = self.kept_whole(name, barrier)

    def keep_sizes(self, name: str, barrier: Barrier) -> None:
        """What is computed from sizes leaves the graph: the tensors whose sizes those are stay whole."""
        pending, seen = [name], {name}
        while pending:
            producer = self.graph.producers.get(pending.pop())
            operator = self.registry.get(producer.op) if producer is not None else None
            for source in producer.inputs if producer is not None else ():
                if operator is not None and operator.from_shape is not None:
                    for expr in self.axes.get(source, ()):
                        freeze(expr, barrier)
                elif source in self.graph.sized and source not in seen:
                    seen.add(source)
                    pending.append(source)

    def whole(self, name: str, barrier: Barrier) -> None:
        """A tensor whose axes all stay."""
        shape = self.graph.shapes.get(name)
        if shape is not None:
            self.axes[name] = tuple(Atom(-1 if n is None else n, barrier) for n in shape)

    def kept_whole(self, parameter: str, barrier: Barrier) -> tuple[Expr, ...]:
        return tuple(Atom(n, barrier) for n in self.graph.parameters[parameter].shape)

    def visit(self, node: Node) -> None:
        graph = self.graph
        if node.outputs and node.outputs[0] in graph.parameters:
            for i, name in enumerate(node.inputs):
                self.uses[node.index, i] = self.kept_whole(name, Barrier(node.label, node.op, SIZES))
            return
        barrier = Barrier(node.label, node.op, "axes do not line up")
        operator = self.registry.get(node.op)
        if self.is_shape_arithmetic(node):
            self.arithmetic.add(node.index)
            for i, name in enumerate(node.inputs):
                parameter = graph.parameters.get(name)
                if parameter is not None and parameter.elem_type not in NO_PARAMETERS:
                    self.uses[node.index, i] = self.kept_whole(name, Barrier(node.label, node.op, SIZES))
            return  # its outputs get axes where a node asks for them
        inputs = [self.input_axes(node, i, name) for i, name in enumerate(node.inputs)]
        if operator is None or operator.axes is None or node.captured:
            why = "a control-flow body" if node.captured else f"{node.op} is not understood"
            barrier = Barrier(node.label, node.op, why)
            self.stop(node, inputs, barrier)
            return
        context = AxisContext(
            node,
            barrier,
            inputs,
            [graph.values.get(n) if n else None for n in node.inputs],
            [graph.shapes.get(n) for n in node.outputs],
            varying=[graph.varying.get(n) for n in node.inputs],
            lost=self.lost_since(node),
            shape_only=self.shape_only(node),
        )
        try:
            operator.axes(context)
        except GiveUp as reason:
            self.stop(node, inputs, Barrier(node.label, node.op, str(reason)))
            return
        except MALFORMED as error:
            self.stop(node, inputs, Barrier(node.label, node.op, f"an unusual form of {node.op} ({error})"))
            return
        self.accept(node, context)

    def input_axes(self, node: Node, i: int, name: str) -> tuple[Expr, ...] | None:
        """Axes of an input; a parameter gets fresh ones at each of its uses."""
        parameter = self.graph.parameters.get(name)
        if parameter is None:
            if name not in self.axes and name in self.graph.values:
                self.whole(name, Barrier(node.label, node.op, SIZES))
            return self.axes.get(name)
        fresh = tuple(Atom(n) for n in parameter.shape)
        self.uses[node.index, i] = fresh
        return fresh

    def lost_since(self, node: Node) -> str:
        """The first operator upstream whose output has no known shape."""
        for name in node.inputs:
            if name and name not in self.axes and name not in self.graph.parameters:
                producer = self.graph.producers.get(name)
                since = self.lost.get(name) or (f"{producer.op} {producer.label}" if producer is not None else name)
                self.lost.update(dict.fromkeys(node.outputs, since))
                return since
        return ""

    def shape_only(self, node: Node) -> bool:
        """True where nothing but the shapes of a node's outputs is read."""
        for name in node.outputs:
            if name in self.read_outside:
                return False
            for reader, _ in self.graph.consumers.get(name, ()):
                operator = self.registry.get(reader.op)
                if operator is None or operator.from_shape is None:
                    return False
        return True

    def is_shape_arithmetic(self, node: Node) -> bool:
        """Sizes and positions that come from sizes, all known: nothing in them is a channel."""
        values, types, sized = self.graph.values, self.graph.types, self.graph.sized
        return (
            any(n in sized for n in node.outputs)
            and all(n in values and types.get(n) in (6, 7, 9) and values[n].ndim < 2 for n in node.outputs if n)
            and all(values[n].ndim < 2 for n in node.inputs if n in values)
        )

    def stop(self, node: Node, inputs: Sequence[tuple[Expr, ...] | None], barrier: Barrier) -> None:
        """Freeze all that a node touches."""
        for axes in inputs:
            for expr in axes or ():
                freeze(expr, barrier)
        for name in node.captured:
            for expr in self.axes.get(name, ()):
                freeze(expr, barrier)
            if name in self.graph.parameters:
                self.uses[node.index, -1 - node.captured.index(name)] = self.kept_whole(name, barrier)
        for name in node.outputs:
            self.whole(name, barrier)

    def accept(self, node: Node, context: AxisContext) -> None:
        unused = Barrier(node.label, node.op, SIZES)
        for i, axes in enumerate(context.inputs):
            if i not in context.used:
                for expr in axes or ():
                    freeze(expr, unused)
        if context.contractions:
            self.contractions[node.index] = context.contractions
        if context.noted:
            self.noted[node.index] = context.noted
        for j, name in enumerate(node.outputs):
            if not name:
                continue
            found = context.outputs[j] if j < len(context.outputs) else None
            shape = self.graph.shapes.get(name)
            if found is None:
                self.stop(node, context.inputs, Barrier(node.label, node.op, "an output without a rule"))
                return
            found = tuple(resolve(e) for e in found)
            self.axes[name] = found
            if shape is not None and len(shape) != len(found):
                self.stop(node, context.inputs, Barrier(node.label, node.op, "its output has an unexpected rank"))
                return
            for expr, n in zip(found, shape or (), strict=False):
                if n is not None and expr.size >= 0 and expr.size != n:
                    freeze(expr, Barrier(node.label, node.op, f"a size of {n} where {expr.size} is expected"))

    def exclude(self, patterns: Sequence[str]) -> None:
        for pattern in patterns:
            try:
                matches = re.compile(pattern).search
            except re.error as error:
                raise UsageError(f"'{pattern}' is not a regular expression: {error}") from None
            hit = False
            for (n, i), axes in self.uses.items():
                if n == OUTPUT:
                    continue
                node, name = self.graph.nodes[n], parameter_of(self.graph, (n, i))
                if matches(name) or (node.proto.name and matches(node.proto.name)):
                    hit = True
                    for expr in axes:
                        freeze(expr, Barrier(node.label, node.op, f"excluded by '{pattern}'"))
            hit |= any(matches(n.proto.name) for n in self.graph.nodes if n.proto.name)
            if not hit:
                raise UsageError(
                    f"--exclude '{pattern}' matches no initializer and no node", "`onnxprune inspect` lists the names"
                )

    def tie(self) -> None:
        """One matrix at several uses stays one matrix: an axis that one of them must keep whole stays for all."""
        by_name: dict[str, list[Use]] = {}
        for n, i in self.uses:
            if i >= 0 and n != OUTPUT:
                by_name.setdefault(self.graph.nodes[n].inputs[i], []).append((n, i))
        for name, uses in by_name.items():
            if len(uses) > 1 and len(self.graph.parameters[name].shape) >= TIED_FROM:
                barrier = Barrier(name, "initializer", f"'{name}' is used in several places")
                for use in uses[1:]:
                    for a, b in zip(self.uses[uses[0]], self.uses[use], strict=True):
                        equal(a, b, barrier)

    def consuming(self, node: Node) -> list[Contraction]:
        """Contractions in which a parameter consumes what another tensor produces. Where all operands are parameters
        (a weight's norm), they produce."""
        static = self.graph.static
        return [
            c
            for c in self.contractions.get(node.index, ())
            if any(node.inputs[i] not in static for i, _ in c.operands) or c.kind is Kind.STATE
        ]

    def solve(self) -> Solution:
        """No equation is stated any more: put every axis into its canonical form."""
        solution = Solution()
        of = solution.of
        self.axes = {name: tuple(map(of, axes)) for name, axes in self.axes.items()}
        self.uses = {use: tuple(map(of, axes)) for use, axes in self.uses.items()}
        self.contractions = {n: [replace(c, over=of(c.over)) for c in found] for n, found in self.contractions.items()}
        return solution
