"""`open_data`: from whatever the user calls data to a source of batches that fit the model.

The form is told by content, never by an option; the beginning is checked before anything long is started.
"""

from __future__ import annotations

import ast
import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from onnxprune.data.arrays import Scratch
from onnxprune.data.batching import Batch, IndexedSource, Source, StreamSource
from onnxprune.data.calibration import CalibrationReader
from onnxprune.data.files import array_files, mapping_records, open_arrays, open_test_sets, test_sets
from onnxprune.data.fit import Fit, as_array
from onnxprune.data.hooks import closest, hook_error, load_callable, quoted
from onnxprune.data.images import SUFFIXES, ImageRecords
from onnxprune.data.passes import Passes
from onnxprune.data.preprocess import Preprocess
from onnxprune.data.records import counted
from onnxprune.data.signature import Signature
from onnxprune.data.stream import Draws, ItemRecords, parse_item
from onnxprune.errors import DataError

__all__ = ["Batch", "Source", "open_data"]

_FORMS = (
    "data is a .npz or .npy file, a folder of those, of test_data_set_* or of images, or FILE.py:NAME of a function "
    "that returns an iterable"
)


def open_data(
    spec: object,
    signature: Signature,
    *,
    preprocess: str | Preprocess | None = None,
    cache: Path | None = None,
) -> Source:
    """Open data and check its beginning against a model's inputs: names, dtypes, ranks, fixed sizes, no NaN.

    spec: a path (.npz with arrays named as the inputs, first axis = samples, other names = targets; .npy for a model
    of one input; a folder of those, of `test_data_set_*/input_N.pb`, or of images, where subfolders are classes and
    give the target `label`), 'file.py:name' or 'package.module:name' of a function, or in Python any of: a function,
    a dict of arrays, an array, a sequence of samples, an iterable or DataLoader of dicts, (inputs, target) pairs or
    bare arrays, or an object with `get_next()`; of a CalibrationReader, its source.
    cache: folder for copies of compressed arrays and of what can be read only once; a temporary one if None.
    Raises DataError for data that does not fit, UsageError for a `preprocess` that makes no sense.
    """
    if isinstance(spec, CalibrationReader):
        spec = spec.source
    if isinstance(spec, Source):
        return spec
    if not signature.inputs:
        raise DataError("the model has no inputs that data could be given for")
    asked = Preprocess.parse(preprocess) if isinstance(preprocess, str) else preprocess or Preprocess()
    return _Opener(signature, asked, Scratch(cache)).open(spec)


