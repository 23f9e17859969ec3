"""TensorInfo and the one dtype table."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np


@dataclass(frozen=True, slots=True)
class DType:
    """One row of the dtype table.

    ``tag`` is the name in a safetensors header, ``torch`` the attribute of the torch
    module, ``bits`` the width of one element. ``numpy`` is None where an element is
    not a whole number of bytes.
    """

    tag: str
    bits: int
    numpy: np.dtype[Any] | None
    torch: str | None

    @property
    def itemsize(self) -> int:
        """Bytes of one element; 1 for packed sub-byte types, which align to bytes."""
        return max(1, self.bits // 8)


def _row(tag: str, bits: int, numpy: Any, torch: str | None) -> tuple[str, DType]:
    return tag, DType(tag, bits, None if numpy is None else np.dtype(numpy), torch)


# The tags are the Dtype enum of the safetensors crate (0.8); sizes are in bits there too.
DTYPES: dict[str, DType] = dict(
    [
        _row("BOOL", 8, np.bool_, "bool"),
        _row("F4", 4, None, "float4_e2m1fn_x2"),
        _row("F6_E2M3", 6, None, None),
        _row("F6_E3M2", 6, None, None),
        _row("U8", 8, np.uint8, "uint8"),
        _row("I8", 8, np.int8, "int8"),
        _row("F8_E5M2", 8, ml_dtypes.float8_e5m2, "float8_e5m2"),
        _row("F8_E4M3", 8, ml_dtypes.float8_e4m3fn, "float8_e4m3fn"),
        _row("F8_E8M0", 8, ml_dtypes.float8_e8m0fnu, "float8_e8m0fnu"),
        _row("F8_E4M3FNUZ", 8, ml_dtypes.float8_e4m3fnuz, "float8_e4m3fnuz"),
        _row("F8_E5M2FNUZ", 8, ml_dtypes.float8_e5m2fnuz, "float8_e5m2fnuz"),
        _row("I16", 16, np.int16, "int16"),
        _row("U16", 16, np.uint16, "uint16"),
        _row("F16", 16, np.float16, "float16"),
        _row("BF16", 16, ml_dtypes.bfloat16, "bfloat16"),
        _row("I32", 32, np.int32, "int32"),
        _row("U32", 32, np.uint32, "uint32"),
        _row("F32", 32, np.float32, "float32"),
        _row("C64", 64, np.complex64, "complex64"),
        _row("F64", 64, np.float64, "float64"),
        _row("I64", 64, np.int64, "int64"),
        _row("U64", 64, np.uint64, "uint64"),
    ]
)

#: Dtypes of a weight that can be quantized.
FLOATS = ("BF16", "F16", "F32")


class TensorInfo(NamedTuple):
    """A tensor in a file: of the source, or planned for the output.

    ``file`` is relative to the checkpoint's directory, ``start`` the absolute byte
    offset in that file. A named tuple because a checkpoint can hold 100,000 of them
    and a frozen dataclass takes three times as long to make.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return self.numel * DTYPES[self.dtype].bits // 8

    @property
    def end(self) -> int:
        """Absolute offset of the first byte behind the tensor."""
        return self.start + self.nbytes


_ELEMENT = re.compile(r"(.*)\[#\d+\]")


def element(name: str, i: int) -> str:
    """How the ``i``-th weight of a tensor that holds several is called."""
    return f"{name}[#{i}]"


def stack_of(name: str) -> str | None:
    """The tensor that such a weight lies in, None for one that is a tensor of its own."""
    found = _ELEMENT.fullmatch(name) if name.endswith("]") else None
    return found[1] if found else None


def size_text(n: float) -> str:
    """A size for people, in decimal units as disks and download pages give them: 4.5 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 999.95 or unit == "GB":
            break
        n /= 1000
    return f"{n:.0f} {unit}" if unit == "B" else f"{n:.2f} {unit}" if n < 10 else f"{n:.1f} {unit}"
