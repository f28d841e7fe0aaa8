"""Mirrors of files that are fixed to one sample, run on several."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from onnxprune.data.signature import signature_of
from onnxprune.mirroring import mirror
from onnxprune.model.infer import infer
from onnxprune.model.load import load
from onnxprune.ops import OPERATORS
from onnxprune.train.batching import free_batch
from tests.graphs import from_text

ZEROS = "Constant<value=float[1,2,4] {0,0,0,0,0,0,0,0}>()"
GRAPHS = {  # the output's sizes, and what leads from x [1,6,4] to it
    "nothing in the way": ("1,6,4", "y = Relu(x)"),
    "a reshape": ("1,24", "s = Constant<value_ints=[1,24]>() y = Reshape(x, s)"),
    "a size left open": ("1,12,2", "s = Constant<value_ints=[1,-1,2]>() y = Reshape(x, s)"),
    "zeros beside the data": ("1,8,4", f"z = {ZEROS} y = Concat<axis=1>(x, z)"),
    "the batch in another axis": (
        "1,6,4",
        "s = Constant<value_ints=[2,3,4]>() t = Constant<value_ints=[1,6,4]>() r = Reshape(x, s) y = Reshape(r, t)",
    ),
    "samples side by side": ("2,6,4", "y = Concat<axis=0>(x, x)"),
    "a sum over the samples": ("1,6,4", "m = ReduceMean<axes=[0],keepdims=1>(x) y = Sub(x, m)"),
    "the same for all": ("1,6,4", "y = Mul(x, zero)"),
}
BOUND = {"samples side by side", "a sum over the samples", "the same for all"}


@pytest.mark.parametrize("name", GRAPHS)
def test_several_samples_run_at_once_where_they_give_what_each_gives(name: str) -> None:
    sizes, text = GRAPHS[name]
    proto = from_text(f"(float[1,6,4] x) => (float[{sizes}] y) {{ {text} }}", zero=np.zeros((), np.float32))
    graph = infer(load(proto).model, OPERATORS)
    module = mirror(graph).eval()
    before = module.code
    assert free_batch(module, graph, signature_of(graph)) == (name not in BOUND)
    if name in BOUND:
        assert module.code == before
    else:
        x = torch.randn(3, 6, 4)
        torch.testing.assert_close(module(x), torch.cat([module(one[None]) for one in x]))
