"""One thread's way to a device: slabs go up, through a kernel and down while others are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from streamq.errors import StreamqError
from streamq.schemes import Numerics, Packing, Scheme

from .layer import Array, Device, DType, Mark, Stream
from .parts import Parts

#: Slabs of a lane that are under way at once: while one is on the device, the next is read.
SLOTS = 2


class NoRoom(Exception):
    """The device has no memory left for what was asked for."""


class Room(NamedTuple):
    """Bytes of pinned memory for one slab: as read, the scales from outside, the results."""

    read: int
    outer: int
    written: int

    @property
    def on_device(self) -> int:
        """Memory of a lane on the device."""
        return SLOTS * sum(self)

    @property
    def on_host(self) -> int:
        """The same on the host, and what a format packs of one slab."""
        return SLOTS * sum(self) + self.written


class Slot:
    """Pinned memory for one slab, and what is to be done when the device is through with it."""

    def __init__(self, device: Device, room: Room) -> None:
        self.read = device.pinned(room.read)
        self.outer = device.pinned(room.outer)
        self.written = device.pinned(room.written)
        self.on_device: list[Any] = []
        self.tensor = ""
        self.mark: Mark | None = None
        self.then: Callable[[], None] | None = None

    def clear(self) -> None:
        """Forget what it held."""
        self.on_device.clear()
        self.mark = self.then = None


class Lane:
    """A stream with a ring of slots, used by one thread.

    A slot goes to the next slab only when the mark behind its last download is reached and
    its results are taken, so that no memory is written to while somebody still needs it.
    Raises NoRoom where the device lacks memory; all else that the device reports becomes a
    StreamqError that names it and the tensor.
    """

    def __init__(self, device: Device, room: Room, size: int) -> None:
        self.device = device
        self.size = size
        self._room = room
        self._stream: Stream | None = None
        self._slots: list[Slot] = []
        self._turn = 0
        self._tensor = ""

    def fits(self, nbytes: int, rows: int) -> bool:
        """Whether a slab of so many bytes, with a number for each of its rows, does."""
        return nbytes <= self._room.read and 4 * rows <= self._room.outer

    def slot(self, tensor: str) -> Slot:
        """The next slot, free, for a slab of a tensor."""
        self._tensor = tensor
        if not self._slots:
            self._open()
        slot = self._slots[self._turn]
        self._settle(slot)
        slot.tensor = tensor
        return slot

    def submit(self, slot: Slot, then: Callable[[], None]) -> None:
        """All that ``slot`` needs of the device has been asked for; ``then`` takes its results."""
        with self._naming():
            slot.mark = self._queue.mark()
        slot.then = then
        self._turn = (self._turn + 1) % len(self._slots)

    def drain(self) -> None:
        """Wait for all slabs that are under way, and take their results in order."""
        for i in range(len(self._slots)):
            self._settle(self._slots[(self._turn + i) % len(self._slots)])

    def resize(self, room: Room, size: int) -> None:
        """Drain, and go on with smaller slabs in new memory."""
        self.drain()
        self.close()
        self.device.trim()
        self._room, self.size = room, size

    def close(self) -> None:
        """Let go of all memory when the device no longer uses it; what is under way is lost."""
        slots, self._slots = self._slots, []
        if self._stream is not None and slots:
            with self._naming(self._tensor):
                self._queue.mark().wait()
        for slot in slots:
            slot.clear()

    def upload(self, slot: Slot, x: Array) -> Any:
        """Copy pinned bytes to the device."""
        with self._naming():
            slot.on_device.append(self._queue.upload(x))
        return slot.on_device[-1]

    def amax(self, slot: Slot, x: Any, shape: tuple[int, int], dtype: DType) -> Array:
        """Ask for the largest magnitude of each row; where they will be, f32 ``[rows]``."""
        with self._naming():
            slot.on_device += [x, self._queue.amax(x, shape, dtype)]
        return self._download(slot, 4 * shape[0]).view(np.float32)

    def quantize(
        self, slot: Slot, x: Any, shape: tuple[int, int], dtype: DType, scheme: Scheme,
        packing: Packing, numerics: Numerics, outer: Array | None, parts: Parts,
    ) -> Array:  # fmt: skip
        """Ask for ``Stream.quantize``; where the parts will be, uint8 ``[parts.nbytes]``."""
        above = None
        if outer is not None:
            pinned = slot.outer[: outer.nbytes]
            pinned[:] = outer.view(np.uint8)
            above = self.upload(slot, pinned)
        with self._naming():
            made = self._queue.quantize(x, shape, dtype, scheme, packing, numerics, above, parts)
            slot.on_device += [x, made]
        return self._download(slot, parts.nbytes)

    def _download(self, slot: Slot, nbytes: int) -> Array:
        """Ask for what was made last."""
        assert nbytes <= len(slot.written), "results larger than the plan's room"
        into = slot.written[:nbytes]
        with self._naming():
            self._queue.download(slot.on_device[-1], into)
        return into

    @property
    def _queue(self) -> Stream:
        assert self._stream is not None
        return self._stream

    def _open(self) -> None:
        with self._naming():
            self._stream = self._stream or self.device.stream()
            self._slots = [Slot(self.device, self._room) for _ in range(SLOTS)]
        self._turn = 0

    def _settle(self, slot: Slot) -> None:
        if slot.mark is None or slot.then is None:
            return
        with self._naming(slot.tensor):
            slot.mark.wait()
        slot.then()
        slot.clear()

    @contextmanager
    def _naming(self, awaited: str | None = None) -> Iterator[None]:
        """Errors of the device as sentences.

        ``awaited``: the tensor of what was asked for before, whose lack of memory comes too late.
        """
        try:
            yield
        except StreamqError:
            raise
        except Exception as e:
            if awaited is None and self.device.out_of_memory(e):
                raise NoRoom from None
            first = str(e).strip().partition("\n")[0].rstrip(".") or type(e).__name__
            raise StreamqError(
                f"{self.device.name} failed at tensor {awaited or self._tensor!r}: {first}; run it "
                "again on another device, or with --device cpu."
            ) from e
