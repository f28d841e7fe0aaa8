"""What a rule is given: the views of a node through which `ops` speaks to the stages, and the rules' types.

A rule sees one node at a time and knows nothing of the graph around it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol, TypeAlias

import numpy as np

from onnxprune.axes.expr import Atom, Barrier, Expr, cut, equal, freeze, product, resolve, split, sum_of

__all__ = [
    "MALFORMED",
    "AxisContext",
    "AxisRule",
    "Contraction",
    "DeadRule",
    "Flat",
    "FlatRule",
    "GiveUp",
    "Kind",
    "Linear",
    "LinearRule",
    "MacsRule",
    "MaskContext",
    "MaskRule",
    "MirrorContext",
    "MirrorRule",
    "NodeView",
    "PatchContext",
    "PatchRule",
    "Shape",
    "ShapeRule",
    "ShiftRule",
    "SlopeRule",
    "Term",
]


class NodeView(Protocol):
    """A node as its rules see it."""

    op: str
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]

    @property
    def label(self) -> str: ...


class Kind(Enum):
    """How an axis disappears at a node, which decides whether removing a dead unit there is exact."""

    PRODUCT = "product"  # sum of products: a zero operand contributes nothing
    SUM = "sum"  # of one operand: zeros contribute nothing
    MEAN = "mean"  # a sum over n that is divided by n
    RMS = "root mean square"  # as MEAN, inside a fused normalisation
    NORM = "normalisation"  # mean and variance: zeros count
    EXTREME = "extreme value"  # zeros may win
    STATE = "recurrent state"  # a product with the node's own output, one step earlier


@dataclass(frozen=True, slots=True)
class Contraction:
    """Indices of a node's inputs that its outputs no longer have.

    operands: (input, axis position) of each operand; over: what disappears (all of those axes, or a factor of them);
    fold: a constant unit of the first operand can be folded into the node's bias; through: the axis is reduced for a
    statistic and stays in the output, as in a normalisation.
    """

    kind: Kind
    operands: tuple[tuple[int, int], ...]
    over: Expr
    fold: bool = False
    through: bool = False


@dataclass(frozen=True, slots=True)
class Linear:
    """A node as a linear layer: y = x w + bias, once x, w and y are looked at the right way.

    x, w, bias: inputs; bias is None where the node has no place for one. terms: the labels of the axes of x, w and y,
    as in an einsum. unfold, unfold_output: torch views of x and of the node's output with these axes; weight_shape:
    that of w, () where no stored w would do; unfold_weight: as unfold, where it is computed from the data too. inside:
    y is not the node's output but something in it. scale: of the product, bias_scale: of the bias. lay: a number per
    channel, in y's order, as the stored bias holds it. channel: the axis of the output that the channels are on, None
    where they aren't on one.
    """

    x: int
    w: int
    terms: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
    weight_shape: tuple[int, ...]
    bias: int | None = None
    unfold: Callable[[Any], Any] = lambda x: x
    unfold_output: Callable[[Any], Any] = lambda y: y
    inside: bool = False
    scale: float = 1.0
    bias_scale: float = 1.0
    lay: Callable[[np.ndarray], np.ndarray] = lambda c: c
    channel: int | None = None
    unfold_weight: Callable[[Any], Any] = lambda w: w


@dataclass(frozen=True, slots=True)
class Flat:
    """An activation that does not grow outside of low to high, or grows by `leak` there of what it does inside."""

    low: float = -np.inf
    high: float = np.inf
    leak: float | np.ndarray = 0.0


# what a rule may trip over at a node that is not what its operator's definition says
MALFORMED = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError)


class GiveUp(Exception):
    """A rule does not cover this form of the operator: everything the node touches is frozen, for this reason."""


@dataclass(eq=False, slots=True)
class AxisContext:
    """One node during the analysis: the axes of its inputs, and what its rule states about them."""

    node: NodeView
    barrier: Barrier
    inputs: Sequence[tuple[Expr, ...] | None]
    values: Sequence[np.ndarray | None]
    output_shapes: Sequence[tuple[int | None, ...] | None]
    outputs: list[tuple[Expr, ...] | None] = field(default_factory=list)
    contractions: list[Contraction] = field(default_factory=list)
    varying: Sequence[np.ndarray | None] = ()
    lost: str = ""  # the operator since which a shape is unknown
    shape_only: bool = False  # nothing but the outputs' shapes is ever read
    used: set[int] = field(default_factory=set)
    noted: dict[str, Expr] = field(default_factory=dict)

    def note(self, name: str, expr: Expr) -> Expr:
        """Remember an axis that is not one of a tensor, such as a group count, for `PatchContext.noted`."""
        self.noted[name] = expr
        return expr

    def attr(self, name: str, default: Any = None) -> Any:
        """An attribute's value."""
        return self.node.attributes.get(name, default)

    def has(self, i: int) -> bool:
        """True where input i is present."""
        return i < len(self.node.inputs) and bool(self.node.inputs[i])

    def axes(self, i: int) -> tuple[Expr, ...]:
        """Axes of input i. Whatever a rule does not ask for gets frozen."""
        found = self.inputs[i] if i < len(self.inputs) else None
        if found is None:
            raise GiveUp(f"the shape of input {i} is unknown" + (f", since {self.lost}" if self.lost else ""))
        self.used.add(i)
        return found

    def rank(self, i: int) -> int:
        """Rank of input i."""
        return len(self.axes(i))

    def value(self, i: int) -> np.ndarray | None:
        """Value of input i where it is known without running the model, and the same for all sizes of the inputs."""
        varies = self.varying[i] if i < len(self.varying) else None
        return self.values[i] if i < len(self.values) and varies is None else None

    def pinned(self, i: int, what: str) -> np.ndarray:
        """As `known`, where it does not matter that the value may depend on the sizes of the inputs."""
        value = self.values[i] if i < len(self.values) else None
        if value is None:
            raise GiveUp(f"{what} are computed from the data")
        return value

    def constant(self, i: int, k: int) -> bool:
        """True where element k of the known input i is the same for all sizes of the inputs."""
        varies = self.varying[i] if i < len(self.varying) else None
        return varies is None or not bool(varies.reshape(-1)[k])

    def known(self, i: int, what: str) -> np.ndarray:
        """As `value`, but the node is given up where it is unknown."""
        value = self.value(i)
        if value is None:
            raise GiveUp(f"{what} are computed from the data or from a dynamic size")
        return value

    def output_shape(self, j: int = 0) -> tuple[int | None, ...]:
        """Sizes of output j."""
        shape = self.output_shapes[j] if j < len(self.output_shapes) else None
        if shape is None:
            raise GiveUp("the output's rank is unknown")
        return shape

    def fresh(self, size: int) -> Expr:
        """A new axis of which nothing is known yet."""
        return Atom(size)

    def frozen(self, size: int | None, reason: str = "not a channel axis") -> Expr:
        """A new axis that never loses an index."""
        return Atom(-1 if size is None else size, Barrier(self.barrier.node, self.barrier.op_type, reason))

    def product(self, *factors: Expr) -> Expr:
        """Row-major product."""
        return product(*factors)

    def sum(self, *parts: Expr) -> Expr:
        """Concatenation."""
        return sum_of(*parts)

    def split(self, expr: Expr, outer: int) -> tuple[Expr, Expr]:
        """Factor an axis into (outer, rest)."""
        return split(expr, outer, self.barrier)

    def cut(self, expr: Expr, sizes: Sequence[int]) -> list[Expr]:
        """Cut an axis into parts of these sizes (which add up to its size; zeros allowed)."""
        parts: list[Expr] = []
        for n in sizes:
            rest = resolve(expr)
            if n == 0:
                parts.append(Atom(0))
            elif n == rest.size:
                parts.append(rest)
                expr = Atom(0)
            else:
                left, expr = cut(rest, n, self.barrier)
                parts.append(left)
        return parts

    def equal(self, *exprs: Expr) -> None:
        """These axes are the same."""
        for other in exprs[1:]:
            equal(exprs[0], other, self.barrier)

    def freeze(self, reason: str, *exprs: Expr) -> None:
        """These axes keep all their indices, for this reason."""
        for expr in exprs:
            freeze(expr, Barrier(self.barrier.node, self.barrier.op_type, reason))

    def contract(
        self,
        kind: Kind,
        *operands: tuple[int, int],
        over: Expr | None = None,
        fold: bool = False,
        through: bool = False,
    ) -> None:
        """The axes at these (input, axis) positions are equal and disappear; or only `over`, a factor of theirs."""
        if over is None:
            self.equal(*(self.axes(i)[k] for i, k in operands))
            over = self.axes(operands[0][0])[operands[0][1]]
        self.contractions.append(Contraction(kind, operands, over, fold, through))

    def output(self, *axes: Expr, j: int = 0) -> None:
        """Axes of output j."""
        while len(self.outputs) <= j:
            self.outputs.append(None)
        self.outputs[j] = axes


