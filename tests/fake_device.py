"""A device of the pipeline without hardware, whose kernels are those of the CPU.

``late``: nothing happens before somebody waits for it, as on a slow device; a buffer that is
overwritten too soon, or read too early, gives other bytes. Otherwise everything happens at
once, as on a fast one, which shows results that are overwritten before they are taken.
"""

from __future__ import annotations

import threading
import weakref
from types import SimpleNamespace

import numpy as np
from streamq.kernels import cpu

from streamq.errors import NonFiniteError
from streamq.schemes import Quantized

POISON = 0xA5


class OutOfMemory(Exception):
    pass


class Buffer:
    """Memory of a device, which is free again when nobody holds it."""

    def __init__(self, device, nbytes):
        self.device = device
        with device.lock:
            if device.used + nbytes > device.memory:
                raise OutOfMemory
            device.used += nbytes
            device.most = max(device.most, device.used)
        weakref.finalize(self, device.give_back, nbytes)
        self.data = np.full(nbytes, POISON, np.uint8)


class FakeDevice:
    kernels = "fake"

    def __init__(
        self, name="cuda:0", *, late=True, memory=1 << 30, largest=None, broken=None, meet=None
    ):
        """``largest``: bytes of a slab that kernels have room for; ``broken``: what they say.

        ``meet``: a barrier for the threads of all devices, so that each of them has work.
        """
        self.name, self.late, self.memory = name, late, memory
        self.largest, self.broken, self.meet = largest, broken, meet
        self.trimmed = False
        self.used = self.most = self.slabs = self.uploads = 0
        self.lock = threading.RLock()

    def give_back(self, nbytes):
        with self.lock:
            self.used -= nbytes

    def supports(self, scheme, numerics, packing):
        return not scheme.inverse

    def free(self):
        return self.memory - self.used

    def pinned(self, nbytes):
        return np.full(nbytes, POISON, np.uint8)

    def stream(self):
        if self.meet:
            self.meet.wait(60)
        return FakeStream(self)

    def out_of_memory(self, error):
        return isinstance(error, OutOfMemory)

    def trim(self):
        self.trimmed = True


class FakeStream:
    def __init__(self, device):
        self.device = device
        self.queue = []
        self.done = 0

    def later(self, task):
        self.queue.append(task)
        if not self.device.late:
            self.run(self.done + 1)

    def run(self, until):
        while self.done < until:
            self.queue.pop(0)()
            self.done += 1

    def upload(self, x):
        self.device.uploads += 1
        to = Buffer(self.device, len(x))
        self.later(lambda: np.copyto(to.data, x))
        return to

    def amax(self, x, shape, dtype):
        to = Buffer(self.device, 4 * shape[0])

        def task():
            values = np.abs(x.data.view(dtype).reshape(shape).astype(np.float32))
            to.data.view(np.float32)[:] = values.max(axis=1)

        self.later(task)
        return to

    def quantize(self, x, shape, dtype, scheme, packing, numerics, outer, parts):
        assert x.device is self.device, "memory of another device"
        if self.device.broken:
            raise RuntimeError(self.device.broken)
        if self.device.largest is not None and len(x.data) > self.device.largest:
            raise OutOfMemory
        self.device.slabs += 1
        to = Buffer(self.device, parts.nbytes)

        def task():
            out = Quantized(**dict(zip(scheme.parts, parts.views(to.data), strict=True)))
            status = parts.status_in(to.data)
            status[:] = 0
            above = None if outer is None else outer.data.view(np.float32)
            try:
                cpu.quantize(
                    x.data.view(dtype).reshape(shape), scheme, packing,
                    numerics=numerics, outer=above, out=out,
                )  # fmt: skip
            except NonFiniteError:
                status[0] = 1

        self.later(task)
        return to

    def download(self, x, into):
        self.later(lambda: np.copyto(into, x.data[: len(into)]))

    def mark(self):
        until = self.done + len(self.queue)
        return SimpleNamespace(wait=lambda: self.run(until))
