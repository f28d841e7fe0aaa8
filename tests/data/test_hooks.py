"""Callables of the user's: found, run once, and blamed by file and line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from onnxprune import DataError
from onnxprune.data import load_callable


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_file_is_run_once_and_finds_what_lies_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "beside_hooks.py", "ANSWER = 42\n")
    file = write(
        tmp_path / "hooks.py",
        "import beside_hooks\nruns = []\nruns.append(1)\n"
        "def answer(): return beside_hooks.ANSWER + len(runs)\n"
        "class Space:\n    @staticmethod\n    def inner(): return 'inner'\n",
    )
    assert load_callable(f"{file}:answer")() == 43
    assert load_callable(f"{file}:Space.inner")() == "inner"
    assert load_callable(f"{file}:answer")() == 43


def test_a_file_that_was_changed_is_run_again(tmp_path: Path) -> None:
    import os

    file = write(tmp_path / "hooks.py", "def f(): return 1\n")
    assert load_callable(f"{file}:f")() == 1
    write(file, "def f(): return 2\n")
    os.utime(file, ns=(1, 1))
    assert load_callable(f"{file}:f")() == 2


def test_modules_are_found_from_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_hooks_package").mkdir()
    write(tmp_path / "my_hooks_package" / "loss.py", "def f(): return 'here'\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert load_callable("my_hooks_package.loss:f")() == "here"
    assert load_callable("os.path:join")("a", "b") == "a/b"


@pytest.mark.parametrize(
    ("text", "spec", "message", "hint"),
    [
        ("", "hooks.py", "names no callable", "FILE.py:NAME"),
        ("", "hooks.py:", "names no callable", "FILE.py:NAME"),
        ("", "hooks.py:a b", "names no callable", "FILE.py:NAME"),
        ("", "absent.py:f", "absent.py does not exist", "check the path"),
        ("def batches(): ...", "hooks.py:batchs", "has no 'batchs'", "did you mean 'batches'"),
        ("data = [1]", "hooks.py:data", "is a list, which can't be called", "function that returns the list"),
        ("x = 1\ny = x / 0", "hooks.py:f", r"ZeroDivisionError: division by zero \(.*hooks.py, line 2\)", "fault"),
        ("def f(:\n", "hooks.py:f", r"SyntaxError: .*hooks.py, line 1\)", "fault"),
        ("import not_there_at_all", "hooks.py:f", "ModuleNotFoundError: .*not_there_at_all.*line 1", "fault"),
        ("raise SystemExit(3)", "hooks.py:f", "SystemExit: 3", "fault"),
        ("", "no_such_module:f", "there is no module 'no_such_module'", "no_such_module.py:NAME"),
    ],
)
def test_what_is_wrong_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, spec: str, message: str, hint: str
) -> None:
    write(tmp_path / "hooks.py", text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(DataError, match=message) as caught:
        load_callable(spec)
    assert hint in caught.value.hint
    assert caught.value.exit_code == 6
