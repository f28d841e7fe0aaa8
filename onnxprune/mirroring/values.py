"""From arrays to the mirror's tensors and back: inputs as it takes them, weights as the model stores them."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.fx import GraphModule

__all__ = ["as_array", "as_tensor", "stored_values"]

Path = tuple[str, ...]


def stored_values(mirror: GraphModule) -> dict[Path, np.ndarray]:
    """Every parameter and every statistic that training changes, by the path of its tensor in the model: what
    `rewrite.with_weights` takes. Tensors that the mirror quantises at use are given as the integers they stand for."""
    found: dict[Path, np.ndarray] = {}
    state = dict(mirror.named_parameters(remove_duplicate=False)) | dict(mirror.named_buffers(remove_duplicate=False))
    for target, path in mirror.meta["parameters"].items():
        tensor = state.get(target)
        if tensor is not None and tensor.dtype.is_floating_point:
            form = mirror.meta.get("quantised", {}).get(target)
            found[path] = as_array(tensor) if form is None else form.integers(as_array(tensor))
    return found


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """An input, float16 as float32: mirrors that compute in float32 take it as that."""
    half = array.dtype.kind == "f" and array.dtype.itemsize == 2
    return torch.from_numpy(np.ascontiguousarray(array.astype(np.float32) if half else array)).reshape(array.shape)


def as_array(tensor: torch.Tensor | nn.Parameter) -> np.ndarray:
    """A copy on the CPU; bfloat16, which numpy lacks, as float32."""
    tensor = tensor.detach().to("cpu", copy=True)
    return tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
