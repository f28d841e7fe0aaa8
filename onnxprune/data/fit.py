"""Does the data fit the model? Names, ranks, sizes and dtypes are checked without touching values; values are then
scaled, cast and looked through for NaN.

The idea: everything becomes *rows*, arrays whose leading axis counts what the source counts. A row is a sample, or a
complete feed where a model's inputs share no batch axis (`Fit.whole`). How to get rows follows from the rank of the
data against that of the input: one less is one sample, equal is a batch, one more is a stack of feeds.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from onnxprune.data.hooks import quoted
from onnxprune.data.preprocess import Preprocess, channel_axis
from onnxprune.data.signature import Port, Signature, shape_text
from onnxprune.errors import DataError, UsageError

__all__ = ["Fit", "Rows", "as_array"]

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Rows:
    """`count` rows of every input and target, and where they came from.

    single: they came as one sample, not as a batch. numbers: of the rows, in what they came from, where it has more.
    """

    inputs: Arrays
    targets: Arrays
    count: int
    where: str
    single: bool = False
    numbers: Sequence[int] | None = None

    def label(self, row: int) -> str:
        """What to call a row in a message."""
        if self.numbers is None and self.count == 1:
            return self.where
        return f"{self.where}, sample {row if self.numbers is None else self.numbers[row]}"

    def take(self, index: slice | np.ndarray) -> Rows:
        """Some of the rows; their numbers are lost."""
        inputs = {n: a[index] for n, a in self.inputs.items()}
        count = len(next(iter(inputs.values())))
        return Rows(inputs, {n: a[index] for n, a in self.targets.items()}, count, self.where, self.single)

    def same_form(self, other: Rows) -> bool:
        """Whether rows of both can stand in one batch."""
        return all(
            a.shape[1:] == b[n].shape[1:]
            for mine, b in ((self.inputs, other.inputs), (self.targets, other.targets))
            for n, a in mine.items()
        )


def as_array(value: Any, name: str, where: str) -> np.ndarray:
    """A numpy array of anything array-like; torch tensors come to the CPU. Raises DataError."""
    if isinstance(value, np.ndarray):
        return value
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        return (value.float() if "bfloat16" in str(value.dtype) else value).numpy()
    try:
        array = np.asarray(value)
    except Exception as error:
        raise DataError(
            f"{where} gives {name} as {type(value).__name__}, which makes no array: {error}",
            "give numpy arrays or torch tensors; lists need rows of one length",
        ) from None
    if array.dtype == object:
        raise DataError(
            f"{where} gives {name} as {type(value).__name__}, which makes no array of numbers",
            "give numpy arrays or torch tensors",
        )
    return array


class Fit:
    """The checks for one model; what the first record showed, later ones have to keep to.

    whole: a row is a complete feed, because the inputs share no batch axis or because the data stacks feeds.
    """

    def __init__(self, signature: Signature, preprocess: Preprocess) -> None:
        if not signature.inputs:
            raise DataError("the model has no inputs that data could be given for")
        self.signature = signature
        self.preprocess = preprocess
        self.names = tuple(p.name for p in signature.inputs)
        self.image_inputs = any(channel_axis(p) is not None for p in signature.inputs)
        self._apart = self.whole = signature.whole
        self._fixed = signature.batch
        self._admitted = False
        self._targets: dict[str, tuple[np.dtype, int]] | None = None
        if preprocess.layout is not None and not self.image_inputs:
            raise UsageError("--preprocess layout=... is for inputs of rank 4, and the model has none", "leave it out")

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the targets, once a record was seen."""
        return tuple(self._targets or ())

    def split(self, raw: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Inputs and targets by name. Arrays that np.savez named arr_0, arr_1, ... are taken by position."""
        if all(f"arr_{k}" in raw for k in range(len(raw))) and len(raw) >= len(self.names):
            renamed = {f"arr_{k}": name for k, name in enumerate(self.names)}
            raw = {renamed.get(n, n): a for n, a in raw.items()}
        missing = [n for n in self.names if n not in raw]
        if missing:
            plural = len(self.names) > 1
            free = [str(n) for n in raw if n not in self.names]
            near = difflib.get_close_matches(missing[0], free, 1, 0.5) or (free if len(free) == 1 else [])
            hint = f"'{missing[0]}' is missing: name the data as the model's inputs are named"
            if near:
                hint = f"rename '{near[0]}' to '{missing[0]}'"
            raise DataError(
                f"the model's input{'s are' if plural else ' is'} {quoted(self.names)}; "
                f"{where} gives {quoted(str(n) for n in raw)}",
                hint,
            )
        return {n: raw[n] for n in self.names}, {str(n): a for n, a in raw.items() if n not in self.names}

    def admit(self, inputs: Mapping[str, np.ndarray], targets: Mapping[str, np.ndarray], where: str) -> Rows:
        """Views of the arrays as rows. Reads no values, so arrays may be mapped files. Raises DataError."""
        ranks = {p.name: inputs[p.name].ndim - len(p.shape) for p in self.signature.inputs if p.shape is not None}
        extra = min(ranks.values(), key=lambda e: (abs(e), -e)) if ranks else 0
        views: Arrays = {}
        for port in self.signature.inputs:
            array = self.preprocess.oriented(port, inputs[port.name])
            if ranks.get(port.name, extra) != extra or not -1 <= extra <= 1 or (self._apart and extra < 0):
                raise self._misfit(port, inputs[port.name].shape, where)
            views[port.name] = array
        whole = self._wholeness(views, extra)
        if self._admitted and whole != self.whole:
            first = self.signature.inputs[0]
            raise self._misfit(first, inputs[first.name].shape, where)
        single = extra == -1 or (whole and extra == 0)
        squeeze = extra == 1 and not whole
        views = {n: self._rows(a, single, squeeze) for n, a in views.items()}
        for port in self.signature.inputs:
            want = None if port.shape is None else port.shape if whole else port.shape[1:]
            found = views[port.name].shape[1:]
            if want is not None and not _agree(want, found):
                raise self._misfit(port, inputs[port.name].shape, where)
            self._check_dtype(port, views[port.name].dtype, where)
        count = self._count(views, where)
        rows = {
            n: self._target(n, a, single, squeeze, count, where)
            for n, a in targets.items()
            if single or not _is_note(a, count)
        }
        self.whole, self._admitted = whole, True
        return Rows(views, rows, count, where, single)

    def _wholeness(self, views: Arrays, extra: int) -> bool:
        """Whether rows are feeds: by the signature, or because the data stacks feeds that can't be merged."""
        if self._apart or extra != 1:
            return self._apart
        return self._fixed not in (None, 1) or any(a.shape[1] != 1 for a in views.values())

    @staticmethod
    def _rows(array: np.ndarray, single: bool, squeeze: bool) -> np.ndarray:
        if single:
            return array[None]
        return array[:, 0] if squeeze and array.ndim > 1 and array.shape[1] == 1 else array

    def _count(self, views: Arrays, where: str) -> int:
        counts = {n: a.shape[0] for n, a in views.items()}
        if len(set(counts.values())) > 1:
            each = ", ".join(f"{c} for '{n}'" for n, c in counts.items())
            raise DataError(
                f"{where} gives inputs of different lengths: {each}",
                "the first axis counts samples: every input needs the same number",
            )
        return next(iter(counts.values()))

    def _target(self, name: str, array: np.ndarray, single: bool, squeeze: bool, count: int, where: str) -> np.ndarray:
        rows = self._rows(array, single, squeeze)
        if len(rows) != count:
            samples = f"{count} sample{'s' if count != 1 else ''}"
            raise DataError(
                f"{where} gives {samples}, but {len(rows)} rows for the target '{name}'",
                "every array that is no input is a target and needs one row per sample; leave out what is none",
            )
        return rows

    def _check_dtype(self, port: Port, found: np.dtype, where: str) -> None:
        changed = self.preprocess.applies(port, image_inputs=self.image_inputs)
        if not changed and castable(found, port.dtype):
            return
        wanted = "text" if port.dtype.kind == "O" else _dtype_text(port.dtype)
        wants = f"input '{port.name}' wants {wanted}, {where} gives {_dtype_text(found)}"
        if changed:
            if not _floating(port.dtype):
                raise DataError(
                    f"input '{port.name}' wants {_dtype_text(port.dtype)}, and --preprocess scale, mean and std "
                    "make floats",
                    "leave them out: such a model scales by itself",
                )
            if found.kind in "biu" or _floating(found):
                return
            raise DataError(wants, "--preprocess works on numbers only")
        short = port.name if port.name.isidentifier() else "x"
        hint = f"convert it: {short}.astype(np.{_dtype_text(port.dtype)})"
        if found.kind in "UST":
            hint = "give numbers; text is for models with text inputs"
        elif found == np.uint8 and _floating(port.dtype):
            hint = "pixels? try --preprocess scale=1/255"
        elif port.dtype == np.uint8 and _floating(found):
            hint = "the model takes whole numbers 0 to 255: give the pixels as they are, not scaled"
        raise DataError(wants, hint)

    def _misfit(self, port: Port, found: tuple[int, ...], where: str) -> DataError:
        gives = shape_text(found) if found else "a single value"
        message = f"input '{port.name}' wants {port}, {where} gives {gives}"
        return DataError(message, self._hint(port, found))

    def _hint(self, port: Port, found: tuple[int, ...]) -> str:
        """The likeliest way to make data of this shape fit."""
        assert port.shape is not None
        axis = channel_axis(port)
        if axis is not None and len(found) >= 3 and self.preprocess.layout is None:
            if axis == 1 and _fits(port, (*found[:-3], found[-1], *found[-3:-1])):
                return "NHWC data? try --preprocess layout=nhwc"
            if axis == 3 and _fits(port, (*found[:-3], *found[-2:], found[-3])):
                return "NCHW data? try --preprocess layout=nchw"
        for k in range(1, len(port.shape)):
            at = k - len(port.shape)
            if port.shape[k] == 1 and _fits(port, _inserted(found, at + 1)):
                what = "channel axis" if k == axis else "axis of size 1"
                return f"the {what} is missing: give np.expand_dims(x, {at})"
        if self._apart:
            return f"the inputs share no batch axis: give complete feeds, of shape {port} each, or a stack of them"
        known = [d for d in port.shape[1:] if d is not None]
        if len(known) == len(port.shape) - 1 and len(found) > 1 and np.prod(found[1:]) == np.prod(known):
            return f"the same number of values: x.reshape({', '.join(str(d) for d in (-1, *known))})"
        if axis is not None and len(found) in (3, 4):
            sides = [d for k, d in enumerate(port.shape) if k not in (0, axis)]
            if None not in sides:
                return f"the model takes {sides[0]}x{sides[1]} pixels only: resize the data before saving it"
        sample = shape_text(port.shape[1:], lead="?")
        return f"the first axis counts samples: give batches of shape {port}, or samples of shape {sample}"

    def convert(self, rows: Rows) -> Rows:
        """Scaled, cast to the model's dtypes, and copied: plain contiguous arrays of the caller's own.

        Raises DataError where a float input holds NaN or an infinite value, and where targets changed.
        """
        inputs: Arrays = {}
        for port in self.signature.inputs:
            array = rows.inputs[port.name]
            if self.preprocess.applies(port, image_inputs=self.image_inputs):
                array = self.preprocess.values(port, array)
            with np.errstate(over="ignore", invalid="ignore"):
                out = np.array(array, dtype=port.dtype, order="C", copy=True, subok=False)
            if _floating(port.dtype):
                _check_finite(out, port.name, rows.label)
            inputs[port.name] = out
        targets = {n: np.array(a, order="C", copy=True, subok=False) for n, a in rows.targets.items()}
        targets = {n: a.astype(a.dtype.newbyteorder("="), copy=False) for n, a in targets.items()}
        self._check_targets(targets, rows.where)
        return replace(rows, inputs=inputs, targets=targets)

    def _check_targets(self, targets: Arrays, where: str) -> None:
        forms = {n: (a.dtype, a.ndim) for n, a in targets.items()}
        if self._targets is None:
            self._targets = forms
        if forms.keys() != self._targets.keys():
            raise DataError(
                f"{where} gives the targets {quoted(forms)}, the data before it {quoted(self._targets)}",
                "give the same targets with every sample",
            )
        for name, form in forms.items():
            if form != self._targets[name] and form[0].kind not in "USO":
                texts = [f"{_dtype_text(d)} of rank {r}" for d, r in (form, self._targets[name])]
                raise DataError(
                    f"{where} gives the target '{name}' as {texts[0]}, the data before it as {texts[1]}",
                    "give it the same form every time",
                )


def _is_note(array: np.ndarray, count: int) -> bool:
    """Whether an array beside a batch is no target, but a single number or a list of names such as the classes."""
    return array.ndim == 0 or (array.dtype.kind in "US" and array.shape[0] != count)


@cache
def castable(found: np.dtype, wanted: np.dtype) -> bool:
    """Whether values may be cast without a word: the same dtype, text, integers that widen, float32 and float64 to
    whatever floats the model takes, other floats to wider ones."""
    if wanted.kind == "O":
        return found.kind in "OUST"
    if found.newbyteorder("=") == wanted:
        return True
    if _floating(wanted):
        return found.name in ("float32", "float64") or (_floating(found) and np.can_cast(found, wanted))
    return wanted.kind in "iu" and found.kind in "iu" and np.can_cast(found, wanted)


@cache
def _floating(dtype: np.dtype) -> bool:
    return dtype.kind == "f" or dtype.name == "bfloat16" or dtype.name.startswith("float")


def _dtype_text(dtype: np.dtype) -> str:
    return "text" if dtype.kind in "UST" else dtype.name


def _agree(want: Sequence[int | None], found: Sequence[int]) -> bool:
    return len(want) == len(found) and all(w is None or w == f for w, f in zip(want, found, strict=True))


def _fits(port: Port, shape: tuple[int, ...]) -> bool:
    """Whether the trailing sizes of a batch or sample of this shape are those of the input."""
    assert port.shape is not None
    inner = port.shape[1:]
    return len(shape) - len(inner) in (0, 1) and _agree(inner, shape[len(shape) - len(inner) :])


def _inserted(shape: tuple[int, ...], at: int) -> tuple[int, ...]:
    """A shape with a 1 inserted; at: how many axes (negated) come behind it."""
    cut = len(shape) + at
    return (*shape[:cut], 1, *shape[cut:]) if cut >= 0 else shape


def _check_finite(array: np.ndarray, name: str, label: Callable[[int], str]) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        # A sum is several times faster than isfinite and, overflow aside, is finite only where all values are.
        if array.ndim == 0 or np.isfinite(array.sum(dtype=np.float64 if array.dtype == np.float64 else np.float32)):
            return
        finite = np.isfinite(array)
    if finite.all():
        return
    row = int(np.argmin(finite.reshape(len(array), -1).all(axis=1)))
    kind = "NaN" if np.isnan(array[row]).any() else "an infinite value"
    raise DataError(f"{label(row)}: input '{name}' holds {kind}", "repair that sample or leave it out")
