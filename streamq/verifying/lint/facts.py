"""What rules look at: a checkpoint, its config, its quantized weights and fused groups."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from streamq.checkpoint import Checkpoint, read_json
from streamq.errors import CheckpointError
from streamq.families import Family, FusedGroup
from streamq.formats import quantization_of
from streamq.stored import Found, Stored, read
from streamq.tensors import TensorInfo

Severity = Literal["error", "warning"]

INDEX = "model.safetensors.index.json"
HF_QUANT = "hf_quant_config.json"
_EXPERT = re.compile(r"\bexperts\.\d+$")


@dataclass(frozen=True, slots=True)
class Facts:
    """One checkpoint. ``found`` is None, and ``weights`` empty, where streamq cannot read it.

    ``known`` keeps what several rules need.
    """

    checkpoint: Checkpoint
    found: Found | None
    weights: list[Stored]
    family: Family
    known: Known = field(default_factory=lambda: Known())

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json."""
        return self.checkpoint.config

    @property
    def format(self) -> str:
        """The name of the format, empty where it is not known."""
        return self.found.format.name if self.found else ""

    @property
    def quantization(self) -> dict[str, Any]:
        """``quantization_config``, {} where there is none or it is no object."""
        try:
            return quantization_of(self.config)
        except CheckpointError:
            return {}

    @property
    def groups(self) -> dict[str, dict[str, Any]]:
        """``config_groups`` that are objects, by name."""
        groups = self.quantization.get("config_groups")
        groups = groups if isinstance(groups, dict) else {}
        return {name: g for name, g in groups.items() if isinstance(g, dict)}

    def json(self, name: str) -> dict[str, Any] | None:
        """A JSON file beside the shards; None where it is absent or none."""
        if name not in self.known.json:
            path = self.checkpoint.root / name
            try:
                self.known.json[name] = read_json(path) if path.is_file() else None
            except CheckpointError:
                self.known.json[name] = None
        return self.known.json[name]

    def fused(self) -> Iterator[Fusion]:
        """Fused groups of which more than one member is quantized."""
        if self.known.fused is None:
            members: dict[tuple[str, FusedGroup], list[Stored]] = {}
            for s in self.weights:
                if found := self.family.group_of(s.module):
                    members.setdefault(found, []).append(s)
            self.known.fused = [
                Fusion(parent, group, sorted(m, key=lambda s: _place(group, s)))
                for (parent, group), m in members.items() if len(m) > 1
            ]  # fmt: skip
        yield from self.known.fused

    def value(self, t: TensorInfo) -> float:
        """The number that a tensor of one element holds."""
        if t.name not in self.known.values:
            self.known.values[t.name] = float(read(self.checkpoint, t).reshape(-1)[0])
        return self.known.values[t.name]


@dataclass(slots=True)
class Known:
    """What was looked up once."""

    fused: list[Fusion] | None = None
    values: dict[str, float] = field(default_factory=dict)
    json: dict[str, dict[str, Any] | None] = field(default_factory=dict)


class Fusion(NamedTuple):
    """Weights that a loader concatenates, in the order in which it does."""

    parent: str
    group: FusedGroup
    members: list[Stored]

    @property
    def expert(self) -> bool:
        """Whether they are projections of one routed expert."""
        return _EXPERT.search(self.parent) is not None


def _place(group: FusedGroup, s: Stored) -> int:
    return group.members.index(s.module.rpartition(".")[2])


#: What a rule finds: names of tensors, modules, files or keys.
Find = Callable[[Facts], "list[str]"]


class Rule(NamedTuple):
    """What one loader does with a checkpoint.

    ``says`` continues a sentence that begins with the loader. ``formats``: those that it goes
    for, all where empty. An error is a fault of the checkpoint: the loader refuses it or computes
    something else. A warning is about a checkpoint that is in order and a loader that is not.
    """

    name: str
    loader: str
    severity: Severity
    says: str
    find: Find
    formats: tuple[str, ...] = ()
