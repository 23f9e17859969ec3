"""What a report says, as plain values: the JSON of ``streamq report`` and the data of its page."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from math import isfinite, sqrt
from typing import Any

from streamq.checkpoint import Checkpoint
from streamq.quality import Loss, Quality, kind_of, together
from streamq.show import fused_groups
from streamq.stored import look

from .looks import histogram
from .pairs import Pair

#: Changes when a key changes its meaning or goes away.
SCHEMA = 1
#: Tensors that lost most and get a histogram of their weights.
WORST = 12


@dataclass(frozen=True, slots=True)
class Told:
    """What checkpoints do not say: how the output came about, all of it optional.

    ``source``, ``output``: as the user names them. ``run``: times and speed. ``reasons``: why a
    tensor is not quantized, by name. ``verification``: what ``streamq verify`` found.
    """

    source: str
    output: str
    command: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    run: Mapping[str, Any] | None = None
    verification: Mapping[str, Any] | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)
    warnings: Iterable[str] = ()
    notes: Iterable[str] = ()


def document(
    out: Checkpoint, source: Checkpoint, pairs: list[Pair], quality: Quality, told: Told
) -> dict[str, Any]:
    """Everything that a report shows; docs/report.md has the keys. ``quality``: detailed.

    Equal but for ``run`` and ``made_by`` whenever it is made of the same checkpoints.
    """
    losses = {p.name: quality.of(p.name) for p in pairs}
    quantized = [p for p in pairs if p.stored is not None]
    size = sum(p.source.numel for p in quantized)
    weights = [p for p in pairs if p.stored is not None or len(p.source.shape) > 1]
    return {
        "schema": SCHEMA,
        "name": out.root.resolve().name,
        "made_by": versions(),
        "command": told.command,
        "options": dict(told.options),
        "source": {
            "path": told.source, "model_type": source.config.get("model_type"),
            "files": len(source.files), "tensors": len(source.tensors),
            "parameters": sum(t.numel for t in source.tensors.values()), "bytes": source.nbytes,
            "dtypes": dict(Counter(t.dtype for t in source.tensors.values()).most_common()),
        },
        "output": {
            "path": told.output, "format": look(out).format.name, "files": len(out.files),
            "tensors": len(out.tensors), "quantized": len(quantized), "bytes": out.nbytes,
            "bits_per_weight":
                _short(8 * sum(p.bytes_out for p in quantized) / size) if size else None,
        },
        "run": dict(told.run) if told.run else None,
        "verification": dict(told.verification) if told.verification else None,
        "total": summed(pairs, losses),
        "schemes": [
            {"scheme": scheme, **summed(found, losses)}
            for scheme, found in _by(pairs, lambda p: p.scheme).items()
        ],
        "kinds": [
            {"kind": kind, **summed(found, losses)}
            for kind, found in _by(quantized, lambda p: kind_of(p.name)).items()
        ],
        "cells": [
            {"stack": stack, "layer": layer, "kind": kind,
             "schemes": sorted({p.scheme or p.dtype for p in found}),
             **summed(found, losses)}
            for (stack, layer, kind), found in _by(weights, _place).items()
        ],
        "errors": {"bin_octaves": 0.5, "by_kind": quality.errors_by_kind()},
        "worst": [
            {**_entry(p, losses[p.name], told), "histogram": histogram(out, source, p)}
            for p in worst(quantized, losses)
        ],
        "fused_groups": fused_groups(source),
        "tensors": [_entry(p, losses[p.name], told) for p in pairs],
        "warnings": list(told.warnings),
        "notes": list(told.notes),
    }  # fmt: skip


def versions() -> dict[str, str]:
    """What made the report."""
    found = {"python": platform.python_version()}
    return found | {name: version(name) for name in ("streamq", "numpy", "numba")} | {
        "platform": f"{platform.system()} {platform.machine()}"}  # fmt: skip


def summed(pairs: list[Pair], losses: Mapping[str, Loss | None]) -> dict[str, Any]:
    """Several tensors as one, and the least of their SQNR."""
    known = [(p, loss) for p in pairs if (loss := losses[p.name]) is not None]
    total = together(loss for _, loss in known)
    found = loss_json(total if known else None, sum(p.source.numel for p, _ in known))
    sqnr = [loss.sqnr for _, loss in known]
    return {
        "tensors": len(pairs), "numel": sum(p.source.numel for p in pairs),
        "bytes_in": sum(p.bytes_in for p in pairs), "bytes_out": sum(p.bytes_out for p in pairs),
        **found, "lowest_sqnr_db": _decibel(min(sqnr)) if sqnr else None,
    }  # fmt: skip


def loss_json(loss: Loss | None, numel: int) -> dict[str, Any]:
    """The numbers of one tensor or several; null where nothing was measured or there is no end.

    ``exact``: not one weight has changed, so that there is no SQNR.
    """
    if loss is None:
        return dict.fromkeys(("sqnr_db", "max_error", "max_error_rms", "clipped"), None) | {
            "exact": False}  # fmt: skip
    rms = sqrt(loss.signal / numel) if numel and loss.signal >= 0 else 0.0
    return {
        "sqnr_db": _decibel(loss.sqnr), "max_error": _short(loss.largest),
        "max_error_rms": _short(loss.largest / rms) if rms else None,
        "clipped": _short(loss.clipped / numel), "exact": loss.noise == 0,
    }  # fmt: skip


def worst(pairs: list[Pair], losses: Mapping[str, Loss | None]) -> list[Pair]:
    """The tensors of the lowest SQNR, in an order that does not depend on threads."""
    found = [(_decibel(loss.sqnr), p.name, p) for p in pairs if (loss := losses[p.name])]
    rows = [row for row in found if row[0] is not None]
    return [p for *_, p in sorted(rows, key=lambda row: (row[0], row[1]))[:WORST]]


def _entry(p: Pair, loss: Loss | None, told: Told) -> dict[str, Any]:
    t = p.source
    return {
        "name": p.name, "kind": kind_of(p.name), "dtype": t.dtype, "shape": list(t.shape),
        "scheme": p.scheme, "dtype_out": p.dtype,
        "reason": None if p.stored else told.reasons.get(p.name),
        "bytes_in": p.bytes_in, "bytes_out": p.bytes_out, **loss_json(loss, t.numel),
    }  # fmt: skip


def _place(p: Pair) -> tuple[str | None, int | None, str]:
    stack, layer = p.layer or (None, None)
    return stack, layer, kind_of(p.name)


def _by(pairs: list[Pair], key: Any) -> dict[Any, list[Pair]]:
    groups: dict[Any, list[Pair]] = {}
    for p in pairs:
        groups.setdefault(key(p), []).append(p)
    return groups


def _decibel(value: float) -> float | None:
    """Two digits less than what the order of sums in threads may change."""
    return round(value, 4) if isfinite(value) else None


def _short(value: float) -> float | None:
    return float(f"{value:.6g}") if isfinite(value) else None
