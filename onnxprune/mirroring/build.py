"""From a graph to a `torch.fx.GraphModule` that computes the same function.

Node by node, in the graph's order:
1. What is known without running the model and comes from no weight is a constant, and needs no node.
2. What is computed from sizes becomes arithmetic on integers (`mirroring.sizes`).
3. Everything else is recorded by its operator's mirror rule. Operators without one are collected and named together.
Weights are parameters under their initializer's name; other stored tensors are buffers, where something reads them.
"""

from __future__ import annotations

import keyword
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto
from torch import nn
from torch.fx import Graph as FxGraph
from torch.fx import GraphModule, Proxy
from torch.fx.proxy import GraphAppendingTracer

from onnxprune.errors import NotMirrored
from onnxprune.mirroring.bodies import Source, inner_graph
from onnxprune.mirroring.context import Context, Unsupported
from onnxprune.mirroring.quantised import INTEGERS, Quantised
from onnxprune.mirroring.sizes import Size, computed, unwrapped
from onnxprune.mirroring.targets import Targets, identifier
from onnxprune.model.graph import Graph, Node
from onnxprune.model.weights import statistics, weights
from onnxprune.ops.kernels import sizes as size_kernels
from onnxprune.ops.registry import Operator
from onnxprune.ops.rules import MALFORMED

__all__ = ["TORCH_TYPES", "Builder"]

TORCH_TYPES = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.INT8: torch.int8,
    TensorProto.INT16: torch.int16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.UINT8: torch.uint8,
    TensorProto.UINT16: torch.uint16,
    TensorProto.UINT32: torch.uint32,
    TensorProto.UINT64: torch.uint64,
    TensorProto.BOOL: torch.bool,
    TensorProto.COMPLEX64: torch.complex64,
    TensorProto.COMPLEX128: torch.complex128,
}
_HALVES = frozenset({TensorProto.FLOAT16, TensorProto.BFLOAT16})


