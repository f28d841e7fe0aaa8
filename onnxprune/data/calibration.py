"""Data as onnxruntime's quantizers take it: a reader whose `get_next()` gives one feed after the other, and then None.

The same object is taken by `compress(data=...)`, so that what a model is pruned and repaired on is what its int8 ranges
are measured on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from onnxprune.data.batching import Source

if TYPE_CHECKING:
    import onnx

    from onnxprune.data.preprocess import Preprocess

__all__ = ["CalibrationReader"]

Feed = dict[str, np.ndarray]


class CalibrationReader:
    """The inputs of a source, as an onnxruntime.quantization.CalibrationDataReader; targets are left out.

    source: see `open_data`. batch: samples per feed; a model of a fixed batch size gets feeds of that. samples: stop
    behind the feed that completes as many; None gives all.

    After the None at the end of a pass the next one begins, so that several models can be quantised with one reader.
    `open_data` takes a reader for its source, with targets and without the limit.
    """

    def __init__(self, source: Source, *, batch: int = 1, samples: int | None = None) -> None:
        if batch < 1 or (samples is not None and samples < 1):
            raise ValueError(f"no feeds of {batch} samples, {samples} in all")
        self.source, self.batch, self.samples = source, batch, samples
        self._range: tuple[int, int | None] = (0, None)
        self._pass: Iterator[Feed] | None = None

    @classmethod
    def open(
        cls,
        model: str | os.PathLike[str] | onnx.ModelProto,
        data: object,
        *,
        preprocess: str | Preprocess | None = None,
        batch: int = 1,
        samples: int | None = None,
    ) -> CalibrationReader:
        """A reader of data in any form that `open_data` takes, for this model and all that are pruned from it.

        Raises ModelRejected, DataError, UsageError.
        """
        from onnxprune.data.signature import signature_of
        from onnxprune.data.source import open_data
        from onnxprune.model.load import load

        return cls(open_data(data, signature_of(load(model)), preprocess=preprocess), batch=batch, samples=samples)

    def get_next(self) -> Feed | None:
        """The next feed, arrays by the names of the inputs; None at the end of a pass. Raises DataError."""
        if self._pass is None:
            self._pass = iter(self)
        feed = next(self._pass, None)
        if feed is None:
            self._pass = None
        return feed

    def rewind(self) -> None:
        """Begin anew with the next `get_next()`."""
        self._pass = None

    def set_range(self, start_index: int, end_index: int) -> None:
        """From now on give the feeds of these numbers only, as onnxruntime's CalibStridedMinMax asks for them."""
        self._range = (start_index, end_index)
        self._pass = None

    def __len__(self) -> int:
        """Feeds in a pass over everything."""
        return sum(1 for _ in self._feeds())

    def __iter__(self) -> Iterator[Feed]:
        """A pass of its own, which leaves `get_next()` where it is."""
        return islice(self._feeds(), *self._range)

    def __deepcopy__(self, memo: object) -> CalibrationReader:
        """Another reader of the same source: onnxruntime copies readers that it passes over twice."""
        return type(self)(self.source, batch=self.batch, samples=self.samples)

    def _feeds(self) -> Iterator[Feed]:
        given = 0
        for batch in self.source.batches(self.batch):
            if self.samples is not None and given >= self.samples:
                return
            given += batch.size
            yield batch.inputs
