"""From a path or a ModelProto to a checked, indexed graph.

Rules:
1. The input is never touched, and its weights are never copied: they are mapped, or referenced where they stand.
2. Model-local functions are inlined, weights that are computed from statistics of weights are stored.
3. What is not a valid model is refused with ModelRejected, which says what was expected and what was found.
4. External data must lie in the model's folder or below it, and be as long as the model says.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import AttributeProto, TensorProto

from onnxprune.errors import ModelRejected
from onnxprune.model.fold import with_statistics_folded
from onnxprune.model.graph import Graph, Model, subgraphs
from onnxprune.model.infer import infer
from onnxprune.model.payload import Computed, Mapped, MappedFile, nbytes
from onnxprune.model.wire import INLINE_LIMIT, Malformed, skeleton
from onnxprune.ops import OPERATORS
from onnxprune.ops.registry import Operator

__all__ = ["load", "open_model", "stored_tensors", "understood"]

OLDEST_OPSET = 7
_ELEMENTS = set(TensorProto.DataType.values()) - {TensorProto.UNDEFINED}


def load(
    model: str | os.PathLike[str] | onnx.ModelProto,
    *,
    registry: Mapping[str, Operator] = OPERATORS,
    pins: Mapping[str, int] | None = None,
) -> Graph:
    """Open a model and find out the shapes of its tensors.

    pins: sizes of symbolic dimensions by name, where the caller wants particular ones.
    Raises ModelRejected.
    """
    return understood(open_model(model), registry, pins)


def understood(model: Model, registry: Mapping[str, Operator], pins: Mapping[str, int] | None = None) -> Graph:
    """An opened model with the shapes of its tensors; weights that depend on statistics of weights are folded."""
    graph = infer(model, registry, pins)
    folded = with_statistics_folded(graph, registry)
    return graph if folded is None else infer(folded, registry, pins)


def open_model(model: str | os.PathLike[str] | onnx.ModelProto) -> Model:
    """The skeleton of a model and its payloads. Raises ModelRejected."""
    opened = _from_proto(model) if isinstance(model, onnx.ModelProto) else _from_file(Path(model))
    _check(opened)
    if opened.proto.functions:
        opened.proto = _inlined(opened.proto)
    return opened


def _from_file(path: Path) -> Model:
    if path.is_dir():
        raise ModelRejected(f"{path} is a folder, not an ONNX file")
    try:
        size = path.stat().st_size
        if size == 0:
            raise ModelRejected(f"{path} is empty", "was the export interrupted?")
        file = MappedFile(path)
    except FileNotFoundError:
        raise ModelRejected(f"{path} does not exist", "check the path") from None
    except OSError as error:
        raise ModelRejected(f"{path} can't be read: {error.strerror}") from None
    hint = "is it an ONNX file, and was it copied completely?"
    try:
        with memoryview(file.map) as view:
            data, payloads = skeleton(view)
        proto = onnx.ModelProto.FromString(data)
    except (Malformed, DecodeError) as error:
        reason = str(error) if isinstance(error, Malformed) else "it does not parse as a protobuf ModelProto"
        raise ModelRejected(f"{path} is not an ONNX model: {reason}", hint) from None
    if not proto.HasField("graph") or not proto.opset_import:
        raise ModelRejected(f"{path} is not an ONNX model: it has no graph or no opset", hint)
    model = Model(proto, source=str(path), nbytes=size)
    own = {f"\x00payload/{k}": Mapped(file, at, length) for k, (at, length) in enumerate(payloads)}
    model.payloads.update(own)
    _map_external(model, path.parent)
    return model


def _map_external(model: Model, folder: Path) -> None:
    """Map tensors that lie in other files."""
    files: dict[str, MappedFile] = {}
    for tensor in stored_tensors(model.proto.graph):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        entries = {e.key: e.value for e in tensor.external_data}
        location = entries.get("location", "")
        if location in model.payloads:
            continue
        if tensor.data_type not in _ELEMENTS:
            raise ModelRejected(f"tensor '{tensor.name}' has an unknown type ({tensor.data_type})")
        expected = nbytes(tensor.data_type, tuple(tensor.dims))
        if location not in files:
            files[location] = _external_file(folder, location)
            model.nbytes += len(files[location].map)
        try:
            offset, length = int(entries.get("offset", 0)), int(entries.get("length", expected))
        except ValueError:
            raise ModelRejected(f"tensor '{tensor.name}' has an offset or a length that is no number") from None
        if length != expected or offset < 0 or offset + length > len(files[location].map):
            raise ModelRejected(
                f"tensor '{tensor.name}' wants {expected} bytes at {offset} of '{location}', "
                f"which holds {len(files[location].map)}",
                "was the external data copied completely?",
            )
        model.attach(tensor, Mapped(files[location], offset, length))


def _external_file(folder: Path, location: str) -> MappedFile:
    root = folder.resolve()
    path = (root / location).resolve()
    if not location or not path.is_relative_to(root):
        raise ModelRejected(
            f"external data '{location}' points outside the model's folder",
            "move the data beside the model and save it with a relative location",
        )
    try:
        return MappedFile(path)
    except FileNotFoundError:
        raise ModelRejected(f"external data '{location}' is missing beside the model", f"copy it to {folder}") from None
    except (OSError, ValueError) as error:
        raise ModelRejected(f"external data '{location}' can't be read: {error}") from None


def _from_proto(source: onnx.ModelProto) -> Model:
    """A skeleton of a model in memory; its large tensors are referenced, not copied."""
    proto = onnx.ModelProto()
    for field, value in source.ListFields():
        if field.name != "graph":
            _copy_field(proto, field, value)
    model = Model(proto, source="")
    _copy_graph(source.graph, proto.graph, model)
    model.nbytes = len(proto.SerializeToString()) + sum(
        nbytes(t.data_type, tuple(t.dims))
        for t in stored_tensors(proto.graph)
        if t.data_location == TensorProto.EXTERNAL
    )
    return model


def _copy_field(target: onnx.ModelProto | onnx.GraphProto, field: object, value: object) -> None:
    name = field.name  # type: ignore[attr-defined]
    current = getattr(target, name)
    if hasattr(current, "extend"):
        current.extend(value)
    elif hasattr(current, "CopyFrom"):
        current.CopyFrom(value)
    else:
        setattr(target, name, value)


def _copy_graph(source: onnx.GraphProto, target: onnx.GraphProto, model: Model) -> None:
    for field, value in source.ListFields():
        if field.name == "initializer":
            for tensor in value:
                _reference(tensor, target.initializer.add(), model)
        elif field.name == "node":
            for node in value:
                copy = target.node.add()
                if any(a.type == AttributeProto.TENSOR and len(a.t.raw_data) > INLINE_LIMIT for a in node.attribute):
                    _copy_node(node, copy, model)
                else:
                    copy.CopyFrom(node)
        else:
            _copy_field(target, field, value)


def _copy_node(source: onnx.NodeProto, target: onnx.NodeProto, model: Model) -> None:
    for field, value in source.ListFields():
        if field.name != "attribute":
            _copy_field(target, field, value)
    for attribute in source.attribute:
        if attribute.type == AttributeProto.TENSOR:
            copy = target.attribute.add(name=attribute.name, type=attribute.type)
            _reference(attribute.t, copy.t, model)
        else:
            target.attribute.add().CopyFrom(attribute)


def _reference(source: TensorProto, target: TensorProto, model: Model) -> None:
    if source.data_location == TensorProto.EXTERNAL:
        raise ModelRejected(
            f"tensor '{source.name}' lies in an external file that a ModelProto does not carry",
            "give the model's path, or load its external data first",
        )
    if len(source.raw_data) <= INLINE_LIMIT:
        target.CopyFrom(source)
        return
    target.name, target.data_type = source.name, source.data_type
    target.dims.extend(source.dims)
    if source.doc_string:
        target.doc_string = source.doc_string
    target.metadata_props.extend(source.metadata_props)
    model.attach(target, Computed(lambda: onnx.numpy_helper.to_array(source)))


def stored_tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    """Every tensor that a graph or one of its bodies stores: initializers and Constant nodes."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                yield attribute.t
        for body in subgraphs(node):
            yield from stored_tensors(body)


