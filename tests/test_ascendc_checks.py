"""The shim sees what a kernel must not do, and the golden inputs see what a kernel does wrong."""

import shutil
import subprocess
from functools import cache

import numpy as np
import pytest
from ascendc_shim import KERNELS, Aborted, Kernels, compiled, needs_compiler, pruned, shim
from hypothesis import settings
from streamq.kernels import reference
from streamq.kernels.golden import CASES, DTYPES, make, outer_of

from streamq.nz import to_nz

BF16 = np.dtype(DTYPES["bf16"])
MISUSES = {
    "256 repeats": "repeat 256 of 255",
    "33 bytes of padding": "more than 32 bytes of padding",
    "65 lanes in a repeat": "mask 65 of 64",
    "And of int32": "And does not take this type",
    "Brcb of stride 0": "dstBlkStride is 0",
    "Cast of 1e6 to half": "overflows in a cast",
    "Cast of 300 to int8": "overflows in a cast",
    "Cast of bf16 to half": "is not on dav-2201",
    "Cast of f32 to int8": "is not on dav-2201",
    "Cast onto itself": "operands overlap",
    "Cast to e4m3": "is not on dav-2201",
    "DataCopy of 12 bytes": "not whole blocks of 32",
    "DataCopy that is not aligned": "no multiple of 32",
    "DeQue of nothing": "the queue is empty",
    "Duplicate of int8": "Duplicate does not take this type",
    "EnQue over the depth": "more than 1 tensors",
    "FreeTensor of another": "did not come out of this queue",
    "FreeTensor too early": "nobody wrote",
    "GetValue without a flag": "while pipe V may still write it",
    "SetFlag alone": "nobody waits for",
    "SetFlag twice": "is set already",
    "SetValue without a flag": "while pipe S may still write it",
    "WaitFlag alone": "the core hangs",
    "a copy in before the copy out is done": "while pipe MTE3 may still write it",
    "a lane too many": "elements 64 to 65 of a tensor of 64",
    "a sum that depends on its order": "depends on its order",
    "an element behind the end": "element 65",
    "an integer that overflows": "overflows an integer",
    "an operand that is not aligned": "no multiple of 32",
    "blockCount 4096": "at most 4095",
    "blockLen of half an element": "a multiple of 4",
    "blocks that read what others write": "reads what block 0 wrote",
    "blocks that write the same": "writes what another block uses",
    "division by 0": "1 / 0",
    "event 8": "there are 0 to 7",
    "global memory behind the end": "of a global tensor",
    "global memory nobody wrote": "nobody wrote",
    "global memory that is not there": "there is no memory",
    "no EnQue": "while pipe MTE2 may still write it",
    "no EnQue out": "while pipe V may still write it",
    "no FreeTensor": "the core hangs",
    "no barrier": "while pipe V may still write it",
    "no barrier before a write": "while pipe V may still read it",
    "no barrier between copies": "while pipe MTE2 may still write it",
    "no barrier between writes": "while pipe V may still write it",
    "operands that overlap": "operands overlap",
    "poison": "nobody wrote",
    "poison of padding": "nobody wrote",
    "the barrier of another pipe": "while pipe V may still write it",
    "too much for the Unified Buffer": "do not fit into 188160",
}


@pytest.fixture(scope="module")
def misuse(tmp_path_factory):
    out = tmp_path_factory.mktemp("misuse") / "misuse"
    return compiled("misuse.cpp", out, 2201, "-O0", shim(2201))


@needs_compiler
def test_misuse_aborts(misuse):
    """Each case of ``misuse.cpp``, and one that is right; all in one test, as each is 5 ms."""
    listed = subprocess.run([misuse], capture_output=True, text=True, check=True).stdout.split("\n")
    assert set(listed) - {""} == {"right", *MISUSES}
    subprocess.run([misuse, "right"], check=True, capture_output=True)
    for name, message in MISUSES.items():
        done = subprocess.run([misuse, name], capture_output=True, text=True, check=False)
        assert done.returncode != 0, name
        assert message in done.stderr, name


