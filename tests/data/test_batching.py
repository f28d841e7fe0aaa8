"""How batches are cut: sizes, shuffling, resuming, sharing among processes, and models of a fixed batch size."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxprune import DataError
from onnxprune.data import Batch, Port, Signature, Source, open_data
from tests.data.ports import FLOAT, INT, marked, marks, one


def source_of(kind: str, count: int, signature: Signature | None = None, cuts: tuple[int, ...] = (3,)) -> Source:
    """Samples 0 to count - 1, as an array or as a stream of batches."""
    data: Any = marked(count, 2)
    if kind == "stream":
        edges = [0]
        while edges[-1] < count:
            edges.append(min(count, edges[-1] + cuts[len(edges) % len(cuts)]))
        pieces = [data[a:b] for a, b in zip(edges, edges[1:], strict=False)]

        def data() -> Iterator[np.ndarray]:
            yield from pieces

    return open_data(data, signature or one(None, 2))


KINDS = pytest.mark.parametrize("kind", ["array", "stream"])
counts, sizes = st.integers(1, 40), st.integers(1, 12)


@KINDS
@given(count=counts, size=sizes, cuts=st.lists(st.integers(1, 7), min_size=1, max_size=4), drop=st.booleans())
def test_a_pass_gives_every_sample_once_in_batches_of_the_size(
    kind: str, count: int, size: int, cuts: list[int], drop: bool
) -> None:
    if drop and count < size:
        return
    source = source_of(kind, count, cuts=tuple(cuts))
    plain = marks(source.batches(size, drop_last=drop))
    whole = count - count % size if drop else count
    assert [k for b in plain for k in b] == list(range(whole))
    assert all(len(b) == size for b in plain[:-1])
    assert len(plain) == (whole + size - 1) // size
    shuffled = [k for b in marks(source.batches(size, shuffle=True, seed=count)) for k in b]
    assert sorted(shuffled) == list(range(count))


@KINDS
@given(count=counts, size=sizes, world=st.integers(1, 5), shuffle=st.booleans(), start=st.integers(0, 4))
def test_the_shares_of_all_processes_are_what_one_sees(
    kind: str, count: int, size: int, world: int, shuffle: bool, start: int
) -> None:
    source = source_of(kind, count)
    key = {"shuffle": shuffle, "seed": 7, "epoch": 2}
    alone = marks(source.batches(size, **key))
    shares = [marks(source.batches(size, rank=r, world=world, start=start, **key)) for r in range(world)]
    assert len({len(s) for s in shares}) == 1
    assert [[k for part in parts for k in part] for parts in zip(*shares, strict=True)] == alone[start:]
    for batch, *parts in zip(alone[start:], *shares, strict=True):
        assert [len(p) for p in parts] == [len(p) for p in np.array_split(np.array(batch), world)]


@KINDS
def test_shuffling_follows_from_seed_and_epoch(kind: str) -> None:
    source = source_of(kind, 100)
    orders = {(s, e): marks(source.batches(100, shuffle=True, seed=s, epoch=e))[0] for s in (0, 1) for e in (0, 1)}
    assert orders[0, 0] == marks(source_of(kind, 100).batches(100, shuffle=True))[0]
    assert len({tuple(o) for o in orders.values()} | {tuple(range(100))}) == 5


def test_shuffling_is_the_same_in_another_process() -> None:
    code = (
        "import numpy as np\nfrom onnxprune.data import *\n"
        "s = open_data(np.arange(20, dtype='f4'), Signature((Port('x', np.dtype('f4'), (None,)),), ()))\n"
        "print([int(v) for b in s.batches(6, shuffle=True, seed=3, epoch=4) for v in b.inputs['x']])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    source = open_data(np.arange(20, dtype=np.float32), one(None))
    assert str([k for b in marks(source.batches(6, shuffle=True, seed=3, epoch=4)) for k in b]) == done.stdout.strip()


def test_skipping_reads_nothing_of_what_can_be_read_at_any_place() -> None:
    read = []

    class Dataset:
        def __len__(self) -> int:
            return 1000

        def __getitem__(self, k: int) -> np.ndarray:
            read.append(k)
            return np.full(2, k, np.float32)

    source = open_data(Dataset(), one(None, 2))
    read.clear()
    assert marks(source.batches(10, start=99)) == [list(range(990, 1000))]
    assert len(read) == 10
    read.clear()
    assert [len(b) for b in marks(source.batches(10, start=98, rank=1, world=5))] == [2, 2]
    assert len(read) == 4


@KINDS
@pytest.mark.parametrize("cuts", [(3,), (4,)])
def test_a_fixed_batch_size_is_kept_to_and_the_rest_left_out(kind: str, cuts: tuple[int, ...]) -> None:
    source = source_of(kind, 10, one(4, 2), cuts)
    assert marks(source.batches(32)) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert marks(source.batches(1, start=1)) == [[4, 5, 6, 7]]
    assert [marks(source.batches(1, rank=r, world=2)) for r in (0, 1)] == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]
    shuffled = marks(source.batches(1, shuffle=True, seed=2))
    assert [len(b) for b in shuffled] == [4, 4]
    with pytest.raises(DataError, match=r"does not fill one batch of 12 \(3 processes\)"):
        list(source.batches(1, world=3))


def test_no_fixed_batch_is_made_of_different_sizes() -> None:
    pieces = [np.full((n, size), size, np.float32) for n, size in ((3, 5), (6, 7), (4, 2))]
    for shuffle in (False, True):
        found = [b.inputs["x"].shape for b in open_data(lambda: pieces, one(4, None)).batches(4, shuffle=shuffle)]
        assert found == [(4, 7), (4, 2)]


def test_a_fixed_batch_size_is_told_where_it_leaves_samples_out() -> None:
    assert source_of("array", 10, one(4, 2)).size == 8
    assert "the last 2 left out: the model takes batches of 4" in source_of("array", 10, one(4, 2)).description
    assert source_of("array", 8, one(4, 2)).description.endswith("(8 samples)")
    assert marks(source_of("array", 3, one(1, 2)).batches(8)) == [[0], [1], [2]]


@KINDS
def test_too_few_samples_are_told(kind: str) -> None:
    with pytest.raises(DataError, match="batch of 8|batches of 8"):
        list(source_of(kind, 3, one(8, 2)).batches(8))
    with pytest.raises(DataError, match="does not fill one batch of 8") as caught:
        list(source_of(kind, 3).batches(8, drop_last=True))
    assert "smaller batches" in caught.value.hint


def test_files_of_one_fixed_batch_each_are_shuffled_as_a_whole(tmp_path: Any) -> None:
    for k in range(8):
        np.savez(tmp_path / f"{k}.npz", x=np.array([10 * k, 10 * k + 1], np.float32))
    found = marks(open_data(tmp_path, one(2)).batches(2, shuffle=True, seed=1))
    assert sorted(found) == [[10 * k, 10 * k + 1] for k in range(8)] != found


# A voice activity detector's inputs: audio, state and sample rate share no batch axis.
FEEDS = Signature(
    (Port("audio", FLOAT, (None, 512)), Port("state", FLOAT, (2, None, 4)), Port("rate", INT, ())),
    (Port("p", FLOAT, (None, 1)),),
)


def feed(k: int) -> dict[str, np.ndarray]:
    return {
        "audio": np.full((1, 512), k, np.float32),
        "state": np.zeros((2, 1, 4), np.float32),
        "rate": np.array(16000),
        "p": np.full((1, 1), k, np.float32),
    }


@pytest.mark.parametrize("kind", ["stack", "list", "generator", "files"])
def test_inputs_without_a_common_batch_axis_are_given_as_complete_feeds(kind: str, tmp_path: Any) -> None:
    feeds = [feed(k) for k in range(5)]
    data: Any = {"list": feeds, "generator": lambda: iter(feeds), "files": tmp_path}.get(kind)
    if kind == "stack":
        data = {n: np.stack([f[n] for f in feeds]) for n in feeds[0]}
    for k, arrays in enumerate(feeds):
        np.savez(tmp_path / f"{k}.npz", **arrays)
    source = open_data(data, FEEDS)
    batches = list(source.batches(8))
    assert [b.inputs["audio"][0, 0] for b in batches] == [0, 1, 2, 3, 4]
    assert [b.targets["p"].tolist() for b in batches] == [[[k]] for k in range(5)]
    assert {tuple(a.shape for a in b.inputs.values()) for b in batches} == {((1, 512), (2, 1, 4), ())}
    assert {b.size for b in batches} == {1}
    assert (source.size, "5 feeds" in source.description) == (5, True)
    ranks = [[b.inputs["audio"][0, 0] for b in source.batches(8, rank=r, world=2)] for r in (0, 1)]
    assert ranks == [[0, 2], [1, 3]]


def test_samples_alone_are_no_feed() -> None:
    with pytest.raises(DataError, match="wants") as caught:
        open_data([{"audio": np.zeros(512, np.float32), "state": np.zeros((2, 4), np.float32), "rate": 1}], FEEDS)
    assert "complete feeds" in caught.value.hint


@KINDS
def test_batches_are_the_callers_own(kind: str) -> None:
    source = source_of(kind, 6)
    for batch in source.batches(4, rank=0, world=2):
        assert batch.inputs["x"].flags.writeable
        assert batch.inputs["x"].flags.c_contiguous
        assert type(batch.inputs["x"]) is np.ndarray
        batch.inputs["x"][:] = -1
    assert marks(source.batches(6)) == [[0, 1, 2, 3, 4, 5]]


def test_the_size_of_a_batch_is_what_its_inputs_share() -> None:
    assert Batch({"a": np.zeros((3, 1)), "b": np.zeros(3)}, {}).size == 3
    assert Batch({"a": np.zeros((3, 1)), "b": np.zeros(())}, {}).size == 1
    assert Batch({"a": np.zeros((0, 1))}, {}).size == 0


@pytest.mark.parametrize("wrong", [{"size": 0}, {"start": -1}, {"rank": 2, "world": 2}, {"rank": -1}])
def test_senseless_arguments_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="no batches"):
        list(source_of("array", 4).batches(**{"size": 2, **wrong}))