class _Opener:
    def __init__(self, signature: Signature, asked: Preprocess, scratch: Scratch) -> None:
        self._signature, self._asked, self._scratch = signature, asked, scratch

    def open(self, spec: object) -> Source:
        if isinstance(spec, (str, os.PathLike)):
            return self._text(os.fspath(spec))
        if _is_function(spec):
            return self._function(spec, getattr(spec, "__qualname__", type(spec).__name__))  # type: ignore[arg-type]
        return self._object(spec, None, f"the {type(spec).__name__} given as data")

    def _fit(self) -> Fit:
        return Fit(self._signature, self._asked.for_arrays())

    def _text(self, text: str) -> Source:
        path = Path(text).expanduser()
        if path.is_dir():
            return self._folder(path)
        if path.is_file():
            return self._file(path)
        where, colon, name = text.rpartition(":")
        if colon and where and name.isidentifier() and not os.path.isabs(text[len(where) - 1 :]):
            return self._function(load_callable(text), text)
        beside = [f.name for f in path.parent.iterdir()] if path.parent.is_dir() else []
        near = closest(path.name, beside)
        raise DataError(f"{text} does not exist", near if near.startswith("did") else _FORMS)

    def _file(self, path: Path) -> Source:
        with path.open("rb") as file:
            head = file.read(6)
        if head[:2] == b"PK" or head == b"\x93NUMPY":
            fit = self._fit()
            return IndexedSource(open_arrays(path, fit, self._scratch), fit)
        if path.suffix == ".py":
            raise DataError(f"{path} is a Python file: say which of its functions gives the data", _functions(path))
        if path.suffix.lower() in SUFFIXES:
            raise DataError(f"{path} is one image", "give the folder that holds the images")
        if path.suffix == ".pb":
            raise DataError(f"{path} is one tensor", "give the folder that holds input_0.pb, or the folder above")
        what = "is empty" if not head else "is neither .npz nor .npy"
        raise DataError(f"{path} {what}", _FORMS)

    def _folder(self, path: Path) -> Source:
        images = next((f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file()), None)
        kinds = {"test_data_set folders": test_sets(path), "arrays": array_files(path), "images": images}
        found = [kind for kind, holds in kinds.items() if holds]
        if len(found) > 1:
            raise DataError(f"{path} holds {' and '.join(found)}", "give a folder that holds one kind of data")
        if not found:
            names = sorted(f.name for f in path.iterdir())
            raise DataError(f"{path} holds no data that is known: it has {quoted(names, limit=4)}", _FORMS)
        if images:
            fit = Fit(self._signature, self._asked.for_images(self._signature.inputs[0]))
            return IndexedSource(ImageRecords(path, fit), fit)
        fit = self._fit()
        if found == ["arrays"]:
            return IndexedSource(open_arrays(path, fit, self._scratch), fit)
        return IndexedSource(open_test_sets(path, fit), fit)

    def _function(self, function: Callable[[], Any], name: str) -> Source:
        try:
            inspect.signature(function).bind()
        except TypeError as error:
            raise DataError(f"{name} is called without arguments: {error}", "give its arguments defaults") from None
        except ValueError:
            pass  # a builtin that doesn't tell its arguments
        try:
            with Draws(0, 0):
                made = function()
        except (Exception, SystemExit) as error:
            raise hook_error(name, error) from error
        if isinstance(made, (str, os.PathLike)):
            if ":" not in os.fspath(made) and not Path(made).expanduser().exists():
                raise DataError(f"{name} gives the path '{os.fspath(made)}', which does not exist", _FORMS)
            return self._text(os.fspath(made))
        return made if isinstance(made, Source) else self._object(made, function, name)

    def _object(self, made: Any, make: Callable[[], Any] | None, name: str) -> Source:
        fit = self._fit()
        if made is None:
            raise DataError(f"{name} gives None", "does the function return what it makes?")
        if isinstance(made, Mapping):
            arrays = {str(n): as_array(a, f"'{n}'", name) for n, a in made.items()}
            return IndexedSource(mapping_records(arrays, fit, name, name), fit)
        if isinstance(made, np.ndarray) or hasattr(made, "detach"):
            array = as_array(made, "the data", name)
            return IndexedSource(mapping_records({"arr_0": array}, fit, name, name), fit)
        if _is_sequence(made):
            records = _samples(made, name, fit)
            if records is not None:
                return IndexedSource(records, fit)
        return StreamSource(Passes(made, make, name, fit, self._scratch), name, fit)


def _is_function(spec: object) -> bool:
    """Whether to call it: functions and classes, not objects that are data and can be called as well."""
    if isinstance(spec, type) or inspect.isroutine(spec):
        return True
    return callable(spec) and not any(hasattr(spec, n) for n in ("get_next", "__iter__", "__getitem__"))


def _is_sequence(made: Any) -> bool:
    names = ("__len__", "__getitem__")
    return all(hasattr(made, n) for n in names) and not any(hasattr(made, n) for n in ("__next__", "get_next"))


def _samples(made: Any, name: str, fit: Fit) -> ItemRecords | None:
    """Records where the items are single samples; None where they are batches."""
    try:
        count = len(made)
        with Draws(0, 0, 0):
            first = made[0] if count else None
    except (Exception, SystemExit) as error:
        raise hook_error(f"{name}[0]", error) from error
    if not count:
        raise DataError(f"{name} is empty", "give at least one sample")
    where = f"{name}[0]"
    return ItemRecords(made, name, fit) if fit.admit(*parse_item(first, fit, where), where).single else None


def _functions(path: Path) -> str:
    """A hint that names the functions of a Python file."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return f"write it as {path}:NAME"
    names = [n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name[0] != "_"]
    more = f" ({counted(len(names), 'function')}: {quoted(names)})" if len(names) > 1 else ""
    return f"write it as {path}:{names[0] if len(names) == 1 else 'NAME'}{more}"
