"""Golden files catch every way in which a kernel could round wrongly: each row is one mistake."""

import importlib
import shutil
import sys
from pathlib import Path

import pytest
from streamq.kernels.golden import CASES, DTYPES, NUMERICS, outer_of
from test_kernels import equal, read
from torch_backend import interpreted, needs_triton, with_arrays

pytestmark = needs_triton

KERNELS = Path(__file__).parent.parent / "kernels" / "triton"

#: name: file, what is there, what the mistake makes of it, a scheme that catches it.
MUTANTS = {
    "integers round half away from zero": (
        "bits.py", "return bits_of(v + _RINT) - _RINT_BITS",
        "return tl.where(v < 0, -tl.floor(0.5 - v), tl.floor(v + 0.5)).to(tl.int32).to(tl.uint32)",
        "W8A8",
    ),
    "integers are cut off": (
        "bits.py", "return bits_of(v + _RINT) - _RINT_BITS",
        "return v.to(tl.int32).to(tl.uint32)", "W4A16",
    ),
    "integers are not clamped": (
        "search_int.py", "return clamp(q, LO, HI)", "return q", "W4A16_ASYM",
    ),
    "integers by reciprocal": (
        "search_int.py", "tl.div_rn(w, s[:, None])", "w * tl.div_rn(1.0, s)[:, None]", "W8A8",
    ),
    "the zero point is added after rounding": (
        "search_int.py", "q = round_to(q + z[:, None], STEP)", "q = rint(q) + z[:, None]",
        "W4A16_ASYM",
    ),
    "the zero point is not rounded": (
        "search_int.py", "z = rint(clamp(z, LO, HI))", "z = clamp(z, LO, HI)", "W4A16_ASYM",
    ),
    "integer scales by reciprocal": (
        "search_int.py", "tl.div_rn(high, LEVELS)", "high * (1.0 / LEVELS)", "INT4_GROUP_F32_SCALE",
    ),
    "a zero group keeps its scale of 0": (
        "search_int.py", "tl.where(s == 0, EPS, tl.maximum(s, LEAST)), z",
        "tl.maximum(s, LEAST), z", "W8A8",
    ),
    "the zero point of a lost scale": (
        "integer.py", '"LOST": float(hi if weight else 0)', '"LOST": 0.0', "W4A16_ASYM",
    ),
    "the quotient stays f32": (
        "integer.py", '"STEP": KINDS[x.dtype] if weight else F32.value', '"STEP": F32.value',
        "W8A8",
    ),
    "bf16 is cut off": (
        "bits.py", "(b + 0x7FFF + ((b >> 16) & 1))", "b", "W8A8",
    ),
    "bf16 rounds half up": (
        "bits.py", "(b + 0x7FFF + ((b >> 16) & 1))", "(b + 0x8000)", "W4A16_ASYM",
    ),
    "small floats are cut off": (
        "bits.py", "steps = bits_of(v + float_of(power)) - power",
        "steps = (tl.floor(v * float_of((508 << 22) - power)) ).to(tl.uint32)", "NVFP4",
    ),
    "e2m1 and e4m3 are not saturated": (
        "bits.py", "    v = tl.minimum(a, TOP)\n    exponent", "    v = a\n    exponent",
        "FP8_DYNAMIC",
    ),
    "subnormals of small floats have steps of their own": (
        "bits.py", "exponent = tl.maximum(bits_of(v), LEAST << 23) & _INF",
        "exponent = bits_of(v) & _INF", "FP8_DYNAMIC",
    ),
    "a zero keeps its sign": (
        "bits.py", "tl.where(q != 0, (bits_of(q) >> 28) & 8, 0)", "(bits_of(q) >> 28) & 8",
        "MXFP4",
    ),
    "FP8 by reciprocal": (
        "fp8.py",
        "tl.div_rn(w, s[:, None]), STEP))\n    tl.store(codes + (row * cols)[:, None] + at",
        "w * tl.div_rn(1.0, s)[:, None], STEP))\n    tl.store(codes + (row * cols)[:, None] + at",
        "FP8_DYNAMIC",
    ),
    "FP8 scales by reciprocal": (
        "fp8.py", "tl.div_rn(top, 448.0)", "top * (1.0 / 448.0)", "FP8_BLOCK_F32_SCALE",
    ),
    "a zero block of FP8 has the eps of integers": (
        "fp8.py", "torch.finfo(out.scale.dtype).eps if weight else 1.0",
        "torch.finfo(out.scale.dtype).eps", "FP8_DYNAMIC",
    ),
    "a power of two is rounded down": (
        "bits.py", "(b + 0x7FFFFF) & _INF", "b & _INF", "FP8_BLOCK_UE8M0",
    ),
    "NVFP4 by reciprocal": (
        "nvfp4.py", "tl.div_rn(w, d[:, None])", "w * tl.div_rn(1.0, d)[:, None]", "NVFP4",
    ),
    "NVFP4 scales by reciprocal": (
        "nvfp4.py", "tl.div_rn(float_of(top), 6.0)", "float_of(top) * (1.0 / 6.0)", "NVFP4",
    ),
    "NVFP4 divides by the scale and multiplies with the global one": (
        "nvfp4.py", "tl.div_rn(w, d[:, None])",
        "tl.div_rn(w * gr[:, None], e4m3_value(code)[:, None])", "NVFP4",
    ),
    "an NVFP4 scale of 0 stays": (
        "nvfp4.py", "code = tl.where(code == 0, 0x20, code)  # 0.125", "code = code", "NVFP4",
    ),
    "the sixth of an amax stays f32": (
        "nvfp4.py", "SIXTH=KINDS[x.dtype] if weight else F32.value", "SIXTH=F32.value", "NVFP4",
    ),
    "MX rounds an amax up at 1.5": (
        "mx.py", "(top + 0x200000) >> 23", "(top + 0x400000) >> 23", "MXFP4",
    ),
    "MX never rounds an amax up": (
        "mx.py", "(top + 0x200000) >> 23", "top >> 23", "MXFP8",
    ),
    "MX without the quirk of f16 subnormals": (
        "mx.py", "if WEIGHT and QUOTIENT == F16:", "if False:", "MXFP4",
    ),
    "MX without the quirk of lost powers": (
        "mx.py", "byte = tl.where(over | lost, 127, byte)", "byte = byte", "MXFP4",
    ),
    "one candidate of e4m3 is left out": (
        "search_fp4.py", "for i in range(8):", "for i in range(7):", "NVFP4_SEARCH",
    ),
    "candidates of e8m0 go down only": (
        "search_fp4.py", "for i in range(2):", "for i in range(1):", "MXFP4_SEARCH",
    ),
    "a tie of errors leaves absmax, e4m3": (
        "search_fp4.py", "better = error < least  #", "better = error <= least  #",
        "NVFP4_ONE_LEVEL_SEARCH",
    ),
    "a tie of errors leaves absmax, e8m0": (
        "search_fp4.py", "QUOTIENT, N, W)\n        better = error < least",
        "QUOTIENT, N, W)\n        better = error <= least", "MXFP4_SEARCH",
    ),
    "factors begin one step lower": (
        "search_int.py", "TOP - DOWN * (i - 1)", "TOP - DOWN * i", "INT4_SEARCH",
    ),
    "errors are added in f32": (
        "search.py", "    wide = e.to(tl.float64)\n", "    wide = e\n", "INT8_CHANNEL_SEARCH",
    ),
}  # fmt: skip


