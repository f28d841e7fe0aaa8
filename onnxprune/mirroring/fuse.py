"""What exporters take apart, put together again where torch has one function for it: faster, and with less kept for
the backward pass.

Each rule looks at one node and what leads to it, and says what computes the same; None where it isn't that. A rule
holds for every input, not only for the sizes that shape inference saw, and never takes what something else reads too.
Parameters keep their names and their layout. What is left without a reader is dropped in the end.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.nn import functional as F

from onnxprune.ops.kernels import norm
from onnxprune.ops.kernels.attention import attend

__all__ = ["fuse"]

Rule = Callable[[GraphModule, Any], "Node | None"]  # torch types what a node holds too widely to be read: Any

CLOSE = 1e-6  # relative: what float32 makes of a number that a definition has
_CONVOLUTIONS = frozenset({torch.conv1d, torch.conv2d, torch.conv3d})
# their results are new tensors that no derivative reads
_FRESH = frozenset({*_CONVOLUTIONS, norm.batch_norm, norm.batch_norm_by_batch, operator.add})
_IN_PLACE = {torch.relu: F.relu, F.relu6: F.relu6}


def fuse(module: GraphModule) -> Counter[str]:
    """Rewrite a mirror and the bodies in it, in place; gives how often each rule was applied."""
    applied: Counter[str] = Counter()
    for inner in module.modules():
        if isinstance(inner, GraphModule):
            applied += _fuse_one(inner)
    return applied


def _fuse_one(module: GraphModule) -> Counter[str]:
    graph: Graph = module.graph
    applied: Counter[str] = Counter()
    for rule in _RULES:
        for node in list(graph.nodes):  # a pattern is told by its last node
            if not node.users:
                continue
            with graph.inserting_before(node):
                made = rule(module, node)
            if made is not None:
                applied[rule.__name__] += 1
                made.meta = node.meta | made.meta
                node.replace_all_uses_with(made)
                _drop(graph, node)
    if applied:
        graph.lint()
        module.recompile()
    return applied


def _drop(graph: Graph, node: Any) -> None:
    """Take out a node that nothing reads, and what only it read."""
    read = node.all_input_nodes
    graph.erase_node(node)
    for argument in read:
        if not argument.users and argument.op != "placeholder":
            _drop(graph, argument)


# --- reading a graph


def calls(node: Any, *targets: Any) -> bool:
    """A call of one of these functions or, by name, methods."""
    return isinstance(node, Node) and node.op in ("call_function", "call_method") and node.target in targets


def only(node: Any, *targets: Any) -> bool:
    """As `calls`, and one node reads the result."""
    return calls(node, *targets) and len(node.users) == 1


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def close(value: Any, wanted: float) -> bool:
    return is_number(value) and math.isclose(value, wanted, rel_tol=CLOSE)


def orders(node: Any) -> Iterator[tuple[Any, Any]]:
    """The operands of a commutative call in both orders."""
    a, b = node.args
    yield a, b
    yield b, a


def plus(node: Any, term: float) -> Any:
    """x of x + term that nothing else reads."""
    if only(node, operator.add):
        return next((x for x, number in orders(node) if close(number, term)), None)
    return None


def factors(node: Any) -> tuple[list[Any], float]:
    """A product's factors that are no numbers, and the product of those that are; products that something else reads
    are not taken apart, unless it is `node`."""
    found: list[Any] = []
    scale = 1.0
    waiting = list(node.args) if calls(node, operator.mul) else [node]
    while waiting:
        factor = waiting.pop(0)
        if is_number(factor):
            scale *= factor
        elif only(factor, operator.mul):
            waiting[:0] = factor.args
        else:
            found.append(factor)
    return found, scale


def scaled(node: Any) -> tuple[Any, float]:
    """x and s of s * x or x / s, where nothing else reads that; node and 1 of everything else."""
    scale = 1.0
    while only(node, operator.mul, operator.truediv):
        a, b = node.args
        if is_number(b):
            node, scale = a, scale * (b if node.target is operator.mul else 1 / b)
        elif is_number(a) and node.target is operator.mul:
            node, scale = b, scale * a
        else:
            break
    return node, scale


def apart(inside: Collection[Node], last: Node) -> bool:
    """Whether nothing outside of a pattern reads what lies inside of it, in front of its last node."""
    return all(user is last or user in inside for node in inside for user in node.users)


def rank(node: Any) -> int | None:
    shape = node.meta.get("shape")
    return None if shape is None else len(shape)


def stored(module: GraphModule, node: Any) -> torch.Tensor | None:
    """The tensor that the module holds, where a node fetches one."""
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value if isinstance(value, torch.Tensor) else None


def is_weight(module: GraphModule, node: Any, dims: int) -> bool:
    tensor = stored(module, node)
    return isinstance(tensor, nn.Parameter) and tensor.ndim == dims


def size_of(module: GraphModule, node: Any, axis: int) -> int | None:
    """A size that is the same for all inputs; the first one of a reshape may be another when batches are joined."""
    tensor = stored(module, node)
    if tensor is not None:
        return tensor.shape[axis]
    if calls(node, "permute"):
        return size_of(module, node.args[0], node.args[1][axis])
    if calls(node, "reshape") and isinstance(node.args[1], (list, tuple)) and axis:
        size = node.args[1][axis]
        return size if isinstance(size, int) and size > 0 else None
    return None


# --- normalisation


def layer_norm(module: GraphModule, node: Any) -> Node | None:
    """(x - mean) / sqrt(variance + eps) over trailing axes, and * scale + bias behind it."""
    core, bias = parameter_taken_off(module, node, operator.add)
    core, scale = parameter_taken_off(module, core, operator.mul)
    if (bias is not None and scale is None) or goes_on(module, node, operator.mul if scale is None else operator.add):
        return None
    found = normalised(core)
    if found is None:
        return None
    x, count, eps = found
    whole = tuple((x.meta.get("shape") or ())[-count:])
    held = [stored(module, p) for p in (scale, bias) if p is not None]
    if held and all(t is not None and tuple(t.shape) == whole for t in held):
        return module.graph.call_function(F.layer_norm, (x, whole, scale, bias, eps))
    return module.graph.call_function(norm.layer_norm, (x, scale, bias, -count, eps))


def parameter_taken_off(module: GraphModule, node: Any, function: Any) -> tuple[Any, Any]:
    """x and p of a function of x and a stored tensor; the node and None of everything else."""
    if calls(node, function):
        for x, p in orders(node):
            if stored(module, p) is not None and isinstance(x, Node) and len(x.users) == 1:
                return x, p
    return node, None


def goes_on(module: GraphModule, node: Any, function: Any) -> bool:
    """Whether all that reads a node is such a function of it and of a stored tensor."""
    return len(node.users) == 1 and parameter_taken_off(module, next(iter(node.users)), function)[0] is node


def normalised(node: Any) -> tuple[Node, int, float] | None:
    """x, how many trailing axes, and eps of (x - mean) / sqrt(mean((x - mean) ^ 2) + eps)."""
    for centred, deviation in fractions(node):
        if not calls(centred, operator.sub) or not only(deviation, torch.sqrt):
            continue
        variance = deviation.args[0]
        if not only(variance, operator.add):
            continue
        terms = [(a, b) for a, b in orders(variance) if is_number(b)]
        if not terms:
            continue
        square, eps = terms[0]
        if not only(square, torch.mean) or not calls(square.args[0], operator.mul, torch.pow):
            continue
        power = square.args[0]
        again = power.args[0]
        if power.args[1] is not again if power.target is operator.mul else not close(power.args[1], 2):
            continue
        x, count = mean_taken_off(centred)
        if not count or mean_taken_off(again) != (x, count) or over(square, x) != count:
            continue
        inside = {centred, again, centred.args[1], again.args[1], power, square, variance, deviation}
        inside |= {n for n in node.all_input_nodes if n is not centred}
        return (x, count, float(eps)) if apart(inside, node) else None
    return None


def fractions(node: Any) -> Iterator[tuple[Any, Any]]:
    """a and b of a / b, a * (1 / b) or a * reciprocal(b)."""
    if calls(node, operator.truediv):
        yield node.args[0], node.args[1]
    if calls(node, operator.mul):
        for a, b in orders(node):
            if calls(b, torch.reciprocal):
                yield a, b.args[0]
            elif calls(b, operator.truediv) and close(b.args[0], 1):
                yield a, b.args[1]


def mean_taken_off(node: Any) -> tuple[Any, int]:
    """x and over how many trailing axes, of x - mean(x)."""
    if calls(node, operator.sub) and calls(node.args[1], torch.mean) and node.args[1].args[0] is node.args[0]:
        return node.args[0], over(node.args[1], node.args[0])
    return None, 0


def over(mean: Any, x: Any) -> int:
    """How many trailing axes a mean goes over, which it keeps as ones; 0 where it isn't that."""
    if len(mean.args) != 3 or mean.args[2] is not True or not isinstance(mean.args[1], tuple):
        return 0
    dims = rank(x)
    axes = [k if k < 0 else None if dims is None else k - dims for k in mean.args[1]]
    return len(axes) if sorted(a or 0 for a in axes) == list(range(-len(axes), 0)) else 0


