"""Accuracy won back after the surgery: the small network is trained as a mirror, and its weights go into the file.

The mirror is compared with onnxruntime on the pruned file before anything is trained, and on the written file after
it: between the two only weights have changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule

from onnxprune.data.signature import Signature, signature_of
from onnxprune.data.source import Source, open_data
from onnxprune.errors import VerificationFailed
from onnxprune.mirror import mirror
from onnxprune.mirror.rebn import fold, freeze_statistics, has_normalisation, rebn
from onnxprune.mirror.values import stored_values
from onnxprune.model.graph import Graph, Model
from onnxprune.ops.registry import Operator
from onnxprune.result import Training
from onnxprune.rewrite.weights import with_weights
from onnxprune.train.hooks import Hooks
from onnxprune.train.log import Row
from onnxprune.train.loop import train
from onnxprune.train.loss import criterion, output_kinds
from onnxprune.train.settings import TrainSettings
from onnxprune.verify.compare import difference
from onnxprune.verify.equivalence import tolerance
from onnxprune.verify.probes import behind_selection
from onnxprune.verify.runs import Shapes, feeds_that_run, session

__all__ = ["Recovery", "mirror_error"]

CALIBRATION_BATCHES = 8
SMALLEST_BATCH = 2  # of fewer samples there are no statistics


@dataclass(eq=False)
class Recovery:
    """Training that was asked for, checked against the model before any long work.

    teacher: the original as a mirror, where the loss distils from it.
    """

    settings: TrainSettings
    source: Source
    original: Graph
    registry: Mapping[str, Operator]
    criterion: Any
    teacher: GraphModule | None
    rebn: bool | None
    signature: Signature

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
        teacher = mirror(original, half=torch.float32, registry=registry)
        signature = signature_of(original)
        source = open_data(data, signature, preprocess=preprocess, cache=cache)
        chosen = criterion(
            loss, outputs=output_kinds(original), distill=distill, temperature=temperature, targets=source.targets
        )
        needed = teacher if chosen.needs_teacher else None
        return cls(settings, source, original, registry, chosen, needed, rebn, signature)

    def run(
        self,
        pruned: Graph,
        path: Path,
        *,
        shapes: Shapes = None,
        run_dir: Path | None = None,
        resume: bool = False,
        identity: Mapping[str, Any] | None = None,
        hooks: Hooks | None = None,
        progress: Callable[[Row], None] | None = None,
        notify: Callable[[str], None] = lambda _: None,
    ) -> tuple[Model, Training, GraphModule]:
        """Train the pruned model, which stands in `path` too; gives it with its new weights, how it went, and the
        trained mirror."""
        student = mirror(pruned, half=torch.float32, registry=self.registry)
        before = mirror_error(student, pruned, path, registry=self.registry, seed=self.settings.seed, shapes=shapes)
        inserted = self.normalise(student)
        result = train(
            student,
            self.source,
            self.criterion,
            self.settings,
            input_names=student.meta["inputs"],
            output_names=student.meta["outputs"],
            teacher=self.teacher,
            run_dir=run_dir,
            resume=resume,
            identity={**(identity or {}), "rebn": inserted, "loss": self.criterion.name, "model": fingerprint(pruned)},
            hooks=hooks,
            progress=progress,
            notify=notify,
        )
        student.eval()
        fold(student)
        report = Training(
            loss=self.criterion.name,
            data=self.source.description,
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
        return with_weights(pruned, stored_values(student)), report, student

    def normalise(self, student: GraphModule) -> int:
        """Put folded BatchNormalization back where that was asked for or, where nothing was said, where there is none
        and the batch allows it; and freeze its statistics where the batch is too small for them."""
        forward = self.signature.batch or self.settings.batch // self.settings.accumulate
        if forward < SMALLEST_BATCH:
            freeze_statistics(student)
            return 0
        if self.rebn is False or (self.rebn is None and has_normalisation(student)):
            return 0
        return rebn(student, self.calibration(student))

    def calibration(self, student: GraphModule) -> Iterator[tuple[Tensor, ...]]:
        batches = self.source.batches(self.settings.batch, seed=self.settings.seed, shuffle=True)
        for batch in islice(batches, CALIBRATION_BATCHES):
            yield tuple(torch.from_numpy(np.ascontiguousarray(batch.inputs[n])) for n in student.meta["inputs"])


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
            found = module(*(_as_tensor(feed[n]) for n in graph.inputs))
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
    """Of the structure and the stored shapes: what a run is continued under. Weights are left out; they are the
    original's, chosen by the plan."""
    parts = [f"{n.op}({','.join(n.inputs)})->{','.join(n.outputs)}" for n in graph.nodes]
    parts += [f"{p.name}:{p.elem_type}:{p.shape}" for p in graph.parameters.values()]
    plan = [p.value for p in graph.model.proto.metadata_props]
    return hashlib.sha256(json.dumps([parts, plan]).encode()).hexdigest()[:16]


def _as_tensor(array: np.ndarray) -> Tensor:
    if array.dtype.kind == "f" and array.dtype.itemsize == 2:
        array = array.astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(array)).reshape(array.shape)
