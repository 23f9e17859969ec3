"""Schemes: what numbers a weight becomes.

A scheme says which element type a weight is rounded to, which block of elements shares
a scale, and how that scale is stored. How the bytes are arranged is a format's business.
The preset names are those of compressed-tensors (``preset_name_to_scheme``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import get_close_matches
from math import prod
from typing import Any, Literal

import numpy as np

from streamq.errors import PlanError

Element = Literal["int", "e4m3", "e2m1", "bf16", "f16", "f32"]
ScaleType = Literal["weight", "bf16", "f16", "f32", "e4m3", "e8m0"]
FloatType = Literal["bf16", "f16", "f32"]
Numerics = Literal["f32", "weight"]
Scales = Literal["absmax", "search"]
Part = Literal["codes", "scale", "zero_point", "bias"]

#: The whole axis, in Scheme.block.
ALL = -1

#: Elements that are not codes, and scales that are floats, with their dtype in a header.
FLOAT_TAGS: dict[str, str] = {"bf16": "BF16", "f16": "F16", "f32": "F32"}


@dataclass(frozen=True, slots=True)
class Activation:
    """How a loader is asked to quantize the inputs of the layer; no weight byte depends on it."""

    element: Element
    bits: int
    strategy: Literal["token", "group", "tensor_group"]
    group_size: int | None = None
    local: bool = False  # only the block scales are dynamic, the global one is a constant


@dataclass(frozen=True, slots=True)
class Scheme:
    """What a ``[rows, cols]`` weight is quantized to.

    ``block = (rows, cols)`` is the set of elements that share one scale, ALL for a whole
    axis. ``scale`` is the dtype the scale is stored in ("weight": the dtype of the weight).
    ``two_level`` schemes have an f32 global scale above the block scales. ``narrow``
    integers use the range +-(2^(bits-1) - 1). ``scales``: from the largest magnitude of a
    block, or searched for the least squared error. ``power_of_two`` float scales are rounded
    up to one (DeepSeek's ue8m0). ``unrounded``: codes come from the f32 scale, before it is
    rounded to its storage dtype (gpt-fast). A float element is not quantized at all.
    ``inverse``: the stored scale multiplies a weight to give its code, and a ragged block is
    filled up with zeros (DB-GPT, FastChat). ``stride``: columns from one element of a block
    to the next; more than 1 where the axes behind that of the blocks are folded into the columns.
    """

    name: str
    element: Element
    bits: int
    block: tuple[int, int]
    scale: ScaleType = "weight"
    symmetric: bool = True
    narrow: bool = False
    power_of_two: bool = False
    unrounded: bool = False
    inverse: bool = False
    stride: int = 1
    two_level: bool = False
    activation: Activation | None = None
    scales: Scales = "absmax"

    @property
    def is_float(self) -> bool:
        """Plain bf16, f16 or f32: no codes, no scale."""
        return self.element in FLOAT_TAGS

    @property
    def numbers(self) -> tuple[object, ...]:
        """What decides which numbers codes stand for; equal for schemes that can be repacked."""
        return (
            self.element, self.bits, self.block, self.symmetric, self.two_level, self.inverse,
            self.power_of_two,
        )  # fmt: skip

    @property
    def whole_tensor(self) -> bool:
        """One scale for the whole tensor, so that its amax is needed before any code."""
        return self.block == (ALL, ALL)

    @property
    def needs_amax(self) -> bool:
        """True where a first pass over all rows has to come before the codes."""
        return self.whole_tensor or self.two_level

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest integer code."""
        half = 1 << (self.bits - 1)
        return (1 - half if self.narrow else -half), half - 1

    def block_of(self, rows: int, cols: int) -> tuple[int, int]:
        """``block`` with ALL replaced by the real extent of a ``[rows, cols]`` tensor."""
        r, c = self.block
        return (rows if r == ALL else r), (cols // self.stride if c == ALL else c)

    def scale_shape(self, rows: int, cols: int) -> tuple[int, int]:
        """Number of blocks along each axis of a ``[rows, cols]`` tensor."""
        r, c = self.block_of(rows, cols)
        return -(-rows // r), -(-cols // self.stride // c) * self.stride

    @property
    def parts(self) -> tuple[Part, ...]:
        """Fields of ``Quantized`` that kernels fill, in the order of their buffers."""
        if self.symmetric:
            return "codes", "scale"
        return "codes", "scale", "bias" if self.inverse else "zero_point"

    def folded(self, shape: tuple[int, ...]) -> Scheme:
        """The scheme of a tensor that is seen as a matrix ``[shape[0], all the rest]``."""
        if not self.inverse or self.block[0] != 1 or len(shape) < 3:
            return self
        return replace(self, stride=prod(shape[2:]))


@dataclass(frozen=True, slots=True)
class Quantized:
    """A quantized ``[rows, cols]`` tensor, as kernels give it and formats take it.

    ``codes``: one per byte (int8, float8_e4m3fn, or uint8 e2m1 indices with the sign in
    bit 3), or uint8 ``[rows, row bytes]`` when a kernel packed them. ``scale``: ``[row
    blocks, col blocks]`` in its storage dtype (uint8 for e8m0). ``zero_point``: int8 of
    the same shape, for asymmetric schemes. ``global_scale``: f32, the divisor of
    two-level schemes; a value is ``code * scale / global_scale``. ``bias``: a float of each
    block that is added last; for inverse schemes, f32, the value of the smallest code.
    """

    codes: np.ndarray[Any, Any]
    scale: np.ndarray[Any, Any]
    zero_point: np.ndarray[Any, Any] | None = None
    global_scale: np.ndarray[Any, Any] | None = None
    bias: np.ndarray[Any, Any] | None = None


@dataclass(frozen=True, slots=True)
class Packing:
    """How codes lie in a row of the output; a fused kernel may emit this directly.

    ``bytes``: one code per byte. ``nibbles``: two, the even column low. ``words``: offset
    binary (code + 2^(bits-1)), element i at bit ``i * bits``, least significant first,
    each row padded to whole 32-bit words.
    """

    kind: Literal["bytes", "nibbles", "words"]
    bits: int = 8

    def row_bytes(self, cols: int) -> int:
        """Bytes that ``cols`` codes take."""
        if self.kind == "bytes":
            return cols
        if self.kind == "nibbles":
            return -(-cols // 2)
        return -(-cols * self.bits // 32) * 4


BYTES = Packing("bytes")


def _int(bits: int, act_bits: int = 16, **kw: Any) -> dict[str, Any]:
    activation = Activation("int", act_bits, "token") if act_bits < 16 else None
    return {"element": "int", "bits": bits, "block": (1, 128), "activation": activation, **kw}


def _block_fp4(scale: ScaleType, group: int, activation: Activation | None) -> dict[str, Any]:
    return {
        "element": "e2m1", "bits": 4, "block": (1, group), "scale": scale,
        "two_level": scale == "e4m3", "activation": activation,
    }  # fmt: skip


def _fp8(
    block: tuple[int, int], activation: Activation | None, scale: ScaleType = "weight"
) -> dict[str, Any]:
    return {
        "element": "e4m3", "bits": 8, "block": block, "scale": scale, "activation": activation,
    }  # fmt: skip


# One row adds a scheme. Values as compressed-tensors 0.19 defines the presets.
_PRESETS: dict[str, dict[str, Any]] = {
    "NVFP4A16": _block_fp4("e4m3", 16, None),
    "NVFP4": _block_fp4("e4m3", 16, Activation("e2m1", 4, "tensor_group", 16, local=True)),
    "MXFP4A16": _block_fp4("e8m0", 32, None),
    "MXFP4": _block_fp4("e8m0", 32, Activation("e2m1", 4, "group", 32)),
    "MXFP8A16": _fp8((1, 32), None, "e8m0"),
    "MXFP8": _fp8((1, 32), Activation("e4m3", 8, "group", 32), "e8m0"),
    "FP8_DYNAMIC": _fp8((1, ALL), Activation("e4m3", 8, "token")),
    "FP8_BLOCK": _fp8((128, 128), Activation("e4m3", 8, "group", 128)),
    "W8A8": _int(8, 8, block=(1, ALL)),
    "W4AFP8": _int(4, activation=Activation("e4m3", 8, "token")),
    "W4A8": _int(4, 8),
    **{f"W{b}A16": _int(b) for b in range(2, 9)},
    **{f"W{b}A16_ASYM": _int(b, symmetric=False) for b in range(2, 9)},
}

SCHEMES: dict[str, Scheme] = {name: Scheme(name, **kw) for name, kw in _PRESETS.items()}

#: Schemes that one format has to itself.
OF_FORMATS: dict[str, Scheme] = {
    "W4A8_MXFP": Scheme("W4A8_MXFP", **_block_fp4("e8m0", 32, Activation("e4m3", 8, "group", 32))),
}

#: Not quantized: what a quantized source is brought back to.
PLAIN: dict[str, Scheme] = {
    "BF16": Scheme("BF16", "bf16", 16, (1, ALL)),
    "F16": Scheme("F16", "f16", 16, (1, ALL)),
    "F32": Scheme("F32", "f32", 32, (1, ALL)),
}

#: Ascend's own names of schemes; ``W8A16`` and ``W4A16`` are names that others have too.
ASCEND = {
    "W8A8_DYNAMIC": "W8A8", "W8A8_MXFP8": "MXFP8", "W4A4_MXFP4": "MXFP4", "W4A8_DYNAMIC": "W4A8",
}  # fmt: skip

ALIASES = {"INT8": "W8A8", **ASCEND}


def resolve(name: str, group_size: int | None = None) -> Scheme:
    """The scheme of a preset name (any case), with ``--group-size`` applied.

    Raises PlanError for a name that is not known, for one that needs calibration, and for
    a group size on a scheme that has none.
    """
    key = ALIASES.get(name.upper(), name.upper())
    if key == "FP8":
        raise PlanError(
            "FP8 has a static activation scale that only calibration data can give; "
            "use FP8_DYNAMIC, which quantizes activations at run time."
        )
    scheme = SCHEMES.get(key) or OF_FORMATS.get(key) or PLAIN.get(key)
    if scheme is None:
        near = get_close_matches(key, [*SCHEMES, *OF_FORMATS, *ALIASES], 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise PlanError(
            f"unknown scheme {name!r}: {hint}known schemes are "
            f"{', '.join([*SCHEMES, *OF_FORMATS, *PLAIN])}."
        )
    if group_size is None:
        return scheme
    if not has_groups(name):
        raise PlanError(
            f"--group-size does not apply to {scheme.name}: its block of "
            f"{block_text(scheme.block)} is part of the scheme."
        )
    if group_size != ALL and (group_size < 8 or group_size % 8):
        raise PlanError(
            f"--group-size must be a multiple of 8, or -1 for whole rows, got {group_size}."
        )
    return replace(scheme, block=(1, group_size))


def has_groups(name: str) -> bool:
    """Whether ``--group-size`` applies to a preset."""
    scheme = resolve(name)
    return scheme.element == "int" and scheme.block[1] != ALL


def block_text(block: tuple[int, int]) -> str:
    """``1x128``, ``1xall``: a block for messages and tables."""
    return "x".join("all" if b == ALL else str(b) for b in block)