# --- activations


def gelu(module: GraphModule, node: Any) -> Node | None:
    """x * (1 + erf(x / sqrt(2))) / 2, and its approximation by tanh."""
    if not calls(node, operator.mul):
        return None
    found, half = factors(node)
    if not close(half, 0.5) or len(found) != 2:
        return None
    for x, other in (found, found[::-1]):
        inner: Any = plus(other, 1)
        if only(inner, torch.erf):
            argument, scale = scaled(inner.args[0])
            if argument is x and close(scale, math.sqrt(0.5)):
                return module.graph.call_function(F.gelu, (x,))
        if only(inner, torch.tanh) and cubic(inner.args[0], x):
            return module.graph.call_function(F.gelu, (x,), {"approximate": "tanh"})
    return None


def cubic(node: Any, x: Any) -> bool:
    """sqrt(2 / pi) * (x + 0.044715 * x^3)."""
    total, scale = scaled(node)
    if not close(scale, math.sqrt(2 / math.pi)) or not only(total, operator.add):
        return False
    for linear, third in orders(total):
        if linear is x and only(third, operator.mul):
            found, scale = factors(third)
            power = (
                len(found) == 1 and only(found[0], torch.pow) and found[0].args[0] is x and close(found[0].args[1], 3)
            )
            if close(scale, 0.044715) and (power or found == [x, x, x]):
                return True
    return False


