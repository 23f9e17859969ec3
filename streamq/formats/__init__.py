"""What bytes and names each loader wants; one file per format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamq.errors import CheckpointError, PlanError
from streamq.schemes import Scheme

from .ascend import Ascend
from .awq import Awq
from .base import Format, Rules, quantization_of
from .compressed_tensors import CompressedTensors
from .fp8 import Fp8
from .gpt_fast import GptFast
from .gpt_oss import GptOss
from .gptq import Gptq
from .group import Group
from .layout import Entry, Layout, Role
from .mlx import Mlx
from .modelopt import ModelOpt
from .plain import Plain

__all__ = [
    "FORMATS",
    "Ascend",
    "Entry",
    "Format",
    "GptFast",
    "Layout",
    "Plain",
    "Role",
    "Rules",
    "default_format",
    "format_of",
    "named",
    "quantization_of",
]  # fmt: skip

# One line adds a format.
FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        CompressedTensors(),
        ModelOpt(),
        Fp8(),
        Awq("gemm"),
        Awq("gemv"),
        Gptq(1),
        Gptq(2),
        Mlx(),
        GptOss(),
        Ascend(),
        Group(),
        GptFast(),
        Plain(),
    )
}


def named(name: str, **options: Any) -> Format:
    """The format that ``--format`` names, with its options.

    Raises PlanError for one that is not known, or does not have an option that is given.
    """
    found = FORMATS.get(name.lower())
    if found is None:
        raise PlanError(f"unknown format {name!r}: known formats are {', '.join(FORMATS)}.")
    return found.configured(**options)


def default_format(scheme: Scheme) -> Format:
    """The format of a scheme where none is asked for: the first that holds it."""
    return next(f for f in FORMATS.values() if scheme.name in f.presets)


def format_of(config: Mapping[str, Any]) -> Format:
    """The format a config.json speaks of; plain for one that speaks of none.

    Raises CheckpointError for a quantization that is not known here.
    """
    for f in FORMATS.values():
        if f.reads(config):
            return f.as_read(config)
    raise CheckpointError(
        "config.json: the quantization "
        f"{quantization_of(config).get('quant_method')!r} is none that streamq reads: "
        f"{', '.join(sorted({f.method for f in FORMATS.values()}))}."
    )
