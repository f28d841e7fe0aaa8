"""onnxprune: make any ONNX model smaller, and prove that the surgery changed nothing else.

    import onnxprune
    result = onnxprune.compress("model.onnx", "small.onnx", target="macs=0.5")
    print(result.after.params, result.verification.max_rel_error)

Each stage is usable by itself: `load` -> `analyse` -> `choose` -> `rewrite` -> `prove`.
`mirror` gives a model as a torch module. onnxruntime is imported where a model is run, torch where one is trained.
"""

from onnxprune._version import __version__
from onnxprune.accuracy import Recipe
from onnxprune.axes.analysis import Analysis, Group, Member
from onnxprune.errors import (
    DataError,
    Diverged,
    ModelRejected,
    NothingPrunable,
    NotMirrored,
    OnnxPruneError,
    TargetNotReached,
    UsageError,
    VerificationFailed,
)
from onnxprune.model.graph import Graph, Model
from onnxprune.model.load import load
from onnxprune.ops import OPERATORS, Operator, Registry
from onnxprune.pipeline import Inspection, analyse, compress, inspect, mirror, verify
from onnxprune.result import Accuracy, Repair, Result, Sparsified, Training, Verification
from onnxprune.rewrite.rewrite import rewrite
from onnxprune.select.choose import choose
from onnxprune.select.plan import Plan
from onnxprune.select.target import parse_target
from onnxprune.train.settings import TrainSettings
from onnxprune.verify.equivalence import prove

__all__ = [
    "OPERATORS",
    "Accuracy",
    "Analysis",
    "DataError",
    "Diverged",
    "Graph",
    "Group",
    "Inspection",
    "Member",
    "Model",
    "ModelRejected",
    "NotMirrored",
    "NothingPrunable",
    "OnnxPruneError",
    "Operator",
    "Plan",
    "Recipe",
    "Registry",
    "Repair",
    "Result",
    "Sparsified",
    "TargetNotReached",
    "TrainSettings",
    "Training",
    "UsageError",
    "Verification",
    "VerificationFailed",
    "__version__",
    "analyse",
    "choose",
    "compress",
    "inspect",
    "load",
    "mirror",
    "parse_target",
    "prove",
    "rewrite",
    "verify",
]
