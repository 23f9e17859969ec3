"""GPUs through torch, which nothing but this file and the kernels of GPUs imports."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import torch as _torch

from streamq.errors import PlanError
from streamq.kernels import triton as _triton
from streamq.schemes import Numerics, Packing, Quantized, Scheme

from .find import no_gpu
from .layer import Array, Device, DType, Mark, Stream
from .parts import Parts

# Neither has types that hold for every version this runs with.
torch: Any = _torch
kernels: Any = _triton

#: Compute capability that Triton's compiler supports, as its README has it.
CAPABILITY = (8, 0)

#: Held while kernels are started, so that a thread waits for one that compiles them and does not
#: compile them too; a launch holds Python's own lock anyway.
_LAUNCHING = threading.Lock()

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def open_gpus(numbers: Sequence[int]) -> list[Device]:
    """GPUs by number. Raises PlanError, saying what to do, for what cannot be used."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say is in the exception too
        try:
            torch.cuda.init()
        except Exception as e:
            why = no_gpu(str(e), torch.__version__)
            raise PlanError(f"--device cuda: {why}, or use --device cpu.") from None
        count = torch.cuda.device_count()
        for n in numbers:
            if n >= count:
                there = ", ".join(f"cuda:{i}" for i in range(count))
                raise PlanError(f"--device cuda:{n}: no such GPU; there is {there}.")
            capability = torch.cuda.get_device_capability(n)
            if torch.version.hip is None and capability < CAPABILITY:
                raise PlanError(
                    f"--device cuda:{n}: {torch.cuda.get_device_name(n)} has compute capability "
                    f"{capability[0]}.{capability[1]}, the kernels need {CAPABILITY[0]}."
                    f"{CAPABILITY[1]}; use --device cpu."
                )
    return [Gpu(n) for n in numbers]


class Gpu:
    """One GPU; see ``Device``."""

    def __init__(self, number: int) -> None:
        self.name = f"cuda:{number}"
        self.kernels = kernels.NAME
        self.device = torch.device("cuda", number)

    def supports(self, scheme: Scheme, numerics: Numerics, packing: Packing) -> bool:
        """Whether the kernels have a scheme; they have all numerics and packings of it."""
        return bool(kernels.supports(scheme))

    def free(self) -> int:
        """Bytes of memory that nobody uses."""
        return int(torch.cuda.mem_get_info(self.device)[0])

    def pinned(self, nbytes: int) -> Array:
        """New page-locked memory."""
        made: Array = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()
        return made

    def stream(self) -> Stream:
        """A new CUDA stream."""
        return GpuStream(self.device, torch.cuda.Stream(self.device))

    def out_of_memory(self, error: Exception) -> bool:
        """torch has a class for it, the CUDA driver below Triton a text."""
        return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)

    def trim(self) -> None:
        """Give back what torch keeps for later allocations."""
        torch.cuda.empty_cache()


class GpuStream:
    """A CUDA stream; see ``Stream``.

    torch hands memory that is let go of to later work of the same stream, so results of one
    call may be dropped as soon as those that use them have been asked for.
    """

    def __init__(self, device: Any, stream: Any) -> None:
        self._device = device
        self._stream = stream

    def upload(self, x: Array) -> Any:
        """Copy pinned bytes to new memory of the device."""
        with self.current():
            return torch.from_numpy(x).to(self._device, non_blocking=True)

    def amax(self, x: Any, shape: tuple[int, int], dtype: DType) -> Any:
        """Largest magnitude of each row."""
        with _LAUNCHING, self.current():
            status = kernels.new_status(self._device)  # the numbers themselves tell
            return kernels.amax(_matrix(x, shape, dtype), status=status)

    def quantize(
        self, x: Any, shape: tuple[int, int], dtype: DType, scheme: Scheme, packing: Packing,
        numerics: Numerics, outer: Any | None, parts: Parts,
    ) -> Any:  # fmt: skip
        """Codes, scales and the status, in one piece of memory."""
        w = _matrix(x, shape, dtype)
        with _LAUNCHING, self.current():
            made = torch.empty(parts.nbytes, dtype=torch.uint8, device=self._device)
            status = made[parts.status :].view(torch.int32).zero_()
            buffers = kernels.shapes(*shape, w.dtype, scheme, packing)
            views = [
                made[start : start + prod(size) * kind.itemsize].view(kind).view(size)
                for (size, kind), start in zip(buffers, parts.starts, strict=True)
            ]
            kernels.quantize(
                w, scheme, packing, numerics=numerics, status=status,
                outer=None if outer is None else outer.view(torch.float32),
                out=Quantized(**dict(zip(scheme.parts, views, strict=True))),
            )  # fmt: skip
        return made

    def download(self, x: Any, into: Array) -> None:
        """Copy to pinned bytes."""
        with self.current():
            torch.from_numpy(into).copy_(x.view(torch.uint8), non_blocking=True)

    def mark(self) -> Mark:
        """The end of what has been asked for until now."""
        return GpuMark(self._stream)

    def current(self) -> Any:
        """Makes it the stream that torch and Triton work on."""
        return torch.cuda.stream(self._stream)


class GpuMark:
    """A CUDA event; see ``Mark``. Its waiting thread sleeps, for others need the processor."""

    def __init__(self, stream: Any) -> None:
        self._event = torch.cuda.Event(blocking=True)
        self._event.record(stream)

    def wait(self) -> None:
        """Return when the event has happened."""
        self._event.synchronize()


def _matrix(x: Any, shape: tuple[int, int], dtype: DType) -> Any:
    return x.view(_DTYPES[np.dtype(dtype).name]).view(shape)
