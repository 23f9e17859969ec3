"""The commands that plan and convert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import click

from .allocate import allocated, is_allocated, refuse_beside_target, target_options
from .group import cli
from .options import (
    device_options,
    dry_run_option,
    dst_argument,
    engine_option,
    open_source,
    options_of,
    quiet_option,
    resumed_options,
    say_of,
    scheme_options,
    settings_of,
    source_options,
)
from .report import of_conversion, report_option
from .upload import places_of, upload_options


class Wanted(NamedTuple):
    """One output: scheme, format if one is named, directory if there is one."""

    scheme: str | None
    format: str | None
    dst: str | None


def _wanted(dst: str | None, o: dict[str, Any]) -> list[Wanted]:
    """The outputs of a command line: DST with --scheme, or every --to."""
    if not o["to"]:
        if is_allocated(o):
            refuse_beside_target(o)
        elif not o["scheme"] and not o["recipe"]:
            raise click.UsageError("Missing option '--scheme' / '-s', or '--recipe'.")
        return [Wanted(o["scheme"], None, dst)]
    if dst is not None or o["scheme"] or o["recipe"] or is_allocated(o):
        raise click.UsageError(
            "--to names schemes and directories; DST, --scheme, --recipe and targets go without."
        )
    found = []
    for text in o["to"]:
        what, _, folder = text.partition(":")
        fmt, _, scheme = what.rpartition("/")
        if not scheme or not folder:
            raise click.BadParameter(
                f"{text!r} is not [FORMAT/]SCHEME:DST, such as nvfp4:out or awq/w4a16_asym:out",
                param_hint="--to",
            )
        found.append(Wanted(scheme, fmt or None, folder))
    folders = [str(Path(w.dst or "").resolve()) for w in found]
    if len(set(folders)) < len(folders):
        raise click.BadParameter("two outputs in one directory", param_hint="--to")
    return found


def _outputs(source: Any, wanted: list[Wanted], places: list[Any], o: dict[str, Any]) -> list[Any]:
    """The plan and the place of each output."""
    from streamq.converting import Output
    from streamq.planning import make_plan

    found = []
    for w, place in zip(wanted, places, strict=True):
        said: list[str] = []
        if is_allocated(o):
            options, said = allocated(source, o)
        else:
            options = options_of(o, w.scheme, w.format)
        made = make_plan(source, options)
        made.notes += said
        found.append(Output(made, place))
    return found


_to = click.option(
    "--to", multiple=True, metavar="[FORMAT/]SCHEME:DST",
    help="Several outputs from one pass over SRC, instead of DST and --scheme. Repeatable.",
)  # fmt: skip


@cli.command()
@click.argument("src", type=click.Path())
@dst_argument
@scheme_options
@target_options
@device_options
@source_options
@upload_options
@_to
def plan(src: str, dst: str | None, **o: Any) -> None:
    """Show what a conversion of SRC would do, without writing anything.

    With DST, its disk is compared with what the output needs.
    """
    _plan(src, _wanted(dst, o), o)


def _plan(src: str, wanted: list[Wanted], o: dict[str, Any]) -> None:
    from streamq import show
    from streamq.converting import means_of
    from streamq.writer import free_bytes

    places = places_of(src, wanted, o)
    with open_source(src) as source:
        outputs = _outputs(source, wanted, places, o)
        means = means_of(outputs, settings_of(o))
        free = [
            free_bytes(x.folder) if w.dst else None for x, w in zip(outputs, wanted, strict=True)
        ]
    if o["as_json"]:
        plans = [
            show.plan_json(x.plan, means, f, x.disk_needed)
            for x, f in zip(outputs, free, strict=True)
        ]
        click.echo(json.dumps(plans if o["to"] else plans[0], indent=2))
        return
    for output, f in zip(outputs, free, strict=True):
        show.show_plan(output.plan, means, f, output.disk_needed)


@cli.command()
@click.argument("src", type=click.Path())
@dst_argument
@scheme_options
@target_options
@device_options
@engine_option
@source_options
@_to
@dry_run_option
@resumed_options
@upload_options
@click.option("--stats", is_flag=True, help="Measure what the weights lose (SQNR) on the way.")
@report_option
@quiet_option
def convert(src: str, dst: str | None, **o: Any) -> None:
    """Quantize the checkpoint SRC into the new directory DST.

    SRC is a directory with safetensors shards, one safetensors file, or hf://org/repo[@revision]
    with a folder behind it if need be; it may be quantized already.

    DST appears when it is complete; until then the work is in DST.partial, and the same
    command goes on there where it was interrupted. A DST hf://org/repo is a repository on the Hub:
    shards are uploaded as they are complete, and one commit shows them all (docs/hub.md).
    """
    from streamq import show
    from streamq.converting import check_outputs, convert_all, means_of
    from streamq.engines import opened
    from streamq.planning import refuse_overlap
    from streamq.progress import progress
    from streamq.writer import folder_of

    wanted = _wanted(dst, o)
    if dst is None and not o["to"] and not o["dry_run"]:
        raise click.UsageError("Missing argument 'DST'.")
    if o["page"] and (o["to"] or o["dry_run"]):
        raise click.UsageError(
            "--report is of one conversion; for an output that is there, use `streamq report`."
        )
    if o["dry_run"]:
        _plan(src, wanted, o)
        return
    say = say_of(o)
    if o["page"]:
        from streamq.report import check_target

        check_target(Path(o["page"]))
    places = places_of(src, wanted, o)
    for place in places:
        refuse_overlap(src, folder_of(place))
    with opened(o["engine"], src) as engine, open_source(src) as source:
        outputs = _outputs(source, wanted, places, o)
        means = (engine.means if engine else means_of)(outputs, settings_of(o))
        free = check_outputs(outputs, o["overwrite"])
        for output in outputs:
            for line in show.plan_lines(output.plan, means, free, output.disk_needed):
                say(line)
        total = sum(output.plan.bytes_in for output in outputs)
        with progress(total, "converting", o["quiet"] or o["as_json"]) as advance:
            summaries = convert_all(source, outputs, settings_of(o, advance, say), engine)
        if o["page"]:
            from streamq.report import write

            found = of_conversion(source, src, outputs[0], summaries[0])
            write(Path(o["page"]), found)
    done = list(zip(outputs, summaries, strict=True))
    if o["as_json"]:
        made = [show.summary_json(output, summary) for output, summary in done]
        click.echo(json.dumps(made if o["to"] else made[0]))
    for output, summary in done:
        for line in show.summary_lines(output, summary):
            say(line)
