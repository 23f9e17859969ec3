"""Mend a checkpoint: one global scale for each fused group, a right index, marked files.

Codes stay as they are, and so does every tensor that is in order. What is written is a new
directory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from streamq.checkpoint import (
    DESCRIPTION,
    INDEX_SUFFIX,
    Checkpoint,
    open_checkpoint,
    read_json,
)
from streamq.errors import CheckpointError
from streamq.families import Family
from streamq.hub import is_hub
from streamq.recipe import Recipe
from streamq.reindexing import Placed, Plan, Translated, lay_out, whole
from streamq.stored import Stored, look, stored_of, weights_of
from streamq.trust import crc32
from streamq.verifying.lint import GLOBAL, INPUT, MARKS, Facts, Fusion, unequal

from .describing import missing_entries
from .scales import Member, common, energies
from .types import Repair, Shared

__all__ = ["Repair", "Shared", "make_plan", "open_broken"]

_INDEX = "model" + INDEX_SUFFIX
_OF = re.compile(r"-(\d+)-of-(\d+)\.safetensors$")


def open_broken(
    src: str | os.PathLike[str], opened: Callable[..., Checkpoint] = open_checkpoint
) -> tuple[Checkpoint, list[str]]:
    """A checkpoint and what is wrong with its index, in sentences; ``opened`` opens it.

    Raises CheckpointError where a shard is missing or damaged, which nothing can repair.
    """
    if not is_hub(src) and not Path(src).is_dir():
        raise CheckpointError(f"{src}: no such directory.")
    try:
        checkpoint = opened(src)
    except CheckpointError as e:
        checkpoint = opened(src, use_index=False)
        wrong = [f"the index: {e}"]
    else:
        wrong = _wrong_index(checkpoint)
    try:
        _refuse_lost_shards(checkpoint)
    except CheckpointError:
        checkpoint.close()
        raise
    return checkpoint, wrong


def _index_of(checkpoint: Checkpoint) -> dict[str, object]:
    """The index as far as it is one."""
    path = checkpoint.root / _INDEX
    try:
        return read_json(path) if path.is_file() else {}
    except CheckpointError:
        return {}


def _wrong_index(checkpoint: Checkpoint) -> list[str]:
    """What is wrong with an index whose names are right."""
    several = len(checkpoint.files) > 1
    if not (checkpoint.root / _INDEX).is_file():
        if several:
            return [f"the index: {len(checkpoint.files)} shards without {_INDEX}"]
        usual = checkpoint.files == ["model.safetensors"]
        return [] if usual else [f"the name {checkpoint.files[0]!r}: it becomes model.safetensors"]
    metadata = _index_of(checkpoint).get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if total == checkpoint.nbytes:
        return []
    return [f"the index: total_size is {total}, the tensors have {checkpoint.nbytes} bytes"]


def _refuse_lost_shards(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError where a name of a shard, or the index, speaks of a missing one."""
    there = set(checkpoint.files)
    lost: set[str] = set()
    for file in checkpoint.files:
        if found := _OF.search(file):
            width, count = len(found[1]), found[2]
            for i in range(1, min(int(count), 100_000) + 1):
                name = f"{file[: found.start()]}-{i:0{width}d}-of-{count}.safetensors"
                lost |= {name} - there
    weights = _index_of(checkpoint).get("weight_map")
    if isinstance(weights, dict):
        named = {f for f in weights.values() if isinstance(f, str)}
        lost |= {f for f in named if f not in there and not (checkpoint.root / f).is_file()}
    if lost:
        raise CheckpointError(
            f"{min(lost)!r} is missing from {checkpoint.place}, and its tensors with it; download "
            "it again."
        )


