"""Converts with --device npu, torch's CPU and the shim's kernels for NPUs: a process of its own.

    python tests/npu_pipeline.py DST '[["SRC", "Ascend910B2", "w8a8", {"format": ...}], ...]'

Writes ``DST/0``, ``DST/1`` ... and prints for each what ran and what was remarked, as JSON.
``torch.npu`` is a stand-in: all that is asked of it happens at once.
"""

import json
import sys
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import torch
from ascendc_shim import on_host
from streamq.kernels import ascendc, cpu, reference
from streamq.kernels.golden import CASES

import streamq
from streamq.converting import Settings, fleet, slabs
from streamq.pipeline import npu
from streamq.pipeline.lane import Lane, Room
from streamq.pipeline.parts import arrange
from streamq.schemes import BYTES

COUNT = 2
#: The stream that a thread works on.
CURRENT = threading.local()
#: Bytes of the largest slab that there is room for: half a weight in f32.
LARGEST = 72 << 10


class Event:
    def __init__(self, blocking):
        assert blocking, "a thread that waits must not keep others from the processor"
        self.recorded = False

    def record(self, stream):
        assert stream.device.index < COUNT
        self.recorded = True

    def synchronize(self):
        assert self.recorded


class Stream(npu.NpuStream):
    def upload(self, x):
        return super().upload(x).clone()  # on the CPU it would be the same memory

    def quantize(self, x, *a):
        if len(x) > LARGEST:
            raise torch.OutOfMemoryError("NPU out of memory. Tried to allocate 1 GiB")
        return super().quantize(x, *a)


@contextmanager
def on(stream):
    CURRENT.stream = stream
    try:
        yield
    finally:
        CURRENT.stream = None


def synchronize():
    assert CURRENT.stream, "the stream of a lane has to be current around a launch"


def stand_in(chip):
    torch.npu = SimpleNamespace(
        device_count=lambda: COUNT, get_device_name=lambda n: chip,
        mem_get_info=lambda n: (1 << 30, 2 << 30), empty_cache=lambda: None,
        Stream=lambda device: SimpleNamespace(device=device, npu_stream=None), Event=Event,
        stream=on, current_stream=lambda: CURRENT.stream, synchronize=synchronize,
    )  # fmt: skip
    opened = on_host(ascendc.chips.chip_of(chip), torch)
    ascendc.open_device = lambda: opened
    npu.NpuStream = Stream


def whole_tensor():
    """Both passes of a scheme that no format has: whether they are equal; amax where one is NaN."""
    scheme, shape = CASES["FP8_TENSOR"], (48, 80)
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    parts = arrange(cpu.shapes(*shape, x.dtype, scheme, BYTES))
    (device,) = npu.open_npus([1])
    tops = reference.amax(x)
    outer = np.full(len(x), reference.outer_scale(tops.max(keepdims=True), scheme, x.dtype, "f32"))
    want = reference.quantize(x, scheme, outer=outer)

    def amax(slot, at):
        return lane.amax(slot, at, shape, x.dtype)

    def quantize(slot, at):
        return lane.quantize(slot, at, shape, x.dtype, scheme, BYTES, "f32", outer, parts)

    lane, found = Lane(device, Room(x.nbytes, 4 * len(x), parts.nbytes), x.nbytes), []
    for values, ask in ((x, amax), (x, quantize), (np.where(x == x[3, 4], np.nan, x), amax)):
        slot = lane.slot("w")
        slot.read[:] = values.view(np.uint8).reshape(-1)
        result = ask(slot, lane.upload(slot, slot.read))
        lane.submit(slot, lambda result=result: found.append(result.copy()))
    lane.drain()
    codes, _ = parts.views(found[1])
    equal = codes.tobytes() == want.codes.tobytes() and not parts.status_in(found[1]).any()
    return [found[0].tolist() == tops.tolist(), equal, np.isfinite(found[2]).any().item()]


def main(out, rows):
    empty = torch.empty
    torch.empty = lambda *a, pin_memory=False, **kw: empty(*a, **kw)  # there is no device to ask
    fleet.SLAB, fleet.LEAST_SLAB, fleet.SMALL, slabs.SLAB = 1 << 18, 1 << 13, 1 << 14, 1 << 14
    said = []
    for number, (source, chip, scheme, how) in enumerate(json.loads(rows)):
        stand_in(chip)
        settings = Settings(sync=False, device="npu:0,npu:1", workers=2)
        try:
            done = streamq.convert(source, f"{out}/{number}", scheme, settings=settings, **how)
            said.append([done.backend, *done.remarks])
        except streamq.errors.StreamqError as e:
            said.append([str(e)])
    stand_in("Ascend950PR_9599")
    print(json.dumps([*said, *whole_tensor()]))


if __name__ == "__main__":
    main(*sys.argv[1:])
