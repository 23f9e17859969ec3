"""Re-shard a checkpoint without touching a number: bytes go to other places under other names.

Tensors that loaders concatenate come into one shard. ``fuse`` concatenates them here already,
``split`` takes apart what is concatenated, ``rename`` renames.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from streamq.checkpoint import CONFIG, DESCRIPTION, Checkpoint, read_json
from streamq.errors import CheckpointError, PlanError
from streamq.formats import Ascend, format_of, quantization_of

from .fusing import fuse
from .modules import Modules, groups_of, homes_of, modules_of
from .names import moved_modules, renamed, respelled
from .placing import Placed, cuts_of, lay_out, metadata_of
from .run import Progress, reindex
from .splitting import split
from .types import Options, Out, Plan, Shard, Summary, Translated, whole
from .weights import Made

__all__ = [
    "Options", "Placed", "Plan", "Progress", "Summary", "Translated", "lay_out", "make_plan",
    "reindex", "whole",
]  # fmt: skip

#: ModelOpt's older place for its quantization.
_BESIDE = "hf_quant_config.json"


def make_plan(source: Checkpoint, options: Options) -> Plan:
    """Decide where every byte goes.

    Raises PlanError, naming the tensor, for what cannot be done.
    """
    m = modules_of(source)
    if isinstance(m.fmt, Ascend) and (options.fuse or options.split or options.rename):
        raise PlanError(
            f"{source.place} has types for tensors by their names in {DESCRIPTION}, which streamq "
            "reindex does not change; --fuse, --split and --rename are for other formats."
        )
    warnings: list[str] = []
    notes = [*source.oddities]
    made: list[Made] = []
    became: dict[str, list[str]] = {}
    if options.fuse or options.split:
        made, became, more = (fuse if options.fuse else split)(m)
        notes += more
        if not made:
            warnings.append(f"there is nothing to {'fuse' if options.fuse else 'split'}")
    elif m.fmt is None:
        notes.append("the quantization is not known; parts of a weight are told by their names")
    outs = _outs(m, made, became)
    homes = homes_of(m, outs, {found.module for found in made})
    old = [o.name for o in outs]
    new = renamed(old, options.rename)
    if options.rename and new == old:
        warnings.append("--rename changes no name")
    moved = moved_modules(old, new) if new != old else {}
    cuts = cuts_of(outs, homes, options.shard_size)
    shards = list(_shards(m, outs, new, cuts, {f.module: f.note for f in made if f.note}, moved))
    files = _files(source, became, moved)
    if (odd := _refound(source, files, became, moved)) is not None:
        warnings.append(odd)
    groups, apart = groups_of(m)
    leaves = Counter(found.module.rpartition(".")[2] for found in made)
    return Plan(
        origin={"command": "reindex", "options": _spelled(options)},
        shards=shards,
        files=files,
        others=source.others,
        other_bytes=source.other_bytes,
        input_files=len(source.files),
        tensors_in=len(source.tensors),
        bytes_in=source.nbytes,
        groups=groups,
        apart=apart,
        moved=sum(not o.files <= {outs[home].file} for o, home in zip(outs, homes, strict=True)),
        made=dict(leaves),
        renamed=sum(a != b for a, b in zip(old, new, strict=True)),
        warnings=warnings,
        notes=notes,
    )


def _outs(m: Modules, made: list[Made], became: dict[str, list[str]]) -> list[Out]:
    """All tensors of the output in the order of the source.

    Those that are made stand where the first is that they are made of.
    """
    source = m.source
    gone = {t.name for module in became for t in m.tensors.get(module, {}).values()}
    gone |= {name for module in became for name in (module, f"{module}_bias")}
    outs = [whole(t) for t in source.tensors.values() if t.name not in gone]
    if not made:
        return outs
    outs += [o for found in made for o in found.outs]
    numbers = {file: i for i, file in enumerate(source.files)}
    return sorted(outs, key=lambda o: (numbers[o.file], o.start))


def _shards(
    m: Modules, outs: list[Out], names: list[str], cuts: list[list[int]],
    made: dict[str, str], moved: dict[str, list[str]],
) -> list[Shard]:  # fmt: skip
    """The shards, named as loaders want them."""
    marker = f"{m.fmt.name}:" if m.fmt is not None else ""
    said = m.source.metadata
    noted = marker and any(key.startswith(marker) for found in said.values() for key in found)
    shards = []
    for i, numbers in enumerate(cuts, 1):
        name = f"model-{i:05d}-of-{len(cuts):05d}.safetensors"
        notes = {}
        if noted and m.fmt is not None:
            for o in (outs[n] for n in numbers):
                module, _ = m.split(o.name)
                note = made.get(module) or said[o.file].get(marker + m.fmt.original(module))
                if note:
                    (to,) = moved.get(module, [module])
                    notes[marker + m.fmt.original(to)] = note
        metadata = metadata_of(said, {outs[n].file for n in numbers}, marker, notes)
        tensors = [Placed(names[n], outs[n]) for n in numbers]
        single = "model.safetensors"
        shards.append(lay_out(single if len(cuts) == 1 else name, tensors, metadata))
    return shards


def _files(
    source: Checkpoint, became: dict[str, list[str]], moved: dict[str, list[str]]
) -> dict[str, dict[str, object]]:
    """The JSON files that name modules which changed, as they are to be."""
    files = {}
    for name in (CONFIG, _BESIDE):
        if name not in source.others:
            continue
        old = source.config if name == CONFIG else read_json(source.root / name)
        # The whole of the other file is about quantization.
        wrapped = old if name == CONFIG else {"quantization_config": old}
        new = respelled(respelled(wrapped, became), moved)
        new = new if name == CONFIG else new["quantization_config"]
        if new != old:
            files[name] = new
    return files


def _refound(
    source: Checkpoint, files: dict[str, dict[str, object]], became: dict[str, list[str]],
    moved: dict[str, list[str]],
) -> str | None:  # fmt: skip
    """A warning where patterns of config.json say something else of the new names, or may."""
    pairs = {old: [b for a in names for b in moved.get(a, [a])] for old, names in became.items()}
    pairs = {**moved, **pairs}
    if not pairs or not quantization_of(source.config):
        return None
    try:
        before, _ = format_of(source.config).rules(source.config)
        after, _ = format_of(config := files.get(CONFIG, source.config)).rules(config)
        odd = [b for a, names in pairs.items() for b in names if before(a) != after(b)]
    except (CheckpointError, NotImplementedError):  # of a format that streamq copies, not reads
        return (
            "streamq cannot read the quantization in config.json, so whether its patterns hold "
            "for the new names was not checked"
        )
    if not odd:
        return None
    return (
        f"patterns in config.json give {len(odd)} modules another scheme under their new names, "
        f"the first {odd[0]!r}; edit quantization_config"
    )


def _spelled(options: Options) -> dict[str, Any]:
    """The options as JSON has them."""
    return {**asdict(options), "rename": [list(pair) for pair in options.rename]}
