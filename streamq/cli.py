"""The command line. Imports of numpy, numba and rich wait until a command needs them."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import click

from streamq.errors import StreamqError, VerifyError

INTERRUPTED = 130


class _Group(click.Group):
    """Turns expected failures into one sentence and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; 1 for an error, 3 for a failed verification, 130 for Ctrl-C."""
        try:
            return super().invoke(ctx)
        except StreamqError as e:
            _tell(f"Error: {e}", e)
            sys.exit(e.exit_code)
        except KeyboardInterrupt as e:
            _tell("Interrupted.", e)
            sys.exit(INTERRUPTED)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except OSError as e:
            _tell(f"Error: {e.filename or 'standard output'}: {e.strerror}.", e)
            sys.exit(1)
        except Exception as e:
            if os.environ.get("STREAMQ_DEBUG"):
                raise
            click.echo(
                f"Error: {type(e).__name__}: {e}. This is a bug in streamq; please report it with "
                "the output of the same command under STREAMQ_DEBUG=1.",
                err=True,
            )
            sys.exit(1)


def _tell(text: str, error: BaseException) -> None:
    """A failure on stderr, with what was noted about the state it left."""
    for line in (text, *getattr(error, "__notes__", ())):
        click.echo(line, err=True)


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
          "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}  # fmt: skip


def _size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Bytes from a number with a unit: 512MiB, 5GB, 1.5GiB. Anything else is wrong usage."""
    if value is None:
        return None
    text = value.strip().lower().removesuffix("b")
    number = text.rstrip("kmgti")
    try:
        size = float(number) * _UNITS[text[len(number) :]]
    except (KeyError, ValueError):
        raise click.BadParameter(f"{value!r} is not a size like 512MiB or 5GB") from None
    if not 1 <= size < 2**63:
        raise click.BadParameter(f"{value!r} is out of range")
    return int(size)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="streamq")
def cli() -> None:
    """Quantize checkpoints of any size without building the model.

    \b
    Exit codes: 0 done, 1 error, 2 wrong usage, 3 verification failed, 130 interrupted.
    """


def _scheme_options(command: Callable[..., None]) -> Callable[..., None]:
    """What decides the bytes of the output: the same options for plan and convert."""
    for option in reversed([
        click.option("--scheme", "-s", required=True, metavar="NAME",
                     help="Preset, any case: nvfp4, nvfp4a16, fp8_dynamic, fp8_block, mxfp4, "
                          "mxfp8, w4a16, w4a16_asym, w8a8, ..."),
        click.option("--format", "-f", "format_", metavar="NAME",
                     help="What loaders it is for; `streamq formats` lists them "
                          "(default: compressed-tensors)."),
        click.option("--group-size", type=int, metavar="N",
                     help="Columns that share a scale, for integer group schemes (default 128; "
                          "-1: whole rows)."),
        click.option("--scales", type=click.Choice(["absmax", "search"]), default="absmax",
                     show_default=True,
                     help="From the largest magnitude, or searched for the least error."),
        click.option("--requantize", is_flag=True,
                     help="Also convert weights that are quantized to another scheme already."),
        click.option("--ignore", multiple=True, metavar="PATTERN",
                     help="Leave these modules as they are; a glob, or re:REGEX. Repeatable."),
        click.option("--only", multiple=True, metavar="PATTERN",
                     help="Quantize only these modules; a glob, or re:REGEX. Repeatable."),
        click.option("--numerics", type=click.Choice(["f32", "weight"]), default="f32",
                     show_default=True,
                     help="Arithmetic in f32, or in the weight's dtype as llm-compressor does."),
        click.option("--input-scale", type=float, default=1.0, show_default=True, metavar="X",
                     help="The constant input_global_scale of NVFP4 (2688 / largest activation)."),
        click.option("--shard-size", callback=_size, metavar="SIZE",
                     help="Largest output shard (default: as many shards as the source)."),
        click.option("--workers", "-j", type=click.IntRange(1, 256), metavar="N",
                     help="Threads (default: the processors)."),
        click.option("--max-memory", callback=_size, default="512MiB", show_default=True,
                     metavar="SIZE", help="Buffers of all workers together."),
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
    ]):  # fmt: skip
        command = option(command)
    return command


