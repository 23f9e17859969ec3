"""A worker whose slabs go through a device: read and written here while others are there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain
from types import ModuleType
from typing import Any

import numpy as np

from streamq.checkpoint import Checkpoint
from streamq.errors import StreamqError
from streamq.pipeline.lane import Lane, NoRoom, Slot
from streamq.pipeline.layer import Device
from streamq.pipeline.parts import arrange
from streamq.schemes import Quantized
from streamq.tensors import size_text

from .boxes import Out, Sink
from .fleet import Fleet
from .slabs import Array, Slab, Stretch, shared, slabs, span_of
from .worker import Progress, Worker

#: Asks the device for what becomes of a slab that lies at a place there; returns what to do when
#: it is here.
Launch = Callable[[Slab, Slot, Any], Callable[[], None]]


class DeviceWorker(Worker):
    """A ``Worker`` that quantizes on a device what the kernels of the device have.

    It reads into pinned memory and writes from it. Results are taken when their memory is
    needed for another slab, in the order of the slabs.
    """

    def __init__(
        self,
        source: Checkpoint,
        kernels: ModuleType,
        memory: int,
        heed: Callable[[], None],
        progress: Progress,
        fleet: Fleet,
        device: Device,
    ) -> None:
        super().__init__(source, kernels, memory, heed, progress)
        self._fleet = fleet
        self._device = device
        self._lane = Lane(device, fleet.room(fleet.size), fleet.size)

    def close(self) -> None:
        """Wait for the device, whatever happened, and let go of its memory."""
        super().close()
        with suppress(StreamqError):  # an error of the device was told of when it was met
            self._lane.close()

    def amax(self, work: list[Stretch], count: int) -> Array:
        """See ``Worker.amax``. Slabs stay on the device for the second pass where they fit."""
        if not self._fleet.takes(work[0].weights):
            return super().amax(work, count)
        tops = np.zeros(count, np.float32)

        def launch(slab: Slab, slot: Slot, x: Any) -> Callable[[], None]:
            shape = _numel(slab) // slab.span, slab.span
            found = self._lane.amax(slot, x, shape, slab.weights.numpy)

            def then() -> None:
                if not np.isfinite(found).all():
                    self._refuse(slab, lambda part: self._amax_on_cpu(part, count))
                part = tops[slab.number : slab.number + len(slab.begins)]
                np.maximum(part, np.maximum.reduceat(found, slab.begins // slab.span), out=part)
                if slab.weights.stored is None:
                    self._fleet.kept.put(_place(slab), self._device.name, _nbytes(slab), x)

            return then

        for slab in self._slabs(work):
            self._submit(slab, launch)
        self._lane.drain()
        return tops

    def quantize(self, work: list[Stretch], outer: Array | None, sink: Sink) -> None:
        """See ``Worker.quantize``."""
        super().quantize(work, outer, sink)
        if work[0].weights.needs_amax:
            self._fleet.kept.forget(map(span_of, work))

    def _slabs(self, work: list[Stretch]) -> Iterator[Slab]:
        if not self._fleet.takes(work[0].weights):
            return super()._slabs(work)
        return chain.from_iterable(slabs(stretch, self._lane.size) for stretch in work)

    def _quantize_slab(self, slab: Slab, above: Array | None, out: Out) -> None:
        if not self._fleet.takes(slab.weights):
            super()._quantize_slab(slab, above, out)
            return

        def launch(part: Slab, slot: Slot, x: Any) -> Callable[[], None]:
            return self._ask(part, slot, x, _of_part(part, slab, above), out)

        self._submit(slab, launch)

    def _drain(self) -> None:
        self._lane.drain()

    def _ask(
        self, slab: Slab, slot: Slot, x: Any, above: Array | None, out: Out
    ) -> Callable[[], None]:
        """Ask for codes and scales; returns what writes them."""
        scheme, dtype = slab.weights.scheme, slab.weights.numpy
        shape = _numel(slab) // slab.width, slab.width
        entries, packing, outer = shared(slab, above)
        parts = arrange(self._kernels.shapes(*shape, dtype, scheme, packing))
        raw = self._lane.quantize(
            slot, x, shape, dtype, scheme, packing, slab.weights.target.numerics, outer, parts
        )
        found = dict(zip(scheme.parts, parts.views(raw), strict=True))
        q = Quantized(**found, global_scale=outer if scheme.two_level else None)

        def then() -> None:
            if parts.status_in(raw).any():
                self._refuse(slab, lambda part: self._quantize_on_cpu(part, slab, above, out))
            for role, values in found.items():
                e, start = entries.get(role, (None, 0))
                if e is not None and e.direct:
                    out.put(slab, e, start, values)
            read = slot.read[: _nbytes(slab)].view(dtype).reshape(shape)
            self._finish_slab(slab, read, q, packing, outer, out)

        return then

    def _upload(self, slab: Slab, slot: Slot) -> Any:
        """The bytes of a slab on the device, where they may still be from the first pass."""
        nbytes = _nbytes(slab)
        if slab.weights.needs_amax and slab.weights.stored is None:
            self._heed()  # before the slab is taken: an exception would keep it on the device
            x = self._fleet.kept.take(_place(slab), self._device.name, nbytes)
            if x is not None:
                return x
        pinned = slot.read[:nbytes]
        values = self._read(slab, pinned)
        if not np.may_share_memory(values, pinned):
            pinned[:] = values.view(np.uint8)
        return self._lane.upload(slot, pinned)

    def _submit(self, slab: Slab, launch: Launch) -> None:
        """Bring a slab on its way, in parts where there is no room for the whole."""
        if not self._lane.fits(_nbytes(slab), _numel(slab) // slab.width):
            for part in slabs(_stretch(slab), _nbytes(slab) // 2):
                self._submit(part, launch)
            return
        try:
            slot = self._lane.slot(slab.head.name)
            self._lane.submit(slot, launch(slab, slot, self._upload(slab, slot)))
        except NoRoom:
            pass
        else:
            self._fleet.ran(self._device)
            return
        self._shrink(slab)
        self._submit(slab, launch)

    def _shrink(self, slab: Slab) -> None:
        """Go on with slabs of half the size. Raises StreamqError where they are small already."""
        if self._lane.size == self._fleet.least:
            raise StreamqError(
                f"{self._device.name} has no memory left for {size_text(_nbytes(slab))} of tensor "
                f"{slab.head.name!r}; free some, or use --device cpu."
            )
        self._fleet.kept.close(self._device.name)
        size = max(self._fleet.least, self._lane.size // 2)
        self._lane.resize(self._fleet.room(size), size)
        self._fleet.shrank(self._device, size)

    def _quantize_on_cpu(self, part: Slab, slab: Slab, above: Array | None, out: Out) -> None:
        super()._quantize_slab(part, _of_part(part, slab, above), out)

    def _amax_on_cpu(self, part: Slab, count: int) -> None:
        super().amax([_stretch(part)], count)

    def _refuse(self, slab: Slab, on_cpu: Callable[[Slab], None]) -> None:
        """Raise what the CPU says of a slab that the device found not to be finite."""
        for part in slabs(_stretch(slab)):
            on_cpu(part)
        raise StreamqError(
            f"tensor {slab.head.name!r}: {self._device.name} found a value that is not finite, the "
            "CPU does not; convert with --device cpu, and report this."
        )


def _numel(slab: Slab) -> int:
    return int(slab.ends[-1])


def _nbytes(slab: Slab) -> int:
    return _numel(slab) * slab.weights.numpy.itemsize


def _place(slab: Slab) -> tuple[str, int]:
    return slab.head.file, slab.start


def _of_part(part: Slab, slab: Slab, above: Array | None) -> Array | None:
    """The scales above the members of a part, from those of the slab that it was cut from."""
    first = part.number - slab.number
    return None if above is None else above[first : first + len(part.members)]


def _stretch(slab: Slab) -> Stretch:
    """What a slab was cut from, no longer than the slab."""
    return Stretch(slab.weights, slab.members, slab.ends, slab.first, slab.number)
