"""What people read in a terminal, and the same as JSON."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

from streamq.checkpoint import Checkpoint
from streamq.converting import Means, Output, Summary
from streamq.families import Family, collapse
from streamq.formats import FORMATS, default_format
from streamq.planning import Plan
from streamq.quality import Quality
from streamq.schemes import PLAIN, SCHEMES, block_text
from streamq.tensors import DTYPES, TensorInfo, size_text


def plan_json(plan: Plan, means: Means, free: int | None) -> dict[str, Any]:
    """A plan for programs: every tensor with what it becomes, sizes in bytes."""
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
        "format": format_of(plan),
        "numerics": plan.options.numerics,
        "bytes_in": plan.bytes_in,
        "bytes_out": plan.bytes_out,
        "peak_memory": means.peak_memory(plan),
        "disk_needed": plan.disk_needed,
        "disk_free": free,
        "workers": means.workers,
        "devices": means.devices,
        "shards": [{"name": s.name, "bytes": s.size, "tensors": len(s.names)} for s in plan.shards],
        "tensors": quantized + kept,
        "warnings": plan.warnings,
        "notes": plan.notes,
    }


def show_plan(plan: Plan, means: Means, free: int | None) -> None:
    """The plan as tables: what is quantized, what is not and why, what it needs."""
    console = _console()
    console.print(f"{plan.scheme_names}: {scheme_text(plan)}", soft_wrap=True, markup=False)
    table = _table("tensors", "shape", "dtype", "count", "in", "out")
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
    table = _table("left as they are", "shape", "dtype", "count", "size", "why")
    kept: dict[tuple[str, tuple[int, ...], str, str], list[int]] = {}
    for t, why in plan.unquantized:
        row = kept.setdefault((collapse(t.name), t.shape, t.dtype, why), [0, 0])
        row[0] += 1
        row[1] += t.nbytes
    for (name, shape, dtype, why), (count, size) in kept.items():
        table.add_row(name, _shape(shape), dtype, str(count), size_text(size), why)
    if kept:
        console.print(table)
    for line in plan_lines(plan, means, free):
        console.print(line, soft_wrap=True, markup=False)


def _console() -> Any:
    """Tables are as wide as the terminal; in a file or a pipe nothing is folded."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 200)


def _table(*columns: str) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        number = column in ("count", "in", "out", "size")
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    return table


def _add_rows(table: Any, rows: dict[tuple[str, tuple[int, ...], str], list[int]]) -> None:
    for (name, shape, dtype), (count, size, out) in rows.items():
        table.add_row(name, _shape(shape), dtype, str(count), size_text(size), size_text(out))


def plan_lines(plan: Plan, means: Means, free: int | None) -> Iterator[str]:
    """The plan in a few lines, before the work."""
    quantized = sum(len(w.sources) for s in plan.shards for w in s.weights)
    ratio = plan.bytes_in / plan.bytes_out
    yield (
        f"{quantized} weights to {plan.scheme_names}, {len(plan.unquantized)} tensors as "
        f"they are: {size_text(plan.bytes_in)} in {_files(plan.input_files)} -> "
        f"{size_text(plan.bytes_out)} in {_files(len(plan.shards))} ({ratio:.2f}x smaller)"
    )
    disk = "" if free is None else f", disk {size_text(plan.disk_needed)} of {size_text(free)} free"
    on = f" on {', '.join(means.devices)}" if means.fleet else ""
    memory = size_text(means.peak_memory(plan))
    yield f"{means.workers} workers{on}, peak memory about {memory}{disk}"
    for warning in plan.warnings:
        yield f"warning: {warning}"
    for note in (*plan.notes, *means.remarks):
        yield f"note: {note}"


