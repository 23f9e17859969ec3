"""Sizes of compressed weights: bits, zeros, dictionaries and codecs, as docs/ascend.md has them.

    python bench/compression.py

The data are the same in every run: 2 MB of Gaussian weights, rounded so that 4 sigma is the
largest code, larger ones clipped, and then zeros at random places. Which bytes zstandard makes
depends on its version.
"""

import tempfile
from pathlib import Path

import numpy as np

from streamq.checkpoint import open_checkpoint
from streamq.compressing import Options, compress, make_plan
from streamq.nz import encode, to_nz, zstd

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "bytes-llama"
SHAPE, TILE = (1024, 2048), 32768
HEAD = ("bits", "zeros added", "LOW, call", "LOW, tile", "HIGH, call", "HIGH, tile", "zstd")


def gaussian(bits: int, zeros: float) -> np.ndarray:
    """i8 ``[1024, 2048]``."""
    rng = np.random.default_rng(0)
    top = (1 << bits - 1) - 1
    x = np.clip(np.rint(rng.standard_normal(SHAPE) * top / 4), -top, top).astype(np.int8)
    x[rng.random(SHAPE) < zeros] = 0
    return x


def alphabets() -> np.ndarray:
    """i8: weights of 4 bits, in every tile of 128 x 256 with other values for the same codes."""
    rng, x = np.random.default_rng(0), gaussian(4, 0)
    for i in range(0, SHAPE[0], 128):
        for j in range(0, SHAPE[1], 256):
            tile = x[i : i + 128, j : j + 256]
            tile[:] = rng.permutation(256).astype(np.uint8).view(np.int8)[tile.view(np.uint8)]
    return x


def tiles(x: np.ndarray) -> bytes:
    """The bytes of a matrix, tile by tile of 8 x 8 fractals."""
    return b"".join(to_nz(x[i : i + 128]).tobytes() for i in range(0, len(x), 128))


def share(part: int, whole: int) -> str:
    """Three digits; 1 means that nothing was saved."""
    return "1" if part >= whole else f"{part / whole:.3f}".removeprefix("0")


def row(x: np.ndarray) -> list[str]:
    """Compressed size over size for each mode and dictionary, and for zstd."""
    data = tiles(x)
    sizes = [
        len(encode(data, TILE, mode, dictionary)[0])
        for mode in ("low", "high") for dictionary in ("call", "tile")
    ]  # fmt: skip
    return [share(n, len(data)) for n in [*sizes, len(zstd.encode(data, TILE)[0])]]


def synthetic() -> list[tuple[str, ...]]:
    """The table of synthetic weights."""
    rows = [
        (str(bits), f"{zeros}%", *row(gaussian(bits, zeros / 100)))
        for bits in (8, 6, 4) for zeros in (0, 30, 50, 70)
    ]  # fmt: skip
    return [*rows, ("4, other codes in each tile", "0%", *row(alphabets()))]


def example() -> list[tuple[str, ...]]:
    """The bundled model by the zstd codec, pruned and not."""
    rows = []
    for keep in (None, 0.5, 0.3):
        with tempfile.TemporaryDirectory() as folder, open_checkpoint(EXAMPLE) as source:
            plan = make_plan(source, Options(keep=keep))
            done = compress(
                source, plan, Path(folder) / "out", workers=2, max_memory=1 << 28, sync=False
            )
        kept = "all" if keep is None else f"{keep:.0%} of each row"
        rows.append((kept, f"{plan.bytes_in:,}", f"{done.bytes_out:,}",
                     share(done.bytes_out, plan.bytes_in)))  # fmt: skip
    return rows


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


if __name__ == "__main__":
    print(table(HEAD, synthetic()), end="\n\n")
    print(table(("kept", "bytes", "compressed", "ratio"), example()))
