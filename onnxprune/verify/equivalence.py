"""The proof: the pruned model equals the masked original, in onnxruntime, on inputs of several sizes."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from onnxprune.axes.analysis import Analysis
from onnxprune.errors import ModelRejected, VerificationFailed
from onnxprune.model.graph import Model
from onnxprune.model.infer import symbolic_inputs
from onnxprune.model.save import write
from onnxprune.result import Verification
from onnxprune.select.plan import Plan
from onnxprune.verify.inputs import Feed, draw, size_candidates
from onnxprune.verify.reference import masked

__all__ = ["TOLERANCES", "check", "prove", "session", "tolerance"]

SETS = 3
TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 4e-2, "int8": 5e-2}
_QUANTISED = ("QuantizeLinear", "QLinear", "DynamicQuantize", "ConvInteger", "MatMulInteger", "MatMulNBits", "QGemm")


def tolerance(model: Model) -> float:
    """Largest error, relative to the largest output, that rounding explains, by the model's number formats."""
    types = {t.data_type for t in model.proto.graph.initializer}
    types |= {i.type.tensor_type.elem_type for i in model.proto.graph.input}
    if any(q in n.op_type for n in model.proto.graph.node for q in _QUANTISED):
        return TOLERANCES["int8"]
    if TensorProto.BFLOAT16 in types:
        return TOLERANCES["bfloat16"]
    return TOLERANCES["float16" if TensorProto.FLOAT16 in types else "float32"]


def session(path: Path | str, *, threads: int = 0, optimise: bool = False):  # type: ignore[no-untyped-def]
    """An onnxruntime session on the CPU. Raises ModelRejected with onnxruntime's reason."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = False
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises types of its own
        reason = str(error).splitlines()[0].split(" failed:", 1)[-1]
        raise ModelRejected(f"onnxruntime can't load the model: {reason[:300]}",
                            "`onnxprune inspect` works all the same") from None


def prove(
    analysis: Analysis, plan: Plan, pruned: Path, *, seed: int = 0,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> Verification:
    """Run both models on at least three input sets that cover every dynamic dimension at two sizes.

    Raises VerificationFailed where they differ or the pruned model is invalid, ModelRejected where onnxruntime can't
    run the original.
    """
    check(pruned)
    with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
        path = Path(folder) / "masked.onnx"
        reference = masked(analysis, plan)
        limit = tolerance(reference)
        write(reference, path)
        del reference
        feeds, wanted = _reference_runs(analysis, path, seed, shapes)
    try:
        runner = session(pruned)
    except ModelRejected as error:
        raise VerificationFailed(f"the pruned model does not load: {error}") from None
    absolute = relative = 0.0
    for feed, expected in zip(feeds, wanted, strict=True):
        try:
            found = runner.run(None, feed)
        except Exception as error:
            raise VerificationFailed(f"the pruned model does not run: {str(error).splitlines()[0][:300]}") from None
        for a, b in zip(expected, found, strict=True):
            worst, scaled = difference(a, b)
            absolute, relative = max(absolute, worst), max(relative, scaled)
    shown = tuple({k: v.shape for k, v in f.items()} for f in feeds)
    result = Verification(relative <= limit, absolute, relative, limit, len(feeds), shown)
    if not result.passed:
        raise VerificationFailed(
            f"the pruned model differs from the masked original: relative error {relative:.2e}, tolerance {limit:.0e}",
            "this is a bug of onnxprune: please report the model's graph")
    return result


def check(path: Path) -> None:
    """onnx's full check, with custom domains and operators newer or older than onnx left to onnxruntime."""
    try:
        onnx.checker.check_model(str(path), full_check=False)
    except onnx.checker.ValidationError as error:
        text = str(error)
        if "No Op registered" in text or "No opset import" in text or "unsupported" in text.lower():
            return
        raise VerificationFailed(f"the pruned model is invalid: {text.splitlines()[0][:300]}") from None


def _reference_runs(
    analysis: Analysis, path: Path, seed: int, shapes: Mapping[str, Sequence[int]] | None
) -> tuple[list[Feed], list[list[np.ndarray]]]:
    """Inputs that the original accepts, and what the masked original makes of them."""
    graph = analysis.graph
    runner = session(path)
    rng = np.random.default_rng(seed)
    feeds: list[Feed] = []
    outputs: list[list[np.ndarray]] = []
    reason = ""
    dynamic = any(isinstance(d, str) for dims in symbolic_inputs(graph).values() for d in dims)
    sizes: list[Mapping[str, int]] = []

    def attempt(pins: Mapping[str, int]) -> bool:
        nonlocal reason
        feed = draw(graph, pins, rng, shapes)
        try:
            outputs.append(runner.run(None, feed))
        except Exception as error:
            reason = str(error).splitlines()[0][:300]
            return False
        feeds.append(feed)
        sizes.append(pins)
        return True

    for pins in islice(size_candidates(graph, shapes, batch=(2, 1)), 14):
        if attempt(pins):
            break
    if not feeds:
        raise ModelRejected(f"onnxruntime can't run the model on inputs that onnxprune makes up: {reason}",
                            "name sizes that it accepts with --input-shapes")
    if dynamic:
        for pins in _other_sizes(graph, sizes[0], shapes):
            if len(feeds) >= SETS + 1 or attempt(pins) and _covered(sizes):
                break
    while len(feeds) < SETS:
        if not attempt(sizes[0]):
            break
    return feeds, outputs


def _covered(sizes: Sequence[Mapping[str, int]]) -> bool:
    """Every dynamic dimension has been tried at two sizes."""
    return all(len({s[name] for s in sizes}) > 1 for name in sizes[0])


def _other_sizes(graph, first: Mapping[str, int], shapes):  # type: ignore[no-untyped-def]
    """All dimensions changed at once, then one at a time."""
    for pins in islice(size_candidates(graph, shapes, batch=(3, 1)), 20):
        if all(pins[k] != first[k] for k in pins):
            yield pins
    for change in (1, 2, 8, -1, 32, 64):
        for name in first:
            if first[name] + change > 0:
                yield {**first, name: first[name] + change}


SMALLEST_SCALE = 1e-2  # outputs below it (a saturated sigmoid) are compared absolutely: float32 sigmoids round at 1e-7


def difference(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Largest absolute difference, and the same relative to the largest magnitude of `a` (at least SMALLEST_SCALE)."""
    if isinstance(a, (list, dict)) or not isinstance(a, np.ndarray):
        same = _equal_nested(a, b)
        return (0.0, 0.0) if same else (float("inf"), float("inf"))
    if a.shape != b.shape:
        return float("inf"), float("inf")
    if a.size == 0:
        return 0.0, 0.0
    if a.dtype.kind not in "fiub" and not np.issubdtype(a.dtype, np.number) and a.dtype.kind != "V":
        return (0.0, 0.0) if np.array_equal(a, b) else (float("inf"), float("inf"))
    x, y = a.astype(np.float64), b.astype(np.float64)
    same = (x == y) | (np.isnan(x) & np.isnan(y))
    with np.errstate(invalid="ignore"):
        gap = np.where(same, 0.0, np.abs(x - y))
    worst = float(np.max(np.where(np.isnan(gap), np.inf, gap)))
    finite = np.abs(x[np.isfinite(x)])
    scale = float(finite.max()) if finite.size else 0.0
    return worst, worst / max(scale, SMALLEST_SCALE)


def _equal_nested(a: object, b: object) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal_nested(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_equal_nested(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return difference(a, b)[1] < 1e-3
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= 1e-3 * max(abs(a), 1e-6)
    return a == b
