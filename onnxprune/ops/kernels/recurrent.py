"""LSTM, GRU and RNN at run time: torch's fused cells where they compute the same, and step by step where not.

ONNX keeps the gates in another order than torch. They are put into torch's order in every run, a copy of the weights
that is small beside the work on a sequence, so that the parameters stay those of the file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

__all__ = ["ACTIVATIONS", "fused", "stepwise"]

Activation = tuple[str, float, float]
Cell = Callable[..., list[Tensor]]

# Gates in ONNX's order, taken in torch's: LSTM i o f c as i f c o, GRU z r h as r z h.
_FUSED: dict[str, tuple[Any, tuple[int, ...]]] = {
    "LSTM": (torch.lstm, (0, 2, 3, 1)),
    "GRU": (torch.gru, (1, 0, 2)),
    "Tanh": (torch.rnn_tanh, (0,)),
    "Relu": (torch.rnn_relu, (0,)),
}

ACTIVATIONS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "sigmoid": lambda x, a, b: torch.sigmoid(x),
    "tanh": lambda x, a, b: torch.tanh(x),
    "relu": lambda x, a, b: torch.relu(x),
    "affine": lambda x, a, b: a * x + b,
    "leakyrelu": lambda x, a, b: F.leaky_relu(x, a),
    "thresholdedrelu": lambda x, a, b: torch.where(x > a, x, 0.0),
    "scaledtanh": lambda x, a, b: a * torch.tanh(b * x),
    "hardsigmoid": lambda x, a, b: torch.clamp(a * x + b, 0, 1),
    "elu": lambda x, a, b: F.elu(x, a),
    "softsign": lambda x, a, b: F.softsign(x),
    "softplus": lambda x, a, b: F.softplus(x),
}


class _TorchOrder(torch.autograd.Function):
    """W, R and B of all directions in one vector, the gates in torch's order; gradients go back in one copy each."""

    @staticmethod
    def forward(ctx: Any, order: tuple[int, ...], w: Tensor, r: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        ctx.order, ctx.directions = order, w.size(0)
        tables = [p for d in range(w.size(0)) for p in (w[d], r[d])]
        biases = [] if bias is None else [p for d in range(w.size(0)) for p in bias[d].chunk(2)]
        gates = [p.chunk(len(order)) for p in (*tables, *biases)]
        flat = torch.cat([parts[k].reshape(-1) for parts in gates for k in order])
        views = flat.split([p.numel() for p in (*tables, *biases)])
        return tuple(v.view_as(p) for v, p in zip(views, (*tables, *biases), strict=True))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        half, back = 2 * ctx.directions, [ctx.order.index(k) for k in range(len(ctx.order))]
        gates = [g.chunk(len(back)) for g in gradients]
        parts = [[chunks[k] for k in back] for chunks in gates]
        found = [joined(parts[k:half:2]) for k in (0, 1)]
        biases = [[*w, *r] for w, r in zip(parts[half::2], parts[half + 1 :: 2], strict=True)]
        return None, *found, joined(biases) if biases else None


def joined(parts: Sequence[Sequence[Tensor]]) -> Tensor:
    """The gates of each direction, joined; (directions, ..)."""
    return torch.cat([gate for gates in parts for gate in gates]).unflatten(0, (len(parts), -1))


def flat_weights(w: Tensor, r: Tensor, bias: Tensor | None, order: tuple[int, ...]) -> list[Tensor]:
    """The weights as torch's cells take them: per direction W, R and both biases. They lie in one piece of memory, all
    biases last, where cuDNN can use them as they are."""
    shaped = list(_TorchOrder.apply(order, w, r, bias))
    if bias is None:
        return shaped
    half = 2 * w.size(0)
    return [p for d in range(w.size(0)) for p in (*shaped[2 * d : 2 * d + 2], *shaped[half + 2 * d : half + 2 * d + 2])]


@torch.compiler.disable  # the compiler can't take torch's cells, also inside of torch's own modules
def fused(
    kind: str,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    states: Sequence[Tensor | None],
    direction: str,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """A recurrent layer by torch's own cell: Y and the last states, as ONNX lays them out.

    kind: 'LSTM', 'GRU', or the activation of an RNN. x: (steps, batch, features). w, r: (directions, gates * hidden,
    features or hidden). lengths: (batch), all sequences are as long as x by default. states: (directions, batch,
    hidden), zero by default. batch_first: as ONNX's layout 1, the batch comes first in everything.
    """
    function, order = _FUSED[kind]
    if batch_first:
        x, states = x.transpose(0, 1), [s if s is None else s.transpose(0, 1) for s in states]
    steps, batch = x.shape[:2]
    zeros = x.new_zeros(w.size(0), batch, r.size(2))
    hx = tuple(zeros if s is None else s.contiguous() for s in states)
    for s in hx:  # torch's cell doesn't look, and would read past their end
        if s.shape != zeros.shape:
            raise RuntimeError(f"states of {tuple(s.shape)} for {batch} sequences, expected {tuple(zeros.shape)}")
    weights = flat_weights(w, r, bias, order)
    settings = (bias is not None, 1, 0.0, torch.is_grad_enabled(), direction == "bidirectional")
    each = None if lengths is None else lengths.tolist()
    if each is not None and all(n == steps for n in each):
        each = None
    x = backwards(x, lengths if each else None) if direction == "reverse" else x
    if each is None:
        y, *last = function(x, hx if len(hx) > 1 else hx[0], weights, *settings, False)
    else:
        y, last = packed(function, x, each, hx, weights, settings)
    y = backwards(y, lengths if each else None) if direction == "reverse" else y
    return laid(y.unflatten(2, (w.size(0), -1)), last, batch_first)


def packed(
    function: Any, x: Tensor, each: Sequence[int], hx: Sequence[Tensor], weights: Sequence[Tensor], settings: Any
) -> tuple[Tensor, list[Tensor]]:
    """Sequences of different lengths. One without any step gives zeros and keeps its states."""
    some = pack_padded_sequence(x, torch.tensor([max(n, 1) for n in each]), enforce_sorted=False)
    sort, unsort = some.sorted_indices, some.unsorted_indices
    assert sort is not None and unsort is not None
    first = [s.index_select(1, sort) for s in hx]
    y, *last = function(some.data, some.batch_sizes, first if len(first) > 1 else first[0], weights, *settings)
    padded, _ = pad_packed_sequence(PackedSequence(y, some.batch_sizes, sort, unsort), total_length=x.size(0))
    last = [s.index_select(1, unsort) for s in last]
    if min(each) == 0:
        empty = torch.tensor([n == 0 for n in each], device=x.device)[:, None]
        padded = padded.masked_fill(empty, 0.0)
        last = [torch.where(empty, s, t) for s, t in zip(hx, last, strict=True)]
    return padded, last


def backwards(x: Tensor, lengths: Tensor | None) -> Tensor:
    """The steps (axis 0) of every sequence in reversed order; what lies behind its length stays."""
    if lengths is None:
        return x.flip(0)
    step = torch.arange(x.size(0), device=x.device)[:, None]
    at = torch.where(step < lengths, lengths - 1 - step, step)
    return x.gather(0, at[:, :, None].expand(-1, -1, x.size(2)))


def laid(y: Tensor, last: Sequence[Tensor], batch_first: bool) -> tuple[Tensor, ...]:
    """y (steps, batch, directions, hidden) and the last states (directions, batch, hidden) in ONNX's layouts."""
    if batch_first:
        return y.transpose(0, 1), *(s.transpose(0, 1) for s in last)
    return y.transpose(1, 2), *last


def stepwise(
    kind: str,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    states: Sequence[Tensor | None],
    direction: str,
    batch_first: bool,
    activations: Sequence[Activation],
    clip: float | None,
    **more: Any,
) -> tuple[Tensor, ...]:
    """As `fused`, for every form of an 'LSTM', 'GRU' or 'RNN'; `more` is what its cell takes.

    activations: of the first direction, then of the second. clip: bound of what goes into the gates' activations (but
    not of an LSTM's cell: so does onnxruntime).
    """
    if batch_first:
        x, states = x.transpose(0, 1), [s if s is None else s.transpose(0, 1) for s in states]
    cell, each = _CELLS[kind], len(activations) // w.size(0)
    ways = []
    for d in range(w.size(0)):
        reverse = direction == "reverse" or d == 1
        steps = backwards(x, lengths) if reverse else x
        own_activations = activations[d * each : (d + 1) * each]
        functions = [activated(a, clip if k < 2 else None) for k, a in enumerate(own_activations)]
        own = {k: v[d] if isinstance(v, Tensor) else v for k, v in more.items()}
        zeros = x.new_zeros(x.size(1), r.size(2))
        held = [zeros if s is None else s[d] for s in states]
        both = bias[d].chunk(2) if bias is not None else (None, None)
        ys = []
        for t, inputs in enumerate(F.linear(steps, w[d], both[0]).unbind(0)):
            new = cell(inputs, held, r[d], both[1], functions, **own)
            if lengths is None:
                held = new
                ys.append(new[0])
            else:
                runs = (t < lengths)[:, None]
                held = [torch.where(runs, s, old) for s, old in zip(new, held, strict=True)]
                ys.append(torch.where(runs, new[0], 0.0))
        y = torch.stack(ys)
        ways.append((backwards(y, lengths) if reverse else y, held))
    last = [torch.stack(s) for s in zip(*(held for _, held in ways), strict=True)]
    return laid(torch.stack([y for y, _ in ways], 2), last, batch_first)


def activated(activation: Activation, clip: float | None) -> Callable[[Tensor], Tensor]:
    name, a, b = activation
    function = ACTIVATIONS[name]
    if clip is None:
        return lambda x: function(x, a, b)
    return lambda x: function(x.clamp(-clip, clip), a, b)


def lstm_cell(
    x: Tensor,
    states: Sequence[Tensor],
    r: Tensor,
    bias: Tensor | None,
    functions: Sequence[Callable[[Tensor], Tensor]],
    peepholes: Tensor | None = None,
    coupled: bool = False,
) -> list[Tensor]:
    """x: the input's part of the gates i o f c. peepholes: (3 * hidden), of i o f. coupled: f is 1 - i."""
    (h, c), (f, g, last) = states, functions
    i, o, forget, candidate = (x + F.linear(h, r, bias)).chunk(4, 1)
    seen = (0.0, 0.0, 0.0) if peepholes is None else peepholes.chunk(3)
    i = f(i + seen[0] * c)
    forget = 1 - i if coupled else f(forget + seen[2] * c)
    c = forget * c + i * g(candidate)
    return [f(o + seen[1] * c) * last(c), c]


def gru_cell(
    x: Tensor,
    states: Sequence[Tensor],
    r: Tensor,
    bias: Tensor | None,
    functions: Sequence[Callable[[Tensor], Tensor]],
    linear_before_reset: bool = False,
) -> list[Tensor]:
    """x: the input's part of the gates z r h."""
    (h,), (f, g) = states, functions
    hidden = h.size(1)
    tables, biases = r.split([2 * hidden, hidden]), (None, None) if bias is None else bias.split([2 * hidden, hidden])
    z, reset = f(x[:, : 2 * hidden] + F.linear(h, tables[0], biases[0])).chunk(2, 1)
    if linear_before_reset:
        candidate = g(x[:, 2 * hidden :] + reset * F.linear(h, tables[1], biases[1]))
    else:
        candidate = g(x[:, 2 * hidden :] + F.linear(reset * h, tables[1], biases[1]))
    return [(1 - z) * candidate + z * h]


def rnn_cell(
    x: Tensor,
    states: Sequence[Tensor],
    r: Tensor,
    bias: Tensor | None,
    functions: Sequence[Callable[[Tensor], Tensor]],
) -> list[Tensor]:
    """One gate."""
    return [functions[0](x + F.linear(states[0], r, bias))]


_CELLS: dict[str, Cell] = {"LSTM": lstm_cell, "GRU": gru_cell, "RNN": rnn_cell}
