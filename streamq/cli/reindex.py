"""The command that re-shards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .group import cli
from .options import (
    dry_run_option,
    dst_argument,
    json_option,
    machine_options,
    open_source,
    quiet_option,
    resumed_options,
    say_of,
    size,
    source_options,
)

if TYPE_CHECKING:
    from streamq.reindexing import Plan


def _renames(
    ctx: click.Context, param: click.Parameter, value: tuple[str, ...]
) -> tuple[tuple[str, str], ...]:
    """FROM and TO of each; the last = is between them, as a regex may have some."""
    for text in value:
        if not text.rpartition("=")[0]:
            raise click.BadParameter(f"{text!r} is not FROM=TO, such as ^model.=language_model.")
    return tuple((text.rpartition("=")[0], text.rpartition("=")[2]) for text in value)


@cli.command()
@click.argument("src", type=click.Path())
@dst_argument
@click.option(
    "--fuse", is_flag=True, help="Concatenate q, k and v to qkv_proj, gate and up to gate_up_proj."
)
@click.option(
    "--split",
    is_flag=True,
    help="Take qkv_proj, gate_up_proj, in_proj_qkvz, in_proj_ba and experts apart.",
)
@click.option(
    "--rename",
    multiple=True,
    metavar="FROM=TO",
    callback=_renames,
    help="Replace a regex in the names of tensors; last of all. Repeatable.",
)
@click.option(
    "--shard-size",
    callback=size,
    metavar="SIZE",
    help="Largest output shard (default: as many shards as the source).",
)
@machine_options
@dry_run_option
@source_options
@resumed_options
@json_option
@quiet_option
def reindex(src: str, dst: str | None, **o: Any) -> None:
    """Re-shard the checkpoint SRC into the new directory DST, without quantizing.

    Weights that loaders concatenate come into one shard; everything else stays in its own. SRC
    may be quantized. DST appears when it is complete; until then the work is in DST.partial, and
    the same command goes on there where it was interrupted.
    """
    from streamq.converting import default_workers
    from streamq.planning import refuse_overlap
    from streamq.progress import progress
    from streamq.reindexing import Options, make_plan
    from streamq.reindexing import reindex as run
    from streamq.writer import check_destination, free_bytes

    if dst is None and not o["dry_run"]:
        raise click.UsageError("Missing argument 'DST'.")
    say = say_of(o)
    if dst is not None:
        refuse_overlap(src, dst)
    with open_source(src) as source:
        plan = make_plan(source, Options(o["fuse"], o["split"], o["shard_size"], o["rename"]))
        if o["dry_run"]:
            free = free_bytes(Path(dst)) if dst else None
        else:
            free = check_destination(Path(dst or ""), plan.disk_needed, o["overwrite"])
        workers = o["workers"] or default_workers()
        for line in _plan_lines(plan, workers, free):
            say(line)
        if o["dry_run"]:
            if o["as_json"]:
                click.echo(json.dumps(_plan_json(plan, workers, free), indent=2))
            return
        with progress(plan.bytes_out, "reindexing", o["quiet"] or o["as_json"]) as advance:
            done = run(
                source, plan, dst or "", workers=workers, max_memory=o["max_memory"],
                sync=not o["no_sync"], overwrite=o["overwrite"], restart=o["restart"],
                sha256=o["sha256"], progress=advance, notify=say,
                limit_rate=o["limit_rate"],
            )  # fmt: skip
    if o["as_json"]:
        said = _plan_json(plan, workers, free)
        click.echo(json.dumps({"dst": dst, **said, "seconds": done.seconds}))
    from streamq.tensors import size_text

    say(
        f"{dst}: {size_text(done.bytes_out)} in {done.seconds:.2f} s "
        f"({size_text(done.bytes_out / done.seconds)}/s), {done.workers} workers"
    )


def _plan_lines(plan: Plan, workers: int, free: int | None) -> Iterator[str]:
    """The plan in a few lines, before the work."""
    from streamq.tensors import size_text

    files = [f"{n} file{'s' * (n != 1)}" for n in (plan.input_files, len(plan.shards))]
    yield (
        f"{plan.tensors_in} tensors, {size_text(plan.bytes_in)} in {files[0]} -> "
        f"{plan.tensors_out} tensors, {size_text(plan.bytes_out)} in {files[1]}"
    )
    yield (
        f"{plan.groups} fused groups, {plan.apart} across shards; {plan.moved} tensors move to "
        "another shard"
    )
    if plan.made:
        yield "made: " + ", ".join(f"{n} {name}" for name, n in plan.made.items())
    if plan.renamed:
        yield f"{plan.renamed} tensors renamed"
    disk = "" if free is None else f", disk {size_text(plan.disk_needed)} of {size_text(free)} free"
    yield f"{workers} workers{disk}"
    for warning in plan.warnings:
        yield f"warning: {warning}"
    for note in plan.notes:
        yield f"note: {note}"


def _plan_json(plan: Plan, workers: int, free: int | None) -> dict[str, Any]:
    """A plan for programs; sizes in bytes."""
    return {
        "tensors_in": plan.tensors_in, "tensors_out": plan.tensors_out,
        "bytes_in": plan.bytes_in, "bytes_out": plan.bytes_out,
        "groups": plan.groups, "groups_across_shards": plan.apart, "moved": plan.moved,
        "made": plan.made, "renamed": plan.renamed, "workers": workers,
        "disk_needed": plan.disk_needed, "disk_free": free,
        "shards": [{"name": s.name, "bytes": s.size, "tensors": s.names} for s in plan.shards],
        "warnings": plan.warnings, "notes": plan.notes,
    }  # fmt: skip
