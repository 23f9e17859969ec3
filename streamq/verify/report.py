"""What verification finds, and what its two halves share."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf, log10
from typing import Any, NamedTuple

import numpy as np

from streamq.checkpoint import Checkpoint
from streamq.formats.layout import Layout
from streamq.tensors import DTYPES, TensorInfo

Array = np.ndarray[Any, Any]


@dataclass(slots=True)
class Report:
    """What was looked at and what failed; ``sqnr`` in dB by tensor name, with a source."""

    scheme: str = ""
    tensors: int = 0
    quantized: int = 0
    failures: list[str] = field(default_factory=list)
    sqnr: dict[str, float] = field(default_factory=dict)
    signal: float = 0.0
    noise: float = 0.0

    @property
    def total_sqnr(self) -> float:
        """Over all quantized weights together, in dB."""
        return decibel(self.signal, self.noise)


class Module(NamedTuple):
    """A quantized weight in the output: its tensors by suffix, its shape and layout."""

    name: str
    tensors: dict[str, TensorInfo]
    rows: int
    cols: int
    layout: Layout


def decibel(signal: float, noise: float) -> float:
    """Ratio of two energies in dB; inf without noise, -inf where it is infinite."""
    if noise == 0:
        return inf
    return 10 * log10(signal / noise) if signal and noise < inf else -inf


def text_of(entry: tuple[str, tuple[int, ...]] | None) -> str:
    """A dtype and a shape for messages."""
    return "absent" if entry is None else f"{entry[0]} {list(entry[1])}"


def bytes_of(c: Checkpoint, t: TensorInfo, at: int, n: int) -> bytes:
    """``n`` bytes of a tensor from byte ``at`` of it."""
    buffer = bytearray(n)
    c.pread(t.file, t.start + at, memoryview(buffer))
    return bytes(buffer)


def read(c: Checkpoint, t: TensorInfo) -> Array:
    """A whole small tensor."""
    return np.frombuffer(bytes_of(c, t, 0, t.nbytes), DTYPES[t.dtype].numpy).reshape(t.shape)
