"""The command for many repositories."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from .group import cli
from .options import (
    complete_format,
    complete_scheme,
    detail_options,
    device_options,
    dry_run_option,
    engine_option,
    json_option,
    machine_options,
    quiet_option,
    resumed_options,
    settings_of,
    size,
    source_options,
    together,
)
from .upload import branch_options, upload_of

#: What standard input is called, and where its state is.
STDIN, STDIN_STATE = "standard input", "streamq-batch.state"


def _several(
    ctx: click.Context, param: click.Parameter, values: Sequence[str]
) -> tuple[str, ...]:  # fmt: skip
    """a,b and --option a --option b are the same."""
    found = tuple(part.strip() for value in values for part in value.split(","))
    if not all(found):
        raise click.BadParameter("an empty name")
    return found


_what = together(
    click.option("--out", metavar="TEMPLATE",
                 help="Destinations, such as 'out/{org}/{name}-{scheme}'; also {format}, "
                      "{revision}."),
    click.option("--scheme", "-s", "schemes", multiple=True, callback=_several,
                 metavar="NAME,...", shell_complete=complete_scheme,
                 help="Presets: every source is converted to each. Repeatable."),
    click.option("--format", "-f", "formats", multiple=True, callback=_several,
                 metavar="NAME,...", shell_complete=complete_format,
                 help="Formats: every scheme is written in each. Repeatable."),
    click.option("--recipe", type=click.Path(), metavar="FILE",
                 help="Rules that give modules their schemes (docs/recipes.md)."),
    detail_options,
)  # fmt: skip
_how_many = together(
    click.option("--jobs", type=click.IntRange(1, 256), default=1, show_default=True, metavar="N",
                 help="Conversions at once; they share --workers, --max-memory and --max-disk."),
    click.option("--continue-on-error", is_flag=True,
                 help="Start what is left after a failure, too."),
    click.option("--retries", type=click.IntRange(0, 100), default=3, show_default=True,
                 metavar="N",
                 help="Further tries where an error may pass: network, a busy Hub, a file "
                      "server."),
    click.option("--max-disk", callback=size, metavar="SIZE",
                 help="What outputs being written may take together (default: what is free)."),
    click.option("--state", type=click.Path(), metavar="FILE",
                 help=f"What is done (default: JOBS.state; {STDIN_STATE} for standard input)."),
)  # fmt: skip


@cli.command()
@click.argument("jobs_file", metavar="JOBS", type=click.Path(allow_dash=True))
@_what
@_how_many
@machine_options
@device_options
@engine_option
@source_options
@branch_options
@dry_run_option
@resumed_options
@click.option("--stats", is_flag=True, help="Measure what the weights lose (SQNR) on the way.")
@json_option
@quiet_option
def batch(jobs_file: str, **o: Any) -> None:
    """Convert the many sources of JOBS.

    JOBS is a file in TOML or YAML (docs/batch.md), one in .txt with a source on each line, or -
    for such lines on standard input. What is a directory here is one, other names are
    repositories of the Hub. The same command goes on where it was interrupted and does what is
    left. Exit code 1 if a job failed or was not started.
    """
    from streamq import show
    from streamq.batch import Processes, State, lack_of, plan_all, read_jobs, run
    from streamq.batch.watching import watching
    from streamq.writer import place_of, refuse_unused

    ctx = click.get_current_context()
    given = {k for k in o if ctx.get_parameter_source(k) == ParameterSource.COMMANDLINE}
    lines = _stdin_lines() if jobs_file == "-" else None
    asked = read_jobs(STDIN if lines is not None else jobs_file, lines, _over(o, given))
    o |= {k: v for k, v in asked.run.items() if k not in given}
    how, jobs = _how(o), asked.jobs
    refuse_unused(how.settings.upload, [place_of(job.dst) for job in jobs])
    state = State(Path(o["state"] or _state_of(jobs_file)), dry=o["dry_run"])
    try:
        with watching(len(jobs), o["quiet"], o["as_json"]) as watch:
            if o["dry_run"]:
                plans = plan_all(jobs, how, state, watch)
            else:
                outcomes = run(jobs, how, Processes(), state, watch)
    except KeyboardInterrupt as e:
        e.add_note("What is done is noted; the same command goes on from there.")
        raise
    finally:
        state.close()
    if o["dry_run"]:
        found = [_planned(job, plan) for job, plan in zip(jobs, plans, strict=True)]
        if o["as_json"]:
            for said in found:
                click.echo(json.dumps(said))
        else:
            show.show_plans(found)
    else:
        found = [outcome.to_json() for outcome in outcomes]
        if not o["as_json"] and not o["quiet"]:
            show.show_outcomes(found)
    if o["dry_run"] and (lack := lack_of(plans)):
        click.echo(f"Error: {lack}", err=True)
        sys.exit(1)
    bad = sum(said["state"] in ("failed", "not started") for said in found)
    if bad:
        click.echo(f"Error: {bad} of {len(found)} jobs failed or did not start.", err=True)
        sys.exit(1)


def _stdin_lines() -> list[str]:
    from streamq.batch import MAX_FILE

    raw = sys.stdin.buffer.read(MAX_FILE + 1)
    if len(raw) > MAX_FILE:
        raise click.UsageError(f"{STDIN} has more than {MAX_FILE} bytes.")
    try:
        return raw.decode().splitlines()
    except UnicodeDecodeError:
        raise click.UsageError(f"{STDIN} is not UTF-8.") from None


def _over(o: dict[str, Any], given: set[str]) -> dict[str, Any]:
    """Keys of a file of jobs that the command line names."""
    from streamq.batch import JOB_KEYS

    return {k: o[k] for k in JOB_KEYS if k in given}


def _how(o: dict[str, Any]) -> Any:
    from streamq.batch import How

    said = click.get_current_context().meta
    spool = {k: said[f"streamq.{k}"] for k in ("spool", "spool_dir")}
    upload = upload_of({**o, "base_model": None, "max_disk": None})
    settings = replace(settings_of(o), upload=upload, **spool)
    return How(
        o["jobs"], o["retries"], o["continue_on_error"], o["max_disk"], settings, o["engine"]
    )


def _state_of(jobs_file: str) -> str:
    return STDIN_STATE if jobs_file == "-" else jobs_file + ".state"


def _planned(job: Any, found: Any) -> dict[str, Any]:
    """What a dry run says of a job."""
    from streamq.batch import Kept, Planned

    about = {"src": job.src, "dst": job.dst}
    if isinstance(found, Planned):
        return about | found.to_json() | {"state": "planned"}
    if isinstance(found, Kept):
        return {**found.result, **about, "state": "kept"}
    return about | {"scheme": job.label, "state": "failed", "error": str(found)}
