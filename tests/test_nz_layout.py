"""FRACTAL_NZ: as its definition says, whole and by blocks of rows, and back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamq.errors import PlanError
from streamq.nz import Layout, from_nz, to_nz
from streamq.nz.layout import from_nz_slow, to_nz_slow

BITS = st.sampled_from([4, 8, 16, 32])
SEEDS = st.integers(0, 2**32)


def matrix(rows, cols, bits, seed):
    """Elements of random bits, those of 4 in pairs: ``[rows, cols]``, columns made even."""
    rng = np.random.default_rng(seed)
    if bits == 4:
        return rng.integers(0, 256, (rows, (cols + 1) // 2), np.uint8), cols + cols % 2
    return rng.integers(0, 1 << bits, (rows, cols), f"u{bits // 8}"), cols


def equal(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@given(st.integers(1, 150), st.integers(1, 150), BITS, st.booleans(), SEEDS)
def test_layout_is_the_definition_and_comes_back(rows, cols, bits, transpose, seed):
    x, cols = matrix(rows, cols, bits, seed)
    nz = to_nz(x, bits=bits, transpose=transpose)
    assert equal(nz, to_nz_slow(x, bits=bits, transpose=transpose))
    assert nz.nbytes == Layout(rows, cols, bits, transpose).nbytes
    assert equal(from_nz(nz, rows, cols, bits=bits, transpose=transpose), x)
    assert equal(from_nz_slow(nz, rows, cols, bits=bits, transpose=transpose), x)


@given(st.integers(1, 150), st.integers(1, 150), BITS, st.booleans(), SEEDS, st.data())
def test_blocks_of_rows_make_the_whole(rows, cols, bits, transpose, seed, data):
    x, cols = matrix(rows, cols, bits, seed)
    layout = Layout(rows, cols, bits, transpose)
    whole = to_nz(x, bits=bits, transpose=transpose).reshape(-1).view(np.uint8)
    filled, written = np.full((2, layout.nbytes), 77, np.uint8)
    times, first = np.zeros(layout.nbytes, int), 0
    while first < rows:
        block = x[first : first + layout.step * data.draw(st.integers(1, 40))]
        for at, piece in layout.pieces(block, first):
            written[at : at + len(piece)] = piece
            times[at : at + len(piece)] += 1
        first += len(block)
    assert equal(written, whole)
    assert (times == 1).all()
    first = 0
    while first < rows:
        block = x[first : first + data.draw(st.integers(1, 40))]
        layout.fill(filled, block, first)
        assert equal(layout.take(filled, first, len(block)), block.view(np.uint8))
        first += len(block)
    assert equal(filled, whole)


@pytest.mark.parametrize("dtype", [np.int8, np.float16, np.float32])
def test_dtypes_are_kept(dtype):
    x = np.arange(-48, 48).reshape(3, 32).astype(dtype)
    nz = to_nz(x)
    assert nz.dtype == dtype
    assert nz.shape == (32 * x.itemsize // 32, 1, 16, 32 // x.itemsize)
    assert equal(from_nz(nz, 3, 32), x)


def test_a_fractal_by_hand():
    """Element (row, col) of int8 lies at fractal (col / 32, row / 16), line, column."""
    x = np.arange(40 * 70, dtype=np.int16).astype(np.int8).reshape(40, 70)
    nz = to_nz(x)
    assert nz.shape == (3, 3, 16, 32)
    assert all(
        nz[c // 32, r // 16, r % 16, c % 32] == x[r, c] for r in (0, 17, 39) for c in (5, 69)
    )
    assert not nz[2, :, :, 6:].any()
    assert not nz[:, 2, 8:].any()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Layout(2, 2, 6), "not 6"),
        (lambda: Layout(0, 2), "empty matrix"),
        (lambda: Layout(2, 3, 4), "3 columns are odd"),
        (lambda: to_nz(np.zeros((2, 2), np.int8), bits=16), "16 bits do not lie"),
        (lambda: from_nz(np.zeros((1, 1, 16, 32), np.int8), 17, 2), "1024 bytes in NZ, not 512"),
        (lambda: list(Layout(64, 2, 8, True).pieces(np.zeros((3, 2), np.int8), 0)), "multiples of"),
        (lambda: list(Layout(64, 2).pieces(np.zeros((3, 2), np.int8), 62)), "not all in 64 rows"),
        (lambda: list(Layout(64, 2).pieces(np.zeros((3, 3), np.int8), 0)), "a row has 3 bytes"),
    ],
)
def test_what_is_no_layout_is_refused(call, said):
    with pytest.raises(PlanError, match=said):
        call()
