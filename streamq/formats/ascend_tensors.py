"""Where the tensors of a weight lie in Ascend's checkpoints, and codes of four bits in them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np

from streamq.errors import CheckpointError
from streamq.schemes import ALL, Packing, Quantized, Scheme
from streamq.tensors import DTYPES, FLOATS, TensorInfo

from .base import Array, scale_tag
from .layout import Entry, Layout, Role, make_layout, rows_entry

#: What sums in f32 of some 4,096 values may be off by, relative to the largest that they can be.
_SLACK = np.float32(2.0**-12)


def pairs_rows(scheme: Scheme) -> bool:
    """Whether a byte holds two rows of a column, the even row low, and not two columns of a row.

    msmodelslim packs ``[in, out]`` along ``out`` for W4A8_DYNAMIC and for W4A16 with groups, and
    ``[out, in]`` along ``in`` for W4A16 by row (``w4a8_pack_int4``, ``_w4a16_pack_int4``).
    """
    return scheme.name == "W4A8" or scheme.block[1] != ALL


@cache
def layout_of(rows: int, cols: int, dtype: str, scheme: Scheme, chunks: int) -> Layout:
    """The tensors of a weight; ``chunks``: the sums of each row, if it has them."""
    block = scheme.block_of(rows, cols)
    shape = scheme.scale_shape(rows, cols)
    scale = rows_entry("weight_scale", "scale", scale_tag(scheme, dtype), shape, 1)
    if scheme.element != "int":
        packing = Packing("nibbles", 4) if scheme.element == "e2m1" else Packing("bytes")
        tag, width = ("U8", cols // 2) if scheme.element == "e2m1" else ("F8_E4M3", cols)
        codes = rows_entry("weight", "codes", tag, (rows, width), 1)
        return make_layout(rows, cols, dtype, [codes, scale], block, packing)
    if scheme.bits == 8:
        codes = rows_entry("weight", "codes", "I8", (rows, cols), 1)
    elif pairs_rows(scheme):
        codes = rows_entry("weight", "codes", "I8", (rows // 2, cols), 2, direct=False)
    else:
        codes = rows_entry("weight", "codes", "I8", (rows, cols // 2), 1, direct=False)
    offset = rows_entry("weight_offset", "offset", "F32", shape, 1, direct=False)
    entries = [codes, scale, offset]
    if scheme.name == "W4A8":
        sums = rows_entry("scale_bias", "row_sum", "F32", (rows, chunks), 1, direct=False)
        entries.append(sums)
    return make_layout(rows, cols, dtype, entries, block)


@cache
def static_layout(rows: int, cols: int, dtype: str, scale_suffix: str) -> Layout:
    """The tensors of a weight of a static type, with or without a scale of its rows.

    ``scale_suffix``: ``weight_scale``, or ``deq_scale`` where there is no such tensor.
    """

    def column(suffix: str, role: Role, tag: str, *shape: int) -> Entry:
        return rows_entry(suffix, role, tag, shape, 1, direct=False)

    entries = [
        column("weight", "codes", "I8", rows, cols),
        column("quant_bias", "unused", "I32", rows),
        Entry("input_offset", "unused", "F32", (1,), 4),
    ]
    if scale_suffix == "weight_scale":
        entries += [
            column("weight_scale", "scale", dtype if dtype in FLOATS else "F32", rows, 1),
            column("weight_offset", "offset", "F32", rows, 1),
            column("deq_scale", "unused", "F32", rows),
            Entry("input_scale", "unused", "F32", (1,), 4),
        ]
    else:
        entries += [
            column("deq_scale", "scale", "F32", rows),
            Entry("input_scale", "global_scale", "F32", (1,), 4),
        ]
    return make_layout(rows, cols, dtype, entries, (1, cols))


def with_dtypes(
    layout: Layout, found: Mapping[str, TensorInfo], legal: Mapping[str, tuple[str, ...]]
) -> Layout:
    """A layout with the dtypes of the tensors that are there; ``legal`` by suffix or by role."""
    entries = []
    for e in layout.entries:
        t = found.get(e.suffix)
        if t is not None and t.dtype in legal.get(e.suffix, legal.get(e.role, ())):
            old, new = (DTYPES[tag].itemsize for tag in (e.dtype, t.dtype))
            e = e._replace(dtype=t.dtype, size=e.size // old * new, nbytes=e.nbytes // old * new)
        entries.append(e)
    return layout._replace(entries=tuple(entries), sizes=tuple(e.size for e in entries))


# --- codes of four bits -------------------------------------------------------------------


def signed(codes: Array, layout: Layout, scheme: Scheme) -> Array:
    """int8 ``[rows, cols]`` from bytes that hold two codes each, in two's complement."""
    raw = codes.view(np.int8)
    out = np.empty((raw.size * 2 // layout.cols, layout.cols), np.int8)
    halves = (out[0::2], out[1::2]) if pairs_rows(scheme) else (out[:, 0::2], out[:, 1::2])
    np.right_shift(np.left_shift(raw, 4), 4, out=halves[0])
    np.right_shift(raw, 4, out=halves[1])
    return out


def row_sum(q: Quantized, chunks: int) -> Array:
    """``scale_bias``, f32 ``[rows, chunks]``: 8 times the sum of the values of a part of a row.

    msmodelslim adds up f32 values in whatever order torch does (``on_w4a8_dynamic``); this is the
    f32 nearest to the true sum, as the sum of codes is exact.
    """
    codes = q.codes.reshape(len(q.codes), chunks, -1)
    sums = np.add.reduce(codes, axis=2, dtype=np.int32)
    values = 8.0 * sums * q.scale.astype(np.float64)
    return np.asarray(values, np.float32)


def refuse_other_sums(stored: Array, q: Quantized) -> None:
    """Raise CheckpointError for a ``scale_bias`` that is not that of the codes.

    Others add up f32 values, so that theirs differ by what the rounding of a sum can lose.
    """
    want = row_sum(q, stored.shape[1])
    largest = 64 * (q.codes.shape[1] // stored.shape[1]) * q.scale.astype(np.float32)
    wrong = ~(np.abs(stored - want) <= largest * _SLACK)
    if wrong.any():
        raise CheckpointError(
            f"scale_bias is {stored[wrong][0]:g} where it should be 8 times the sum of values, "
            f"{want[wrong][0]:g}."
        )
