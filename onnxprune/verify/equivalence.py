"""The proof: the pruned model equals the masked original, in onnxruntime, on inputs of several sizes."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from onnxprune.axes.analysis import Analysis
from onnxprune.axes.expr import kept
from onnxprune.errors import ModelRejected, VerificationFailed
from onnxprune.model.graph import Graph, Model
from onnxprune.model.load import open_model
from onnxprune.model.save import to_proto, write
from onnxprune.ops.registry import Operator
from onnxprune.result import Verification
from onnxprune.select.plan import Plan
from onnxprune.verify.compare import difference
from onnxprune.verify.inputs import Feed
from onnxprune.verify.probes import Probes, find_probes
from onnxprune.verify.reference import masked
from onnxprune.verify.runs import feeds_that_run, run, session

__all__ = ["TOLERANCES", "check", "prove", "tolerance"]

TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 4e-2, "int8": 5e-2}


def tolerance(graph: Graph, registry: Mapping[str, Operator]) -> float:
    """Largest error, relative to the largest output, that rounding explains, by the formats that the model computes
    in. Weights that are only stored in a smaller format are no excuse."""
    if any(n.op in registry and registry[n.op].rounds for n in graph.nodes):
        return TOLERANCES["int8"]
    computed = {graph.types.get(o) for n in graph.nodes for o in n.outputs if o not in graph.static}
    if TensorProto.BFLOAT16 in computed:
        return TOLERANCES["bfloat16"]
    return TOLERANCES["float16" if TensorProto.FLOAT16 in computed else "float32"]


def prove(
    analysis: Analysis,
    plan: Plan,
    pruned: Path,
    *,
    seed: int = 0,
    shapes: Mapping[str, Sequence[int]] | None = None,
    model: Model | None = None,
    unmasked: bool = False,
) -> Verification:
    """Run both models on at least three input sets that cover every dynamic dimension at two sizes.

    pruned: the file to prove; model: the same in memory, where it is at hand. unmasked: the reference is the original
    as it is, whose removed units should be zero by themselves.
    Raises VerificationFailed where they differ or the pruned model is invalid, ModelRejected where onnxruntime can't
    run the original.
    """
    check(pruned, analysis.graph.model)
    with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
        path = Path(folder) / "masked.onnx"
        reference = analysis.graph.model if unmasked else masked(analysis, plan)
        limit = tolerance(analysis.graph, analysis.registry)
        write(reference, path)
        feeds, wanted = feeds_that_run(analysis.graph, session(path), seed, shapes)
        absolute, relative = _compare(pruned, feeds, wanted)
        notes: tuple[str, ...] = ()
        if relative > limit:
            probes = find_probes(analysis, plan)
            if probes is not None:
                smaller = model or open_model(pruned)
                absolute, relative = _compare_probes(analysis, plan, probes, reference, smaller, feeds, Path(folder))
                notes = (f"compared at {len(probes.tensors)} tensors in front of operators that select",)
    shown = tuple({k: v.shape for k, v in f.items()} for f in feeds)
    if relative > limit:
        other = "trained network" if unmasked else "masked original"
        raise VerificationFailed(
            f"the pruned model differs from the {other}: relative error {relative:.2e}, tolerance {limit:.0e}",
            "this is a bug of onnxprune: please report the model's graph",
        )
    return Verification(True, absolute, relative, limit, len(feeds), shown, notes)


def _loaded(pruned: Path) -> Any:
    try:
        return session(pruned)
    except ModelRejected as error:
        raise VerificationFailed(f"the pruned model does not load: {error}") from None


def _compare(pruned: Path, feeds: Sequence[Feed], wanted: Sequence[Sequence[Any]]) -> tuple[float, float]:
    """Largest absolute and relative difference over all outputs and input sets."""
    runner = _loaded(pruned)
    absolute = relative = 0.0
    for feed, expected in zip(feeds, wanted, strict=True):
        found, reason = run(runner, feed)
        if found is None:
            raise VerificationFailed(f"the pruned model does not run: {reason}")
        for a, b in zip(expected, found, strict=True):
            worst, scaled = difference(a, b)
            absolute, relative = max(absolute, worst), max(relative, scaled)
    return absolute, relative


def _compare_probes(
    analysis: Analysis,
    plan: Plan,
    probes: Probes,
    reference: Model,
    pruned: Model,
    feeds: Sequence[Feed],
    folder: Path,
) -> tuple[float, float]:
    """The same, at the probes and at the outputs that don't lie behind a selection."""
    names = [*probes.tensors, *probes.outputs]
    keep = plan.by_atom(analysis)
    results = []
    for model, path in ((reference, folder / "masked-probes.onnx"), (pruned, folder / "pruned-probes.onnx")):
        probed = Model(onnx.ModelProto(), model.payloads, model.source, model.nbytes)
        probed.proto.CopyFrom(model.proto)
        probes.add_to(probed)
        write(probed, path)
        runner = _loaded(path)
        results.append([runner.run(names, feed) for feed in feeds])
        path.unlink()
    absolute = relative = 0.0
    for before, after in zip(*results, strict=True):
        for name, a, b in zip(names, before, after, strict=True):
            masks = [kept(e, keep) for e in analysis.axes.get(name, ())]
            for axis, mask in enumerate(masks):
                a = a if mask is None else np.take(a, mask, axis)
            worst, scaled = difference(a, b)
            absolute, relative = max(absolute, worst), max(relative, scaled)
    return absolute, relative


def check(path: Path, original: Model | None = None) -> None:
    """onnx's full check. What it also holds against the original (operators that it doesn't know) is left to
    onnxruntime."""
    problem = _problem(path, full=True)
    if not problem:
        return
    for full in (False, True):
        problem = _problem(path, full=full)
        if problem and (original is None or not _problem(original.source or to_proto(original), full=full)):
            raise VerificationFailed(f"the pruned model is invalid: {problem[:300]}")


def _problem(model: Path | str | onnx.ModelProto, *, full: bool) -> str:
    try:
        onnx.checker.check_model(model if isinstance(model, onnx.ModelProto) else str(model), full_check=full)
    except Exception as error:  # ValidationError, InferenceError, ValueError for more than 2 GB
        return str(error).splitlines()[0]
    return ""
