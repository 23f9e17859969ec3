"""One global scale for the NVFP4 weights of a fused group, with the least error.

A weight is ``code * scale * m``, where ``m`` is the global scale as a multiplier. Another ``m``
for all members leaves the codes and rounds ``scale * m_i / m`` to e4m3. What that costs is known
from one number for each of the 256 scales: the energy of the codes below it.
"""

from __future__ import annotations

from math import inf
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from streamq.checkpoint import Checkpoint
from streamq.errors import CheckpointError
from streamq.kernels.reference import E2M1_VALUES
from streamq.quality import decibel
from streamq.stored import Stored, bytes_of

Array = np.ndarray[Any, Any]

_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_BLOCK = 16
#: Scales that are looked at in one go; the codes are eight times as many bytes.
_PIECE = 1 << 20
#: e4m3 by byte, and its largest and smallest values above zero.
_SCALES = np.arange(256, dtype=np.uint8).view(_E4M3).astype(np.float64)
_LARGEST, _SMALLEST = 448.0, 2.0**-9
#: Global scales that are tried, and how many octaves of them. The pattern of roundings repeats
#: each octave but for subnormal scales, which the first one has the fewest of.
_TRIED, _OCTAVES = 384, 2

_VALUES = np.concatenate([E2M1_VALUES, -E2M1_VALUES]).astype(np.float64)
#: The energy of the two codes in a byte.
_ENERGY = (np.square(_VALUES)[:, None] + np.square(_VALUES)).reshape(-1).astype(np.float32)


class Member(NamedTuple):
    """A weight: its multiplier, and the energy of the codes below each scale, f64 ``[256]``."""

    multiplier: float
    energy: Array


class Common(NamedTuple):
    """The global scale of a group as it is ``stored``, and what it costs.

    ``tables``: for each member the byte that each scale becomes, 256 bytes. ``sqnr``: of the new
    values against the old ones, in dB, inf where they are the same. ``change``: the largest
    relative one of any value.
    """

    stored: float
    tables: list[bytes]
    sqnr: float
    change: float


def energies(checkpoint: Checkpoint, s: Stored) -> Array:
    """The energy of the codes below each of the 256 scales of an NVFP4 weight, f64 ``[256]``.

    Raises CheckpointError for a weight whose rows end within a block.
    """
    if s.layout.cols % _BLOCK:
        raise CheckpointError(f"{s.name!r} has {s.layout.cols} columns, no multiple of {_BLOCK}.")
    scale = s.tensors[s.format.scale_suffix]
    total = np.zeros(256)
    for at in range(0, scale.nbytes, _PIECE):
        n = min(_PIECE, scale.nbytes - at)
        bins = np.frombuffer(bytes_of(checkpoint, scale, at, n), np.uint8)
        raw = bytes_of(checkpoint, s.codes, at * _BLOCK // 2, n * _BLOCK // 2)
        codes = np.frombuffer(raw, np.uint8)
        blocks = _ENERGY[codes].reshape(-1, _BLOCK // 2).sum(1)
        total += np.bincount(bins, blocks, 256)
    return total


def common(members: list[Member], divisor: bool) -> Common:
    """The best global scale; ``divisor``: whether it is stored as one."""
    stored = _candidates(members, divisor)
    with np.errstate(divide="ignore"):
        tried = 1 / stored.astype(np.float64) if divisor else stored.astype(np.float64)
    noise = sum(_noise(m, tried) for m in members)
    best = int(np.argmin(noise))
    m = float(tried[best])
    tables = [_rounded(member, np.array([m]), _SCALES)[0] for member in members]
    signal, change = 0.0, 0.0
    for member, table in zip(members, tables, strict=True):
        used = member.energy > 0
        old = _SCALES[used] * member.multiplier
        signal += float((member.energy[used] * np.square(old)).sum())
        change = max(change, float(np.abs(table[used] * m / old - 1).max(initial=0)))
    cost = float(np.asarray(noise)[best])
    # f64 computes the ratio of two f32 to within 2**-52.
    exact = change < 1e-12
    as_bytes = [t.astype(_E4M3).tobytes() for t in tables]
    return Common(
        float(stored[best]), as_bytes, inf if exact else decibel(signal, cost),
        0.0 if exact else change,
    )  # fmt: skip


def _candidates(members: list[Member], divisor: bool) -> Array:
    """Global scales as they are stored, f32: those that change some member's scales by powers of
    two first, all large enough that no scale is above the largest."""
    tops = [float(np.abs(_SCALES[m.energy > 0]).max(initial=0)) * m.multiplier for m in members]
    least = max(tops) / _LARGEST or members[0].multiplier
    kept = []
    for m in members:
        octave = np.ceil(np.log2(least / m.multiplier) - 1e-6)
        kept += [m.multiplier * 2.0 ** (octave + k) for k in range(_OCTAVES + 1)]
    grid = least * 2.0 ** (np.arange(_TRIED) * (_OCTAVES / _TRIED))
    multipliers = np.concatenate([np.array(kept), grid])
    return (1 / multipliers if divisor else multipliers).astype(np.float32)


def _noise(member: Member, tried: Array) -> Array:
    """Squared error of a member's values under each multiplier, f64."""
    used = member.energy > 0
    scales = _SCALES[used]
    error = _rounded(member, tried, scales) * tried[:, None] - scales * member.multiplier
    return np.asarray(np.square(error) @ member.energy[used])


def _rounded(member: Member, tried: Array, scales: Array) -> Array:
    """The scales under other multipliers, f64 ``[tried, scales]``: e4m3, and not zero."""
    wanted = scales * (member.multiplier / tried[:, None])
    clipped = np.clip(wanted, -_LARGEST, _LARGEST)
    rounded = clipped.astype(np.float32).astype(_E4M3).astype(np.float64)
    lost = (rounded == 0) & (scales != 0)
    return np.where(lost, np.copysign(_SMALLEST, wanted), rounded)
