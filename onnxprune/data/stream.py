"""What a user's code yields, by name, and what is random in it."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.random import mtrand

from onnxprune.data.fit import Fit, Rows, as_array
from onnxprune.data.hooks import hook_error, quoted
from onnxprune.data.records import Pair, counted
from onnxprune.errors import DataError

__all__ = ["Draws", "ItemRecords", "parse_item"]


class Draws:
    """The random numbers of a user's code: while it runs, Python's, numpy's and torch's global generators (those of
    modules that are imported) follow a stream of their own, begun from `key`; afterwards they are as they were, save
    for the second of a pair of normals that numpy may have kept.

    So the same epoch draws the same, in another process and after a resume, whatever the training draws in between.
    """

    def __init__(self, *key: int) -> None:
        self._numpy = np.random.MT19937(0)  # takes longer to make than to seed
        self._outer = _State(None, None, None)
        self.restart(*key)

    def restart(self, *key: int) -> None:
        """Begin another stream."""
        self._key = [abs(k) for k in key]
        self._own: _State | None = None

    def __enter__(self) -> None:
        self._outer = _State.current()
        if self._own is not None:
            self._own.install()
            return
        number = int(np.random.SeedSequence(self._key).generate_state(1)[0])
        random.seed(number)
        mtrand.set_bit_generator(self._numpy)
        np.random.seed(number)
        if self._outer.torch is not None:
            sys.modules["torch"].default_generator.manual_seed(number)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._own = _State.current()
        self._outer.install()


class _State(NamedTuple):
    """Where the global generators are; numpy's is swapped as an object, which is much faster than copying it."""

    python: Any
    numpy: Any
    torch: Any

    @classmethod
    def current(cls) -> _State:
        torch = sys.modules.get("torch")
        # A torch that is being imported, by another thread, has no generator yet.
        generator = getattr(torch, "default_generator", None)
        return cls(random.getstate(), mtrand.get_bit_generator(), generator.get_state() if generator else None)

    def install(self) -> None:
        random.setstate(self.python)
        mtrand.set_bit_generator(self.numpy)
        if self.torch is not None:
            sys.modules["torch"].default_generator.set_state(self.torch)


def parse_item(item: Any, fit: Fit, where: str) -> Pair:
    """Inputs and targets by name: of a dict, a pair (inputs, targets), a tuple in the order of the inputs with the
    targets behind them, or a bare array where the model has one input.

    Unnamed targets are called `target`; several are called as the outputs where there are as many, else `target0`, ...
    """
    names = fit.names
    targets: Any = ()
    if isinstance(item, Mapping):
        inputs, targets = fit.split(item, where)
    elif isinstance(item, (tuple, list)):
        if item and isinstance(item[0], (Mapping, tuple, list)):
            if len(item) > 2:
                raise DataError(f"{where} is a tuple of {len(item)}", "give a dict, or a pair (inputs, target)")
            given, targets = item[0], item[1] if len(item) == 2 else ()
        else:
            given, targets = item[: len(names)], item[len(names) :]
            targets = targets[0] if len(targets) == 1 and isinstance(targets[0], Mapping) else targets
        if isinstance(given, Mapping):
            inputs, more = fit.split(given, where)
            targets = {**more, **targets} if isinstance(targets, Mapping) else targets
        elif len(given) != len(names):
            raise DataError(
                f"{where} gives {len(given)} arrays, the model has the inputs {quoted(names)}",
                "give a dict by name, or a pair (inputs, target)",
            )
        else:
            inputs = dict(zip(names, given, strict=True))
    elif len(names) == 1 and item is not None:
        inputs = {names[0]: item}
    else:
        raise DataError(
            f"{where} is {'None' if item is None else 'a ' + type(item).__name__}; the model has the inputs "
            f"{quoted(names)}",
            "give a dict by name, or a pair (inputs, target)",
        )
    named = _named_targets(targets, fit)
    clash = sorted(set(named) & set(names))
    if clash:
        raise DataError(f"{where} gives {quoted(clash)} as input and as target", "name the target differently")
    return (
        {n: as_array(a, f"input '{n}'", where) for n, a in inputs.items()},
        {n: as_array(a, f"target '{n}'", where) for n, a in named.items() if a is not None},
    )


def _named_targets(targets: Any, fit: Fit) -> dict[str, Any]:
    if isinstance(targets, Mapping):
        return {str(n): a for n, a in targets.items()}
    if not isinstance(targets, (tuple, list)):
        return {"target": targets}
    if len(targets) == 1:
        return {"target": targets[0]}
    outputs = [p.name for p in fit.signature.outputs]
    if len(outputs) == len(targets):
        return dict(zip(outputs, targets, strict=True))
    return {f"target{k}": a for k, a in enumerate(targets)}


class ItemRecords:
    """The samples of a sequence, such as a list or a torch Dataset: `items[k]`, for k below `len(items)`.

    What is drawn at random for a sample, such as an augmentation, follows from seed, epoch and k alone.
    """

    block = 1

    def __init__(self, items: Any, name: str, fit: Fit) -> None:
        self._items, self._name, self._fit = items, name, fit
        self._draws = Draws()
        self.count = len(items)
        self.description = f"{name} ({counted(self.count, 'feed' if fit.whole else 'sample')})"

    def rows(self, index: np.ndarray, key: tuple[int, int]) -> Iterator[Rows]:
        """See Records."""
        for k in map(int, index):
            where = f"{self._name}[{k}]"
            try:
                if isinstance(self._items, (list, tuple)):
                    item = self._items[k]
                else:
                    self._draws.restart(*key, k)
                    with self._draws:
                        item = self._items[k]
            except (Exception, SystemExit) as error:
                raise hook_error(where, error) from error
            rows = self._fit.admit(*parse_item(item, self._fit, where), where)
            if rows.count != 1:
                raise DataError(
                    f"{where} is a batch of {rows.count}, the samples before it were single",
                    "give samples, or give batches, not both",
                )
            yield rows