def gated(module: GraphModule, node: Any) -> Node | None:
    """x * f(x): SiLU, Mish, Hardswish."""
    if not calls(node, operator.mul):
        return None
    for x, gate in orders(node):
        if only(gate, torch.sigmoid) and gate.args[0] is x:
            return module.graph.call_function(F.silu, (x,))
        if only(gate, F.hardsigmoid) and gate.args[0] is x:
            return module.graph.call_function(F.hardswish, (x,))
        if only(gate, torch.tanh) and only(gate.args[0], F.softplus) and gate.args[0].args == (x,):
            return module.graph.call_function(F.mish, (x,))
    return None


def in_place(module: GraphModule, node: Any) -> Node | None:
    """An activation may overwrite what nothing else reads, no derivative either."""
    if calls(node, *_IN_PLACE) and only(node.args[0], *_FRESH):
        return module.graph.call_function(_IN_PLACE[node.target], (node.args[0],), {"inplace": True})
    return None


# --- matrices


def linear(module: GraphModule, node: Any) -> Node | None:
    """x @ W + b; W stays as it is stored, and is turned on the way."""
    if not calls(node, operator.add):
        return None
    for product, bias in orders(node):
        if only(product, operator.matmul) and is_weight(module, bias, 1) and is_weight(module, product.args[1], 2):
            x, weight = product.args
            if size_of(module, bias, 0) == size_of(module, weight, 1):
                return module.graph.call_function(F.linear, (x, module.graph.call_method("t", (weight,)), bias))
    return None


