"""Devices beside the CPU: copies to and from one, its kernels and files overlap.

A lane sees bytes, matrices and schemes, never names or files; what is read and written, and in
which order, is the business of ``streamq.converting``.
"""

from __future__ import annotations

from .find import has_gpu, open_devices
from .kept import Kept
from .lane import Lane, NoRoom, Room, Slot
from .layer import Device, Mark, Stream
from .names import device_names
from .parts import arrange

__all__ = [
    "Device", "Kept", "Lane", "Mark", "NoRoom", "Room", "Slot", "Stream",
    "arrange", "device_names", "has_gpu", "open_devices",
]  # fmt: skip
