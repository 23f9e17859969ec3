"""Which kernels run on which chip, and what their launchers take."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass

from streamq.schemes import ALL, Numerics, Scheme

_POINTER, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_float
_SIGNED = ctypes.c_int32
#: Dtype, levels, what scales are stored in, what quotients are rounded to, the scale of zeros.
_RULE = [_INT, _FLOAT, _INT, _INT, _SIGNED]
#: Blocks, the stream, and pointers to the source and the result.
_HEAD = [_INT, _POINTER, _POINTER, _POINTER]
#: What each launcher in ``kernels.asc`` takes; all return 0.
SIGNATURES: dict[str, list[type]] = {
    "streamq_histogram": [*_HEAD, _LONG, _INT],
    "streamq_to_nz": [*_HEAD, _LONG, _LONG],
    "streamq_keep_largest": [*_HEAD, _LONG, _LONG, _INT, _INT],
    "streamq_amax": [*_HEAD, _LONG, _LONG, _INT],
    "streamq_int_units": [*_HEAD, _POINTER, _LONG, _LONG, *_RULE, _SIGNED, _SIGNED],
    "streamq_int_groups": [*_HEAD, _POINTER, _LONG, _INT, *_RULE, _SIGNED, _SIGNED],
    "streamq_fp8_units": [*_HEAD, _POINTER, _LONG, _LONG, _LONG, _LONG, _INT, _INT, _INT, _SIGNED],
    "streamq_fp8_given": [*_HEAD, _POINTER, _LONG, _LONG, _INT, _INT],
    "streamq_mxfp4": [*_HEAD, _POINTER, _LONG, _INT],
    "streamq_mxfp8": [*_HEAD, _POINTER, _LONG, _INT],
}  # fmt: skip

_ANY = ("streamq_histogram", "streamq_to_nz")
_INT8 = ("streamq_keep_largest", "streamq_amax", "streamq_int_units", "streamq_int_groups")


@dataclass(frozen=True, slots=True)
class Chip:
    """A family of chips that one library serves.

    ``arch``: as bisheng counts, ``--npu-arch=dav-<arch>``. ``cores``: blocks to launch where
    torch_npu does not say how many vector cores there are. ``ragged``: rows may end anywhere,
    not at multiples of 32 bytes only.
    """

    name: str
    arch: int
    pattern: str
    cores: int
    functions: tuple[str, ...]
    ragged: bool = True


#: 310P: no DataCopyPad, no cast of f32 that rounds. e4m3, and integers to bytes: only the 950.
CHIPS = (
    Chip("Atlas inference (310P)", 2002, r"Ascend310P", 8, _ANY, ragged=False),
    Chip("Atlas A2 (910B)", 2201, r"Ascend910B", 40, (*_ANY, *_INT8)),
    Chip("Atlas A3 (910_93)", 2201, r"Ascend910_93", 40, (*_ANY, *_INT8)),
    Chip("Ascend 950", 3510, r"Ascend950", 64, tuple(SIGNATURES)),
)


def chip_of(name: str) -> Chip | None:
    """The chip that torch_npu calls ``name``, None for one without kernels."""
    return next((c for c in CHIPS if re.match(c.pattern, name)), None)


#: Elements that the kernels of groups take at a time, and the longest group of them.
TILE = 4096
LONGEST_GROUP = TILE // 8
#: Bytes of the longest row that ``keep_largest`` takes.
LONGEST_ROW = 96 * 1024
#: The tiles that ``histogram`` takes: multiples of 512 bytes up to this.
LONGEST_TILE = 65_024

#: Dtypes as the launchers count them.
DTYPES = {"bf16": 0, "f16": 1, "f32": 2}
#: The scale of zeros, as the bits of an f32: the smallest step from 1 of a dtype, and 1.
_EPS = {"bf16": (127 - 7) << 23, "f16": (127 - 10) << 23, "f32": (127 - 23) << 23}
_ONE = 127 << 23


@dataclass(frozen=True, slots=True)
class Call:
    """A launcher, what it takes behind its pointers, and how many scales it gives."""

    function: str
    arguments: tuple[float, ...]
    scales: tuple[int, int]


def function_of(scheme: Scheme, numerics: Numerics = "f32") -> str | None:
    """The launcher for a scheme, None where there is none on any chip."""
    if (
        scheme.scales != "absmax" or scheme.power_of_two or scheme.unrounded or scheme.inverse
        or not scheme.symmetric or scheme.scale == "f16"
    ):  # fmt: skip
        return None
    rows, cols = scheme.block
    if scheme.element == "int" and rows == 1 and not (scheme.narrow and scheme.bits == 2):
        grouped = cols != ALL and cols % 8 == 0 and cols <= LONGEST_GROUP
        return "streamq_int_groups" if grouped else "streamq_int_units"
    if scheme.scale == "e8m0" and numerics == "f32" and scheme.block == (1, 32):
        return "streamq_mxfp4" if scheme.element == "e2m1" else "streamq_mxfp8"
    if scheme.element != "e4m3" or scheme.scale == "e8m0":
        return None
    if scheme.whole_tensor:
        return "streamq_fp8_given"
    return "streamq_fp8_units" if scheme.block in ((1, ALL), (128, 128)) else None


def call_of(scheme: Scheme, rows: int, cols: int, dtype: str, numerics: Numerics) -> Call:
    """How to quantize a weight ``[rows, cols]`` of ``dtype`` ("bf16", "f16" or "f32").

    Only for a scheme that ``function_of`` knows; ``cols`` is a multiple of its groups.
    """
    function = function_of(scheme, numerics)
    assert function is not None
    kind = DTYPES[dtype]
    stored = dtype if scheme.scale == "weight" else scheme.scale
    quotient = kind if numerics == "weight" else DTYPES["f32"]
    height, width = scheme.block_of(rows, cols)
    scales = scheme.scale_shape(rows, cols)
    low, high = scheme.code_range
    if function.startswith("streamq_mxfp"):
        return Call(function, (scales[0] * scales[1], kind), scales)
    if function == "streamq_fp8_given":
        return Call(function, (rows, cols, kind, quotient), (rows, 1))
    if function == "streamq_fp8_units":
        substitute = _EPS[stored] if numerics == "weight" else _ONE
        sizes = (rows, cols, height, width)
        return Call(function, (*sizes, kind, DTYPES[stored], quotient, substitute), scales)
    # Groups lie one behind the other: to the kernels they are rows of their own.
    levels = high if scheme.narrow else high + 0.5
    rule = (kind, levels, DTYPES[stored], quotient, _EPS[stored], low, high)
    return Call(function, (scales[0] * scales[1], width, *rule), scales)
