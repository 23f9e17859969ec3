"""What one thread does: read a slab, quantize it, write what it became."""

from __future__ import annotations

import threading
from collections.abc import Callable
from math import gcd
from typing import Any

import numpy as np

from streamq.checkpoint import Checkpoint
from streamq.errors import NonFiniteError, StreamqError
from streamq.formats import compressed_tensors as fmt
from streamq.kernels import cpu
from streamq.kernels.reference import outer_scale
from streamq.plan import Member
from streamq.schemes import Numerics, Quantized, Scheme
from streamq.writer import ShardWriter

from .slabs import Segment, Slab, numpy_dtype, slabs, stacks, width_of

Array = np.ndarray[Any, Any]

#: Bytes of one piece of a plain copy.
COPY = 16 << 20
#: Bytes an outbox starts with.
OUTBOX = 1 << 18


class Stopped(Exception):
    """Another worker failed, or the user interrupted."""


class Worker:
    """The buffers of one thread and what it does with them."""

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
        self._arena = np.empty(memory, np.uint8)
        self._stop = stop
        self._progress = progress

    def amax(self, segments: list[Segment]) -> dict[str, float]:
        """Largest magnitude of each weight over the given rows, by tensor name."""
        found: dict[str, float] = {}
        for slab in slabs(segments):
            sizes = [s.numel for s in slab.segments]
            width = gcd(*sizes) if len(sizes) > 1 else slab.segments[0].member.layout.cols
            x = self._read(slab).reshape(-1, width)
            with _telling(slab.segments, width):
                rows = cpu.amax(x)
            starts = np.cumsum([0, *sizes[:-1]]) // width
            for segment, top in zip(
                slab.segments, np.maximum.reduceat(rows, starts).tolist(), strict=True
            ):
                name = segment.member.source.name
                found[name] = max(found.get(name, 0.0), top)
        return found

    def outer(self, amax: list[float], scheme: Scheme, dtype: str) -> list[np.float32]:
        """The scale above the blocks for the amax of each group."""
        tops = np.array(amax, np.float32)
        return list(outer_scale(tops, scheme, numpy_dtype(dtype), self._numerics))

    def quantize(
        self,
        segments: list[Segment],
        scheme: Scheme,
        outer: dict[str, np.float32],
        shard: ShardWriter,
    ) -> None:
        """Read, quantize and write rows; small outputs when their weight begins."""
        boxes = [Outbox(shard), Outbox(shard), Outbox(shard)]
        for slab in slabs(segments):
            x = self._read(slab)
            done = 0
            for run in stacks(slab.segments):
                numel = sum([s.numel for s in run])
                self._quantize_run(run, x[done : done + numel], scheme, outer, boxes)
                done += numel
            for member, first, _ in slab.segments:
                if first == 0:
                    _put_small(member, outer.get(member.source.name), shard)
            self._progress(x.nbytes, slab.segments[0].member.source.name)
        for box in boxes:
            box.flush()

    def _quantize_run(
        self,
        run: list[Segment],
        x: Array,
        scheme: Scheme,
        outer: dict[str, np.float32],
        boxes: list[Outbox],
    ) -> None:
        head = run[0].member
        width = width_of(run)
        x = x.reshape(-1, width)
        above = None
        if outer:
            counts = [s.numel // width for s in run]
            above = np.repeat([outer[s.member.source.name] for s in run], counts)
        packing = head.layout.packing
        entries = [(e, s) for e, s in zip(head.layout.entries, head.starts, strict=True) if e.rows]
        views = []
        for (shape, dtype), (e, start), box in zip(
            cpu.shapes(len(x), width, x.dtype, scheme, packing), entries, boxes, strict=False
        ):
            if e.role == "zero_point":  # packed by the format, after the kernel
                views.append(np.empty(shape, dtype))
                continue
            at = start + run[0].first // e.rows * e.nbytes
            size = shape[0] * shape[1] * dtype.itemsize
            views.append(box.reserve(at, size).view(dtype).reshape(shape))
        with _telling(run, width):
            q = cpu.quantize(
                x, scheme, packing, numerics=self._numerics, outer=above, out=Quantized(*views)
            )
        if q.zero_point is not None:
            (e, start), box = entries[2], boxes[2]
            data = fmt.pack_zero_point(q.zero_point, scheme.bits).view(np.uint8).reshape(-1)
            box.reserve(start + run[0].first // e.rows * e.nbytes, len(data))[:] = data

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

    def _read(self, slab: Slab) -> Array:
        self._heed()
        part = self._arena[: slab.numel * slab.dtype.itemsize]
        self._source.pread(slab.file, slab.start, part.data)
        return part.view(slab.dtype)


class Outbox:
    """Gathers neighbouring bytes of one output file until they are worth a write."""

    def __init__(self, shard: ShardWriter) -> None:
        self._shard = shard
        self._buffer = np.empty(0, np.uint8)
        self._start = self._filled = 0

    def reserve(self, offset: int, size: int) -> Array:
        """Room for ``size`` bytes that belong at ``offset``, to be filled before the next call."""
        if offset != self._start + self._filled or self._filled + size > len(self._buffer):
            self.flush()
            self._start = offset
            if size > len(self._buffer):
                self._buffer = np.empty(max(size, OUTBOX), np.uint8)
        view = self._buffer[self._filled : self._filled + size]
        self._filled += size
        return view

    def flush(self) -> None:
        """Write what is there."""
        if self._filled:
            self._shard.put(self._start, self._buffer[: self._filled])
        self._start += self._filled
        self._filled = 0


def _put_small(member: Member, outer: np.float32 | None, shard: ShardWriter) -> None:
    """Outputs of a few bytes that are not made of rows."""
    for entry, start in zip(member.layout.entries, member.starts, strict=True):
        if entry.role == "global_scale":
            assert outer is not None
            shard.put_small(start, outer.tobytes())
        elif entry.role == "constant":
            shard.put_small(start, entry.value)


class _telling:
    """Gives a NonFiniteError the name of the tensor and the place in it."""

    def __init__(self, run: list[Segment], width: int) -> None:
        self._run = run
        self._width = width

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, NonFiniteError):
            return
        at = error.row * self._width + error.col
        for segment in self._run:
            if at < segment.numel:
                break
            at -= segment.numel
        t = segment.member.source
        row, col = divmod(at, segment.member.layout.cols)
        place = f"row {segment.first + row}, column {col}"
        if error.what == "scale":
            raise StreamqError(
                f"tensor {t.name!r}: the scale of group {col} in row {segment.first + row} is not "
                "finite in its dtype; leave this tensor unquantized with --ignore."
            ) from None
        raise StreamqError(
            f"tensor {t.name!r} in {t.file}: {place} is NaN or Inf; "
            "the checkpoint is damaged, or leave this tensor unquantized with --ignore."
        ) from None
