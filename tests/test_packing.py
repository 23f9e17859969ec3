"""Packed codes are those of the reference, of AWQ and of GPTQ, and come back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from streamq.kernels import reference
from streamq.kernels.cpu import packing

from streamq.schemes import Packing

AWQ = (0, 2, 4, 6, 1, 3, 5, 7)
SEEDS = st.integers(0, 2**32)
EDGES = st.sampled_from([1, 2, 15, 16, 17, 33])  # around the sizes of a tile, in words


def int_codes(rng, shape, bits):
    half = 1 << (bits - 1)
    return rng.integers(-half, half, shape, np.int8, endpoint=False)


def equal(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@given(st.integers(1, 5), st.integers(1, 150), SEEDS)
def test_nibbles_are_those_of_the_reference(rows, cols, seed):
    codes = np.random.default_rng(seed).integers(0, 16, (rows, cols), np.uint8)
    kind = Packing("nibbles", 4)
    packed = packing.pack_nibbles(codes)
    assert equal(packed, reference.pack(codes, kind))
    assert equal(packing.unpack_nibbles(packed, cols), codes)


@given(st.integers(2, 8), st.integers(1, 5), st.integers(1, 150), SEEDS)
def test_words_are_those_of_the_reference(bits, rows, cols, seed):
    rng = np.random.default_rng(seed)
    codes, offset = int_codes(rng, (rows, cols), bits), 1 << (bits - 1)
    kind = Packing("words", bits)
    packed = packing.pack_words(codes, bits, offset)
    assert equal(packed, reference.pack(codes, kind))
    assert equal(packing.unpack_words(packed, bits, cols, offset), codes)
    packed = rng.integers(0, 256, packed.shape, np.uint8)  # padding of any bits
    wanted = reference.unpack(packed, kind, cols, signed=True)
    assert equal(packing.unpack_words(packed, bits, cols, offset), wanted)


def words_of(codes, bits, offset, order):
    """uint32 ``[n]`` of codes ``[n, codes a word]``, one code after the other."""
    words = [0] * len(codes)
    for w, row in enumerate(codes.tolist()):
        for place, which in enumerate(order):
            words[w] |= (row[which] + offset) % (1 << bits) << (place * bits)
    return np.array(words, np.uint32)


@pytest.mark.parametrize("bits", [2, 4, 8])
@given(words=EDGES, width=st.sampled_from([1, 3, 255, 257]), seed=SEEDS, data=st.data())
def test_columns_are_packed_in_order(bits, words, width, seed, data):
    per, rng = 32 // bits, np.random.default_rng(seed)
    orders = [None, rng.permutation(per).tolist()] + ([AWQ] if bits == 4 else [])
    order, offset = data.draw(st.sampled_from(orders)), data.draw(st.integers(0, 1 << (bits - 1)))
    codes = (int_codes(rng, (words * per, width), bits).view(np.uint8) + (1 << (bits - 1))
             - offset).astype(np.uint8).view(np.int8)  # fmt: skip
    packed = packing.pack_columns(codes, bits, offset, order)
    assert packed.shape == (width, words)
    c = seed % width
    assert equal(packed[c], words_of(codes[:, c].reshape(-1, per), bits, offset,
                                     order or range(per)))  # fmt: skip
    assert equal(packing.unpack_columns(packed, bits, offset, order), codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
@given(words=st.sampled_from([1, 3, 255, 257]), rows=EDGES, seed=SEEDS)
def test_rows_are_packed_and_transposed(bits, words, rows, seed):
    per, offset = 32 // bits, 1 << (bits - 1)
    codes = int_codes(np.random.default_rng(seed), (rows, words * per), bits)
    packed = packing.pack_rows_transposed(codes, bits, offset)
    assert packed.shape == (words, rows)
    r = seed % rows
    wanted = words_of(codes[r].reshape(-1, per), bits, offset, range(per))
    assert equal(np.ascontiguousarray(packed[:, r]), wanted)
    assert equal(packing.unpack_rows_transposed(packed, bits, offset), codes)


def test_awq_has_the_even_codes_first():
    """A word of AutoAWQ's GEMM layout, written out."""
    codes = np.arange(8, dtype=np.int8).reshape(8, 1)
    assert packing.pack_columns(codes, 4, 0, AWQ)[0, 0] == 0x75316420


def test_buffers_that_are_handed_in_are_written():
    codes = int_codes(np.random.default_rng(0), (16, 24), 4)
    out = np.zeros((24, 2), np.uint32)
    assert packing.pack_columns(codes, 4, 8, AWQ, out) is out
    back = np.zeros_like(codes)
    assert packing.unpack_columns(out, 4, 8, AWQ, back) is back
    assert equal(back, codes)
    out = np.zeros((3, 16), np.uint32)
    assert packing.pack_rows_transposed(codes, 4, 8, out) is out
    assert equal(packing.unpack_rows_transposed(out, 4, 8, back), codes)
    out = np.zeros((16, 12), np.uint8)
    assert packing.pack_words(codes, 4, 8, out) is out
    assert packing.unpack_words(out, 4, 24, 8, back) is back
    assert equal(packing.pack_nibbles(codes.view(np.uint8), out), out)


@pytest.mark.parametrize("pack", [packing.pack_columns, packing.pack_rows_transposed])
def test_words_that_would_not_be_full_are_refused(pack):
    with pytest.raises(AssertionError, match="whole words"):
        pack(np.zeros((12, 12), np.int8), 4, 8)
