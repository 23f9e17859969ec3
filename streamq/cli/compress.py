"""The commands that compress and decompress, and what inspect and verify say of the result."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from streamq.errors import VerifyError

from .group import cli
from .options import (
    dry_run_option,
    dst_argument,
    json_option,
    machine_options,
    open_source,
    output_options,
    quiet_option,
    say_of,
    source_options,
    together,
)

if TYPE_CHECKING:
    from streamq.compressing import Layer, Plan, Summary

#: So many layers get a line each; of more, those that layers have in common share one.
LINES = 400


#: How the work is done; no byte depends on it.
_running = together(machine_options, output_options, json_option, quiet_option)


@cli.command()
@click.argument("src", type=click.Path())
@dst_argument
@click.option("--codec", type=click.Choice(["zstd", "ascend"]), default="zstd", show_default=True,
              help="zstd: anything, to be stored or moved. ascend: W8A8S to W8A8SC and W16A16S "
                   "to W16A16SC, which the engine of the 310P reads.")  # fmt: skip
@click.option(
    "--sparsity",
    metavar="magnitude:R",
    help="Before that, keep the fraction R of each row with the largest magnitudes.",
)
@click.option("--dictionary", type=click.Choice(["call", "tile"]), default="call",
              show_default=True, help="Whose bytes are counted for --codec ascend: of a whole "
                                      "weight, as CANN does, or of each tile.")  # fmt: skip
@click.option(
    "--disable-layers",
    multiple=True,
    metavar="PATTERN",
    help="Store these layers as they are; a glob, or re:REGEX. Repeatable.",
)
@click.option("--transpose", is_flag=True, help="Transpose each matrix first.")
@click.option(
    "--tp",
    type=click.IntRange(1, 1024),
    metavar="N",
    help="Fuse and cut the weights for N tensor-parallel ranks first (llama, qwen).",
)
@dry_run_option
@source_options
@_running
def compress(src: str, dst: str | None, **o: Any) -> None:
    """Compress the weights of the checkpoint SRC into the new directory DST.

    `streamq decompress` gives back what went in. DST appears when it is complete; until then
    the work is in DST.partial.
    """
    from streamq.compressing import (
        Options,
        disk_needed,
        make_plan,
        sparsity,
        workers_within,
    )  # fmt: skip
    from streamq.compressing import compress as run
    from streamq.converting import default_workers
    from streamq.planning import refuse_overlap
    from streamq.progress import progress
    from streamq.writer import check_destination, free_bytes

    if dst is None and not o["dry_run"]:
        raise click.UsageError("Missing argument 'DST'.")
    say = say_of(o)
    keep = sparsity(o["sparsity"]) if o["sparsity"] else None
    options = Options(o["codec"], o["dictionary"], o["disable_layers"], o["transpose"], keep,
                      o["tp"])  # fmt: skip
    if dst is not None:
        refuse_overlap(src, dst)
    with open_source(src) as source:
        plan = make_plan(source, options)
        workers = workers_within(plan, o["workers"] or default_workers(), o["max_memory"])
        need = disk_needed(plan)
        if o["dry_run"]:
            free = free_bytes(Path(dst)) if dst else None
        else:
            free = check_destination(Path(dst or ""), need, o["overwrite"])
        for line in _plan_lines(plan, workers, need, free):
            say(line)
        if o["dry_run"]:
            if o["as_json"]:
                click.echo(json.dumps(_plan_json(plan, workers, need, free), indent=2))
            return
        with progress(plan.bytes_in, "compressing", o["quiet"] or o["as_json"]) as advance:
            done = run(
                source, plan, dst or "", workers=workers, max_memory=o["max_memory"],
                sync=not o["no_sync"], overwrite=o["overwrite"], progress=advance,
            )  # fmt: skip
    if o["as_json"]:
        said = _plan_json(plan, workers, need, free) | _summary_json(done)
        click.echo(json.dumps({"dst": dst, **said}))
    for line in _summary_lines(dst or "", plan, done):
        say(line)


@cli.command()
@click.argument("src", type=click.Path())
@click.argument("dst", type=click.Path())
@_running
def decompress(src: str, dst: str, **o: Any) -> None:
    """Write the checkpoint that was compressed to SRC into the new directory DST.

    The same files with the same bytes; of a checkpoint that was pruned or cut for ranks, what
    was compressed. Every check sum is compared.
    """
    from streamq.compressing import Opened
    from streamq.compressing import decompress as run
    from streamq.converting import default_workers
    from streamq.planning import refuse_overlap
    from streamq.progress import progress
    from streamq.tensors import size_text

    refuse_overlap(src, dst)
    opened = Opened(src)
    with progress(opened.bytes_in, "decompressing", o["quiet"] or o["as_json"]) as advance:
        done = run(
            opened, dst, workers=o["workers"] or default_workers(), max_memory=o["max_memory"],
            sync=not o["no_sync"], overwrite=o["overwrite"], progress=advance,
        )  # fmt: skip
    if o["as_json"]:
        click.echo(json.dumps({
            "dst": dst, "tensors": done.tensors, "bytes_out": done.bytes_out,
            "seconds": done.seconds, "workers": done.workers,
        }))  # fmt: skip
    elif not o["quiet"]:
        click.echo(
            f"{dst}: {done.tensors} tensors, {size_text(done.bytes_out)} in {done.seconds:.2f} s "
            f"({size_text(done.bytes_out / done.seconds)}/s), every check sum equal"
        )


def _plan_lines(plan: Plan, workers: int, need: int, free: int | None) -> Iterator[str]:
    """The plan in a few lines, before the work."""
    from streamq.compressing import reasons
    from streamq.tensors import size_text

    items = [item for shard in plan.shards for item in shard.items if item.coding != "raw"]
    pruned = sum(item.keep is not None for item in items)
    yield (
        f"{plan.kind}: {len(items)} tensors, {size_text(sum(item.nbytes for item in items))}, are "
        f"compressed, of {size_text(plan.bytes_in)} in {len(plan.shards)} file"
        f"{'s' * (len(plan.shards) != 1)}"
    )
    if plan.options.keep is not None:
        yield f"{pruned} of them keep {plan.options.keep:g} of each row, by magnitude"
    for why, count, nbytes in reasons(plan):
        yield f"stored as is: {count}, {size_text(nbytes)} ({why})"
    disk = "" if free is None else f" of {size_text(free)} free"
    yield f"{workers} workers, disk {size_text(need)}{disk} if nothing shrinks"
    for warning in plan.warnings:
        yield f"warning: {warning}"
    for note in plan.notes:
        yield f"note: {note}"


def _plan_json(plan: Plan, workers: int, need: int, free: int | None) -> dict[str, Any]:
    """A plan for programs; sizes in bytes."""
    return {
        "codec": plan.options.codec, "kind": plan.kind, "bytes_in": plan.bytes_in,
        "workers": workers, "disk_needed": need, "disk_free": free,
        "tensors": [
            {"name": item.name, "dtype": item.dtype, "shape": list(item.shape),
             "file": shard.name, "bytes": item.nbytes, "coding": item.coding,
             "reason": item.why or None, "kept": item.keep}
            for shard in plan.shards for item in shard.items
        ],
        "warnings": plan.warnings, "notes": plan.notes,
    }  # fmt: skip


def _summary_json(done: Summary) -> dict[str, Any]:
    return {
        "bytes_out": done.bytes_out, "seconds": done.seconds,
        "layers": [
            {"name": layer.name, "file": layer.file, "bytes": layer.nbytes,
             "compressed": layer.stored, "ratio": layer.stored / layer.nbytes}
            for layer in done.layers
        ],
    }  # fmt: skip


def _summary_lines(dst: str, plan: Plan, done: Summary) -> Iterator[str]:
    """What became of each layer, and of all."""
    from streamq.tensors import size_text

    for name, nbytes, stored in _rows(done.layers, plan.options.tp):
        yield f"{size_text(nbytes):>9} -> {size_text(stored):>9} {_ratio(nbytes, stored)}  {name}"
    more = [layer for layer in done.layers if layer.stored >= layer.nbytes]
    if more:
        yield f"nothing was saved on {len(more)} of {len(done.layers)} layers"
    over = [layer.name for layer in done.layers if layer.stream > layer.nbytes]
    if over and plan.options.codec == "ascend":
        yield (
            f"warning: {len(over)} streams are longer than their matrix, as it is padded to whole "
            "tiles, and vllm-ascend has no room for them; leave them as they are with "
            f"--disable-layers, the first is {over[0]}"
        )
    yield (
        f"{dst}: {size_text(plan.bytes_in)} -> {size_text(done.bytes_out)} "
        f"({done.bytes_out / max(1, plan.bytes_in):.3f}) in {done.seconds:.2f} s "
        f"({size_text(plan.bytes_in / done.seconds)}/s), {done.workers} workers"
    )


def _rows(layers: list[Layer], tp: int | None) -> Iterator[tuple[str, int, int]]:
    """Name, bytes and compressed bytes of each layer, or of what many have in common."""
    from streamq.families import collapse

    found: dict[tuple[str, bool], list[int]] = {}
    for layer in layers:
        name = layer.name if len(layers) <= LINES else collapse(layer.name)
        if tp is not None and len(layers) <= LINES:
            name = f"{name}, {layer.file.rpartition('-part')[0].removeprefix('model-')}"
        # What saved nothing has a line of its own.
        row = found.setdefault((name, layer.stored >= layer.nbytes), [0, 0, 0])
        row[0] += 1
        row[1] += layer.nbytes
        row[2] += layer.stored
    for (name, _), (count, nbytes, stored) in found.items():
        yield (name if count == 1 else f"{name} x {count}"), nbytes, stored


def _ratio(nbytes: int, stored: int) -> str:
    if stored < nbytes:
        return f"{stored / nbytes:.3f}" + " " * len(" stored as is")
    return f"{stored / nbytes:.3f} stored as is"


def inspect_compressed(src: str, as_json: bool) -> None:
    """What ``inspect`` prints of a compressed directory."""
    from streamq.compressing import Opened, OpenFile
    from streamq.tensors import size_text

    opened = Opened(src)
    rows = []
    for name in opened.files:
        with closing(OpenFile(opened, name)) as file:
            rows += [(name, item, file.size(item)) for item in file.items]
    nbytes, stored = sum(item.nbytes for _, item, _ in rows), sum(size for *_, size in rows)
    if as_json:
        click.echo(json.dumps({
            "path": src, "compressed": opened.how, "bytes": stored, "bytes_original": nbytes,
            "tensors": [
                {"name": item.name, "dtype": item.dtype, "shape": list(item.shape), "file": name,
                 "coding": item.coding, "bytes": item.nbytes, "compressed": size}
                for name, item, size in rows
            ],
        }, indent=2))  # fmt: skip
        return
    how = ", ".join(f"{key} {value}" for key, value in opened.how.items() if value)
    coded = sum(item.coding != "raw" for _, item, _ in rows)
    click.echo(
        f"{src}: compressed ({how}); {len(rows)} tensors in {len(opened.files)} "
        f"file{'s' * (len(opened.files) != 1)}, {coded} of them compressed, {size_text(nbytes)} "
        f"-> {size_text(stored)} ({stored / max(1, nbytes):.3f}); `streamq decompress` gives back "
        "the original"
    )
    for name, item, stored in rows:
        if item.coding != "raw":
            click.echo(
                f"{size_text(item.nbytes):>9} -> {size_text(stored):>9} "
                f"{_ratio(item.nbytes, stored)}  {item.name}, {item.dtype}, {name}"
            )


def verify_compressed(dst: str, as_json: bool, quiet: bool) -> None:
    """What ``verify`` does with a compressed directory. Raises VerifyError if anything fails."""
    from streamq.compressing import Opened, verify
    from streamq.converting import default_workers
    from streamq.errors import CheckpointError
    from streamq.planning import MAX_MEMORY
    from streamq.progress import progress

    try:
        total = Opened(dst).bytes_in
    except CheckpointError:  # which the report is about
        total = 0
    with progress(total, "verifying", quiet or as_json) as advance:
        report = verify(dst, workers=default_workers(), max_memory=MAX_MEMORY, progress=advance)
    if as_json:
        click.echo(json.dumps({
            "ok": not report.failures, "scheme": report.scheme, "tensors": report.tensors,
            "quantized": 0, "compressed": report.quantized, "failures": report.failures,
        }))  # fmt: skip
    elif not report.failures and not quiet:
        click.echo(
            f"{dst}: ok; {report.tensors} tensors, {report.quantized} of them compressed "
            f"({report.scheme}); each decoded and equal to its check sum"
        )
    if report.failures:
        for failure in report.failures:
            click.echo(f"failed: {failure}", err=True)
        n = len(report.failures)
        raise VerifyError(f"{dst}: {n} {'check' if n == 1 else 'checks'} failed.")
