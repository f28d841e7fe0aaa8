"""Training for a file: the network in it is trained as a mirror, and the weights go back into the model.

That wins accuracy back after the surgery, and is how a method in training has its say before it (`hooks`). The mirror
is compared with onnxruntime on the file before anything is trained, and on the written file after it: between the two
only weights have changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule

from onnxprune.axes.analysis import Analysis
from onnxprune.axes.expr import kept
from onnxprune.data.batching import StreamSource
from onnxprune.data.signature import Signature, signature_of
from onnxprune.data.source import Source, open_data
from onnxprune.errors import VerificationFailed
from onnxprune.mirroring import mirror
from onnxprune.mirroring.rebn import Moments, channel_moments, fold, freeze_statistics, has_normalisation, rebn
from onnxprune.mirroring.values import as_tensor, stored_values
from onnxprune.model.graph import Graph, Model
from onnxprune.ops.registry import Operator
from onnxprune.result import Training
from onnxprune.rewrite.weights import with_weights
from onnxprune.select.plan import Plan
from onnxprune.train.batching import fitting, free_batch
from onnxprune.train.checkpoint import RunDir
from onnxprune.train.hooks import Hooks
from onnxprune.train.log import Row
from onnxprune.train.loop import train
from onnxprune.train.loss import criterion, output_kinds
from onnxprune.train.schedule import Position
from onnxprune.train.settings import TrainSettings
from onnxprune.train.sparsify import Sparsifier
from onnxprune.verify.compare import difference
from onnxprune.verify.equivalence import tolerance
from onnxprune.verify.probes import behind_selection
from onnxprune.verify.runs import Shapes, feeds_that_run, session

__all__ = ["Recovery", "Trained", "kept_channels", "mirror_error"]

Kept = Callable[[str], "np.ndarray | None"]

CALIBRATION_BATCHES = 8
SMALLEST_BATCH = 2  # of fewer samples there are no statistics


@dataclass(frozen=True, eq=False)
class Trained:
    """A model with its new weights, how that went, the trained mirror, and where the run ended.

    families: rows of what the hooks told of every family of units in the end.
    """

    model: Model
    report: Training
    module: GraphModule
    position: Position
    families: tuple[Mapping[str, Any], ...] = ()


@dataclass(eq=False)
class Recovery:
    """Training that was asked for, checked against the model before any long work.

    whole: the original as a mirror: what the loss may distil from, and what pruned channels are normalised to.
    signature: what the mirrors take; a file that is fixed to a batch size may have mirrors that aren't. identity: what
    a run is continued under, settings aside.
    """

    settings: TrainSettings
    source: Source
    original: Graph
    registry: Mapping[str, Operator]
    criterion: Any
    whole: GraphModule
    rebn: bool | None
    signature: Signature
    identity: Mapping[str, Any]
    _moments: Moments | None = field(default=None, init=False)

    @classmethod
    def prepared(
        cls,
        original: Graph,
        data: object,
        settings: TrainSettings,
        *,
        registry: Mapping[str, Operator],
        preprocess: str | None = None,
        loss: str = "auto",
        distill: float = 0.0,
        temperature: float = 4.0,
        rebn: bool | None = None,
        cache: Path | None = None,
    ) -> Recovery:
        """Open the data, build the loss and mirror the original.

        Raises DataError where the data does not fit, UsageError where the loss does not, NotMirrored where the model
        can't be trained.
        """
        whole = mirror(original, half=torch.float32, registry=registry)
        signature = signature_of(original)
        larger = settings.batch // settings.accumulate > (signature.batch or settings.batch)
        if larger and free_batch(whole, original, signature, seed=settings.seed):
            signature = signature.with_batch(None)
        source = open_data(data, signature, preprocess=preprocess, cache=cache)
        chosen = criterion(
            loss, outputs=output_kinds(original), distill=distill, temperature=temperature, targets=source.targets
        )
        identity = {
            "data": source.description.partition(" (")[0] if isinstance(source, StreamSource) else source.description,
            "preprocess": preprocess,
            "loss": loss,
            "distill": distill,
            "temperature": temperature,
        }
        return cls(settings, source, original, registry, chosen, whole, rebn, signature, identity)

    def look_into(
        self,
        run_dir: Path,
        *,
        resume: bool,
        span: tuple[float, float] = (0.0, 1.0),
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        """Raise UsageError where the run directory is in use, holds a run that is not to be resumed, or one under other
        settings, as far as they are known before the work. span, identity: as `run` will be given them."""
        about = {**replace(self.settings, span=span).decisive(), **self.identity, **(identity or {})}
        RunDir(run_dir, about=about, keep=self.settings.keep, notify=lambda _: None).look(resume=resume)

    def run(
        self,
        graph: Graph,
        path: Path,
        *,
        left: Kept | None = lambda _: None,
        span: tuple[float, float] = (0.0, 1.0),
        start: Position | None = None,
        shapes: Shapes = None,
        run_dir: Path | None = None,
        resume: bool = False,
        identity: Mapping[str, Any] | None = None,
        hooks: Hooks | None = None,
        progress: Callable[[Row], None] | None = None,
        notify: Callable[[str], None] = lambda _: None,
    ) -> Trained:
        """Train a model, the original or what is left of it, which stands in `path` too.

        left: the channels that are left of those that a convolution's weight makes, by its name: they are normalised to
            what they are in the original. None: to what they are in this model, which has other weights.
        span, start: the part of the training that this is, and where the part before it ended.
        """
        settings = replace(self.settings, span=span)
        student = self._student(graph)
        before = mirror_error(student, graph, path, registry=self.registry, seed=settings.seed, shapes=shapes)
        inserted = self.normalise(student, left)
        result = train(
            student,
            self.source,
            self.criterion,
            settings,
            input_names=student.meta["inputs"],
            output_names=student.meta["outputs"],
            teacher=self.whole if self.criterion.needs_teacher else None,
            run_dir=run_dir,
            resume=resume,
            start=start,
            identity={
                **self.identity,
                **(identity or {}),
                "normalisations put back": inserted,
                **self._known_by(graph),
            },
            hooks=hooks,
            progress=progress,
            notify=notify,
        )
        families = tuple(state.row() for state in hooks.families()) if isinstance(hooks, Sparsifier) else ()
        student.eval()
        fold(student)
        report = Training(
            loss=self.criterion.name,
            data=self._described(),
            steps=result.steps,
            epochs=result.epochs,
            seconds=result.seconds,
            first_loss=result.first_loss,
            last_loss=result.last_loss,
            samples_per_s=result.samples_per_s,
            backoffs=result.backoffs,
            resumed_from=result.resumed_from,
            batchnorms_inserted=inserted,
            mirror_error_before=before,
            mirror_error_after=None,
        )
        return Trained(with_weights(graph, stored_values(student)), report, student, result.position, families)

    def _known_by(self, graph: Graph) -> Mapping[str, str]:
        """What tells a model from others. Of a pruned one the weights are those of the original, chosen by the plan."""
        if graph is not self.original:
            return {"pruned model": fingerprint(graph)}
        digest = hashlib.sha256()
        for name in graph.parameters:
            digest.update(graph.array(name).tobytes())
            graph.release(name)
        return {"model": fingerprint(graph), "weights": digest.hexdigest()[:12]}

    def _student(self, graph: Graph) -> GraphModule:
        student = mirror(graph, half=torch.float32, registry=self.registry)
        fixed = signature_of(graph)
        if self._freed and not free_batch(student, graph, fixed, doubt=True, seed=self.settings.seed):
            raise VerificationFailed(
                f"the original in torch takes any number of samples, the pruned model only {fixed.batch} at a time",
                f"--batch-size {fixed.batch} trains on that many; and please report the model's graph",
            )
        return student

    @property
    def _freed(self) -> bool:
        """Whether the mirrors take batches that the file doesn't."""
        return self.signature.batch is None and signature_of(self.original).batch is not None

    def _described(self) -> str:
        if not self._freed:
            return self.source.description
        fixed = signature_of(self.original).batch
        return f"{self.source.description}, {self.settings.batch} at a time, where the file takes {fixed}"

    def normalise(self, student: GraphModule, left: Kept | None) -> int:
        """Put folded BatchNormalization back where that was asked for or, where nothing was said, where there is none
        and the batch allows it; and freeze its statistics where the batch is too small for them. left: see `run`."""
        forward = self.signature.batch or self.settings.batch // self.settings.accumulate
        if forward < SMALLEST_BATCH or self.signature.whole:
            freeze_statistics(student)
            return 0
        if self.rebn is False or (self.rebn is None and has_normalisation(student)):
            return 0
        if left is None:
            with fitting(forward):
                return rebn(student, channel_moments(student, self.calibration(student)))
        if self._moments is None:
            with fitting(forward):
                self._moments = channel_moments(self.whole, self.calibration(student))
        names = {target: path[-1] for target, path in self.whole.meta["parameters"].items()}
        moments = {}
        for target, (mean, variance) in self._moments.items():
            indices = left(names[target])
            channels = slice(None) if indices is None else torch.from_numpy(indices)
            moments[target] = mean[channels], variance[channels]
        return rebn(student, moments)

    def calibration(self, student: GraphModule) -> Iterator[tuple[Tensor, ...]]:
        batches = self.source.batches(self.settings.batch, seed=self.settings.seed, shuffle=True)
        for batch in islice(batches, CALIBRATION_BATCHES):
            yield tuple(torch.from_numpy(np.ascontiguousarray(batch.inputs[n])) for n in student.meta["inputs"])


