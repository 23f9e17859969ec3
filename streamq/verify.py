"""Reopen an output and prove it: its structure, its scales and, with the source, every element."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import inf, log10
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from streamq.checkpoint import Checkpoint, open_checkpoint, read_json
from streamq.errors import CheckpointError, StreamqError
from streamq.families import Family
from streamq.formats import compressed_tensors as fmt
from streamq.formats.layout import Layout
from streamq.kernels.reference import E2M1_VALUES, E4M3, dequantize, spread
from streamq.plan import slab_rows
from streamq.schemes import Quantized, Scheme
from streamq.tensors import DTYPES, FLOATS, TensorInfo

Array = np.ndarray[Any, Any]
Progress = Callable[[int, str], None]

_PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_global_scale",
          "input_global_scale", "weight_shape")  # fmt: skip


@dataclass(slots=True)
class Report:
    """What was looked at and what failed; ``sqnr`` in dB by tensor name, with a source."""

    scheme: str = ""
    tensors: int = 0
    quantized: int = 0
    failures: list[str] = field(default_factory=list)
    sqnr: dict[str, float] = field(default_factory=dict)
    signal: float = 0.0
    noise: float = 0.0

    @property
    def total_sqnr(self) -> float:
        """Over all quantized weights together, in dB."""
        return _decibel(self.signal, self.noise)


class Module(NamedTuple):
    """A quantized weight in the output: its tensors by suffix, its shape and layout."""

    name: str
    tensors: dict[str, TensorInfo]
    rows: int
    cols: int
    layout: Layout


def verify(
    dst: str | os.PathLike[str],
    source: Checkpoint | None = None,
    *,
    workers: int = 2,
    progress: Progress | None = None,
) -> Report:
    """Check the checkpoint in ``dst``; with ``source``, every element of it.

    Structure: headers, index, total_size, names, dtypes and shapes against the config,
    finite non-zero scales, equal global scales inside fused groups. With the source:
    untouched tensors are equal byte for byte, and each weight is within half a code step
    of its code (clipped ones aside).
    Raises StreamqError only where ``dst`` cannot be looked at; findings are in the report.
    """
    report = Report()
    folder = Path(dst)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such directory.")
    try:
        checkpoint = open_checkpoint(folder)
    except CheckpointError as e:
        report.failures.append(str(e))
        return report
    with checkpoint:
        report.tensors = len(checkpoint.tensors)
        _check_index(checkpoint, report)
        try:
            scheme, ignore = fmt.read_config(checkpoint.config.get("quantization_config") or {})
        except CheckpointError as e:
            report.failures.append(str(e))
            return report
        report.scheme = scheme.name
        modules = _modules(checkpoint, scheme, set(ignore), report)
        report.quantized = len(modules)
        _check_scales(checkpoint, scheme, modules, report)
        if source is not None:
            _compare(checkpoint, source, scheme, modules, workers, progress, report)
    return report


# --- structure --------------------------------------------------------------------------


def _check_index(checkpoint: Checkpoint, report: Report) -> None:
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


def _modules(
    checkpoint: Checkpoint, scheme: Scheme, ignore: set[str], report: Report
) -> list[Module]:
    """The quantized weights, after comparing names, dtypes and shapes with the layout."""
    family = Family(checkpoint.config)
    parts: dict[str, dict[str, TensorInfo]] = {}
    for t in checkpoint.tensors.values():
        module, _, suffix = t.name.rpartition(".")
        if suffix in _PARTS:
            parts.setdefault(module, {})[suffix] = t
    for module, found in parts.items():
        if (weight := checkpoint.tensors.get(module + ".weight")) is not None:
            found["weight"] = weight
    modules = []
    for name, found in parts.items():
        if name in ignore:
            report.failures.append(f"{name!r} is quantized, but config.json ignores it")
        try:
            modules.append(_module(checkpoint, name, found, scheme))
        except StreamqError as e:
            report.failures.append(str(e))
    for t in checkpoint.tensors.values():
        module = t.name.removesuffix(".weight")
        if module == t.name or len(t.shape) != 2 or module in parts or module in ignore:
            continue
        if family.why_left_alone(module, scheme) != "embedding":
            report.failures.append(
                f"{t.name!r} is not quantized and config.json does not ignore it: "
                "loaders look for its scales"
            )
    if not modules:
        report.failures.append("no tensor is quantized")
    return modules


def _module(
    checkpoint: Checkpoint, name: str, found: dict[str, TensorInfo], scheme: Scheme
) -> Module:
    codes = found.get("weight_packed") or found.get("weight")
    if codes is None or len(codes.shape) != 2 or "weight_scale" not in found:
        raise CheckpointError(f"{name!r} has {', '.join(sorted(found))}, no weight with its scale")
    rows, cols = codes.shape
    if "weight_shape" in found and found["weight_shape"].shape == (2,):
        rows, cols = _read(checkpoint, found["weight_shape"]).tolist()
    elif scheme.element == "e2m1":
        cols *= 2
    scale_dtype = found["weight_scale"].dtype
    if rows < 1 or cols < 1 or rows > codes.shape[0]:
        raise CheckpointError(f"{name!r}: weight_shape says {[rows, cols]}")
    layout = fmt.layout(rows, cols, scale_dtype, scheme)
    wanted = {e.suffix: (e.dtype, e.shape) for e in layout.entries}
    have = {suffix: (t.dtype, t.shape) for suffix, t in found.items()}
    if wanted != have:
        odd = next(s for s in sorted(wanted.keys() | have.keys()) if wanted.get(s) != have.get(s))
        raise CheckpointError(
            f"{name + '.' + odd!r} is {_text(have.get(odd))}, "
            f"{scheme.name} has {_text(wanted.get(odd))}"
        )
    if scheme.scale == "weight" and scale_dtype not in FLOATS:
        raise CheckpointError(f"{name + '.weight_scale'!r} is {scale_dtype}, not a float")
    return Module(name, found, rows, cols, layout)


def _text(entry: tuple[str, tuple[int, ...]] | None) -> str:
    return "absent" if entry is None else f"{entry[0]} {list(entry[1])}"


def _check_scales(
    checkpoint: Checkpoint, scheme: Scheme, modules: list[Module], report: Report
) -> None:
    family = Family(checkpoint.config)
    shared: dict[tuple[str, str], tuple[str, float]] = {}
    for m in modules:
        scale = _read(checkpoint, m.tensors["weight_scale"])
        if scheme.scale == "e8m0":
            good = scale != 255
        else:
            value = scale.astype(np.float32)
            good = np.isfinite(value) & (value > 0)
        if not good.all():
            row, col = np.argwhere(~good)[0]
            report.failures.append(
                f"{m.name + '.weight_scale'!r} is {scale[row, col]} at row {row}, column {col}: "
                "scales must be finite and above zero"
            )
        for suffix in ("weight_global_scale", "input_global_scale"):
            if suffix in m.tensors:
                constant = float(_read(checkpoint, m.tensors[suffix])[0])
                if not 0 < constant < inf:
                    report.failures.append(f"{m.name + '.' + suffix!r} is {constant}")
        if scheme.two_level and (found := family.group_of(m.name)):
            g = float(_read(checkpoint, m.tensors["weight_global_scale"])[0])
            key = (found[0], found[1].members[0])
            first = shared.setdefault(key, (m.name, g))
            if first[1] != g:
                report.failures.append(
                    f"{m.name!r} has weight_global_scale {g:g}, {first[0]!r} has {first[1]:g}, "
                    f"but loaders fuse them ({found[1].name})"
                )


# --- against the source -----------------------------------------------------------------


def _compare(
    out: Checkpoint,
    source: Checkpoint,
    scheme: Scheme,
    modules: list[Module],
    workers: int,
    progress: Progress | None,
    report: Report,
) -> None:
    quantized = {m.name + ".weight": m for m in modules}
    parts = {t.name for m in modules for t in m.tensors.values()}
    report.failures += [f"{n!r} is not in the output" for n in source.tensors
                        if n not in out.tensors and n not in quantized]  # fmt: skip
    report.failures += [f"{n!r} is not in the source" for n in out.tensors
                        if n not in source.tensors and n not in parts]  # fmt: skip

    def one(t: TensorInfo) -> tuple[str, str | None, float, float]:
        if t.name in quantized:
            failure, signal, noise = _compare_weight(out, source, t, quantized[t.name], scheme)
        else:
            failure, signal, noise = _compare_copy(out, source, t), 0.0, 0.0
        if progress:
            progress(t.nbytes, t.name)
        return t.name, failure, signal, noise

    todo = [t for t in source.tensors.values() if t.name in quantized or t.name in out.tensors]
    with ThreadPoolExecutor(workers) as pool:
        for name, failure, signal, noise in pool.map(one, todo):
            if failure:
                report.failures.append(failure)
            if name in quantized:
                report.sqnr[name] = _decibel(signal, noise)
                report.signal += signal
                report.noise += noise


def _compare_copy(out: Checkpoint, source: Checkpoint, t: TensorInfo) -> str | None:
    u = out.tensors[t.name]
    if (u.dtype, u.shape) != (t.dtype, t.shape):
        return (
            f"{t.name!r} is {_text((u.dtype, u.shape))}, the source has {_text((t.dtype, t.shape))}"
        )
    for at in range(0, t.nbytes, 1 << 20):
        n = min(1 << 20, t.nbytes - at)
        if _bytes(out, u, at, n) != _bytes(source, t, at, n):
            return f"{t.name!r} differs from the source within bytes {at} to {at + n}"
    return None


def _compare_weight(
    out: Checkpoint, source: Checkpoint, t: TensorInfo, m: Module, scheme: Scheme
) -> tuple[str | None, float, float]:
    """The first element out of bounds, and the energies of signal and error."""
    if t.shape != (m.rows, m.cols):
        return f"{t.name!r} has shape {list(t.shape)} in the source, {[m.rows, m.cols]} here", 0, 0
    signal = noise = 0.0
    failure = None
    for first, rows in _slabs(m, t):
        dtype = DTYPES[t.dtype].numpy
        raw = _bytes(source, t, first * m.cols * dtype.itemsize, rows * m.cols * dtype.itemsize)  # type: ignore[union-attr]
        w = np.frombuffer(raw, dtype).reshape(rows, m.cols).astype(np.float32)
        q = _unpack(out, m, scheme, first, rows)
        error = w - dequantize(q, scheme)
        signal += float(np.square(w, dtype=np.float64).sum())
        noise += float(np.square(error, dtype=np.float64).sum())
        bad = _out_of_bounds(w, q, scheme)
        if failure is None and bad.any():
            row, col = np.argwhere(bad)[0]
            failure = (
                f"{t.name!r} at row {first + row}, column {col}: {w[row, col]:g} became "
                f"{w[row, col] - error[row, col]:g}, more than half a code step away"
            )
    return failure, signal, noise


def _slabs(m: Module, t: TensorInfo) -> Iterator[tuple[int, int]]:
    step = slab_rows(m.layout, m.cols * DTYPES[t.dtype].itemsize)
    for first in range(0, m.rows, step):
        yield first, min(step, m.rows - first)


def _unpack(out: Checkpoint, m: Module, scheme: Scheme, first: int, rows: int) -> Quantized:
    arrays: dict[str, Array] = {}
    for e in m.layout.entries:
        t = m.tensors[e.suffix]
        if e.role == "global_scale":
            arrays[e.role] = _read(out, t)
        elif e.rows:
            start = first // e.rows * e.nbytes
            n = -(-rows // e.rows)
            stop = min(start + n * e.nbytes, t.nbytes)
            data = np.frombuffer(_bytes(out, t, start, stop - start), DTYPES[t.dtype].numpy)
            arrays[e.role] = data.reshape(-1, e.shape[1])
    if "codes" in arrays and m.layout.packing.kind != "bytes":
        arrays["codes"] = arrays["codes"].view(np.uint8)
    return fmt.unpack(arrays, scheme, m.cols)


def _out_of_bounds(w: Array, q: Quantized, scheme: Scheme) -> Array:
    """Where a weight is further from its code than half the step to the next one.

    Outside the range of codes anything is allowed, that is what clipping means. The
    slack is the half ulp of a bf16 quotient, which ``--numerics weight`` rounds to.
    """
    one = Quantized(np.ones_like(q.codes), q.scale, None, q.global_scale)
    if scheme.element == "e2m1":
        one = Quantized(np.full_like(q.codes, 2), q.scale, None, q.global_scale)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        x = w / dequantize(one, scheme)
    if scheme.element == "int":
        zero = (
            0.0
            if q.zero_point is None
            else spread(q.zero_point.astype(np.float32), scheme, w.shape)
        )
        lo, hi = scheme.code_range
        x = x + zero
        code = q.codes.astype(np.float32)
        low = np.where(q.codes <= lo, -np.inf, code - 0.5)
        high = np.where(q.codes >= hi, np.inf, code + 0.5)
        slack = 2.0**-8 * (np.abs(x) + np.abs(zero))
        return np.asarray(~((x >= low - slack) & (x <= high + slack)))
    values = (
        E2M1_VALUES
        if scheme.element == "e2m1"
        else np.arange(127, dtype=np.uint8).view(E4M3).astype(np.float32)
    )
    sign_bit = 8 if scheme.element == "e2m1" else 128
    codes = q.codes.view(np.uint8)
    index = codes & (sign_bit - 1)
    nan = index >= len(values)
    index = np.minimum(index, len(values) - 1)
    middle = (values[1:] + values[:-1]) / 2
    a = np.where(codes & sign_bit, -x, x)
    low = np.concatenate(([-middle[0]], middle))[index]
    high = np.concatenate((middle, [np.inf]))[index]
    slack = 2.0**-8 * np.abs(x)
    return np.asarray(nan | ~((a >= low - slack) & (a <= high + slack)))


def _decibel(signal: float, noise: float) -> float:
    if noise == 0:
        return inf
    return 10 * log10(signal / noise) if signal and noise < inf else -inf


def _bytes(c: Checkpoint, t: TensorInfo, at: int, n: int) -> bytes:
    buffer = bytearray(n)
    c.pread(t.file, t.start + at, memoryview(buffer))
    return bytes(buffer)


def _read(c: Checkpoint, t: TensorInfo) -> Array:
    """A whole small tensor."""
    return np.frombuffer(_bytes(c, t, 0, t.nbytes), DTYPES[t.dtype].numpy).reshape(t.shape)
