"""Repair without training: a layer's other weights make up for what pruning took from its input."""

from __future__ import annotations

from onnxprune.reconstruct.repair import ConsumerRepair, Repaired, repair

__all__ = ["ConsumerRepair", "Repaired", "repair"]
