"""How much of the weights survived: signal-to-noise ratios by tensor, by kind, overall."""

from __future__ import annotations

import threading
from math import inf, log10

from streamq.families import collapse


class Quality:
    """Sums of squares of quantized weights and of their errors, by tensor.

    ``add`` may be called by several threads and several times for one tensor.
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self._sums)

    def add(self, name: str, signal: float, noise: float) -> None:
        """Take in some rows of a tensor."""
        with self._lock:
            s, n = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (s + signal, n + noise)

    def sums(self) -> list[tuple[str, float, float]]:
        """Of each tensor its name and the two sums, for ``add``."""
        return [(name, *sums) for name, sums in self._sums.items()]

    @property
    def total(self) -> float:
        """SQNR over all weights together, in dB."""
        signal, noise = zip(*self._sums.values(), strict=True)
        return decibel(sum(signal), sum(noise))

    def by_tensor(self) -> dict[str, float]:
        """SQNR in dB of each tensor, by name."""
        return {name: decibel(*sums) for name, sums in sorted(self._sums.items())}

    def by_kind(self) -> dict[str, tuple[int, float]]:
        """Number and SQNR in dB of the modules of each kind, such as ``mlp.down_proj``."""
        kinds: dict[str, list[tuple[float, float]]] = {}
        for name, sums in sorted(self._sums.items()):
            parts = collapse(name.removesuffix(".weight")).split(".")
            kind = ".".join([p for p in parts if p != "*"][-2:])
            kinds.setdefault(kind, []).append(sums)
        return {
            kind: (len(sums), decibel(*map(sum, zip(*sums, strict=True))))
            for kind, sums in kinds.items()
        }

    def worst(self, count: int = 5) -> list[tuple[str, float]]:
        """The tensors that lost most, with their SQNR in dB."""
        return sorted(self.by_tensor().items(), key=lambda item: item[1])[:count]


def decibel(signal: float, noise: float) -> float:
    """Ratio of two energies in dB; inf without noise, -inf where it is infinite."""
    if noise == 0:
        return inf
    return 10 * log10(signal / noise) if signal and noise < inf else -inf
