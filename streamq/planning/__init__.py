"""Checkpoint x scheme x format -> Plan: what becomes what, where every byte will lie.

Output sizes depend on shapes alone, so all headers and offsets are known here, and so is
every error that does not need the weights themselves.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from streamq.checkpoint import Checkpoint
from streamq.errors import PlanError
from streamq.families import Family
from streamq.formats import Format, default_format, quantization_of
from streamq.stored import Stored, Where, find_stored
from streamq.tensors import TensorInfo

from .choose import Choice, block_warnings, choose, fuse, is_linear_like, notes, unused_patterns
from .experts import transposed, views_of
from .gpt_fast import joined_of
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
    "as_weights", "make_plan", "refuse_overlap", "slab_rows", "transposed", "weights_in",
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
    weights: dict[str, Where] = {
        **stored, **views_of(source, family, fmt), **joined_of(source, fmt),
    }  # fmt: skip
    tensors = as_weights(source, weights, fmt)
    choice = choose(tensors, weights, options, family, source.config)
    homes = fuse(tensors, weights, choice, family)
    warnings = unused_patterns(tensors, options)
    warnings += block_warnings(tensors, choice, homes)
    shards = place(_rows(source, tensors, choice, homes, weights), source.files, options)
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


def weights_in(source: Checkpoint, fmt: Format) -> dict[str, Where]:
    """What is not a tensor of floats by itself, by name, as seen for an output format."""
    return {
        **find_stored(source), **views_of(source, Family(source.config), fmt),
        **joined_of(source, fmt),
    }  # fmt: skip


def as_weights(source: Checkpoint, weights: Mapping[str, Where], fmt: Format) -> list[TensorInfo]:
    """The tensors of the source, as the format calls them.

    Where parts of weights are, those weights stand instead; a quantized one is of f32 and
    stands where its codes are.
    """
    if not weights:
        return list(source.tensors.values())
    parts: set[str] = set()
    places: dict[str, list[TensorInfo]] = {}
    for name, w in weights.items():
        if isinstance(w, Stored):
            t = w.codes
            weight = TensorInfo(name, "F32", w.shape, t.file, t.start)
            parts |= {part.name for part in w.tensors.values()}
        else:
            t = w.tensors[0]
            weight = TensorInfo(name, t.dtype, (w.rows, w.cols), t.file, w.start)
            parts |= {part.name for part in w.tensors}
        places.setdefault(t.name, []).append(weight)
    tensors = []
    for t in source.tensors.values():
        renamed = t._replace(name=fmt.named_as(t.name))
        tensors += places.get(t.name, [] if t.name in parts else [renamed])
    return tensors


def _rows(
    source: Checkpoint,
    tensors: list[TensorInfo],
    choice: Choice,
    homes: dict[int, int],
    weights: Mapping[str, Where],
) -> Rows:
    """Every tensor with its target; what weights that stay are made of is copied as it is.

    Raises PlanError for a tensor of several weights of which some stay.
    """
    rows = Rows([], [], [], choice.targets, weights)
    copied: set[str] = set()
    taken: set[str] = set()
    for i, t in enumerate(tensors):
        number, parts = choice.numbers[i], [t]
        w = weights.get(t.name)
        if w is not None:
            if isinstance(w, Stored):  # the codes first, the output's shard is that of their file
                tensors_of = sorted(w.tensors.values(), key=lambda p: p != w.codes)
            else:
                tensors_of = list(w.tensors)
            names = [part.name for part in tensors_of]
            if number >= 0:
                taken.update(names)
            else:
                parts = [source.tensors[name] for name in names if name not in copied]
                copied.update(names)
            if both := copied & taken:
                raise PlanError(
                    f"some weights of {min(both)!r} would stay as they are and others not; "
                    "convert or --ignore all of them."
                )
        for part in parts:
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
