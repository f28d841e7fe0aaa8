"""Models that declare any batch and take one sample: an error that says so."""

from __future__ import annotations

import pytest
import torch

from onnxprune.errors import DataError
from onnxprune.mirroring import mirror
from onnxprune.model.load import load
from onnxprune.train.batching import Unfitting, fitting, takes_several
from tests.graphs import from_text


def test_shapes_that_do_not_fit_are_an_error_of_the_data_with_a_hint() -> None:
    with pytest.raises(Unfitting, match=r"can't be computed on 4 samples at once: .*size") as raised, fitting(4):
        torch.ones(4, 3) + torch.ones(2, 3)
    assert isinstance(raised.value, DataError) and "--batch-size 1" in raised.value.hint


def test_want_of_memory_is_told_as_it_is() -> None:
    with pytest.raises(torch.OutOfMemoryError), fitting(4):
        raise torch.OutOfMemoryError("no memory")


@pytest.mark.parametrize(("shape", "several"), [("1, 4", False), ("-1, 4", True)])
def test_what_a_file_declares_is_tried(shape: str, several: bool) -> None:
    text = f"(float[N,4] x) => (float[N,4] y) <int64[2] s = {{{shape}}}> {{ y = Reshape(x, s) }}"
    graph = load(from_text(text))
    assert takes_several(mirror(graph), graph) is several
