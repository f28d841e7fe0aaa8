"""What the project knows of an operator, in one value; and the table in which every stage looks it up.

A stage never tests an operator's name. It asks the registry for the entry and calls the rule that it needs; an
operator without an entry, or an entry without that rule, is a barrier and not an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from onnxprune.ops.rules import (
        AxisRule,
        DeadRule,
        FlatRule,
        LinearRule,
        MacsRule,
        MaskRule,
        MirrorRule,
        PatchRule,
        ShapeRule,
        ShiftRule,
        SlopeRule,
    )

__all__ = ["Operator", "Registry", "Role"]

Evaluate: TypeAlias = Callable[..., Any]


class Role(Enum):
    """What an operator does to the meaning of its data, for those who ask what a model's outputs are."""

    PRODUCT = "a matrix product"
    CONVOLUTION = "a convolution"
    SOFTMAX = "probabilities"
    LOG_SOFTMAX = "logarithms of probabilities"
    SIGMOID = "a probability each"
    REARRANGES = "the same numbers in the same order, in another form"
    TRANSPOSES = "the same numbers, axes moved by `perm`"
    EXPANDS = "the same numbers, repeated"
    AFFINE = "arithmetic with weights or scales"
    QUOTIENT = "arithmetic with weights or scales, or a share"
    EXPONENTIAL = "an exponential"
    TOTAL = "a sum over axes"


@dataclass(frozen=True, slots=True)
class Operator:
    """One operator (all its versions).

    name: as in the graph; prefixed with `domain::` outside ONNX's own domain.
    axes: what it equates, freezes and contracts. None: everything it touches is frozen.
    dead: the value of a unit's slice of the output, given that of the inputs (None is 'unknown'). Default: unknown.
    macs: multiply-accumulates, as terms of axis sizes. Default: none.
    patch: what must change in the node itself when axes get shorter, beyond its parameters.
    mask: how the node is expressed in the masked reference, where zeroed units must be left out of a reduction.
    evaluate: numpy value of the outputs, for folding shape arithmetic: evaluate(node, *inputs).
    from_shape: value of the output that only the first input's shape decides: from_shape(node, shape).
    stored: for an operator that is a stored tensor: stored(node, values of the inputs) gives a TensorProto, or a pair
        (fill, shape) of a tensor that has one value throughout; None where this node is no stored tensor.
    taken: which body of a control-flow node runs, where that is known: taken(node, values of the inputs).
    bias: input that is added to the output per channel; past the last input where the operator has none.
    gamma: input that scales the output per channel, for importance by |gamma|.
    shape: (element type, shape) per output, for operators that onnx has no inference for.
    keeps: inputs whose parameters never make a unit vanish and are not zeroed (variances, divisors, scales).
    broadcasts: an input may have size 1 where the output has more, and the output follows the larger.
    joins: an input that lacks a unit has no say in it (a concatenation); its state is given as nan to `dead`.
    discrete: a rounding error in its input may change what it selects, so that outputs behind it can't be compared.
    indices: (input, input) pairs of indices and the tensor that they look up along `axis` (0 by default).
    rounds: it computes in, or rounds to, 8-bit integers.
    dequantises: whether it gives what integers stand for: (input 0 - input 2) * input 1, along `axis`.
    quantised: input -> input holding its zero point; 'zero' of such a parameter is its zero point.
    carries: it moves or compares values and computes none, so that integers may be carried through it as floats.
    mirror: the operator in torch, recorded into the mirror's graph. None: a model with it can't be trained.
    role: what its output means, for `model.outputs`.
    fixed: float inputs that training leaves as they are: statistics, bounds, scales of a resize, thresholds.
    running: of those, the statistics that training updates all the same, as it goes over the data.
    linear: how it is a linear layer of the stored input w, for repair in closed form: linear(node, w, shapes of the
        inputs), or of a tensor that is computed from the data like x. None, or a rule that gives None: it is left as
        it is.
    shift: where a constant per channel that is added to data input i can go instead: shift(node, i) gives the input,
        the sign, and the axis of the data that a vector there lies along (None: it broadcasts).
    slope: by what the output grows with data input i, where that does not depend on the data: slope(node, i, stored
        values of the inputs, rank of the output), which broadcasts against the output; None where it does.
    flat: where an activation does not tell its inputs apart: flat(node, stored values of the inputs).
    """

    name: str
    axes: AxisRule | None = None
    dead: DeadRule | None = None
    macs: MacsRule | None = None
    patch: PatchRule | None = None
    mask: MaskRule | None = None
    evaluate: Evaluate | None = None
    from_shape: Evaluate | None = None
    stored: Evaluate | None = None
    taken: Evaluate | None = None
    bias: int | None = None
    gamma: int | None = None
    shape: ShapeRule | None = None
    keeps: frozenset[int] = frozenset()
    broadcasts: bool = False
    joins: bool = False
    discrete: bool = False
    indices: tuple[tuple[int, int], ...] = ()
    rounds: bool = False
    quantised: tuple[tuple[int, int], ...] = ()
    dequantises: bool = False
    carries: bool = False
    mirror: MirrorRule | None = None
    fixed: frozenset[int] = frozenset()
    running: frozenset[int] = frozenset()
    role: Role | None = None
    linear: LinearRule | None = None
    shift: ShiftRule | None = None
    slope: SlopeRule | None = None
    flat: FlatRule | None = None


class Registry(Mapping[str, Operator]):
    """An immutable table of operators by name."""

    def __init__(self, operators: Iterable[Operator]) -> None:
        self._by_name = {o.name: o for o in operators}

    def __getitem__(self, name: str) -> Operator:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def extended(self, operators: Iterable[Operator]) -> Registry:
        """A table with more operators; one that is there already is replaced. This is how a user registers the
        rules of a custom operator."""
        return Registry([*self._by_name.values(), *operators])
