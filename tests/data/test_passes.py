"""Data that a user's code makes: what it may yield, how passes begin anew, and what is said when it fails."""

from __future__ import annotations

import random
from collections import UserDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxprune import DataError
from onnxprune.data import Port, Signature, open_data
from tests.data.ports import FLOAT, INT, marked, marks, one

SIGNATURE = one(None, 2)
TWO = Signature(
    (Port("ids", INT, (None, 3)), Port("mask", INT, (None, 3))), (Port("p", FLOAT, (None,)), Port("q", FLOAT, (None,)))
)
IDS, MASK = marked(2, 3, dtype=np.int64), np.ones((2, 3), np.int64)


class Reader:
    """As onnxruntime's CalibrationDataReader: batches of 2, numbered."""

    def __init__(self, count: int = 3) -> None:
        self.count, self.at = count, 0

    def get_next(self) -> dict[str, np.ndarray] | None:
        self.at += 1
        return {"x": np.full((2, 2), self.at - 1, np.float32)} if self.at <= self.count else None


class Rewinding(Reader):
    rewound = 0

    def rewind(self) -> None:
        self.at = 0
        self.rewound += 1


class Refusing(Reader):
    def rewind(self) -> None:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("item", "signature", "targets"),
    [
        (marked(2, 2), SIGNATURE, {}),
        ({"x": marked(2, 2)}, SIGNATURE, {}),
        (UserDict(x=marked(2, 2), label=[1, 2]), SIGNATURE, {"label": [1, 2]}),
        ((marked(2, 2), np.array([1, 2])), SIGNATURE, {"target": [1, 2]}),
        ([marked(2, 2)], SIGNATURE, {}),
        (({"x": marked(2, 2)}, [3, 4]), SIGNATURE, {"target0": [3, 3], "target1": [4, 4]}),
        (({"x": marked(2, 2)}, np.array([3, 4])), SIGNATURE, {"target": [3, 4]}),
        (({"x": marked(2, 2)}, {"a": [3, 4]}), SIGNATURE, {"a": [3, 4]}),
        ((marked(2, 2), {"a": [3, 4]}), SIGNATURE, {"a": [3, 4]}),
        (((marked(2, 2),), np.array([3, 4])), SIGNATURE, {"target": [3, 4]}),
        ((IDS, MASK), TWO, {}),
        ((IDS, MASK, np.array([5, 6])), TWO, {"target": [5, 6]}),
        (((IDS, MASK), (np.array([5, 6]), np.array([7, 8]))), TWO, {"p": [5, 6], "q": [7, 8]}),
        ({"mask": MASK, "ids": IDS, "label": np.array([5, 6])}, TWO, {"label": [5, 6]}),
    ],
)
def test_items_may_have_every_usual_form(item: Any, signature: Signature, targets: dict[str, list[int]]) -> None:
    if "target0" in targets:
        item = (item[0], [np.full(2, v) for v in item[1]])
    (batch,) = open_data(iter([item]), signature).batches(2)
    assert {n: a.tolist() for n, a in batch.targets.items()} == targets
    assert marks([batch], signature.inputs[0].name) == [[0, 1]]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (None, "item 0 of .* is None"),
        (3, r"input 'x' wants \(N,2\), item 0 of .* gives a single value"),
        (({"x": 1}, 2, 3), "a tuple of 3"),
        ("text", r"input 'x' wants \(N,2\), .* gives a single value"),
        ({"x": [[1], [2, 3]]}, "gives input 'x' as list, which makes no array"),
        ({"x": {"no": "array"}}, "makes no array of numbers"),
        (({"x": marked(2, 2)}, {"x": [1, 2]}), "gives 'x' as input and as target"),
        ({"x": marked(2, 3)}, r"wants \(N,2\), item 0 of the list_iterator given as data gives \(2,3\)"),
        (((marked(2, 2), marked(2, 2)), 1), "gives 2 arrays, the model has the inputs 'x'"),
    ],
)
def test_items_of_another_form_are_shown(item: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        open_data(iter([item]), SIGNATURE)
    assert caught.value.hint


def test_samples_are_stacked_and_batches_cut_anew() -> None:
    samples = ((np.full(2, k, np.float32), k) for k in range(7))
    batches = list(open_data(samples, SIGNATURE).batches(3))
    assert marks(batches) == [[0, 1, 2], [3, 4, 5], [6]]
    assert [b.targets["target"].tolist() for b in batches] == marks(batches)
    whole = marked(10, 2)
    cuts = [whole[:3], whole[3:8], whole[8:8], whole[8:9], whole[9:]]
    assert marks(open_data(iter(cuts), SIGNATURE).batches(4)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_a_buffer_that_is_used_again_does_no_harm() -> None:
    def reusing() -> Iterator[np.ndarray]:
        buffer = np.zeros(2, np.float32)
        for k in range(4):
            buffer[:] = k
            yield buffer

    (batch,) = open_data(reusing, SIGNATURE).batches(4)
    assert marks([batch]) == [[0, 1, 2, 3]]


def test_sequences_of_samples_can_be_read_at_any_place() -> None:
    class Dataset:
        def __len__(self) -> int:
            return 9

        def __getitem__(self, k: int) -> tuple[np.ndarray, float]:
            return np.full(2, k, np.float32), random.random() + np.random.rand()

    source = open_data(Dataset(), SIGNATURE)
    assert source.size == 9
    passes = [list(source.batches(4, shuffle=True, seed=1, epoch=e)) for e in (0, 0, 1)]
    assert marks(passes[0]) == marks(passes[1]) != marks(passes[2])
    noise = [np.concatenate([b.targets["target"] for b in p]) for p in passes]
    np.testing.assert_array_equal(noise[0], noise[1])
    assert len(set(noise[0])) == 9
    resumed = next(source.batches(4, shuffle=True, seed=1, epoch=0, start=2)).targets["target"]
    np.testing.assert_array_equal(resumed, noise[0][8:])


def kinds(tmp_path: Path) -> dict[str, Any]:
    def generator() -> Iterator[np.ndarray]:
        for k in range(3):
            yield np.full((2, 2), k, np.float32)

    kept = list(generator())
    held = generator()
    file = tmp_path / "stream_hooks.py"
    file.write_text(
        "import numpy as np\ndef make():\n    for k in range(3):\n        yield np.full((2, 2), k, np.float32)\n"
    )
    return {
        "generator function": generator,
        "generator": generator(),
        "list of batches": kept,
        "function of a list": lambda: kept,
        "function of an iterator": lambda: iter(kept),
        "function of the same iterator": lambda: held,
        "reader": Reader(),
        "rewinding reader": Rewinding(),
        "refusing reader": Refusing(),
        "reader class": Reader,
        "function of one reader": (lambda reader: lambda: reader)(Reader()),
        "function in a file": f"{file}:make",
    }


COPIED = {"generator", "reader", "refusing reader", "function of the same iterator", "function of one reader"}


@pytest.mark.parametrize("kind", list(kinds(Path("/tmp"))))
def test_passes_are_the_same_whatever_may_be_passed_over_once(tmp_path: Path, kind: str) -> None:
    source = open_data(kinds(tmp_path)[kind], SIGNATURE, cache=tmp_path / "cache")
    expected = [[0, 0, 1], [1, 2, 2]]
    assert marks(source.batches(3)) == expected
    assert marks([next(source.batches(3))]) == expected[:1]  # a pass that is left early
    for epoch in range(3):
        assert marks(source.batches(3, epoch=epoch)) == expected
    interleaved = [source.batches(3), source.batches(3)]
    if kind == "rewinding reader":
        assert marks([next(p) for p in interleaved]) == [expected[0]] * 2
        with pytest.raises(DataError, match="was rewound for another pass before this one was at its end"):
            next(interleaved[0])
        assert marks(interleaved[1]) == expected[1:]
    else:
        assert [marks([next(p) for p in interleaved]) for _ in expected] == [[e, e] for e in expected]
    assert source.size == 6
    assert ("copied to disk" in source.description) == (kind in COPIED)
    assert ("needs no copy" in source.description) == (kind in COPIED)
    assert ((tmp_path / "cache").exists()) == (kind in COPIED)


def test_an_endless_stream_of_one_pass_is_read_only_as_far_as_needed(tmp_path: Path) -> None:
    taken = []

    def endless() -> Iterator[np.ndarray]:
        while True:
            taken.append(len(taken))
            yield np.full(2, taken[-1], np.float32)

    source = open_data(endless(), SIGNATURE, cache=tmp_path)
    for _ in range(2):
        batches = source.batches(4)
        assert marks([next(batches), next(batches)]) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(taken) == 8
    assert source.size is None


def test_copies_keep_every_kind_of_array(tmp_path: Path) -> None:
    signature = Signature((Port("text", np.dtype(object), (None,)), Port("x", FLOAT, (None, None))), ())
    items = [
        {"text": ["a", "long word"], "x": np.zeros((2, 3), np.float32, order="F"), "y": np.array([True, False])},
        {"text": ["b"], "x": np.ones((1, 3), np.float32), "y": np.array([True])},
    ]
    source = open_data(iter(items), signature, cache=tmp_path)
    for _ in range(2):
        (batch,) = source.batches(3)
        assert batch.inputs["text"].tolist() == ["a", "long word", "b"]
        assert (batch.inputs["text"].dtype, batch.targets["y"].dtype) == (object, bool)


def test_what_is_drawn_follows_from_seed_and_epoch_alone() -> None:
    def noisy() -> Iterator[np.ndarray]:
        for _ in range(4):
            yield np.array([random.random(), np.random.rand()], np.float32)

    source = open_data(noisy, SIGNATURE)

    def drawn(**key: int) -> np.ndarray:
        batches = []
        for batch in source.batches(1, **key):
            random.random(), np.random.rand()  # what the training draws in between
            batches.append(batch.inputs["x"])
        return np.concatenate(batches)

    np.random.seed(5)
    random.seed(5)
    first = drawn(seed=1, epoch=2)
    np.testing.assert_array_equal(first, drawn(seed=1, epoch=2))
    np.testing.assert_array_equal(first[2:], drawn(seed=1, epoch=2, start=2))
    assert len({drawn(seed=s, epoch=e).tobytes() for s, e in ((1, 2), (1, 3), (2, 2))}) == 3
    np.random.seed(5)
    expected = np.random.rand()
    np.random.seed(5)
    next(source.batches(1))
    assert np.random.rand() == expected  # the caller's own numbers are left alone


def test_torch_loaders_and_tensors_are_taken_as_they_are() -> None:
    torch = pytest.importorskip("torch")
    data = torch.utils.data.TensorDataset(torch.from_numpy(marked(10, 2)), torch.arange(10))
    loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
    source = open_data(lambda: loader, SIGNATURE)
    passes = [list(source.batches(5, epoch=e)) for e in (0, 0, 1)]
    assert marks(passes[0]) == marks(passes[1]) != marks(passes[2])
    for batch in passes[2]:
        assert batch.targets["target"].tolist() == marks([batch])[0]
    assert open_data(data, SIGNATURE).size == 10
    half = torch.ones((2, 2), dtype=torch.bfloat16, requires_grad=True)
    assert next(open_data([half], SIGNATURE).batches(2)).inputs["x"].dtype == np.float32


def fails(text: str) -> Any:
    """A generator function with this body after one good item."""
    scope: dict[str, Any] = {"np": np}
    exec(f"def make():\n    yield np.zeros((2, 2), np.float32), np.zeros(2)\n    {text}\n", scope)
    return scope["make"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("yield np.zeros((2, 3), np.float32), np.zeros(2)", r"wants \(N,2\), item 1 of make gives \(2,3\)"),
        ("yield np.zeros((2, 2), np.int64), np.zeros(2)", "item 1 of make gives int64"),
        ("yield np.full((2, 2), np.nan, np.float32), np.zeros(2)", "item 1 of make, sample 0: input 'x' holds NaN"),
        ("yield np.zeros((2, 2), np.float32), np.zeros(2, int)", "item 1 of make gives the target 'target' as int64"),
        ("yield np.zeros((2, 2), np.float32), np.zeros((2, 1))", "as float64 of rank 2, the data before it as float64"),
        ("yield np.zeros((2, 2), np.float32)", "item 1 of make gives the targets nothing, the data before it 'target'"),
        ("yield None", "item 1 of make is None"),
        ("raise KeyError('label')", r"make \(at item 1\) failed: KeyError: 'label'"),
    ],
)
def test_a_source_that_changes_or_fails_in_the_middle_is_blamed(text: str, message: str) -> None:
    source = open_data(fails(text), SIGNATURE)
    with pytest.raises(DataError, match=message) as caught:
        list(source.batches(2))
    assert caught.value.exit_code == 6


def test_the_users_exception_is_named_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "failing.py"
    file.write_text(
        "def broken():\n    return open('/no/such/file')\n"
        "import numpy\ndef late():\n    yield numpy.zeros(2, 'f4')\n    raise ValueError('bad row')\n"
        "def asks(path): ...\ndef nothing(): ...\ndef empty():\n    return\n    yield\ndef number():\n    return 3\n"
    )
    for name, message in (
        ("broken", r"FileNotFoundError: .*'/no/such/file' \(.*failing.py, line 2\)"),
        ("asks", r"failing.py:asks is called without arguments: missing a required argument: 'path'"),
        ("nothing", "failing.py:nothing gives None"),
        ("empty", "failing.py:empty ended at once"),
        ("number", "failing.py:number is no data: int is nothing to iterate over"),
        ("brokn", "has no 'brokn'"),
    ):
        with pytest.raises(DataError, match=message):
            open_data(f"{file}:{name}", SIGNATURE)
    source = open_data(f"{file}:late", SIGNATURE)
    with pytest.raises(DataError, match=r"failing.py:late \(at item 1\) failed: ValueError: bad row \(.*, line 6\)"):
        list(source.batches(1))
    with pytest.raises(DataError) as caught:
        open_data(str(file), SIGNATURE)
    assert "broken" in caught.value.hint


def test_an_empty_second_pass_is_told() -> None:
    used = iter([marked(2, 2), marked(2, 2)])
    source = open_data(lambda: map(np.array, used), SIGNATURE)
    list(source.batches(2))
    with pytest.raises(DataError, match="gave data on its first pass and none on this one") as caught:
        list(source.batches(2))
    assert "generator function" in caught.value.hint


@pytest.mark.parametrize("made", [[], iter([]), lambda: iter(()), Reader(0)])
def test_a_source_that_ends_at_once_is_told(made: Any) -> None:
    with pytest.raises(DataError, match="ended at once|is empty"):
        open_data(made, SIGNATURE)


def test_samples_of_different_lengths_are_told_and_batches_of_them_kept_apart() -> None:
    signature = Signature((Port("ids", INT, (None, None)),), ())
    samples = [np.arange(n) for n in (3, 3, 4)]
    for data in (samples, iter(samples)):
        source = open_data(data, signature)
        assert [b.inputs["ids"].shape for b in source.batches(1)] == [(1, 3), (1, 3), (1, 4)]
        with pytest.raises(DataError, match="different shapes can't stand in one batch") as caught:
            list(source.batches(3))
        assert "pad" in caught.value.hint
    batches = [np.zeros((4, n), np.int64) for n in (3, 3, 5, 2)]
    for shuffle in (False, True):
        found = [b.inputs["ids"].shape for b in open_data(batches, signature).batches(6, shuffle=shuffle)]
        assert found == [(6, 3), (2, 3), (4, 5), (4, 2)]


def test_a_source_is_passed_through() -> None:
    source = open_data(marked(3, 2), SIGNATURE)
    assert open_data(source, SIGNATURE) is source
    assert open_data(lambda: source, SIGNATURE) is source
