"""MXFP4 as NVFP4, without a single number changing.

An E8M0 scale is a power of two, and e4m3 holds 18 of them from 2^-9 to 2^8. With a divisor
that brings the largest scale of a fused group to 2^8, all others fit if they are at most
17 powers below it; the codes stay, and each scale stands for two blocks of 16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from streamq.checkpoint import Checkpoint
from streamq.errors import CheckpointError
from streamq.families import Family
from streamq.formats import Format, Layout, Role
from streamq.kernels.reference import E4M3
from streamq.schemes import SCHEMES, Quantized, Scheme
from streamq.stored import Array, Stored, read
from streamq.tensors import TensorInfo

_MXFP4, _NVFP4 = SCHEMES["MXFP4A16"], SCHEMES["NVFP4A16"]
#: Exponents of the largest and the smallest power of two in e4m3.
_TOP, _BOTTOM = 8, -9


class _Lifted(Format):
    """Reads weights of another format as NVFP4 under a divisor of 2^(8 - top)."""

    def __init__(self, inner: Format, top: int) -> None:
        self.name = f"{inner.name} as NVFP4"
        self.scale_suffix = inner.scale_suffix
        self._inner = inner
        self._top = top

    def unpack(self, arrays: Mapping[Role, Array], layout: Layout, scheme: Scheme) -> Quantized:
        """See ``Format.unpack``."""
        q = self._inner.unpack(arrays, layout, _MXFP4)
        exponent = q.scale.astype(np.int32) - 127 - self._top + _TOP
        nothing = q.scale == 0  # a block of zeros, whose scale no longer matters
        codes = q.codes.reshape(*q.scale.shape, 32)
        if (codes[nothing] & 7).any():
            raise CheckpointError("a block of values near 2^-127 is too small for NVFP4.")
        powers = np.ldexp(np.float32(1), np.where(nothing, _BOTTOM, exponent)).astype(E4M3)
        divisor = np.ldexp(np.ones(1, np.float32), _TOP - self._top)
        return Quantized(q.codes, powers.repeat(2, axis=1), None, divisor)


def lift(
    source: Checkpoint,
    stored: dict[str, Stored],
    scheme: Scheme,
    family: Family,
    stays: Callable[[TensorInfo], str | None],
) -> tuple[dict[str, Stored], list[str]]:
    """The weights with those of MXFP4 read as NVFP4 where that is what is wanted and exact.

    ``stays``: why a weight is not to be converted at all. Reads the scales. Returns sentences
    about those that it cannot be done for as well.
    """
    groups: dict[tuple[str, str], list[Stored]] = {}
    if scheme.numbers == _NVFP4.numbers:
        for s in stored.values():
            weight = TensorInfo(s.name, "F32", s.shape, s.codes.file, s.codes.start)
            if s.scheme.numbers == _MXFP4.numbers and not stays(weight):
                found = family.group_of(s.module)
                key = (found[0], found[1].members[0]) if found else ("", s.module)
                groups.setdefault(key, []).append(s)
    lifted: dict[str, Stored] = {}
    apart = []
    for members in groups.values():
        least, most = 255, 0
        for s in members:
            scales = read(source, s.tensors[s.format.scale_suffix]).view(np.uint8)
            used = scales[scales > 0]
            least, most = min(least, used.min(initial=255)), max(most, used.max(initial=0))
        most = max(most, 127) if most == 0 else most  # nothing but zeros
        if int(most) - int(least) > _TOP - _BOTTOM or not 8 <= int(most) < 255:
            apart.append(members[0].name)
            continue
        top = int(most) - 127
        lifted |= {s.name: s._replace(format=_Lifted(s.format, top), scheme=_NVFP4)
                   for s in members}  # fmt: skip
    notes = [f"{len(lifted)} weights go from MXFP4 to NVFP4 without loss"] if lifted else []
    if apart:
        notes.append(
            f"MXFP4 scales of {apart[0]!r} ({len(apart)} such groups) are more than "
            f"{_TOP - _BOTTOM} powers of two apart, which NVFP4 cannot hold without loss"
        )
    return stored | lifted, notes
