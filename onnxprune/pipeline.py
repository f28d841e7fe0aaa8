"""What the package and its command line do: compress, inspect, verify and the rest, each as one call.

The stages of `compress` are in `stages`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from onnxprune.accuracy import TRAINED_KEY, is_first_process
from onnxprune.axes.analysis import Analysis
from onnxprune.axes.analysis import analyse as analyse_graph
from onnxprune.clock import Clock
from onnxprune.errors import ModelRejected, UsageError
from onnxprune.model.graph import Graph
from onnxprune.model.load import load, open_model
from onnxprune.model.profile import costs, summary
from onnxprune.ops import OPERATORS
from onnxprune.ops.registry import Operator
from onnxprune.output import free
from onnxprune.ranking import measured_samples
from onnxprune.repairs import REPAIRED_KEY
from onnxprune.request import DEFAULT_RECIPE, Recipe, Request
from onnxprune.result import ModelSummary, Result, Verification
from onnxprune.select.choose import candidates
from onnxprune.select.importance import Criterion
from onnxprune.select.plan import METADATA_KEY, plan_from_text, stored_settings
from onnxprune.stages import Point, Prepared, goal_of, load_graph
from onnxprune.train.methods import ONESHOT
from onnxprune.train.settings import TrainSettings
from onnxprune.verify.equivalence import prove
from onnxprune.verify.trained import prove_trained

if TYPE_CHECKING:
    import torch.fx

    from onnxprune.sensitivity import Sensitivity
    from onnxprune.train.log import Row
    from onnxprune.train.sparsify import Sparsifier

__all__ = ["Inspection", "analyse", "compress", "inspect", "mirror", "sensitivity", "verify"]

Shapes = Mapping[str, Sequence[int]]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found out."""

    summary: ModelSummary
    analysis: Analysis
    load_s: float
    analyse_s: float


def compress(
    model: str | os.PathLike[str] | onnx.ModelProto,
    output: str | os.PathLike[str] | None = None,
    *,
    target: str,
    method: str | type[Sparsifier] = ONESHOT,
    method_options: Mapping[str, Any] | None = None,
    importance: str | Criterion = "auto",
    allocate: str = "importance",
    sensitivity: str | os.PathLike[str] | None = None,
    scope: str = "global",
    floor: float = 0.1,
    deploy: str = "ort-cpu",
    align: int | None = None,
    exclude: Sequence[str] = (),
    allow_inexact: bool = False,
    best_effort: bool = False,
    seed: int = 0,
    dry_run: bool = False,
    force: bool = False,
    latency: bool = False,
    threads: int = 1,
    input_shapes: Shapes | None = None,
    data: object = None,
    samples: int | None = None,
    repair: str = "auto",
    calibrate: str | None = None,
    train: TrainSettings | None = None,
    evaluate: str | None = None,
    max_drop: float | None = None,
    recipe: Recipe = DEFAULT_RECIPE,
    run_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    registry: Mapping[str, Operator] = OPERATORS,
    progress: Progress | None = None,
    on_step: Callable[[Row], None] | None = None,
) -> Result:
    """Prune a model to a target, prove the surgery in onnxruntime, repair what is left where there is data, train it
    where that is asked for, and write it.

    output: where to write; nothing is written where it is None (the pruned model is in the result).
    target: what is to remain, such as 'macs=0.5', 'params=40%', 'size=5MB', 'macs=1.2G', 'channels=0.5',
        'latency=0.6' or 'latency=12ms' in onnxruntime on this machine with `threads` threads.
    method: 'oneshot' removes the units of least importance; 'dhspg', 'hesso', 'tpp', 'greg', 'fixreg', 'imp' and 'issp'
        (`train.methods`) drive units to zero in training on `data` and then remove them. method_options: by name;
        'share' is the part of the training that comes before the removal. importance, allocate: for 'oneshot', as
        `ranking.ranking` takes them; sensitivity: a file that `sensitivity` wrote, which tells both.
    deploy, align: the block that kept counts are multiples of (`select.align`). floor: least share a group keeps.
    exclude: regular expressions of initializer and node names to leave alone.
    input_shapes: sizes of inputs with symbolic dimensions, for costs, the proof and latency.
    data: what to repair, rank and train on, in any form that `data.open_data` takes. samples: how many of its inputs
        are for ranking and repair, 512 unless told otherwise.
    repair: 'affine' solves for the weights and biases of the layers behind the surgery so that they give what they
        gave, 'ls' for the weights, 'mean' for the biases, 'none' for nothing; 'auto' is 'affine' where there is data
        and no method in training. calibrate: repairs without data, on inputs that are made up: 'bn' fits them to what
        BatchNormalization nodes store, 'random' takes them as they are drawn, which can hurt; 'auto' is 'ls' then.
    train: how, and for how long; where it is None, only methods in training train. recipe: the loss, and what is done
        to the data.
    evaluate: a metric of `metrics.parse_metric`, taken in onnxruntime of the original, the pruned and the written
        model. max_drop: what it may lose, as a fraction.
    run_dir, resume: where the training keeps checkpoints, and whether it goes on from there.
    progress: called with the name of each stage, on_step: with the state of the training.

    Raises UsageError, ModelRejected, NothingPrunable, TargetNotReached, VerificationFailed; DataError for what goes
    wrong in data, hooks and training; NotMirrored where the model can't be trained. Where it raises, nothing has been
    written (but for checkpoints in run_dir).
    """
    request = Request.of(locals())
    goal = goal_of(target, request)
    destination = None if output is None or not is_first_process() else free(Path(output), model, force)
    clock = Clock(progress)
    return Point(Prepared.of(model, request, clock), goal, destination, clock).run()