class PatchContext(Protocol):
    """One node during the rewrite, after the axes got shorter."""

    @property
    def node(self) -> NodeView: ...

    def attr(self, name: str, default: Any = None) -> Any:
        """An attribute's value in the original."""

    def has(self, i: int) -> bool:
        """True where input i is present."""

    def value(self, i: int) -> np.ndarray | None:
        """Value of input i in the original."""

    def kept(self, i: int, axis: int) -> np.ndarray | None:
        """Kept positions of an axis of input i; None where all are kept."""

    def kept_out(self, axis: int, j: int = 0) -> np.ndarray | None:
        """Kept positions of an axis of output j; None where all are kept."""

    def before(self, i: int) -> tuple[int, ...]:
        """Shape of input i in the original."""

    def after(self, i: int) -> tuple[int, ...]:
        """Shape of input i now."""

    def before_out(self, j: int = 0) -> tuple[int, ...]:
        """Shape of output j in the original."""

    def after_out(self, j: int = 0) -> tuple[int, ...]:
        """Shape of output j now."""

    def noted(self, name: str) -> int:
        """Size now of an axis that the axis rule noted."""

    def set_attr(self, name: str, value: Any) -> None:
        """Set an attribute of the new node."""

    def want(self, i: int, value: np.ndarray) -> None:
        """Input i, which holds sizes or positions, must have this value now."""

    def add_input(self, i: int, value: np.ndarray) -> None:
        """Give the new node a constant input that it did not have."""

    def share(self, i: int, axis: int) -> float:
        """Kept indices of an axis over those that the masked original counts: the removed units of exact groups are
        zeros there, and are counted; those of inexact groups (`--allow-inexact`) are left out of it."""

    def scale(self, i: int, factor: float) -> None:
        """Multiply parameter input i by a constant."""

    def scale_output(self, factor: float, j: int = 0) -> None:
        """Multiply output j by a constant (a node is inserted)."""


