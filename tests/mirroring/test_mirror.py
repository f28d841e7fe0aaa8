"""The mirror: the model's function under the model's names, a module like any other."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxprune
from onnxprune.errors import NotMirrored
from onnxprune.model.save import to_proto
from onnxprune.rewrite.weights import with_weights
from onnxprune.verify.runs import session

torch = pytest.importorskip("torch")

from onnxprune.mirroring import mirror  # noqa: E402
from onnxprune.mirroring.rebn import channel_moments, fold, freeze_statistics, has_normalisation, rebn  # noqa: E402
from onnxprune.mirroring.values import stored_values  # noqa: E402
from onnxprune.train.shrink import shrink  # noqa: E402

RNG = np.random.default_rng(0)


def made(nodes, inputs, outputs, weights, opset: int = 17) -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node(op, ins, outs, **attributes) for op, ins, outs, attributes in nodes],
        "made",
        [helper.make_tensor_value_info(n, t, s) for n, t, s in inputs],
        [helper.make_tensor_value_info(n, t, s) for n, t, s in outputs],
        [numpy_helper.from_array(w, n) for n, w in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model: onnx.ModelProto, path: Path, *arrays: np.ndarray) -> list[np.ndarray]:
    onnx.save(model, path)
    runner = session(path)
    return runner.run(None, dict(zip([i.name for i in runner.get_inputs()], arrays, strict=True)))


@pytest.fixture
def image() -> np.ndarray:
    return RNG.standard_normal((5, 3, 16, 16)).astype(np.float32)


@pytest.fixture
def shapes() -> onnx.ModelProto:
    """A head split whose sizes are computed from the input's, as exporters write it."""
    nodes = [
        ("MatMul", ["x", "w"], ["y"], {}),
        ("Shape", ["y"], ["s"], {}),
        ("Gather", ["s", "zero"], ["b"], {}),
        ("Gather", ["s", "one"], ["n"], {}),
        ("Gather", ["s", "two"], ["width"], {}),
        ("Div", ["width", "four"], ["head"], {}),
        ("Unsqueeze", ["b", "axis"], ["b1"], {}),
        ("Unsqueeze", ["n", "axis"], ["n1"], {}),
        ("Unsqueeze", ["head", "axis"], ["h1"], {}),
        ("Concat", ["b1", "n1", "heads", "h1"], ["target"], {"axis": 0}),
        ("Reshape", ["y", "target"], ["z"], {}),
        ("Cast", ["width"], ["wide"], {"to": TensorProto.FLOAT}),
        ("Sqrt", ["wide"], ["root"], {}),
        ("Div", ["z", "root"], ["out"], {}),
    ]
    scalars = {"zero": 0, "one": 1, "two": 2, "four": 4}
    weights = {n: np.array(v, np.int64) for n, v in scalars.items()}
    weights |= {"axis": np.array([0]), "heads": np.array([4]), "w": RNG.standard_normal((6, 8)).astype(np.float32)}
    return made(
        nodes, [("x", TensorProto.FLOAT, ["b", "n", 6])], [("out", TensorProto.FLOAT, ["b", "n", 4, 2])], weights
    )


def test_it_computes_what_onnxruntime_computes(tiny_cnn_model, tmp_path: Path, image) -> None:
    module = mirror(tiny_cnn_model)
    expected = run(tiny_cnn_model, tmp_path / "m.onnx", image)[0]
    np.testing.assert_allclose(module(torch.from_numpy(image)).detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_weights_have_their_initializers_names(tiny_cnn_model) -> None:
    module = mirror(tiny_cnn_model)
    assert set(module.state_dict()) == {t.name for t in tiny_cnn_model.graph.initializer}
    assert {n for n, _ in module.named_buffers()} == {"bn.mean", "bn.var"}


@pytest.mark.parametrize(
    "name", ["/layer/0/weight", "onnx::Conv_193", "a..b", "forward", "training", "1.weight", "ä é"]
)
def test_any_name_finds_a_place_and_back(name: str) -> None:
    weights = {name: RNG.standard_normal((4, 3)).astype(np.float32), f"{name}.bias": np.ones(3, np.float32)}
    nodes = [("MatMul", ["x", name], ["y"], {}), ("Add", ["y", f"{name}.bias"], ["z"], {})]
    model = made(nodes, [("x", TensorProto.FLOAT, ["b", 4])], [("z", TensorProto.FLOAT, ["b", 3])], weights)
    graph = onnxprune.load(model)
    module = mirror(graph)
    assert {path[-1] for path in stored_values(module)} == set(weights)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1)
    written = {
        t.name: numpy_helper.to_array(t) for t in to_proto(with_weights(graph, stored_values(module))).graph.initializer
    }
    for key, value in weights.items():
        np.testing.assert_array_equal(written[key], value + 1)


