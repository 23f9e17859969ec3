"""What stays on a device between the two passes of a scheme with a scale over whole tensors."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

#: A file of the source and the offset at which a slab starts in it.
Place = tuple[str, int]


class _Held(NamedTuple):
    device: str
    nbytes: int
    x: Any


class Kept:
    """Slabs on devices, by where they come from, within a number of bytes for each device.

    Shared by threads. Whoever kept a slab has waited for all that was done with it, so that
    any stream of its device may use it, and dropping it frees its memory at once.
    """

    def __init__(self, budgets: Mapping[str, int]) -> None:
        self._left = dict(budgets)
        self._held: dict[Place, _Held] = {}
        self._lock = threading.Lock()

    def put(self, place: Place, device: str, nbytes: int, x: Any) -> None:
        """Keep a slab if there is room for it."""
        with self._lock:
            self._drop(place)
            if nbytes <= self._left[device]:
                self._left[device] -= nbytes
                self._held[place] = _Held(device, nbytes, x)

    def take(self, place: Place, device: str, nbytes: int) -> Any | None:
        """A slab, no longer kept; None where this device does not have it as it is asked for."""
        with self._lock:
            found = self._drop(place)
        return found.x if found and (found.device, found.nbytes) == (device, nbytes) else None

    def forget(self, spans: Iterable[tuple[str, int, int]]) -> None:
        """Drop what starts in some spans of files, wherever it is."""
        with self._lock:
            for file, start, end in spans:
                for place in [p for p in self._held if p[0] == file and start <= p[1] < end]:
                    self._drop(place)

    def close(self, device: str) -> None:
        """Drop all that a device has, and keep nothing there from now on."""
        with self._lock:
            for place in [p for p, held in self._held.items() if held.device == device]:
                self._drop(place)
            self._left[device] = 0

    def _drop(self, place: Place) -> _Held | None:
        held = self._held.pop(place, None)
        if held is not None:
            self._left[held.device] += held.nbytes
        return held