@pytest.fixture
def mutated(tmp_path, monkeypatch):
    """The kernels with some text replaced, under a name of their own."""
    interpreted()

    def load(name, file, old, new):
        package = tmp_path / name
        shutil.copytree(KERNELS, package, ignore=shutil.ignore_patterns("__pycache__"))
        text = (package / file).read_text()
        assert text.count(old) == 1, f"{file} has {text.count(old)} times: {old}"
        (package / file).write_text(text.replace(old, new))
        monkeypatch.syspath_prepend(tmp_path)
        return with_arrays(importlib.import_module(name))

    yield load
    for name in [n for n in sys.modules if n.partition(".")[0].startswith("mutant_")]:
        del sys.modules[name]


def differences(run, scheme_name):
    """Which golden matrices come out differently."""
    scheme, inputs, golden = CASES[scheme_name], read("inputs"), read(scheme_name)
    found = []
    for dtype in DTYPES:
        for numerics in NUMERICS:
            x, key = inputs[dtype], f"{dtype}.{numerics}."
            q = run.quantize(x, scheme, numerics=numerics, outer=outer_of(x, scheme, numerics))
            same = equal(q.codes, golden[key + "codes"]) and (
                scheme.whole_tensor or equal(q.scale, golden[key + "scale"])
            )
            if q.zero_point is not None:
                same &= equal(q.zero_point, golden[key + "zero_point"])
            found += [] if same else [key]
    return found


def test_what_is_not_mutated_differs_nowhere(mutated):
    run = mutated("mutant_of_nothing", "bits.py", "def rint(v):", "def rint(v):")
    for scheme in sorted({row[3] for row in MUTANTS.values()}):
        assert differences(run, scheme) == []


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_is_caught(mutated, name):
    *change, scheme = MUTANTS[name]
    run = mutated(f"mutant_{list(MUTANTS).index(name)}", *change)
    assert differences(run, scheme), "no golden file knows the difference"
