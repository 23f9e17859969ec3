"""quant_model_description.json: the type of every tensor, as Ascend's loaders look it up.

Keys and their order of weight are those of msmodelslim's AscendV1Saver (commit 3de0a3c): a type
for every tensor that is written, scales and offsets included, and a few keys that are no
tensors. Its older saver also writes ``kv_cache_type``, ``kv_quant_type``, ``fa_quant_type`` and
``reduce_quant_type``, but only where there is such a quantization; vllm-ascend (commit 182b75e)
takes any value of ``fa_quant_type`` but "" for one, null too, so that they must be left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamq.checkpoint import DESCRIPTION as FILE
from streamq.checkpoint import read_json
from streamq.errors import CheckpointError

__all__ = [
    "COMPRESSED", "FILE", "FLOAT", "HEAD", "VERSION", "Description", "build", "load", "model_type",
    "parse",
]  # fmt: skip

VERSION = "1.0.0"

#: The type of a tensor that is as it was.
FLOAT = "FLOAT"
#: Compressed weights, which only the engine of the 310P reads.
COMPRESSED = ("W8A8SC", "W16A16SC")

#: Keys that are no tensors.
HEAD = (
    "model_quant_type", "version", "group_size", "metadata", "optional", "kv_quant_type",
    "kv_cache_type", "fa_quant_type", "indexer_quant_type", "reduce_quant_type", "is_rot_used",
)  # fmt: skip

#: ``model_quant_type`` is the last of these that a tensor has. W4A8_DYNAMIC, which msmodelslim
#: has no place for, counts where there is no other, and W4A16 is its older saver's.
_ORDER = (
    FLOAT, "W4A8_DYNAMIC", "W16A16S", "W16A16SC", "W8A16", "W8A8_DYNAMIC", "W8A8_MIX", "W8A8",
    "W8A8S", "W8A8SC", "W8A8_MXFP8", "W4A16", "W4A8_MXFP", "W4A4_MXFP4",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Description:
    """What the file says.

    ``types``: by the name of each tensor. ``head``: the keys that are no tensors.
    """

    types: dict[str, str]
    head: dict[str, Any] = field(default_factory=dict)

    def type_of(self, module: str) -> str | None:
        """The type of a module, which is that of its weight; None without an entry."""
        return self.types.get(module + ".weight")

    @property
    def group_size(self) -> int:
        """Columns that share a scale, one number for all that have groups; 0 if none do."""
        return int(self.head.get("group_size") or 0)

    def missing(self, names: Iterable[str]) -> Iterator[str]:
        """The tensors that have no entry. vllm-ascend raises KeyError for one it looks for."""
        return (name for name in names if name not in self.types)

    def as_json(self) -> dict[str, Any]:
        """The contents of the file."""
        return {**self.head, **self.types}


def parse(found: Mapping[str, Any], place: str = FILE) -> Description:
    """The description in the contents of the file.

    Raises CheckpointError for a type that is no text, a group size that is no number, and for one
    that speaks of no tensor.
    """
    head = {key: value for key, value in found.items() if key in HEAD}
    types = {key: value for key, value in found.items() if key not in HEAD}
    for name, said in types.items():
        if not isinstance(said, str):
            raise CheckpointError(f"{place}: the type of {name!r} must be a text, got {said!r}.")
    size = head.get("group_size")
    if size is not None and (type(size) is not int or size < 0):
        raise CheckpointError(f"{place}: group_size must be a number, got {size!r}.")
    if not types:
        raise CheckpointError(f"{place}: no tensor has an entry.")
    return Description(types, head)


def load(folder: Path) -> Description:
    """The description of a checkpoint. Raises CheckpointError for one that cannot be read."""
    return parse(read_json(folder / FILE))


def build(types: Mapping[str, str], group_size: int = 0, **head: Any) -> Description:
    """A description of tensors by their types. ``head``: more keys that are no tensors."""
    return Description(
        dict(types),
        {
            "model_quant_type": model_type(types.values()), "version": VERSION,
            "group_size": group_size, "metadata": {}, "optional": {}, **head,
        },
    )  # fmt: skip


def model_type(types: Iterable[str]) -> str:
    """``model_quant_type`` for the types of all tensors; "Unknown" where none of them counts."""
    known = [_ORDER.index(t) for t in set(types) if t in _ORDER]
    return _ORDER[max(known)] if known else "Unknown"
