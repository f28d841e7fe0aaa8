"""The operators: one file per family, one entry per operator, and the table of all of them."""

from onnxprune.ops import (
    activation,
    attention,
    classical,
    control,
    conv,
    elementwise,
    fused_attention,
    generator,
    integer_matmul,
    layout,
    lookup,
    loss,
    matmul,
    norm,
    pieces,
    pool,
    quant,
    random,
    recurrent,
    reduce,
    resize,
    signal,
    softmax,
)
from onnxprune.ops.registry import Operator, Registry

__all__ = ["OPERATORS", "Operator", "Registry"]

_FAMILIES = (
    activation,
    attention,
    classical,
    control,
    conv,
    elementwise,
    fused_attention,
    generator,
    integer_matmul,
    layout,
    lookup,
    loss,
    matmul,
    norm,
    pieces,
    pool,
    quant,
    random,
    recurrent,
    reduce,
    resize,
    signal,
    softmax,
)

OPERATORS = Registry(operator for family in _FAMILIES for operator in family.OPERATORS)
