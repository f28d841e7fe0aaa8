"""Fused mirrors compute what unfused ones do, gradients included, and what only looks like a pattern stays."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from onnxprune.mirroring import mirror
from onnxprune.mirroring.build import Builder
from onnxprune.mirroring.fuse import fuse
from onnxprune.mirroring.rebn import channel_moments, rebn
from onnxprune.model.load import load
from onnxprune.ops import OPERATORS

F32 = np.float32
RNG = np.random.default_rng(0)


class Net:
    """Nodes as they come; numbers become constants and arrays initializers."""

    def __init__(self, shape: Sequence[int | str], opset: int = 14) -> None:
        self.shape, self.opset = shape, opset
        self.nodes: list[onnx.NodeProto] = []
        self.stored: list[onnx.TensorProto] = []

    def __call__(self, op: str, *inputs: Any, count: int = 1, **attributes: Any) -> Any:
        names = [x if isinstance(x, str) else self.store(x) for x in inputs]
        outputs = [f"{op.lower()}{len(self.nodes)}_{j}" for j in range(count)]
        self.nodes.append(helper.make_node(op, names, outputs, **attributes))
        return outputs[0] if count == 1 else outputs

    def store(self, value: Any, name: str = "") -> str:
        array = np.asarray(value, F32) if not isinstance(value, list) else np.asarray(value, np.int64)
        self.stored.append(numpy_helper.from_array(array, name or f"stored{len(self.stored)}"))
        return self.stored[-1].name

    def weight(self, *shape: int) -> str:
        return self.store(RNG.standard_normal(shape) * 0.5, f"weight{len(self.stored)}")

    def model(self, *outputs: str) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape)],
            [onnx.ValueInfoProto(name=n) for n in outputs],
            self.stored,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)


def check(net: Net, *outputs: str, size: tuple[int, ...], tolerance: float = 1e-5) -> Counter[str]:
    """How often rules were applied, of a net of which outputs and gradients stay the same."""
    plain = Builder(load(net.model(*outputs)), OPERATORS).build()
    fused = copy.deepcopy(plain)
    applied = fuse(fused)
    assert [n for n, _ in fused.named_parameters()] == [n for n, _ in plain.named_parameters()]
    for training in (False, True):
        expected, found = (run(m.train(training), size) for m in (plain, fused))
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance)
    return applied


def run(module: Any, size: tuple[int, ...]) -> list[torch.Tensor]:
    """Outputs and gradients of a module on seeded inputs."""
    torch.manual_seed(0)
    x = torch.randn(size, requires_grad=True)
    module.zero_grad()
    y = module(x)
    ys = y if isinstance(y, tuple) else (y,)
    sum((part * torch.randn(part.shape)).sum() for part in ys).backward()
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    return [*(part.detach().clone() for part in ys), x.grad, *grads]  # type: ignore[list-item]


def normalise(net: Net, x: str, axes: list[int], eps: float = 1e-5, *, keep: int = 1, second: str = "") -> str:
    centred = net("Sub", x, net("ReduceMean", x, axes=axes, keepdims=keep))
    again = net("Sub", x, net("ReduceMean", x, axes=axes, keepdims=keep)) if second else centred
    square = net("Mul", again, again) if second == "mul" else net("Pow", again, 2.0)
    variance = net("ReduceMean", square, axes=axes, keepdims=keep)
    return net("Div", centred, net("Sqrt", net("Add", variance, eps)))


@pytest.mark.parametrize("second", ["", "mul", "pow"])
@pytest.mark.parametrize("axes", [[-1], [2]])
def test_a_layer_norm_that_was_taken_apart(axes: list[int], second: str) -> None:
    net = Net(["n", "t", 6])
    y = net("Add", net("Mul", normalise(net, "x", axes, second=second), net.weight(6)), net.weight(6))
    assert check(net, y, size=(2, 3, 6)) == {"layer_norm": 1}
    assert "functional.layer_norm" in mirror(net.model(y)).code


def test_a_layer_norm_over_two_axes_without_a_bias() -> None:
    net = Net(["n", 4, 6])
    y = net("Mul", normalise(net, "x", [-1, -2]), net.weight(4, 6))
    assert check(net, y, size=(2, 4, 6)) == {"layer_norm": 1}


def test_a_layer_norm_whose_parameters_are_broadcast_or_missing() -> None:
    for scale in ((1, 1), (3, 6)):
        net = Net(["n", "t", 6])
        y = net("Mul", normalise(net, "x", [-1]), net.weight(*scale))
        assert check(net, y, size=(2, 3, 6)) == {"layer_norm": 1}
    net = Net(["n", "t", "w"])
    y = net("Neg", normalise(net, "x", [-1]))
    assert check(net, y, size=(2, 3, 5)) == {"layer_norm": 1}


@pytest.mark.parametrize(
    "make",
    [
        lambda net: normalise(net, "x", [1]),  # not the trailing axis
        lambda net: normalise(net, "x", [-1, -3]),  # not next to each other
        lambda net: normalise(net, net("Transpose", "x", perm=[0, 2, 1]), [1]),
        lambda net: net("Div", net("Sub", "x", 1.0), net("Sqrt", net("Add", net("ReduceMean", "x", axes=[-1]), 9.0))),
    ],
)
def test_what_is_no_layer_norm(make: Callable[[Net], str]) -> None:
    net = Net(["n", 4, 6])
    assert check(net, make(net), size=(2, 4, 6)) == {}


def test_a_layer_norm_of_which_more_is_read() -> None:
    net = Net(["n", 6])
    centred = net("Sub", "x", net("ReduceMean", "x", axes=[-1]))
    variance = net("ReduceMean", net("Pow", centred, 2.0), axes=[-1])
    y = net("Div", centred, net("Sqrt", net("Add", variance, 1e-5)))
    assert check(net, y, variance, size=(3, 6)) == {}


def gelu(net: Net, x: str, *, root: float = math.sqrt(2), half: float = 0.5, first: bool = False) -> str:
    gate = net("Add", net("Erf", net("Div", x, root)), 1.0)
    if first:
        return net("Mul", net("Mul", x, half), gate)
    return net("Mul", net("Mul", x, gate), half)


def test_gelu_in_its_forms() -> None:
    for first in (False, True):
        net = Net(["n", 6])
        assert check(net, gelu(net, "x", first=first), size=(3, 6)) == {"gelu": 1}
    net = Net(["n", 6])
    inner = net("Add", "x", net("Mul", net("Pow", "x", 3.0), 0.044715))
    gate = net("Add", 1.0, net("Tanh", net("Mul", inner, math.sqrt(2 / math.pi))))
    assert check(net, net("Mul", net("Mul", 0.5, "x"), gate), size=(3, 6)) == {"gelu": 1}


def test_what_is_no_gelu() -> None:
    for wrong in ({"root": 1.41}, {"half": 0.51}):
        net = Net(["n", 6])
        assert check(net, gelu(net, "x", **wrong), size=(3, 6)) == {}
    net = Net(["n", 6])
    other = net("Mul", net("Neg", "x"), net("Add", net("Erf", net("Div", "x", math.sqrt(2))), 1.0))
    assert check(net, net("Mul", other, 0.5), size=(3, 6)) == {}


def test_activations_by_a_gate_of_their_own_input() -> None:
    net = Net(["n", 6])
    silu = net("Mul", net("Sigmoid", "x"), "x")
    mish = net("Mul", silu, net("Tanh", net("Softplus", silu)))
    y = net("Mul", mish, net("HardSigmoid", mish, alpha=1 / 6, beta=0.5))
    assert check(net, y, size=(3, 6)) == {"gated": 3}
    net = Net(["n", 6])
    assert check(net, net("Mul", "x", net("Sigmoid", net("Neg", "x"))), size=(3, 6)) == {}


def test_a_linear_layer_keeps_its_weight_as_stored() -> None:
    net = Net(["n", "t", 6])
    weight = net.weight(6, 4)
    y = net("Add", net.weight(4), net("MatMul", "x", weight))
    assert check(net, y, size=(2, 3, 6)) == {"linear": 1}
    assert dict(mirror(net.model(y)).named_parameters())[weight].shape == (6, 4)


def test_what_is_no_linear_layer() -> None:
    net = Net(["n", 3, 6])
    assert check(net, net("Add", net.weight(3, 4), net("MatMul", "x", net.weight(6, 4))), size=(2, 3, 6)) == {}
    net = Net(["n", 3, 6])
    assert check(net, net("Add", net.weight(4), net("MatMul", "x", net.weight(6, 1))), size=(2, 3, 6)) == {}
    net = Net(["n", 3, 6])
    product = net("MatMul", "x", net.weight(6, 4))
    assert check(net, net("Add", product, net.weight(4)), product, size=(2, 3, 6)) == {}


def attention(net: Net, *, mask: Any = None, axis: int = -1, scale: float = 0.5) -> str:
    """Of 2 heads of width 4, with queries, keys and values from one input (n, t, 24)."""
    parts = []
    for part, turn in zip(net("Split", "x", [8, 8, 8], axis=2, count=3), ("q", "k", "v"), strict=True):
        perm = [0, 2, 3, 1] if turn == "k" else [0, 2, 1, 3]
        parts.append(net("Transpose", net("Reshape", part, [0, 0, 2, 4]), perm=perm))
    scores = net("Mul", net("MatMul", parts[0], parts[1]), scale)
    if mask is not None:
        scores = net("Add", scores, mask)
    return net("MatMul", net("Softmax", scores, axis=axis), parts[2])


def test_attention_in_its_forms() -> None:
    net = Net(["n", "t", 24])
    y = attention(net)
    assert check(net, y, size=(2, 5, 24)) == {"attention": 1}
    nodes = [n.target for n in mirror(net.model(y)).graph.nodes]
    assert "transpose" not in nodes and nodes.count("permute") == 3
    for mask in ((5, 5), (1, 2, 5, 5), (1, 1, 1, 5)):
        net = Net(["n", 5, 24])
        y = attention(net, mask=np.where(RNG.random(mask) < 0.5, -1e4, 0) + 0.1 * RNG.standard_normal(mask))
        assert check(net, y, size=(2, 5, 24)) == {"attention": 1}


def test_attention_of_scaled_queries_and_keys() -> None:
    net = Net(["n", 2, 5, 4])
    q, k = net("Mul", "x", 0.7), net("Div", net("Transpose", net("Sin", "x"), perm=[0, 1, 3, 2]), 2.0)
    y = net("MatMul", net("Softmax", net("MatMul", q, k), axis=3), net("Cos", "x"))
    assert check(net, y, size=(2, 2, 5, 4)) == {"attention": 1}


def test_attention_with_a_mask_in_another_precision() -> None:
    """The lowest float32 is minus infinity in bfloat16: a row of it would have no shares left."""
    net = Net(["n", 5, 24])
    module = mirror(net.model(attention(net, mask=np.full((5, 5), np.finfo(F32).min))))
    x = torch.randn(2, 5, 24)
    found, expected = module(x.bfloat16()).float(), module(x)
    assert found.abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(module(x.double()).float(), expected, rtol=1e-4, atol=1e-4)


def test_what_is_no_attention() -> None:
    net = Net(["n", 5, 24])
    assert check(net, attention(net, axis=2), size=(2, 5, 24)) == {}
    net = Net(["n", 5, 24])
    wide = attention(net, mask=RNG.standard_normal((3, 1, 2, 5, 5)))
    assert check(net, wide, size=(2, 5, 24)) == {}
    net = Net(["n", 5, 24])
    y = attention(net)
    shares = next(n.output[0] for n in net.nodes if n.op_type == "Softmax")
    assert check(net, y, shares, size=(2, 5, 24)) == {}


def test_slices_that_leave_no_rest_are_a_split() -> None:
    net = Net(["n", 12])
    laid = net("Reshape", "x", [-1, 3, 4])
    parts = [net("Slice", laid, [k], [k + 1 if k < 2 else 2**62], [1]) for k in (1, 0, 2)]
    y = net("Add", net("Mul", parts[0], parts[1]), parts[2])
    assert check(net, y, size=(5, 12)) == {"split": 1}


def test_slices_with_a_rest_or_of_an_unknown_size_stay() -> None:
    net = Net(["n", 12])
    laid = net("Reshape", "x", [-1, 3, 4])
    y = net("Mul", *(net("Slice", laid, [k], [k + 1], [1]) for k in (0, 1)))
    assert check(net, y, size=(5, 12)) == {}
    net = Net(["n", "w"])
    y = net("Mul", *(net("Slice", "x", [k], [k + 1], [1]) for k in (0, 1)))
    assert check(net, y, size=(5, 2)) == {}


def convolved(net: Net) -> str:
    return net("Conv", "x", net.weight(4, 3, 1, 1), net.weight(4))


def test_activations_overwrite_only_what_nothing_else_reads() -> None:
    net = Net(["n", 3, 5, 5])
    y = net("Clip", net("Add", net("Relu", convolved(net)), 1.0), 0.0, 6.0)
    assert check(net, y, size=(2, 3, 5, 5)) == {"in_place": 2}
    net = Net(["n", 3, 5, 5])
    made = convolved(net)
    assert check(net, net("Relu", made), made, size=(2, 3, 5, 5)) == {}
    net = Net(["n", 3, 5, 5])
    assert check(net, net("Relu", net("Sigmoid", "x")), net("Relu", "x"), size=(2, 3, 5, 5)) == {}


def test_normalisation_is_put_back_under_an_activation_in_place() -> None:
    net = Net(["n", 3, 5, 5])
    y = net("Conv", net("Relu", convolved(net)), net.weight(2, 4, 1, 1), net.weight(2))
    module = mirror(net.model(y))
    x = torch.randn(4, 3, 5, 5)
    before = module(x)
    assert rebn(module, channel_moments(module, [(x,)])) == 1
    torch.testing.assert_close(module(x), before, rtol=1e-4, atol=1e-5)
    module.train()(x).sum().backward()


class Block(torch.nn.Module):
    """A transformer's layer as people write it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = torch.nn.LayerNorm(16), torch.nn.Linear(16, 48), torch.nn.Linear(16, 16)
        self.mlp = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (x.shape[0], x.shape[1], 3, 2, 8)
        q, k, v = self.qkv(self.norm(x)).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).reshape(x.shape))
        return x + self.mlp(x)


