"""Single operators at given sizes, and how long onnxruntime takes for each.

Many operators are put side by side into one model and timed by onnxruntime's profiler, round after round. So the
conversions of layout at the rim of a small model are not counted, each runs with the caches that the others left, as it
would in a network, and a slow moment meets all of them alike.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from onnxprune.errors import ModelRejected
from onnxprune.latency.steps import kernel_times, token, tokens, typical
from onnxprune.model.graph import attribute_value
from onnxprune.model.payload import dtype_of, nbytes
from onnxprune.verify.inputs import Feed
from onnxprune.verify.latency import run_options

__all__ = ["Kernel", "Operand", "measure"]

ROUNDS = 8
MOST_KERNELS = 48  # in one model
MOST_BYTES = 96_000_000  # of tensors in one model, unless a single operator needs more
NOISE = 1 << 20


@dataclass(frozen=True)
class Operand:
    """An input. stored: it is an initializer. value: what it holds, where that decides sizes and is no mere weight."""

    elem_type: int
    shape: tuple[int, ...]
    stored: bool
    value: bytes | None = None

    def text(self) -> str:
        name = TensorProto.DataType.Name(self.elem_type).lower()
        held = f"={self.value.hex()}" if self.value is not None else ""
        return f"{'*' * self.stored}{name}{list(self.shape)}{held}".replace(" ", "")


@dataclass(frozen=True)
class Kernel:
    """One operator at one size. attributes: a serialised NodeProto that holds nothing else; outputs: element types, 0
    for one that is left out; opsets: (domain, version) of the model around it."""

    op_type: str
    domain: str
    attributes: bytes
    inputs: tuple[Operand | None, ...]
    outputs: tuple[int, ...]
    opsets: tuple[tuple[str, int], ...]
    ir_version: int

    @cached_property
    def key(self) -> str:
        """What the table knows it by: everything that its time depends on, readable."""
        version = dict(self.opsets).get(self.domain, dict(self.opsets).get("", 0))
        held = sorted(NodeProto.FromString(self.attributes).attribute, key=lambda a: a.name)
        attributes = ",".join(f"{a.name}={attribute_value(a)}" for a in held).replace(" ", "")
        operands = " ".join("-" if o is None else o.text() for o in self.inputs)
        name = f"{self.domain}::{self.op_type}" if self.domain else self.op_type
        return f"{name}-{version}({attributes}) {operands} > {len(self.outputs)}"

    @property
    def nbytes(self) -> int:
        return sum(nbytes(o.elem_type, o.shape) for o in self.inputs if o is not None)


def measure(kernels: Sequence[Kernel], *, threads: int, seconds: float) -> dict[str, float]:
    """Microseconds per key. Operators that onnxruntime does not run by themselves are left out, and so are those that
    `seconds` are too short for; the first ones come first."""
    found: dict[str, float] = {}
    end = time.perf_counter() + seconds
    for bundle in _bundles(kernels):
        if time.perf_counter() > end:
            break
        found |= _timed(bundle, threads)
    return found


def _bundles(kernels: Sequence[Kernel]) -> Iterator[list[Kernel]]:
    """Operators that go into one model: of the same operator sets, and not too many."""
    bundle: list[Kernel] = []
    size = 0
    for kernel in kernels:
        full = len(bundle) == MOST_KERNELS or size + kernel.nbytes > MOST_BYTES
        if bundle and (full or (kernel.opsets, kernel.ir_version) != (bundle[0].opsets, bundle[0].ir_version)):
            yield bundle
            bundle, size = [], 0
        bundle.append(kernel)
        size += kernel.nbytes
    if bundle:
        yield bundle


def _timed(bundle: list[Kernel], threads: int) -> dict[str, float]:
    """A bundle's times. Where it does not run, its halves are tried, so that one bad operator costs no other."""
    model, feed = _model(bundle)
    try:
        with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
            times = kernel_times(model, run_options(threads, "all"), feed, Path(folder), runs=ROUNDS)
    except ModelRejected:
        if len(bundle) == 1:
            return {}
        half = len(bundle) // 2
        return _timed(bundle[:half], threads) | _timed(bundle[half:], threads)
    found: dict[str, float] = {}
    for name, durations in times.items():
        for k in tokens(name)[:1]:
            found[bundle[k].key] = found.get(bundle[k].key, 0.0) + typical(durations)
    return {key: us for key, us in found.items() if us > 0}


def _model(bundle: Sequence[Kernel]) -> tuple[bytes, Feed]:
    """The operators side by side, and inputs for them; those that take data of the same form share it."""
    noise = np.random.default_rng(0).standard_normal(NOISE).astype(np.float32) * 0.1
    nodes, stored, outputs = [], [], []
    feed: Feed = {}
    declared: dict[str, onnx.ValueInfoProto] = {}
    for k, kernel in enumerate(bundle):
        names = []
        for i, operand in enumerate(kernel.inputs):
            if operand is None:
                names.append("")
                continue
            if operand.stored or operand.value is not None:
                name = f"{token(k)}w{i}"
                stored.append(numpy_helper.from_array(_values(operand, noise, k), name))
            else:
                name = f"x{operand.elem_type}_" + "x".join(map(str, operand.shape))
                name += f"_{i}" if name in names else ""  # a product of two inputs is none of one with itself
                if name not in feed:
                    feed[name] = _values(operand, noise, k)
                    declared[name] = helper.make_tensor_value_info(name, operand.elem_type, operand.shape)
            names.append(name)
        made = [f"{token(k)}y{j}" if elem else "" for j, elem in enumerate(kernel.outputs)]
        node = NodeProto.FromString(kernel.attributes)
        node.op_type, node.domain, node.name = kernel.op_type, kernel.domain, token(k)
        node.input.extend(names)
        node.output.extend(made)
        nodes.append(node)
        outputs += [
            helper.make_tensor_value_info(name, elem, None)
            for name, elem in zip(made, kernel.outputs, strict=True)
            if elem
        ]
    graph = helper.make_graph(nodes, "kernels", list(declared.values()), outputs, stored)
    opsets = [helper.make_opsetid(domain, version) for domain, version in bundle[0].opsets]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=bundle[0].ir_version)
    return model.SerializeToString(), feed


def _values(operand: Operand, noise: np.ndarray, k: int) -> np.ndarray:
    """Numbers of no meaning; small ones, so that nothing overflows."""
    dtype = dtype_of(operand.elem_type)
    if operand.value is not None:
        return np.frombuffer(operand.value, dtype).reshape(operand.shape)
    if dtype == np.bool_:
        return np.ones(operand.shape, dtype)
    size = prod(operand.shape)
    flat = np.resize(noise[k:], size)
    if dtype.kind in "iu":
        return np.abs(flat * 10).astype(dtype).reshape(operand.shape)
    return flat.astype(dtype).reshape(operand.shape)


def opsets_of(proto: onnx.ModelProto) -> tuple[tuple[str, int], ...]:
    """The operator sets that a model uses."""
    found: Mapping[str, int] = {o.domain: o.version for o in proto.opset_import}
    return tuple(sorted(found.items()))
