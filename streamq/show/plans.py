"""What a conversion would do, and did."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from streamq.checkpoint import Traffic
from streamq.converting import Means, Output, Summary
from streamq.families import collapse
from streamq.planning import Plan, format_name, scheme_text
from streamq.tensors import size_text

from . import text
from .losses import quality_json, quality_lines


def plan_json(
    plan: Plan, means: Means, free: int | None, need: int | None = None
) -> dict[str, Any]:  # fmt: skip
    """A plan for programs: every tensor with what it becomes, sizes in bytes.

    ``need``: see ``plan_lines``.
    """
    quantized = [
        {
            "name": t.name, "dtype": t.dtype, "shape": list(t.shape),
            "scheme": weights.scheme.name if plan.options.recipe else plan.scheme_names,
            "file": shard.name, "bytes_in": layout.bytes_in, "bytes_out": layout.bytes_out,
        }
        for shard in plan.shards for weights in shard.weights for t, layout in weights.pairs()
    ]  # fmt: skip
    kept = [
        {"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "bytes_in": t.nbytes,
         "scheme": None, "reason": why, "bytes_out": t.nbytes}
        for t, why in plan.unquantized
    ]  # fmt: skip
    return {
        "scheme": plan.scheme_names,
        "format": format_name(plan),
        "numerics": plan.options.numerics,
        "bytes_in": plan.bytes_in,
        "bytes_out": plan.bytes_out,
        "peak_memory": means.peak_memory(plan),
        "disk_needed": plan.disk_needed if need is None else need,
        "disk_free": free,
        "workers": means.workers,
        "devices": means.devices,
        "download": means.traffic
        and {
            "bytes": means.traffic.fetched,
            "factor": means.traffic.factor,
            "spool": means.traffic.spooled,
        },
        "shards": [{"name": s.name, "bytes": s.size, "tensors": len(s.names)} for s in plan.shards],
        "tensors": quantized + kept,
        "warnings": plan.warnings,
        "notes": plan.notes,
    }


def show_plan(plan: Plan, means: Means, free: int | None, need: int | None = None) -> None:
    """The plan as tables: what is quantized, what is not and why, what it needs.

    ``need``: see ``plan_lines``.
    """
    console = text.console()
    console.print(f"{plan.scheme_names}: {scheme_text(plan)}", soft_wrap=True, markup=False)
    table = text.table("tensors", "shape", "dtype", "count", "in", "out")
    rows: dict[tuple[str, tuple[int, ...], str], list[int]] = {}
    for shard in plan.shards:
        for weights in shard.weights:
            for t, layout in weights.pairs():
                row = rows.setdefault((collapse(t.name), t.shape, t.dtype), [0, 0, 0])
                row[0] += 1
                row[1] += layout.bytes_in
                row[2] += layout.bytes_out
    _add_rows(table, rows)
    console.print(table)
    table = text.table("left as they are", "shape", "dtype", "count", "size", "why")
    kept: dict[tuple[str, tuple[int, ...], str, str], list[int]] = {}
    for t, why in plan.unquantized:
        row = kept.setdefault((collapse(t.name), t.shape, t.dtype, why), [0, 0])
        row[0] += 1
        row[1] += t.nbytes
    for (name, shape, dtype, why), (count, size) in kept.items():
        table.add_row(name, text.shape(shape), dtype, str(count), size_text(size), why)
    if kept:
        console.print(table)
    for line in plan_lines(plan, means, free, need):
        console.print(line, soft_wrap=True, markup=False)


def plan_lines(
    plan: Plan, means: Means, free: int | None, need: int | None = None
) -> Iterator[str]:  # fmt: skip
    """The plan in a few lines, before the work; ``need``: bytes of disk, where not all of it."""
    need = plan.disk_needed if need is None else need
    quantized = sum(len(w.sources) for s in plan.shards for w in s.weights)
    ratio = plan.bytes_in / plan.bytes_out
    yield (
        f"{quantized} weights to {plan.scheme_names}, {len(plan.unquantized)} tensors as "
        f"they are: {size_text(plan.bytes_in)} in {text.files(plan.input_files)} -> "
        f"{size_text(plan.bytes_out)} in {text.files(len(plan.shards))} ({ratio:.2f}x smaller)"
    )
    disk = "" if free is None else f", disk {size_text(need)} of {size_text(free)} free"
    on = f" on {', '.join(means.devices)}" if means.fleet else ""
    memory = size_text(means.peak_memory(plan))
    yield f"{means.workers} workers{on}, peak memory about {memory}{disk}"
    if means.traffic is not None:
        yield from traffic_lines(means.traffic)
    for warning in plan.warnings:
        yield f"warning: {warning}"
    for note in (*plan.notes, *means.remarks):
        yield f"note: {note}"


def traffic_lines(traffic: Traffic) -> Iterator[str]:
    """What comes from the Hub, before the work."""
    yield (
        f"download {size_text(traffic.fetched)} ({traffic.factor:.2f}x of what is read), spool "
        f"{size_text(traffic.spooled)}"
    )
    if traffic.factor > 1.02:
        yield (
            f"note: about {size_text(traffic.fetched - traffic.needed)} are downloaded twice, as "
            "the spool does not hold them until they are needed again; raise --spool"
        )


def summary_json(output: Output, summary: Summary) -> dict[str, Any]:
    """What a conversion did, for programs; sizes in bytes."""
    return {
        "dst": str(output.dst), "scheme": output.plan.scheme_names,
        "format": format_name(output.plan), "verbatim": output.plan.verbatim,
        "bytes_in": summary.bytes_in, "bytes_out": summary.bytes_out, "seconds": summary.seconds,
        "workers": summary.workers, "backend": summary.backend, "rounded_scales": summary.rounded,
        "bytes_resumed": summary.resumed, "bytes_downloaded": summary.downloaded,
        "remarks": list(summary.remarks),
        **({"url": summary.committed.url} if summary.committed else {}),
        **(quality_json(summary.quality) if summary.quality else {}),
    }  # fmt: skip


def summary_lines(output: Output, summary: Summary) -> Iterator[str]:
    """What a conversion did."""
    name = output.plan.scheme_names
    if output.plan.verbatim:
        yield f"{output.dst}: the source is in {name} already, copied as it is"
        if summary.committed:
            yield summary.committed.url
        return
    if summary.resumed:
        speed = f"{size_text(summary.resumed)} of it before"
    else:
        speed = f"{size_text(summary.bytes_in / summary.seconds)}/s of the source"
    yield (
        f"{output.dst}: {size_text(summary.bytes_out)}, "
        f"{summary.bytes_in / summary.bytes_out:.2f}x smaller, in {summary.seconds:.2f} s "
        f"({speed}), {summary.workers} workers, {summary.backend}"
    )
    if summary.downloaded is not None:
        yield (
            f"downloaded {size_text(summary.downloaded)}, "
            f"{size_text(summary.downloaded / summary.seconds)}/s"
        )
    if summary.committed:
        yield summary.committed.url
    for remark in summary.remarks:
        yield f"note: {remark}"
    if summary.rounded:
        yield f"note: {summary.rounded} scales had to be rounded to the dtype that this format has"
    if summary.quality:
        yield from quality_lines(summary.quality)


def _add_rows(table: Any, rows: dict[tuple[str, tuple[int, ...], str], list[int]]) -> None:
    for (name, shape, dtype), (count, size, out) in rows.items():
        table.add_row(name, text.shape(shape), dtype, str(count), size_text(size), size_text(out))
