"""The modules of a source: which tensors each has, and which belong into one shard."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from streamq.checkpoint import Checkpoint
from streamq.errors import CheckpointError
from streamq.families import Family
from streamq.formats import FORMATS, Format, format_of
from streamq.stored import Found, look
from streamq.tensors import TensorInfo

from .types import Out


class Modules(NamedTuple):
    """``tensors``: by module and suffix. ``fmt``: None for a quantization that is not known."""

    source: Checkpoint
    family: Family
    fmt: Format | None
    tensors: dict[str, dict[str, TensorInfo]]

    def look(self) -> Found:
        """What the checkpoint says of its quantization; see ``stored.look``."""
        return look(self.source)

    def codes(self, module: str) -> TensorInfo | None:
        """The tensor with the values, or the codes, of a module's weight."""
        suffixes = (self.fmt or FORMATS["plain"]).code_suffixes
        found = self.tensors.get(module, {})
        return next((found[s] for s in (*suffixes, "weight") if s in found), None)

    def is_matrix(self, module: str) -> bool:
        """Whether it has a weight of two dimensions, not a stack of experts."""
        codes = self.codes(module)
        return codes is not None and len(codes.shape) == 2

    def split(self, name: str) -> tuple[str, str]:
        """Module and suffix of a tensor's name."""
        return split_name(name, self.fmt)


def split_name(name: str, fmt: Format | None) -> tuple[str, str]:
    """Module and suffix; without a format, ``x.weight.absmax`` belongs to ``x`` as well."""
    if fmt is not None and (found := fmt.split(name)) is not None:
        return found
    module, _, suffix = name.rpartition(".")
    if fmt is None and module.endswith(".weight"):
        module, suffix = module.removesuffix(".weight"), f"weight.{suffix}"
    return (module, suffix) if module else (name, "")


def modules_of(source: Checkpoint) -> Modules:
    """The modules of a checkpoint, whatever it is quantized to."""
    try:
        fmt = format_of(source.config)
    except CheckpointError:
        fmt = None
    tensors: dict[str, dict[str, TensorInfo]] = {}
    for t in source.tensors.values():
        module, suffix = split_name(t.name, fmt)
        tensors.setdefault(module, {})[suffix] = t
    return Modules(source, Family(source.config), fmt, tensors)


def groups_of(m: Modules) -> tuple[int, int]:
    """Fused groups of the source with more than one member; those that lie in several shards."""
    members: dict[tuple[str, object], set[str]] = {}
    files: dict[tuple[str, object], set[str]] = {}
    for module, tensors in m.tensors.items():
        if (group := m.family.group_of(module)) is not None:
            members.setdefault(group, set()).add(module)
            files.setdefault(group, set()).update(t.file for t in tensors.values())
    full = [group for group, found in members.items() if len(found) > 1]
    return len(full), sum(len(files[group]) > 1 for group in full)


def homes_of(m: Modules, outs: Iterable[Out], made: set[str]) -> list[int]:
    """For each output tensor the position of the first that shares its shard.

    A fused group shares one, and so do the tensors of a quantized weight and of a module that
    was ``made``. All others are on their own.
    """
    telling = {*m.fmt.code_suffixes, *m.fmt.other_suffixes} - {"weight"} if m.fmt else None
    quantized = {module for module, tensors in m.tensors.items()
                 if telling is None or not telling.isdisjoint(tensors)} | made  # fmt: skip
    homes: list[int] = []
    firsts: dict[object, int] = {}
    for i, o in enumerate(outs):
        module, _ = m.split(o.name)
        key: object = m.family.group_of(module) or (module if module in quantized else None)
        homes.append(i if key is None else firsts.setdefault(key, i))
    return homes