def attention(module: GraphModule, node: Any) -> Node | None:
    """softmax(q k' * scale + mask) v, of four axes each."""
    if not calls(node, operator.matmul) or not only(node.args[0], torch.softmax):
        return None
    shares, v = node.args
    scores, axis = shares.args[0], shares.args[1]
    if axis not in (-1, 3) or rank(shares) != 4:
        return None
    mask = None
    if only(scores, operator.add):
        found = [(a, b) for a, b in orders(scores) if calls(scaled(a)[0], operator.matmul) and isinstance(b, Node)]
        if not found or scores.meta.get("shape") != shares.meta.get("shape"):
            return None
        scores, mask = found[0]
    product, scale = scaled(scores)
    if not only(product, operator.matmul):
        return None
    (q, by_q), (turned, by_k) = (scaled(operand) for operand in product.args)
    shapes = [x.meta.get("shape") for x in (q, turned, v)]
    if any(s is None or len(s) != 4 or s[:2] != shapes[0][:2] for s in shapes):
        return None
    if mask is not None and product.meta.get("shape") != shares.meta.get("shape"):
        return None
    k = transposed(module, turned)
    scale = scale * by_q * by_k
    if mask is None:
        return module.graph.call_function(F.scaled_dot_product_attention, (q, k, v), {"scale": scale})
    return module.graph.call_function(attend, (q, k, v, mask, scale))


def transposed(module: GraphModule, node: Any) -> Node:
    """With the last two of four axes swapped; what swapped them before is taken back."""
    if calls(node, "permute") and len(node.args[1]) == 4:
        source, (a, b, c, d) = node.args
        return source if (a, b, d, c) == (0, 1, 2, 3) else module.graph.call_method("permute", (source, (a, b, d, c)))
    return module.graph.call_method("transpose", (node, -2, -1))


# --- pieces


def split(module: GraphModule, node: Any) -> Node | None:
    """Slices that a tensor is cut into without a rest: their gradients are joined, and not added up."""
    piece = cut(node)
    size = None if piece is None else size_of(module, piece[0], piece[1])
    if piece is None or size is None:
        return None
    source, axis, _, _ = piece
    bounds = {}
    for user in source.users:
        other = cut(user)
        if other is not None and other[1] == axis and user.users:
            bounds[user] = (other[2], size if other[3] is None else other[3])
    starts, ends = zip(*sorted(bounds.values()), strict=True)
    if len(bounds) < 2 or (*starts, size) != (0, *ends):
        return None
    graph = module.graph
    made = None
    with graph.inserting_before(min(bounds, key=list(graph.nodes).index)):
        pieces = graph.call_method("split", (source, [b - a for a, b in zip(starts, ends, strict=True)], axis))
        for user, (start, _) in bounds.items():
            part = graph.call_function(operator.getitem, (pieces, starts.index(start)))
            part.meta = dict(user.meta)
            if user is node:
                made = part
            else:
                user.replace_all_uses_with(part)
                graph.erase_node(user)
    return made


def cut(node: Any) -> tuple[Node, int, int, int | None] | None:
    """Source, axis, first and end of a slice along one axis."""
    if not calls(node, operator.getitem) or not isinstance(node.args[1], tuple):
        return None
    *whole, last = node.args[1]
    if not isinstance(last, slice) or any(w != slice(None) for w in whole) or last.step not in (None, 1):
        return None
    first, end = last.start or 0, last.stop
    fits = isinstance(first, int) and first >= 0 and (end is None or (isinstance(end, int) and end > first))
    return (node.args[0], len(whole), first, end) if fits else None


_RULES: tuple[Rule, ...] = (layer_norm, gelu, gated, linear, attention, split, in_place)
