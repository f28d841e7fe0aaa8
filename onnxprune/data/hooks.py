"""Callables of the user's: `file.py:name` and `package.module:name`, and how to say that one of them failed.

A file is run once per process, however many of its names are used, with its folder importable as it is for a script.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from onnxprune.errors import DataError

__all__ = ["blame", "closest", "hook_error", "load_callable", "quoted"]

_FORM = "write it as FILE.py:NAME or PACKAGE.MODULE:NAME"
_PACKAGE = str(Path(__file__).resolve().parent.parent)


def load_callable(spec: str) -> Callable[..., Any]:
    """The callable that 'file.py:name' or 'pkg.module:name' names; `name` may have dots.

    Runs the file, or imports the module (the working directory is importable). Raises DataError where there is no
    such file, module or name, where it fails while it is run, and where it is not callable.
    """
    where, colon, name = spec.rpartition(":")
    if not colon or not where or not all(part.isidentifier() for part in name.split(".")):
        raise DataError(f"'{spec}' names no callable", _FORM)
    found: Any = _from_file(Path(where)) if where.endswith(".py") else _from_module(where)
    for part in name.split("."):
        if not hasattr(found, part):
            names = [n for n in vars(found) if not n.startswith("_")] if hasattr(found, "__dict__") else []
            raise DataError(f"{where} has no '{part}'", closest(part, names))
        found = getattr(found, part)
    if not callable(found):
        kind = type(found).__name__
        raise DataError(f"{spec} is a {kind}, which can't be called", f"make it a function that returns the {kind}")
    return found


def _from_file(path: Path) -> ModuleType:
    path = path.expanduser()
    if not path.is_file():
        raise DataError(f"{path} does not exist", "check the path, which is relative to the current folder")
    path = path.resolve()
    stamp = f"{path} {path.stat().st_mtime_ns}"
    name = f"{path.stem}_{hashlib.sha1(stamp.encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # pickling needs to find it: DataLoader workers
    sys.path.insert(0, str(path.parent))
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise hook_error(str(path), error) from error
    finally:
        _demote(str(path.parent))
    return module


def _from_module(name: str) -> ModuleType:
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise DataError(
                f"there is no module '{name}' to import",
                f"for a file write {name.replace('.', '/')}.py:NAME; modules are found from the current folder and "
                "among what is installed",
            ) from None
        raise hook_error(name, error) from error
    except (Exception, SystemExit) as error:
        raise hook_error(name, error) from error
    finally:
        _demote(here)


def _demote(folder: str) -> None:
    """What was importable first while a file ran stays importable, after everything else."""
    if folder in sys.path:
        sys.path.remove(folder)
    if folder not in sys.path:
        sys.path.append(folder)


def hook_error(name: str, error: BaseException) -> DataError:
    """The DataError for an exception that user code raised. `name` is what the user calls that code."""
    if isinstance(error, DataError):
        return error
    return DataError(f"{name} failed: {blame(error)}", "the fault is in that code, not in the model; -vv shows more")


def blame(error: BaseException) -> str:
    """`ValueError: text (file.py, line 12)`: the innermost line that is the user's own, as far as that can be told."""
    text = f"{type(error).__name__}: {error}".rstrip(": ")
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}: {error.msg} ({error.filename}, line {error.lineno})"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_PACKAGE)]
    frames = [f for f in frames if not f.filename.startswith("<")]
    outside = ("site-packages", "dist-packages", os.path.dirname(os.__file__))
    own = [f for f in frames if not any(part in f.filename for part in outside)]
    last = (own or frames)[-1:]
    return f"{text} ({last[0].filename}, line {last[0].lineno})" if last else text


def quoted(names: Iterable[str], *, limit: int = 8) -> str:
    """`'a', 'b'`, cut after `limit` names; `nothing` where there are none."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(f"'{n}'" for n in names[:limit]) + more) or "nothing"


def closest(wanted: str, names: Iterable[str]) -> str:
    """A hint that names the likeliest of `names`, or all of them."""
    names = sorted(names)
    near = difflib.get_close_matches(wanted, names, 1, 0.5)
    if near:
        return f"did you mean '{near[0]}'?"
    return f"there are {quoted(names)}" if names else "there are no names in it"
