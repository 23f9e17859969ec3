"""NPUs through torch_npu, which only the kernels of NPUs import, and the AscendC kernels.

``torch.npu`` is ``torch.cuda`` by other names, as the API reference of torch_npu lists them:
streams, events, ``mem_get_info``, ``empty_cache``. A kernel waits for its whole device before and
behind it (``Device.run`` of the kernels), so that only copies of one thread overlap with anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from streamq.errors import DeviceError, NonFiniteError, PlanError
from streamq.kernels import ascendc
from streamq.kernels.ascendc.chips import chip_of
from streamq.schemes import Numerics, Packing, Scheme

from .layer import Array, Device, DType, Mark, Stream
from .parts import Parts


def open_npus(numbers: Sequence[int]) -> list[Device]:
    """NPUs by number. Raises PlanError, saying what to do, for what cannot be used."""
    try:
        opened = ascendc.open_device()
    except DeviceError as e:
        raise PlanError(f"--device npu: {str(e).removesuffix('.')}; or use --device cpu.") from None
    npu = opened.torch.npu
    count = npu.device_count()
    for n in numbers:
        if n >= count:
            there = ", ".join(f"npu:{i}" for i in range(count))
            raise PlanError(f"--device npu:{n}: no such NPU; there is {there}.")
        name = npu.get_device_name(n)
        if chip_of(name) != opened.chip:  # one library serves all of a process
            raise PlanError(
                f"--device npu:{n}: the chip is {name} and the kernels are those for "
                f"{opened.chip.name}; leave it out, or hide the others from the process with "
                "ASCEND_RT_VISIBLE_DEVICES."
            )
    return [Npu(n, opened) for n in numbers]


class Npu:
    """One NPU; see ``Device``. ``opened``: torch and the kernels, the same for all of them."""

    def __init__(self, number: int, opened: ascendc.Device) -> None:
        self.name = f"npu:{number}"
        self.kernels = ascendc.NAME
        self._number = number
        self._chip = opened.chip
        self._torch = opened.torch
        self._device = opened.torch.device(opened.type, number)

    def supports(self, scheme: Scheme, numerics: Numerics, packing: Packing) -> bool:
        """Whether the chip has kernels; they make codes of one byte each."""
        return packing.kind == "bytes" and ascendc.supports(scheme, self._chip, numerics)

    def free(self) -> int:
        """Bytes of memory that nobody uses."""
        return int(self._torch.npu.mem_get_info(self._number)[0])

    def pinned(self, nbytes: int) -> Array:
        """New page-locked memory."""
        torch = self._torch
        made: Array = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()
        return made

    def stream(self) -> Stream:
        """A new stream of the NPU."""
        return NpuStream(self._torch, self._device, self._torch.npu.Stream(self._device))

    def out_of_memory(self, error: Exception) -> bool:
        """torch has a class for it, CANN a text."""
        return isinstance(error, self._torch.OutOfMemoryError) or "out of memory" in str(error)

    def trim(self) -> None:
        """Give back what torch keeps for later allocations."""
        self._torch.npu.empty_cache()


class NpuStream:
    """A stream of an NPU; see ``Stream``."""

    def __init__(self, torch: Any, device: Any, stream: Any) -> None:
        self._torch = torch
        self._device = device
        self._stream = stream

    def upload(self, x: Array) -> Any:
        """Copy pinned bytes to new memory of the device."""
        with self._current():
            return self._torch.from_numpy(x).to(self._device, non_blocking=True)

    def amax(self, x: Any, shape: tuple[int, int], dtype: DType) -> Any:
        """Largest magnitude of each row; NaN for all where a weight is not finite."""
        torch = self._torch
        with self._current():
            try:
                return ascendc.amax(self._matrix(x, shape, dtype))
            except NonFiniteError:
                return torch.full(shape[:1], torch.nan, dtype=torch.float32, device=self._device)

    def quantize(
        self, x: Any, shape: tuple[int, int], dtype: DType, scheme: Scheme, packing: Packing,
        numerics: Numerics, outer: Any | None, parts: Parts,
    ) -> Any:  # fmt: skip
        """Codes, scales and the status, in one piece of memory."""
        torch = self._torch
        above = None if outer is None else outer.view(torch.float32)
        with self._current():
            made = torch.empty(parts.nbytes, dtype=torch.uint8, device=self._device)
            made[parts.status :] = 0
            try:
                q = ascendc.quantize(
                    self._matrix(x, shape, dtype), scheme, packing, numerics=numerics, outer=above
                )
            except NonFiniteError:
                made[parts.status :] = 1
                return made
            # The scale of a whole tensor is ``outer``, for each row and not what the part is.
            roles = scheme.parts[:1] if scheme.whole_tensor else scheme.parts
            for role, start in zip(roles, parts.starts, strict=False):
                raw = getattr(q, role).view(torch.uint8).flatten()
                made[start : start + len(raw)] = raw
        return made

    def download(self, x: Any, into: Array) -> None:
        """Copy to pinned bytes."""
        with self._current():
            self._torch.from_numpy(into).copy_(x.view(self._torch.uint8), non_blocking=True)

    def mark(self) -> Mark:
        """The end of what has been asked for until now."""
        return NpuMark(self._torch.npu.Event(blocking=True), self._stream)

    def _current(self) -> Any:
        """Makes it the stream, and its NPU the device, that torch and the kernels work on."""
        return self._torch.npu.stream(self._stream)

    def _matrix(self, x: Any, shape: tuple[int, int], dtype: DType) -> Any:
        return x.view(getattr(self._torch, np.dtype(dtype).name)).view(shape)


class NpuMark:
    """An event; see ``Mark``."""

    def __init__(self, event: Any, stream: Any) -> None:
        self._event = event
        self._event.record(stream)

    def wait(self) -> None:
        """Return when the event has happened."""
        self._event.synchronize()
