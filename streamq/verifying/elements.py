"""Every element of an output against the checkpoint it was made from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from math import lcm, prod

import ml_dtypes
import numpy as np

from streamq.checkpoint import Checkpoint
from streamq.errors import CheckpointError
from streamq.families import Family
from streamq.formats import Format
from streamq.kernels.reference import E2M1_VALUES, E4M3, dequantize, spread
from streamq.kernels.reference import group as reference_group
from streamq.planning import slab_rows, straight, transposed, weights_in
from streamq.schemes import Quantized, Scheme
from streamq.stored import SLAB, Array, Stored, Where, bytes_of, read_rows, slabs, text_of
from streamq.tensors import DTYPES, FLOATS, TensorInfo, stack_of
from streamq.views import View

from .report import Report

Progress = Callable[[int, str], None]


def compare(
    out: Checkpoint,
    source: Checkpoint,
    family: Family,
    weights: list[Stored],
    fmt: Format,
    workers: int,
    progress: Progress | None,
    report: Report,
) -> None:
    """Compare every tensor of ``source``; failures and SQNR go into ``report``."""
    # What is there under its own name was copied whole, whatever it holds.
    origins, tensors = weights_in(source, family, fmt, out.tensors.keys())
    quantized = {s.name: s for s in weights}
    parts = {t.name for s in weights for t in s.tensors.values()}
    todo, known = [], set()
    for t in tensors:
        name = stack_of(t.name) or t.name
        known.add(name)
        if t.name in quantized or name in out.tensors:
            todo.append(t)
        else:
            report.failures.append(f"{name!r} is not in the output")
    report.failures += [f"{n!r} is not in the source" for n in out.tensors
                        if n not in known and n not in parts]  # fmt: skip

    def one(t: TensorInfo) -> tuple[str, str | None, float, float]:
        try:
            return looked_at(t)
        except CheckpointError as e:
            return t.name, str(e), 0, 0

    def looked_at(t: TensorInfo) -> tuple[str, str | None, float, float]:
        origin = origins.get(t.name)
        signal = noise = 0.0
        if t.name in quantized:
            failure, signal, noise = _compare_weight(out, source, t, origin, quantized[t.name])
        elif isinstance(origin, Stored):
            failure = _compare_values(out, source, origin)
        elif isinstance(origin, View) and not stack_of(t.name):
            failure = _compare_view(out, source, t, origin)
        elif origin is None and stack_of(t.name):
            failure = _compare_copy(source, t, out, _of_stack(out, t.name))
        else:
            copied = origin.tensors[0] if origin else t
            failure = _compare_copy(source, copied, out, out.tensors[copied.name])
        if progress:
            progress(origin.nbytes if origin else t.nbytes, t.name)
        return t.name, failure, signal, noise

    with ThreadPoolExecutor(workers) as pool:
        for name, failure, signal, noise in pool.map(one, todo):
            if failure:
                report.failures.append(failure)
            if name in quantized:
                report.quality.add(name, signal, noise)


def _of_stack(out: Checkpoint, name: str) -> TensorInfo:
    """One of the equal parts that a tensor holds."""
    stack = out.tensors[stack_of(name) or name]
    part = stack._replace(name=name, shape=stack.shape[1:])
    return part._replace(start=stack.start + int(name[name.rindex("#") + 1 : -1]) * part.nbytes)


def _compare_copy(source: Checkpoint, t: TensorInfo, out: Checkpoint, u: TensorInfo) -> str | None:
    if (u.dtype, u.shape) != (t.dtype, t.shape):
        found, wanted = text_of((u.dtype, u.shape)), text_of((t.dtype, t.shape))
        return f"{t.name!r} is {found}, the source has {wanted}"
    for at in range(0, t.nbytes, 1 << 20):
        n = min(1 << 20, t.nbytes - at)
        if bytes_of(out, u, at, n) != bytes_of(source, t, at, n):
            return f"{t.name!r} differs from the source within bytes {at} to {at + n}"
    return None


def _compare_view(out: Checkpoint, source: Checkpoint, t: TensorInfo, v: View) -> str | None:
    """Whether a tensor holds what lies in a larger one of the source."""
    u = out.tensors[t.name]
    if (u.dtype, u.shape) != (t.dtype, t.shape):
        found, wanted = text_of((u.dtype, u.shape)), text_of((t.dtype, t.shape))
        return f"{t.name!r} is {found}, the source has {wanted}"
    width = v.cols * DTYPES[t.dtype].itemsize
    height = slab_rows(1, width, SLAB)
    for first in range(0, v.rows, height):
        n = min(height, v.rows - first)
        if bytes_of(out, u, first * width, n * width) != v.read(source, first, n).tobytes():
            return f"{t.name!r} differs from the source within rows {first} to {first + n}"
    return None


def _compare_values(out: Checkpoint, source: Checkpoint, s: Stored) -> str | None:
    """Whether a float tensor holds what the codes of the source stand for."""
    stack = stack_of(s.name)
    u = out.tensors[stack or s.name]
    dtype = DTYPES[u.dtype].numpy
    if u.dtype not in FLOATS or dtype is None or u.shape[-1] * u.shape[-2] != prod(s.shape):
        return f"{u.name!r} is {text_of((u.dtype, u.shape))}, the source has {list(s.shape)}"
    view = (transposed if s.format.stacks else straight)(u)[s.name] if stack else None
    for first, rows in slabs(s):
        with np.errstate(over="ignore"):
            w = dequantize(read_rows(source, s, first, rows), s.scheme).astype(dtype)
        if view is not None:
            v = view.read(out, first, rows)
        else:
            width = s.layout.cols * dtype.itemsize
            v = np.frombuffer(bytes_of(out, u, first * width, rows * width), dtype).reshape(w.shape)
        if w.tobytes() != v.tobytes():
            row, col = np.argwhere(w != v)[0] if (w != v).any() else (0, 0)
            return (
                f"{s.name!r} at row {first + row}, column {col} is {v[row, col]}, the codes of "
                f"the source stand for {w[row, col]}"
            )
    return None


def _compare_weight(
    out: Checkpoint, source: Checkpoint, t: TensorInfo, origin: Where | None, s: Stored
) -> tuple[str | None, float, float]:
    """The first element out of bounds, and the energies of signal and error."""
    dtype, scheme = DTYPES[t.dtype].numpy, s.scheme
    if t.shape != s.shape or t.dtype not in FLOATS or dtype is None:
        found, wanted = text_of((t.dtype, t.shape)), list(s.shape)
        return f"{t.name!r} is {found} in the source, not a float of shape {wanted}", 0, 0
    signal = noise = 0.0
    failure = None
    ulp = float(ml_dtypes.finfo(dtype).eps) / 2 + 2.0**-22
    if isinstance(origin, Stored):  # a repacked scale may be rounded to f16 or bf16
        ulp += 2.0**-8
    cols = s.layout.cols
    for first, rows in _slabs(s, t, origin):
        if origin is not None and not isinstance(origin, Stored):
            w = origin.read(source, first, rows).astype(np.float32)
        elif origin is not None:
            w = dequantize(read_rows(source, origin, first, rows), origin.scheme)
        else:
            at = first * cols * dtype.itemsize
            raw = bytes_of(source, t, at, rows * cols * dtype.itemsize)
            w = np.frombuffer(raw, dtype).reshape(rows, cols).astype(np.float32)
        q = read_rows(out, s, first, rows)
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            error = w - dequantize(q, scheme)
        signal += float(np.square(w, dtype=np.float64).sum())
        noise += float(np.square(error, dtype=np.float64).sum())
        bad = _out_of_bounds(w, q, scheme, ulp)
        if failure is None and bad.any():
            row, col = np.argwhere(bad)[0]
            failure = (
                f"{t.name!r} at row {first + row}, column {col}: {w[row, col]:g} became "
                f"{w[row, col] - error[row, col]:g}, more than half a code step away"
            )
    return failure, signal, noise


def _slabs(s: Stored, t: TensorInfo, origin: Where | None) -> Iterator[tuple[int, int]]:
    step = lcm(s.row_step, origin.row_step if origin else 1)
    height = slab_rows(step, s.layout.cols * DTYPES[t.dtype].itemsize, SLAB if origin else 1 << 20)
    for first in range(0, s.layout.rows, height):
        yield first, min(height, s.layout.rows - first)


def _out_of_bounds(w: Array, q: Quantized, scheme: Scheme, ulp: float) -> Array:
    """Where a weight is further from its code than half the step to the next one.

    Outside the range of codes anything is allowed, that is what clipping means. ``ulp`` is
    the relative error of one rounding to the weight's dtype: ``--numerics weight`` rounds
    the quotient so, and the sum with the zero point again.
    """
    if scheme.inverse:
        return _out_of_group_bounds(w, q, scheme)
    unit = 2 if scheme.element == "e2m1" else 1  # the code of 1.0
    one = Quantized(np.full_like(q.codes, unit), q.scale, None, q.global_scale)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        x = w / dequantize(one, scheme)
    if scheme.element == "int":
        slack = ulp * np.abs(x)
        if q.zero_point is not None:
            x = x + spread(q.zero_point.astype(np.float32), scheme, w.shape)
            slack += ulp * np.abs(x)
        lo, hi = scheme.code_range
        code = q.codes.astype(np.float32)
        low = np.where(q.codes <= lo, -np.inf, code - 0.5)
        high = np.where(q.codes >= hi, np.inf, code + 0.5)
        return np.asarray(~((x >= low - slack) & (x <= high + slack)))
    values = E2M1_VALUES
    if scheme.element == "e4m3":
        values = np.arange(127, dtype=np.uint8).view(E4M3).astype(np.float32)
    sign_bit = 8 if scheme.element == "e2m1" else 128
    codes = q.codes.view(np.uint8)
    index = codes & (sign_bit - 1)
    nan = index >= len(values)
    index = np.minimum(index, len(values) - 1)
    middle = (values[1:] + values[:-1]) / 2
    a = np.where(codes & sign_bit, -x, x)
    low = np.concatenate(([-middle[0]], middle))[index]
    high = np.concatenate((middle, [np.inf]))[index]
    slack = ulp * np.abs(x)
    return np.asarray(nan | ~((a >= low - slack) & (a <= high + slack)))


def _out_of_group_bounds(w: Array, q: Quantized, scheme: Scheme) -> Array:
    """Where a weight times the inverse scale is not within half a step of its code.

    Nothing is clipped, because scale and minimum are those of the very group.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        code = q.codes.astype(np.float32)
        if q.bias is not None:
            w = w - reference_group.spread(q.bias, scheme, w.shape)
            code += np.float32(1 << (scheme.bits - 1))
        x = w * reference_group.spread(q.scale, scheme, w.shape)
        # The roundings of the difference and of the product.
        return np.asarray(~(np.abs(x - code) <= 0.5 + np.float32(2.0**-22) * np.abs(x)))
