"""A network that somebody pruned, put back into the original's shapes with zeros where something was removed.

Nothing but the two files is needed: weights hardly ever repeat, so that what is left of a tensor tells from where in
the original it came. The pruned network has to give what this one gives; where it doesn't, the surgery changed more
than it removed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from onnxprune.verify.latency import open_session, run_options, sample

__all__ = ["embedded", "error_of", "places", "put_back"]


def places(whole: np.ndarray, part: np.ndarray) -> list[np.ndarray] | None:
    """The indices along each axis that cut `part` out of `whole`; None where they can't be told or there are none."""
    if whole.ndim != part.ndim:
        return None
    values, first, counts = np.unique(whole, return_index=True, return_counts=True)
    values, first = values[counts == 1], first[counts == 1]
    if not len(values):
        return None
    at = np.searchsorted(values, part.ravel()).clip(max=len(values) - 1)
    known = (values[at] == part.ravel()).reshape(part.shape)
    came = [c.reshape(part.shape) for c in np.unravel_index(first[at], whole.shape)]
    found = []
    for axis, size in enumerate(part.shape):
        if size == whole.shape[axis]:
            found.append(np.arange(size))
            continue
        rows, source = np.moveaxis(known, axis, 0).reshape(size, -1), np.moveaxis(came[axis], axis, 0).reshape(size, -1)
        if not rows.any(axis=1).all():
            return None
        found.append(source[np.arange(size), rows.argmax(axis=1)])
    return found if np.array_equal(whole[np.ix_(*found)], part) else None


def put_back(whole: np.ndarray, part: np.ndarray) -> np.ndarray | None:
    """`part` in its places in `whole` with zeros elsewhere; row by row where each was cut at other places, as the
    groups of a convolution may be. None where it is no part."""
    values = np.zeros_like(whole)
    found = places(whole, part)
    if found is not None:
        values[np.ix_(*found)] = part
        return values
    if whole.ndim < 2 or len(whole) != len(part):
        return None
    rows = [put_back(w, p) for w, p in zip(whole, part, strict=True)]
    return None if any(r is None for r in rows) else np.stack([r for r in rows if r is not None])


def embedded(original: onnx.ModelProto, pruned: onnx.ModelProto) -> onnx.ModelProto:
    """The original's graph with the pruned weights in their places and zeros elsewhere.

    Vectors whose places can't be told stay whole: what they add is multiplied by the zeros behind them. Raises
    ValueError where a tensor of more axes is no part of the original's.
    """
    left = {t.name: t for t in pruned.graph.initializer}
    made = onnx.ModelProto()
    made.CopyFrom(original)
    for tensor in made.graph.initializer:
        other = left.get(tensor.name)
        if other is None or other.data_type != tensor.data_type:
            continue
        whole, part = numpy_helper.to_array(tensor), numpy_helper.to_array(other)
        if not np.issubdtype(whole.dtype, np.floating) or whole.shape == part.shape:
            continue
        values = put_back(whole, part)
        if values is not None:
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        elif max(whole.ndim, part.ndim) > 1:
            raise ValueError(f"'{tensor.name}' {part.shape} is no part of the original's {whole.shape}")
    return made


def error_of(original: Path, pruned: Path) -> float:
    """The greatest difference between the pruned network and the original with what was removed at zero, relative to
    the greatest output. Raises ValueError, and ModelRejected where one of them doesn't run."""
    masked = embedded(onnx.load(original), onnx.load(pruned)).SerializeToString()
    a, b = (open_session(m, run_options(1, "basic")) for m in (masked, pruned))
    feed = sample(original, a, {}, 0)
    worst = 0.0
    for expected, found in zip(a.run(None, feed), b.run(None, feed), strict=True):
        if expected.shape != found.shape:
            raise ValueError(f"an output is {found.shape}, the original's is {expected.shape}")
        if np.issubdtype(expected.dtype, np.floating) and expected.size:
            worst = max(worst, float(np.abs(expected - found).max() / max(np.abs(expected).max(), 1e-30)))
    return worst