def _options(o: dict[str, Any]) -> Any:
    """plan.Options from the command line."""
    from dataclasses import replace
    from math import isfinite

    from streamq.errors import PlanError
    from streamq.formats import named
    from streamq.plan import Options
    from streamq.schemes import resolve

    if not (isfinite(o["input_scale"]) and o["input_scale"] > 0):
        raise PlanError(f"--input-scale must be above zero, got {o['input_scale']}.")
    return Options(
        replace(resolve(o["scheme"], o["group_size"]), scales=o["scales"]),
        o["ignore"], o["only"], o["numerics"], o["shard_size"], o["input_scale"],
        named(o["format_"]) if o["format_"] else None, o["requantize"],
    )  # fmt: skip


@cli.command()
@click.argument("src", type=click.Path())
@click.argument("dst", type=click.Path(), required=False)
@_scheme_options
def plan(src: str, dst: str | None, **o: Any) -> None:
    """Show what a conversion of SRC would do, without writing anything.

    With DST, its disk is compared with what the output needs.
    """
    _plan(src, dst, o)


def _plan(src: str, dst: str | None, o: dict[str, Any]) -> None:
    from pathlib import Path

    from streamq import show
    from streamq.checkpoint import open_checkpoint
    from streamq.convert import default_workers
    from streamq.plan import make_plan
    from streamq.writer import free_bytes

    with open_checkpoint(src) as source:
        made = make_plan(source, _options(o))
        workers = made.workers_within(o["workers"] or default_workers(), o["max_memory"])
        free = free_bytes(Path(dst)) if dst else None
        if o["as_json"]:
            click.echo(json.dumps(show.plan_json(made, workers, free), indent=2))
        else:
            show.show_plan(made, workers, free)


@cli.command()
@click.argument("src", type=click.Path())
@click.argument("dst", type=click.Path())
@_scheme_options
@click.option("--dry-run", is_flag=True, help="Print the plan and stop, as `streamq plan` does.")
@click.option("--overwrite", is_flag=True, help="Replace DST, once the new one is complete.")
@click.option("--no-sync", is_flag=True, help="Do not wait for the disk before DST appears.")
@click.option("--stats", is_flag=True, help="Measure what the weights lose (SQNR) on the way.")
@click.option("--quiet", "-q", is_flag=True, help="Print errors only.")
def convert(src: str, dst: str, **o: Any) -> None:
    """Quantize the checkpoint SRC into the new directory DST.

    SRC is a directory with safetensors shards, or one safetensors file. DST appears when
    it is complete; until then the work is in DST.partial.
    """
    from pathlib import Path

    from streamq import show
    from streamq.checkpoint import open_checkpoint
    from streamq.convert import convert as run
    from streamq.convert import default_workers
    from streamq.plan import make_plan, refuse_overlap
    from streamq.progress import progress
    from streamq.tensors import size_text
    from streamq.writer import check_destination

    if o["dry_run"]:
        _plan(src, dst, o)
        return
    say: Callable[[str], None] = (lambda line: None) if o["quiet"] or o["as_json"] else click.echo
    refuse_overlap(src, dst)
    with open_checkpoint(src) as source:
        made = make_plan(source, _options(o))
        workers = made.workers_within(o["workers"] or default_workers(), o["max_memory"])
        free = check_destination(Path(dst), made.disk_needed, o["overwrite"])
        for line in show.plan_lines(made, workers, free):
            say(line)
        with progress(made.bytes_in, "converting", o["quiet"] or o["as_json"]) as advance:
            summary = run(
                source, made, dst, workers=workers, max_memory=o["max_memory"],
                sync=not o["no_sync"], overwrite=o["overwrite"], stats=o["stats"],
                progress=advance, notify=say,
            )  # fmt: skip
    if o["as_json"]:
        click.echo(json.dumps({
            "dst": dst, "scheme": made.options.scheme.name, "bytes_in": summary.bytes_in,
            "bytes_out": summary.bytes_out, "seconds": summary.seconds,
            "workers": summary.workers, "backend": summary.backend,
            **(show.quality_json(summary.quality) if summary.quality else {}),
        }))  # fmt: skip
    say(
        f"{dst}: {size_text(summary.bytes_out)}, "
        f"{summary.bytes_in / summary.bytes_out:.2f}x smaller, in {summary.seconds:.2f} s "
        f"({size_text(summary.bytes_in / summary.seconds)}/s of the source), "
        f"{summary.workers} workers, {summary.backend}"
    )
    if made.verbatim:
        say(f"the source is in {made.options.scheme.name} already: copied as it is")
    if summary.rounded:
        say(f"note: {summary.rounded} scales had to be rounded to the dtype that this format has")
    if summary.quality:
        for line in show.quality_lines(summary.quality):
            say(line)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def formats(as_json: bool) -> None:
    """List the formats, who loads them, and the schemes they hold."""
    from streamq import show

    if as_json:
        click.echo(json.dumps(show.formats_json(), indent=2))
    else:
        show.show_formats()