@cache
def golden():
    """The inputs of the golden files with both signs, largest first, and more subnormals.

    bf16 scales of subnormals are off by up to a half: only there do codes need their bounds.
    """
    x = make.inputs(BF16)
    tiny = np.linspace(-660, 660, x.shape[1]).round()[None] * 2.0**-133
    return np.concatenate([x, -x, tiny.astype(BF16)])[::-1]


def _quantized(name, cols=384, rows=-1):
    def check(run):
        x, scheme = golden()[:, :cols].reshape(rows, cols if rows < 0 else -1), CASES[name]
        outer = outer_of(x, scheme, "f32")
        want = reference.quantize(x, scheme, outer=outer)
        codes, scale = run.quantize(x, scheme, "f32", outer, 3)
        assert codes.tobytes() == want.codes.tobytes()
        assert scale.tobytes() == want.scale.tobytes()

    return check


def _amax(run):
    x = golden()
    (got,) = run.run("streamq_amax", (*x.shape, 0), x, ((len(x),), np.float32), blocks=3)
    assert got.tobytes() == reference.amax(x).tobytes()


def _nz(run):
    x = np.random.default_rng(1).integers(1, 256, (37, 1056), dtype=np.uint8)
    want = to_nz(x)
    (got,) = run.run("streamq_to_nz", x.shape, x, (want.shape, np.uint8), blocks=3)
    assert got.tobytes() == want.tobytes()


def _keep(run):
    x = golden()[-9:]
    (got,) = run.run("streamq_keep_largest", (*x.shape, 0, 150), x, (x.shape, BF16), blocks=3)
    assert got.tobytes() == pruned(x, 150).tobytes()


def _histogram(run):
    x = np.random.default_rng(1).integers(0, 256, (2, 512), dtype=np.uint8)
    (got,) = run.run("streamq_histogram", x.shape, x, ((2, 256), np.float32), blocks=2)
    assert np.array_equal(got, [np.bincount(row, minlength=256) for row in x])


ROWS, NARROW, GROUPS = _quantized("W8A8"), _quantized("INT8_CHANNEL_NARROW"), _quantized("W4A16")
LONG_ROW = _quantized("W8A8", rows=1)
FP8, MX, MX4 = _quantized("FP8_DYNAMIC"), _quantized("MXFP8"), _quantized("MXFP4")
RAGGED = _quantized("FP8_BLOCK", 300)
#: Compiled for the architecture with the fewest kernels that has the one in question.
ARCHES = {FP8: 3510, MX: 3510, MX4: 3510, RAGGED: 3510, _nz: 2002, _histogram: 2002}
CHECKS = [ROWS, LONG_ROW, NARROW, GROUPS, FP8, MX, MX4, RAGGED, _amax, _nz, _keep, _histogram]