def inspect(
    model: str | os.PathLike[str] | onnx.ModelProto,
    *,
    exclude: Sequence[str] = (),
    input_shapes: Shapes | None = None,
    registry: Mapping[str, Operator] = OPERATORS,
) -> Inspection:
    """The groups of a model, what they cover, and every barrier. Raises ModelRejected, UsageError."""
    start = time.perf_counter()
    graph = load_graph(model, registry, input_shapes)
    loaded = time.perf_counter()
    analysis = analyse_graph(graph, registry=registry, exclude=exclude)
    done = time.perf_counter()
    name = Path(graph.model.source).name or "model"
    return Inspection(summary(graph.model, name, costs(analysis)), analysis, loaded - start, done - loaded)


def analyse(
    model: str | os.PathLike[str] | onnx.ModelProto | Graph,
    *,
    exclude: Sequence[str] = (),
    input_shapes: Shapes | None = None,
    registry: Mapping[str, Operator] = OPERATORS,
) -> Analysis:
    """Groups, axes, coverage and barriers of a model. Raises ModelRejected, UsageError."""
    graph = model if isinstance(model, Graph) else load_graph(model, registry, input_shapes)
    return analyse_graph(graph, registry=registry, exclude=exclude)


def sensitivity(
    model: str | os.PathLike[str] | onnx.ModelProto,
    data: object,
    *,
    preprocess: str | None = None,
    importance: str | Criterion = "obs",
    evaluate: str = "agreement",
    samples: int | None = None,
    repaired: bool = False,
    exclude: Sequence[str] = (),
    allow_inexact: bool = False,
    input_shapes: Shapes | None = None,
    seed: int = 0,
    registry: Mapping[str, Operator] = OPERATORS,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[Analysis, Sensitivity]:
    """What a model loses with the units of each group, more and more of them, one group at a time. Wants torch.

    data, preprocess: as `compress` takes them. importance: the order in which units go. evaluate: the metric beside the
    distillation loss, such as 'top1'. samples: how many to measure on; None: what takes a few minutes.
    repaired: whether what is left makes up for what is gone, as closed-form repair will.
    Raises UsageError, DataError, ModelRejected, NothingPrunable, NotMirrored.
    """
    from onnxprune.calibrate import Calibration
    from onnxprune.calibrate.calibration import SAMPLES
    from onnxprune.data import open_data, signature_of
    from onnxprune.metrics import parse_metric
    from onnxprune.sensitivity import measure

    graph = load_graph(model, registry, input_shapes)
    analysis = analyse_graph(graph, registry=registry, exclude=exclude)
    groups = candidates(analysis, allow_inexact=allow_inexact)
    source = open_data(data, signature_of(graph), preprocess=preprocess)
    calibration = Calibration(analysis, source, samples or SAMPLES, seed)
    few = samples or measured_samples(analysis, groups, SAMPLES)
    metric = parse_metric(evaluate)
    return analysis, measure(
        analysis,
        groups,
        calibration,
        importance=importance,
        metric=metric,
        samples=few,
        repaired=repaired,
        seed=seed,
        progress=progress,
    )


def mirror(
    model: str | os.PathLike[str] | onnx.ModelProto | Graph,
    *,
    half: torch.dtype | None = None,
    registry: Mapping[str, Operator] = OPERATORS,
) -> torch.fx.GraphModule:
    """A model as a torch module that computes the same function: see `mirroring.mirror`. Wants torch.

    Raises ModelRejected; NotMirrored where nodes have no form in torch; UsageError where torch is not installed.
    """
    try:
        from onnxprune.mirroring import mirror as build
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise UsageError("a mirror wants torch, which is not installed", "pip install 'onnxprune[train]'") from None
    return build(model, half=half, registry=registry)


def verify(
    original: str | os.PathLike[str],
    pruned: str | os.PathLike[str],
    *,
    seed: int = 0,
    input_shapes: Shapes | None = None,
    registry: Mapping[str, Operator] = OPERATORS,
) -> Verification:
    """Repeat the proof from the plan stored in a pruned model.

    Of a model that was repaired or trained since, the surgery is done again and proved, and the file must be what came
    out with other weights; the notes say so. Raises VerificationFailed, ModelRejected.
    """
    small = open_model(pruned)
    text = next((p.value for p in small.proto.metadata_props if p.key == METADATA_KEY), None)
    if text is None:
        raise ModelRejected(
            f"{pruned} holds no plan: it was not written by onnxprune",
            "`onnxprune verify ORIGINAL PRUNED`, in this order",
        )
    pins, exclude = stored_settings(text)
    analysis = analyse_graph(load(original, registry=registry, pins=pins), registry=registry, exclude=exclude)
    plan = plan_from_text(text, analysis)
    marks = {p.key for p in small.proto.metadata_props}
    if TRAINED_KEY in marks or REPAIRED_KEY in marks:
        found = prove_trained(analysis, plan, Path(pruned), small, seed=seed, shapes=input_shapes)
        notes = found.notes if TRAINED_KEY in marks else [n.replace("trained:", "repaired:", 1) for n in found.notes]
        return replace(found, notes=tuple(notes))
    return prove(analysis, plan, Path(pruned), seed=seed, shapes=input_shapes, model=small)
