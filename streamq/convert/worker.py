"""What one thread does: read a slab, quantize it, write what it became."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from streamq.checkpoint import Checkpoint
from streamq.errors import NonFiniteError, StreamqError
from streamq.formats import compressed_tensors as fmt
from streamq.kernels import cpu
from streamq.kernels.reference import outer_scale
from streamq.plan import Member, slab_rows
from streamq.schemes import Numerics, Quantized, Scheme
from streamq.tensors import DTYPES
from streamq.writer import ShardWriter

Array = np.ndarray[Any, Any]


#: Bytes of one piece of a plain copy.
COPY = 16 << 20


class Stopped(Exception):
    """Another worker failed, or the user interrupted."""


class Segment(NamedTuple):
    """Rows ``[first, last)`` of a weight that is quantized."""

    member: Member
    first: int
    last: int


class Slab(NamedTuple):
    """Rows of one weight, or a stack of whole weights that lie one behind the other.

    The members of a stack have the same columns, and their source bytes and each of
    their outputs are contiguous: it is read, quantized and written as one matrix.
    ``first`` is the row of the first member where the slab starts.
    """

    members: list[Member]
    rows: int
    first: int


def slabs(segments: list[Segment]) -> Iterator[Slab]:
    """Cut segments into slabs; small neighbours are stacked."""
    stack: list[Member] = []
    filled = 0
    for segment in segments:
        member, first, last = segment
        source = member.source
        rows, cols = source.shape
        step = slab_rows(member.layout, cols * DTYPES[source.dtype].itemsize)
        whole = last - first == rows and rows < step
        if stack and not (whole and filled + rows <= step and _continues(stack[-1], member)):
            yield Slab(stack, filled, 0)
            stack, filled = [], 0
        if whole:
            stack.append(member)
            filled += rows
            continue
        for row in range(first, last, step):
            yield Slab([member], min(step, last - row), row)
    if stack:
        yield Slab(stack, filled, 0)


def _continues(a: Member, b: Member) -> bool:
    """Whether ``b`` follows ``a`` in the source and in every output made of rows."""
    s, t = a.source, b.source
    if s.shape[1] != t.shape[1] or s.dtype != t.dtype or s.file != t.file:
        return False
    if s.shape[0] % a.layout.row_step or t.start != s.end:
        return False
    return all(
        y == x + e.size
        for e, x, y in zip(a.layout.entries, a.starts, b.starts, strict=True)
        if e.rows
    )


class Worker:
    """The buffers of one thread and the three things it does with them."""

    def __init__(
        self,
        source: Checkpoint,
        numerics: Numerics,
        memory: int,
        stop: threading.Event,
        progress: Callable[[int, str], None],
    ) -> None:
        self._source = source
        self._numerics = numerics
        self._arena = np.empty(memory + 8 * 64, np.uint8)
        self._stop = stop
        self._progress = progress

    def amax(self, segments: list[Segment]) -> dict[str, float]:
        """Largest magnitude of each weight over the given rows, by tensor name."""
        found: dict[str, float] = {}
        for slab in slabs(segments):
            x, _ = self._read(slab)
            with _telling(slab):
                rows = cpu.amax(x)
            if len(slab.members) == 1:
                name = slab.members[0].source.name
                found[name] = max(found.get(name, 0.0), float(rows.max()))
            else:
                starts = np.cumsum([0] + [m.source.shape[0] for m in slab.members[:-1]])
                tops = np.maximum.reduceat(rows, starts).tolist()
                found.update(zip((m.source.name for m in slab.members), tops, strict=True))
        return found

    def outer(self, amax: float, scheme: Scheme, member: Member) -> np.float32:
        """The scale above the blocks for the amax of a group."""
        dtype = DTYPES[member.source.dtype].numpy
        assert dtype is not None
        return np.float32(outer_scale(np.float32(amax), scheme, dtype, self._numerics))

    def quantize(
        self,
        segments: list[Segment],
        scheme: Scheme,
        outer: dict[str, np.float32],
        shard: ShardWriter,
    ) -> None:
        """Read, quantize and write rows; small outputs when their weight begins."""
        for slab in slabs(segments):
            x, free = self._read(slab)
            above = None
            if outer:
                counts = [slab.rows] if len(slab.members) == 1 else [
                    m.source.shape[0] for m in slab.members
                ]  # fmt: skip
                above = np.repeat([outer[m.source.name] for m in slab.members], counts)
            head = slab.members[0]
            with _telling(slab):
                q = cpu.quantize(
                    x, scheme, head.layout.packing, numerics=self._numerics, outer=above,
                    out=self._buffers(x, scheme, head, free),
                )  # fmt: skip
            arrays = fmt.pack(q, scheme)
            for entry, start in zip(head.layout.entries, head.starts, strict=True):
                if entry.rows:
                    data = arrays[entry.role].view(np.uint8)  # ml_dtypes have no buffers
                    shard.put(start + entry.offset(slab.first), data)
            if slab.first == 0:
                for member in slab.members:
                    _put_small(member, outer.get(member.source.name), shard)
            self._progress(x.nbytes, head.source.name)

    def copy(
        self, file: str, start: int, offset: int, nbytes: int, name: str, shard: ShardWriter
    ) -> None:
        """Copy bytes that stay as they are, a piece at a time so that a stop is heard."""
        for done in range(0, nbytes, COPY):
            self._heed()
            n = min(COPY, nbytes - done)
            shard.copy_from(self._source.fd(file), start + done, offset + done, n)
            self._progress(n, name)

    def _heed(self) -> None:
        if self._stop.is_set():
            raise Stopped

    def _read(self, slab: Slab) -> tuple[Array, int]:
        """The slab's rows and the offset of the free rest of the arena."""
        self._heed()
        source = slab.members[0].source
        dtype = DTYPES[source.dtype].numpy
        assert dtype is not None
        row_bytes = source.shape[1] * dtype.itemsize
        nbytes = slab.rows * row_bytes
        part = self._arena[:nbytes]
        self._source.pread(source.file, source.start + slab.first * row_bytes, part.data)
        return part.view(dtype).reshape(slab.rows, source.shape[1]), nbytes

    def _buffers(self, x: Array, scheme: Scheme, member: Member, at: int) -> Quantized:
        """Where the kernel writes: views into the arena behind the input."""
        like = cpu.shapes(x.shape[0], x.shape[1], x.dtype, scheme, member.layout.packing)
        views = []
        for shape, dtype in like:
            at = -(-at // 64) * 64
            nbytes = shape[0] * shape[1] * dtype.itemsize
            views.append(self._arena[at : at + nbytes].view(dtype).reshape(shape))
            at += nbytes
        return Quantized(*views)


def _put_small(member: Member, outer: np.float32 | None, shard: ShardWriter) -> None:
    """Outputs of a few bytes that are not made of rows."""
    for entry, start in zip(member.layout.entries, member.starts, strict=True):
        if entry.role == "global_scale":
            assert outer is not None
            shard.put_small(start, outer.tobytes())
        elif entry.role == "constant":
            shard.put_small(start, entry.value)


class _telling:
    """Gives a NonFiniteError the name of the tensor and the row in it."""

    def __init__(self, slab: Slab) -> None:
        self._slab = slab

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, NonFiniteError):
            return
        row = self._slab.first + error.row
        for member in self._slab.members:
            if row < member.source.shape[0] or member is self._slab.members[-1]:
                break
            row -= member.source.shape[0]
        where = f"row {row}, column {error.col}"
        if error.what == "scale":
            raise StreamqError(
                f"tensor {member.source.name!r}: the scale at block {where} is not finite in its "
                "dtype; leave this tensor unquantized with --ignore."
            ) from None
        raise StreamqError(
            f"tensor {member.source.name!r} in {member.source.file}: {where} is NaN or Inf; "
            "the checkpoint is damaged, or leave this tensor unquantized with --ignore."
        ) from None
