"""The options of `compress` about data, repair and training, and what they mean to `pipeline.compress`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from onnxprune.train.methods import ONESHOT

__all__ = ["training_arguments", "training_options"]

F = TypeVar("F", bound=Callable[..., Any])
# Named here as well so that --help loads no stage; a test compares them with those of `repairs`.
REPAIRS = ("auto", "affine", "ls", "mean", "none")
CALIBRATIONS = ("random", "bn")
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
SETTINGS = (
    "epochs",
    "optimizer",
    "lr",
    "momentum",
    "weight_decay",
    "batch",
    "accumulate",
    "warmup",
    "schedule",
    "milestones",
    "clip",
    "ema",
    "amp",
    "channels_last",
    "compile",
    "device",
    "checkpoint_every_steps",
)
RECIPE = ("preprocess", "loss", "distill", "temperature", "rebn", "eval_data")


class _Duration(click.ParamType):
    """30m, 90s, 1.5h, or a number of seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        match = re.fullmatch(r"\s*(\d*\.?\d+)\s*(s|m|min|h|)\s*", str(value))
        if match is None or float(match[1]) <= 0:
            self.fail(f"'{value}' is no duration, such as 30m, 90s or 1.5h", param, ctx)
        return float(match[1]) * _UNITS[match[2]]


class _Milestones(click.ParamType):
    """0.25,0.5,0.75"""

    name = "shares"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        try:
            return tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"'{value}' are no shares, such as 0.25,0.5,0.75", param, ctx)


class _Drop(click.ParamType):
    """1% or 0.01."""

    name = "drop"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        from onnxprune.errors import UsageError
        from onnxprune.metrics import parse_max_drop

        try:
            return parse_max_drop(str(value))
        except UsageError as error:
            self.fail(f"{error} ({error.hint})", param, ctx)


_above_zero = click.FloatRange(0, min_open=True)
_share = click.FloatRange(0, 1, max_open=True)
_count = click.IntRange(min=1)

_OPTIONS = (
    click.option("--data", metavar="SPEC", help="Repair, rank, train and measure on this: .npz, .npy, a folder of "
                 "them, of ONNX test sets or of images, file.py:callable or package.module:callable."),
    click.option("--preprocess", metavar="KEY=VALUE,...", help="size=, crop=, mean=, std=, scale=, layout=, channels= "
                 "or imagenet."),
    click.option("--samples", type=_count, help="Inputs of --data that ranking and repair take.  [default: 512]"),
    click.option("--repair", type=click.Choice(REPAIRS), default="auto", show_default=True,
                 help="Solve for what is left to give what the original gave: affine (weights and biases), ls "
                 "(weights), mean (biases). auto: affine on --data, ls with --calibrate."),
    click.option("--calibrate", type=click.Choice(CALIBRATIONS),
                 help="Without --data: repair on inputs made up from what BatchNormalization nodes store (bn), or "
                 "drawn at random, which can make it worse."),
    click.option("--steps", type=_count, help="Train for N steps (500 where a method trains and no length is given)."),
    click.option("--epochs", type=_count, help="Train for N passes over the data."),
    click.option("--time-budget", type=_Duration(), metavar="TIME", help="Train for 30m, 90s or 1.5h."),
    click.option("--loss", default="auto", show_default=True, metavar="NAME|FILE.py:CALLABLE",
                 help="auto (distil from the original; needs no targets), match, ce, bce, mse, l1 or a callable."),
    click.option("--distill", type=click.FloatRange(0), default=0.0, metavar="W",
                 help="Add distillation from the original to a loss on targets, with this weight."),
    click.option("--temperature", type=_above_zero, default=4.0, show_default=True, help="Of distilled probabilities."),
    click.option("--eval", "evaluate", metavar="NAME|FILE.py:CALLABLE",
                 help="Measure top1, top5, mse, psnr, agreement or a callable in onnxruntime, before and after."),
    click.option("--eval-data", metavar="SPEC", help="Measure on this instead of --data."),
    click.option("--max-drop", type=_Drop(), metavar="1%", help="Refuse a result whose metric falls by more: exit 4."),
    click.option("--batch-size", "batch", type=_count, help="Samples per step."),
    click.option("--accumulate", type=_count, help="Compute each step in N parts, to save memory."),
    click.option("--optimizer", type=click.Choice(("sgd", "adam", "adamw")), help="What moves the weights."),
    click.option("--lr", type=_above_zero, help="Highest learning rate."),
    click.option("--momentum", type=_share, help="Of SGD."),
    click.option("--weight-decay", type=click.FloatRange(0), help="Not applied to biases and scales."),
    click.option("--schedule", type=click.Choice(("cosine", "linear", "constant", "steps")),
                 help="How the rate falls."),
    click.option("--milestones", type=_Milestones(), metavar="SHARES",
                 help="Where --schedule steps divides the rate by 10; 0.25,0.5,0.75 unless told otherwise."),
    click.option("--warmup", type=_share, help="Share of the training in which the rate rises."),
    click.option("--clip", type=_above_zero, help="Bound of the gradients' norm."),
    click.option("--ema", type=_share, help="End with a running average of the weights, of this decay."),
    click.option("--amp", type=click.Choice(("auto", "bf16", "fp16", "none")), help="Arithmetic in training."),
    click.option("--rebn/--no-rebn", default=None, help="Put folded BatchNormalization back for training, and fold it "
                 "again (where there is none, unless told otherwise)."),
    click.option("--channels-last", is_flag=True, default=None, help="Memory layout of images in training."),
    click.option("--compile", is_flag=True, default=None, help="Train with torch.compile."),
    click.option("--device", metavar="auto|cpu|cuda", help="Where to train."),
    click.option("--run-dir", metavar="DIR", help="Keep checkpoints here."),
    click.option("--checkpoint-every", "checkpoint_every_steps", type=_count, metavar="N",
                 help="A checkpoint every N steps, besides those every two minutes."),
    click.option("--resume", is_flag=True, help="Go on from the checkpoints in --run-dir."),
    click.option("--log-file", metavar="FILE", help="A row per few steps, as .csv or .jsonl."),
    click.option("--tensorboard", metavar="DIR", help="TensorBoard scalars, where it is installed."),
)  # fmt: skip


