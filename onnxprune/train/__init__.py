"""Training: what is used from Python. torch is imported with the first name that is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxprune.train.dhspg import DHSPG
    from onnxprune.train.families import params_and_groups
    from onnxprune.train.hesso import HESSO
    from onnxprune.train.jacobian import mean_jsv
    from onnxprune.train.selection import Selection
    from onnxprune.train.tpp import TPP
    from onnxprune.train.units import Part, UnitTable

__all__ = ["DHSPG", "HESSO", "TPP", "Part", "Selection", "UnitTable", "mean_jsv", "params_and_groups"]

_HOME = {
    "DHSPG": "dhspg",
    "HESSO": "hesso",
    "TPP": "tpp",
    "Part": "units",
    "Selection": "selection",
    "UnitTable": "units",
    "mean_jsv": "jacobian",
    "params_and_groups": "families",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'onnxprune.train' has no attribute '{name}'")
    return getattr(import_module(f"onnxprune.train.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
