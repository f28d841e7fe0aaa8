"""Models that declare any batch and take one sample: an error that says so."""

from __future__ import annotations

import pytest
import torch

from onnxprune.errors import DataError
from onnxprune.train.batching import Unfitting, fitting


def test_shapes_that_do_not_fit_are_an_error_of_the_data_with_a_hint() -> None:
    with pytest.raises(Unfitting, match=r"can't be computed on 4 samples at once: .*size") as raised, fitting(4):
        torch.ones(4, 3) + torch.ones(2, 3)
    assert isinstance(raised.value, DataError) and "--batch-size 1" in raised.value.hint


def test_want_of_memory_is_told_as_it_is() -> None:
    with pytest.raises(torch.OutOfMemoryError), fitting(4):
        raise torch.OutOfMemoryError("no memory")
