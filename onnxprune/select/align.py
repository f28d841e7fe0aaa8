"""Block sizes: a channel count that is no multiple of the deployment's block is slower than one that is."""

from __future__ import annotations

from math import gcd, prod
from pathlib import Path

from onnxprune.axes.analysis import Analysis, Group
from onnxprune.axes.expr import Atom, Expr, Product, Sum, atoms, resolve
from onnxprune.errors import UsageError
from onnxprune.select.plan import Plan

__all__ = ["DEPLOYMENTS", "aligned_counts", "block_size", "steps"]

DEPLOYMENTS = ("ort-cpu", "openvino", "tensorrt", "none")


def block_size(deploy: str, align: int | None = None) -> int:
    """Channels per block: 16 for onnxruntime on AVX-512, 8 on AVX2; 16 for OpenVINO, 8 for TensorRT, 1 for none."""
    if align is not None:
        if align < 1:
            raise UsageError(f"--align {align} is not a positive number")
        return align
    if deploy == "ort-cpu":
        return 16 if _has_avx512() else 8
    if deploy not in DEPLOYMENTS:
        raise UsageError(f"--deploy '{deploy}' is none of {', '.join(DEPLOYMENTS)}")
    return {"openvino": 16, "tensorrt": 8, "none": 1}[deploy]


def _has_avx512() -> bool:
    try:
        return "avx512f" in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore")
    except OSError:
        return False


def steps(analysis: Analysis, groups: list[Group], align: int) -> dict[str, int]:
    """Units per step of every group, such that all of its axes change by whole blocks.

    A head of 64 channels is whole blocks already: its step is 1.
    """
    return {g.id: align // gcd(align, _width(analysis, g)) for g in groups}


def aligned_counts(analysis: Analysis, plan: Plan, align: int) -> tuple[int, int, int, int]:
    """(aligned, all) groups before, and (aligned, all) after: those whose axes are whole blocks."""
    step = steps(analysis, list(analysis.groups), align)
    before = sum(g.size % step[g.id] == 0 for g in analysis.groups)
    after = sum(len(plan.keep.get(g.id, range(g.size))) % step[g.id] == 0 for g in analysis.groups)
    return before, len(analysis.groups), after, len(analysis.groups)


def _width(analysis: Analysis, group: Group) -> int:
    """Indices that one unit takes up on an axis: their greatest common divisor over the group's parameters."""
    width = 0
    for member in group.members:
        width = gcd(width, _multiplicity(analysis.uses[member.use][member.axis], group.atom))
    return max(width, 1)


def _multiplicity(expr: Expr, atom: Atom) -> int:
    expr = resolve(expr)
    if isinstance(expr, Atom):
        return 1
    if isinstance(expr, Sum):
        inside = [p for p in expr.parts if atom in set(atoms(p))]
        return gcd(*(_multiplicity(p, atom) for p in inside))
    assert isinstance(expr, Product)
    holding = [f for f in expr.factors if atom in set(atoms(f))]
    return prod(f.size for f in expr.factors if f not in holding) * prod(_multiplicity(f, atom) for f in holding)