@cli.command()
@click.argument("src", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(src: str, as_json: bool) -> None:
    """Show what the checkpoint SRC is: tensors, dtypes, sizes, fused groups, oddities."""
    from streamq import show
    from streamq.checkpoint import open_checkpoint

    with open_checkpoint(src) as checkpoint:
        if as_json:
            click.echo(json.dumps(show.inspect_json(checkpoint), indent=2))
        else:
            show.show_inspect(checkpoint)


@cli.command()
@click.argument("dst", type=click.Path())
@click.option("--source", type=click.Path(), help="The checkpoint that DST was made from.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--quiet", "-q", is_flag=True, help="Print failures only.")
def verify(dst: str, source: str | None, as_json: bool, quiet: bool) -> None:
    """Check the quantized checkpoint DST; with --source, every element of it.

    Exit code 3 if anything fails.
    """
    from contextlib import nullcontext

    from streamq import show
    from streamq.checkpoint import open_checkpoint
    from streamq.convert import default_workers
    from streamq.progress import progress
    from streamq.verify import verify as run

    with open_checkpoint(source) if source else nullcontext() as original:
        total = original.nbytes if original else 0
        with progress(total, "verifying", quiet or as_json or not original) as advance:
            report = run(dst, original, workers=default_workers(), progress=advance)
    if as_json:
        click.echo(json.dumps({
            "ok": not report.failures, "scheme": report.scheme, "tensors": report.tensors,
            "quantized": report.quantized, "failures": report.failures,
            **show.quality_json(report.quality),
        }))  # fmt: skip
    elif not report.failures and not quiet:
        click.echo(
            f"{dst}: ok; {report.tensors} tensors, {report.quantized} weights in {report.scheme}"
        )
        if source:
            click.echo("every element within its bound")
            for line in show.quality_lines(report.quality):
                click.echo(line)
    if report.failures:
        for failure in report.failures:
            click.echo(f"failed: {failure}", err=True)
        n = len(report.failures)
        raise VerifyError(f"{dst}: {n} {'check' if n == 1 else 'checks'} failed.")


def main() -> NoReturn:
    """Entry point of the ``streamq`` command.

    The cyclic garbage collector stays off: headers and plans are many small objects without
    cycles, and walking them again and again takes 0.4 s of planning 70,000 tensors, as much
    as the rest. At the end nothing is torn down, as all files are closed by then.
    """
    gc.disable()
    code: object = 0
    try:
        cli(prog_name="streamq")
    except SystemExit as e:
        code = e.code or 0
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:  # closed by the caller
                stream.flush()
        except OSError:  # nowhere left to say so
            code = code or 1
    os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    main()