def summary_json(output: Output, summary: Summary) -> dict[str, Any]:
    """What a conversion did, for programs; sizes in bytes."""
    return {
        "dst": str(output.dst), "scheme": output.plan.scheme_names,
        "format": format_of(output.plan), "verbatim": output.plan.verbatim,
        "bytes_in": summary.bytes_in, "bytes_out": summary.bytes_out, "seconds": summary.seconds,
        "workers": summary.workers, "backend": summary.backend, "rounded_scales": summary.rounded,
        "bytes_resumed": summary.resumed, "remarks": list(summary.remarks),
        **(quality_json(summary.quality) if summary.quality else {}),
    }  # fmt: skip


def summary_lines(output: Output, summary: Summary) -> Iterator[str]:
    """What a conversion did."""
    name = output.plan.scheme_names
    if output.plan.verbatim:
        yield f"{output.dst}: the source is in {name} already, copied as it is"
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
    for remark in summary.remarks:
        yield f"note: {remark}"
    if summary.rounded:
        yield f"note: {summary.rounded} scales had to be rounded to the dtype that this format has"
    if summary.quality:
        yield from quality_lines(summary.quality)


def scheme_text(plan: Plan) -> str:
    """What the preset means, in words."""
    s = plan.options.scheme
    if plan.options.recipe is not None:
        return f"by a recipe; format {format_of(plan)}"
    if s.is_float:
        return f"{s.name.lower()} weights"
    element = {"int": f"int{s.bits}", "e4m3": "FP8 e4m3", "e2m1": "FP4 e2m1"}[s.element]
    scale = {"weight": "the weight's dtype", "e4m3": "FP8 e4m3", "e8m0": "E8M0"}
    symmetry = "" if s.symmetric else ", zero points"
    level = ", an f32 scale above" if s.two_level else ""
    inputs = (
        "unquantized" if s.activation is None else f"{s.activation.bits}-bit {s.activation.element}"
    )
    return (
        f"{element} in blocks of {block_text(s.block)}, "
        f"scales in {scale.get(s.scale, s.scale)}{level}{symmetry}; activations {inputs}; "
        f"format {format_of(plan)}"
    )


def format_of(plan: Plan) -> str:
    """The name of the output's format."""
    assert plan.options.format is not None
    return plan.options.format.name


def formats_json() -> list[dict[str, Any]]:
    """The formats for programs."""
    return [{"name": f.name, "loaders": f.loaders, "schemes": list(f.presets)}
            for f in FORMATS.values()]  # fmt: skip


def show_formats() -> None:
    """The formats as a table; the first that holds a scheme is its default."""
    console = _console()
    table = _table("format", "for", "schemes")
    for f in FORMATS.values():
        table.add_row(f.name, f.loaders, ", ".join(f.presets))
    console.print(table)
    first, last = default_format(next(iter(SCHEMES.values()))), default_format(PLAIN["BF16"])
    console.print(f"Without --format: {first.name}; for {', '.join(PLAIN)} {last.name}.")


def _files(n: int) -> str:
    return f"{n} file" if n == 1 else f"{n} files"


