"""Checkpoint x scheme x format -> Plan: what becomes what, where every byte will lie.

Output sizes depend on shapes alone, so all headers and offsets are known here, and so is
every error that does not need the weights themselves.
"""

from __future__ import annotations

import os
from collections.abc import Container, Mapping
from dataclasses import replace
from pathlib import Path

from streamq.checkpoint import DESCRIPTION, Checkpoint
from streamq.errors import PlanError
from streamq.families import Family, is_expert_stack
from streamq.formats import Ascend, Format, default_format, format_of, quantization_of
from streamq.hub import is_hub
from streamq.stored import Stored, Where, find_stored
from streamq.tensors import TensorInfo, element, size_text

from .choose import Choice, block_warnings, choose, fuse, is_linear_like, notes, unused_patterns
from .describe import described
from .experts import experts_of, straight, transposed
from .gpt_fast import joined_of
from .kept import rules, stays_of
from .lift import lift
from .place import Rows, place, refuse_impossible, slab_memory
from .shards import check_tp, cuts_of
from .spelled import spelled, unspelled
from .stacking import place_of, stacks_of
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
from .ways import expert_warnings, recipe_warnings
from .words import format_name, numbers_text, scheme_text

__all__ = [
    "MAX_MEMORY", "QUANTIZATION_FILES", "SLAB", "STRIP", "Copy", "Options", "Plan", "ShardPlan",
    "Target", "Weights", "cuts_of", "format_name", "make_plan", "numbers_text", "refuse_overlap",
    "scheme_text", "slab_rows", "spelled", "straight", "transposed", "unspelled", "weights_in",
]  # fmt: skip


def make_plan(source: Checkpoint, options: Options) -> Plan:
    """Decide everything. Raises PlanError, naming the tensor, for what cannot be done."""
    fmt = options.format or default_format(options.scheme)
    recipe = options.recipe.mapped(fmt.concrete) if options.recipe else None
    options = replace(options, format=fmt, scheme=fmt.concrete(options.scheme), recipe=recipe)
    if options.scheme.inverse and options.numerics != "f32":
        raise PlanError(
            f"--numerics {options.numerics} does not apply to the format {fmt.name}: its rule is "
            "one of f32."
        )
    family = Family(
        source.config, extra_groups=recipe.groups if recipe else (),
        extra_experts=recipe.experts if recipe else (),
    )  # fmt: skip
    stored, lifted = lift(
        source, find_stored(source), options.scheme, family, rules(options, family, False)
    )  # fmt: skip
    experts = experts_of(source, family, fmt, stays_of(options, family, source.config))
    weights: dict[str, Where] = {**stored, **experts.views, **joined_of(source, fmt)}
    tensors = _as_weights(source, weights, experts.rows, fmt)
    whole = {} if options.scheme.inverse else experts.whole
    choice = choose(tensors, weights, options, family, source.config, whole)
    homes = fuse(tensors, weights, choice, family, options)
    warnings = unused_patterns(tensors, options)
    warnings += recipe_warnings(tensors, choice.kept, options)
    warnings += expert_warnings(choice.modules)
    warnings += block_warnings(tensors, choice, homes)
    stacks = stacks_of(tensors, weights, choice, family, fmt)
    homes |= stacks.homes
    rows = _rows(source, stacks.tensors, choice, homes, stacks.weights)
    shards = place(rows, source.files, options)
    refuse_impossible(shards)
    heads = family.config.get("num_key_value_heads")
    warnings += check_tp(shards, options.check_tp, heads if isinstance(heads, int) else None)
    unquantized = [(tensors[i], why) for i, why in choice.kept.items()]
    ignored = [t.name.removesuffix(".weight") for t, _ in unquantized if is_linear_like(t)]
    ignored += choice.dequantized
    if fmt.mixes:  # loaders look for the experts of a stack by their own names
        ignored += [t.name.removesuffix(".weight") for t, _ in unquantized
                    if is_expert_stack(t.name, t.shape)]  # fmt: skip
    modules = choice.modules
    if stacks.modules:
        modules = {scheme: list(dict.fromkeys(stacks.modules.get(m, m) for m in names))
                   for scheme, names in modules.items()}  # fmt: skip
    ignored = sorted(dict.fromkeys(stacks.modules.get(m, m) for m in ignored))
    config = fmt.config(modules, ignored, _without_quantization(source))
    said = quantization_of(source.config).get("kv_cache_scheme")
    if said and fmt.name == format_of(source.config).name == "compressed-tensors":
        config["quantization_config"]["kv_cache_scheme"] = said
    elif said:
        warnings.append("the kv_cache_scheme of the source is lost: the new config has none")
    if not source.config:
        warnings.append("the source has no config.json; the new one holds its quantization only")
    files = fmt.files(config)
    if isinstance(fmt, Ascend):
        names = (name for shard in shards for name in shard.names)
        files[DESCRIPTION], more = described(names, modules, family, source.config)
        warnings += more
    plan = Plan(
        options=options,
        shards=shards,
        config=config,
        files=files,
        others=[name for name in source.others if not name.startswith(QUANTIZATION_FILES)],
        other_bytes=source.other_bytes,
        unquantized=unquantized,
        warnings=warnings,
        notes=[*source.oddities, *lifted, *choice.notes, *notes(family, options, choice)],
        bytes_in=source.nbytes,
        slab_memory=slab_memory(shards),
        input_files=len(source.files),
        verbatim=choice.verbatim and options.shard_size is None,
        remote=source.remote,
    )
    if recipe is not None:
        plan.texts = {"recipe.toml": recipe.text} if recipe.text else {}
        plan.notes += [f"{name}: {n} weights, {size_text(size)}"
                       for name, (n, size) in plan.schemes.items()]  # fmt: skip
    return plan