def test_it_is_a_module_like_any_other(tiny_cnn_model, image) -> None:
    module = mirror(tiny_cnn_model)
    x = torch.from_numpy(image)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        next(twin.parameters()).zero_()
    assert not torch.equal(twin(x), module(x))
    twin.load_state_dict(module.state_dict())
    torch.testing.assert_close(twin(x), module(x), rtol=0, atol=0)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    assert "conv2d" in module.code
    assert "conv1_weight" in module.code


def test_sizes_are_arithmetic_and_constants_need_no_node(shapes: onnx.ModelProto, tmp_path: Path) -> None:
    module = mirror(shapes)
    functions = [n for n in module.graph.nodes if n.op == "call_function"]
    assert len(functions) == 2  # the product and the division by a number
    assert [n for n, _ in module.named_parameters()] == ["w"]
    assert not list(module.buffers())
    for b, n in ((2, 3), (5, 1)):
        x = RNG.standard_normal((b, n, 6)).astype(np.float32)
        expected = run(shapes, tmp_path / "s.onnx", x)[0]
        np.testing.assert_allclose(module(torch.from_numpy(x)).detach().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_batch_statistics_move_in_training_only(tiny_cnn_model, image) -> None:
    module, x = mirror(tiny_cnn_model), torch.from_numpy(image)
    before = module.state_dict()["bn.mean"].clone()
    module(x)
    assert torch.equal(module.state_dict()["bn.mean"], before)
    module.train()(x)
    y = torch.nn.functional.conv2d(x, module.state_dict()["conv1.weight"], padding=1).mean((0, 2, 3))
    torch.testing.assert_close(module.state_dict()["bn.mean"], 0.9 * before + 0.1 * y)


def test_frozen_statistics_stay(tiny_cnn_model, image) -> None:
    module, x = mirror(tiny_cnn_model), torch.from_numpy(image)
    expected = module(x)
    freeze_statistics(module)
    torch.testing.assert_close(module.train()(x), expected)


def test_every_weight_gets_a_gradient(tiny_cnn_model, image) -> None:
    module = mirror(tiny_cnn_model).train()
    module(torch.from_numpy(image)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_autocast(tiny_cnn_model, image, dtype: torch.dtype) -> None:
    module, x = mirror(tiny_cnn_model), torch.from_numpy(image)
    with torch.autocast("cpu", dtype):
        found = module(x)
    torch.testing.assert_close(found.float(), module(x), rtol=0.1, atol=0.1)


def test_what_cannot_be_mirrored_is_named_altogether(tiny_cnn_model) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(tiny_cnn_model)
    for k, kind in ((2, "Wink"), (4, "Blink")):
        model.graph.node[k].domain, model.graph.node[k].op_type = "my.domain", kind
    model.opset_import.add(domain="my.domain", version=1)
    with pytest.raises(NotMirrored) as caught:
        mirror(model)
    assert caught.value.operators == ("my.domain::Wink", "my.domain::Blink")
    assert "my.domain::Wink 'relu1'" in str(caught.value)
    assert "my.domain::Blink 'relu2'" in str(caught.value)


def test_half_models_train_in_float32_and_are_written_as_they_were() -> None:
    weights = {"w": RNG.standard_normal((4, 3)).astype(np.float16)}
    ports = [("x", TensorProto.FLOAT16, ["b", 4])], [("y", TensorProto.FLOAT16, ["b", 3])]
    graph = onnxprune.load(made([("MatMul", ["x", "w"], ["y"], {})], *ports, weights))
    module = mirror(graph, half=torch.float32)
    assert module.w.dtype == torch.float32
    assert module(torch.ones(2, 4, dtype=torch.float16)).dtype == torch.float32
    with torch.no_grad():
        module.w.add_(0.5)
    stored = to_proto(with_weights(graph, stored_values(module))).graph.initializer[0]
    np.testing.assert_array_equal(numpy_helper.to_array(stored), weights["w"] + np.float16(0.5))


def folded(image_channels: int = 3) -> onnx.ModelProto:
    weights = {
        "a.weight": RNG.standard_normal((8, image_channels, 3, 3)).astype(np.float32),
        "a.bias": RNG.standard_normal(8).astype(np.float32),
        "b.weight": RNG.standard_normal((6, 8, 3, 3)).astype(np.float32) / 8,
        "b.bias": RNG.standard_normal(6).astype(np.float32),
    }
    nodes = [
        ("Conv", ["x", "a.weight", "a.bias"], ["y"], {"pads": [1, 1, 1, 1]}),
        ("Relu", ["y"], ["r"], {}),
        ("Conv", ["r", "b.weight", "b.bias"], ["z"], {"pads": [1, 1, 1, 1]}),
    ]
    return made(nodes, [("x", TensorProto.FLOAT, ["b", 3, 8, 8])], [("z", TensorProto.FLOAT, ["b", 6, 8, 8])], weights)


def test_batch_normalisation_is_put_back_and_folded_again() -> None:
    module = mirror(folded())
    x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    before, names = module(x), set(module.state_dict())
    moments = channel_moments(module, [(x[:8],), (x[8:],)])
    assert rebn(module, moments) == 1  # the last convolution is the network's output
    assert has_normalisation(module)
    torch.testing.assert_close(module(x), before, rtol=1e-4, atol=1e-5)
    statistics = next(v for n, v in module.named_buffers() if n.endswith("variance"))
    torch.testing.assert_close(
        statistics, torch.conv2d(x, module.a.weight, module.a.bias, padding=1).var((0, 2, 3), correction=0)
    )
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), 0.05)
    for _ in range(3):
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()
    module.eval()
    trained = module(x)
    assert (trained - before).abs().max() > 0.1
    fold(module)
    assert set(module.state_dict()) == names
    assert not has_normalisation(module)
    torch.testing.assert_close(module(x), trained, rtol=1e-4, atol=1e-5)