@pytest.mark.filterwarnings("ignore")
def test_an_export_of_an_old_opset(tmp_path: Any) -> None:
    torch.manual_seed(0)
    block, x, path = Block(), torch.randn(2, 5, 16), tmp_path / "block.onnx"
    axes = {"x": {0: "n", 1: "t"}}
    torch.onnx.export(block, (x,), str(path), dynamo=False, opset_version=14, input_names=["x"], dynamic_axes=axes)
    module = Builder(load(path), OPERATORS).build()
    assert fuse(module) == {"layer_norm": 1, "gelu": 1, "linear": 4, "attention": 1}
    for other in (x, torch.randn(3, 7, 16)):
        torch.testing.assert_close(module(other), block(other), rtol=1e-4, atol=1e-5)


def test_bodies_of_control_flow_are_fused_as_well() -> None:
    net = Net(["n", 6])
    body = Net(["n", 6])
    made = gelu(body, "x")
    graph = helper.make_graph(body.nodes, "body", [], [onnx.ValueInfoProto(name=made)], body.stored)
    taken = net("Greater", net("ReduceSum", "x", keepdims=0), 0.0)
    y = net("If", taken, then_branch=graph, else_branch=graph)
    plain = Builder(load(net.model(y)), OPERATORS).build()
    assert fuse(copy.deepcopy(plain)) == {"gelu": 2}
