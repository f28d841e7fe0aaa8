"""What can be known of every tensor without running the model: its type, its shape, and small values.

Symbolic sizes are pinned to numbers, after which all shape arithmetic folds: whatever an exporter computes from
shapes (Reshape targets, Split sizes, attention scales) becomes a known value, and one export's computed shape equals
another's constant one. Shapes of single nodes come from onnx's own inference functions, node by node, so that no
weight is ever serialised; operators that onnx doesn't know bring a rule of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice

import numpy as np
import onnx
from onnx import TensorProto, TypeProto, defs, numpy_helper

from onnxprune.model.graph import Graph, Model, Node, Parameter, index_graph, index_nodes
from onnxprune.model.pins import pin_candidates
from onnxprune.ops.registry import Operator
from onnxprune.ops.rules import MALFORMED

__all__ = ["infer"]

_WHOLE_NUMBERS = {TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL, TensorProto.STRING}
VALUE_LIMIT = 4096  # elements; larger constants are data, not shape arithmetic
PIN_TRIES = 6

Shape = tuple[int | None, ...]


def infer(model: Model, registry: Mapping[str, Operator], pins: Mapping[str, int] | None = None) -> Graph:
    """Index the model and find out types, shapes and small values of its tensors.

    pins: sizes of symbolic dimensions by name, for those that the caller knows. The others are tried until shapes fit.
    """
    given = dict(pins or {})
    best: Graph | None = None
    for candidate in islice(pin_candidates(index_graph(model)), PIN_TRIES):
        graph = _run(model, registry, {**candidate, **given})
        if best is None or len(graph.problems) < len(best.problems):
            best = graph
        if not best.problems or not candidate:
            break
    assert best is not None
    if best.pins:
        best.varying, best.resized = _varying(best, registry)
    return best


def _run(model: Model, registry: Mapping[str, Operator], pins: Mapping[str, int]) -> Graph:
    graph = index_graph(model)
    graph.pins, graph.registry = pins, registry
    _Inference(graph, registry).run()
    return graph


def _varying(graph: Graph, registry: Mapping[str, Operator]) -> tuple[dict[str, np.ndarray], set[str]]:
    """Which elements of known values are other ones when every symbolic size is another one, and which values have
    another shape then.

    Where no other sizes fit the model, everything that is computed from an input's shape counts as varying.
    """
    for candidate in islice(pin_candidates(graph, batch=(7, 3)), 8):
        if any(candidate[k] == n for k, n in graph.pins.items() if k in candidate):
            continue
        other = _run(graph.model, registry, candidate)
        if len(other.problems) <= len(graph.problems):
            found = ((name, _differs(value, other.values.get(name))) for name, value in graph.values.items())
            shapes = {name: value.shape for name, value in other.values.items()}
            resized = {name for name, value in graph.values.items() if shapes.get(name) != value.shape}
            return {name: mask for name, mask in found if mask.any()}, resized
    computed = {n: v for n, v in graph.values.items() if n not in graph.static}
    return {n: np.ones(v.shape, bool) for n, v in computed.items()}, set(computed)


def _differs(a: np.ndarray, b: np.ndarray | None) -> np.ndarray:
    """Elements of `a` that are others in `b`. A tensor of one number throughout is the same whatever its shape."""
    if b is None or a.dtype != b.dtype:
        return np.ones(a.shape, bool)
    if a.shape != b.shape:
        same = a.size > 0 and b.size > 0 and bool(np.all(a == a.flat[0]) and np.all(b == a.flat[0]))
        return np.full(a.shape, not same)
    if a is b:
        return np.zeros(a.shape, bool)
    return np.asarray((a != b) & ~((a != a) & (b != b)))


class _Inference:
    """One pass over the nodes."""

    def __init__(self, graph: Graph, registry: Mapping[str, Operator]) -> None:
        self.graph = graph
        self.registry = registry
        self.proto_types: dict[str, bytes] = {}
        self.proto_values: dict[str, bytes] = {}
        self.imports = {o.domain: o.version for o in graph.model.proto.opset_import}
        self.imports.setdefault("", self.imports.get("ai.onnx", 1))
        self.schemas: dict[tuple[str, int], defs.OpSchema | None] = {}
        self.declared: dict[str, TypeProto] = {}
        self.inside = 0  # depth of control-flow bodies

    def run(self) -> None:
        proto = self.graph.model.proto.graph
        self.declared = {v.name: v.type for v in (*proto.value_info, *proto.output)}
        for parameter in list(self.graph.parameters.values()):
            self.know_parameter(parameter)
        for value in proto.input:
            if value.name in self.graph.inputs and value.type.HasField("tensor_type"):
                if value.type.tensor_type.HasField("shape"):
                    self.know(value.name, value.type.tensor_type.elem_type, self.pinned(value.type))
                else:
                    self.graph.types[value.name] = value.type.tensor_type.elem_type
        for node in self.graph.nodes:
            self.visit(node)

    def pinned(self, type_: TypeProto) -> Shape:
        """Sizes of a declared type, with symbols pinned."""
        pins = self.graph.pins
        dims: list[int | None] = []
        for d in type_.tensor_type.shape.dim:
            dims.append(d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else pins.get(d.dim_param))
        if any(d is None for d in dims):
            for name in self.graph.inputs:
                if self.input_type(name) is type_:
                    dims = [pins.get(f"{name}.{k}") if d is None else d for k, d in enumerate(dims)]
        return tuple(dims)

    def input_type(self, name: str) -> TypeProto | None:
        return next((v.type for v in self.graph.model.proto.graph.input if v.name == name), None)

    def know_parameter(self, parameter: Parameter) -> None:
        self.know(parameter.name, parameter.elem_type, parameter.shape)
        self.graph.static.add(parameter.name)
        if parameter.size > 1 and parameter.elem_type not in _WHOLE_NUMBERS:
            self.graph.weighted.add(parameter.name)
        if parameter.size <= VALUE_LIMIT and parameter.elem_type != TensorProto.STRING:
            self.know_value(parameter.name, self.graph.array(parameter.name))

    def know(self, name: str, elem_type: int, shape: Shape) -> None:
        self.graph.types[name] = elem_type
        self.graph.shapes[name] = shape

    def know_value(self, name: str, value: np.ndarray) -> None:
        self.graph.values[name] = value

    def visit(self, node: Node) -> None:
        graph = self.graph
        inputs = [n for n in node.inputs if n]
        if all(n in graph.static for n in inputs) and not node.captured:
            graph.static.update(n for n in node.outputs if n)
        operator = self.registry.get(node.op)
        if operator is not None and operator.stored is not None and self.stored(node, operator.stored):
            return
        if operator is not None and self.fold(node, operator):
            return
        if operator is not None and operator.taken is not None and self.take_body(node, operator):
            return
        if not self.by_schema(node) and operator is not None and operator.shape is not None:
            self.by_rule(node, operator)
        self.by_declaration(node)
        if operator is not None and operator.from_shape is not None:
            shape = graph.shapes.get(node.inputs[0])
            if shape is not None and None not in shape:
                self.know_value(node.outputs[0], operator.from_shape(node, shape))
                graph.sized.add(node.outputs[0])

    def stored(self, node: Node, rule: Callable[..., object]) -> bool:
        """A Constant node, or a ConstantOfShape of constant size, is a parameter like an initializer."""
        values = [self.graph.values.get(n) for n in node.inputs]
        if any(v is None for v in values) or not all(n in self.graph.parameters for n in node.inputs):
            return False
        found = rule(node, values)
        name = node.outputs[0]
        if self.inside:
            if isinstance(found, TensorProto) and found.data_location != TensorProto.EXTERNAL:
                array = numpy_helper.to_array(found)
                self.know(name, found.data_type, array.shape)
                self.know_value(name, array)
            return isinstance(found, TensorProto)
        if isinstance(found, TensorProto):
            parameter = Parameter(name, found.data_type, tuple(found.dims), found, node.proto)
        elif isinstance(found, tuple):
            fill, shape = found
            elem = onnx.helper.np_dtype_to_tensor_dtype(fill.dtype)
            parameter = Parameter(name, elem, shape, None, node.proto, fill)
        else:
            return False
        self.graph.parameters[name] = parameter
        self.know_parameter(parameter)
        return True

    def take_body(self, node: Node, operator: Operator) -> bool:
        """A control-flow node of which it is known what runs: what is known of the body is known of the node."""
        values = [self.graph.values.get(n) for n in node.inputs]
        if any(v is None for v in values) or operator.taken is None:
            return False
        body = operator.taken(node, values)
        self.inside += 1
        for tensor in body.initializer:
            self.know(tensor.name, tensor.data_type, tuple(tensor.dims))
            if tensor.data_location != TensorProto.EXTERNAL:
                self.know_value(tensor.name, numpy_helper.to_array(tensor))
        for inner in index_nodes(body.node, self.imports):
            self.visit(inner)
        self.inside -= 1
        for name, source in zip(node.outputs, (o.name for o in body.output), strict=True):
            if source in self.graph.shapes:
                self.know(name, self.graph.types.get(source, 0), self.graph.shapes[source])
            if source in self.graph.values:
                self.know_value(name, self.graph.values[source])
                self.graph.sized.add(name)
        return all(name in self.graph.shapes for name in node.outputs)

    def fold(self, node: Node, operator: Operator) -> bool:
        """Compute the outputs where all inputs are known and small."""
        if operator.evaluate is None or not node.outputs:
            return False
        values = []
        for name in node.inputs:
            value = self.graph.values.get(name) if name else None
            if name and value is None:
                return False
            values.append(value)
        if not values:
            return False
        try:
            with np.errstate(all="ignore"):
                results = operator.evaluate(node, *values)
        except MALFORMED:
            return False
        results = results if isinstance(results, tuple) else (results,)
        for name, result in zip(node.outputs, results, strict=False):
            result = np.asarray(result)
            try:
                elem = onnx.helper.np_dtype_to_tensor_dtype(result.dtype)
            except (KeyError, ValueError):
                return False
            self.know(name, elem, result.shape)
            if result.size <= VALUE_LIMIT:
                self.know_value(name, result)
                for known in (self.graph.sized, self.graph.weighted):
                    if any(n in known for n in node.inputs):
                        known.add(name)
        return True

    def schema(self, node: Node) -> defs.OpSchema | None:
        domain, _, name = node.op.rpartition("::")
        key = (node.op, node.opset)
        if key not in self.schemas:
            try:
                self.schemas[key] = defs.get_schema(name, node.opset, domain)
            except (defs.SchemaError, TypeError):  # TypeError: a name that is no text
                self.schemas[key] = None
        return self.schemas[key]

    def type_bytes(self, name: str) -> bytes:
        if name not in self.proto_types:
            shape = self.graph.shapes.get(name)
            elem = self.graph.types.get(name, 0)
            made = TypeProto()
            made.tensor_type.elem_type = elem
            if shape is not None:
                made.tensor_type.shape.SetInParent()
                for size in shape:
                    dim = made.tensor_type.shape.dim.add()
                    if size is not None:
                        dim.dim_value = size
            self.proto_types[name] = made.SerializeToString()
        return self.proto_types[name]

    def value_bytes(self, name: str) -> bytes | None:
        if name not in self.proto_values:
            value = self.graph.values.get(name)
            if value is None or value.dtype.kind not in "iufb":
                return None
            self.proto_values[name] = numpy_helper.from_array(np.asarray(value, order="C")).SerializeToString()
        return self.proto_values[name]

    def by_schema(self, node: Node) -> bool:
        """onnx's own inference function for this node; False where it has none or finds nothing."""
        schema = self.schema(node)
        if schema is None:
            return False
        names = [n for n in (*node.inputs, *node.captured) if n]
        types = {n: self.type_bytes(n) for n in names if self.graph.types.get(n) or n in self.proto_types}
        if len(types) < len(set(node.inputs) - {""}):
            return False
        data = {}
        for name in node.inputs:
            value = self.value_bytes(name) if name and name in self.graph.values else None
            if value is not None:
                data[name] = value
        found, problem = self.ask(schema, node, types, data)
        if problem and "unsupported type" in problem:
            found, _ = self.ask_untyped(node, types, data)
            problem = "" if found else problem
        if problem:
            self.graph.problems.append(f"{node.op} {node.label}: {problem}")
            return False
        known = False
        for name, blob in found.items():
            known |= self.learn(name, TypeProto.FromString(blob))
        return known

    def ask(
        self, schema: defs.OpSchema, node: Node, types: dict[str, bytes], data: dict[str, bytes]
    ) -> tuple[dict[str, bytes], str]:
        try:
            found = schema._infer_node_outputs(  # type: ignore[call-arg]
                node.proto.SerializeToString(), types, data, {}, self.imports, self.graph.model.proto.ir_version
            )
            return found, ""
        except Exception as error:  # onnx raises several types, some of them its own
            return {}, str(error).splitlines()[0][:200]

    def ask_untyped(self, node: Node, types: dict[str, bytes], data: dict[str, bytes]) -> tuple[dict[str, bytes], str]:
        """A type that this version of the operator does not allow, but onnxruntime may: infer the shape as if of
        floats, and keep the type."""
        schema = self.schema(node)
        assert schema is not None
        as_floats = {}
        for name, blob in types.items():
            type_ = TypeProto.FromString(blob)
            type_.tensor_type.elem_type = TensorProto.FLOAT
            as_floats[name] = type_.SerializeToString()
        for version in (schema, defs.get_schema(schema.name, schema.domain)):
            for form in (types, as_floats):
                found, problem = self.ask(version, node, form, data)
                if found and not problem:
                    if form is as_floats:
                        found = {n: self.retyped(b, types[node.inputs[0]]) for n, b in found.items()}
                    return found, ""
        return {}, "unsupported type"

    @staticmethod
    def retyped(blob: bytes, like: bytes) -> bytes:
        type_ = TypeProto.FromString(blob)
        type_.tensor_type.elem_type = TypeProto.FromString(like).tensor_type.elem_type
        return type_.SerializeToString()

    def learn(self, name: str, found: TypeProto) -> bool:
        if found.HasField("sequence_type"):  # no tensor, but what is taken out of it has a shape again
            self.proto_types[name] = found.SerializeToString()
        if not found.HasField("tensor_type"):
            return False
        tensor = found.tensor_type
        self.graph.types[name] = tensor.elem_type
        if not tensor.HasField("shape"):
            return False
        self.graph.shapes[name] = tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
        return True

    def by_rule(self, node: Node, operator: Operator) -> None:
        inputs = [
            (self.graph.types.get(n, 1), self.graph.shapes[n]) if n in self.graph.shapes else None for n in node.inputs
        ]
        assert operator.shape is not None
        try:
            results = operator.shape(node, inputs)
        except MALFORMED:
            return
        for name, result in zip(node.outputs, results, strict=False):
            if name and result is not None:
                self.know(name, *result)

    def by_declaration(self, node: Node) -> None:
        """Fill in what inference left open from the value_info that the exporter wrote."""
        for name in node.outputs:
            declared = self.declared.get(name)
            shape = self.graph.shapes.get(name)
            if declared is None or (shape is not None and None not in shape):
                continue
            if not declared.HasField("tensor_type"):
                continue
            self.graph.types.setdefault(name, declared.tensor_type.elem_type)
            if not declared.tensor_type.HasField("shape"):
                continue
            stated = self.pinned(declared)
            if shape is None:
                self.graph.shapes[name] = stated
            elif len(shape) == len(stated):
                self.graph.shapes[name] = tuple(b if a is None else a for a, b in zip(shape, stated, strict=True))
