"""The user's data, in the forms people already have it, as a stream of batches that fit the model.

`open_data` tells the form by content and checks the first batch; the `Source` it gives streams, shuffles, resumes
and shards. Training, calibration and evaluation in onnxruntime read the same sources, so nothing here needs torch.
"""

from __future__ import annotations

from onnxprune.data.calibration import CalibrationReader
from onnxprune.data.hooks import load_callable
from onnxprune.data.preprocess import Preprocess
from onnxprune.data.signature import Port, Signature, signature_of
from onnxprune.data.source import Batch, Source, open_data

__all__ = [
    "Batch",
    "CalibrationReader",
    "Port",
    "Preprocess",
    "Signature",
    "Source",
    "load_callable",
    "open_data",
    "signature_of",
]
