"""The data of the papers' experiments as sources of batches: CIFAR-10, SST-2, and super-resolution from T91.

Each is read from the packed files in --data-dir. What is random in a batch (crops, flips, mix-up) is drawn from a
generator of its own, seeded by (seed, epoch, number of the batch): a run that is resumed, or computed by several
processes, sees the same batches.
"""

from __future__ import annotations

import csv
import io
import math
import zipfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import numpy as np
from unpack_data import cifar10

from onnxprune.data.source import Batch

__all__ = ["Images", "Pairs", "Patches", "Samples", "WordPiece", "cifar", "luma", "sentences", "super_resolution"]

MEAN = np.array([0.4914, 0.4822, 0.4465], np.float32).reshape(3, 1, 1)
STD = np.array([0.2470, 0.2435, 0.2616], np.float32).reshape(3, 1, 1)
PAD = 4


class Samples:
    """Rows of arrays, as they are: a `Source` (`onnxprune.data.Source`) that subclasses add augmentation to."""

    def __init__(self, inputs: Mapping[str, np.ndarray], targets: Mapping[str, np.ndarray], name: str) -> None:
        self.inputs, self.target_arrays, self.name = dict(inputs), dict(targets), name
        self.size: int | None = len(next(iter(inputs.values())))
        self.targets = tuple(targets)

    @property
    def description(self) -> str:
        return f"{self.name} ({self.size} samples)"

    def batches(
        self,
        size: int,
        *,
        epoch: int = 0,
        seed: int = 0,
        shuffle: bool = False,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = False,
    ) -> Iterator[Batch]:
        """See `onnxprune.data.Source`."""
        count = self.size or 0
        order = np.random.default_rng([seed, epoch]).permutation(count) if shuffle else np.arange(count)
        for k in range(start, count // size if drop_last else math.ceil(count / size)):
            share = np.array_split(np.arange(size)[: count - k * size], world)[rank]
            yield self.made(order[k * size : (k + 1) * size], share, np.random.default_rng([seed, epoch, k, 1]))

    def made(self, index: np.ndarray, share: np.ndarray, rng: np.random.Generator) -> Batch:
        """The `share` of the samples in `index`. What is drawn is drawn for all of them, in every process the same."""
        chosen = index[share]
        return Batch(
            {n: a[chosen] for n, a in self.inputs.items()}, {n: a[chosen] for n, a in self.target_arrays.items()}
        )


class Images(Samples):
    """Images (N,3,H,W) of bytes and their classes, normalised. augment: random crops of the image with a border of 4
    zeros, and flips. mixup: parameter of the beta distribution that pairs of images are mixed by, 0 for not at all;
    with it the targets are probabilities (N, classes)."""

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, *, augment: bool = False, mixup: float = 0.0, name: str = "images"
    ) -> None:
        how = [name, *(["crops and flips"] if augment else []), *([f"mix-up {mixup:g}"] if mixup else [])]
        super().__init__({"image": images}, {"label": labels}, ", ".join(how))
        self.augment, self.mixup = augment, mixup
        self.classes = int(labels.max()) + 1
        edge = ((0, 0), (0, 0), (PAD, PAD), (PAD, PAD))
        padded = np.pad(images, edge) if augment else images
        self.windows = np.lib.stride_tricks.sliding_window_view(padded, images.shape[2:], axis=(2, 3))

    def made(self, index: np.ndarray, share: np.ndarray, rng: np.random.Generator) -> Batch:
        images, labels = self._images(index, rng), self.target_arrays["label"][index]
        if self.mixup:
            other, weight = rng.permutation(len(index)), np.float32(rng.beta(self.mixup, self.mixup))
            images = weight * images + (1 - weight) * images[other]
            classes = np.eye(self.classes, dtype=np.float32)
            labels = weight * classes[labels] + (1 - weight) * classes[labels[other]]
        return Batch({"image": images[share]}, {"label": labels[share]})

    def _images(self, index: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        n, top, left = len(index), np.zeros((), int), np.zeros((), int)
        if self.augment:
            top, left = rng.integers(0, 2 * PAD + 1, (2, n))
        cut = self.windows[index, :, top, left]
        if self.augment:
            flip = rng.random(n) < 0.5
            cut[flip] = cut[flip][..., ::-1]
        return (cut.astype(np.float32) / 255 - MEAN) / STD


def cifar(
    folder: Path, *, train: bool, limit: int | None = None, cache_dir: Path | None = None, mixup: float = 0.0
) -> Images:
    """CIFAR-10 from `cifar10_train.npz` or `cifar10_test.npz` (packed JPEG); the training part is augmented.

    cache_dir: where the decoded images are kept (150 MB); decoding takes about 12 s.
    """
    part = "train" if train else "test"
    images, labels = _decoded(folder / f"cifar10_{part}.npz", limit, cache_dir)
    return Images(images, labels, augment=train, mixup=mixup, name=f"CIFAR-10 {part}")


def _decoded(path: Path, limit: int | None, cache_dir: Path | None) -> tuple[np.ndarray, np.ndarray]:
    kept = None if cache_dir is None else cache_dir / f"{path.stem}.decoded.npz"
    if kept is None:
        return cifar10(path, limit)
    if not kept.exists():
        images, labels = cifar10(path, None)
        partial = kept.with_name(f"{kept.stem}.partial.npz")
        np.savez(partial, image=images, label=labels)
        partial.replace(kept)
    with np.load(kept) as stored:
        return stored["image"][:limit], stored["label"][:limit]


class WordPiece:
    """Sentences as numbers: words are parted greedily into the longest pieces that the vocabulary has.

    vocabulary: a file with one piece per line; pieces inside a word begin with ##. Text is lower-cased, and
    punctuation stands alone.
    """

    def __init__(self, vocabulary: Path) -> None:
        lines = vocabulary.read_text(encoding="utf-8").splitlines()
        self.number = {piece: k for k, piece in enumerate(lines)}
        self.start, self.end, self.unknown = (self.number[n] for n in ("[CLS]", "[SEP]", "[UNK]"))
        self.longest_piece = max(map(len, lines))
        self._word = cache(self._parted)

    def __call__(self, sentence: str, longest: int) -> np.ndarray:
        """Token numbers (longest,), [CLS] first and [SEP] last; 0 behind them."""
        numbers = [n for word in _words(sentence) for n in self._word(word)][: longest - 2]
        found = np.zeros(longest, np.int64)
        found[: len(numbers) + 2] = [self.start, *numbers, self.end]
        return found

    def _parted(self, word: str) -> tuple[int, ...]:
        found: list[int] = []
        begin = 0
        while begin < len(word):
            mark = "##" if begin else ""
            ends = range(min(len(word), begin + self.longest_piece), begin, -1)
            end = next((e for e in ends if mark + word[begin:e] in self.number), None)
            if end is None:
                return (self.unknown,)
            found.append(self.number[mark + word[begin:end]])
            begin = end
        return tuple(found)


def _words(sentence: str) -> list[str]:
    return "".join(c if c.isalnum() or c.isspace() else f" {c} " for c in sentence.lower()).split()


def sentences(folder: Path, *, train: bool, longest: int = 64, limit: int | None = None) -> tuple[Samples, int]:
    """SST-2 from `sst2_train.tsv` or `sst2_dev.tsv`, and the size of the vocabulary."""
    piece = WordPiece(folder / "bert_uncased_vocab.txt")
    part = "train" if train else "dev"
    with (folder / f"sst2_{part}.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[:limit]
    tokens = np.stack([piece(row["sentence"], longest) for row in rows])
    labels = np.array([int(row["label"]) for row in rows])
    return Samples({"tokens": tokens}, {"label": labels}, f"SST-2 {part}"), len(piece.number)


class Patches(Samples):
    """Random patches of images and of the same at half the size: inputs (N,3,patch,patch) and targets of twice the
    side, in 0..1, turned and flipped at random. count: patches in an epoch."""

    def __init__(self, images: list[np.ndarray], *, patch: int, count: int, name: str) -> None:
        self.large = [crop_even(i) for i in images]
        self.small = [halved(i) for i in self.large]
        self.patch = patch
        super().__init__({"image": np.arange(count)}, {"target": np.arange(count)}, name)

    def made(self, index: np.ndarray, share: np.ndarray, rng: np.random.Generator) -> Batch:
        made = [self._patch(rng) for _ in index]
        small, large = (np.stack([made[k][j] for k in share]).astype(np.float32) / 255 for j in (0, 1))
        return Batch({"image": small}, {"target": large})

    def _patch(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        n, p = rng.integers(len(self.small)), self.patch
        small, large = self.small[n], self.large[n]
        top, left = (rng.integers(0, side - p + 1) for side in small.shape[1:])
        turns, flip = rng.integers(4), 1 - 2 * rng.integers(2)
        cuts = small[:, top : top + p, left : left + p], large[:, 2 * top : 2 * (top + p), 2 * left : 2 * (left + p)]
        return tuple(np.rot90(c, turns, (1, 2))[:, :, ::flip] for c in cuts)  # type: ignore[return-value]


class Pairs(Samples):
    """Whole images of any size at half the size, and the images: one per batch, whatever `size` is asked for."""

    def __init__(self, images: list[np.ndarray], name: str) -> None:
        self.large = [crop_even(i) for i in images]
        self.small = [halved(i) for i in self.large]
        super().__init__({"image": np.arange(len(images))}, {"target": np.arange(len(images))}, name)

    def batches(self, size: int, **more: object) -> Iterator[Batch]:  # type: ignore[override]
        """In order, each by itself."""
        for small, large in zip(self.small, self.large, strict=True):
            yield Batch(*({n: x[None].astype(np.float32) / 255} for n, x in (("image", small), ("target", large))))


def super_resolution(
    folder: Path, *, patch: int = 48, count: int = 16000, limit: int | None = None
) -> tuple[Patches, dict[str, Pairs]]:
    """Patches of T91, and the images of Set5 and Set14, from the zip files of BMPs. limit: images of each."""
    train = _pictures(folder / "sr_t91_bmp.zip", "T91/", limit)
    train = [i for i in train if min(i.shape[1:]) // 2 >= patch] or train
    side = min(min(i.shape[1:]) // 2 for i in train)
    sets = {n: Pairs(_pictures(folder / "sr_set5_set14_bmp.zip", f"{n}/", limit), n) for n in ("Set5", "Set14")}
    return Patches(train, patch=min(patch, side), count=count, name="T91 patches"), sets


def _pictures(path: Path, prefix: str, limit: int | None) -> list[np.ndarray]:
    """RGB images (3,H,W) of bytes."""
    from PIL import Image

    with zipfile.ZipFile(path) as packed:
        names = sorted(n for n in packed.namelist() if n.startswith(prefix) and n.endswith(".bmp"))[:limit]
        images = [Image.open(io.BytesIO(packed.read(n))).convert("RGB") for n in names]
        return [np.asarray(i).transpose(2, 0, 1) for i in images]


def crop_even(image: np.ndarray) -> np.ndarray:
    """Without the last row or column where their number is odd."""
    return image[:, : image.shape[1] // 2 * 2, : image.shape[2] // 2 * 2]


def halved(image: np.ndarray) -> np.ndarray:
    """Half the size by bicubic interpolation with antialiasing."""
    from PIL import Image

    whole = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    small = whole.resize((whole.width // 2, whole.height // 2), Image.Resampling.BICUBIC)
    return np.asarray(small).transpose(2, 0, 1)


def luma(rgb: np.ndarray) -> np.ndarray:
    """Y of ITU-R BT.601 in 16..235, of RGB in 0..1 with the channels third from last."""
    return 16 + 65.481 * rgb[..., 0, :, :] + 128.553 * rgb[..., 1, :, :] + 24.966 * rgb[..., 2, :, :]
