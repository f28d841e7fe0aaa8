"""What the commands have in common: exit codes, `error:` and `hint:` lines, progress, and where a result goes.

Nothing heavy is imported at the top: `--help` must not wait for onnx, onnxruntime or torch.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, Self

import click

from onnxprune.errors import OnnxPruneError, UsageError

__all__ = ["EPILOG", "Command", "Group", "Progress", "check_json", "complain", "deliver", "say", "terminable"]

INTERNAL, USAGE, INTERRUPTED = 1, 2, 130

EPILOG = """\b
Exit codes:
    0  done
    1  internal error
    2  usage: an option or argument makes no sense
    3  model rejected, or nothing in it is prunable
    4  target or --max-drop not met
    5  verification failed, nothing was written
    6  data or hook failed
  130  interrupted; with --run-dir, --resume goes on
"""


class Command(click.Command):
    """A command whose errors become an `error:` and a `hint:` line; -vv adds the traceback."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("epilog", EPILOG)
        super().__init__(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except KeyboardInterrupt as stop:
            reason, _, hint = str(stop).partition("; ")  # of a training run: where it stands, and how it goes on
            complain(f"interrupted: {reason}" if reason else "interrupted", hint, _notes(stop))
            raise click.exceptions.Exit(INTERRUPTED) from None
        except Exception as error:
            _fail(error, detailed=ctx.params.get("verbose", 0) > 1)


class Group(click.Group):
    """The top of the command line: usage errors and interruptions end here."""

    command_class = Command

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        kwargs["standalone_mode"] = False
        try:
            code = super().main(*args, **kwargs)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message(), err=True)
            code = USAGE
        except click.ClickException as error:
            where = getattr(error, "ctx", None)
            complain(error.format_message(), f"see `{where.command_path if where else 'onnxprune'} --help`")
            code = USAGE
        except click.Abort:
            complain("interrupted", "")
            code = INTERRUPTED
        sys.exit(code if isinstance(code, int) else 0)


def _fail(error: Exception, *, detailed: bool) -> NoReturn:
    """Say what went wrong and end with the error's exit code."""
    if detailed:
        click.echo("".join(traceback.format_exception(error)), err=True, nl=False)
    if isinstance(error, OnnxPruneError):
        complain(str(error), error.hint, _notes(error))
        code = error.exit_code
    else:
        complain(
            f"internal: {type(error).__name__}: {error}",
            "" if detailed else "run it again with -vv for the traceback, and report it",
        )
        code = INTERNAL
    raise click.exceptions.Exit(code)


def _notes(error: BaseException) -> list[str]:
    """What the work had warned of before it failed."""
    return list(getattr(error, "__notes__", ()))


def complain(message: str, hint: str, warnings: Sequence[str] = ()) -> None:
    for warning in warnings:
        say(f"warning: {warning}", err=True)
    rank = os.environ.get("RANK", "0")  # of several processes (torchrun), each says which one it is
    say(f"error{f' in process {rank}' if rank != '0' else ''}: {' '.join(message.split())}", err=True)
    if hint:
        say(f"hint: {hint}", err=True)


def say(text: str, *, err: bool = False) -> None:
    """Print, in ASCII where the stream can't show more."""
    encoding = getattr(sys.stderr if err else sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        from onnxprune.report.terminal import ascii_only

        text = ascii_only(text)
    _emit(text, err=err)


def _emit(text: str | bytes, *, err: bool = False) -> None:
    try:
        click.echo(text, err=err)
    except BrokenPipeError:  # whoever reads it has seen enough; the work is done
        os.dup2(os.open(os.devnull, os.O_WRONLY), (sys.stderr if err else sys.stdout).fileno())


class Progress:
    """One line on stderr that names the stage; nothing where nobody watches."""

    def __init__(self, *, quiet: bool) -> None:
        self.shown = sys.stderr.isatty() and not quiet

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.shown:
            click.echo("\r\x1b[K", err=True, nl=False)

    def __call__(self, stage: str) -> None:
        if self.shown:
            click.echo(f"\r\x1b[K{stage} ...", err=True, nl=False)

    def step(self, row: Any) -> None:
        """The state of a training run."""
        if self.shown:
            click.echo(f"\r\x1b[K{row.line()}", err=True, nl=False)


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM (`kill`, torchrun, a batch system) ends the work as Ctrl-C does: nothing half-done stays behind."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def check_json(json_to: str | None, *models: Path) -> None:
    """The document may be written there, and is not about to replace a model. Raises UsageError."""
    if json_to is None or json_to == "-":
        return
    path = Path(json_to)
    if path.suffix == ".onnx" or any(_same_file(path, model) for model in models):
        raise UsageError(f"--json {path} would overwrite a model", "--json takes a file of its own, or -")
    if path.is_dir():
        raise UsageError(f"--json {path} is a folder", "give a file in it")
    _check_writable(path)


def _same_file(a: Path, b: Path) -> bool:
    return a.resolve() == b.resolve() or (a.exists() and b.exists() and a.samefile(b))


def _check_writable(path: Path) -> None:
    """Try it: permissions alone don't tell of read-only file systems."""
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UsageError(f"{path} can't be written: {error.strerror}", f"is {path.parent} a writable folder?") from None


def deliver(
    json_to: str | None, document: Callable[[], Mapping[str, Any]], report: Callable[[], str], *, quiet: bool = False
) -> None:
    """JSON to where it is wanted; the report to stdout, unless the JSON goes there."""
    if json_to is not None:
        from onnxprune.report.document import to_json

        text = to_json(dict(document()))
        if json_to == "-":
            _emit(text.encode())
        else:
            Path(json_to).write_text(text + "\n", encoding="utf-8")
    if json_to != "-" and not quiet:
        say(report())