def test_the_shrunken_mirror_is_the_rewritten_file(tiny_cnn_model, tmp_path: Path, image) -> None:
    analysis = onnxprune.analyse(tiny_cnn_model)
    module = mirror(analysis.graph)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.01 * torch.randn_like(p))
    plan = onnxprune.Plan({g.id: np.arange(0, g.size, 2) for g in analysis.groups})
    small, graph = shrink(module, analysis, plan)
    assert small.conv1.weight.shape == (32, 3, 3, 3)
    torch.testing.assert_close(small.conv1.weight, module.conv1.weight[::2])
    expected = run(to_proto(graph.model), tmp_path / "small.onnx", image)[0]
    np.testing.assert_allclose(small(torch.from_numpy(image)).detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_constants_made_by_nodes_are_weights_too() -> None:
    value = numpy_helper.from_array(RNG.standard_normal((4, 3)).astype(np.float32))
    nodes = [
        ("Constant", [], ["w"], {"value": value}),
        ("ConstantOfShape", ["size"], ["b"], {"value": numpy_helper.from_array(np.array([0.5], np.float32))}),
        ("Gemm", ["x", "w", "b"], ["y"], {}),
    ]
    ports = [("x", TensorProto.FLOAT, ["b", 4])], [("y", TensorProto.FLOAT, ["b", 3])]
    graph = onnxprune.load(made(nodes, *ports, {"size": np.array([3])}))
    module = mirror(graph)
    assert {n for n, _ in module.named_parameters()} == {"w", "b"}
    with torch.no_grad():
        module.b.copy_(torch.tensor([1.0, 2.0, 3.0]))
    written = to_proto(with_weights(graph, stored_values(module)))
    onnx.checker.check_model(written, full_check=True)
    assert [n.op_type for n in written.graph.node] == ["Constant", "Gemm"]
    assert numpy_helper.to_array(written.graph.initializer[-1]).tolist() == [1.0, 2.0, 3.0]


def test_scalars_masks_and_bounds_are_no_weights() -> None:
    nodes = [
        ("MatMul", ["x", "w"], ["y"], {}),
        ("Mul", ["y", "scale"], ["s"], {}),
        ("Add", ["s", "mask"], ["m"], {}),
        ("Clip", ["m", "low"], ["z"], {}),
    ]
    weights = {
        "w": RNG.standard_normal((4, 4)).astype(np.float32),
        "scale": np.array(0.5, np.float32),
        "mask": np.triu(np.full((4, 4), -1e9, np.float32), 1),
        "low": np.array(-3, np.float32),
    }
    ports = [("x", TensorProto.FLOAT, [4, 4])], [("z", TensorProto.FLOAT, [4, 4])]
    assert [n for n, _ in mirror(made(nodes, *ports, weights)).named_parameters()] == ["w"]


def test_weights_inside_a_branch_are_trained_and_written_back(tmp_path: Path) -> None:
    def branch(name: str, value: float) -> onnx.GraphProto:
        weight = numpy_helper.from_array(np.full((4, 3), value, np.float32), "w")
        node = helper.make_node("MatMul", ["x", "w"], [f"{name}_out"])
        out = helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, None)
        return helper.make_graph([node], name, [], [out], [weight])

    nodes = [("If", ["flag"], ["y"], {"then_branch": branch("then", 1.0), "else_branch": branch("else", 2.0)})]
    ports = [("x", TensorProto.FLOAT, ["b", 4]), ("flag", TensorProto.BOOL, [])], [("y", TensorProto.FLOAT, ["b", 3])]
    graph = onnxprune.load(made(nodes, *ports, {}))
    module = mirror(graph)
    x, flag = np.ones((2, 4), np.float32), np.array(False)
    module(torch.from_numpy(x), torch.tensor(False)).sum().backward()
    with torch.no_grad():
        for p in module.parameters():
            if p.grad is not None:
                p.add_(10)
    written = to_proto(with_weights(graph, stored_values(module)))
    assert run(written, tmp_path / "if.onnx", x, flag)[0].tolist() == [[48.0] * 3] * 2
    assert run(written, tmp_path / "if.onnx", x, np.array(True))[0].tolist() == [[4.0] * 3] * 2


