"""What a checkpoint is."""

from __future__ import annotations

from collections import Counter
from typing import Any

from streamq.checkpoint import Checkpoint
from streamq.families import Family, collapse
from streamq.tensors import DTYPES, TensorInfo, size_text

from . import text


def inspect_json(c: Checkpoint) -> dict[str, Any]:
    """What a checkpoint is, for programs."""
    tensors = c.tensors.values()
    quantization = c.config.get("quantization_config")
    quantization = quantization if isinstance(quantization, dict) else {}
    return {
        "path": c.place,
        "model_type": c.config.get("model_type"),
        "files": [{"name": f, "bytes": c.size(f)} for f in c.files],
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
    console = text.console()
    info = inspect_json(c)
    kind = info["model_type"] or "model_type unknown"
    q = info["quantization"]
    state = f"quantized: {q['quant_method']} {q['format'] or ''}" if q else "not quantized"
    console.print(
        f"{info['path']}: {kind}, {info['tensors']} tensors, "
        f"{text.count(info['parameters'])} parameters, {size_text(info['bytes'])} in "
        f"{text.files(len(c.files))}, {state}",
        soft_wrap=True, markup=False,
    )  # fmt: skip
    table = text.table("tensors", "shape", "dtype", "count", "size")
    rows: dict[tuple[str, tuple[int, ...], str], list[int]] = {}
    for t in c.tensors.values():
        row = rows.setdefault((collapse(t.name), t.shape, t.dtype), [0, 0])
        row[0] += 1
        row[1] += t.nbytes
    for (name, shape, dtype), (count, size) in rows.items():
        table.add_row(name, text.shape(shape), dtype, str(count), size_text(size))
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
