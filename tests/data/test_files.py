"""Arrays in files: every form, mapped and not read, and what is said of files that don't fit."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxprune import DataError
from onnxprune.data import Port, Signature, open_data
from onnxprune.data.arrays import Scratch, map_npz
from tests.data.ports import FLOAT, INT, marked, marks, one


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_gives_inputs_by_name_and_the_rest_as_targets(tmp_path: Path, save: object) -> None:
    save(tmp_path / "calib.npz", x=marked(5, 2, 3), label=np.arange(5), note=np.array(7), classes=np.array(["a", "b"]))
    source = open_data(str(tmp_path / "calib.npz"), one(None, 2, 3), cache=tmp_path / "cache")
    assert (source.size, source.targets, source.description) == (5, ("label",), "calib.npz (5 samples)")
    batches = list(source.batches(2))
    assert marks(batches) == [[0, 1], [2, 3], [4]]
    assert [b.targets["label"].tolist() for b in batches] == [[0, 1], [2, 3], [4]]
    assert batches[0].inputs["x"].shape == (2, 2, 3)


def test_arrays_without_names_are_taken_by_position(tmp_path: Path) -> None:
    signature = Signature((Port("ids", INT, (None, 4)), Port("mask", INT, (None, 4))), ())
    np.savez(tmp_path / "d.npz", marked(3, 4, dtype=np.int64), np.ones((3, 4), np.int64), np.arange(3))
    (batch,) = open_data(tmp_path / "d.npz", signature).batches(3)
    assert batch.inputs["ids"][2, 0] == 2
    assert batch.inputs["mask"].all()
    assert batch.targets["arr_2"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("order", ["C", "F"])
def test_members_are_mapped_where_they_lie(tmp_path: Path, order: str) -> None:
    x = np.asarray(np.random.default_rng(0).random((4, 5, 6)), order=order)
    np.savez(tmp_path / "d.npz", first=np.arange(3), x=x, big_endian=np.arange(4, dtype=">i4"))
    members = map_npz(tmp_path / "d.npz", None)
    assert isinstance(members["x"], np.memmap)
    for name, wanted in (("first", np.arange(3)), ("x", x), ("big_endian", np.arange(4))):
        np.testing.assert_array_equal(members[name], wanted)
    (batch,) = open_data({n: members[n] for n in ("x", "big_endian")}, one(None, 5, 6)).batches(4)
    assert batch.targets["big_endian"].dtype == np.dtype("int32")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_large_npz_is_never_held_whole(tmp_path: Path, save: object) -> None:
    save(tmp_path / "d.npz", x=np.zeros((256, 64, 1024), np.float32))  # 64 MB
    tracemalloc.start()
    try:
        source = open_data(tmp_path / "d.npz", one(None, 64, 1024), cache=tmp_path)
        for epoch in range(2):
            assert sum(b.size for b in source.batches(4, shuffle=True, epoch=epoch)) == 256
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_compressed_members_are_unpacked_once(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "d.npz", x=marked(3, 2), label=np.arange(3))
    scratch = tmp_path / "run" / "cache"
    open_data(tmp_path / "d.npz", one(None, 2), cache=scratch)
    made = {f.name: f.stat().st_mtime_ns for f in scratch.iterdir()}
    assert len(made) == 2
    assert all(name.endswith(".npy") for name in made)
    list(open_data(tmp_path / "d.npz", one(None, 2), cache=scratch).batches(2))
    assert {f.name: f.stat().st_mtime_ns for f in scratch.iterdir()} == made
    np.savez_compressed(tmp_path / "d.npz", x=marked(4, 2), label=np.arange(4))
    assert open_data(tmp_path / "d.npz", one(None, 2), cache=scratch).size == 4


def test_temporary_copies_are_gone_at_exit(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "d.npz", x=marked(3, 2))
    script = (
        "import sys, numpy as np\nfrom onnxprune.data import *\n"
        "s = open_data(sys.argv[1], Signature((Port('x', np.dtype('f4'), (None, 2)),), ()))\n"
        "g = open_data((np.zeros((1, 2), 'f4') for _ in range(3)), Signature((Port('x', np.dtype('f4'), (None, 2)),), ()))\n"
        "import pathlib; print(len(list(pathlib.Path(sys.argv[2]).rglob('*.*'))))\n"
    )
    (tmp_path / "tmp").mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, str(tmp_path / "d.npz"), str(tmp_path / "tmp")],
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout.strip(), done.stderr) == ("2", "")
    assert list((tmp_path / "tmp").iterdir()) == []


def test_an_npy_is_for_models_of_one_input(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", marked(4, 2))
    source = open_data(tmp_path / "x.npy", one(None, 2))
    assert (marks(source.batches(3)), source.targets) == ([[0, 1, 2], [3]], ())
    two = Signature((Port("a", FLOAT, (None, 2)), Port("b", FLOAT, (None, 2))), ())
    with pytest.raises(DataError, match="is one array, and the model has the inputs 'a', 'b'"):
        open_data(tmp_path / "x.npy", two)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_folder_of_files_is_one_sample_or_one_batch_a_file(tmp_path: Path, save: object) -> None:
    for k in range(12):
        save(tmp_path / f"s{k}.npz", x=np.full((2, 3), k, np.float32), label=np.int64(k))
    source = open_data(tmp_path, one(None, 2, 3), cache=tmp_path / "cache")
    assert (source.size, source.targets) == (12, ("label",))
    assert marks(source.batches(5)) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]  # s2 before s10
    assert sorted(k for batch in marks(source.batches(5, shuffle=True)) for k in batch) == list(range(12))
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_batches_in_files_are_cut_anew(tmp_path: Path, save: object) -> None:
    whole = marked(9, 2)
    for k, (a, b) in enumerate([(0, 4), (4, 5), (5, 9)]):
        save(tmp_path / f"{k}.npz", x=whole[a:b], label=np.arange(a, b))
    source = open_data(tmp_path, one(None, 2), cache=tmp_path / "cache")
    batches = list(source.batches(4))
    assert marks(batches) == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    assert [b.targets["label"].tolist() for b in batches] == marks(batches)
    for batch in source.batches(4, shuffle=True, seed=1):
        assert batch.targets["label"].tolist() == marks([batch])[0]


def test_files_named_as_the_inputs_are_one_array_each(tmp_path: Path) -> None:
    signature = Signature((Port("ids", INT, (None, 4)), Port("mask", INT, (None, 4))), ())
    for name, array in (
        ("ids", marked(3, 4, dtype=np.int64)),
        ("mask", np.ones((3, 4), np.int64)),
        ("y", np.arange(3)),
    ):
        np.save(tmp_path / f"{name}.npy", array)
    source = open_data(tmp_path, signature)
    assert (source.size, source.targets) == (3, ("y",))


def write_tensor(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(onnx.numpy_helper.from_array(array).SerializeToString())


def test_onnx_test_sets_give_inputs_and_outputs_by_number(tmp_path: Path) -> None:
    signature = Signature(
        (Port("a", FLOAT, (None, 2)), Port("ids", INT, (None,))), (Port("y", FLOAT, (None, 3)), Port("n", INT, ()))
    )
    for k in (0, 1, 10, 2):
        folder = tmp_path / f"test_data_set_{k}"
        write_tensor(folder / "input_0.pb", np.full((2, 2), k, np.float32))
        write_tensor(folder / "input_1.pb", np.full(2, k))
        write_tensor(folder / "output_0.pb", np.full((2, 3), k, np.float32))
        write_tensor(folder / "output_1.pb", np.array(k))
    source = open_data(tmp_path, signature)
    assert (source.size, source.targets) == (8, ("y",))
    assert "4 test sets, without 'n'" in source.description
    batches = list(source.batches(3))
    assert marks(batches, "a") == [[0, 0, 1], [1, 2, 2], [10, 10]]
    assert [b.targets["y"][:, 0].tolist() for b in batches] == marks(batches, "a")
    assert open_data(tmp_path / "test_data_set_1", signature).size == 2
    (tmp_path / "test_data_set_2" / "input_1.pb").unlink()
    with pytest.raises(DataError, match=r"test_data_set_2/input_1.pb is missing: the model has 2 inputs"):
        open_data(tmp_path, signature)


def test_a_damaged_tensor_is_named(tmp_path: Path) -> None:
    write_tensor(tmp_path / "test_data_set_0" / "input_0.pb", marked(2, 5))
    file = tmp_path / "test_data_set_0" / "input_0.pb"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(DataError, match=r"input_0.pb can't be read as a tensor"):
        open_data(tmp_path, one(None, 5))


def damaged(tmp_path: Path) -> dict[str, bytes]:
    np.savez(tmp_path / "whole.npz", x=marked(100, 5))
    np.savez_compressed(tmp_path / "packed.npz", x=np.random.default_rng(0).random((100, 5), np.float32))
    np.save(tmp_path / "whole.npy", marked(100, 5))
    np.savez(tmp_path / "objects.npz", x=np.array([{}, []], object))
    contents = {f.stem + f.suffix: f.read_bytes() for f in tmp_path.iterdir()}
    packed = bytearray(contents["packed.npz"])
    packed[300:600] = bytes(300)
    return {
        "cut.npz": contents["whole.npz"][:-900],
        "cut.npy": contents["whole.npy"][:-4],
        "noise.npz": bytes(packed),
        "objects.npz": contents["objects.npz"],
        "empty.npz": b"",
        "table.csv": b"a,b\n1,2\n",
        "zip.npz": b"PK\x05\x06" + bytes(18),
    }


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cut.npz", r"cut.npz can't be read as .npz"),
        ("cut.npy", r"cut.npy can't be read as .npy: it ends in the middle"),
        ("noise.npz", r"noise.npz can't be read as .npz"),
        ("objects.npz", r"objects.npz:x holds Python objects"),
        ("empty.npz", r"empty.npz is empty"),
        ("table.csv", r"table.csv is neither .npz nor .npy"),
        ("zip.npz", r"zip.npz holds no arrays"),
    ],
)
def test_files_that_hold_no_arrays_are_named(tmp_path: Path, name: str, message: str) -> None:
    file = tmp_path / name
    file.write_bytes(damaged(tmp_path)[name])
    with pytest.raises(DataError, match=message) as caught:
        list(open_data(file, one(None, 5), cache=tmp_path).batches(8))
    assert caught.value.hint


def test_a_file_of_another_form_is_named(tmp_path: Path) -> None:
    for k in range(3):
        np.savez(tmp_path / f"{k}.npz", x=np.zeros((2, 3) if k < 2 else (4, 2, 3), np.float32))
    with pytest.raises(DataError, match=r"2.npz holds 4 samples, where 1 was expected"):
        list(open_data(tmp_path, one(None, 2, 3)).batches(1))
    np.savez(tmp_path / "2.npz", x=np.zeros((2, 4), np.float32))
    with pytest.raises(DataError, match=r"input 'x' wants \(N,2,3\), .*2.npz gives \(2,4\)"):
        list(open_data(tmp_path, one(None, 2, 3)).batches(1))
    source = open_data(tmp_path, one(None, 2, None))
    assert len(list(source.batches(1))) == 3
    with pytest.raises(DataError, match=r"different shapes .* 'x' is \(2,3\) in .*0.npz and \(2,4\) in .*2.npz"):
        list(source.batches(4))


def test_folders_that_hold_no_data_or_two_kinds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="holds no data that is known: it has 'notes.txt'"):
        open_data(tmp_path, one(None, 2))
    np.save(tmp_path / "a.npy", marked(2, 2))
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match="holds arrays and images"):
        open_data(tmp_path, one(None, 2))


def test_a_scratch_folder_is_made_when_it_is_needed(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    assert scratch.folder.is_dir()