def test_what_stands_behind_an_identity_is_what_it_is_used_as() -> None:
    """Exporters let layers share one tensor through an Identity, statistics and initial states among them."""
    nodes = [
        ("Identity", ["mean"], ["same"], {}),
        ("Identity", ["w"], ["v"], {}),
        ("Conv", ["x", "v"], ["c"], {}),
        ("BatchNormalization", ["c", "scale", "scale", "same", "var"], ["y"], {}),
    ]
    weights = {
        "w": RNG.standard_normal((3, 3, 1, 1)).astype(np.float32),
        "mean": np.zeros(3, np.float32),
        "var": np.ones(3, np.float32),
        "scale": np.ones(3, np.float32),
    }
    image = [("x", TensorProto.FLOAT, ["b", 3, 4, 4])], [("y", TensorProto.FLOAT, ["b", 3, 4, 4])]
    module = mirror(made(nodes, *image, weights))
    assert {n for n, _ in module.named_parameters()} == {"w", "scale"}
    module.train()(torch.randn(8, 3, 4, 4) + 5).sum().backward()
    assert module.mean.abs().max() > 0


def test_statistics_that_nodes_share_stay_as_they_are() -> None:
    nodes = [
        ("BatchNormalization", ["x", "scale", "scale", "mean", "var"], ["y"], {}),
        ("BatchNormalization", ["y", "scale", "scale", "mean", "var"], ["z"], {}),
    ]
    weights = {n: np.full(3, v, np.float32) for n, v in (("mean", 0), ("var", 1), ("scale", 2))}
    image = [("x", TensorProto.FLOAT, ["b", 3, 4, 4])], [("z", TensorProto.FLOAT, ["b", 3, 4, 4])]
    module, x = mirror(made(nodes, *image, weights)), torch.randn(8, 3, 4, 4) + 5
    before = module(x)
    torch.testing.assert_close(module.train()(x), before)
    assert module.mean.abs().max() == 0