def weights_in(
    source: Checkpoint, family: Family, fmt: Format, held: Container[str]
) -> tuple[dict[str, Where], list[TensorInfo]]:
    """What an output of a format was made from: all tensors, and by name what is none by itself.

    ``held``: the names in the output; stacks of experts among them were not split.
    """
    experts = experts_of(source, family, fmt, lambda t, _: "as it is" if t.name in held else None)
    weights: dict[str, Where] = {
        **find_stored(source), **experts.views, **joined_of(source, fmt),
    }  # fmt: skip
    tensors = _as_weights(source, weights, experts.rows, fmt)
    for i, t in enumerate(tensors):
        if (place := place_of(t.name, family, fmt)) and place[0] in held:
            name = element(*place)
            tensors[i] = t._replace(name=name)
            if t.name in weights:
                weights[name] = weights.pop(t.name)
    return weights, tensors


def _as_weights(
    source: Checkpoint, weights: Mapping[str, Where], rows: Mapping[str, list[TensorInfo]],
    fmt: Format,
) -> list[TensorInfo]:  # fmt: skip
    """The tensors of the source, as the format calls them.

    Where parts of weights are, those weights stand instead; a quantized one is of f32 and
    stands where its codes are. ``rows``: what stands instead of a tensor that is cut.
    """
    if not weights and not rows:
        return list(source.tensors.values())
    parts: set[str] = set()
    places: dict[str, list[TensorInfo]] = dict(rows)
    for name, w in weights.items():
        if isinstance(w, Stored):
            t = w.codes
            weight = TensorInfo(name, "F32", w.shape, t.file, t.start)
            parts |= {part.name for part in w.tensors.values()}
        else:
            t = w.tensors[0]
            weight = TensorInfo(name, t.dtype, w.shape, t.file, w.start)
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
    """Raise PlanError where DST is SRC, holds it, or lies in it; one may be on the Hub."""
    if is_hub(src) or is_hub(dst):
        return
    a, b = Path(src).resolve(), Path(dst).resolve()
    built = b.with_name(b.name + ".partial")
    if any(a == place or a in place.parents or place in a.parents for place in (b, built)):
        raise PlanError(f"the destination {dst} overlaps the source {src}; choose another place.")


#: What other tools say of a quantization beside config.json; loaders believe these files.
QUANTIZATION_FILES = (
    "hf_quant_config.json", "quantize_config.json", "quant_config.json", "quant_model_description",
)  # fmt: skip
#: The last is MindIE's.
_QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization", "quantize")


def _without_quantization(source: Checkpoint) -> dict[str, object]:
    """config.json of the source without what it says of its quantization."""
    config = {k: v for k, v in source.config.items() if k not in _QUANTIZATION_KEYS}
    text = config.get("text_config")
    if isinstance(text, dict) and quantization_of(source.config):
        config["text_config"] = {k: v for k, v in text.items() if k not in _QUANTIZATION_KEYS}
    return config
