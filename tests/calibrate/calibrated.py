"""What the tests of calibration share: an analysed model with data for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from onnxprune.axes.analysis import Analysis, analyse
from onnxprune.calibrate import Calibration
from onnxprune.data import open_data, signature_of
from onnxprune.model.load import load

__all__ = ["calibration_of", "outputs"]


def calibration_of(
    model: onnx.ModelProto, data: dict[str, np.ndarray], *, samples: int | None = None, **more: Any
) -> Calibration:
    analysis: Analysis = analyse(load(model))
    source = open_data(data, signature_of(analysis.graph))
    return Calibration(analysis, source, samples or len(next(iter(data.values()))), **more)


def outputs(model: onnx.ModelProto, data: dict[str, np.ndarray], *names: str) -> list[np.ndarray]:
    """Tensors of a model, by onnxruntime."""
    import onnxruntime as ort

    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    del shown.graph.output[:]
    shown.graph.output.extend(onnx.helper.make_empty_tensor_value_info(n) for n in names)
    runner = ort.InferenceSession(shown.SerializeToString(), providers=["CPUExecutionProvider"])
    return [np.asarray(x, np.float64) for x in runner.run(list(names), data)]
