"""Sizes of a mirror's tensors, as a run finds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

__all__ = ["Shapes", "tensor_shapes"]

Shapes = dict[Node, tuple[int, ...]]


@torch.no_grad()
def tensor_shapes(mirror: GraphModule, inputs: Sequence[Tensor]) -> Shapes:
    """By the node that computes it. Raises what torch raises where the mirror can't be run on the inputs."""
    seen = _Recorder(mirror)
    seen.run(*inputs)
    return seen.shapes


class _Recorder(Interpreter):
    def __init__(self, mirror: GraphModule) -> None:
        super().__init__(mirror)
        self.shapes: Shapes = {}

    def run_node(self, n: Node) -> Any:
        found = super().run_node(n)
        if isinstance(found, Tensor):
            self.shapes[n] = tuple(found.shape)
        return found
