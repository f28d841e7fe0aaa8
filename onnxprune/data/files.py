"""Files and folders of arrays as records: `.npz`, `.npy`, folders of either, and ONNX's `test_data_set_*` folders."""

from __future__ import annotations

import mmap
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from onnxprune.data.arrays import Scratch, map_npy, map_npz, outline
from onnxprune.data.fit import Fit
from onnxprune.data.hooks import quoted
from onnxprune.data.records import FileRecords, Pair
from onnxprune.errors import DataError

__all__ = ["array_files", "mapping_records", "natural", "open_arrays", "open_test_sets", "test_sets"]


def natural(path: Path) -> list[tuple[bool, int, str]]:
    """A sort key by which sample2 stands before sample10."""
    parts = re.findall(r"[0-9]+|[^0-9]+", path.name)
    return [(part[0] in "0123456789", int(part) if part[0] in "0123456789" else 0, part) for part in parts]


def array_files(folder: Path) -> list[Path]:
    """The .npz and .npy files of a folder, in the order of their names."""
    return sorted((f for f in folder.iterdir() if f.suffix in (".npz", ".npy") and f.is_file()), key=natural)


def test_sets(folder: Path) -> list[Path]:
    """The `test_data_set_*` folders in a folder, or the folder itself where it is one."""
    if any(folder.glob("input_*.pb")):
        return [folder]
    return sorted((f for f in folder.glob("test_data_set*") if f.is_dir()), key=natural)


def mapping_records(arrays: Mapping[str, np.ndarray], fit: Fit, name: str, label: str) -> FileRecords:
    """Records of arrays that are held or mapped as a whole. label: in messages; name: in the description."""
    pair = fit.split(arrays, label)
    return FileRecords([label], fit, outline=lambda k: pair, read=lambda k: pair, description=name)


def open_arrays(path: Path, fit: Fit, scratch: Scratch) -> FileRecords:
    """A .npz or .npy file, or a folder of them: one sample or batch a file, or one array a file where the files are
    named as the inputs."""
    if path.is_dir():
        files = array_files(path)
        if all((path / f"{name}.npy").is_file() for name in fit.names):
            arrays = {f.stem: map_npy(f) for f in files if f.suffix == ".npy"}
            return mapping_records(arrays, fit, path.name, str(path))
        name = f"{path.name}: {len(files):,} file{'s' if len(files) > 1 else ''}"
    else:
        files, name = [path], path.name

    def meant(k: int, *, values: bool) -> Pair:
        file = files[k]
        if _is_npy(file):
            if len(fit.names) > 1:
                raise DataError(
                    f"{file} is one array, and the model has the inputs {quoted(fit.names)}",
                    "save an .npz with an array for each: np.savez(path, name=array, ...)",
                )
            return {fit.names[0]: map_npy(file)}, {}
        if not values:
            return fit.split(outline(file), str(file))
        # A file that is one sample is read when its turn comes; a larger one is looked into at many places.
        single = 1 < len(files) == records.count
        return fit.split(map_npz(file, None if single else scratch), str(file))

    records = FileRecords(
        [str(f) for f in files],
        fit,
        outline=lambda k: meant(k, values=False),
        read=lambda k: meant(k, values=True),
        description=name,
    )
    return records


def _is_npy(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(6) == b"\x93NUMPY"


def open_test_sets(folder: Path, fit: Fit) -> FileRecords:
    """ONNX test data: input_N.pb is the N-th input; output_N.pb is a target named as the N-th output.

    Outputs that have no row for every sample are no targets and are left out, which the description says.
    """
    sets = test_sets(folder)
    outputs = [p.name for p in fit.signature.outputs]
    left_out: set[str] = set()

    def meant(k: int, *, values: bool) -> Pair:
        read = _tensor if values else _tensor_outline
        inputs = {}
        for i, name in enumerate(fit.names):
            file = sets[k] / f"input_{i}.pb"
            if not file.is_file():
                given = sorted(f.name for f in sets[k].glob("input_*.pb"))
                raise DataError(
                    f"{file} is missing: the model has {len(fit.names)} inputs, {sets[k].name} gives {quoted(given)}",
                    "input_N.pb holds the model's N-th input",
                )
            inputs[name] = read(file)
        files = ((name, sets[k] / f"output_{i}.pb") for i, name in enumerate(outputs))
        targets = {name: read(file) for name, file in files if file.is_file() and name not in left_out}
        return inputs, targets

    inputs, targets = meant(0, values=False)
    count = fit.admit(inputs, {}, str(sets[0])).count
    if not fit.whole:
        left_out = {n for n, a in targets.items() if a.ndim == 0 or len(a) != count}
    name = f"{folder.name}: {len(sets):,} test set{'s' if len(sets) > 1 else ''}"
    if left_out:
        name += f", without {quoted(sorted(left_out))}, whose first axis is no batch,"
    return FileRecords(
        [str(s) for s in sets],
        fit,
        outline=lambda k: meant(k, values=False),
        read=lambda k: meant(k, values=True),
        description=name,
    )


def _tensor(path: Path) -> np.ndarray:
    """The array of a serialised TensorProto. Raises DataError."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.numpy_helper.to_array(onnx.TensorProto.FromString(path.read_bytes()))
    except (DecodeError, ValueError, TypeError, OSError) as error:
        raise DataError(f"{path} can't be read as a tensor: {error}", "was it copied completely?") from None


def _tensor_outline(path: Path) -> np.ndarray:
    """Shape and dtype of a serialised TensorProto: everything but its data is parsed."""
    import onnx

    from onnxprune.model.payload import dtype_of
    from onnxprune.model.wire import Malformed, fields

    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as view,
        ):
            kept = [bytes(view[a:b]) for number, _, a, _, b in fields(view, 0, len(view)) if number in (1, 2)]
        tensor = onnx.TensorProto.FromString(b"".join(kept))
        return np.broadcast_to(np.zeros((), dtype_of(tensor.data_type)), tuple(tensor.dims))
    except (Malformed, ValueError, KeyError, OSError) as error:
        raise DataError(f"{path} can't be read as a tensor: {error}", "was it copied completely?") from None
