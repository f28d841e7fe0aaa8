"""BatchNormalization that an exporter folded into its convolution, put back for training and folded again after it.

A network without normalisation is touchy to train. A BatchNormalization with mean m, variance v, scale sqrt(v + eps)
and bias m changes nothing in eval mode, whatever m and v are; in training it brings the statistics of the batch back to
them. Taken from the network before pruning, they give a pruned one the distributions that its weights were made for.
Folding multiplies it into weight and bias, so that the file keeps its form.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from onnxprune.mirroring.targets import Targets, identifier
from onnxprune.ops.kernels.norm import batch_norm

__all__ = ["Moments", "channel_moments", "fold", "freeze_statistics", "has_normalisation", "inserted", "rebn"]

_CONVOLUTIONS = frozenset({torch.conv1d, torch.conv2d, torch.conv3d})
MOMENTUM, EPSILON = 0.1, 1e-5
PARTS = ("scale", "bias", "mean", "variance")

Moments = Mapping[str, tuple[Tensor, Tensor]]  # mean and variance per channel, by the convolution's weight


def channel_moments(mirror: GraphModule, batches: Iterable[Sequence[Tensor]]) -> Moments:
    """Mean and variance of the channels of every convolution that `rebn` may treat. batches: inputs, in the order of
    the mirror's; a few hundred samples are plenty."""
    moments = _Sums(mirror, _candidates(mirror))
    with torch.no_grad():
        for inputs in batches:
            moments.run(*inputs)
    return {str(node.args[1].target): moments.of(node) for node in moments.sums}


def rebn(mirror: GraphModule, moments: Moments) -> int:
    """Put a BatchNormalization behind every convolution that can take one and whose moments are known; returns how
    many there are.

    One that can has a weight and a bias of its own, and other weights behind it: what the network gives out is not
    normalised. What the network computes in eval mode does not change.
    """
    chosen = [n for n in _candidates(mirror) if n.args[1].target in moments]
    targets = Targets(mirror)
    targets.leaves.update(n for n, _ in (*mirror.named_parameters(), *mirror.named_buffers()))
    for node in chosen:
        _insert(mirror, targets, node, *moments[node.args[1].target])
    mirror.graph.lint()
    mirror.recompile()
    return len(chosen)


def fold(mirror: GraphModule) -> None:
    """Multiply every BatchNormalization that `rebn` inserted into its convolution, and take it out."""
    for node in list(mirror.graph.nodes):
        if not node.meta.get("rebn"):
            continue
        convolution = node.args[0]
        weight, bias = (_tensor(mirror, n) for n in convolution.args[1:3])
        scale, shift, mean, variance = (_tensor(mirror, node.args[k]) for k in (3, 4, 1, 2))
        with torch.no_grad():
            factor = scale.double() / (variance.double() + EPSILON).sqrt()
            bias.copy_((bias.double() - mean.double()) * factor + shift.double())
            weight.copy_(weight.double() * factor.reshape(-1, *[1] * (weight.ndim - 1)))
        bias.requires_grad_(True)
        node.replace_all_uses_with(convolution)
        read = [a for a in node.args if isinstance(a, Node) and a is not convolution]
        mirror.graph.erase_node(node)
        for argument in read:
            if not argument.users:
                mirror.graph.erase_node(argument)
    mirror.delete_all_unused_submodules()
    mirror.recompile()


def inserted(mirror: GraphModule) -> dict[str, tuple[str, str]]:
    """Scale and bias of every BatchNormalization that `rebn` inserted, by the weight of its convolution: the targets
    of all three. Where both are zero, `fold` gives a channel whose weight and bias are zero."""
    found = {}
    for node in mirror.graph.nodes:
        if node.meta.get("rebn"):
            found[str(node.args[0].args[1].target)] = (str(node.args[3].target), str(node.args[4].target))
    return found


def has_normalisation(mirror: GraphModule) -> bool:
    """Whether it normalises by statistics of the batch in training."""
    return any(n.target is batch_norm for n in mirror.graph.nodes)


