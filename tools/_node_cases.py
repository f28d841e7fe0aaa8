"""The ONNX project's own node tests, run through the mirror: models of one operator with recorded inputs and outputs.

They are built in memory by the onnx package. A case is comparable where all its tensors are floats, integers of 8 bits
and more, or bools; a `stored` case is the same model with its integer and bool inputs as initializers, which is how
exporters write axes, sizes and indices. tools/mirror_node_tests.py prints the table, tests/mirroring/test_node_cases.py
holds the mirror to it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import cache
from io import StringIO
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, numpy_helper
from onnx.backend.test.runner import Runner

from onnxprune.errors import ModelRejected, NotMirrored
from onnxprune.mirroring import mirror

__all__ = ["FAILED", "NOT_MIRRORED", "PASSED", "Case", "Outcome", "cases", "run", "stored", "to_numpy", "to_torch"]

PASSED, FAILED, NOT_MIRRORED = "passed", "failed", "not mirrored"

_NUMBERS = (
    "FLOAT",
    "DOUBLE",
    "FLOAT16",
    "BFLOAT16",
    "INT8",
    "INT16",
    "INT32",
    "INT64",
    "UINT8",
    "UINT16",
    "UINT32",
    "UINT64",
    "BOOL",
)
TYPES = frozenset(TensorProto.DataType.Value(name) for name in _NUMBERS)
RANDOM = re.compile(r"test_(bernoulli|training_dropout(?!_zero_ratio))")  # one draw: types and shapes are compared


@dataclass(frozen=True)
class Case:
    """A model, its recorded inputs and outputs, and the operator that it is about."""

    name: str
    operator: str
    model: onnx.ModelProto
    inputs: tuple[np.ndarray, ...]
    outputs: tuple[np.ndarray, ...]
    rtol: float
    atol: float


@dataclass(frozen=True)
class Outcome:
    """What became of a case, and why."""

    status: str
    reason: str = ""


def comparable(model: onnx.ModelProto) -> bool:
    """Of the default domain, with tensors of ordinary numbers and nothing else."""
    values = (*model.graph.input, *model.graph.output)
    return all(n.domain in ("", "ai.onnx") for n in model.graph.node) and all(
        v.type.HasField("tensor_type") and v.type.tensor_type.elem_type in TYPES for v in values
    )


@cache
def cases() -> dict[str, Case]:
    """The comparable cases by name; of operators that are functions, also their expansions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.loader import load_model_tests

        found = load_model_tests(kind="node")
    made: dict[str, Case] = {}
    for case in found:
        if case.model is None or not case.data_sets or not comparable(case.model):
            continue
        inputs, outputs = (tuple(array(x) for x in xs) for xs in case.data_sets[0])
        operator = case.model.graph.node[0].op_type
        base = case.name.partition("_expanded")[0]
        operator = made[base].operator if base in made else operator
        made[case.name] = Case(case.name, operator, case.model, inputs, outputs, case.rtol, case.atol)
    return made


def array(value: Any) -> np.ndarray:
    """A recorded tensor as an array."""
    return numpy_helper.to_array(value) if isinstance(value, TensorProto) else np.asarray(value)


def stored(case: Case) -> Case | None:
    """The case with integer and bool inputs as initializers; None where that changes nothing or leaves no input."""
    named = list(zip(case.model.graph.input, case.inputs, strict=False))
    whole = {info.name for info, x in named if x.dtype.kind in "iub"}
    if not whole or len(whole) == len(named) or len(named) != len(case.model.graph.input):
        return None
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    model.graph.ClearField("input")
    model.graph.input.extend(info for info, _ in named if info.name not in whole)
    model.graph.initializer.extend(numpy_helper.from_array(x, info.name) for info, x in named if info.name in whole)
    inputs = tuple(x for info, x in named if info.name not in whole)
    return Case(f"{case.name}_stored", case.operator, model, inputs, case.outputs, case.rtol, case.atol)


def to_torch(x: np.ndarray) -> torch.Tensor:
    """A tensor of its own with the array's values."""
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(np.array(x, order="C").view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(x, order="C"))


def to_numpy(x: torch.Tensor) -> np.ndarray:
    """The tensor's values as an array of the same type."""
    x = x.detach().cpu()
    if x.dtype == torch.bfloat16:
        bits = x.contiguous().view(torch.int16).numpy()
        return bits.view(onnx.helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16))
    return x.numpy()


def run(case: Case) -> Outcome:
    """Mirror the model, run it, and compare as ONNX's own runner does."""
    try:
        module = mirror(case.model)
    except NotMirrored as error:
        return Outcome(NOT_MIRRORED, "; ".join(refused(str(error))))
    except ModelRejected as error:
        return Outcome(NOT_MIRRORED, f"rejected: {error}".splitlines()[0])
    except Exception as error:
        return Outcome(FAILED, f"while mirroring: {short(error)}")
    try:
        # a GraphModule prints its code where an error passes through it
        with warnings.catch_warnings(), torch.no_grad(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            found = module(*(to_torch(x) for x in case.inputs))
    except Exception as error:
        return Outcome(FAILED, short(error))
    results = [to_numpy(y) for y in (found if isinstance(found, (tuple, list)) else (found,))]
    problem = difference(case, results)
    return Outcome(FAILED, problem) if problem else Outcome(PASSED)


def refused(message: str) -> Iterator[str]:
    """Operators, with reasons, that the message of a NotMirrored names."""
    for op, why in sorted(set(re.findall(r"([\w.:]+) '[^']*'(?: \((.*?)\)(?=;|$))?", message))):
        yield f"{op}: {why}" if why else str(op)


def difference(case: Case, results: Sequence[np.ndarray]) -> str:
    """How the results differ from the recorded outputs; an empty string where they don't."""
    wanted = case.outputs
    if RANDOM.match(case.name):
        kinds = [[(y.dtype.name, y.shape) for y in ys] for ys in (results, wanted)]
        return "" if kinds[0] == kinds[1] else f"types and shapes {kinds[0]}, not {kinds[1]}"
    try:
        Runner.assert_similar_outputs(wanted, results, case.rtol, case.atol)
    except AssertionError as error:
        return short(error)
    return ""


def short(error: BaseException) -> str:
    """The first lines of what an exception says, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
