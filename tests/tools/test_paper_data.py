"""The sources of the papers' experiments: what every process and every restart must see alike, and the papers' pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from _paper_data import MEAN, STD, Images, Patches, WordPiece, crop_even, halved, luma

from onnxprune.data.source import Batch, Source

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (23, 3, 8, 8), np.uint8)
CLASSES = np.arange(23) % 4


def images(**more: object) -> Images:
    return Images(PICTURES, CLASSES, **more)  # type: ignore[arg-type]


def patches() -> Patches:
    return Patches([RNG.integers(0, 256, (3, 21, 24), np.uint8) for _ in range(3)], patch=4, count=23, name="p")


def stacked(batches: list[Batch]) -> list[np.ndarray]:
    return [
        np.concatenate([next(iter(part.values())) for part in parts])
        for parts in zip(*((b.inputs, b.targets) for b in batches), strict=True)
    ]


def same(a: list[Batch], b: list[Batch]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(stacked(a), stacked(b), strict=True))


AUGMENTED = [images(augment=True), images(augment=True, mixup=1.0), patches()]


@pytest.mark.parametrize("source", AUGMENTED, ids=lambda s: s.description)
def test_an_epoch_can_be_entered_at_any_batch(source: Source) -> None:
    whole = list(source.batches(5, epoch=2, seed=7, shuffle=True))
    assert len(whole) == 5
    assert same(whole[3:], list(source.batches(5, epoch=2, seed=7, shuffle=True, start=3)))
    assert not same(whole, list(source.batches(5, epoch=3, seed=7, shuffle=True)))


@pytest.mark.parametrize("source", AUGMENTED, ids=lambda s: s.description)
def test_processes_share_a_batch(source: Source) -> None:
    whole = list(source.batches(6, shuffle=True))
    parts = [list(source.batches(6, shuffle=True, rank=rank, world=2)) for rank in (0, 1)]
    assert [[b.size for b in p] for p in parts] == [[3, 3, 3, 3], [3, 3, 3, 2]]
    assert same(whole, [b for pair in zip(*parts, strict=True) for b in pair])


def test_an_epoch_holds_every_image_once() -> None:
    source = images()
    (found, labels) = stacked(list(source.batches(4, shuffle=True)))
    pixels = np.sort(np.round((found * STD + MEAN) * 255).reshape(23, -1), axis=0)
    assert np.array_equal(pixels, np.sort(PICTURES.reshape(23, -1), axis=0))
    assert not np.array_equal(labels, CLASSES)
    assert len(list(source.batches(4, drop_last=True))) == 5


def test_a_crop_is_the_image_shifted_over_black_and_perhaps_mirrored() -> None:
    source = images(augment=True)
    (found, _) = stacked(list(source.batches(23)))
    cuts = np.round((found * STD + MEAN) * 255)
    padded = np.pad(PICTURES, ((0, 0), (0, 0), (4, 4), (4, 4)))
    shifts = set()
    for cut, image in zip(cuts, padded, strict=True):
        fits = [
            (top, left, flip)
            for top in range(9)
            for left in range(9)
            for flip in (1, -1)
            if np.array_equal(cut[:, :, ::flip], image[:, top : top + 8, left : left + 8])
        ]
        assert fits
        shifts.add(fits[0])
    assert len(shifts) > 10


def test_mixed_images_have_the_shares_of_both_classes() -> None:
    plain, mixed = (next(iter(images(mixup=m).batches(23))) for m in (0.0, 1.0))
    targets = mixed.targets["label"]
    assert targets.shape == (23, 4)
    assert np.allclose(targets.sum(1), 1)
    weight = targets[np.arange(23), CLASSES].min()  # where the partner is of another class
    partners = {tuple(np.round(row, 5)) for row in targets}
    assert 0 < weight < 1 and len(partners) > 4
    rest = (mixed.inputs["image"] - weight * plain.inputs["image"]) / (1 - weight)
    for row, image in zip(targets, rest, strict=True):
        nearest = np.abs(plain.inputs["image"] - image).max((1, 2, 3)).argmin()
        assert np.abs(plain.inputs["image"][nearest] - image).max() < 1e-3
        assert row[CLASSES[nearest]] > 1 - weight - 1e-5


def test_words_are_parted_into_the_longest_pieces(tmp_path: Path) -> None:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "un", "##aff", "##able", "##a", "##ffable", "!", "a"]
    (tmp_path / "words.txt").write_text("\n".join(pieces), encoding="utf-8")
    piece = WordPiece(tmp_path / "words.txt")
    assert piece("Unaffable!", 8).tolist() == [2, 4, 5, 6, 9, 3, 0, 0]
    assert piece("a xyz a", 8).tolist() == [2, 10, 1, 10, 3, 0, 0, 0]
    assert piece("a a a a a a a", 4).tolist() == [2, 10, 10, 3]


def test_a_patch_is_the_same_place_at_both_sizes() -> None:
    ramp = np.add.outer(2 * np.arange(40), 3 * np.arange(40)).astype(np.uint8)
    source = Patches([np.stack([ramp] * 3)], patch=8, count=16, name="ramp")
    batch = next(iter(source.batches(16)))
    small, large = batch.inputs["image"], batch.targets["target"]
    assert small.shape == (16, 3, 8, 8) and large.shape == (16, 3, 16, 16)
    averaged = large.reshape(16, 3, 8, 2, 8, 2).mean((3, 5))
    inside = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    assert np.abs(averaged - small)[inside].max() < 2 / 255


def test_halving_keeps_a_flat_image_and_its_parity() -> None:
    flat = np.full((3, 9, 12), 77, np.uint8)
    assert crop_even(flat).shape == (3, 8, 12)
    assert (halved(crop_even(flat)) == 77).all()
    assert halved(crop_even(flat)).shape == (3, 4, 6)


def test_luma_runs_from_16_to_235() -> None:
    assert luma(np.zeros((3, 1, 1))).item() == pytest.approx(16)
    assert luma(np.ones((3, 1, 1))).item() == pytest.approx(235)
