"""A report small enough for a page: bounded rows, cells and names, whatever the checkpoint."""

from __future__ import annotations

import re
from collections import Counter
from math import log10
from statistics import median
from typing import Any

#: Tensors that are listed one by one. With more, experts of a layer become one row; if these
#: are still more, those that lost most are listed. 20,000 rows are about 2.5 MB.
TABLE_ROWS = 20_000
#: Of experts that became one row, those that lost most are listed too.
SINGLE = 500
#: Kinds of modules in a chart, by their bytes, and cells of a map.
KINDS, CELLS = 40, 20_000
#: Fused groups and lines of text that are listed, characters of a name, of one that is an axis.
LINES, NAME, LABEL = 200, 300, 48

#: A share of the errors of a kind that is not worth a place on the axis.
RARE = 5e-4

#: What a cell without a layer is called, and one of several schemes.
OUTSIDE, MIXED = "-", "mixed"

_EXPERT = re.compile(r"(\bexperts)\.\d+\.|\[#\d+\]")

#: Columns of the table of tensors; what counts first, as a phone shows three of them.
COLUMNS = (
    "name", "sqnr_db", "scheme", "max_error", "max_error_rms", "clipped", "bytes_in", "bytes_out",
    "shape", "count",
)  # fmt: skip


def page_data(report: dict[str, Any]) -> dict[str, Any]:
    """The parts of a document that its page shows, cut to what a browser can hold."""
    rows, folded = table(report["tensors"])
    schemes = schemes_of(report)
    cells = cells_of(report)
    main, shown = _main(report), {c["row"] for c in cells}
    verification = report["verification"] or {"failures": []}
    failures = [f"failed: {f}" for f in verification["failures"]]
    model = report["source"]["model_type"]
    return {
        **{key: report[key] for key in ("command", "options", "output", "run", "verification",
                                        "total", "made_by")},
        "source": {**report["source"], "model_type": model and cut(str(model))},
        "name": cut(report["name"]),
        "schemes": schemes,
        "cells": cells,
        "rows": rows_of(cells),
        "layers": layers_of(cells),
        "hidden_kinds": len({_label(c, main) for c in report["cells"]} - shown),
        "errors": errors_of(report),
        "worst": [{**w, "name": cut(w["name"])} for w in report["worst"]],
        "fused_groups": [
            {key: cut(value) if isinstance(value, str) else value for key, value in group.items()}
            for group in report["fused_groups"][:LINES]
        ],
        "said": [cut(line) for line in (*failures, *report["warnings"], *report["notes"])][:LINES],
        "columns": COLUMNS,
        "table": rows,
        "folded": folded,
    }  # fmt: skip


def table(tensors: list[dict[str, Any]]) -> tuple[list[list[Any]], str]:
    """Rows of COLUMNS, and a sentence about what is not listed one by one."""
    if len(tensors) <= TABLE_ROWS:
        return [_row(t) for t in tensors], ""
    groups: dict[tuple[str, Any], list[dict[str, Any]]] = {}
    for t in tensors:
        groups.setdefault((_EXPERT.sub(r"\1.*.", t["name"]), t["scheme"]), []).append(t)
    found = [
        _row(group[0]) if len(group) == 1 else _merged(name, group)
        for (name, _), group in groups.items()
    ]
    alone = {g[0]["name"] for g in groups.values() if len(g) == 1}
    single = sorted((t for t in tensors if t["name"] not in alone and t["sqnr_db"] is not None),
                    key=lambda t: t["sqnr_db"])[:SINGLE]  # fmt: skip
    found += [_row(t) for t in single]
    said = (f"{len(tensors):,} tensors: the experts of a layer are one row, with the errors of "
            f"all of them together; the {len(single)} that lost most are listed too.")  # fmt: skip
    if len(found) > TABLE_ROWS:
        found = sorted(found, key=lambda r: (_order(r[COLUMNS.index("sqnr_db")]), r[0]))
        said += f" Of {len(found):,} rows these are the {TABLE_ROWS:,} that lost most."
    return found[:TABLE_ROWS], said


def _order(value: Any) -> float:
    return value if isinstance(value, float) else 1e9


def _row(t: dict[str, Any]) -> list[Any]:
    scheme = t["scheme"] or t["dtype_out"] + (f" ({t['reason']})" if t["reason"] else "")
    cells = {**t, "name": cut(t["name"]), "scheme": cut(scheme), "count": 1,
             "shape": " x ".join(map(str, t["shape"]))[:LABEL],
             "sqnr_db": "exact" if t["exact"] else t["sqnr_db"]}  # fmt: skip
    return [cells[column] for column in COLUMNS]


