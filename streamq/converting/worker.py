"""What one thread does: read a slab, quantize it, write what it became."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from types import ModuleType
from typing import Any

import numpy as np

from streamq.checkpoint import Checkpoint
from streamq.errors import StreamqError
from streamq.kernels.reference import outer_scale
from streamq.planning import Weights
from streamq.quality import Quality
from streamq.schemes import FLOAT_TAGS, Packing, Quantized
from streamq.stored import Stored, read, read_rows
from streamq.tensors import DTYPES

from .boxes import Out, Sink, Tally, Writer
from .errors import refuse_damaged, telling
from .slabs import Array, Slab, Stretch, joined, placed, shared, slabs, span_of

#: Bytes of one piece of a plain copy.
COPY = 16 << 20


#: Told of the bytes of the source that are done, and the name of a tensor; from any thread.
Progress = Callable[[int, str], None]


class Worker:
    """The buffers of one thread and what it does with them.

    ``kernels``: a backend of ``streamq.kernels``; without one it can only copy. ``heed`` raises
    once another thread has failed.
    """

    def __init__(
        self,
        source: Checkpoint,
        kernels: ModuleType | None,
        memory: int,
        heed: Callable[[], None],
        progress: Progress,
    ) -> None:
        self._source = source
        self._kernels: Any = kernels
        self._arena = np.empty(memory, np.uint8)
        self._heed = heed
        self._progress = progress
        self._held: list[tuple[str, int, Array]] = []

    def hold(self, work: list[Stretch]) -> None:
        """Read what some work will look at, once, until ``release``."""
        for file, start, end in joined(span_of(r) for r in work if r.weights.stored is None):
            self._heed()
            held = np.empty(end - start, np.uint8)
            self._source.pread(file, start, held.data)
            self._held.append((file, start, held))

    def release(self) -> None:
        """Forget what was held."""
        self._held.clear()

    def close(self) -> None:
        """Let go of everything, also after an error."""
        self.release()

    def amax(self, work: list[Stretch], count: int) -> Array:
        """Largest magnitude of each of ``count`` weights, by number; f32 ``[count]``."""
        tops = np.zeros(count, np.float32)
        for slab in self._slabs(work):
            x = self._read(slab).reshape(-1, slab.span)
            with telling(slab, slab.span):
                rows = self._kernels.amax(x)
            found = np.maximum.reduceat(rows, slab.begins // slab.span)
            part = tops[slab.number : slab.number + len(slab.begins)]
            np.maximum(part, found, out=part)
        return tops

    def outer(self, amax: Array, weights: Weights) -> Array:
        """The scale above the blocks for the amax of each group of these weights."""
        return outer_scale(amax, weights.scheme, weights.numpy, weights.target.numerics)

    def quantize(self, work: list[Stretch], outer: Array | None, sink: Sink) -> None:
        """Read, quantize and write; ``outer`` has a scale for each weight of the work."""
        out = Out(sink)
        for slab in self._slabs(work):
            above = None
            if outer is not None:
                above = outer[slab.number : slab.number + len(slab.members)]
            if slab.weights.target.origin == "codes":
                above = self._repack_slab(slab, out)
            elif slab.weights.scheme.is_float:
                self._cast_slab(slab, out)
            else:
                self._quantize_slab(slab, above, out)
            if slab.first == 0:
                _put_small(slab, above, sink.writer, _input_scale(slab, self._source))
            self._progress(_bytes_read(slab), slab.head.name)
        self._drain()
        out.flush()

    def _slabs(self, work: list[Stretch]) -> Iterator[Slab]:
        return chain.from_iterable(map(slabs, work))

    def _drain(self) -> None:
        """Wait for slabs that are under way elsewhere."""

    def _quantize_slab(self, slab: Slab, above: Array | None, out: Out) -> None:
        scheme, width = slab.weights.scheme, slab.width
        x = self._read(slab).reshape(-1, width)
        entries, packing, above = shared(slab, above)
        parts = {}
        shapes = self._kernels.shapes(len(x), width, x.dtype, scheme, packing)
        for (shape, dtype), role in zip(shapes, scheme.parts, strict=True):
            e, start = entries.get(role, (None, 0))
            if e is None or not e.direct:  # packed by the format, after the kernel
                parts[role] = np.empty(shape, dtype)
                continue
            size = shape[0] * shape[1] * dtype.itemsize
            parts[role] = out.reserve(slab, e, start, size).view(dtype).reshape(shape)
        with telling(slab, width):
            q = self._kernels.quantize(
                x,
                scheme,
                packing,
                numerics=slab.weights.target.numerics,
                outer=above,
                out=Quantized(**parts),
            )
        self._finish_slab(slab, x, q, packing, above, out)

    def _finish_slab(
        self, slab: Slab, x: Array, q: Quantized, packing: Packing, above: Array | None, out: Out
    ) -> None:
        """Measure, and write what the format packs; what kernels make directly is written."""
        if out.tally.quality is not None:
            self._measure(slab, x, q, packing, above, out.tally.quality)
        for e, start in placed(slab):
            if not e.direct:
                with telling(slab, slab.width):
                    data = slab.weights.target.format.pack(
                        e.role, q, slab.layout, slab.weights.scheme
                    )
                out.put(slab, e, start, data)

    def _repack_slab(self, slab: Slab, out: Out) -> Array | None:
        """Write the codes of the source in another arrangement; returns their divisor."""
        s = slab.stored
        assert isinstance(s, Stored)
        q = read_rows(self._source, s, slab.first, int(slab.ends[0]) // slab.layout.cols)
        refuse_damaged(slab, q)
        lost = q.zero_point is None and not (s.scheme.symmetric or s.scheme.inverse)
        if q.bias is not None and lost:
            raise StreamqError(
                f"tensor {slab.head.name!r} has a bias that is no zero point times its scale, "
                f"which the format {slab.weights.target.format.name} cannot hold; --requantize "
                "does not help, convert it to floats with -s bf16 first."
            )
        q = self._with_scale_of(slab, q, out.tally)
        if q.zero_point is None and not slab.weights.scheme.symmetric:
            q = replace(q, zero_point=np.zeros(q.scale.shape, np.int8))
        for e, start in placed(slab):
            with telling(slab, slab.layout.cols):
                data = slab.weights.target.format.pack(e.role, q, slab.layout, slab.weights.scheme)
            out.put(slab, e, start, data)
        return q.global_scale

    def _with_scale_of(self, slab: Slab, q: Quantized, tally: Tally) -> Quantized:
        """Codes with scales in the dtype of the output."""
        tag = slab.layout.entry("scale").dtype
        dtype = DTYPES[tag].numpy
        if dtype is None or q.scale.dtype.itemsize == 1 or q.scale.dtype == dtype:
            return q
        with np.errstate(over="ignore", under="ignore"):
            scale = q.scale.astype(dtype)
        changed = scale.astype(np.float32) != q.scale.astype(np.float32)
        if changed.any():
            if not np.isfinite(scale[changed].astype(np.float32)).all() or not scale[changed].all():
                raise StreamqError(
                    f"tensor {slab.head.name!r}: a scale is beyond the range of {tag}, which the "
                    f"format {slab.weights.target.format.name} stores."
                )
            tally.round(int(changed.sum()))
        return replace(q, scale=scale)

    def _cast_slab(self, slab: Slab, out: Out) -> None:
        """Write values as they are, rounded to a float dtype."""
        ((e, start),) = placed(slab)
        x = self._read(slab)
        dtype = DTYPES[FLOAT_TAGS[slab.weights.scheme.element]].numpy
        copied = slab.weights.target.origin == "views"  # of its dtype already, NaN and Inf too
        cast, finite = (x, True) if copied else self._kernels.cast(x, dtype)
        if not finite:
            bad = ~np.isfinite(cast.astype(np.float32))
            row, col = divmod(int(np.argmax(bad)), slab.layout.cols)
            raise StreamqError(
                f"tensor {slab.head.name!r}: the value {x[row * slab.layout.cols + col]:g} at row "
                f"{slab.first + row}, column {col} is not finite in {slab.weights.scheme.name}."
            )
        q = Quantized(cast.reshape(-1, slab.layout.cols), np.empty(0))
        data = slab.weights.target.format.pack(e.role, q, slab.layout, slab.weights.scheme)
        out.put(slab, e, start, data)

    def _measure(
        self, slab: Slab, x: Array, q: Quantized, packing: Packing, above: Array | None,
        quality: Quality,
    ) -> None:  # fmt: skip
        """Note what the codes of a slab lost."""
        weights = slab.weights
        names = [weights.sources[member].name for member in slab.members.tolist()]
        if quality.detailed:
            rows = (slab.ends - slab.begins) // slab.width
            member = np.repeat(np.arange(len(rows)), rows)
            sums, bins = self._kernels.losses(x, q, weights.scheme, packing, above, member)
            quality.add_losses(names, sums.tolist(), bins)
            return
        rows = self._kernels.energies(x, q, weights.scheme, packing, above)
        sums = np.add.reduceat(rows, slab.begins // slab.width).tolist()
        for name, (signal, noise) in zip(names, sums, strict=True):
            quality.add(name, signal, noise)

    def copy(
        self, file: str, start: int, offset: int, nbytes: int, name: str, shard: Writer
    ) -> None:
        """Copy bytes that stay as they are, a piece at a time so that a stop is heard."""
        for done in range(0, nbytes, COPY):
            self._heed()
            n = min(COPY, nbytes - done)
            shard.copy_from(self._source.fd(file), start + done, offset + done, n)
            self._progress(n, name)

    def _read(self, slab: Slab, into: Array | None = None) -> Array:
        """The values of a slab, as one row; in ``into`` if they are read as they are."""
        self._heed()
        if slab.weights.stored is not None:
            rows = int(slab.ends[0]) // slab.layout.cols
            s = slab.stored
            if not isinstance(s, Stored):
                return s.read(self._source, slab.first, rows).reshape(-1)
            q = read_rows(self._source, s, slab.first, rows)
            values: Array = self._kernels.dequantize(q, s.scheme)
            return values.reshape(-1)
        dtype = slab.weights.numpy
        nbytes = int(slab.ends[-1]) * dtype.itemsize
        for file, start, held in self._held:
            begin = slab.start - start
            if file == slab.head.file and begin >= 0 and begin + nbytes <= len(held):
                return held[begin : begin + nbytes].view(dtype)
        part = (self._arena if into is None else into)[:nbytes]
        assert len(part) == nbytes, "a slab larger than the plan's slab_memory"
        self._source.pread(slab.head.file, slab.start, part.data)
        return part.view(dtype)


def _bytes_read(slab: Slab) -> int:
    """Bytes of the source that a slab stands for."""
    numel = int(slab.ends[-1])
    if slab.weights.stored is None:
        return numel * slab.weights.numpy.itemsize
    done = slab.first * slab.layout.cols
    total = slab.layout.rows * slab.layout.cols
    nbytes = slab.stored.nbytes
    return nbytes * (done + numel) // total - nbytes * done // total


def _input_scale(slab: Slab, source: Checkpoint) -> bytes | None:
    """The constant scale of the activations that the source has, as the target stores it.

    2688 and the largest activation make it, as they make the global scale of a weight.
    """
    target = slab.weights.target
    activation = target.scheme.activation
    if target.origin != "codes" or activation is None or not activation.local:
        return None
    s = slab.stored
    if not isinstance(s, Stored) or s.scheme.activation != activation:
        return None
    g = s.format.unpack_global(read(source, s.tensors[s.layout.entry("constant").suffix]))
    return target.format.pack_global(g, slab.weights.numpy).tobytes()


def _put_small(slab: Slab, outer: Array | None, shard: Writer, input_scale: bytes | None) -> None:
    """Outputs of a few bytes that are not made of rows; members' lie one behind the other."""
    weights = slab.weights
    starts = weights.starts[slab.members[0]].tolist()
    for i, (entry, start) in enumerate(zip(slab.layout.entries, starts, strict=True)):
        if entry.role == "global_scale":
            assert outer is not None
            stored = weights.target.format.pack_global(outer, weights.numpy)
            shard.put_small(start, stored.tobytes())
        elif entry.role == "constant":
            values = [layout.entries[i].value for layout in weights.layouts]
            kinds = weights.kind[slab.members].tolist()
            shard.put_small(start, input_scale or b"".join([values[k] for k in kinds]))
