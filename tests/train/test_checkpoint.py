"""The run directory: atomic, checked, held by one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from onnxprune.errors import UsageError
from onnxprune.train.checkpoint import Memory, RunDir


class Told(list[str]):
    __call__ = list.append


@pytest.fixture
def told() -> Told:
    return Told()


def folder(path: Path, told: Told, **about: Any) -> RunDir:
    return RunDir(path / "run", about={"lr": 0.1} | about, keep=2, notify=told)


def state(step: int) -> dict[str, Any]:
    return {"step": step, "network": {"w": torch.full((100,), float(step))}, "random": [(1, (2, 3), None)]}


def write(path: Path, told: Told, steps: Iterator[int] | range) -> None:
    with folder(path, told).held(resume=False) as run:
        for step in steps:
            run.save(state(step))


def load(path: Path, told: Told) -> dict[str, Any] | None:
    with folder(path, told).held(resume=True) as run:
        return run.load()


def test_the_last_two_are_kept_and_the_newest_is_loaded(tmp_path: Path, told: Told) -> None:
    write(tmp_path, told, range(0, 50, 10))
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["00004.json", "00004.pt", "00005.json", "00005.pt"]
    found = load(tmp_path, told)
    assert found is not None and found["step"] == 40
    assert torch.equal(found["network"]["w"], torch.full((100,), 40.0)) and found["random"] == [(1, (2, 3), None)]
    assert told == []


def test_after_going_back_the_newest_counts_and_not_the_furthest(tmp_path: Path, told: Told) -> None:
    write(tmp_path, told, iter([0, 100, 60]))
    found = load(tmp_path, told)
    assert found is not None and found["step"] == 60


@pytest.mark.parametrize("harm", ["cut", "emptied", "flipped", "removed", "manifest cut", "manifest of numbers"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path, told: Told, harm: str) -> None:
    write(tmp_path, told, range(3))
    last = tmp_path / "run" / "checkpoints" / "00003.pt"
    data, manifest = last.read_bytes(), last.with_suffix(".json")
    if harm == "cut":
        last.write_bytes(data[: len(data) // 2])
    elif harm == "emptied":
        last.write_bytes(b"")
    elif harm == "flipped":
        last.write_bytes(data[:700] + bytes([data[700] ^ 1]) + data[701:])
    elif harm == "removed":
        last.unlink()
    elif harm == "manifest cut":
        manifest.write_text(manifest.read_text()[:40])
    else:
        manifest.write_text("[1, 2]")
    found = load(tmp_path, told)
    assert found is not None and found["step"] == 1
    assert len(told) == 1 and "00003" in told[0] and "damaged" in told[0]


def test_a_run_goes_on_under_the_same_settings_only(tmp_path: Path, told: Told) -> None:
    write(tmp_path, told, range(2))
    with (
        pytest.raises(UsageError, match=r"lr was 0\.1, is 0\.2; seed was None, is 3"),
        folder(tmp_path, told, lr=0.2, seed=3).held(resume=True),
    ):
        pass


def test_a_run_is_not_overwritten(tmp_path: Path, told: Told) -> None:
    write(tmp_path, told, range(3))
    with pytest.raises(UsageError, match="stopped at step 2") as caught, folder(tmp_path, told).held(resume=False):
        pass
    assert "--resume" in caught.value.hint


def test_a_folder_is_held_by_one_process(tmp_path: Path, told: Told) -> None:
    other = (
        "import sys, pathlib\n"
        "from onnxprune.train.checkpoint import RunDir\n"
        "from onnxprune.errors import UsageError\n"
        "try:\n"
        "    with RunDir(pathlib.Path(sys.argv[1]), about={}, keep=2, notify=print).held(resume=True): print('held')\n"
        "except UsageError as error: print(error)\n"
    )

    def ask() -> str:
        return subprocess.run(
            [sys.executable, "-c", other, str(tmp_path / "run")], capture_output=True, text=True, check=True
        ).stdout.strip()

    with folder(tmp_path, told).held(resume=False):
        assert ask() == f"{tmp_path / 'run'} is in use by process {os.getpid()}"
    assert ask() == "held"


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, told: Told) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UsageError, match="can't be written"), folder(tmp_path, told).held(resume=False):
        pass


def test_what_could_not_be_read_again_is_not_written_in_silence(tmp_path: Path, told: Told) -> None:
    with folder(tmp_path, told).held(resume=False) as run, pytest.raises(Exception, match="[Ww]eights"):
        run.save({"step": 0, "network": Told()})
    assert not list((tmp_path / "run" / "checkpoints").glob("*.json"))


def test_manifests_tell_what_they_belong_to(tmp_path: Path, told: Told) -> None:
    write(tmp_path, told, range(1))
    manifest = json.loads((tmp_path / "run" / "checkpoints" / "00001.json").read_text())
    assert manifest["step"] == 0 and manifest["about"] == {"lr": 0.1}
    assert manifest["bytes"] == (tmp_path / "run" / "checkpoints" / "00001.pt").stat().st_size


def test_memory_keeps_what_later_steps_do_not_touch() -> None:
    memory, w = Memory(), torch.ones(3)
    memory.save({"step": 0, "network": {"w": w}})
    w.zero_()
    for _ in range(2):
        found = memory.load()
        assert found is not None and found["network"]["w"].tolist() == [1, 1, 1]
        found["network"]["w"].zero_()