def _merged(name: str, group: list[dict[str, Any]]) -> list[Any]:
    """Experts as one row, of the mean of their relative energies; they are of one size."""
    row = dict(zip(COLUMNS, _row({**group[0], "name": name, "exact": False}), strict=True))
    known = [t for t in group if t["sqnr_db"] is not None]
    if known:
        noise = sum(10 ** (-t["sqnr_db"] / 10) for t in known) / len(known)
        row["sqnr_db"] = round(-10 * log10(noise), 4)
        for key in ("max_error", "max_error_rms"):
            row[key] = max((t[key] for t in known if t[key] is not None), default=None)
        row["clipped"] = sum(t["clipped"] for t in known) / len(known)
    for key in ("bytes_in", "bytes_out"):
        row[key] = sum(t[key] for t in group)
    row["count"] = len(group)
    return [*row.values()]


def schemes_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Schemes with their sizes, the kept dtypes behind them."""
    found = [{**s, "label": s["scheme"]} for s in report["schemes"] if s["scheme"]]
    found.sort(key=lambda s: (-s["bytes_out"], s["label"]))
    kept: dict[str, dict[str, Any]] = {}
    for t in report["tensors"]:
        if t["scheme"] is None:
            entry = kept.setdefault(t["dtype_out"], {
                "scheme": None, "label": t["dtype_out"], "tensors": 0, "bytes_in": 0,
                "bytes_out": 0})  # fmt: skip
            entry["tensors"] += 1
            for key in ("bytes_in", "bytes_out"):
                entry[key] += t[key]
    return found + sorted(kept.values(), key=lambda s: (-s["bytes_out"], s["label"]))


def _main(report: dict[str, Any]) -> str | None:
    """The stack of layers that most weights are in."""
    sizes: Counter[str] = Counter()
    for c in report["cells"]:
        if c["stack"] is not None:
            sizes[c["stack"]] += c["bytes_in"]
    return sizes.most_common(1)[0][0] if sizes else None


def _label(cell: dict[str, Any], main: str | None) -> str:
    alone = cell["stack"] in (None, main)
    return cut(cell["kind"] if alone else f"{cell['stack']}: {cell['kind']}", LABEL)


def cells_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    """One for each layer and kind of module, of the KINDS largest kinds."""
    main = _main(report)
    sizes: Counter[str] = Counter()
    for c in report["cells"]:
        sizes[_label(c, main)] += c["bytes_in"]
    shown = {label for label, _ in sizes.most_common(KINDS)}
    found = []
    for c in report["cells"]:
        if (label := _label(c, main)) not in shown:
            continue
        schemes = c["schemes"]
        found.append({
            "row": label, "layer": OUTSIDE if c["layer"] is None else str(c["layer"]),
            "number": c["layer"], "main": c["stack"] == main,
            "scheme": schemes[0] if len(schemes) == 1 else MIXED,
            "schemes": ", ".join(schemes), "tensors": c["tensors"],
            **{key: c[key] for key in ("sqnr_db", "lowest_sqnr_db", "max_error", "max_error_rms",
                                       "clipped")},
        })  # fmt: skip
    return _against(found[:CELLS])


def _against(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with the SQNR less the median of the cells of its scheme, where outliers show."""
    known: dict[str, list[float]] = {}
    for c in cells:
        if c["sqnr_db"] is not None:
            known.setdefault(c["scheme"], []).append(c["sqnr_db"])
    middle = {scheme: median(values) for scheme, values in known.items()}
    return [
        {**c, "against_db": c["sqnr_db"] and round(c["sqnr_db"] - middle[c["scheme"]], 4)}
        for c in cells
    ]


def rows_of(cells: list[dict[str, Any]]) -> list[str]:
    """Labels in the order of a map: kinds inside of layers first."""
    inside = {c["row"] for c in cells if c["number"] is not None}
    outside = {c["row"] for c in cells} - inside
    return [*sorted(inside), *sorted(outside)]


def layers_of(cells: list[dict[str, Any]]) -> list[str]:
    """Layers in the order of a map, what lies outside behind them."""
    numbers = sorted({c["number"] for c in cells if c["number"] is not None})
    outside = any(c["number"] is None for c in cells)
    return [*map(str, numbers), *([OUTSIDE] if outside else [])]


def errors_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Shares of errors by kind; sizes that next to none have, at either end, are not drawn."""
    kinds = report["errors"]["by_kind"]
    largest = sorted(kinds, key=lambda kind: (-sum(kinds[kind]), kind))[:KINDS]
    step = 20 * log10(2) * report["errors"]["bin_octaves"]
    found = []
    for kind in sorted(largest):
        counts, total = kinds[kind][:-1], sum(kinds[kind])
        filled = [i for i, n in enumerate(counts) if n > total * RARE]
        for i in range(min(filled, default=0), max(filled, default=-1) + 1):
            found.append({"row": cut(kind, LABEL), "db": round(-step * (i + 0.5), 2),
                          "share": float(f"{counts[i] / total:.4g}")})  # fmt: skip
    return found


def cut(text: str, limit: int = NAME) -> str:
    """A text of at most ``limit`` characters, its middle left out."""
    half = limit // 2
    return text if len(text) <= limit else f"{text[: half - 1]}…{text[-half:]}"
