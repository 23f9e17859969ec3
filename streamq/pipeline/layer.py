"""What a pipeline asks of a device: memory, a queue of work, kernels. As little as will do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from streamq.schemes import Numerics, Packing, Scheme

if TYPE_CHECKING:
    from .parts import Parts

Array = np.ndarray[Any, Any]
DType = np.dtype[Any]


class Mark(Protocol):
    """A place in the queue of a stream."""

    def wait(self) -> None:
        """Return when all that was queued before it is done; other threads may run meanwhile."""


class Stream(Protocol):
    """A queue: what is asked for happens in order, and after the call has returned.

    So host memory that is named in a call must stay as it is until a later mark is reached.
    What calls return lies on the device, and is worth something to the same stream at once.
    """

    def upload(self, x: Array) -> Any:
        """Copy pinned bytes, uint8 ``[n]``, to new memory of the device."""

    def amax(self, x: Any, shape: tuple[int, int], dtype: DType) -> Any:
        """Largest magnitude of each row, f32 ``[rows]``, of bytes that are such a matrix.

        Not finite for a row with a weight that is not.
        """

    def quantize(
        self, x: Any, shape: tuple[int, int], dtype: DType, scheme: Scheme, packing: Packing,
        numerics: Numerics, outer: Any | None, parts: Parts,
    ) -> Any:  # fmt: skip
        """``quantize`` of ``streamq.kernels.cpu`` for such a matrix: bytes as ``parts`` has them.

        ``outer``: bytes of f32 ``[rows]``.
        """

    def download(self, x: Any, into: Array) -> None:
        """Copy to pinned bytes, uint8 ``[n]``."""

    def mark(self) -> Mark:
        """The end of what has been asked for until now."""


class Device(Protocol):
    """A device with kernels; used by several threads, each with a stream of its own."""

    #: As ``--device`` spells it, and what its kernels are called.
    name: str
    kernels: str

    def supports(self, scheme: Scheme, numerics: Numerics, packing: Packing) -> bool:
        """Whether the kernels have a scheme, and make codes that lie so."""

    def free(self) -> int:
        """Bytes of memory that nobody uses."""

    def pinned(self, nbytes: int) -> Array:
        """New host memory, uint8 ``[nbytes]``, that the device copies from and to by itself."""

    def stream(self) -> Stream:
        """A new queue."""

    def out_of_memory(self, error: Exception) -> bool:
        """Whether that is what an error means."""

    def trim(self) -> None:
        """Give back memory that is kept for later."""