def freeze_statistics(mirror: GraphModule) -> None:
    """Let BatchNormalization use its running statistics in training too, where a batch is too small for its own."""
    for node in list(mirror.graph.nodes):
        if node.op == "get_attr" and node.target == "training":
            for user in list(node.users):
                user.args = tuple(False if a is node else a for a in user.args)
            mirror.graph.erase_node(node)
    mirror.recompile()


def _candidates(mirror: GraphModule) -> list[Any]:
    """Convolutions with a weight and a bias of their own, in front of other convolutions or matrix products."""
    found = []
    feeds_weights: dict[Node, bool] = {}
    for node in reversed(mirror.graph.nodes):
        feeds_weights[node] = any(feeds_weights[u] or _has_weight(mirror, u) for u in node.users)
        own = node.target in _CONVOLUTIONS and all(_own(mirror, a) for a in node.args[1:3])
        if own and feeds_weights[node] and not any(u.target is batch_norm for u in node.users):
            found.append(node)
    return found[::-1]


def _has_weight(mirror: GraphModule, node: Node) -> bool:
    # the weight of a linear layer may be turned on the way
    read = [a.args[0] if isinstance(a, Node) and a.target == "t" else a for a in node.args]
    return any(
        isinstance(a, Node) and a.op == "get_attr" and isinstance(p := _tensor(mirror, a), nn.Parameter) and p.ndim > 1
        for a in read
    )


def _own(mirror: GraphModule, argument: Any) -> bool:
    fetched = isinstance(argument, Node) and argument.op == "get_attr" and len(argument.users) == 1
    return fetched and isinstance(_tensor(mirror, argument), nn.Parameter)


def _tensor(mirror: GraphModule, node: Any) -> Any:
    value: Any = mirror
    for part in node.target.split("."):
        value = getattr(value, part)
    return value


def _insert(mirror: GraphModule, targets: Targets, node: Node, mean: Tensor, variance: Tensor) -> None:
    like = _tensor(mirror, node.args[1])
    values = dict(zip(PARTS, ((variance + EPSILON).sqrt(), mean, mean, variance), strict=True))
    graph, fetched = mirror.graph, {}
    with graph.inserting_after(node):
        made = graph.create_node("call_function", batch_norm)
    node.replace_all_uses_with(made)
    with graph.inserting_before(made):
        for part, value in values.items():
            target = targets.choose(f"rebn_{identifier(node.name)}.{part}")
            owner, leaf = targets.owner(target)
            tensor = value.to(like)
            if part in ("scale", "bias"):
                owner.register_parameter(leaf, nn.Parameter(tensor))
            else:
                owner.register_buffer(leaf, tensor)
            fetched[part] = graph.create_node("get_attr", target)
        training = graph.create_node("get_attr", "training")
    # What is normalised has no use for the convolution's bias. Its gradient is zero but for rounding, which an
    # optimizer that divides gradients by their size would follow.
    _tensor(mirror, node.args[2]).requires_grad_(False)
    statistics = (fetched["mean"], fetched["variance"], fetched["scale"], fetched["bias"])
    made.args = (node, *statistics, training, MOMENTUM, EPSILON)
    made.meta["rebn"] = True


class _Sums(Interpreter):
    """Runs a mirror and adds up the first two moments of some nodes' channels (axis 1)."""

    def __init__(self, mirror: GraphModule, chosen: Sequence[Any]) -> None:
        super().__init__(mirror)
        self.sums: dict[Any, list[Any]] = {node: [0, 0.0, 0.0] for node in chosen}

    def run_node(self, node: Node) -> Any:
        result = super().run_node(node)
        if node in self.sums:
            axes = [k for k in range(result.ndim) if k != 1]
            wide = result.double()
            held = self.sums[node]
            held[0] += wide.numel() // wide.shape[1]
            held[1] = held[1] + wide.sum(axes)
            held[2] = held[2] + wide.square().sum(axes)
        return result

    def of(self, node: Node) -> tuple[Tensor, Tensor]:
        """Mean and variance per channel."""
        count, first, second = self.sums[node]
        mean = first / count
        return mean, (second / count - mean.square()).clamp_min(0)
