"""Names in ignore lists that a loader would take for a part of a longer one."""

from __future__ import annotations

import re
from collections.abc import Iterable

_NUMBER = re.compile("[0-9]+")


def clashing(ignore: Iterable[str], quantized: Iterable[str]) -> set[str]:
    """The names of ``ignore`` that lie within the name of a quantized module.

    ``mlp.gate`` lies within ``mlp.gate_proj``. Found with the numbers left out first, as
    layers have their names in common: 70,000 names are a few dozen then.
    """
    names = list(quantized)
    kinds = {_NUMBER.sub("0", name) for name in names}
    suspects = []
    for name in ignore:
        kind = _NUMBER.sub("0", name)
        if any(kind in other and kind != other for other in kinds):
            suspects.append(name)
    text = "\n".join(names) if suspects else ""
    return {name for name in suspects if name in text}


def with_head(ignore: Iterable[str], quantized: Iterable[str]) -> list[str]:
    """The ignore list with ``lm_head``, sorted.

    One that is tied to the embedding has no tensor of its own, but loaders make a Linear of
    it and look for its scales.
    """
    names = set(ignore)
    if not any("lm_head" in name for name in quantized):
        names.add("lm_head")
    return sorted(names)
