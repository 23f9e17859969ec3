"""Values of codes, as a loader computes them: ``(code - zero) * scale``, in f32."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from streamq.schemes import Packing, Quantized, Scheme

from .bits import e2m1_value, e4m3_signed_value, e8m0_value, load, store
from .packing import load_code, width_and_offset
from .tiles import KINDS, SMALL_EACH, SMALL_TILE, cover, launch, place, raw

#: How kernels name scales of one byte, beside KINDS.
E4M3 = tl.constexpr(4)
E8M0 = tl.constexpr(5)

#: Columns of a tile, at most.
COLUMNS = 1024


def dequantize(q: Quantized, scheme: Scheme, packing: Packing, out: Any) -> None:
    """Values of codes, packed as said, rounded to the dtype of ``out [rows, cols]``."""
    rows, cols = out.shape
    columns = min(cols, COLUMNS)
    tiles = cover(rows, triton.cdiv(cols, COLUMNS), columns, SMALL_TILE, SMALL_EACH)
    args, constants = operands(q, scheme, packing, rows, cols)
    launch(values, tiles, *args, raw(out), cols, OUT=KINDS[out.dtype], **constants)


def operands(
    q: Quantized, scheme: Scheme, packing: Packing, rows: int, cols: int
) -> tuple[list[Any], dict[str, Any]]:
    """What ``code_and_scale`` takes: tensors and numbers, and what is compiled in."""
    height, width = scheme.block_of(rows, cols)
    bits, offset = width_and_offset(packing)
    scale, bias = q.scale, q.bias
    global_scale: Any = q.global_scale
    one_byte = {"e4m3": E4M3.value, "e8m0": E8M0.value}
    args = [
        raw(q.codes), raw(scale), q.zero_point, None if bias is None else raw(bias), global_scale,
        q.codes.shape[1], scale.shape[1], 1 if len(scale) == rows else height,
        0 if global_scale is None or global_scale.numel() == 1 else 1,
    ]  # fmt: skip
    constants = {
        "ELEMENT": scheme.element,
        "SCALE": one_byte.get(scheme.scale) or KINDS[scale.dtype],
        "BIAS": 0 if bias is None else KINDS[bias.dtype],
        "WIDTH": width if scale.shape[1] > 1 else 0,
        "BITS": bits,
        "SIGNED": packing.kind == "bytes",
        # Codes count from 0 where there is a bias.
        "OFFSET": offset - (1 << (scheme.bits - 1)) * (bias is not None),
    }
    return args, constants


@triton.jit
def code_and_scale(
    codes, scale, zero, g, row_bytes, scales, height, g_step, row, valid, col, inside,
    ELEMENT: tl.constexpr, SCALE: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr,
    SIGNED: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Codes less zero points, and scales over global scales, f32 ``[N, W]``, and the blocks.

    ``row`` int64 ``[N]``, of which those ``valid`` exist, ``col`` int32 ``[N, W]``, of which those
    ``inside``. ``g_step``: 1 for a global scale of each row, 0 for one. WIDTH columns share a
    scale, 0 for whole rows. SIGNED codes are int8, others count from 0; OFFSET is taken off.
    """
    code = load_code(codes + (row * row_bytes)[:, None], col, inside, BITS)
    if ELEMENT == "e2m1":
        v = e2m1_value(code)
    elif ELEMENT == "e4m3":
        v = e4m3_signed_value(code)
    elif SIGNED:
        v = code.to(tl.uint8).to(tl.int8, bitcast=True).to(tl.float32) - OFFSET
    else:
        v = code.to(tl.float32) - OFFSET
    block = (row // height * scales)[:, None] + (col // WIDTH if WIDTH else col * 0)
    if SCALE == E4M3:
        s = e4m3_signed_value(tl.load(scale + block, mask=inside, other=0).to(tl.uint32))
    elif SCALE == E8M0:
        s = e8m0_value(tl.load(scale + block, mask=inside, other=0).to(tl.uint32))
    else:
        s = load(scale + block, inside, SCALE)
    if g is not None:
        s = tl.div_rn(s, tl.load(g + row * g_step, mask=valid, other=1.0)[:, None])
    if zero is not None:
        v = v - tl.load(zero + block, mask=inside, other=0).to(tl.float32)
    return v, s, block


@triton.jit
def values(
    codes, scale, zero, bias, g, row_bytes, scales, height, g_step, out, cols, rows, blocks,
    across, ROWS: tl.constexpr, BLOCKS: tl.constexpr, W: tl.constexpr, ELEMENT: tl.constexpr,
    SCALE: tl.constexpr, BIAS: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr,
    SIGNED: tl.constexpr, OFFSET: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """Values into ``out [rows, cols]``. BIAS and OUT: dtypes."""
    row, block, valid = place(rows, blocks, across, ROWS, BLOCKS)
    col = (block.to(tl.int32) * W)[:, None] + tl.arange(0, W)[None, :]
    inside = valid[:, None] & (col < cols)
    v, s, where = code_and_scale(
        codes, scale, zero, g, row_bytes, scales, height, g_step, row, valid, col, inside,
        ELEMENT, SCALE, WIDTH, BITS, SIGNED, OFFSET,
    )  # fmt: skip
    v = v * s
    if bias is not None:
        v = v + load(bias + where, inside, BIAS)
    store(out + (row * cols)[:, None] + col, v, inside, OUT)
