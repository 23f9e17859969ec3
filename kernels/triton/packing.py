"""Codes of a few bits each: packed as they are stored, and read where they lie packed."""

from __future__ import annotations

import triton
import triton.language as tl

from streamq.schemes import Packing


def width_and_offset(packing: Packing) -> tuple[int, int]:
    """Bits that a code takes, and what is added to it: offset binary in words."""
    if packing.kind == "bytes":
        return 8, 0
    return packing.bits, 1 << (packing.bits - 1) if packing.kind == "words" else 0


@triton.jit
def store_codes(
    codes, at, count, valid,
    N: tl.constexpr, W: tl.constexpr, EXACT: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Store ``codes`` uint32 ``[N, W]`` of BITS each, least significant first.

    ``at``: pointers to the first byte of each of the N blocks that are ``valid``. Without
    EXACT only ``count`` codes of a block are stored, and the others are 0.
    """
    if BITS == 8:
        lane = tl.arange(0, W)[None, :]
        mask = valid[:, None]
        if not EXACT:
            mask = mask & (lane < count[:, None])
        tl.store(at[:, None] + lane, codes.to(tl.uint8), mask=mask)
    elif BITS == 4 or BITS == 2:
        PER: tl.constexpr = 8 // BITS
        lane = tl.arange(0, W // PER)[None, :]
        shift = (tl.arange(0, PER) * BITS)[None, None, :]
        packed = tl.sum(tl.reshape(codes, (N, W // PER, PER)) << shift, axis=2)
        mask = valid[:, None]
        if not EXACT:
            mask = mask & (lane * PER < count[:, None])
        tl.store(at[:, None] + lane, packed.to(tl.uint8), mask=mask)
    else:
        # Eight codes are BITS whole bytes, in one integer of 64 bits.
        lane = tl.arange(0, W // 8)[None, :, None] * BITS
        byte = tl.arange(0, 8)[None, None, :]
        wide = tl.reshape(codes.to(tl.uint64), (N, W // 8, 8))
        eight = tl.sum(wide << (byte * BITS), axis=2)
        mask = valid[:, None, None] & (byte < BITS)
        if not EXACT:
            mask = mask & ((lane + byte) * 8 < count[:, None, None] * BITS)
        data = tl.expand_dims(eight, 2) >> (byte * 8)
        tl.store(at[:, None, None] + lane + byte, data.to(tl.uint8), mask=mask)


@triton.jit
def load_code(at, i, mask, BITS: tl.constexpr):
    """Code number ``i``, of BITS, of a row that begins ``at`` a pointer; uint32."""
    bit = i * BITS
    byte, shift = bit >> 3, (bit & 7).to(tl.uint32)
    code = tl.load(at + byte, mask=mask, other=0).to(tl.uint32)
    if BITS == 3 or (BITS >= 5 and BITS < 8):  # may end in the next byte, which the row then has
        there = mask & (shift + BITS > 8)
        code = code | (tl.load(at + byte + 1, mask=there, other=0).to(tl.uint32) << 8)
    return (code >> shift) & ((1 << BITS) - 1)
