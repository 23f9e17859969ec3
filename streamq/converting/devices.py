"""What a conversion runs on: threads, and devices beside the CPU with their memory."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from streamq.errors import PlanError
from streamq.pipeline import Device, Kept, Room, arrange, device_names, has_gpu, open_devices
from streamq.planning import SLAB as SMALL
from streamq.planning import Plan, Weights, slab_rows
from streamq.tensors import size_text

from .slabs import packing_of

#: Source bytes of one slab on a device, and how far it is halved where memory is short: to that
#: of the CPU, which small weights are put together to. Not measured on a GPU: a job has 8 of them.
SLAB = 8 << 20
LEAST_SLAB = 1 << 20
#: Share of the memory which is free on a device that a conversion takes by default.
SHARE = 0.75
#: Host memory of torch beside that of numba: measured on the CPU build, contexts of GPUs add to it.
TORCH_MEMORY = 222 << 20

#: What ``--device auto`` compares. Bytes of bf16 a second that one core quantizes: about the
#: slowest in docs/performance.md, and in docs/quality.md for searched scales.
CORE_RATE = {"absmax": 5.0e9, "search": 0.6e9}
#: Seconds until the first kernel of a GPU runs: 1.3 to import torch are measured, the rest,
#: its context and loading kernels, is assumed.
GPU_START = 3.0


class Fleet:
    """The devices of one conversion, and what is worth telling of it afterwards."""

    def __init__(self, plans: Sequence[Plan], devices: list[Device]) -> None:
        self.devices = devices
        self.size = SLAB
        self.kept = Kept({})
        self._weights = [w for plan in plans if not plan.verbatim
                         for s in plan.shards for w in s.weights if is_quantized(w)]  # fmt: skip
        self._rooms: dict[int, Room] = {}
        self._ran: set[str] = set()
        self._shrunk: dict[str, int] = {}
        self._lock = threading.Lock()

    def takes(self, weights: Weights) -> bool:
        """Whether the kernels of the devices quantize some weights; else the CPU does."""
        return is_quantized(weights) and self.devices[0].supports(weights.scheme)

    def device_of(self, worker: int) -> Device:
        """Workers take turns."""
        return self.devices[worker % len(self.devices)]

    def room(self, size: int) -> Room:
        """Memory for a slab of about ``size`` bytes of the source."""
        if size not in self._rooms:
            self._rooms[size] = room_for([w for w in self._weights if self.takes(w)], size)
        return self._rooms[size]

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


@dataclass(frozen=True, slots=True)
class Means:
    """What a conversion runs on.

    ``workers``: threads. ``held``: bytes of each beside the buffers that the plan knows of.
    ``fleet``: None for the CPU. ``remarks``: why ``auto`` chose what it did.
    """

    workers: int
    held: int
    fleet: Fleet | None = None
    remarks: tuple[str, ...] = ()

    @property
    def devices(self) -> list[str]:
        """Their names."""
        return [device.name for device in self.fleet.devices] if self.fleet else ["cpu"]

    def peak_memory(self, plan: Plan) -> int:
        """Estimate of the peak resident size of the process, in bytes."""
        return plan.peak_memory(self.workers, self.held) + (TORCH_MEMORY if self.fleet else 0)

    def backend(self, cpu: str) -> str:
        """Whose kernels ran, for people; ``cpu``: the name of the CPU's."""
        return self.fleet.backend(cpu) if self.fleet else cpu


def means(
    plans: Sequence[Plan], device: str, wanted: int, max_memory: int, device_memory: int | None,
    held: int, stats: bool,
) -> Means:  # fmt: skip
    """Choose devices and share out memory.

    ``wanted``: threads. ``max_memory``: bytes of host memory for all of them, ``device_memory``
    of each device. ``held``: see ``Plan.workers_within``. ``stats``: what was read is needed
    once more. Raises PlanError for a device that cannot be used, and for memory that does not
    hold one slab.
    """
    names = device_names(device)
    devices: list[Device] = []
    remarks: tuple[str, ...] = ()
    if names == ("auto",):
        devices, why = _chosen(plans, wanted)
        remarks = (why,)
    elif names != ("cpu",):
        devices = open_devices(names)
    if devices:
        fleet = Fleet(plans, devices)
        buffers = max(plan.slab_memory for plan in plans) + held
        most = max(wanted, len(devices))
        try:
            workers = _share_out(fleet, most, max_memory, device_memory, buffers, stats)
            return Means(workers, held + fleet.room(fleet.size).on_host, fleet, remarks)
        except PlanError as e:
            if not remarks:
                raise
            remarks = (f"device auto: the CPU, because of {str(e).removesuffix('.')}",)
    workers = min(plan.workers_within(wanted, max_memory, held) for plan in plans)
    return Means(workers, held, None, remarks)


def _chosen(plans: Sequence[Plan], workers: int) -> tuple[list[Device], str]:
    """The first GPU if it would be faster, and why or why not."""
    seconds = sum(
        int(w.column(lambda x: x.bytes_in).sum()) / CORE_RATE[w.scheme.scales] / workers
        for plan in plans if not plan.verbatim
        for s in plan.shards for w in s.weights if is_quantized(w)
    )  # fmt: skip
    why = f"its kernels need about {seconds:.1f} s for this, a GPU {GPU_START:.0f} s to start"
    if seconds <= GPU_START:
        return [], f"device auto: the CPU, because {why}"
    if not has_gpu():
        return [], "device auto: the CPU, because this machine shows no GPU"
    try:
        devices = open_devices(["cuda:0"])
    except PlanError as e:
        return [], f"device auto: the CPU, because of {str(e).removesuffix('.')}"
    return devices, f"device auto: {devices[0].name}, because on the CPU {why}"


def _share_out(
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


def is_quantized(weights: Weights) -> bool:
    """Whether codes are made, so that there is something for kernels to do."""
    return weights.target.origin != "codes" and not weights.scheme.is_float


def room_for(weights: Sequence[Weights], size: int) -> Room:
    """Pinned bytes of the largest slab of some weights where about ``size`` bytes are read."""
    from streamq.kernels.cpu import shapes  # with numba, which a plan for the CPU does without

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