class MaskContext(Protocol):
    """One reduction over the axis of an inexact group, in the masked original: its rule builds nodes that leave the
    removed units out."""

    @property
    def node(self) -> NodeView: ...

    def rank(self, i: int) -> int:
        """Rank of input i."""

    def has(self, i: int) -> bool:
        """True where input i is present."""

    def input(self, i: int) -> str:
        """Name of input i in the masked original."""

    def constant(self, value: Any, like: int = 0) -> str:
        """A constant of the type of input `like`; returns its name."""

    def mask(self, i: int) -> np.ndarray:
        """1 for kept and 0 for removed indices, broadcastable to input i."""

    def size(self, i: int, axes: Sequence[int]) -> int:
        """Number of elements over these axes of input i, before the mask."""

    def laid(self, i: int, axis: int) -> str:
        """Input i, a vector, in a shape that broadcasts along an axis of input 0."""

    def kept_fraction(self, i: int) -> float:
        """Share of kept indices over the masked axes of input i."""

    def before(self, op: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Insert a node in front; returns its output."""

    def summed(self, x: str, axes: Sequence[int]) -> str:
        """Insert a sum over axes, which are kept with size 1."""

    def replace_input(self, i: int, name: str) -> None:
        """Let the node read another tensor."""

    def become(self, op: str, inputs: Sequence[str]) -> None:
        """Turn the node itself into another one."""

    def scale_output(self, factor: float) -> None:
        """Multiply the output by a constant."""


class MirrorContext(Protocol):
    """One node while the mirror is built. What a rule does with the tensors it asks for is recorded, not run: they are
    `torch.fx.Proxy`s, on which torch's functions, methods and arithmetic work as usual. Sizes are integers where they
    are the same for every input, and proxies of integers where they are not."""

    @property
    def node(self) -> NodeView: ...

    @property
    def training(self) -> Any:
        """Whether the module is training when it runs (a proxy)."""

    @property
    def device(self) -> Any:
        """Where the module runs (a proxy), for functions that make tensors."""

    def attr(self, name: str, default: Any = None) -> Any:
        """An attribute's value."""

    def has(self, i: int) -> bool:
        """True where input i is present."""

    def tensor(self, i: int) -> Any:
        """Input i as a tensor. One of integers may be carried as floats that hold whole numbers, where the operator
        `carries`."""

    def shared(self, i: int) -> bool:
        """True where input i is a stored statistic that other nodes read too, so that none may update it."""

    def optional(self, i: int) -> Any:
        """As `tensor`; None where the input is absent."""

    def operand(self, i: int) -> Any:
        """As `tensor`, but a constant scalar is a Python number, so that it needs no tensor and no device."""

    def constant(self, i: int) -> np.ndarray | None:
        """The value of input i where it is no weight, and known to be the same for all inputs."""

    def known(self, i: int, what: str) -> np.ndarray:
        """As `constant`, but the node can't be mirrored where it is unknown; `what` names it: 'the axes'."""

    def ints(self, i: int) -> Any:
        """Input i, of rank 0 or 1 and small, as a list of sizes: integers or proxies of integers; a proxy of the whole
        list where it is computed from data."""

    def rank(self, i: int) -> int | None:
        """Rank of input i, where it is known."""

    def shape(self, i: int) -> tuple[int | None, ...] | None:
        """Shape of input i under the sizes that the model was loaded with: for parameters, and for ranks."""

    def used(self, j: int) -> bool:
        """Whether anything reads output j."""

    def output_rank(self, j: int = 0) -> int | None:
        """Rank of output j, where it is known."""

    def size(self, i: int, axis: int) -> Any:
        """The size of an axis of input i when the module runs."""

    def dtype(self, i: int) -> Any:
        """torch dtype of input i as the model declares it; None where it is unknown."""

    def output_dtype(self, j: int = 0) -> Any:
        """torch dtype of output j as the model declares it; None where it is unknown."""

    def torch_type(self, elem_type: int) -> Any:
        """torch dtype of an ONNX element type."""

    def elem_type(self, i: int) -> int:
        """ONNX element type of input i; 0 where it is unknown or absent."""

    def output_elem_type(self, j: int = 0) -> int:
        """ONNX element type of output j."""

    def stored(self, i: int) -> np.ndarray | None:
        """As `constant`, for stored tensors of any size."""

    def whole(self, i: int) -> Any:
        """Input i, a tensor of integers, as floats that hold whole numbers."""

    def weight(
        self, i: int, scale: np.ndarray, zero_point: np.ndarray, *, axis: int | None = None, block: int = 0
    ) -> Any:
        """A parameter with what the integers of input i stand for: (q - zero point) * scale, with one scale, one per
        index of an axis or one per block along it. None where the input is no stored tensor of several integers."""

    def carry(self, x: Any, elem_type: int, j: int = 0) -> Any:
        """Say that x, output j, holds integers of an ONNX type as floats. Returns it."""

    def call(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Record the call of a function: one that makes tensors, or one of `ops.kernels`."""

    def buffer(self, array: np.ndarray) -> Any:
        """A constant tensor that moves with the module."""

    def body(
        self, name: str, sources: Sequence[tuple[int, int | None] | None] = (), *, carried: int = 0
    ) -> tuple[Any, list[Any]]:
        """The body in graph attribute `name` as a module of its own, and the outer tensors that it wants as its last
        arguments.

        sources: per input of the body the node's input that it is at first, and the axis that is taken off it.
        carried: how many of the last ones the body's outputs behind the first become in the next iteration.
        """

    def inline(self, name: str) -> list[Any]:
        """The outputs of the body in graph attribute `name`, which has no inputs, recorded in place."""

    def module(self, module: Any, bodies: Mapping[str, Any], *args: Any) -> Any:
        """Record the call of a module, which becomes a part of the mirror. bodies: those that it holds under the
        names of the graph attributes."""

    def is_sequence(self, i: int) -> bool:
        """Whether input i is a sequence, or an optional value of unknown kind, and no tensor."""

    def unsupported(self, reason: str) -> Exception:
        """To be raised: this form of the operator can't be mirrored."""


Shape: TypeAlias = "tuple[int | None, ...] | None"
Term: TypeAlias = tuple[float, tuple[Expr, ...]]
AxisRule: TypeAlias = Callable[[AxisContext], None]
DeadRule: TypeAlias = Callable[[NodeView, Sequence["float | None"]], "float | None"]
PatchRule: TypeAlias = Callable[[PatchContext], None]
MacsRule: TypeAlias = Callable[[NodeView, Sequence["tuple[Expr, ...]"], Sequence["tuple[Expr, ...]"]], list[Term]]
MaskRule: TypeAlias = Callable[[MaskContext], None]
MirrorRule: TypeAlias = Callable[[MirrorContext], Any]
ShapeRule: TypeAlias = Callable[
    [NodeView, Sequence["tuple[int, tuple[int | None, ...]] | None"]],
    Sequence["tuple[int, tuple[int | None, ...]] | None"],
]
LinearRule: TypeAlias = Callable[[NodeView, int, Sequence[Shape]], "Linear | None"]
ShiftRule: TypeAlias = Callable[[NodeView, int], "tuple[int, int, int | None]"]
SlopeRule: TypeAlias = Callable[[NodeView, int, "Sequence[np.ndarray | None]", int], "np.ndarray | None"]
FlatRule: TypeAlias = Callable[[NodeView, "Sequence[np.ndarray | None]"], "Flat | None"]
