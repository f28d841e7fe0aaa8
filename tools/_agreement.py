"""Trained files for which there is no labelled data: voice activity and faces. What counts is what the original gives.

The data folder holds `speech.npz` (spoken digits: `audio` of 8 kHz, int16, one clip after the other, `length` and
`index` per clip, of which 0 to 4 are for tests), and natural images `tiny_train.npz` and `tiny_test.npz` as
`unpack_data.py` writes them. Every model gets what its makers gave it:

- Images are resized to the size that the file takes, and scaled as its makers scale them. They show no faces but by
  chance: a detector is judged by its scores and boxes, whatever they say of a dog.
- Speech is cut into streams: clips at 16 kHz, some noise between and under them. A network with states runs over a
  stream; for calibration its inputs and the states that the original had there are taken from all over the streams, and
  for the test every network runs with states of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from onnxprune import load
from onnxprune.data import Source, open_data, signature_of
from onnxprune.verify.latency import open_session, run_options

__all__ = ["OTHERS", "Faces", "Other", "Voice"]

Feed = dict[str, np.ndarray]
RATE = 16000
IMAGENET = ((0.485 * 255, 0.456 * 255, 0.406 * 255), (0.229 * 255, 0.224 * 255, 0.225 * 255))


@dataclass(frozen=True)
class Other:
    """judge: 'above' (the first output over one half), 'argmax' (of the first output), or 'fidelity'."""

    judge: str = "fidelity"

    def calibration(self, model: Path, folder: Path, count: int) -> Source:
        """So many inputs. Raises DataError."""
        raise NotImplementedError

    def tests(self, model: Path, folder: Path, count: int) -> list[list[Feed]]:
        """Feeds in streams: within one of them states go on."""
        raise NotImplementedError

    states: Mapping[str, str] = field(default_factory=dict)
    """Output by input."""


# images


class Resized:
    """Images, resized and scaled one at a time: all of them would not fit into memory."""

    def __init__(self, images: np.ndarray, name: str, kind: Faces, size: tuple[int, int]) -> None:
        self.images, self.name, self.kind = images, name, kind
        self.down, self.across = (bilinear(a, b) for a, b in zip(images.shape[2:], size, strict=True))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, k: int) -> Feed:
        image = self.down @ self.images[k].astype(np.float32) @ self.across.T
        if self.kind.bgr:
            image = image[::-1]
        mean, std = (np.float32(v).reshape(-1, 1, 1) for v in (self.kind.mean, self.kind.std))
        image = (image - mean) / std
        return {self.name: np.ascontiguousarray(image.transpose(1, 2, 0) if self.kind.last else image, np.float32)}


@dataclass(frozen=True)
class Faces(Other):
    """mean, std: of bytes, in the order of the channels. bgr: blue comes first. last: channels come last. size: of
    images, where the file leaves it open."""

    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0
    bgr: bool = False
    last: bool = False
    size: tuple[int, int] = (160, 160)

    def images(self, model: Path, folder: Path, part: str, count: int) -> Resized:
        port = signature_of(load(model)).inputs[0]
        shape = [d or s for d, s in zip((port.shape or ())[-3:], (3, *self.size), strict=True)]
        with np.load(folder / f"tiny_{part}.npz") as stored:
            images = stored["image"][:count]
        return Resized(images, port.name, self, (shape[0], shape[1]) if self.last else (shape[1], shape[2]))

    def calibration(self, model: Path, folder: Path, count: int) -> Source:
        return open_data(self.images(model, folder, "train", count), signature_of(load(model)))

    def tests(self, model: Path, folder: Path, count: int) -> list[list[Feed]]:
        found = self.images(model, folder, "test", count)
        return [[{n: a[None] for n, a in found[k].items()}] for k in range(len(found))]


def bilinear(old: int, new: int) -> np.ndarray:
    """(new, old) weights of a resize with pixels at half places."""
    at = ((np.arange(new) + 0.5) * old / new - 0.5).clip(0, old - 1)
    low = np.floor(at).astype(int).clip(max=max(old - 2, 0))
    weights = np.zeros((new, old), np.float32)
    weights[np.arange(new), low] = 1 - (at - low)
    weights[np.arange(new), np.minimum(low + 1, old - 1)] += at - low
    return weights


# speech


@cache
def streams(folder: Path, part: str, clips: int = 12) -> list[np.ndarray]:
    """Some fifteen seconds each, at 16 kHz from -1 to 1: clips with pauses, over noise that is faint to loud."""
    with np.load(folder / "speech.npz") as stored:
        ends = np.cumsum(stored["length"].astype(np.int64))
        audio, test = stored["audio"], stored["index"] < 5
    chosen = np.flatnonzero(test if part == "test" else ~test)
    rng = np.random.default_rng(part == "test")
    rng.shuffle(chosen)
    found = []
    for begin in range(0, min(len(chosen), 20 * clips), clips):
        pieces = []
        for k in chosen[begin : begin + clips]:
            clip = doubled(audio[ends[k - 1] if k else 0 : ends[k]] / 32768)
            pieces += [np.zeros(rng.integers(RATE // 5, RATE)), clip / np.abs(clip).max() * rng.uniform(0.1, 0.8)]
        stream = np.concatenate(pieces)
        noise = np.cumsum(rng.standard_normal(len(stream)))
        noise = rng.standard_normal(len(stream)) + 0.3 * (noise - np.convolve(noise, np.ones(65) / 65, "same"))
        found.append((stream + noise / noise.std() * 10 ** rng.uniform(-3.5, -2)).clip(-1, 1))
    return found


def doubled(clip: np.ndarray) -> np.ndarray:
    """At twice the rate, with nothing in the upper half of the spectrum."""
    spectrum = np.fft.rfft(clip)
    return 2 * np.fft.irfft(np.pad(spectrum, (0, len(clip) - len(spectrum) + 1)), 2 * len(clip))


@dataclass(frozen=True)
class Voice(Other):
    """features: which inputs a stream gives, 'samples' (512 new ones behind 64 of before) or 'mel' (three frames of 40
    bands and the pitch). signal: the input that they go to. shapes: of states."""

    features: str = "samples"
    signal: str = "input"
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def frames(self, folder: Path, part: str) -> list[np.ndarray]:
        """One array per stream: (frames, ...)."""
        found = streams(folder, part)
        if self.features == "samples":
            return [windows(np.pad(s, (64, 0)), 576, 512) for s in found]
        mean, std = scale(folder)
        return [stacked((mel(s) - mean) / std) for s in found]

    def feeds(self, folder: Path, part: str) -> Iterator[list[Feed]]:
        zero = {n: np.zeros(s, np.float32) for n, s in self.shapes.items()}
        for frames in self.frames(folder, part):
            yield [{self.signal: f[None].astype(np.float32), **zero} for f in frames]

    def calibration(self, model: Path, folder: Path, count: int) -> Source:
        signature = signature_of(load(model))
        session = open_session(model, run_options(1, "all"))
        names = [o.name for o in session.get_outputs()]
        seen: list[Feed] = []
        for stream in self.feeds(folder, "train"):
            held: Feed = {}
            for feed in stream:
                seen.append({**feed, **held})
                found = dict(zip(names, session.run(None, seen[-1]), strict=True))
                held = {i: found[o] for i, o in self.states.items()}
        chosen = np.random.default_rng(0).permutation(len(seen))[:count]
        if signature.whole:
            return open_data([seen[k] for k in chosen], signature)
        return open_data({n: np.concatenate([seen[k][n] for k in chosen]) for n in seen[0]}, signature)

    def tests(self, model: Path, folder: Path, count: int) -> list[list[Feed]]:
        """Whole streams, until there are so many frames."""
        taken: list[list[Feed]] = []
        for stream in self.feeds(folder, "test"):
            left = count - sum(map(len, taken))
            if left > 0:
                taken.append(stream[:left])
        return taken


def windows(stream: np.ndarray, size: int, step: int) -> np.ndarray:
    return np.lib.stride_tricks.sliding_window_view(stream, size)[::step]


def stacked(frames: np.ndarray) -> np.ndarray:
    """(frames - 2, 3, features): every frame behind the two before it."""
    return windows(frames.reshape(-1), 3 * frames.shape[1], frames.shape[1]).reshape(-1, 3, frames.shape[1])


def mel(stream: np.ndarray) -> np.ndarray:
    """(frames, 41): logarithms of 40 mel bands of 48 ms, 16 ms apart, and the pitch in Hz, 0 where there is none."""
    frames = windows(np.append(stream[0], stream[1:] - 0.97 * stream[:-1]) * 32768, 768, 256)
    power = np.square(np.abs(np.fft.rfft(frames * np.hanning(768), 1024)))
    hz = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + RATE / 2 / 700), 42) / 2595) - 1)
    bins = np.fft.rfftfreq(1024, 1 / RATE)
    up, down = ((bins - a[:, None]) / (b - a)[:, None] for a, b in ((hz[:-2], hz[1:-1]), (hz[2:], hz[1:-1])))
    bands = np.log(power @ np.minimum(up, down).clip(0).T + 1e-20)
    plain = windows(stream, 768, 256)
    spread = np.fft.irfft(np.square(np.abs(np.fft.rfft(plain - plain.mean(1, keepdims=True), 2048))))[:, :321]
    peak = spread[:, 32:].argmax(1) + 32  # 50 to 500 Hz
    voiced = spread[np.arange(len(spread)), peak] > 0.4 * spread[:, 0]
    return np.c_[bands, np.where(voiced, RATE / peak, 0.0)]


@cache
def scale(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of the features: its makers' own are not in the file."""
    every = np.concatenate([mel(s) for s in streams(folder, "train")])
    return every.mean(0), every.std(0) + 1e-6


OTHERS: dict[str, Other] = {
    "ten_vad": Voice(
        "above",
        {"input_2": "output_2", "input_3": "output_3", "input_6": "output_6", "input_7": "output_7"},
        features="mel",
        signal="input_1",
        shapes=dict.fromkeys(("input_2", "input_3", "input_6", "input_7"), (1, 64)),
    ),
    "silero_vad_half": Voice("above", {"state": "stateN"}, shapes={"state": (2, 1, 128)}),
    "ezkl_fr_age": Faces(mean=IMAGENET[0], std=IMAGENET[1]),
    "antispoof_bin_128": Faces("argmax", std=255.0),
    "blazeface_front": Faces(mean=127.5, std=127.5, last=True),
    "blazeface_back": Faces(mean=127.5, std=127.5, last=True),
    "yunet_n_dynamic": Faces(bgr=True),
    "yunet_s_320": Faces(bgr=True),
    "ultraface_rfb320_nopost": Faces(mean=127.0, std=128.0),
    "mobilefacenet": Faces(mean=127.5, std=128.0),
    "retinaface_facedetector": Faces(mean=(104.0, 117.0, 123.0), bgr=True),
}
"""By the file's stem, those first that take the least time."""
