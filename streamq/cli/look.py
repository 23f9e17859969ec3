"""Commands that read only: formats, inspect, verify."""

from __future__ import annotations

import json

import click

from streamq.errors import VerifyError

from .compress import inspect_compressed, verify_compressed
from .group import cli
from .options import json_option, ranks
from .report import check_page, report_option, verified


@cli.command()
@json_option
def formats(as_json: bool) -> None:
    """List the formats, who loads them, and the schemes they hold."""
    from streamq import show

    if as_json:
        click.echo(json.dumps(show.formats_json(), indent=2))
    else:
        show.show_formats()


@cli.command()
@click.argument("src", type=click.Path())
@json_option
def inspect(src: str, as_json: bool) -> None:
    """Show what the checkpoint SRC is: tensors, dtypes, sizes, fused groups, oddities."""
    from streamq import show
    from streamq.checkpoint import is_compressed, open_checkpoint

    if is_compressed(src):
        inspect_compressed(src, as_json)
        return
    with open_checkpoint(src) as checkpoint:
        if as_json:
            click.echo(json.dumps(show.inspect_json(checkpoint), indent=2))
        else:
            show.show_inspect(checkpoint)


@cli.command()
@click.argument("dst", type=click.Path())
@click.option("--source", type=click.Path(), help="The checkpoint that DST was made from.")
@click.option("--recipe", type=click.Path(), help="That of DST, if it declares groups or experts.")
@click.option(
    "--check-tp",
    callback=ranks,
    metavar="N,N,...",
    help="Warn of blocks and groups that so many tensor-parallel ranks would cut.",
)
@report_option
@json_option
@click.option("--quiet", "-q", is_flag=True, help="Print failures only.")
def verify(
    dst: str, source: str | None, recipe: str | None, check_tp: tuple[int, ...], page: str | None,
    as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Check the quantized checkpoint DST; with --source, every byte of it.

    Its files are compared with the checksums in its streamq.json. With --source it is converted
    again, to the same bytes; of an output that streamq did not make, or another version, every
    element has to be within half a step of its code.

    What loaders would make of it is part of it (docs/loaders.md): faults fail, and exit code 3
    says so; what only some loader cannot do is a warning.
    """
    from contextlib import nullcontext

    from streamq import show
    from streamq.checkpoint import is_compressed, open_checkpoint
    from streamq.converting import default_workers
    from streamq.progress import progress
    from streamq.recipe import load
    from streamq.verifying import verify as run

    if is_compressed(dst):
        if source:
            raise click.UsageError(f"--source is for checkpoints, and {dst} is compressed.")
        verify_compressed(dst, as_json, quiet)
        return
    if page:
        check_page(page, source)
    rows = load(recipe) if recipe else None

    with open_checkpoint(source) if source else nullcontext() as original:
        total = original.nbytes if original else 0
        with progress(total, "verifying", quiet or as_json or not original) as advance:
            report = run(
                dst, original, recipe=rows, check_tp=check_tp, workers=default_workers(),
                progress=advance,
            )  # fmt: skip
    if as_json:
        click.echo(json.dumps({
            "ok": not report.failures, "scheme": report.scheme, "tensors": report.tensors,
            "quantized": report.quantized, "failures": report.failures,
            "files": report.files, "exact": report.exact,
            "warnings": report.warnings, "loaders": [f._asdict() for f in report.findings],
            **show.quality_json(report.quality),
        }))  # fmt: skip
    elif not report.failures and not quiet:
        click.echo(
            f"{dst}: ok; {report.tensors} tensors, {report.quantized} weights in {report.scheme}"
        )
        if report.files is None:
            click.echo("no streamq.json, so no checksums")
        else:
            click.echo(f"the checksums of {report.files} files hold")
        if report.exact:
            click.echo("every byte is what the source converts to")
        elif source:
            why = f" (not every byte was compared: {report.inexact})" if report.inexact else ""
            click.echo(f"every element within its bound{why}")
        if source:
            for line in show.quality_lines(report.quality):
                click.echo(line)
    if not as_json and not quiet:
        for warning in report.warnings:
            click.echo(f"warning: {warning}")
    if page and source:
        verified(page, source, dst, report.failures, quiet or as_json, rows)
    if report.failures:
        for failure in report.failures:
            click.echo(f"failed: {failure}", err=True)
        n = len(report.failures)
        raise VerifyError(f"{dst}: {n} {'check' if n == 1 else 'checks'} failed.")