def _count(n: int) -> str:
    """A number of parameters as model names give it: 6.82M, 8.03B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return str(n)


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


# --- inspect ----------------------------------------------------------------------------


def inspect_json(c: Checkpoint) -> dict[str, Any]:
    """What a checkpoint is, for programs."""
    tensors = c.tensors.values()
    quantization = c.config.get("quantization_config")
    quantization = quantization if isinstance(quantization, dict) else {}
    return {
        "path": str(c.root),
        "model_type": c.config.get("model_type"),
        "files": [{"name": f, "bytes": (c.root / f).stat().st_size} for f in c.files],
        "tensors": len(c.tensors),
        "parameters": sum(t.numel for t in tensors),
        "bytes": c.nbytes,
        "dtypes": {
            tag: {"tensors": n, "bytes": sum(t.nbytes for t in tensors if t.dtype == tag)}
            for tag, n in Counter(t.dtype for t in tensors).most_common()
        },
        "quantization": {
            "quant_method": quantization.get("quant_method"), "format": quantization.get("format"),
        } if quantization else None,
        "fused_groups": fused_groups(c),
        "other_files": c.others,
        "oddities": c.oddities,
    }  # fmt: skip


def fused_groups(c: Checkpoint) -> list[dict[str, Any]]:
    """Fused groups, collapsed over layers: how many, and how many straddle shards."""
    family = Family(c.config)
    found: dict[tuple[str, str], list[TensorInfo]] = {}
    kinds: dict[tuple[str, str], str] = {}
    for t in c.tensors.values():
        if not t.name.endswith(".weight") or len(t.shape) != 2:
            continue
        if group := family.group_of(t.name.removesuffix(".weight")):
            key = (group[0], group[1].members[0])
            found.setdefault(key, []).append(t)
            kinds[key] = group[1].name
    rows: dict[tuple[str, str, str], list[int]] = {}
    for key, members in found.items():
        if len(members) > 1:
            names = ", ".join(
                sorted(t.name.removesuffix(".weight").rpartition(".")[2] for t in members)
            )
            row = rows.setdefault((collapse(key[0]), kinds[key], names), [0, 0])
            row[0] += 1
            row[1] += len({t.file for t in members}) > 1
    return [
        {"parent": parent, "fused_as": kind, "members": names, "count": n, "across_shards": apart}
        for (parent, kind, names), (n, apart) in rows.items()
    ]


def show_inspect(c: Checkpoint) -> None:
    """The same as tables."""
    console = _console()
    info = inspect_json(c)
    kind = info["model_type"] or "model_type unknown"
    q = info["quantization"]
    state = f"quantized: {q['quant_method']} {q['format'] or ''}" if q else "not quantized"
    console.print(
        f"{info['path']}: {kind}, {info['tensors']} tensors, "
        f"{_count(info['parameters'])} parameters, {size_text(info['bytes'])} in "
        f"{_files(len(c.files))}, {state}",
        soft_wrap=True, markup=False,
    )  # fmt: skip
    table = _table("tensors", "shape", "dtype", "count", "size")
    rows: dict[tuple[str, tuple[int, ...], str], list[int]] = {}
    for t in c.tensors.values():
        row = rows.setdefault((collapse(t.name), t.shape, t.dtype), [0, 0])
        row[0] += 1
        row[1] += t.nbytes
    for (name, shape, dtype), (count, size) in rows.items():
        table.add_row(name, _shape(shape), dtype, str(count), size_text(size))
    console.print(table)
    for tag, entry in info["dtypes"].items():
        bits = DTYPES[tag].bits
        console.print(
            f"{tag} ({bits} bits): {entry['tensors']} tensors, {size_text(entry['bytes'])}"
        )
    for g in info["fused_groups"]:
        apart = f", {g['across_shards']} across shards" if g["across_shards"] else ""
        console.print(
            f"fused as {g['fused_as']}: {g['parent']}.{{{g['members']}}} x {g['count']}{apart}",
            soft_wrap=True, markup=False,
        )  # fmt: skip
    for oddity in c.oddities:
        console.print(f"odd: {oddity}", soft_wrap=True, markup=False)


def quality_lines(quality: Quality) -> Iterator[str]:
    """Weight SQNR: overall, by kind of module, of the tensors that lost most."""
    if not quality:
        return
    yield f"weight SQNR {quality.total:.2f} dB"
    for kind, (count, db) in quality.by_kind().items():
        yield f"  {db:6.2f} dB  {kind} x {count}"
    yield "lowest:"
    for name, db in quality.worst():
        yield f"  {db:6.2f} dB  {name}"


def quality_json(quality: Quality) -> dict[str, Any]:
    """The same for programs, and of every tensor; null is infinite, for JSON has no infinity."""

    def number(value: float) -> float | None:
        return value if abs(value) < float("inf") else None

    return {
        "sqnr_db": number(quality.total) if quality else None,
        "sqnr_db_by_kind": {kind: number(db) for kind, (_, db) in quality.by_kind().items()},
        "sqnr_db_by_tensor": {name: number(db) for name, db in quality.by_tensor().items()},
    }