def _inlined(proto: onnx.ModelProto) -> onnx.ModelProto:
    from onnx.inliner import inline_local_functions

    return inline_local_functions(proto)


def _check(model: Model) -> None:
    proto = model.proto
    versions = {o.domain: o.version for o in proto.opset_import}
    version = versions.get("", versions.get("ai.onnx"))
    if version is not None and version < OLDEST_OPSET:
        raise ModelRejected(
            f"opset {version} is older than {OLDEST_OPSET}", "convert it with onnx.version_converter first"
        )
    names: set[str] = set()
    for tensor in stored_tensors(proto.graph):
        if tensor.data_type not in _ELEMENTS or any(d < 0 for d in tensor.dims):
            raise ModelRejected(f"tensor '{tensor.name}' has an unknown type ({tensor.data_type}) or a negative size")
    for tensor in proto.graph.initializer:
        if tensor.name in names:
            raise ModelRejected(f"two initializers are called '{tensor.name}'")
        names.add(tensor.name)
    known = names | {i.name for i in proto.graph.input}
    for node in proto.graph.node:
        if any(isinstance(n, bytes) for n in (node.op_type, node.domain, node.name, *node.input, *node.output)):
            raise ModelRejected("a node has a name that is no text", "was the file copied completely?")
        for name in filter(None, node.output):
            if name in known:
                raise ModelRejected(f"'{name}' is made twice, the second time by node '{node.name or node.op_type}'")
            known.add(name)
    for node in proto.graph.node:
        for name in node.input:
            if name and name not in known:
                raise ModelRejected(f"node '{node.name or node.op_type}' reads '{name}', which nothing makes")
    for value in proto.graph.output:
        if value.name not in known:
            raise ModelRejected(f"output '{value.name}' is made by no node")
