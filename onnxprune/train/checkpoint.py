"""The run directory: a run's state on disk, so that it can be killed at any moment and continued to the same end.

A checkpoint is two files, `00012.pt` (torch tensors and plain values, nothing executable) and `00012.json`, its
manifest, which is written last. Both are written under another name, flushed to the disk and renamed; a checkpoint
counts when its manifest can be read and the sha-256 of the other file is the one it names.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from torch import Tensor

from onnxprune.errors import UsageError
from onnxprune.train.settings import differences

__all__ = ["Memory", "RunDir", "Store"]

FORMAT = 1
LOCK = "lock"


class Store(Protocol):
    """Where a run's states are kept: in memory or in a run directory."""

    def save(self, state: Mapping[str, Any]) -> None:
        """Keep a state: a tree of dicts, lists, tuples, tensors and plain values, with its 'step' at the top."""

    def load(self) -> dict[str, Any] | None:
        """The newest state that is whole, on the CPU; None where there is none."""


class Memory:
    """The last state, in main memory."""

    def __init__(self) -> None:
        self._state: dict[str, Any] | None = None

    def save(self, state: Mapping[str, Any]) -> None:
        self._state = _copied(dict(state))

    def load(self) -> dict[str, Any] | None:
        return _copied(self._state)  # who takes it up may go on to write in it


class RunDir:
    """Checkpoints in a folder that one process at a time may hold.

    about: plain values that decide what the run gives; the run is continued under the same ones only.
    keep: how many checkpoints stay. notify: is told of checkpoints that are passed over.
    """

    def __init__(self, path: Path, *, about: Mapping[str, Any], keep: int, notify: Callable[[str], None]) -> None:
        self.path = Path(path)
        self.folder = self.path / "checkpoints"
        self.about = json.loads(json.dumps(dict(about), default=str))
        self.keep = keep
        self.notify = notify
        self._proved = False
        self._told: set[Path] = set()

    @contextmanager
    def held(self, *, resume: bool) -> Iterator[RunDir]:
        """Hold the folder. Raises UsageError where another process does, where a run stands in it and `resume` is
        not asked for, or where that run was under other settings."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / LOCK, "a+")  # noqa: SIM115  (held below)
        except OSError as error:
            raise UsageError(
                f"the run directory {self.path} can't be written: {error}", "give another --run-dir"
            ) from error
        with lock:
            _lock(lock, self.path)
            for leftover in self.folder.glob("*.tmp"):
                leftover.unlink()
            self._admit(resume, self.about)
            yield self

    def look(self, *, resume: bool) -> None:
        """Raise what `held` would raise, as far as that can be told now; changes nothing. `about` may lack what is not
        known yet."""
        if (self.path / LOCK).is_file():
            with open(self.path / LOCK, "r+") as lock:
                _acquire(lock, self.path)
        about = self.about
        for _, manifest in self._manifests():
            about = {**manifest["about"], **about}
            break
        self._admit(resume, about)

    def _admit(self, resume: bool, about: Mapping[str, Any]) -> None:
        manifest = next((m for _, m in self._manifests()), None)
        if manifest is None:
            return
        if not resume:
            raise UsageError(
                f"{self.path} holds a run, stopped at step {manifest['step']}",
                "continue it with --resume, or give another --run-dir",
            )
        if manifest["format"] != FORMAT:
            raise UsageError(f"{self.path} is a run of another version of onnxprune", "give another --run-dir")
        changed = differences(manifest["about"], about)
        if changed:
            raise UsageError(
                f"{self.path} can't be continued with other settings: {'; '.join(changed)}",
                "give the settings it was begun with, or another --run-dir",
            )

    def _manifests(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """The manifests that can be read, newest first."""
        for path in sorted(self.folder.glob("*.json"), reverse=True):
            try:
                manifest = json.loads(path.read_text())
                if isinstance(manifest, dict) and {"format", "step", "file", "sha256", "about"} <= manifest.keys():
                    yield path, manifest
                    continue
            except (OSError, ValueError):
                pass
            self._damaged(path, "it can't be read")

    def save(self, state: Mapping[str, Any]) -> None:
        """Write a checkpoint; when this returns it is on the disk. Raises OSError where the disk says no."""
        numbers = [int(path.stem) for path in self.folder.glob("*.json") if path.stem.isdigit()]
        stem = f"{max(numbers, default=0) + 1:05d}"
        target = self.folder / f"{stem}.pt"
        with _replacing(target) as file:
            digest = _Digest(file)
            torch.save(dict(state), digest)  # type: ignore[arg-type]
        if not self._proved:  # once a run: what was written can be read again by the means that --resume has
            torch.load(target, map_location="cpu", weights_only=True)
            self._proved = True
        manifest = {
            "format": FORMAT,
            "step": state["step"],
            "file": target.name,
            "bytes": digest.size,
            "sha256": digest.hash.hexdigest(),
            "about": self.about,
        }
        with _replacing(self.folder / f"{stem}.json") as file:
            file.write(json.dumps(manifest, indent=1).encode())
        for old in sorted(self.folder.glob("*.json"), reverse=True)[self.keep :]:
            old.unlink()
            old.with_suffix(".pt").unlink(missing_ok=True)

    def load(self) -> dict[str, Any] | None:
        for path, manifest in self._manifests():
            try:
                return self._read(manifest)
            except Exception as error:  # whatever reading a damaged file may raise
                self._damaged(path.with_suffix(".pt"), str(error))
        return None

    def _damaged(self, path: Path, why: str) -> None:
        if path not in self._told:
            self._told.add(path)
            self.notify(f"{path} is damaged ({why}); the checkpoint before it is taken")

    def _read(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        path = self.folder / manifest["file"]
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != manifest["sha256"]:
            raise ValueError("its checksum is another than its manifest says")
        return torch.load(path, map_location="cpu", weights_only=True)


class _Digest:
    """A file that is hashed while it is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.hash, self.size = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self.hash.update(data)
        written = self.file.write(data)
        self.size += written
        return written

    def flush(self) -> None:
        self.file.flush()


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears under its name when it is whole and on the disk."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _lock(file: IO[str], path: Path) -> None:
    """Lock a file for this process until it ends or closes it, and write its pid there.

    The system releases the lock however the process ends; on POSIX, children that it forked do not inherit it.
    """
    _acquire(file, path)
    file.seek(0)
    file.truncate()
    file.write(str(os.getpid()))
    file.flush()


def _acquire(file: IO[str], path: Path) -> None:
    file.seek(0)
    holder = file.read().strip()
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(2**20)  # a byte behind the pid, so that others can still read it
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UsageError(
            f"{path} is in use by process {holder or '(unknown)'}", "wait until it ends, or give another --run-dir"
        ) from None


def _copied(tree: Any) -> Any:
    """A tree of dicts, lists, tuples and values, its tensors copied to the CPU."""
    if isinstance(tree, Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        return {key: _copied(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_copied(value) for value in tree)
    return tree
