"""Prune, then quantise: size, latency and accuracy of a trained classifier as it is, pruned, in int8, and both.

    python tools/quantise_table.py --data-dir DATA                           the three networks in models/
    python tools/quantise_table.py MODEL.onnx FOLDER --data-dir DATA --target macs=0.7 --repair affine

One CalibrationReader serves it all: the repair (--repair) solves on it, and onnxruntime's quantize_static measures
ranges on it, for the original and for the pruned network. "int8, pruned" is the other way round: the int8 file is
pruned, and repaired in the ranges that its integers have. Quantised are weights (int8, per channel) and activations
(uint8), as QDQ nodes, with min-max ranges.

top-1 and agreement (the same class as the original) are taken on the test images, latency on one thread at batch 1 by
all files in turns. DATA: see `_classifiers.py`.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from _classifiers import CLASSIFIERS, known
from _common import machine_note, print_table, write_json
from _repairs import REPAIRS, pruned
from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from onnxprune import OnnxPruneError
from onnxprune.data import CalibrationReader, Source
from onnxprune.evaluate import evaluate
from onnxprune.metrics import METRICS
from onnxprune.verify.latency import bench


@dataclass(frozen=True)
class Row:
    """One version of a model. failed: why there is none."""

    version: str
    bytes: int = 0
    top1: float = 0.0
    agreement: float = 0.0
    median_ms: float = 0.0
    speedup: float = 1.0
    significant: bool = False
    failed: str = ""


def quantise(source: Path, out: Path, reader: CalibrationReader) -> None:
    """`source` in int8. BatchNorm is folded and shapes are inferred first, as onnxruntime advises."""
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        ready = Path(folder) / "ready.onnx"
        quant_pre_process(str(source), str(ready), skip_symbolic_shape=True)
        quantize_static(
            str(ready),
            str(out),
            reader,
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
        )


def file_of(model: Path, folder: Path, version: str) -> Path:
    return model if version == "fp32" else folder / f"{model.stem}.{version.replace(', ', '.')}.onnx"


def versions(model: Path, folder: Path, reader: CalibrationReader, options: argparse.Namespace) -> list[Row]:
    """All versions of a model, written to `folder`; accuracy and latency are not in the rows yet."""
    data = {"data": reader.source, "samples": options.samples}

    def smaller(source: Path, out: Path) -> None:
        pruned(source, out, options.repair, **data, target=options.target)

    def int8(source: Path, out: Path) -> None:
        quantise(source, out, reader)

    steps: list[tuple[str, str, Callable[[Path, Path], None]]] = [
        ("pruned", "fp32", smaller),
        ("int8", "fp32", int8),
        ("pruned, int8", "pruned", int8),
        ("int8, pruned", "int8", smaller),
    ]
    rows = [Row("fp32", model.stat().st_size)]
    for name, source, work in steps:
        out = file_of(model, folder, name)
        try:
            work(file_of(model, folder, source), out)
        except OnnxPruneError as error:
            rows.append(Row(name, failed=f"{type(error).__name__}: {error}"))
        else:
            rows.append(Row(name, out.stat().st_size))
    return rows


def measured(model: Path, folder: Path, rows: list[Row], test: Source, seconds: float) -> list[Row]:
    """The same rows with accuracy and latency."""
    paths = [file_of(model, folder, r.version) for r in rows]
    there = [k for k, r in enumerate(rows) if not r.failed]
    timed = bench([paths[k] for k in there], threads=1, seconds=seconds)
    found = list(rows)
    for place, k in enumerate(there):
        against = timed.against_first(place)
        found[k] = Row(
            rows[k].version,
            rows[k].bytes,
            evaluate(paths[k], test, METRICS["top1"]),
            evaluate(paths[k], test, METRICS["agreement"], original=model),
            timed.rows[place].median_ms,
            against.speedup,
            against.significant,
        )
    return found


def cells(name: str, row: Row) -> list[str]:
    if row.failed:
        return [name, row.version, row.failed, "", "", "", ""]
    speed = f"{row.speedup:.2f}x" + ("" if row.significant or row.version == "fp32" else " (not significant)")
    figures = [f"{row.bytes / 1e3:.1f}", f"{row.top1:.2%}", f"{row.agreement:.2%}", f"{row.median_ms:.3f}", speed]
    return [name, row.version, *figures]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).resolve().parent.parent / "models"
    parser.add_argument("models", type=Path, nargs="*", default=[here], help="files, or folders of them")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--target", default="macs=0.7", help="what is to remain")
    parser.add_argument("--repair", choices=REPAIRS, default="none", help="of what is pruned, on the same images")
    parser.add_argument("--samples", type=int, default=512, help="images to calibrate on")
    parser.add_argument("--test", type=int, help="test images at most")
    parser.add_argument("--seconds", type=float, default=5, help="time per file")
    parser.add_argument("--keep", type=Path, help="folder in which to leave all versions")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    print(note := machine_note(), flush=True)
    document: dict[str, Any] = {"machine": note, "target": options.target, "repair": options.repair, "models": {}}
    table = []
    with tempfile.TemporaryDirectory(prefix="quantise-table-") as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for model in known(options.models):
            kind = CLASSIFIERS[model.stem]
            reader = CalibrationReader(kind.source(model, options.data_dir, "train", options.samples), batch=16)
            test = kind.source(model, options.data_dir, "test", options.test)
            rows = versions(model, folder, reader, options)
            rows = measured(model, folder, rows, test, options.seconds)
            table += [cells("" if k else model.stem, row) for k, row in enumerate(rows)]
            document["models"][model.stem] = [asdict(row) for row in rows]
    print_table(
        ["model", "version", "kB", "top-1", "agrees", "ms", "speed-up"],
        table,
        f"{options.target}, repair {options.repair}, {options.samples} images, one thread",
    )
    write_json(options.json, document)


if __name__ == "__main__":
    main()
