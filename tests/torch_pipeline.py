"""Converts through the GPU pipeline, Triton's interpreter in place of GPUs: a process of its own.

    TRITON_INTERPRET=1 python tests/torch_pipeline.py SRC DST '[["nvfp4", {"format": ...}], ...]'

Writes ``DST/0``, ``DST/1`` ... and prints for each what ran and what was remarked, as JSON.
"""

import json
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import torch

import streamq
from streamq.converting import Settings, fleet, slabs
from streamq.pipeline import cuda, find

#: Bytes of the largest slab that there is room for: half a weight in f32.
LARGEST = 72 << 10


class Stream(cuda.GpuStream):
    def current(self):
        return nullcontext()

    def upload(self, x):
        return super().upload(x).clone()  # on the CPU it would be the same memory

    def mark(self):
        return SimpleNamespace(wait=lambda: None)

    def amax(self, *a):
        with np.errstate(all="ignore"):
            return super().amax(*a)

    def quantize(self, x, *a):
        if len(x) > LARGEST:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        with np.errstate(all="ignore"):
            return super().quantize(x, *a)


class Interpreted(cuda.Gpu):
    def __init__(self, name):
        self.name, self.kernels = name, cuda.kernels.NAME
        self.device = torch.device("cpu")

    def free(self):
        return 1 << 30

    def pinned(self, nbytes):
        return np.zeros(nbytes, np.uint8)

    def stream(self):
        return Stream(self.device, None)


def main(source, out, rows):
    find.open_devices = lambda names: [Interpreted(n) for n in names]
    fleet.SLAB, fleet.LEAST_SLAB, fleet.SMALL, slabs.SLAB = 1 << 18, 1 << 13, 1 << 14, 1 << 14
    said = []
    for number, (scheme, how) in enumerate(json.loads(rows)):
        settings = Settings(sync=False, device="cuda:0,cuda:1", workers=2)
        try:
            done = streamq.convert(source, f"{out}/{number}", scheme, settings=settings, **how)
            said.append([done.backend, *done.remarks])
        except streamq.errors.StreamqError as e:
            said.append([str(e)])
    print(json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:])
