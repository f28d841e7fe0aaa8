"""The operators: one file per family, one entry per operator, and the table of all of them."""

from onnxprune.ops import (
    attention,
    classical,
    conv,
    elementwise,
    generator,
    layout,
    lookup,
    matmul,
    norm,
    pieces,
    pool,
    quant,
    recurrent,
    reduce,
)
from onnxprune.ops.registry import Operator, Registry

__all__ = ["OPERATORS", "Operator", "Registry"]

_FAMILIES = (
    attention,
    classical,
    conv,
    elementwise,
    generator,
    layout,
    lookup,
    matmul,
    norm,
    pieces,
    pool,
    quant,
    recurrent,
    reduce,
)

OPERATORS = Registry(operator for family in _FAMILIES for operator in family.OPERATORS)
