"""What an output says of itself: names, dtypes, shapes and scales against its config."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from math import inf

import numpy as np

from streamq.checkpoint import Checkpoint, read_json
from streamq.errors import CheckpointError, StreamqError
from streamq.families import Family
from streamq.stored import Array, Found, Stored, read, read_rows, slabs, stored_of, weights_of

from .report import Report


def check_index(checkpoint: Checkpoint, report: Report) -> None:
    """Several shards have an index, and its total_size is right."""
    path = checkpoint.root / "model.safetensors.index.json"
    if not path.is_file():
        if len(checkpoint.files) > 1:
            report.failures.append(f"{len(checkpoint.files)} shards without {path.name}")
        return
    metadata = read_json(path).get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if total != checkpoint.nbytes:
        report.failures.append(
            f"{path.name}: total_size is {total}, the tensors have {checkpoint.nbytes} bytes"
        )


def find_weights(checkpoint: Checkpoint, found: Found, report: Report) -> list[Stored]:
    """The quantized weights, after comparing names, dtypes and shapes with the layout."""
    family = Family(checkpoint.config)
    weights = []
    for module, tensors in weights_of(found):
        try:
            weights.append(stored_of(checkpoint, found, module, tensors))
        except StreamqError as e:
            report.failures.append(str(e))
    if not weights and found.format.name != "plain":
        report.failures.append("no tensor is quantized")
    quantized = {s.name for s in weights}
    tests = {s.scheme: family.left_alone(s.scheme) for s in weights}
    for t in checkpoint.tensors.values():
        module = t.name.removesuffix(".weight")
        if module == t.name or len(t.shape) != 2 or module in found.parts or t.name in quantized:
            continue
        scheme = found.scheme_of(module)
        if scheme is not None and tests.get(scheme, _never)(module) != "embedding":
            report.failures.append(
                f"{t.name!r} is not quantized and {found.format.told_in} does not ignore it: "
                "loaders look for its scales"
            )
    return weights


def _never(module: str) -> str | None:
    return None


def check_scales(checkpoint: Checkpoint, weights: list[Stored], report: Report) -> None:
    """Scales are finite and above zero."""
    for s in weights:
        t = s.tensors[s.format.scale_suffix]
        scale = s.format.unpadded(read(checkpoint, t), s.layout, s.scheme)
        if s.scheme.scale == "e8m0":
            good = scale != 255
        else:
            value = scale.astype(np.float32)
            good = np.isfinite(value) & (value > 0)
        if not good.all():
            at = np.argwhere(~good)[0]
            report.failures.append(
                f"{t.name!r} is {scale[tuple(at)]} at {_place(at)}: "
                "scales must be finite and above zero"
            )
        for e in s.layout.entries:
            if e.role in ("global_scale", "constant") and e.dtype == "F32":
                constant = float(read(checkpoint, s.tensors[e.suffix]).reshape(-1)[0])
                if not 0 < constant < inf:
                    report.failures.append(f"{s.tensors[e.suffix].name!r} is {constant}")
            if e.role == "offset" and read(checkpoint, s.tensors[e.suffix]).any():
                report.failures.append(f"{s.tensors[e.suffix].name!r} is not zero")
            if e.role == "bias":
                bias = read(checkpoint, s.tensors[e.suffix]).astype(np.float32)
                if not np.isfinite(bias).all():
                    at = np.argwhere(~np.isfinite(bias))[0]
                    report.failures.append(
                        f"{s.tensors[e.suffix].name!r} is {bias[tuple(at)]} at {_place(at)}"
                    )


def check_sums(checkpoint: Checkpoint, weights: list[Stored], workers: int, report: Report) -> None:
    """Weights that have sums of their codes beside them are read, which compares the two."""

    def unread(s: Stored) -> str | None:
        try:
            for first, rows in slabs(s):
                read_rows(checkpoint, s, first, rows)
        except CheckpointError as e:
            return str(e)
        return None

    summed = [s for s in weights if any(e.role == "row_sum" for e in s.layout.entries)]
    with ThreadPoolExecutor(workers) as pool:
        report.failures += filter(None, pool.map(unread, summed))


def _place(at: Array) -> str:
    """An index for people."""
    names = ("row", "column") if len(at) == 2 else ("index",) * len(at)
    return ", ".join(f"{name} {i}" for name, i in zip(names, at.tolist(), strict=True))
