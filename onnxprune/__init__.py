"""onnxprune: make any ONNX model smaller, and prove that the surgery changed nothing else.

    import onnxprune
    result = onnxprune.compress("model.onnx", "small.onnx", target="macs=0.5")
    print(result.after.params, result.verification.max_rel_error)

Each stage is usable by itself: `load` -> `analyse` -> `choose` -> `rewrite` -> `prove`. Names are imported when they
are first used, so that `import onnxprune` and `onnxprune --help` cost nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from onnxprune._version import __version__

if TYPE_CHECKING:
    from onnxprune.axes.analysis import Analysis, Group, Member
    from onnxprune.errors import (
        ModelRejected,
        NothingPrunable,
        OnnxPruneError,
        TargetNotReached,
        UsageError,
        VerificationFailed,
    )
    from onnxprune.model.graph import Graph, Model
    from onnxprune.model.load import load
    from onnxprune.ops import OPERATORS, Operator, Registry
    from onnxprune.pipeline import Inspection, analyse, compress, inspect, verify
    from onnxprune.result import Result, Verification
    from onnxprune.rewrite.rewrite import rewrite
    from onnxprune.select.choose import choose
    from onnxprune.select.plan import Plan
    from onnxprune.select.target import parse_target
    from onnxprune.verify.equivalence import prove

_HOME = {
    "Analysis": "axes.analysis",
    "Graph": "model.graph",
    "Group": "axes.analysis",
    "Inspection": "pipeline",
    "Member": "axes.analysis",
    "Model": "model.graph",
    "ModelRejected": "errors",
    "NothingPrunable": "errors",
    "OPERATORS": "ops",
    "OnnxPruneError": "errors",
    "Operator": "ops",
    "Plan": "select.plan",
    "Registry": "ops",
    "Result": "result",
    "TargetNotReached": "errors",
    "UsageError": "errors",
    "Verification": "result",
    "VerificationFailed": "errors",
    "analyse": "pipeline",
    "choose": "select.choose",
    "compress": "pipeline",
    "inspect": "pipeline",
    "load": "model.load",
    "parse_target": "select.target",
    "prove": "verify.equivalence",
    "rewrite": "rewrite.rewrite",
    "verify": "pipeline",
}

__all__ = [
    "OPERATORS",
    "Analysis",
    "Graph",
    "Group",
    "Inspection",
    "Member",
    "Model",
    "ModelRejected",
    "NothingPrunable",
    "OnnxPruneError",
    "Operator",
    "Plan",
    "Registry",
    "Result",
    "TargetNotReached",
    "UsageError",
    "Verification",
    "VerificationFailed",
    "__version__",
    "analyse",
    "choose",
    "compress",
    "inspect",
    "load",
    "parse_target",
    "prove",
    "rewrite",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'onnxprune' has no attribute '{name}'")
    return getattr(import_module(f"onnxprune.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
