"""Work on several threads: in order, the same whatever their number, and with the threads of torch and numpy as before."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info

from onnxprune.reconstruct.moments import Moments
from onnxprune.workers import each, in_order, product, sparing_threads


@pytest.fixture(params=[1, 2, 6])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def blas() -> list[int]:
    return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]


def test_calls_take_a_share_of_the_threads_and_give_them_back(threads: int) -> None:
    share = {1: 1, 2: 1, 6: 1}[threads]
    before = blas()
    with sparing_threads():
        assert {torch.get_num_threads(), *blas()} == {share}
        assert set(in_order(lambda _: torch.get_num_threads(), range(8))) == {share}
    assert torch.get_num_threads() == threads and blas() == before


def test_results_come_in_order_and_no_further_ahead_than_there_are_workers(threads: int) -> None:
    taken: list[int] = []

    def values() -> Iterator[int]:
        for k in range(9):
            taken.append(k)
            yield k

    def slow(k: int) -> int:
        time.sleep(0.01 * (k % 3 == 0))
        return k

    with sparing_threads():
        for seen, k in enumerate(in_order(slow, values())):
            assert k == seen and len(taken) <= seen + min(threads, 4)


def test_an_error_in_a_job_is_raised(threads: int) -> None:
    def fails() -> None:
        raise KeyError("here")

    with sparing_threads(), pytest.raises(KeyError, match="here"):
        each([lambda: None, fails])


def test_without_workers_everything_runs_where_it_is_called() -> None:
    assert set(in_order(lambda _: threading.current_thread(), range(3))) == {threading.current_thread()}


def test_threads_are_given_back_where_work_is_left_undone(threads: int) -> None:
    with pytest.raises(KeyError), sparing_threads():
        for _ in in_order(lambda _: time.sleep(0.01), range(8)):
            raise KeyError
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("columns", [9, 600])
def test_moments_and_products_are_the_same_on_any_number_of_threads(threads: int, columns: int) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 900, columns)), rng.standard_normal((2, 900, 7))
    alone, together = (Moments.zeros(2, columns, 7) for _ in range(2))
    alone.add(x, y)
    with sparing_threads():
        together.add(x, y)
        found = product(y.swapaxes(1, 2), x)
    for name in ("xx", "yx", "x", "y", "yy"):
        np.testing.assert_allclose(getattr(together, name), getattr(alone, name), rtol=1e-12, atol=1e-10)
    np.testing.assert_allclose(together.xx, np.einsum("gnp,gnq->gpq", x, x), rtol=1e-12, atol=1e-10)
    np.testing.assert_array_equal(together.xx, together.xx.swapaxes(1, 2))
    np.testing.assert_allclose(found, np.einsum("gno,gnp->gop", y, x), atol=1e-10)
