"""The devices of one conversion: what they take, the memory for it, what became of it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from streamq.errors import PlanError
from streamq.kernels.cpu import shapes
from streamq.pipeline.kept import Kept
from streamq.pipeline.lane import Room
from streamq.pipeline.layer import Device
from streamq.pipeline.parts import arrange
from streamq.planning import SLAB as SMALL
from streamq.planning import Plan, Weights, slab_rows
from streamq.tensors import size_text

from .devices import is_quantized
from .slabs import packing_of

#: Source bytes of one slab on a device, and how far it is halved where memory is short: to that
#: of the CPU, which small weights are put together to. Not measured on a GPU: a job has 8 of them.
SLAB = 8 << 20
LEAST_SLAB = 1 << 20
#: Share of the memory which is free on a device that a conversion takes by default.
SHARE = 0.75


class Fleet:
    """The devices of one conversion, and what is worth telling of it afterwards.

    ``size``: bytes of the source in a slab to begin with, ``least`` where memory is short.
    ``kept``: slabs that wait for their second pass.
    """

    def __init__(self, plans: Sequence[Plan], devices: list[Device]) -> None:
        self.devices = devices
        self.size, self.least = SLAB, LEAST_SLAB
        self.kept = Kept({})
        self._weights = [w for plan in plans if not plan.verbatim
                         for s in plan.shards for w in s.weights if is_quantized(w)]  # fmt: skip
        self._rooms: dict[int, Room] = {}
        self._ran: set[str] = set()
        self._shrunk: dict[str, int] = {}
        self._lock = threading.Lock()

    def takes(self, weights: Weights) -> bool:
        """Whether the kernels of the devices quantize some weights; else the CPU does."""
        return is_quantized(weights) and all(
            self.devices[0].supports(weights.scheme, weights.target.numerics, packing)
            for packing in {packing_of(layout) for layout in weights.layouts}
        )

    def device_of(self, worker: int) -> Device:
        """Workers take turns."""
        return self.devices[worker % len(self.devices)]

    def room(self, size: int) -> Room:
        """Memory for a slab of about ``size`` bytes of the source."""
        if size not in self._rooms:
            self._rooms[size] = room_for([w for w in self._weights if self.takes(w)], size)
        return self._rooms[size]

    def close(self) -> None:
        """Leave nothing on the devices."""
        for device in self.devices:
            self.kept.close(device.name)
            device.trim()

    def ran(self, device: Device) -> None:
        """Note that a device has done something."""
        self._ran.add(device.name)  # set.add is atomic

    def shrank(self, device: Device, size: int) -> None:
        """Note that a device had no memory left for larger slabs."""
        with self._lock:
            self._shrunk[device.name] = min(size, self._shrunk.get(device.name, size))

    def backend(self, cpu: str) -> str:
        """Whose kernels ran, and where; ``cpu``: the name of the CPU's."""
        if not self._ran:
            return cpu
        ran = f"{self.devices[0].kernels} on {', '.join(sorted(self._ran))}"
        return f"{ran}, {cpu}" if self._left() else ran

    def remarks(self, cpu: str) -> Iterator[str]:
        """Sentences about what went another way than asked for."""
        for name, size in sorted(self._shrunk.items()):
            yield f"{name} ran out of memory and went on with slabs of {size_text(size)}"
        for name, count in self._left().items():
            kernels = self.devices[0].kernels
            yield f"{count} weights to {name} ran on {cpu}, for {kernels} does not have it"

    def _left(self) -> Counter[str]:
        """Weights of each scheme that the devices do not have."""
        left: Counter[str] = Counter()
        for w in self._weights:
            if not self.takes(w):
                searched = " with searched scales" if w.scheme.scales == "search" else ""
                left[w.scheme.name + searched] += len(w.sources)
        return left


def share_out(
    fleet: Fleet, wanted: int, max_memory: int, device_memory: int | None, buffers: int,
    stats: bool,
) -> int:  # fmt: skip
    """Slabs as large as memory allows where each device has two lanes; returns the lanes.

    ``buffers``: bytes of a worker beside its lane. What is left on the devices is for slabs
    that are looked at twice.
    """
    count = len(fleet.devices)
    free = min(device.free() for device in fleet.devices)
    budget = int(free * SHARE) if device_memory is None else min(device_memory, free)
    most, size = 0, SLAB
    while most < min(wanted, 2 * count) and size >= LEAST_SLAB:
        room = fleet.room(size)
        on_devices = count * (budget // room.on_device) if room.on_device else wanted
        lanes = min(wanted, max_memory // max(1, buffers + room.on_host), on_devices)
        if lanes > most:
            most, fleet.size = lanes, size
        size //= 2
    room = fleet.room(fleet.size if most >= count else LEAST_SLAB)
    if most < count and budget < room.on_device:
        raise PlanError(
            f"{fleet.devices[0].name}: the slabs of one thread need {size_text(room.on_device)} "
            f"of device memory, it may take {size_text(budget)}; free some, raise "
            "--device-memory, or use --device cpu."
        )
    if most < count:
        raise PlanError(
            f"--max-memory {max_memory >> 20}MiB is too little: {count} devices need "
            f"{-(-count * (buffers + room.on_host) >> 20)}MiB of buffers."
        )
    left = 0 if stats else budget - -(-most // count) * room.on_device
    fleet.kept = Kept({device.name: left for device in fleet.devices})
    return most


def room_for(weights: Sequence[Weights], size: int) -> Room:
    """Pinned bytes of the largest slab of some weights where about ``size`` bytes are read."""
    read = outer = written = 0
    for w in weights:
        for kind, layout in enumerate(w.layouts):
            row = layout.cols * w.numpy.itemsize
            step = layout.row_step
            if w.stored is not None:  # the rows of what is read may go together as well
                step = max(map(w.row_step, np.flatnonzero(w.kind == kind).tolist()))
            # Small weights are not cut, and several are a slab of up to ``size``.
            whole = layout.rows if layout.bytes_in <= SMALL else 0
            rows = max(slab_rows(step, row, size), -(-size // row), whole)
            made = arrange(shapes(rows, layout.cols, w.numpy, w.scheme, packing_of(layout)))
            above = 4 * rows  # a scale, or a largest magnitude, for each row
            read, outer = max(read, rows * row), max(outer, above)
            written = max(written, made.nbytes, above)
    return Room(read, outer, written)