def make_plan(source: Checkpoint, wrong: list[str], recipe: Recipe | None = None) -> Repair:
    """What can be repaired; ``wrong``: what ``open_broken`` found.

    Reads the codes of fused groups whose global scales differ. Raises StreamqError for what
    cannot be read.
    """
    repairs = list(wrong)
    unmarked = [f for f, said in source.metadata.items() if said.get("format") not in MARKS]
    if unmarked:
        more = f" and {len(unmarked) - 1} more" if len(unmarked) > 1 else ""
        repairs.append(f'"format": "pt" is missing in {unmarked[0]}{more}')
    known = _index_of(source).get("weight_map")
    ghosts = [n for n in known if n not in source.tensors] if isinstance(known, dict) else []
    left = []
    if ghosts:
        left.append(
            f"the index names {ghosts[0]!r}, which no shard has ({len(ghosts)} such tensors); "
            "the new one does not"
        )
    types, unknown = missing_entries(source)
    files: dict[str, dict[str, Any]] = {}
    if types:
        first = next(iter(types))
        repairs.append(f"{len(types)} missing entries of {DESCRIPTION}, the first {first!r}")
        files[DESCRIPTION] = {**read_json(source.root / DESCRIPTION), **types}
    if unknown:
        left.append(f"the type of {unknown[0]!r} is not known ({len(unknown)} such tensors)")
    changed: dict[str, bytes | Translated] = {}
    shared = []
    try:
        weights = _weights(source)
    except CheckpointError as e:
        left.append(f"scales are not looked at, because {e}")
        weights = None
    if weights is not None:
        rows = {"extra_groups": recipe.groups, "extra_experts": recipe.experts} if recipe else {}
        facts = Facts(source, None, weights, Family(source.config, **rows))  # type: ignore[arg-type]
        shared = [*_global_scales(facts, changed), *_input_scales(facts, changed)]
    return Repair(_plan(source, changed, files), repairs, shared, left)


def _weights(source: Checkpoint) -> list[Stored]:
    found = look(source)
    return [stored_of(source, found, module, parts) for module, parts in weights_of(found)]


def _values(facts: Facts, fusion: Fusion, suffixes: tuple[str, ...]) -> dict[str, float]:
    """The scale of each member, by the name of its tensor."""
    return {t.name: facts.value(t) for s in fusion.members
            for suffix, t in s.tensors.items() if suffix in suffixes}  # fmt: skip


def _shared(old: dict[str, float], new: float, **cost: float) -> Shared:
    kind = next(iter(old)).rpartition(".")[2]
    modules = {name.rpartition(".")[0]: value for name, value in old.items()}
    return Shared(kind, modules, new, **cost)


def _store(changed: dict[str, bytes | Translated], names: dict[str, float], new: float) -> None:
    changed |= {n: np.float32(new).tobytes() for n, value in names.items() if value != new}


def _global_scales(facts: Facts, changed: dict[str, bytes | Translated]) -> Iterator[Shared]:
    for fusion, _ in unequal(facts, GLOBAL):
        old = _values(facts, fusion, GLOBAL)
        if not all(0 < v < float("inf") for v in old.values()):
            name = next(n for n, v in old.items() if not 0 < v < float("inf"))
            raise CheckpointError(f"{name!r} is {old[name]}, which nothing can repair.")
        divisor = fusion.members[0].format.name == "compressed-tensors"
        members = [
            Member(1 / value if divisor else value, energies(facts.checkpoint, s))
            for s, value in zip(fusion.members, old.values(), strict=True)
        ]
        found = common(members, divisor)
        same = bytes(range(256))
        for s, table in zip(fusion.members, found.tables, strict=True):
            if table != same:
                changed[s.tensors[s.format.scale_suffix].name] = Translated(table)
        _store(changed, old, found.stored)
        yield _shared(old, found.stored, sqnr=found.sqnr, change=found.change)


def _input_scales(facts: Facts, changed: dict[str, bytes | Translated]) -> Iterator[Shared]:
    """The widest range of activations for all: what the members share is their input."""
    for fusion, _ in unequal(facts, INPUT):
        old = _values(facts, fusion, INPUT)
        divisor = fusion.members[0].format.name == "compressed-tensors"
        new = min(old.values()) if divisor else max(old.values())
        _store(changed, old, new)
        yield _shared(old, new)


def _plan(
    source: Checkpoint, changed: dict[str, bytes | Translated], files: dict[str, dict[str, Any]]
) -> Plan:
    """Every tensor in its file, the files under their names, some tensors with other bytes."""
    by_file: dict[str, list[Placed]] = {file: [] for file in source.files}
    for t in source.tensors.values():
        out = whole(t)
        if t.name in changed:
            out = out._replace(content=changed[t.name])
        by_file[t.file].append(Placed(t.name, out))
    shards = []
    for file, placed in by_file.items():
        said = {k: v for k, v in source.metadata[file].items() if k != "format" or v in MARKS}
        name = "model.safetensors" if len(source.files) == 1 else file
        shards.append(lay_out(name, placed, said))
    new = {name: crc32(c.table if isinstance(c, Translated) else c) for name, c in changed.items()}
    return Plan(
        origin={"command": "repair", "changed": new},
        shards=[s for s in shards if s.names],
        files=files,
        others=source.others,
        other_bytes=source.other_bytes,
        input_files=len(source.files),
        tensors_in=len(source.tensors),
        bytes_in=source.nbytes,
        groups=0,
        apart=0,
        moved=0,
        made={},
        renamed=0,
        warnings=[],
        notes=[*source.oddities],
    )
