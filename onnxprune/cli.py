"""The command line: options in, one call, a report out. What the commands do is in `pipeline`.

Nothing heavy is imported at the top: `--help` must not wait for onnx, onnxruntime or torch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from onnxprune._version import __version__
from onnxprune.console import EPILOG, Group, Progress, check_json, deliver, say, terminable
from onnxprune.options import training_arguments, training_options
from onnxprune.train.methods import METHODS, ONESHOT

__all__ = ["main"]

# Named here as well so that --help loads no stage; a test compares them with the tables of `select` and `verify`.
IMPORTANCE = ("l1", "l2", "bn", "random", "fpgm", "wanda", "variance", "taylor", "distill", "obs")
ALLOCATIONS = ("importance", "sensitivity")
DEPLOYMENTS = ("ort-cpu", "openvino", "tensorrt", "none")
OPTIMISATION = ("none", "basic", "extended", "all")

Shapes = dict[str, tuple[int, ...]]
F = TypeVar("F", bound=Callable[..., Any])


def _parse_shapes(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> Shapes:
    """`x:1,3,224,224` or `x:[1,3,224,224]`, one input each; the name may hold colons."""
    shapes: Shapes = {}
    for value in values:
        name, _, sizes = value.rpartition(":")
        try:
            shape = tuple(int(n) for n in sizes.strip().removeprefix("[").removesuffix("]").split(","))
        except ValueError:
            shape = ()
        if not name or not shape or min(shape) < 1:
            raise click.BadParameter(f"'{value}' is no input shape, such as x:1,3,224,224", ctx, param)
        shapes[name] = shape
    return shapes


def _parse_options(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """`NAME=VALUE`, each name once."""
    found: dict[str, str] = {}
    for value in values:
        name, equals, text = (part.strip() for part in value.partition("="))
        if not name or not equals:
            raise click.BadParameter(f"'{value}' is no option of a method, such as share=0.5", ctx, param)
        if name in found:
            raise click.BadParameter(f"'{name}' is given twice", ctx, param)
        found[name] = text
    return found


def _one_target(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> str | None:
    """Of two targets the last would silently win."""
    if len(value) > 1:
        raise click.BadParameter("give one target, or several as --sweep macs=0.9,0.5", ctx, param)
    return value[0] if value else None


def _show_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        click.echo(f"onnxprune {__version__}")
        ctx.exit()


def _option(*names: str, **settings: Any) -> Callable[[F], F]:
    return click.option(*names, **settings)


_json = _option(
    "--json",
    "json_to",
    metavar="FILE|-",
    is_flag=False,
    flag_value="-",
    help="Write a JSON document; - prints it instead of the table.",
)
_verbose = _option("-v", "--verbose", count=True, help="More detail; -vv shows tracebacks of errors.")
_quiet = _option("-q", "--quiet", is_flag=True, help="No table and no progress; warnings and errors only.")
_seed = _option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of everything random.")
_exclude = _option(
    "--exclude", multiple=True, metavar="REGEX", help="Keep initializers and nodes whose name matches. May be repeated."
)
_shapes = _option(
    "--input-shapes",
    multiple=True,
    callback=_parse_shapes,
    metavar="NAME:SIZES",
    help="Sizes of an input, as in x:1,3,224,224. May be repeated; the output's dynamic sizes stay.",
)
_threads = _option(
    "--threads",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Threads of onnxruntime when latency is measured.",
)


@click.group(
    cls=Group, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@_option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version, help="Show the version.")
def main() -> None:
    """Remove whole channels, heads and neurons from an ONNX model, and prove with onnxruntime that nothing else
    changed."""


@main.command()
@click.argument("model")
@click.argument("out", required=False)
@_option(
    "--target",
    multiple=True,
    callback=_one_target,
    metavar="KEY=VALUE",
    help="What is to remain: macs=0.5, params=40%, size=5MB, macs=1.2G, channels=0.5, latency=0.6 or latency=12ms "
    "(measured here in onnxruntime, with --threads).",
)
@_option(
    "--sweep",
    metavar="KEY=VALUE,...",
    help="Several targets instead, such as macs=0.9,0.7,0.5: a model for each (OUT is a folder, or their common name), "
    "and the curve.",
)
@_option(
    "--method",
    type=click.Choice((ONESHOT, *METHODS)),
    default=ONESHOT,
    show_default=True,
    help="Remove what matters least at once, or make it vanish in training first (all others; with --data).",
)
@_option(
    "--method-option",
    "method_options",
    multiple=True,
    callback=_parse_options,
    metavar="NAME=VALUE",
    help="An option of the method, such as share=0.5, the part of the training before the removal. May be repeated.",
)
@_option(
    "--importance",
    type=click.Choice(("auto", *IMPORTANCE)),
    default="auto",
    show_default=True,
    help="Which units are worth the least; from wanda on it is found out on --data. "
    "auto: obs or wanda where there is a repair on --data, else l2.",
)
@_option(
    "--allocate",
    type=click.Choice(ALLOCATIONS),
    default="importance",
    show_default=True,
    help="How the cut is shared out: by importance alone, or by what each group's loss costs on --data.",
)
@_option(
    "--sensitivity",
    metavar="FILE",
    help="Take importance and what groups cost from this file of `onnxprune sensitivity`.",
)
@_option(
    "--scope",
    type=click.Choice(("global", "local")),
    default="global",
    show_default=True,
    help="Compare units across the model, or prune every group by the same share.",
)
@_option(
    "--floor",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.1,
    show_default=True,
    help="Least fraction of its units that a group keeps.",
)
@_option(
    "--deploy",
    type=click.Choice(DEPLOYMENTS),
    default="ort-cpu",
    show_default=True,
    help="Where the model will run; decides which channel counts are fast.",
)
@_option(
    "--align", type=click.IntRange(min=1), metavar="N", help="Keep multiples of N channels, whatever --deploy says."
)
@_exclude
@_option("--allow-inexact", is_flag=True, help="Also prune groups whose removal changes the function.")
@_shapes
@_option("--dry-run", is_flag=True, help="Plan only; write nothing.")
@_option("--best-effort", is_flag=True, help="Where the target can't be met, write what comes closest.")
@_option("--force", is_flag=True, help="Overwrite the output.")
@_json
@_option("--no-latency", is_flag=True, help="Don't measure latency.")
@_threads
@training_options
@_verbose
@_quiet
@_seed
def compress(
    model: str,
    out: str | None,
    *,
    json_to: str | None,
    verbose: int,
    quiet: bool,
    no_latency: bool,
    input_shapes: Shapes,
    target: str | None,
    sweep: str | None,
    **options: Any,
) -> None:
    """Prune MODEL to a target and write it to OUT (<stem>.pruned.onnx beside the model by default).

    With --data what is left is repaired: its weights are solved for to give what the original gives. With --steps,
    --epochs or --time-budget it is then trained. Other methods than oneshot train the whole model first, until the
    units that are to go are zero.
    """
    path = Path(model)
    if sweep is not None and target is None:
        output = Path(out) if out is not None else path
        check_json(json_to, path, output)
        how = {"latency": not no_latency, "input_shapes": input_shapes or None}
        _sweep(model, output, sweep, json_to=json_to, quiet=quiet, **how, **options)
        return
    if target is None or sweep is not None:
        raise click.UsageError("give a --target, or a --sweep over several")
    output = Path(out) if out is not None else path.with_name(f"{path.stem}.pruned.onnx")
    check_json(json_to, path, output)
    from onnxprune import pipeline
    from onnxprune.accuracy import is_first_process
    from onnxprune.report.document import compress_document
    from onnxprune.report.terminal import compress_report

    options |= training_arguments(options, seed=options["seed"])
    if not is_first_process():
        json_to, quiet = None, True
    with Progress(quiet=quiet) as progress, terminable():
        result = pipeline.compress(
            model,
            None if options["dry_run"] else output,
            target=target,
            latency=not no_latency,
            input_shapes=input_shapes or None,
            progress=progress,
            on_step=progress.step,
            **options,
        )
    unasked = options["data"] is None and options["repair"] == "auto"

    def report() -> str:
        return compress_report(result, verbose=verbose > 0, unrepaired=unasked)

    deliver(json_to, lambda: compress_document(result), report, quiet=quiet)
    for warning in result.warnings:
        say(f"warning: {warning}", err=True)


def _sweep(
    model: str,
    output: Path,
    text: str,
    *,
    json_to: str | None,
    quiet: bool,
    **options: Any,
) -> None:
    """One model per target; ends with the exit code of what went wrong."""
    from onnxprune.accuracy import is_first_process
    from onnxprune.report.sweep import sweep_document, sweep_table
    from onnxprune.sweep import sweep, targets_of

    options |= training_arguments(options, seed=options["seed"])
    if not is_first_process():
        json_to, quiet = None, True
    with Progress(quiet=quiet) as progress, terminable():
        found = sweep(
            model,
            output,
            targets=targets_of(text),
            progress=progress,
            on_step=progress.step,
            **options,
        )
    deliver(json_to, lambda: sweep_document(found), lambda: sweep_table(found), quiet=quiet)
    for point in found.points:
        for warning in () if point.result is None else point.result.warnings:
            say(f"warning: {point.target}: {warning}", err=True)
        if point.error is not None:
            say(f"error: {point.target}: {point.error}", err=True)
    if found.exit_code:
        raise click.exceptions.Exit(found.exit_code)


@main.command()
@click.argument("model")
@_exclude
@_shapes
@_json
@_verbose
def inspect(model: str, *, exclude: tuple[str, ...], input_shapes: Shapes, json_to: str | None, verbose: int) -> None:
    """Show what is prunable in MODEL, and what stands in the way of the rest."""
    check_json(json_to, Path(model))
    from onnxprune import pipeline
    from onnxprune.report.document import inspect_document
    from onnxprune.report.terminal import inspect_report

    found = pipeline.inspect(model, exclude=exclude, input_shapes=input_shapes or None)
    timing = {"load_s": found.load_s, "analyse_s": found.analyse_s}
    deliver(
        json_to,
        lambda: inspect_document(found.summary, found.analysis, timing=timing),
        lambda: inspect_report(found.summary, found.analysis, verbose=verbose > 0),
    )


@main.command()
@click.argument("model")
@_option("--data", required=True, metavar="SPEC", help="Measure on this, in any form that compress takes.")
@_option("--preprocess", metavar="KEY=VALUE,...", help="As for compress.")
@_option("--eval", "evaluate", default="agreement", show_default=True, metavar="NAME", help="Metric beside the loss.")
@_option("--importance", type=click.Choice(IMPORTANCE), default="obs", show_default=True, help="Which units go first.")
@_option("--samples", type=click.IntRange(min=1), help="Measure on N samples, instead of what takes a few minutes.")
@_option("--repaired", is_flag=True, help="Let what is left make up for what is gone, as closed-form repair does.")
@_option("--out", metavar="FILE", help="Where to keep the curves: <stem>.sensitivity.json beside the model by default.")
@_exclude
@_option("--allow-inexact", is_flag=True, help="Also groups whose removal changes the function.")
@_shapes
@_json
@_verbose
@_quiet
@_seed
def sensitivity(
    model: str,
    *,
    out: str | None,
    json_to: str | None,
    verbose: int,
    quiet: bool,
    input_shapes: Shapes,
    **options: Any,
) -> None:
    """Measure what MODEL loses with the units of each group, for `compress --sensitivity`."""
    path = Path(model)
    kept = Path(out) if out is not None else path.with_name(f"{path.stem}.sensitivity.json")
    check_json(json_to, path, kept)
    check_json(str(kept), path)
    from onnxprune import pipeline
    from onnxprune.report.sensitivity import sensitivity_table

    with Progress(quiet=quiet) as progress, terminable():
        analysis, found = pipeline.sensitivity(
            model,
            input_shapes=input_shapes or None,
            progress=lambda done, of: progress(f"{done} of {of} samples"),
            **options,
        )
    found.save(kept)
    deliver(json_to, found.document, lambda: sensitivity_table(analysis, found, verbose=verbose > 0), quiet=quiet)
    if not quiet and json_to != "-":
        say(f"written: {kept}")


@main.command()
@click.argument("original")
@click.argument("pruned")
@_shapes
@_json
@_verbose
@_seed
def verify(original: str, pruned: str, *, input_shapes: Shapes, json_to: str | None, verbose: int, seed: int) -> None:
    """Prove that PRUNED equals ORIGINAL with the removed units masked."""
    check_json(json_to, Path(original), Path(pruned))
    from onnxprune import pipeline
    from onnxprune.report.document import verify_document
    from onnxprune.report.terminal import verify_line

    found = pipeline.verify(original, pruned, seed=seed, input_shapes=input_shapes or None)
    deliver(json_to, lambda: verify_document(original, pruned, found), lambda: verify_line(found))


@main.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@_threads
@_option("--runs", type=click.IntRange(min=1), help="Rounds, instead of a time.")
@_option("--seconds", type=click.FloatRange(0, min_open=True), default=2.0, show_default=True, help="Time per model.")
@_option(
    "--optimisation",
    type=click.Choice(OPTIMISATION),
    default="all",
    show_default=True,
    help="Graph optimisation level of onnxruntime.",
)
@_shapes
@_json
@_verbose
@_seed
def bench(models: tuple[str, ...], *, input_shapes: Shapes, json_to: str | None, verbose: int, **options: Any) -> None:
    """Measure the latency of models in turns, and compare each with the first."""
    check_json(json_to, *map(Path, models))
    from onnxprune.report.document import bench_document
    from onnxprune.report.terminal import bench_table
    from onnxprune.verify import latency

    measured = latency.bench(models, shapes=input_shapes, **options)
    deliver(json_to, lambda: bench_document(models, measured), lambda: bench_table(models, measured))