def kept_channels(analysis: Analysis, plan: Plan) -> Kept:
    """What a plan leaves of the channels that a stored tensor makes along its first axis; None where it leaves all."""
    keep = plan.by_atom(analysis)

    def of(name: str) -> np.ndarray | None:
        uses = (analysis.uses.get((node.index, i)) for node, i in analysis.graph.consumers.get(name, ()))
        axes = next((axes for axes in uses if axes), None)
        return None if axes is None else kept(axes[0], keep)

    return of


def mirror_error(
    module: GraphModule,
    graph: Graph,
    path: Path,
    *,
    registry: Mapping[str, Operator],
    seed: int = 0,
    shapes: Shapes = None,
) -> float:
    """Largest difference between a mirror and its model's file in onnxruntime, relative to the largest output, over
    several input sets. Outputs behind a selection (TopK, NonMaxSuppression) don't count.

    Raises VerificationFailed where it is more than rounding explains.
    """
    feeds, wanted = feeds_that_run(graph, session(path), seed, shapes)
    behind = behind_selection(graph, registry)
    worst = 0.0
    for feed, expected in zip(feeds, wanted, strict=True):
        with torch.no_grad():
            found = module(*(as_tensor(feed[n]) for n in graph.inputs))
        found = [found] if len(expected) == 1 else found
        for name, a, b in zip(graph.outputs, expected, found, strict=True):
            if name not in behind and isinstance(b, Tensor):
                worst = max(worst, difference(a, b.float().numpy() if b.is_floating_point() else b.numpy())[1])
    limit = tolerance(graph, registry)
    if not worst <= limit:
        raise VerificationFailed(
            f"the model in torch differs from {path.name} in onnxruntime: relative error {worst:.2e}, "
            f"tolerance {limit:.0e}",
            "one-shot compression works without training: leave --data away; and please report the model's graph",
        )
    return worst


def fingerprint(graph: Graph) -> str:
    """Of the structure and the stored shapes, with the number of weights in front for whoever has to tell two of them
    apart. Weights are left out; they are the original's, chosen by the plan."""
    parts = [f"{n.op}({','.join(n.inputs)})->{','.join(n.outputs)}" for n in graph.nodes]
    parts += [f"{p.name}:{p.elem_type}:{p.shape}" for p in graph.parameters.values()]
    plan = [p.value for p in graph.model.proto.metadata_props]
    count = sum(p.size for p in graph.parameters.values())
    return f"{count:,} parameters ({hashlib.sha256(json.dumps([parts, plan]).encode()).hexdigest()[:12]})"
