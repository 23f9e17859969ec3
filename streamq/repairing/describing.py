"""Entries that the description file of an Ascend checkpoint lacks."""

from __future__ import annotations

from streamq.checkpoint import DESCRIPTION, Checkpoint, read_json
from streamq.formats import Ascend
from streamq.formats.ascend_description import FLOAT, parse
from streamq.tensors import FLOATS

_PARTS = {*Ascend.code_suffixes, *Ascend.other_suffixes}


def missing_entries(source: Checkpoint) -> tuple[dict[str, str], list[str]]:
    """Types of the tensors without an entry, and the tensors whose type cannot be told.

    A part of a quantized weight has the type of the others; what else is a float is FLOAT.
    Nothing where there is no description. Raises CheckpointError for one that is none.
    """
    path = source.root / DESCRIPTION
    if not path.is_file():
        return {}, []
    said = parse(read_json(path))
    kinds: dict[str, set[str]] = {}
    for name in source.tensors:
        module, _, suffix = name.rpartition(".")
        if suffix in _PARTS and name in said.types:
            kinds.setdefault(module, set()).add(said.types[name])
    types, unknown = {}, []
    for name in said.missing(source.tensors):
        module, _, suffix = name.rpartition(".")
        beside = kinds.get(module, set()) if suffix in _PARTS else set()
        if len(beside) == 1:
            types[name] = next(iter(beside))
        elif suffix in _PARTS - {"weight"} or source.tensors[name].dtype not in FLOATS:
            unknown.append(name)
        else:
            types[name] = FLOAT
    return types, unknown
