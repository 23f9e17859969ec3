"""Checkpoint x scheme x format -> Plan: what becomes what, where every byte will lie.

Output sizes depend on shapes alone, so all headers and offsets are known here, and so is
every error that does not need the weights themselves.
"""

from __future__ import annotations

import os
from pathlib import Path

from streamq.checkpoint import Checkpoint
from streamq.errors import PlanError
from streamq.families import Family
from streamq.formats import compressed_tensors as fmt

from .choose import block_warnings, choose, fuse, is_linear_like, notes, unused_patterns
from .place import place, refuse_impossible, slab_memory
from .types import MAX_MEMORY, SLAB, Copy, Options, Plan, ShardPlan, Weights, slab_rows

__all__ = [
    "MAX_MEMORY", "SLAB", "Copy", "Options", "Plan", "ShardPlan", "Weights", "make_plan",
    "refuse_overlap", "slab_rows",
]  # fmt: skip


def make_plan(source: Checkpoint, options: Options) -> Plan:
    """Decide everything. Raises PlanError, naming the tensor, for what cannot be done."""
    _refuse_quantized(source)
    family = Family(source.config)
    tensors = list(source.tensors.values())
    chosen, kept = choose(tensors, options, family)
    homes = fuse(tensors, chosen, kept, family)
    warnings = unused_patterns(source, options)
    warnings += block_warnings(tensors, chosen, homes, options.scheme)
    shards = place(tensors, source.files, chosen, homes, options)
    refuse_impossible(shards)
    unquantized = [(tensors[i], why) for i, why in kept.items()]
    ignored = [t.name.removesuffix(".weight") for t, _ in unquantized if is_linear_like(t)]
    config = {**source.config, "quantization_config": fmt.config(options.scheme, sorted(ignored))}
    if not source.config:
        warnings.append("the source has no config.json; the new one holds quantization_config only")
    return Plan(
        options=options,
        shards=shards,
        config=config,
        others=source.others,
        other_bytes=sum((source.root / name).stat().st_size for name in source.others),
        unquantized=unquantized,
        warnings=warnings,
        notes=[*source.oddities, *notes(family, options.scheme, options.input_scale)],
        bytes_in=source.nbytes,
        slab_memory=slab_memory(shards),
        input_files=len(source.files),
    )


def refuse_overlap(src: str | os.PathLike[str], dst: str | os.PathLike[str]) -> None:
    """Raise PlanError where DST is SRC, holds it, or lies in it."""
    a, b = Path(src).resolve(), Path(dst).resolve()
    if a == b or a in b.parents or b in a.parents:
        raise PlanError(f"the destination {dst} overlaps the source {src}; choose another place.")


def _refuse_quantized(source: Checkpoint) -> None:
    text = source.config.get("text_config")
    for config in (source.config, text if isinstance(text, dict) else {}):
        found = config.get("quantization_config") or config.get("compression_config")
        if found:
            method = found.get("quant_method") if isinstance(found, dict) else found
            raise PlanError(
                f"the source is already quantized (config.json: quant_method {method!r}); "
                "convert the original bf16, f16 or f32 checkpoint."
            )