class Builder:
    """One pass over the nodes of a graph, or of a control-flow body."""

    def __init__(
        self,
        graph: Graph,
        registry: Mapping[str, Operator],
        *,
        half: torch.dtype | None = None,
        constants: Collection[str] = (),
    ) -> None:
        """half: what to compute in where the model says float16 or bfloat16; None: what it says.
        constants: stored tensors of the graph that are no weights, whatever reads them."""
        self.graph = graph
        self.registry = registry
        self.half = half
        self.root = nn.Module()
        self.targets = Targets(self.root)
        self.fx = FxGraph()
        self.tracer = GraphAppendingTracer(self.fx)
        self.values: dict[str, Any] = {}  # a Proxy, or an array of objects for what is computed from sizes
        self.fetched: dict[str, Proxy] = {}
        self.constants = frozenset(constants)
        self.learnable = weights(graph, registry) - self.constants
        self.statistics = statistics(graph, registry)
        self.learned = self.learnable | set(self.statistics)  # and what is computed from them: it changes in training
        self.carried: dict[str, int] = {}  # tensors of integers that are carried as floats, and their type
        self.quantised: dict[str, Quantised] = {}  # target -> how a parameter's integers are stored
        self.parameters: dict[str, tuple[str, ...]] = {}  # target -> path of nodes and the stored tensor's name
        self.problems: list[tuple[Node, str]] = []
        self.at: Node | None = None

    # --- the pass

    def build(self) -> GraphModule:
        """Raises NotMirrored, naming every node that has no form in torch."""
        self.record()
        if self.problems:
            raise self.refusal()
        return self.finish()

    def record(self) -> None:
        taken: set[str] = {"self"}
        for name in self.graph.inputs:
            given = self.made(self.fx.placeholder(unused(identifier(name), taken)))
            given.node.meta["shape"] = self.graph.shapes.get(name)
            cast = self.half is not None and self.graph.types.get(name) in _HALVES
            self.values[name] = given.to(self.half) if cast else given
        self.visit_all()

    def visit_all(self) -> None:
        for node in self.graph.nodes:
            self.at = node
            self.visit(node)
        self.at = None

    def finish(self) -> GraphModule:
        outputs = [self.result(name).node for name in self.graph.outputs]
        self.fx.output(outputs[0] if len(outputs) == 1 else tuple(outputs))
        self.fx.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        module = GraphModule(self.root, self.fx, "Mirror")
        used = {n.target for n in self.fx.nodes if n.op in ("get_attr", "call_module")}
        module.meta["inputs"] = self.graph.inputs
        module.meta["outputs"] = self.graph.outputs
        module.meta["parameters"] = {
            t: path for t, path in self.parameters.items() if t in used or t.partition(".")[0] in used
        }
        module.meta["quantised"] = {t: q for t, q in self.quantised.items() if t in module.meta["parameters"]}
        return module

    def visit(self, node: Node) -> None:
        operator = self.registry.get(node.op)
        outputs = [n for n in node.outputs if n]
        if all(n in self.graph.parameters for n in outputs):
            return
        if not (operator is not None and operator.from_shape) and any(
            n in self.learned for n in (*node.inputs, *node.captured)
        ):
            self.learned.update(outputs)
        if all(self.constant(n) is not None for n in outputs):
            return
        if operator is not None and self.from_sizes(node, operator, outputs):
            return
        if operator is None or operator.mirror is None:
            self.give_up(node, "")
            return
        try:
            found = operator.mirror(Context(self, node))
        except Unsupported as reason:
            self.give_up(node, str(reason))
            return
        except MALFORMED as error:
            self.give_up(node, f"{type(error).__name__}: {error}")
            return
        self.bind(node, found)

    def bind(self, node: Node, found: Any) -> None:
        results = found if isinstance(found, (tuple, list)) else (found,)
        for name, result in zip(node.outputs, results, strict=False):
            if name and result is not None:
                self.values[name] = result
                if isinstance(result, Proxy):
                    result.node.meta.setdefault("onnx", node.label)
                    result.node.meta.setdefault("shape", self.graph.shapes.get(name))  # under the graph's pins
        operator = self.registry.get(node.op)
        if operator is not None and operator.carries:
            for kind in {self.carried[n] for n in node.inputs if n in self.carried}:
                first = self.graph.types.get(node.outputs[0], kind)
                kinds = (first, *(self.graph.types.get(n) for n in node.outputs[1:]))
                self.carried.update({n: kind for n, k in zip(node.outputs, kinds, strict=True) if n and k == kind})

    def give_up(self, node: Node, reason: str) -> None:
        self.problems.append((node, reason))
        for name in node.outputs:
            if name:  # so that the nodes behind it are looked at as well
                self.values[name] = self.call(_missing, name)

    def refusal(self) -> NotMirrored:
        shown = "; ".join(f"{n.op} '{n.label}'" + (f" ({why})" if why else "") for n, why in self.problems[:5])
        more = f"; and {len(self.problems) - 5} more" if len(self.problems) > 5 else ""
        error = NotMirrored(
            f"{len(self.problems)} nodes can't be trained in torch: {shown}{more}",
            "one-shot compression works without training: leave --data away; or register the operator's mirror rule",
        )
        error.operators = tuple(n.op for n, _ in self.problems)
        return error

    def from_sizes(self, node: Node, operator: Operator, outputs: Sequence[str]) -> bool:
        """Shape arithmetic; True where the outputs are arrays of sizes now."""
        if not outputs or not all(n in self.graph.values for n in outputs) or any(n in self.learned for n in outputs):
            return False
        if operator.from_shape is not None:
            tensor = self.values.get(node.inputs[0])
            shape = self.graph.shapes.get(node.inputs[0])
            if not isinstance(tensor, Proxy) or shape is None:
                return False
            sizes = [tensor.size(k) for k in range(len(shape))] if self.graph.varying else list(shape)
            return self.read_shape(node, operator, sizes)
        inputs = [self.elements(n) if n else None for n in node.inputs]
        if any(n and v is None for n, v in zip(node.inputs, inputs, strict=True)):
            return False
        found = computed(node, operator, self.graph, inputs)
        if found is None:
            return False
        self.values.update(zip(outputs, found, strict=True))
        return True

    def read_shape(self, node: Node, operator: Operator, sizes: list[Any]) -> bool:
        name = node.outputs[0]
        known, varying = self.graph.values[name], self.graph.varying.get(name)
        assert operator.from_shape is not None
        order = operator.from_shape(node, tuple(range(len(sizes))))  # which sizes it gives: Shape can take a part
        if known.ndim != 1 or varying is None:
            return False
        result = np.empty(known.shape, object)
        for k in range(known.size):
            result[k] = Size(sizes[int(order[k])]) if varying[k] else int(known[k])
        self.values[name] = result
        return True

    # --- what rules ask for

    def constant(self, name: str) -> np.ndarray | None:
        """The value of a tensor that is no weight, comes from none, and is the same for all inputs."""
        if name in self.learned or name in self.graph.varying or name in self.graph.resized or name in self.values:
            return None
        return self.graph.values.get(name)

    def elements(self, name: str) -> np.ndarray | None:
        """A tensor's elements as integers or proxies of integers, where they are known."""
        value = self.values.get(name)
        if isinstance(value, np.ndarray):
            return value
        found = self.constant(name)
        return found if found is not None and found.dtype.kind in "iub" else None

    def tensor(self, name: str) -> Proxy:
        value = self.values.get(name)
        if isinstance(value, Proxy):
            return value
        if name not in self.fetched:
            if isinstance(value, np.ndarray):
                dtype = self.dtype(name) or torch.int64
                self.fetched[name] = self.call(
                    size_kernels.to_tensor, unwrapped(value), list(value.shape), dtype, self.device()
                )
            elif name in self.graph.parameters:
                self.fetched[name] = self.stored(name)
            elif name in self.graph.values:
                self.fetched[name] = self.buffer(self.graph.values[name])
            else:
                raise Unsupported(f"nothing computes its input '{name}'")
        return self.fetched[name]

    def stored(self, name: str) -> Proxy:
        """A parameter or a buffer with the values of a stored tensor."""
        tensor = self.torch_tensor(self.graph.array(name), self.graph.parameters[name].elem_type)
        target = self.targets.choose(name)
        owner, leaf = self.targets.owner(target)
        if name in self.learnable:
            owner.register_parameter(leaf, nn.Parameter(tensor))
        else:
            owner.register_buffer(leaf, tensor)
        self.parameters[target] = (name,)
        return self.attribute(target)

    def value(self, name: str) -> np.ndarray | None:
        """As `constant`, for stored tensors of any size."""
        if name in self.graph.parameters and name not in self.learned:
            return self.graph.array(name)
        return self.constant(name)

    def weight(self, name: str, form: Quantised) -> Proxy | None:
        """A parameter with what a stored tensor of integers stands for; None where it is no weight."""
        stored = self.graph.parameters.get(name)
        if stored is None or stored.size < 2 or stored.elem_type not in INTEGERS or name in self.constants:
            return None
        key = f"{name} as reals"
        if key not in self.fetched:
            target = self.targets.choose(name)
            owner, leaf = self.targets.owner(target)
            reals = np.ascontiguousarray(form.reals(self.graph.array(name)), np.float32)
            owner.register_parameter(leaf, nn.Parameter(torch.from_numpy(reals)))
            self.parameters[target] = (name,)
            self.quantised[target] = form
            self.fetched[key] = self.attribute(target)
        return self.fetched[key] if form == self.quantised[str(self.fetched[key].node.target)] else None

    def whole(self, name: str) -> Proxy:
        """A tensor of integers as floats that hold whole numbers."""
        if name in self.carried:
            return self.tensor(name)
        key = f"{name} as floats"
        if key not in self.fetched:
            known = self.value(name)
            self.fetched[key] = self.tensor(name).float() if known is None else self.buffer(known.astype(np.float32))
        return self.fetched[key]

    def integers(self, name: str) -> Proxy:
        """A tensor in its declared type, where it is carried as floats."""
        dtype = self.torch_type(self.carried.get(name, 0))
        if dtype is None:
            return self.tensor(name)
        key = f"{name} as integers"
        if key not in self.fetched:
            self.fetched[key] = self.tensor(name).to(dtype)
        return self.fetched[key]

    def buffer(self, array: np.ndarray) -> Proxy:
        target = self.targets.choose("constant")
        owner, leaf = self.targets.owner(target)
        owner.register_buffer(leaf, self.torch_tensor(array, onnx.helper.np_dtype_to_tensor_dtype(array.dtype)), False)
        return self.attribute(target)

    def torch_tensor(self, array: np.ndarray, elem_type: int) -> torch.Tensor:
        dtype = self.torch_type(elem_type)
        if dtype is None:
            raise Unsupported(f"torch has no {TensorProto.DataType.Name(elem_type)}")
        if elem_type in _HALVES:
            return torch.from_numpy(array.astype(np.float32)).to(dtype)
        return torch.from_numpy(np.array(array, order="C")).to(dtype)

    def torch_type(self, elem_type: int) -> torch.dtype | None:
        if elem_type in _HALVES and self.half is not None:
            return self.half
        return TORCH_TYPES.get(elem_type)  # type: ignore[call-overload]

    def dtype(self, name: str) -> torch.dtype | None:
        return self.torch_type(self.graph.types.get(name, 0))

    def attribute(self, target: str) -> Proxy:
        return self.made(self.fx.create_node("get_attr", target, name=identifier(target)))

    def training(self) -> Proxy:
        if "training" not in self.fetched:
            self.fetched["training"] = self.made(self.fx.create_node("get_attr", "training"))
        return self.fetched["training"]

    def device(self) -> Any:
        """Where the first input lies, or else a weight."""
        if "device" not in self.fetched:
            tensors = (n for n in self.graph.inputs if n in self.graph.types)  # and not sequences
            source = next((v for n in tensors if isinstance(v := self.values.get(n), Proxy)), None)
            if source is None:
                source = self.buffer(np.zeros((), np.float32))
            self.fetched["device"] = self.call(getattr, source, "device")
        return self.fetched["device"]

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Proxy:
        return self.tracer.create_proxy("call_function", function, args, kwargs)

    def made(self, node: torch.fx.Node) -> Proxy:
        return Proxy(node, self.tracer)

    # --- control flow

    def module(self, node: Node, module: nn.Module, bodies: Mapping[str, GraphModule], args: Sequence[Any]) -> Proxy:
        """The call of a module that has these bodies, by the attributes that hold them."""
        target = self.targets.choose(identifier(node.label))
        self.root.add_module(target, module)
        for attribute, body in bodies.items():
            for inner, path in body.meta["parameters"].items():
                self.parameters[f"{target}.{attribute}.{inner}"] = (place(node), attribute, *path)
            self.quantised.update({f"{target}.{attribute}.{t}": q for t, q in body.meta["quantised"].items()})
        return self.tracer.create_proxy("call_module", target, tuple(args), {})

    def body(
        self, node: Node, attribute: str, sources: Sequence[Source | None] = (), *, carried: int = 0
    ) -> tuple[GraphModule, list[Proxy]]:
        """A body as a mirror of its own, and the outer tensors that follow its inputs: see `inner_graph`."""
        graph, wanted, constants = inner_graph(self, node.attributes[attribute], sources, carried=carried)
        inner = Builder(graph, self.registry, half=self.half, constants=constants)
        inner.record()
        self.problems += inner.problems
        return inner.finish(), [self.integers(n) for n in wanted]

    def inline(self, node: Node, attribute: str) -> list[Any]:
        """The outputs of a body that has no inputs of its own, recorded in place."""
        graph, wanted, constants = inner_graph(self, node.attributes[attribute])
        inner = Builder(graph, self.registry, half=self.half, constants=constants)
        inner.root, inner.targets, inner.fx, inner.tracer = self.root, self.targets, self.fx, self.tracer
        inner.values = {n: self.values[n] if n in self.values else self.tensor(n) for n in wanted}
        inner.fetched = {n: p for n, p in self.fetched.items() if n in ("training", "device")}
        inner.learned |= self.learned.intersection(wanted)
        inner.carried = {n: self.carried[n] for n in wanted if n in self.carried}
        inner.visit_all()
        self.problems += inner.problems
        self.parameters.update({t: (place(node), attribute, *path) for t, path in inner.parameters.items()})
        self.quantised.update(inner.quantised)
        pairs = zip(node.outputs, graph.outputs, strict=True)
        self.carried.update({outer: inner.carried[n] for outer, n in pairs if n in inner.carried})
        return [inner.values[n] if n in inner.values else inner.tensor(n) for n in graph.outputs]

    # --- the end

    def result(self, name: str) -> Proxy:
        """An output, in its declared type."""
        return self.integers(name)


def place(node: Node) -> str:
    """What tells a node from every other one: its first output."""
    return next(n for n in node.outputs if n)


def unused(name: str, taken: set[str]) -> str:
    """A name for an argument that no other one has."""
    name = f"{name}_" if keyword.iskeyword(name) else name
    found = next(c for k in count() if (c := f"{name}_{k}" if k else name) not in taken)
    taken.add(found)
    return found


def _missing(name: str) -> Any:
    raise RuntimeError(f"'{name}' has no form in torch")
