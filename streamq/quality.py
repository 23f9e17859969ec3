"""How much of the weights survived: signal-to-noise ratios by tensor, by kind, overall."""

from __future__ import annotations

import threading
from math import inf, log10
from typing import Any, NamedTuple

import numpy as np

from streamq.families import collapse
from streamq.tensors import stack_of

Array = np.ndarray[Any, Any]


class Loss(NamedTuple):
    """What one tensor lost: sums of squares of its weights and of their errors, in its units.

    ``largest`` error of a weight, and how many are ``clipped``; 0 where nobody asked for details.
    """

    signal: float = 0.0
    noise: float = 0.0
    largest: float = 0.0
    clipped: int = 0

    @property
    def sqnr(self) -> float:
        """In dB."""
        return decibel(self.signal, self.noise)


class Quality:
    """What quantized weights lost, by tensor.

    ``detailed``: also largest errors, clipped weights, and how errors are distributed. All
    ``add`` may be called by several threads and several times for one tensor.
    """

    def __init__(self, detailed: bool = False) -> None:
        self.detailed = detailed
        self._sums: dict[str, Loss] = {}
        self._bins: dict[str, Array] = {}
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self._sums)

    def add(self, name: str, signal: float, noise: float) -> None:
        """Take in some rows of a tensor."""
        self.add_losses([name], [(signal, noise, 0.0, 0)])

    def add_losses(self, names: list[str], sums: Any, bins: Array | None = None) -> None:
        """Take in rows of several tensors.

        ``sums``: of each what ``Loss`` has; ``bins``: int64 ``[names, bins]``, their errors.
        """
        kinds = [] if bins is None else [kind_of(name) for name in names]
        with self._lock:
            for name, (signal, noise, largest, clipped) in zip(names, sums, strict=True):
                s, n, top, count = self._sums.get(name, Loss())
                self._sums[name] = Loss(
                    s + signal, n + noise, max(top, largest), count + int(clipped)
                )
            for kind, counts in zip(kinds, () if bins is None else bins, strict=True):
                self._bins[kind] = counts + self._bins.get(kind, 0)

    def note(self) -> dict[str, Any]:
        """All that was taken in, as JSON has it, for ``take``."""
        found: dict[str, Any] = {"losses": [[name, *loss] for name, loss in self._sums.items()]}
        if self.detailed:
            found["bins"] = {kind: counts.tolist() for kind, counts in self._bins.items()}
        return found

    def take(self, note: dict[str, Any]) -> None:
        """Take in what another has."""
        losses = note["losses"]
        self.add_losses([name for name, *_ in losses], [loss for _, *loss in losses])
        with self._lock:
            for kind, counts in note.get("bins", {}).items():
                self._bins[kind] = np.array(counts) + self._bins.get(kind, 0)

    @property
    def total(self) -> float:
        """SQNR over all weights together, in dB."""
        return together(self._sums.values()).sqnr

    def of(self, name: str) -> Loss | None:
        """What a tensor lost, None where that was not measured."""
        return self._sums.get(name)

    def by_tensor(self) -> dict[str, float]:
        """SQNR in dB of each tensor, by name."""
        return {name: loss.sqnr for name, loss in sorted(self._sums.items())}

    def by_kind(self) -> dict[str, tuple[int, float]]:
        """Number and SQNR in dB of the modules of each kind, such as ``mlp.down_proj``."""
        kinds: dict[str, list[Loss]] = {}
        for name, loss in sorted(self._sums.items()):
            kinds.setdefault(kind_of(name), []).append(loss)
        return {kind: (len(found), together(found).sqnr) for kind, found in kinds.items()}

    def errors_by_kind(self) -> dict[str, list[int]]:
        """Errors that were looked at, counted by size, of the modules of each kind.

        Bins of half an octave below the largest weight of the row; the last has the rest.
        """
        return {kind: counts.tolist() for kind, counts in sorted(self._bins.items())}

    def worst(self, count: int = 5) -> list[tuple[str, float]]:
        """The tensors that lost most, with their SQNR in dB."""
        return sorted(self.by_tensor().items(), key=lambda item: item[1])[:count]


def together(losses: Any) -> Loss:
    """Several tensors as one."""
    whole = [*zip(*losses, strict=True)]
    if not whole:
        return Loss()
    signal, noise, largest, clipped = whole
    return Loss(sum(signal), sum(noise), max(largest), sum(clipped))


def kind_of(name: str) -> str:
    """What a tensor is in its layer: ``mlp.down_proj``, of experts ``experts.down_proj``."""
    name = stack_of(name) or name
    parts = collapse(name.removesuffix(".weight")).split(".")
    return ".".join([p for p in parts if p != "*"][-2:])


def decibel(signal: float, noise: float) -> float:
    """Ratio of two energies in dB; inf without noise, -inf where it is infinite."""
    if noise == 0:
        return inf
    return 10 * log10(signal / noise) if signal and noise < inf else -inf
