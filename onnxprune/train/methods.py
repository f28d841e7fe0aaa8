"""The methods that prune in training, by name, and their options.

Each is a `sparsify.Sparsifier` with three attributes: `name`; `options`, a frozen dataclass; `share`, the part of the
whole training that it takes by default, before its units are removed and what is left is tuned. A method's module is
imported (and torch with it) when the method is asked for, so that the command line can name them all without.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from onnxprune.errors import UsageError

if TYPE_CHECKING:
    from onnxprune.axes.analysis import Analysis
    from onnxprune.train.selection import Selection
    from onnxprune.train.sparsify import Sparsifier

__all__ = ["METHODS", "ONESHOT", "Method", "find_method"]

ONESHOT = "oneshot"
"""The method that needs no training: units are chosen by what the file tells, and removed at once."""

METHODS: Mapping[str, str] = {
    "dhspg": "onnxprune.train.dhspg:DHSPGTraining",
    "hesso": "onnxprune.train.hesso:HESSOTraining",
    "tpp": "onnxprune.train.penalised:TPPTraining",
    "greg": "onnxprune.train.penalised:GReg",
    "fixreg": "onnxprune.train.penalised:FixReg",
    "imp": "onnxprune.train.imp:IMP",
    "issp": "onnxprune.train.issp:ISSP",
}
"""Where each method stands, as module:class."""

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


@dataclass(frozen=True)
class Method:
    """A method that was asked for. chosen: its options. share: the part of the training that it takes."""

    kind: type[Sparsifier]
    name: str
    chosen: Any
    share: float

    def hooks(self, analysis: Analysis, selection: Selection) -> Sparsifier:
        """Its part in a training run of the analysed model's mirror."""
        return self.kind(analysis, selection, self.chosen)  # type: ignore[call-arg]

    def options(self) -> dict[str, Any]:
        """Its options as plain values."""
        return asdict(self.chosen)

    def about(self) -> dict[str, Any]:
        """Plain values that tell a run of it from others."""
        return {"method": self.name, **{f"{self.name} {k}": v for k, v in self.options().items()}}


def find_method(method: str | type[Sparsifier], options: Mapping[str, Any] | None = None) -> Method | None:
    """A method by its name (or class) with its options; None for one-shot.

    options: by name; text is read as the option's type has it. 'share' is every method's: the part of the training that
    it takes, above 0; with 1 nothing is left for tuning.
    Raises UsageError for an unknown method or option, and for values that make no sense.
    """
    given = {name.replace("-", "_"): value for name, value in (options or {}).items()}
    if method == ONESHOT:
        if given:
            raise UsageError(f"the method {ONESHOT} has no option '{next(iter(given))}'", "--method names another one")
        return None
    kind = _kind(method)
    share = _read("share", given.pop("share"), float) if "share" in given else kind.share  # type: ignore[attr-defined]
    if not 0 < share <= 1:
        raise UsageError(f"share must be above 0 and at most 1, found {share:g}", "1 leaves no training for tuning")
    name = kind.name  # type: ignore[attr-defined]
    defaults = kind.options()  # type: ignore[attr-defined]
    hints = get_type_hints(type(defaults))
    known = [f.name for f in fields(defaults)]
    for option in given:
        if option not in known:
            raise UsageError(f"the method {name} has no option '{option}'", f"it has {', '.join((*known, 'share'))}")
    chosen = replace(defaults, **{option: _read(option, value, hints[option]) for option, value in given.items()})
    return Method(kind, name, chosen, share)


def _kind(method: str | type[Sparsifier]) -> type[Sparsifier]:
    if isinstance(method, type):
        return method
    if method not in METHODS:
        raise UsageError(f"method '{method}' is none of {ONESHOT}, {', '.join(METHODS)}")
    module, _, name = METHODS[method].partition(":")
    found: type[Sparsifier] = getattr(import_module(module), name)
    return found


def _read(name: str, value: Any, wanted: Any) -> Any:
    """A value as its annotation has it. Raises UsageError."""
    origin, inner = get_origin(wanted), get_args(wanted)
    if origin in (Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() == "none" and type(None) in inner):
            return None
        return _read(name, value, next(t for t in inner if t is not type(None)))
    if origin is Literal:
        if value not in inner:
            raise UsageError(f"{name} must be one of {', '.join(map(str, inner))}, found '{value}'")
        return value
    if origin is tuple:
        parts = value.split(",") if isinstance(value, str) else value
        return tuple(_read(name, part, inner[0]) for part in parts)
    if isinstance(value, str):
        return _from_text(name, value.strip(), wanted)
    fits = isinstance(value, wanted) and not (wanted in (int, float) and isinstance(value, bool))
    if not fits and not (wanted is float and isinstance(value, int) and not isinstance(value, bool)):
        raise UsageError(f"{name} must be {_word(wanted)}, found {value!r}")
    return wanted(value)


def _from_text(name: str, text: str, wanted: type) -> Any:
    if wanted is bool:
        if text.lower() in (*_TRUE, *_FALSE):
            return text.lower() in _TRUE
    else:
        try:
            return wanted(text)
        except ValueError:
            pass
    raise UsageError(f"{name} must be {_word(wanted)}, found '{text}'")


def _word(wanted: type) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false"}.get(wanted, wanted.__name__)
