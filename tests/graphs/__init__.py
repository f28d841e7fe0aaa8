"""Random small models, put together from the constructs that exporters write.

A block takes a tensor and adds one construct to the graph: a convolution, an attention, a channel shuffle. Which one,
and how it is spelled (weights in initializers, in Constant nodes or behind a Transpose; sizes written out or computed
from Shape; the forms of old and new opsets), is drawn from `Choices`: from hypothesis in a property, from a seed in a
script.

    model = random_model(7)                      # by seed
    @given(models()) def test_...(model): ...    # by hypothesis, which makes a failing model as small as it can
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import onnx
from hypothesis import strategies as st
from onnx import TensorProto

from tests.graphs.builder import WIDTHS, Builder, Choices, Drawn, Seeded, Size, Tensor
from tests.graphs.images import IMAGE, image_to_rows, to_sequence
from tests.graphs.layers import conv, linear
from tests.graphs.rearranged import REARRANGED
from tests.graphs.rows import ROWS, rows_to_image
from tests.graphs.sequences import SEQUENCE, sequence_to_rows
from tests.graphs.stored import STORED
from tests.graphs.text import from_text, random_weight

__all__ = [
    "Block",
    "Builder",
    "Choices",
    "Seeded",
    "Tensor",
    "build",
    "from_text",
    "models",
    "random_model",
    "random_weight",
]

Block: TypeAlias = Callable[[Builder, Tensor], Tensor]

BATCH = "N"
OPSETS = (17, 9, 10, 11, 13, 18, 21, 23)
KINDS: dict[int, tuple[Block, ...]] = {4: IMAGE + REARRANGED, 3: SEQUENCE, 2: ROWS}
BRIDGES: dict[int, tuple[Block, ...]] = {4: (image_to_rows, to_sequence), 3: (sequence_to_rows,), 2: (rows_to_image,)}
LARGEST = 150  # an axis that grew longer is led back to a few channels


def start(b: Builder) -> Tensor:
    """A graph input and a first layer of free width."""
    kind = b.pick(["image", "sequence", "rows", "ids"])
    if kind == "image":
        return conv(b, b.input((b.batch, 3, b.pick([4, 6]), b.pick([4, 6]))))
    if kind == "sequence":
        return linear(b, b.input((b.batch, b.pick([3, 4, 5, 6]), 5)))
    if kind == "rows":
        return linear(b, b.input((b.batch, 7)))
    ids = b.input((b.batch, b.pick([3, 4, 5])), TensorProto.INT64)
    table = b.weight((9, b.pick(WIDTHS)), 1)
    return b.node("Gather", [table, ids], (*ids.shape, table.shape[1]), axis=0)


def head(b: Builder, x: Tensor) -> Tensor:
    """A last layer, so that what comes before is free."""
    if x.rank == 4:
        return conv(b, x, 3, kernel=1)
    return linear(b, x, 3)


def build(
    choose: Choices, *, blocks: int = 6, opset: int | None = None, only: Sequence[Block] | None = None
) -> onnx.ModelProto:
    """A model of up to `blocks` blocks. only: blocks to take where they fit."""
    batch: Size = BATCH if choose.integer(0, 1) else 2
    b = Builder(choose, opset or OPSETS[choose.integer(0, len(OPSETS) - 1)], batch, STORED)
    x = start(b)
    for _ in range(blocks):
        if not choose.integer(0, 7):
            break
        if b.chance(5):
            x = b.pick(BRIDGES[x.rank])(b, x)
        options = [k for k in KINDS[x.rank] if only is None or k in only] or KINDS[x.rank]
        x = b.pick(options)(b, x)
        if any(isinstance(n, int) and n > LARGEST for n in x.shape):
            x = head(b, x)
        if b.chance(12):
            b.output(x)
    b.output(head(b, x) if not b.chance(5) else x)
    return b.model()


def random_model(seed: int, **options: Any) -> onnx.ModelProto:
    """The model of a seed."""
    return build(Seeded(seed), **options)


@st.composite
def models(draw: Any, **options: Any) -> onnx.ModelProto:
    """Models drawn from hypothesis."""
    return build(Drawn(draw), **options)
