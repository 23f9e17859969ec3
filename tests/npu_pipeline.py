"""Converts with --device npu, torch's CPU and the shim's kernels for NPUs: a process of its own.

    python tests/npu_pipeline.py DST '[["SRC", "Ascend910B2", "w8a8", {"format": ...}], ...]'

Writes ``DST/0``, ``DST/1`` ... and prints for each what ran and what was remarked, as JSON.
``torch.npu`` is a stand-in: all that is asked of it happens at once.
"""

import json
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from ascendc_shim import on_host
from streamq.kernels import ascendc

import streamq
from streamq.converting import Settings, fleet, slabs
from streamq.pipeline import npu

COUNT = 2
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


def stand_in(chip):
    @contextmanager
    def stream(s):
        assert s.device.type == "cpu"
        yield

    torch.npu = SimpleNamespace(
        device_count=lambda: COUNT, mem_get_info=lambda n: (1 << 30, 2 << 30), Event=Event,
        Stream=lambda device: SimpleNamespace(device=device), stream=stream,
        empty_cache=lambda: None, get_device_name=lambda n: chip,
    )  # fmt: skip
    opened = on_host(ascendc.chips.chip_of(chip), torch)
    ascendc.open_device = lambda: opened
    npu.NpuStream = Stream


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
    print(json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:])
