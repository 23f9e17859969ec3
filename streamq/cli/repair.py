"""The command that mends a checkpoint."""

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
    source_options,
)

if TYPE_CHECKING:
    from streamq.repairing import Repair

#: Fused groups that are told of one by one.
_SHOWN = 5


@cli.command()
@click.argument("src", type=click.Path())
@dst_argument
@click.option("--recipe", type=click.Path(), help="That of SRC, if it declares groups or experts.")
@machine_options
@dry_run_option
@source_options
@resumed_options
@json_option
@quiet_option
def repair(src: str, dst: str | None, **o: Any) -> None:
    """Mend the checkpoint SRC into the new directory DST; SRC stays as it is.

    Fused NVFP4 weights get one global scale: their codes stay, their block scales are rounded
    anew. The index, total_size and "format": "pt" are set right. Where there is nothing to
    repair, nothing is written.
    """
    from streamq.converting import default_workers
    from streamq.planning import refuse_overlap
    from streamq.progress import progress
    from streamq.recipe import load
    from streamq.reindexing import reindex
    from streamq.repairing import make_plan, open_broken
    from streamq.writer import check_destination

    if dst is None and not o["dry_run"]:
        raise click.UsageError("Missing argument 'DST'.")
    say = say_of(o)
    if dst is not None:
        refuse_overlap(src, dst)
    source, wrong = open_broken(src, open_source)
    with source:
        found = make_plan(source, wrong, load(o["recipe"]) if o["recipe"] else None)
        for line in _lines(found, src):
            say(line)
        written = found.needed and not o["dry_run"]
        if written:
            check_destination(Path(dst or ""), found.plan.disk_needed, o["overwrite"])
            with progress(found.plan.bytes_out, "repairing", o["quiet"] or o["as_json"]) as advance:
                reindex(
                    source, found.plan, dst or "", workers=o["workers"] or default_workers(),
                    max_memory=o["max_memory"], sync=not o["no_sync"], overwrite=o["overwrite"],
                    restart=o["restart"], sha256=o["sha256"], progress=advance, notify=say,
                    limit_rate=o["limit_rate"],
                )  # fmt: skip
    if o["as_json"]:
        click.echo(json.dumps({
            "dst": dst if written else None, "repairs": found.repairs,
            "groups": [s.as_json() for s in found.shared], "left": found.left,
            "bytes_out": found.plan.bytes_out if found.needed else 0,
        }, indent=2))  # fmt: skip
    if written:
        from streamq.tensors import size_text

        say(f"{dst}: {size_text(found.plan.bytes_out)}; `streamq verify {dst}` proves it")


def _lines(found: Repair, src: str) -> Iterator[str]:
    """The plan in a few lines, before the work."""
    for line in found.left:
        yield f"warning: {line}"
    if not found.needed:
        yield f"{src}: nothing to repair"
        return
    for line in found.repairs:
        yield f"repairs {line}"
    if found.shared:
        yield f"repairs {len(found.shared)} fused groups with scales that differ"
    worst = sorted(found.shared, key=lambda s: -(s.change or 0.0))
    for shared in worst[:_SHOWN]:
        yield f"  {shared.text}"
    if len(worst) > _SHOWN:
        yield f"  and {len(worst) - _SHOWN} more, whose values change less; --json has them all"
