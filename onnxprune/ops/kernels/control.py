"""Control flow at run time: modules that hold the bodies, which are mirrors of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["If", "Loop", "Map", "Scan"]


def as_tuple(results: Any) -> tuple[Any, ...]:
    """What a body of one or of several outputs gives. A list is one output: a sequence."""
    return results if isinstance(results, tuple) else (results,)


class If(nn.Module):
    """One of two bodies. Each wants some of the tensors that are given to both."""

    def __init__(
        self, then_branch: nn.Module, else_branch: nn.Module, wanted: tuple[Sequence[int], Sequence[int]]
    ) -> None:
        super().__init__()
        self.then_branch, self.else_branch, self.wanted = then_branch, else_branch, wanted

    def forward(self, condition: Tensor, *tensors: Any) -> tuple[Any, ...]:
        if condition:
            return as_tuple(self.then_branch(*(tensors[k] for k in self.wanted[0])))
        return as_tuple(self.else_branch(*(tensors[k] for k in self.wanted[1])))


class Loop(nn.Module):
    """A body that is repeated. Its inputs are the iteration, the condition, what is carried, and outer tensors; its
    outputs the next condition, what is carried on, and what is collected along a new first axis.

    steady: the condition never changes, so that it need not be looked at.
    empty: shapes and types of what is collected, for no iterations at all.
    """

    def __init__(
        self, body: nn.Module, carried: int, *, steady: bool, empty: Sequence[tuple[list[int], torch.dtype]]
    ) -> None:
        super().__init__()
        self.body, self.carried, self.steady, self.empty = body, carried, steady, empty

    def forward(
        self, count: int | None, condition: Tensor | None, device: torch.device, *given: Any
    ) -> tuple[Any, ...]:
        state, outer = tuple(given[: self.carried]), given[self.carried :]
        collected: list[list[Tensor]] = [[] for _ in self.empty]
        i, going = 0, condition is None or bool(condition)
        go = torch.ones((), dtype=torch.bool, device=device) if condition is None else condition
        while going and (count is None or i < count):
            go, *results = as_tuple(self.body(torch.full((), i, dtype=torch.int64, device=device), go, *state, *outer))
            state = tuple(results[: self.carried])
            for parts, part in zip(collected, results[self.carried :], strict=True):
                parts.append(part)
            i, going = i + 1, self.steady or bool(go)
        stacked = (
            torch.stack(parts) if parts else torch.empty(0, *shape, dtype=dtype, device=device)
            for parts, (shape, dtype) in zip(collected, self.empty, strict=True)
        )
        return (*state, *stacked)


class Scan(nn.Module):
    """A body that runs along axes of its inputs, and puts its outputs together along axes.

    axes, backwards: per scanned input, and then per collected output.
    """

    def __init__(
        self, body: nn.Module, states: int, scanned: int, axes: Sequence[int], backwards: Sequence[bool]
    ) -> None:
        super().__init__()
        self.body, self.states, self.scanned, self.axes, self.backwards = body, states, scanned, axes, backwards

    def forward(self, *given: Any) -> tuple[Tensor, ...]:
        n, k = self.states, self.scanned
        return self.run(given[:n], given[n : n + k], given[n + k :])

    def run(self, state: Sequence[Tensor], inputs: Sequence[Tensor], outer: Sequence[Tensor]) -> tuple[Tensor, ...]:
        steps = [x.unbind(axis) for x, axis in zip(inputs, self.axes, strict=False)]
        steps = [s[::-1] if back else s for s, back in zip(steps, self.backwards, strict=False)]
        collected: list[list[Tensor]] = [[] for _ in self.axes[self.scanned :]]
        for parts in zip(*steps, strict=True):
            results = as_tuple(self.body(*state, *parts, *outer))
            state = results[: self.states]
            for column, part in zip(collected, results[self.states :], strict=True):
                column.append(part)
        ends = zip(collected, self.axes[self.scanned :], self.backwards[self.scanned :], strict=True)
        return (*state, *(torch.stack(column[::-1] if back else column, axis) for column, axis, back in ends))


class BatchScan(Scan):
    """Scan of opset 8: everything has a batch axis in front, and sequences have lengths of their own."""

    def forward(self, *given: Any) -> tuple[Tensor, ...]:
        lengths, given = given[0], given[1:]
        n, k = self.states, self.scanned
        state, inputs, outer = given[:n], given[n : n + k], given[n + k :]
        batch, longest = inputs[0].shape[:2]
        counts = [longest] * batch if lengths is None else lengths.tolist()
        runs = []
        for b, count in enumerate(counts):
            found = self.run([s[b] for s in state], [x[b, :count] for x in inputs], outer)
            padded = [torch.cat([y, y.new_zeros(longest - count, *y.shape[1:])]) for y in found[n:]]
            runs.append([*found[:n], *padded])
        return tuple(torch.stack(column) for column in zip(*runs, strict=True))


class Map(nn.Module):
    """A body that is applied to every element of sequences; other inputs are the same for each."""

    def __init__(self, body: nn.Module, sequences: Sequence[bool]) -> None:
        super().__init__()
        self.body, self.sequences = body, sequences

    def forward(self, *given: Any) -> tuple[list[Tensor], ...]:
        count = len(self.sequences)
        own, outer = given[:count], given[count:]
        runs = []
        for k in range(len(own[0])):
            element = (x[k] if listed else x for x, listed in zip(own, self.sequences, strict=True))
            runs.append(as_tuple(self.body(*element, *outer)))
        return tuple(list(column) for column in zip(*runs, strict=True))