def training_options(command: F) -> F:
    """Give a command the options."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def training_arguments(options: dict[str, Any], *, seed: int) -> dict[str, Any]:
    """Take the options about training out of a command's, and give what `pipeline.compress` wants of them.

    Training is asked for by a length, or by a method that works in training. Raises UsageError.
    """
    from onnxprune.errors import UsageError
    from onnxprune.request import TRAIN_STEPS, Recipe
    from onnxprune.train.settings import TrainSettings

    data, resume, run_dir = options.pop("data"), options.pop("resume"), options.pop("run_dir")
    steps, budget = options.pop("steps"), options.pop("time_budget")
    log_file, tensorboard = options.pop("log_file"), options.pop("tensorboard")
    settings: dict[str, Any] = {name: value for name in SETTINGS if (value := options.pop(name)) is not None}
    if steps is not None:
        settings["steps"] = steps
    if budget is not None:
        settings["time_budget_s"] = budget
    for name, path in (("log_file", log_file), ("tensorboard", tensorboard)):
        if path is not None:
            settings[name] = Path(path)
    recipe = Recipe(**{name: options.pop(name) for name in RECIPE})
    if data is None and (settings or resume or run_dir):
        raise UsageError(f"{_option(settings)} is about training, which wants data", "give it with --data")
    if resume and run_dir is None:
        raise UsageError("--resume wants the folder of the run", "give it with --run-dir")
    train = None
    if settings.keys() & {"steps", "epochs", "time_budget_s"}:
        train = TrainSettings(seed=seed, **settings)
    elif data is not None and options["method"] != ONESHOT:
        train = TrainSettings(seed=seed, steps=TRAIN_STEPS, **settings)
    elif settings:
        raise UsageError(
            f"{_option(settings)} is about training, which is not asked for",
            f"--steps {TRAIN_STEPS} trains, as --epochs and --time-budget do",
        )
    chosen = {name: options.pop(name) for name in ("evaluate", "max_drop")}
    return {"data": data, "train": train, "recipe": recipe, "run_dir": run_dir, "resume": resume, **chosen}


def _option(settings: dict[str, Any]) -> str:
    """The first of the settings as it was given."""
    first = next(iter(settings), "run_dir")
    names = {"batch": "batch-size", "time_budget_s": "time-budget", "checkpoint_every_steps": "checkpoint-every"}
    return f"--{names.get(first, first.replace('_', '-'))}"
