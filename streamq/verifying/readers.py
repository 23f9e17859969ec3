"""What the readers of compressed-tensors make of a config, by their own rules.

transformers (compressed-tensors 0.17 to 0.19): a module that a target names and no ignore entry,
takes the first of the matching targets: exact names, then regexes by alphabet, then its class.
vLLM (0.32; SGLang follows it): the targets in the order of the file, for the name of a fused
layer, then for all of its parts, then for its class. Both match regexes from the start of a name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

from streamq.checkpoint import Checkpoint
from streamq.families import Family
from streamq.formats import FORMATS, quantization_of
from streamq.schemes import Scheme
from streamq.stored import Stored

#: What vLLM calls the layers it makes of fused groups.
FUSED = {
    "qkv": "qkv_proj", "gate_up": "gate_up_proj", "qkv_a": "fused_qkv_a_proj",
    "qkvz": "in_proj_qkvz", "ba": "in_proj_ba",
}  # fmt: skip

_EXPERT = re.compile(r"^(.*\bexperts)\.(\d+)\.(.+)$")

#: From what vLLM calls a fused layer to the last parts of the names of its members.
FusedNames = Mapping[str, list[str]]


class Split(Exception):
    """A reader refuses a layer because its parts differ."""


def _targets(group: Mapping[str, Any]) -> list[str]:
    return group.get("targets") or []


class _Names:
    """Targets in order; one look for exact names, one try for each regex."""

    def __init__(self, targets: Iterable[str]) -> None:
        self.targets = list(dict.fromkeys(targets))
        self._place = {t: i for i, t in enumerate(self.targets) if not t.startswith("re:")}
        self._regexes = [(i, re.compile(t[3:])) for i, t in enumerate(self.targets)
                         if t.startswith("re:")]  # fmt: skip

    def first(self, name: str) -> str | None:
        """The first target that names it, exactly or from its start."""
        exact = self._place.get(name, len(self.targets))
        regex = next((i for i, r in self._regexes if i < exact and r.match(name)), exact)
        return self.targets[regex] if regex < len(self.targets) else None

    def contained(self, name: str) -> str | None:
        """The first target within a class name, whatever the case."""
        regexes = {self.targets[i]: r for i, r in self._regexes}
        for target in self.targets:
            regex = regexes.get(target)
            if regex.match(name) if regex else target.lower() in name.lower():
                return target
        return None


class Readers:
    """The rules of each reader for one ``quantization_config``.

    Results are names of config groups, None where a module is not quantized.
    """

    def __init__(self, quantization: Mapping[str, Any]) -> None:
        groups = quantization.get("config_groups") or {}
        self._group = {t: name for name, g in groups.items() for t in _targets(g)}
        self._targets = _Names(self._group)
        self._sorted = _Names(sorted(self._group, key=lambda t: ("re:" in t, t)))
        self._ignore = _Names(quantization.get("ignore") or [])
        self._groups = groups

    def transformers(
        self, module: str, classes: tuple[str, ...] = ("Linear", "Module")
    ) -> str | None:
        """The group of a module; ``classes``: its own and those it inherits from."""
        if self._ignore.first(module) or any(c in self._ignore.targets for c in classes):
            return None
        target = self._sorted.first(module)
        if target is None:
            target = next((t for t in self._sorted.targets if t in classes), None)
        return None if target is None else self._group[target]

    @cached_property
    def transformers_experts(self) -> str | None:
        """The group that transformers takes for all experts that it fuses."""
        tests: tuple[Callable[[str], bool], ...] = (
            lambda t: t.startswith("re:") and "experts" in t,
            lambda t: not t.startswith("re:"),
        )
        for test in tests:
            for name, g in self._groups.items():
                if any(map(test, _targets(g))):
                    return str(name)
        return next(iter(self._groups), None)

    def vllm(self, layer: str, cls: str, fused: FusedNames) -> str | None:
        """The group of a layer of a class. Raises Split where its parts are ignored in part."""
        if self._ignored(layer, fused):
            return None
        target = self._targets.first(layer) or self._by_parts(layer, fused)
        target = target or self._targets.contained(cls)
        if target is None and cls == "RoutedExperts" and "Linear" in self._group:
            target = "Linear"
        return None if target is None else self._group[target]

    def _ignored(self, layer: str, fused: FusedNames) -> bool:
        if self._ignore.first(layer):
            return True
        leaf = layer.rpartition(".")[2]
        shards = [layer.replace(leaf, part) for part in fused.get(leaf, ())]
        found = [self._ignore.first(shard) is not None for shard in shards]
        if any(found) and not all(found):
            raise Split("is ignored in part")
        return bool(found) and all(found)

    def _by_parts(self, layer: str, fused: FusedNames) -> str | None:
        leaf = next((leaf for leaf in fused if layer.endswith(leaf)), None)
        if leaf is None:
            return None
        found = [self._targets.first(layer.replace(leaf, part)) for part in fused[leaf]]
        return found[0] if all(found) else None

    def vllm_experts(self, layer: str, leaves: Iterable[str]) -> str | None:
        """The group of the experts of a layer, by the names of the first of them.

        Raises Split where the projections differ.
        """
        found = {self.vllm(f"{layer}.0.{leaf}", "RoutedExperts", {}) for leaf in leaves}
        if len(found) > 1:
            raise Split(f"has projections in {_and(found)}")
        return found.pop() if found else None


def _and(names: Iterable[str | None]) -> str:
    return " and ".join(sorted(name or "no group" for name in names))


class _Layer(NamedTuple):
    """What vLLM loads as one: its name, its class, and the modules of the checkpoint in it."""

    name: str
    cls: str
    modules: list[str]


def check_readers(
    config: Mapping[str, Any], family: Family, schemes: Mapping[str, Scheme | None]
) -> list[str]:
    """Modules that a reader takes for something else than they are on disk.

    ``schemes``: of each module that could be a Linear, None for one that is not quantized.
    """
    quantization = quantization_of(config)
    readers = Readers(quantization)
    said = _schemes_of(config)
    findings: list[str] = []

    def compare(reader: str, module: str, group: str | None) -> None:
        found = said[group] if group is not None else None
        if not _alike(schemes[module], found):
            findings.append(
                f"{reader} takes {module!r} for {_name(found)}, it is {_name(schemes[module])}"
            )

    embeddings = family.left_alone(next(iter(said.values())))
    plain = {m for m in schemes if embeddings(m) == "embedding"}
    for module in schemes:
        cls = ("Embedding", "Module") if module in plain else ("Linear", "Module")
        compare("transformers", module, readers.transformers(module, cls))
    experts = {schemes[m] for m in schemes if _EXPERT.match(m)}
    if len(experts) == 1 and (scheme := experts.pop()) is not None:
        first = next(m for m in schemes if _EXPERT.match(m))
        group = readers.transformers_experts
        if group is not None and not _alike(scheme, said[group]):
            compare("transformers, of all experts,", first, group)
    for layer, mapping in _layers(schemes, family, plain):
        try:
            if layer.cls == "RoutedExperts":
                leaves = dict.fromkeys(_leaf(m) for m in layer.modules)
                group = readers.vllm_experts(layer.name, leaves)
            else:
                group = readers.vllm(layer.name, layer.cls, mapping)
        except Split as e:
            findings.append(f"vLLM refuses {layer.name!r}, which {e}: {_kinds(layer, schemes)}")
            continue
        for module in layer.modules:
            compare("vLLM", module, group)
    return findings


def _layers(
    schemes: Mapping[str, Scheme | None], family: Family, embeddings: set[str]
) -> list[tuple[_Layer, FusedNames]]:
    layers: dict[str, _Layer] = {}
    mappings: dict[tuple[str, ...], FusedNames] = {(): {}}
    fused: dict[str, FusedNames] = {}
    for module in schemes:
        found = family.group_of(module)
        if expert := _EXPERT.match(module):
            name, cls = expert[1], "RoutedExperts"
        elif found is not None:
            parent, row = found
            name, cls = f"{parent}.{FUSED.get(row.name, row.name)}".lstrip("."), "Linear"
        else:
            head = module.rpartition(".")[2] == "lm_head"
            name = module
            cls = "VocabParallelEmbedding" if module in embeddings else "Linear"
            cls = "ParallelLMHead" if head else cls
        layers.setdefault(name, _Layer(name, cls, [])).modules.append(module)
    for layer in layers.values():
        leaf = layer.name.rpartition(".")[2]
        parts = tuple(m.rpartition(".")[2] for m in layer.modules)
        if layer.cls == "Linear" and parts != (leaf,):
            fused[layer.name] = mappings.setdefault((leaf, *parts), {leaf: list(parts)})
    return [(layer, fused.get(layer.name, {})) for layer in layers.values()]


def _leaf(module: str) -> str:
    found = _EXPERT.match(module)
    return found[3] if found else module.rpartition(".")[2]


def _schemes_of(config: Mapping[str, Any]) -> dict[str, Scheme]:
    """The scheme that each config group describes."""
    quantization = quantization_of(config)
    found = {}
    for name, group in quantization["config_groups"].items():
        alone = {**quantization, "config_groups": {"": {**group, "targets": ["Linear"]}}}
        alone["ignore"] = []
        rules, _ = FORMATS["compressed-tensors"].rules({"quantization_config": alone})
        scheme = rules("")
        assert scheme is not None
        found[name] = scheme
    return found


def _alike(a: Scheme | None, b: Scheme | None) -> bool:
    if a is None or b is None:
        return a is b
    return (a.numbers, a.activation) == (b.numbers, b.activation)


def _name(scheme: Scheme | None) -> str:
    return "not quantized" if scheme is None else scheme.name


def _kinds(layer: _Layer, schemes: Mapping[str, Scheme | None]) -> str:
    first: dict[str, str] = {}
    for module in layer.modules:
        first.setdefault(_name(schemes[module]), module)
    return ", ".join(f"{module!r} is {name}" for name, module in first.items())


def schemes_on_disk(checkpoint: Checkpoint, weights: Iterable[Stored]) -> dict[str, Scheme | None]:
    """The scheme of each module that could be a Linear, None where it is not quantized."""
    schemes: dict[str, Scheme | None] = {s.module: s.scheme for s in weights}
    for t in checkpoint.tensors.values():
        module = t.name.removesuffix(".weight")
        if module != t.name and len(t.shape) == 2:
            schemes.setdefault(module, None)
    return schemes
