"""What calibration data tells of a network's units: how active they are where they are read, what their absence does to
the output, and what the others can make up for."""

from __future__ import annotations

from onnxprune.calibrate.calibration import Calibration

__all__ = ["Calibration"]
