"""Control flow, sequences and optional values. A body is a mirror of its own, or recorded in place where it is known
that it runs."""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxprune.ops.lazy import kernels, torch
from onnxprune.ops.registry import Operator
from onnxprune.ops.rules import MirrorContext

__all__ = ["OPERATORS"]

_run = kernels("control")
_lists = kernels("sequences")
_detection = kernels("detection")


def results(m: MirrorContext, found: Any) -> list[Any]:
    return [found[j] for j in range(len(m.node.outputs))]


def if_mirror(m: MirrorContext) -> Any:
    """Where the condition is known, only that body."""
    condition = m.constant(0)
    if condition is not None:
        return m.inline("then_branch" if condition.all() else "else_branch")
    branches: dict[str, Any] = {}
    tensors: list[Any] = []
    wanted = []
    for name in ("then_branch", "else_branch"):
        branches[name], needed = m.body(name)
        wanted.append(range(len(tensors), len(tensors) + len(needed)))
        tensors += needed
    module = _run.If(branches["then_branch"], branches["else_branch"], tuple(wanted))
    return results(m, m.module(module, branches, m.tensor(0), *tensors))


def loop_mirror(m: MirrorContext) -> Any:
    """Inputs: the count, the condition, what is carried. Outputs: what is carried, and what is collected."""
    carried = range(2, len(m.node.inputs))
    sources = [None, None, *((i, None) for i in carried)]
    body, needed = m.body("body", sources, carried=len(carried))
    graph = m.attr("body")
    empty = [empty_part(m, info) for info in list(graph.output)[1 + len(carried) :]]
    module = _run.Loop(body, len(carried), steady=keeps_going(graph), empty=empty)
    count = m.ints(0)[0] if m.has(0) else None
    tensors = [m.tensor(i) for i in carried]
    return results(m, m.module(module, {"body": body}, count, m.optional(1), m.device, *tensors, *needed))


def keeps_going(graph: Any) -> bool:
    """The body hands its condition on, or always says yes."""
    name = graph.output[0].name
    makers = {n.output[0]: n for n in graph.node if n.output}
    while name in makers and makers[name].op_type == "Identity" and not makers[name].domain:
        name = makers[name].input[0]
    stored = [t for t in graph.initializer if t.name == name]
    if name in makers and makers[name].op_type == "Constant" and not makers[name].domain:
        stored = [a.t for a in makers[name].attribute if a.name == "value"]
    if stored:
        return stored[0].raw_data == b"\x01" or list(stored[0].int32_data) == [1]
    return name == graph.input[1].name


def empty_part(m: MirrorContext, info: Any) -> tuple[list[int], Any]:
    """Shape and type of what a body collects, as far as they are declared."""
    tensor = info.type.tensor_type
    return [d.dim_value for d in tensor.shape.dim], m.torch_type(tensor.elem_type) or torch.float32


def scan_mirror(m: MirrorContext) -> Any:
    scanned, first = int(m.attr("num_scan_inputs")), 1 if m.node.opset < 9 else 0
    states = len(m.node.inputs) - first - scanned
    collected = len(m.node.outputs) - states
    if first:
        directions, axes = m.attr("directions", [0] * scanned), [0] * (scanned + collected)
        backwards = [bool(d) for d in (*directions, *[0] * collected)]
    else:
        axes = [*m.attr("scan_input_axes", [0] * scanned), *m.attr("scan_output_axes", [0] * collected)]
        directions = m.attr("scan_input_directions", [0] * scanned), m.attr("scan_output_directions", [0] * collected)
        backwards = [bool(d) for side in directions for d in side]
    count = len(m.node.inputs)
    sources = [(i, None if i < first + states else axes[i - first - states]) for i in range(first, count)]
    body, needed = m.body("body", [None] * len(sources) if first else sources)
    module = (_run.BatchScan if first else _run.Scan)(body, states, scanned, axes, backwards)
    given = [m.optional(0)] if first else []
    given += [m.tensor(i) for i in range(first, count)]
    return results(m, m.module(module, {"body": body}, *given, *needed))


def map_mirror(m: MirrorContext) -> Any:
    """SequenceMap. An input that is no tensor is a sequence."""
    count = len(m.node.inputs)
    body, needed = m.body("body")
    module = _run.Map(body, [m.is_sequence(i) for i in range(count)])
    return results(m, m.module(module, {"body": body}, *(m.tensor(i) for i in range(count)), *needed))


def position(m: MirrorContext, i: int) -> Any:
    return m.ints(i)[0] if m.has(i) else None


def construct_mirror(m: MirrorContext) -> Any:
    return m.call(_lists.construct, *(m.tensor(i) for i in range(len(m.node.inputs))))


def split_to_sequence_mirror(m: MirrorContext) -> Any:
    sizes = m.ints(1) if m.has(1) else None
    scalar = m.has(1) and m.rank(1) == 0
    return m.call(_lists.split, m.tensor(0), sizes, scalar, int(m.attr("axis", 0)), bool(m.attr("keepdims", 1)))


def join_mirror(m: MirrorContext) -> Any:
    return m.call(_lists.join, m.tensor(0), int(m.attr("axis")), bool(m.attr("new_axis", 0)))


def optional_mirror(m: MirrorContext) -> Any:
    return m.tensor(0) if m.has(0) else m.call(_lists.nothing)


def has_element_mirror(m: MirrorContext) -> Any:
    return m.call(_lists.has_element, m.optional(0), m.device)


def non_max_suppression_mirror(m: MirrorContext) -> Any:
    most = m.ints(2)[0] if m.has(2) else 0
    overlap = scalar(m, 3, 0.0)
    least = scalar(m, 4, None)
    centred = bool(m.attr("center_point_box", 0))
    return m.call(_detection.non_max_suppression, m.tensor(0), m.tensor(1), most, overlap, least, centred)


def scalar(m: MirrorContext, i: int, default: float | None) -> Any:
    """A number, or a tensor of one element where it is computed from data."""
    if not m.has(i):
        return default
    known = m.constant(i)
    return m.tensor(i) if known is None else float(np.asarray(known).reshape(-1)[0])


OPERATORS = (
    Operator(
        "If",
        taken=lambda n, values: n.attributes["then_branch" if np.all(values[0]) else "else_branch"],
        mirror=if_mirror,
    ),
    Operator("Loop", mirror=loop_mirror),
    Operator("Scan", mirror=scan_mirror),
    Operator("SequenceMap", mirror=map_mirror),
    Operator("SequenceEmpty", mirror=lambda m: m.call(_lists.construct)),
    Operator("SequenceConstruct", mirror=construct_mirror),
    Operator("SequenceInsert", mirror=lambda m: m.call(_lists.insert, m.tensor(0), m.tensor(1), position(m, 2))),
    Operator("SequenceErase", mirror=lambda m: m.call(_lists.erase, m.tensor(0), position(m, 1))),
    Operator("SequenceAt", mirror=lambda m: m.tensor(0)[position(m, 1)]),
    Operator("SequenceLength", mirror=lambda m: m.call(_lists.length, m.tensor(0), m.device)),
    Operator("SplitToSequence", mirror=split_to_sequence_mirror),
    Operator("ConcatFromSequence", mirror=join_mirror),
    Operator("Optional", mirror=optional_mirror),
    Operator("OptionalHasElement", mirror=has_element_mirror),
    Operator("OptionalGetElement", mirror=lambda m: m.tensor(0)),
    Operator("NonMaxSuppression", discrete=True, mirror=non_max_suppression_mirror, fixed=frozenset({3, 4})),
)
