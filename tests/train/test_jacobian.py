"""The mean Jacobian singular value against networks whose singular values are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from onnxprune import UsageError
from onnxprune.train import jacobian
from onnxprune.train.jacobian import mean_jsv


def linear(*weights: Tensor) -> nn.Sequential:
    layers = []
    for w in weights:
        layer = nn.Linear(w.shape[1], w.shape[0])
        layer.weight.data = w
        layers.append(layer)
    return nn.Sequential(*layers)


def orthogonal(n: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed)))[0]


def test_singular_values_of_a_linear_network_are_those_of_the_product_of_its_weights() -> None:
    left, right = orthogonal(4, 0), orthogonal(6, 1)
    values = torch.tensor([5.0, 2.0, 1.0, 0.0])
    middle = torch.zeros(4, 6)
    middle[:, :4] = values.diag()
    assert mean_jsv(linear(right, middle, left), torch.randn(3, 6)) == pytest.approx(2.0, abs=1e-5)


def test_a_network_with_more_outputs_than_inputs_has_as_many_singular_values_as_inputs() -> None:
    tall = torch.cat([3 * torch.eye(2), torch.zeros(5, 2)])
    assert mean_jsv(linear(tall), torch.randn(4, 2)) == pytest.approx(3.0, abs=1e-6)


def test_several_inputs_make_one_jacobian() -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor, index: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return index, 3 * x + 4 * y

    arguments = (torch.randn(2, 3), torch.zeros(2, 1, dtype=torch.int64), torch.randn(2, 3))
    assert mean_jsv(Sum(), *arguments, output=1) == pytest.approx(5.0, abs=1e-6)


def test_a_curved_network_is_taken_sample_by_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 5)).eval()
    x = torch.randn(6, 2, 4, 4)
    each = [torch.autograd.functional.jacobian(net, one[None]).reshape(5, 32) for one in x]
    wanted = torch.stack([torch.linalg.svdvals(j.double()) for j in each]).mean()
    assert mean_jsv(net, x) == pytest.approx(float(wanted), rel=1e-6)
    monkeypatch.setattr(jacobian, "MOST_BYTES", 1)  # a sample at a time
    assert mean_jsv(net, x) == pytest.approx(float(wanted), rel=1e-6)


def test_the_network_is_left_as_it_was() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout()).train()
    net[2].eval()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    mean_jsv(net, torch.randn(4, 3))
    assert [m.training for m in net.modules()] == [True, True, True, False]
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_tokens_alone_have_no_jacobian() -> None:
    with pytest.raises(UsageError, match="floating point"):
        mean_jsv(nn.Embedding(5, 3), torch.zeros(2, 1, dtype=torch.int64))


def test_an_output_that_mixes_samples_is_refused() -> None:
    class Total(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum(0)

    with pytest.raises(UsageError, match="one entry for each"):
        mean_jsv(Total(), torch.randn(4, 3))