MUTANTS = {  # what is done wrong: file, the text, what becomes of it, the check that has to see it
    "truncation": (
        "integer",
        "Cast(q, q, RoundMode::CAST_RINT, n);",
        "Cast(q, q, RoundMode::CAST_TRUNC, n);",
        ROWS,
    ),
    "f32 to half to int8": ("integer", "Cast(q, q, RoundMode::CAST_RINT, n);", "", ROWS),
    "no upper bound": ("integer", "Mins(q, q, high_, n);", "", ROWS),
    "no lower bound": ("integer", "Maxs(q, q, low_, n);", "", NARROW),
    "scale as computed": (
        "scale",
        "RoundTo(top, narrow_.Get<int16_t>(), args_.stored, n);",
        "",
        ROWS,
    ),
    "scale of 0": ("scale", "Add(bits, bits, zero, n);", "", ROWS),
    "no barrier behind the division": ("scale", "#endif\n    Then();", "#endif", ROWS),
    "signed amax": (
        "amax",
        "Abs(magnitude, x, t.Size());",
        "Maxs(magnitude, x, 0.0f, t.Size());",
        _amax,
    ),
    "amax of the last tile": (
        "amax",
        "Max(most, most, magnitude, t.Size());",
        "DataCopy(most, magnitude, t.Size());",
        LONG_ROW,
    ),
    "groups apart": ("quantize", "static_cast<uint16_t>(group / 8), static", "1, static", GROUPS),
    "half of a group": (
        "quantize",
        "lane < group; lane += LANES",
        "lane < LANES; lane += LANES",
        GROUPS,
    ),
    "no flag before GetValue": ("quantize", "            Sync<HardEvent::V_S>();\n", "", ROWS),
    "rows shared twice": (
        "tile",
        "last = n * (i + 1) / blocks;",
        "last = Least(n, n * (i + 1) / blocks + 1);",
        ROWS,
    ),
    "padding of 1": (
        "tile",
        "Duplicate(raw_, Bits(0), h * PITCH);",
        "Duplicate(raw_, Bits(0x7F00), h * PITCH);",
        RAGGED,
    ),
    "padding of a block": (
        "tile",
        "zeros{true, 0, pad, Bits(0)};",
        "zeros{false, 0, pad, Bits(0)};",
        RAGGED,
    ),
    "no EnQue": (
        "tile",
        "queue_.EnQue(raw_);\n        raw_ = queue_.template DeQue<Bits>();",
        "",
        ROWS,
    ),
    "copy before zeros": ("tile", "Sync<HardEvent::V_MTE2>();", "", RAGGED),
    "e4m3 without bounds": ("fp8", "Mins(q, q, high_, n);", "", FP8),
    "MX rounds down": ("mx", "Adds(field, bits, 0x200000, n);", "Adds(field, bits, 0, n);", MX),
    "MX of e5m2": ("mx", "-emax", "-emax - 7", MX),
    "e2m1 with ties up": ("fp4", "0x3E800001", "0x3E800000", MX4),
    "e2m1 with signs of zeros": (
        "fp4",
        "AtLeast(code, magnitude, 1, n);",
        "Duplicate(code, 1, n);",
        MX4,
    ),
    "NZ of other rows": (
        "layout",
        "static_cast<uint16_t>(m - 1)",
        "static_cast<uint16_t>(m - 2)",
        _nz,
    ),
    "NZ without the last rows": ("layout", "if (empty > 0) {", "if (false) {", _nz),
    "the last of equals": ("magnitude", "cut > at ? Least(cut - at, CHUNK) : 0", "CHUNK", _keep),
    "a bit too few": ("magnitude", "sizeof(I) * 8 - 2", "sizeof(I) * 8 - 3", _keep),
    "neighbours as equals": (
        "histogram",
        "static_cast<half>(1.0f), n",
        "static_cast<half>(0.5f), n",
        _histogram,
    ),
}


@needs_compiler
def test_the_checks_hold_without_a_mutant(tmp_path):
    path = compiled("one_dtype.cpp", tmp_path / "k.so", 3510, "-O0", "-shared", shim(3510))
    with Kernels(path) as run:
        for check in CHECKS:
            check(run)


# A mutant takes a second to compile; the soak takes them all.
SOAK = settings.default.max_examples > 1000
QUICK = [
    "truncation",
    "f32 to half to int8",
    "no upper bound",
    "scale of 0",
    "no barrier behind the division",
    "groups apart",
    "rows shared twice",
    "padding of a block",
    "no EnQue",
    "MX rounds down",
    "e2m1 with ties up",
    "NZ of other rows",
    "a bit too few",
    "neighbours as equals",
]


@needs_compiler
@pytest.mark.parametrize("name", MUTANTS if SOAK else QUICK)
def test_mutants_are_caught(tmp_path, name):
    stem, text, wrong, check = MUTANTS[name]
    shutil.copytree(KERNELS / "device", tmp_path / "device")
    shutil.copy(KERNELS / "kernels.asc", tmp_path)
    path = tmp_path / "device" / f"{stem}.h"
    source = path.read_text()
    assert source.count(text) == 1, "the mutant has to be adapted to the kernel"
    path.write_text(source.replace(text, wrong))
    arch, out = ARCHES.get(check, 2201), tmp_path / "k.so"
    compiled("one_dtype.cpp", out, arch, "-O0", "-shared", shim(arch), kernels=tmp_path)
    with Kernels(out) as run, pytest.raises((Aborted, AssertionError)):
        check(run)
