"""The quality report: its own command, and the option of those that convert and verify."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from streamq.errors import StreamqError

from .group import cli
from .options import json_option, quiet_option

if TYPE_CHECKING:
    from streamq.checkpoint import Checkpoint
    from streamq.converting import Output, Summary
    from streamq.recipe import Recipe

report_option = click.option(
    "--report", "page", type=click.Path(), metavar="FILE",
    help="Write a quality report there: one HTML page, or JSON if FILE ends in .json "
         "(docs/report.md).",
)  # fmt: skip


@cli.command()
@click.argument("dst", type=click.Path())
@click.option("--source", type=click.Path(), required=True,
              help="The checkpoint that DST was made from.")  # fmt: skip
@click.option("--recipe", type=click.Path(), help="That of DST, if it declares groups or experts.")
@click.option("--output", "-o", type=click.Path(), metavar="FILE",
              help="Where to write the page (default: the name of DST and .html, here; with "
                   "--json none).")  # fmt: skip
@json_option
@quiet_option
def report(
    dst: str, source: str, recipe: str | None, output: str | None, as_json: bool, quiet: bool
) -> None:
    """Show what the weights of DST lost against those of SOURCE, tensor by tensor.

    Both are read once, some MB at a time; nothing is written but one page, which needs no network.
    """
    from streamq.checkpoint import open_checkpoint
    from streamq.recipe import load
    from streamq.report import as_json as text_of
    from streamq.report import check_target, write

    target = Path(output or f"{Path(dst).resolve().name}.html")
    if output or not as_json:
        check_target(target)
    with open_checkpoint(dst) as out, open_checkpoint(source) as original:
        rows = load(recipe) if recipe else None
        found = measured(out, original, source, dst, quiet or as_json, recipe=rows)
    if output or not as_json:
        write(target, found)
    if as_json:
        click.echo(text_of(found), nl=False)
    elif not quiet:
        click.echo(f"{target}: {_sentence(found)}")


def measured(
    out: Checkpoint, original: Checkpoint, source: str, dst: str, quiet: bool,
    verification: Mapping[str, Any] | None = None, recipe: Recipe | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The report of two checkpoints, from every weight of both."""
    from streamq.converting import default_workers
    from streamq.progress import progress
    from streamq.report import Told, document, measure, pairs_of

    pairs = pairs_of(out, original, recipe)
    with progress(sum(p.bytes_in for p in pairs), "measuring", quiet) as advance:
        quality = measure(out, original, pairs, default_workers(), advance)
    told = Told(source, dst, _command(), _options(), verification=verification)
    return document(out, original, pairs, quality, told)


def of_conversion(original: Checkpoint, src: str, output: Output, summary: Summary) -> Any:
    """The report of a conversion, from what was measured on the way."""
    from streamq.checkpoint import open_checkpoint
    from streamq.quality import Quality
    from streamq.report import Told, document, pairs_of

    plan = output.plan
    run = {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(summary.seconds, 3), "workers": summary.workers,
        "bytes_per_second": round(summary.bytes_in / summary.seconds), "backend": summary.backend,
    }  # fmt: skip
    told = Told(
        src, str(output.dst), _command(), _options(), run, None,
        {t.name: why for t, why in plan.unquantized}, plan.warnings, plan.notes,
    )  # fmt: skip
    with open_checkpoint(output.dst) as out:
        pairs = pairs_of(out, original, plan.options.recipe)
        return document(out, original, pairs, summary.quality or Quality(detailed=True), told)


def check_page(page: str, source: str | None) -> None:
    """Wrong usage, or PlanError, for a report of a verification that could not be made."""
    from streamq.report import check_target

    if source is None:
        raise click.UsageError("--report needs --source, whose weights it measures.")
    check_target(Path(page))


def verified(
    page: str, source: str, dst: str, failures: list[str], quiet: bool, recipe: Recipe | None
) -> None:
    """Write the report of an output with what its verification found.

    One that failed may be too damaged to be measured, which is said then and is no other error.
    """
    from streamq.checkpoint import open_checkpoint
    from streamq.report import write

    found = {"ok": not failures, "failures": failures}
    try:
        with open_checkpoint(dst) as out, open_checkpoint(source) as original:
            write(Path(page), measured(out, original, source, dst, quiet, found, recipe))
    except StreamqError as e:
        if not failures:
            raise
        click.echo(f"{page}: no report, as {e}", err=True)


def _sentence(found: Mapping[str, Any]) -> str:
    total, quantized = found["total"], found["output"]["quantized"]
    if total["exact"]:
        return f"{quantized} quantized weights, none changed"
    if total["sqnr_db"] is None:
        return f"{quantized} quantized weights"
    return f"{quantized} quantized weights, SQNR {total['sqnr_db']:.2f} dB"


def _command() -> str:
    """The command line, as it can be typed again."""
    return shlex.join(["streamq", *sys.argv[1:]])


def _options() -> dict[str, Any]:
    """What the command line gave, by the names of options."""
    context = click.get_current_context()
    return {
        name.rstrip("_"): list(value) if isinstance(value, tuple) else value
        for name, value in context.params.items()
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        and name not in ("src", "dst", "source", "page", "output", "quiet", "as_json")
    }
