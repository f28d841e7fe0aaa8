"""Turn packed data sets into what `onnxprune compress --data` takes.

    python tools/unpack_data.py cifar10 PACKED.npz OUT.npz        uint8 images (N,3,32,32) and `label`
    python tools/unpack_data.py mnist IMAGES.gz LABELS.gz OUT.npz uint8 images (N,1,28,28) and `label`
    python tools/unpack_data.py folder PACKED.npz OUT_DIR         an image folder: OUT_DIR/CLASS/NUMBER.jpg

The packed files hold JPEG headers and scans side by side: `header` and `scan` (bytes), `length` per image, `label`, and
where there are several headers `header_length` and `header_id`. --input names the array as the model's input is called,
--limit takes the first images only, --nhwc puts the channels last.
"""

from __future__ import annotations

import argparse
import gzip
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np


def jpegs(path: Path, limit: int | None) -> Iterator[tuple[bytes, int]]:
    """Every image as JPEG, and its label."""
    with np.load(path) as packed:
        ends = np.cumsum(packed["length"].astype(np.int64))
        scans, headers, labels = packed["scan"].tobytes(), packed["header"].tobytes(), packed["label"]
        ids = packed["header_id"] if "header_id" in packed else np.zeros(len(ends), np.int64)
        lengths = packed["header_length"] if "header_length" in packed else np.array([len(headers)])
    starts = np.r_[0, np.cumsum(lengths.astype(np.int64))]
    for k, end in enumerate(ends[:limit]):
        header = headers[starts[ids[k]] : starts[ids[k] + 1]]
        yield header + scans[ends[k - 1] if k else 0 : end], int(labels[k])


def cifar10(source: Path, limit: int | None) -> tuple[np.ndarray, np.ndarray]:
    from PIL import Image

    found = [(np.asarray(Image.open(io.BytesIO(j)).convert("RGB")), label) for j, label in jpegs(source, limit)]
    return np.stack([i for i, _ in found]).transpose(0, 3, 1, 2), np.array([n for _, n in found], np.int64)


def mnist(images: Path, labels: Path, limit: int | None) -> tuple[np.ndarray, np.ndarray]:
    with gzip.open(images) as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    with gzip.open(labels) as file:
        classes = np.frombuffer(file.read(), np.uint8, offset=8).astype(np.int64)
    return pixels[:limit], classes[:limit]


def folder(source: Path, out: Path, limit: int | None) -> None:
    for k, (data, label) in enumerate(jpegs(source, limit)):
        path = out / f"{label:03d}" / f"{k:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("cifar10", "mnist", "folder"))
    parser.add_argument("paths", type=Path, nargs="+")
    parser.add_argument("--input", default="image", help="name of the array with the images")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--nhwc", action="store_true")
    options = parser.parse_args()
    *sources, out = options.paths
    if options.kind == "folder":
        folder(*sources, out, options.limit)
        return
    images, labels = (cifar10 if options.kind == "cifar10" else mnist)(*sources, options.limit)
    if options.nhwc:
        images = images.transpose(0, 2, 3, 1)
    with out.open("wb") as file:
        np.savez(file, **{options.input: np.ascontiguousarray(images), "label": labels})


if __name__ == "__main__":
    main()
