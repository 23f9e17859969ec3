"""Checkpoints whose groups lie in several files, and what is made of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from family_checkpoints import FAMILIES
from helpers import write_checkpoint

from streamq.formats import FORMATS


class Row(NamedTuple):
    """A family, a scheme, and more of ``streamq.api.options``."""

    family: str
    scheme: str
    more: Mapping[str, Any] = MappingProxyType({})


#: The first has groups with one scale over several files; MoE in two and in three dimensions.
ROWS = {
    "nvfp4": Row("llama", "nvfp4"),
    "fp8_block": Row("llama", "fp8_block"),
    "w4a16_asym": Row("llama", "w4a16_asym", {"group_size": 64}),
    "experts": Row("qwen3_moe", "nvfp4"),
    "stacked experts": Row("qwen3_vl_moe", "nvfp4a16", {"shard_size": 40_000}),
    "ascend": Row("qwen3_moe", FORMATS["ascend"].presets[0].lower(), {"format": "ascend"}),
    "mlx": Row("llama", "w4a16_asym", {"format": "mlx", "group_size": 64}),
}


def straddling(folder: Path, family: str) -> Path:
    """Three files that have every third tensor each, so that q, k and v are in three."""
    made = FAMILIES[family]()
    names = list(made.tensors)
    return write_checkpoint(folder, made.tensors, made.config, [names[i::3] for i in range(3)])
