"""The codecs of tiles: CANN's bytes, back again from any bytes, and damage refused."""

import hashlib
import json
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from streamq.errors import CheckpointError, PlanError
from streamq.nz import decode, encode, reference, zstd
from streamq.nz.codec import decode_tiles_of, encode_tiles_of
from streamq.nz.tables import rank
from streamq.nz.tiles import compress, decompress

GOLDEN = json.loads((Path(__file__).parent / "golden" / "nz_codec.json").read_text())["cases"]
MODES, DICTIONARIES = st.sampled_from(["low", "high"]), st.sampled_from(["call", "tile"])
SEEDS = st.integers(0, 2**32)
TILES = st.one_of(st.integers(1, 8), st.sampled_from([64, 126, 127])).map(lambda n: 512 * n)


def of_kind(kind, size, seed):
    """As ``about`` in the golden file says."""
    rng = np.random.default_rng(seed)
    if kind == "zeros":
        data = np.zeros(size)
    elif kind == "uniform":
        data = rng.integers(-128, 128, size)
    elif kind == "runs":
        data = np.repeat(rng.integers(-3, 4, size // 8 + 1), 8)[:size]
    else:
        bits, zeros = map(int, kind[1:].split("z"))
        most = 2 ** (bits - 1) - 1
        data = np.clip(np.round(rng.standard_normal(size) / 4 * most), -most, most)
        data[rng.random(size) < zeros / 100] = 0
    return data.astype(np.int8).view(np.uint8)


def digest(data):
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: f"{c['kind']}-{c['type']}-{c['tile_bytes']}")
@pytest.mark.parametrize("encoder", [encode, reference.encode])
def test_bytes_are_those_of_cann(case, encoder):
    data = of_kind(case["kind"], case["tile_bytes"] * case["tiles"], case["seed"])
    assert digest(data) == case["input_sha256"]
    stream, index = encoder(data, case["tile_bytes"], case["type"])
    assert index.hex() == case["index_hex"]
    assert stream.hex() == case.get("output_hex", stream.hex())
    assert (len(stream), digest(stream)) == (case["output_bytes"], case["output_sha256"])
    assert decode(stream, index, case["tile_bytes"]) == data.tobytes()


@st.composite
def narrow(draw):
    """Whole fractals of alphabets of every size, skewed or not, in runs or not."""
    rng = np.random.default_rng(draw(SEEDS))
    size = 512 * draw(st.one_of(st.integers(1, 40), st.just(300)))
    alphabet = rng.permutation(256).astype(np.uint8)[: draw(st.integers(1, 256))]
    skew, run = draw(st.integers(1, 12)), draw(st.sampled_from([1, 1, 2, 9, 70]))
    ranks = (rng.random(size // run + 1) ** skew * len(alphabet)).astype(int)
    return np.repeat(alphabet[ranks], run)[:size]


@given(narrow(), TILES, MODES, DICTIONARIES, st.sampled_from([1, 2]))
def test_any_bytes_come_back(data, tile, mode, dictionary, workers):
    stream, index = encode(data, tile, mode, dictionary, workers=workers)
    assert len(stream) <= len(data)
    assert len(index) == 8 * -(-len(data) // tile)
    assert decode(stream, index, tile, workers=workers) == data.tobytes()
    if dictionary == "call" and len(data) < 20_000:
        assert (stream, index) == reference.encode(data, tile, mode)


@given(st.lists(TILES, max_size=6), MODES, DICTIONARIES, SEEDS)
def test_tiles_of_several_sizes_come_back(sizes, mode, dictionary, seed):
    data = of_kind("g4z50", sum(sizes), seed)
    stream, index = encode_tiles_of(data, sizes, mode, dictionary)
    assert decode_tiles_of(stream, index, sizes) == data.tobytes()


def test_threads_change_nothing():
    data = of_kind("g4z50", 9 << 20, 0)
    once = encode(data, 32768, workers=1)
    assert encode(data, 32768, workers=3) == once
    assert decode(*once, 32768, workers=3) == data.tobytes()


def refused_or_bytes(stream, index, tile):
    """``decode`` ends with as many bytes as the index has tiles for, or with CheckpointError."""
    try:
        data = decode(stream, index, tile, workers=1)
    except CheckpointError:
        return None
    assert len(index) // 8 * tile >= len(data) > (len(index) // 8 - 1) * tile
    return data


@given(st.binary(max_size=2048), st.binary(max_size=40), TILES)
def test_random_streams_are_refused(stream, index, tile):
    refused_or_bytes(stream, index, tile)


@given(
    st.binary(min_size=128, max_size=4096), st.integers(1, 8), st.booleans(), st.integers(1, 127)
)
def test_random_packets_behind_good_headers_are_refused(noise, units, high, size):
    stream = bytearray((noise * 128)[: units * 128])
    for engine in range(4):
        stream[32 * engine : 32 * engine + 2] = (0x88 if high else 0xA8), size
    index = (units | 0x8000).to_bytes(8, "little")
    refused_or_bytes(bytes(stream), index, 512 * size)


@given(narrow(), MODES, st.data())
@example(np.zeros(4096, np.uint8), "low", None)
def test_damage_ends_in_a_sentence_or_in_whole_tiles(data, mode, draws):
    """Flips may pass, as the format has no sum for a raw tile; cuts and doubled tiles may not."""
    tile = 2048
    stream, index = map(bytearray, encode(data, tile, mode))
    if draws is None:
        assert refused_or_bytes(stream[:-1], index, tile) is None
        return
    kind = draws.draw(st.sampled_from(["flip", "index", "cut", "more", "byte"]))
    at = draws.draw(st.integers(0, len(stream) - 1))
    if kind == "flip":
        stream[at] ^= 1 << draws.draw(st.integers(0, 7))
    elif kind == "byte":
        stream[at] = draws.draw(st.integers(0, 255))
    elif kind == "index":
        index[at % len(index)] ^= 1 << draws.draw(st.integers(0, 7))
    elif kind == "cut":
        assert refused_or_bytes(stream[:at], index, tile) is None
        return
    else:
        assert refused_or_bytes(stream, index + index[:8], tile) is None
        return
    refused_or_bytes(bytes(stream), bytes(index), tile)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: encode(bytes(512), 500), "multiple of 512"),
        (lambda: encode(bytes(512), 65_536), "up to 65024"),
        (lambda: encode(bytes(500), 512), "not 500 bytes"),
        (lambda: encode(bytes(512), 512, "middle"), "no codec 'middle'"),
        (lambda: encode_tiles_of(bytes(512), [1024]), "do not cut 512"),
        (lambda: compress(np.zeros((2, 2), np.float16)), "takes i8"),
        (lambda: zstd.encode(b"a", 0), "not 0"),
    ],
)
def test_what_cannot_be_encoded_is_refused(call, said):
    with pytest.raises(PlanError, match=said):
        call()


def test_no_data_is_no_tiles():
    assert encode(b"", 512) == (b"", b"")
    assert decode(b"", b"", 512) == b""
    assert zstd.encode(b"", 512) == (b"", b"")
    assert zstd.decode(b"", b"", 512) == b""


@given(st.integers(1, 700), st.integers(1, 700), st.booleans(), MODES, DICTIONARIES)
def test_weights_come_back(n, k, transpose, mode, dictionary):
    weight = of_kind("g4z50", n * k, n).view(np.int8).reshape(n, k)
    stream, index, info = compress(weight, mode, dictionary, transpose=transpose)
    assert info.tolist() == [8, 8, *((n, k) if transpose else (k, n)), 1]
    n1, k1 = (-(-k // 16), -(-n // 32)) if transpose else (-(-n // 16), -(-k // 32))
    assert len(index) == 8 * -(-n1 // 8) * -(-k1 // 8)
    assert (decompress(stream, index, info, transpose=transpose) == weight).all()


@given(st.binary(max_size=5000), st.integers(1, 2000), SEEDS)
def test_zstd_comes_back_tile_by_tile_and_sees_damage(data, tile, seed):
    stream, index = zstd.encode(data, tile)
    assert zstd.decode(stream, index, tile) == data
    rng = np.random.default_rng(seed)
    if data:
        t = int(rng.integers(len(index) // 8))
        assert zstd.decode_tile(stream, index, t, tile) == data[t * tile : (t + 1) * tile]
        damaged = bytearray(stream)
        damaged[rng.integers(len(damaged))] ^= 1 << int(rng.integers(8))
        with suppress(CheckpointError):  # a header has a bit or two that mean nothing
            assert zstd.decode(damaged, index, tile) == data
        with pytest.raises(CheckpointError):
            zstd.decode(stream[:-1], index, tile)


@given(st.binary(max_size=300), st.lists(st.integers(0, 400), max_size=4), st.integers(1, 400))
def test_random_frames_are_refused(stream, ends, tile):
    index = np.array(ends, "<u8").tobytes()
    if ends:
        with pytest.raises(CheckpointError):
            zstd.decode(stream, index, tile)


SORT = """
#include <algorithm>
#include <cstdio>
#include <utility>
int main() {
    std::pair<long, int> a[256];
    while (true) {
        for (int b = 0; b < 256; b++) {
            if (std::scanf("%ld", &a[b].first) != 1) return 0;
            a[b].second = b;
        }
        std::sort(a, a + 256, [](auto &x, auto &y) { return x.first > y.first; });
        for (auto &pair : a) std::printf("%d ", pair.second);
    }
}
"""


def killer():
    """Counts that a median of three halves badly, so that the sort falls back on a heap."""
    half = 128
    counts = np.empty(256, np.int64)
    for i in range(1, half + 1):
        counts[i - 1] = i if i % 2 else half + i - 1
        counts[half + i - 1] = 2 * i
    return -counts + 1000


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++: std::sort is not compared")
def test_ties_fall_as_in_libstdcxx(tmp_path):
    (tmp_path / "sort.cpp").write_text(SORT)
    program = tmp_path / "sort"
    subprocess.run(["g++", "-O1", "-o", program, tmp_path / "sort.cpp"], check=True)
    rng = np.random.default_rng(0)
    cases = [rng.integers(0, most, 256) for most in (1, 2, 5, 50, 1 << 40) for _ in range(200)]
    cases += [killer(), killer()[::-1].copy(), killer() // 2]
    text = " ".join(" ".join(map(str, case)) for case in cases)
    said = subprocess.run([program], input=text, capture_output=True, text=True, check=True)
    wanted = np.array(said.stdout.split(), np.uint8).reshape(-1, 256)
    ranked = np.empty(256, np.uint8)
    for case, order in zip(cases, wanted, strict=True):
        rank(case, ranked)
        assert (ranked == order).all()
