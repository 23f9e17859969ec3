"""What one thread does: read a slab, quantize it, write what it became."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import chain
from types import ModuleType
from typing import Any

import numpy as np

from streamq.checkpoint import Checkpoint
from streamq.errors import NonFiniteError, StreamqError
from streamq.formats import compressed_tensors as fmt
from streamq.kernels.reference import outer_scale
from streamq.plan import Weights
from streamq.quality import Quality
from streamq.schemes import Numerics, Quantized
from streamq.writer import ShardWriter

from .slabs import Array, Slab, Stretch, slabs

#: Bytes of one piece of a plain copy.
COPY = 16 << 20
#: Bytes an outbox starts with.
OUTBOX = 1 << 18


class Stopped(Exception):
    """Another worker failed, or the user interrupted."""


class Worker:
    """The buffers of one thread and what it does with them.

    ``kernels``: a backend of ``streamq.kernels``; without one it can only copy.
    """

    def __init__(
        self,
        source: Checkpoint,
        kernels: ModuleType | None,
        numerics: Numerics,
        memory: int,
        stop: threading.Event,
        progress: Callable[[int, str], None],
        quality: Quality | None,
    ) -> None:
        self._source = source
        self._kernels: Any = kernels
        self._numerics = numerics
        self._arena = np.empty(memory, np.uint8)
        self._stop = stop
        self._progress = progress
        self._quality = quality

    def amax(self, work: list[Stretch], count: int) -> Array:
        """Largest magnitude of each of ``count`` weights, by number; f32 ``[count]``."""
        tops = np.zeros(count, np.float32)
        for slab in chain.from_iterable(map(slabs, work)):
            x = self._read(slab).reshape(-1, slab.span)
            with _telling(slab, slab.span):
                rows = self._kernels.amax(x)
            found = np.maximum.reduceat(rows, slab.begins // slab.span)
            part = tops[slab.number : slab.number + len(slab.begins)]
            np.maximum(part, found, out=part)
        return tops

    def outer(self, amax: Array, weights: Weights) -> Array:
        """The scale above the blocks for the amax of each group of these weights."""
        return outer_scale(amax, weights.scheme, weights.numpy, self._numerics)

    def quantize(self, work: list[Stretch], outer: Array | None, shard: ShardWriter) -> None:
        """Read, quantize and write; ``outer`` has a scale for each weight of the job."""
        boxes = [Outbox(shard), Outbox(shard), Outbox(shard)]
        for slab in chain.from_iterable(map(slabs, work)):
            x = self._read(slab)
            above = None
            if outer is not None:
                above = outer[slab.number : slab.number + len(slab.members)]
            self._quantize_slab(slab, x, above, boxes)
            if slab.first == 0:
                _put_small(slab, above, shard)
            self._progress(x.nbytes, slab.head.name)
        for box in boxes:
            box.flush()

    def _quantize_slab(
        self, slab: Slab, x: Array, above: Array | None, boxes: list[Outbox]
    ) -> None:
        scheme, layout, width = slab.weights.scheme, slab.layout, slab.width
        starts = slab.weights.starts[slab.members[0]].tolist()
        x = x.reshape(-1, width)
        if above is not None:
            above = np.repeat(above, (slab.ends - slab.begins) // width)
        packing = layout.packing
        entries = [(e, s) for e, s in zip(layout.entries, starts, strict=True) if e.rows]
        views = []
        shapes = self._kernels.shapes(len(x), width, x.dtype, scheme, packing)
        for (shape, dtype), (e, start), box in zip(shapes, entries, boxes, strict=False):
            if e.role == "zero_point":  # packed by the format, after the kernel
                views.append(np.empty(shape, dtype))
                continue
            at = start + slab.first // e.rows * e.nbytes
            size = shape[0] * shape[1] * dtype.itemsize
            views.append(box.reserve(at, size).view(dtype).reshape(shape))
        with _telling(slab, width):
            q = self._kernels.quantize(
                x, scheme, packing, numerics=self._numerics, outer=above, out=Quantized(*views)
            )
        if self._quality is not None:
            self._measure(slab, x, q, above, self._quality)
        if q.zero_point is not None:
            (e, start), box = entries[2], boxes[2]
            data = fmt.pack_zero_point(q.zero_point, scheme.bits).view(np.uint8).reshape(-1)
            box.reserve(start + slab.first // e.rows * e.nbytes, len(data))[:] = data

    def _measure(
        self, slab: Slab, x: Array, q: Quantized, above: Array | None, quality: Quality
    ) -> None:
        """Note what the codes of a slab lost."""
        weights = slab.weights
        rows = self._kernels.energies(x, q, weights.scheme, slab.layout.packing, above)
        sums = np.add.reduceat(rows, slab.begins // slab.width).tolist()
        for member, (signal, noise) in zip(slab.members.tolist(), sums, strict=True):
            quality.add(weights.sources[member].name, signal, noise)

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
        dtype = slab.weights.numpy
        nbytes = int(slab.ends[-1]) * dtype.itemsize
        part = self._arena[:nbytes]
        assert len(part) == nbytes, "a slab larger than the plan's slab_memory"
        self._source.pread(slab.head.file, slab.start, part.data)
        return part.view(dtype)


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


def _put_small(slab: Slab, outer: Array | None, shard: ShardWriter) -> None:
    """Outputs of a few bytes that are not made of rows; members' lie one behind the other."""
    weights = slab.weights
    starts = weights.starts[slab.members[0]].tolist()
    for i, (entry, start) in enumerate(zip(slab.layout.entries, starts, strict=True)):
        if entry.role == "global_scale":
            assert outer is not None
            shard.put_small(start, outer.tobytes())
        elif entry.role == "constant":
            values = [layout.entries[i].value for layout in weights.layouts]
            kinds = weights.kind[slab.members].tolist()
            shard.put_small(start, b"".join([values[k] for k in kinds]))


class _telling:
    """Gives a NonFiniteError the name of the tensor and the place in it."""

    def __init__(self, slab: Slab, width: int) -> None:
        self._slab = slab
        self._width = width

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, NonFiniteError):
            return
        slab = self._slab
        at = error.row * self._width + error.col
        number = int(np.searchsorted(slab.ends, at, "right"))
        t = slab.weights.sources[slab.members[number]]
        row, col = divmod(at - (int(slab.ends[number - 1]) if number else 0), t.shape[1])
        row += slab.first
        if error.what == "scale":
            raise StreamqError(
                f"tensor {t.name!r}: the scale of group {col} in row {row} is not "
                "finite in its dtype; leave this tensor unquantized with --ignore."
            ) from None
        raise StreamqError(
            f"tensor {t.name!r} in {t.file}: row {row}, column {col} is NaN or Inf; "
            "the checkpoint is damaged, or leave this tensor unquantized with --ignore."
        ) from None
