"""Checkpoint x scheme x format -> Plan: what becomes what, where every byte will lie.

Output sizes depend on shapes alone, so all headers and offsets are known here, and so is
every error that does not need the weights themselves.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from streamq.checkpoint import Checkpoint
from streamq.errors import PlanError
from streamq.families import Family
from streamq.formats import default_format, quantization_of
from streamq.stored import Stored, find_stored
from streamq.tensors import TensorInfo

from .choose import Choice, block_warnings, choose, fuse, is_linear_like, notes, unused_patterns
from .lift import lift
from .place import Rows, place, refuse_impossible, slab_memory
from .types import (
    MAX_MEMORY,
    SLAB,
    STRIP,
    Copy,
    Options,
    Plan,
    ShardPlan,
    Target,
    Weights,
    slab_rows,
)

__all__ = [
    "MAX_MEMORY", "SLAB", "STRIP", "Copy", "Options", "Plan", "ShardPlan", "Target", "Weights",
    "make_plan", "refuse_overlap", "slab_rows",
]  # fmt: skip


def make_plan(source: Checkpoint, options: Options) -> Plan:
    """Decide everything. Raises PlanError, naming the tensor, for what cannot be done."""
    fmt = options.format or default_format(options.scheme)
    options = replace(options, format=fmt, scheme=fmt.concrete(options.scheme))
    if options.scheme.inverse and options.numerics != "f32":
        raise PlanError(
            f"--numerics {options.numerics} does not apply to the format {fmt.name}: its rule is "
            "one of f32."
        )
    family = Family(source.config)
    stored, lifted = lift(source, find_stored(source), options.scheme, family)
    tensors = _as_weights(source, stored)
    choice = choose(tensors, stored, options, family, source.config)
    homes = fuse(tensors, stored, choice, family)
    warnings = unused_patterns(tensors, options)
    warnings += block_warnings(tensors, choice, homes)
    shards = place(_rows(tensors, choice, homes, stored), source.files, options)
    refuse_impossible(shards)
    unquantized = [(tensors[i], why) for i, why in choice.kept.items()]
    ignored = [t.name.removesuffix(".weight") for t, _ in unquantized if is_linear_like(t)]
    ignored += choice.dequantized
    config = fmt.config(choice.modules, sorted(ignored), _without_quantization(source))
    if not source.config:
        warnings.append("the source has no config.json; the new one holds its quantization only")
    return Plan(
        options=options,
        shards=shards,
        config=config,
        files=fmt.files(config),
        others=source.others,
        other_bytes=sum((source.root / name).stat().st_size for name in source.others),
        unquantized=unquantized,
        warnings=warnings,
        notes=[*source.oddities, *lifted, *choice.notes, *notes(family, options)],
        bytes_in=source.nbytes,
        slab_memory=slab_memory(shards),
        input_files=len(source.files),
        verbatim=choice.verbatim and options.shard_size is None,
    )


def _as_weights(source: Checkpoint, stored: dict[str, Stored]) -> list[TensorInfo]:
    """The tensors of the source, each quantized weight as one of f32 where its codes are."""
    if not stored:
        return list(source.tensors.values())
    parts = {t.name for s in stored.values() for t in s.tensors.values()}
    weights = {
        s.codes.name: TensorInfo(s.name, "F32", s.shape, s.codes.file, s.codes.start)
        for s in stored.values()
    }
    return [
        weights.get(t.name, t)
        for t in source.tensors.values()
        if t.name in weights or t.name not in parts
    ]


def _rows(
    tensors: list[TensorInfo], choice: Choice, homes: dict[int, int], stored: dict[str, Stored]
) -> Rows:
    """Every tensor with its target; a quantized weight that stays is copied part by part."""
    rows = Rows([], [], [], choice.targets, stored)
    for i, t in enumerate(tensors):
        number = choice.numbers[i]
        s = stored.get(t.name) if number < 0 else None
        # The codes first, because a shard of the output is named after their file.
        for part in sorted(s.tensors.values(), key=lambda p: p != s.codes) if s else [t]:
            rows.tensors.append(part)
            rows.numbers.append(number)
            rows.homes.append(homes.get(i, i))
    return rows


def refuse_overlap(src: str | os.PathLike[str], dst: str | os.PathLike[str]) -> None:
    """Raise PlanError where DST is SRC, holds it, or lies in it."""
    a, b = Path(src).resolve(), Path(dst).resolve()
    if a == b or a in b.parents or b in a.parents:
        raise PlanError(f"the destination {dst} overlaps the source {src}; choose another place.")


_QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")


def _without_quantization(source: Checkpoint) -> dict[str, object]:
    """config.json of the source without what it says of its quantization."""
    config = {k: v for k, v in source.config.items() if k not in _QUANTIZATION_KEYS}
    text = config.get("text_config")
    if isinstance(text, dict) and quantization_of(source.config):
        config["text_config"] = {k: v for k, v in text.items() if k not in _QUANTIZATION_KEYS}
    return config
