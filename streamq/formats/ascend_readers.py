"""What loaders make of a description, by their own rules.

vllm-ascend (commit 182b75e, ``modelslim_config.py``): a fused layer has the type that all of its
members have, a layer's experts that of the projections of expert 0 (``packed_modules_mapping`` has
them as ``experts.0.gate_proj``), any other layer its own; without an entry it raises KeyError. A
layer that is not fused counts as FLOAT where the name of any FLOAT weight starts with its name.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator

from streamq.families import Family

from .ascend import Ascend
from .ascend_description import FILE, FLOAT, Description

#: Models whose experts vllm-ascend knows how to look up.
WITH_EXPERTS = {
    "bailing_hybrid", "deepseek_mtp", "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4",
    "gemma4", "gemma4_text", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm4v_moe_text",
    "glm_moe_dsa", "kimi_k2", "longcat_flash", "minimax_m2", "minimax_m3", "minimax_m3_vl",
    "pangu_ultra_moe", "qwen3_5_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_vl_moe", "qwen3_moe",
    "step3p5",
}  # fmt: skip
#: Types that vllm-ascend has for experts, and for other linear layers.
_OF_EXPERTS = {"W8A8_DYNAMIC", "W4A8_DYNAMIC", "W8A8_MXFP8", "W4A8_MXFP", "W4A4_MXFP4"}
_OF_LINEAR = {
    "W8A8_DYNAMIC", "W8A16", "W8A8", "W8A8_MIX", "W8A8S", "W8A8_MXFP8", "W4A8_MXFP", "W4A4_MXFP4",
}  # fmt: skip
#: Types whose scales belong to 32 columns, the group size that the whole file then has.
_MX = {"W8A8_MXFP8", "W4A8_MXFP", "W4A4_MXFP4"}

_EXPERT = re.compile(r"^(.*\bexperts)\.(\d+)\.(.+)$")
_PARTS = {*Ascend.other_suffixes}


def findings(said: Description, names: Iterable[str], family: Family) -> Iterator[str]:
    """Sentences about what a loader refuses or takes for something else.

    ``names``: of all tensors.
    """
    names = list(names)
    for name in said.missing(names):
        yield f"{name!r} has no entry in {FILE}: vllm-ascend raises KeyError for it"
    modules = {}
    for name in names:
        module, _, suffix = name.rpartition(".")
        if suffix == "weight" and name in said.types:
            modules[module] = said.types[name]
    yield from _uneven_parts(said, names, modules)
    yield from _uneven_layers(modules, family)
    yield from _shadowed(modules, family)
    yield from _group_sizes(said, modules)


def _uneven_parts(said: Description, names: list[str], modules: dict[str, str]) -> Iterator[str]:
    for name in names:
        module, _, suffix = name.rpartition(".")
        own, of_module = said.types.get(name), modules.get(module)
        if suffix in _PARTS and own and of_module and own != of_module:
            yield f"{name!r} is {own} in {FILE}, {module + '.weight'!r} is {of_module}"


def _uneven_layers(modules: dict[str, str], family: Family) -> Iterator[str]:
    """Fused layers, and experts of one layer, of several types."""
    firsts: dict[tuple[str, ...], str] = {}
    told: set[tuple[str, ...]] = set()
    for module in modules:
        if expert := _EXPERT.match(module):
            key: tuple[str, ...] = (expert[1],)
            if expert[2] == "0":
                firsts.setdefault(key, module)
        elif found := family.group_of(module):
            key = (found[0], found[1].members[0])
            firsts.setdefault(key, module)
    for module, type_ in modules.items():
        if expert := _EXPERT.match(module):
            key, why = (expert[1],), "it takes all experts of a layer for what expert 0 is"
        elif found := family.group_of(module):
            key, why = (found[0], found[1].members[0]), f"it fuses them ({found[1].name})"
        else:
            continue
        first = firsts.get(key)
        if key in told or (first is not None and modules[first] == type_):
            continue
        told.add(key)
        if first is None:
            yield f"{key[0]!r} has no expert 0, whose type vllm-ascend looks up for all of them"
        else:
            yield (
                f"{first!r} is {modules[first]} and {module!r} is {type_} in {FILE}: vllm-ascend "
                f"needs one type, because {why}"
            )


def _shadowed(modules: dict[str, str], family: Family) -> Iterator[str]:
    floats = sorted(module for module, type_ in modules.items() if type_ == FLOAT)
    for module, type_ in modules.items():
        if type_ == FLOAT or _EXPERT.match(module) or family.group_of(module):
            continue
        at = bisect_left(floats, module)
        if at < len(floats) and floats[at].startswith(module):
            yield (
                f"{module!r} is {type_} in {FILE}, but vllm-ascend takes it for FLOAT, because "
                f"{floats[at]!r} is and its name begins in the same way"
            )


def _group_sizes(said: Description, modules: dict[str, str]) -> Iterator[str]:
    """The one group size of the file that two types read differently."""
    by_type = {type_: module for module, type_ in modules.items()}
    for type_ in _MX & by_type.keys():
        if said.head.get("group_size", 32) != 32:
            yield (
                f"group_size is {said.group_size} in {FILE}, {by_type[type_]!r} is {type_} and "
                "needs 32"
            )
    if "W4A8_DYNAMIC" in by_type and said.group_size:
        yield (
            f"group_size is {said.group_size} in {FILE}, and vllm-ascend refuses one beside "
            f"W4A8_DYNAMIC, which {by_type['W4A8_DYNAMIC']!r} is"
        )


def warnings(said: Description, names: Iterable[str], family: Family) -> Iterator[str]:
    """What vllm-ascend does not load, and MindIE may."""
    linear: dict[str, str] = {}
    experts: dict[str, str] = {}
    for name in names:
        module, _, suffix = name.rpartition(".")
        type_ = said.types.get(name, FLOAT)
        if suffix == "weight" and type_ != FLOAT:
            (experts if _EXPERT.match(module) else linear).setdefault(type_, module)
    for found, known, kind in (
        (linear, _OF_LINEAR, "linear layers"), (experts, _OF_EXPERTS, "experts"),
    ):  # fmt: skip
        for type_, module in found.items():
            if type_ not in known:
                yield f"vllm-ascend has no {type_} for {kind}, as {module!r}; MindIE may"
    types = {family.model_type, str(family.config.get("model_type") or "")}
    if experts and not types & WITH_EXPERTS:
        yield (
            f"vllm-ascend does not know the experts of the model_type {family.model_type!r}: it "
            "looks for an entry of all experts in one and raises KeyError"
        )
