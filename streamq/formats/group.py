"""Group-wise compression as DB-GPT and FastChat compute it, in safetensors.

The rule is that of ``fastchat/model/compression.py``, which compresses in memory and has no
file format: names, packing and config are ours. ``weight`` holds codes of 8 bits, int8 or,
asymmetric, uint8 counted from 0, as there; fewer bits are ``weight_packed``, offset binary in
int32 words row by row. ``weight_scale`` is what a weight was multiplied by, and
``weight_min`` what a code 0 stands for: a value is ``code / weight_scale + weight_min``.

All are matrices ``[shape[0], the rest]``. The shape that a weight had, and how many zeros
its last group was filled up with (they are not stored), are in ``__metadata__`` of the file, as
``"group:model.conv.weight": "shape=64,3,7,7;pad=253"``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from streamq.errors import CheckpointError, PlanError
from streamq.schemes import ALL, BYTES, Packing, Quantized, Scheme

from .base import Array, Format, Rules, integer, names_of, one_scheme, quantization_of
from .layout import Layout, Role, make_layout, rows_entry

#: What FastChat compresses with, and what a config that says nothing means.
BITS, GROUP_SIZE, GROUP_DIM = 8, 256, 1


class Group(Format):
    """Integers of 2 to 8 bits, groups along the axis ``dim``, 0 or 1, the last one ragged."""

    name = method = "group"
    loaders = "streamq (the rule of FastChat and DB-GPT)"
    presets = (
        *(f"W{b}A16" for b in (8, 2, 3, 4, 5, 6, 7)),
        *(f"W{b}A16_ASYM" for b in (8, 2, 3, 4, 5, 6, 7)),
    )
    code_suffixes = ("weight_packed", "weight")
    options = ("group_dim",)
    other_suffixes = ("weight_scale", "weight_min")

    def __init__(self, dim: int = GROUP_DIM) -> None:
        self.dim = dim

    def configured(self, **options: Any) -> Format:
        """See ``Format.configured``. ``group_dim``: the axis that groups run along."""
        dim = options.pop("group_dim", None)
        super().configured(**options)
        if dim not in (None, 0, 1):
            raise PlanError(f"--group-dim must be 0 or 1, got {dim}.")
        return self if dim is None else Group(dim)

    @property
    def chosen(self) -> dict[str, Any]:
        """See ``Format.chosen``."""
        return {"group_dim": self.dim}

    def concrete(self, scheme: Scheme) -> Scheme:
        """See ``Format.concrete``."""
        scheme = super().concrete(scheme)
        if scheme.scales != "absmax":
            raise PlanError(
                f"--scales {scheme.scales} does not apply to the format {self.name}: its scales "
                "come from the largest magnitude."
            )
        return _concrete(scheme, self.dim)

    def layout(
        self, rows: int, cols: int, dtype: str, scheme: Scheme, input_scale: float = 1.0
    ) -> Layout:
        """See ``Format.layout``."""
        return _layout(rows, cols, dtype, scheme)

    def pack(self, role: Role, q: Quantized, layout: Layout, scheme: Scheme) -> Array:
        """See ``Format.pack``."""
        if role == "bias":
            assert q.bias is not None
            return q.bias
        if role == "codes" and _counts_from_0(layout):
            return q.codes.view(np.uint8) ^ np.uint8(128)
        return super().pack(role, q, layout, scheme)

    def unpack(self, arrays: Mapping[Role, Array], layout: Layout, scheme: Scheme) -> Quantized:
        """See ``Format.unpack``."""
        q = super().unpack(arrays, layout, scheme)
        if _counts_from_0(layout):
            q = replace(q, codes=(q.codes ^ np.uint8(128)).view(np.int8))
        return replace(q, bias=arrays.get("bias"))

    def note(self, shape: tuple[int, ...], scheme: Scheme) -> str:
        """See ``Format.note``."""
        dim, size = (0, scheme.block[0]) if scheme.block[0] != 1 else (1, scheme.block[1])
        pad = 0 if size == ALL else -shape[dim] % size
        return f"shape={','.join(map(str, shape))};pad={pad}"

    def noted_shape(self, name: str, note: str | None, scheme: Scheme) -> tuple[int, ...]:
        """See ``Format.noted_shape``."""
        found = re.fullmatch(r"shape=([1-9]\d*(?:,[1-9]\d*)+);pad=\d+", note or "", re.ASCII)
        if found:
            shape = tuple(map(int, found[1].split(",")))
            if note == self.note(shape, scheme):
                return shape
        raise CheckpointError(
            f"{name + '.weight'!r}: __metadata__ says {note!r}, not a shape and a padding that fit "
            f"{scheme.name}."
        )

    def config(
        self, schemes: Mapping[Scheme, list[str]], ignore: list[str], config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See ``Format.config``; the keys are FastChat's, but ``bits``."""
        (scheme,) = schemes
        quantization = {
            "quant_method": self.method,
            "bits": scheme.bits,
            "group_size": _size(scheme),
            "group_dim": int(scheme.block[0] == 1),
            "symmetric": scheme.symmetric,
            "modules_to_not_convert": ignore,
        }
        return {**config, "quantization_config": quantization}

    def rules(self, config: Mapping[str, Any]) -> tuple[Rules, list[str]]:
        """See ``Format.rules``."""
        said = quantization_of(config)
        ignore = names_of(said, "modules_to_not_convert")
        bits, size = said.get("bits", BITS), said.get("group_size", GROUP_SIZE)
        dim, symmetric = said.get("group_dim", GROUP_DIM), said.get("symmetric", True)
        if not (
            (type(bits), type(size), type(dim), type(symmetric)) == (int, int, int, bool)
            and 2 <= bits <= 8 and (size > 1 or size == ALL) and dim in (0, 1)
        ):  # fmt: skip
            raise CheckpointError(
                f"config.json: group compression to {bits!r} bits in groups of {size!r} along "
                f"dimension {dim!r}, symmetric {symmetric!r}, is not known here."
            )
        return one_scheme(_concrete(integer(bits, size, symmetric), dim), ignore), ignore


def _concrete(scheme: Scheme, dim: int) -> Scheme:
    size = _size(scheme)
    block = (size, 1) if dim == 0 else (1, size)
    return replace(scheme, block=block, scale="f32", inverse=True, narrow=scheme.symmetric)


def _size(scheme: Scheme) -> int:
    """The group size, ALL for the whole axis."""
    return scheme.block[1] if scheme.block[0] == 1 else scheme.block[0]


def _counts_from_0(layout: Layout) -> bool:
    """Whether codes are stored as FastChat's uint8; kernels and ``Quantized`` have signed ones."""
    return layout.entry("codes").dtype == "U8"


@cache
def _layout(rows: int, cols: int, dtype: str, scheme: Scheme) -> Layout:
    block = scheme.block_of(rows, cols)
    shape = scheme.scale_shape(rows, cols)
    packing = BYTES
    if scheme.bits < 8:
        packing = Packing("words", scheme.bits)
        words = (rows, packing.row_bytes(cols) // 4)
        codes = rows_entry("weight_packed", "codes", "I32", words, 1)
    elif scheme.symmetric:
        codes = rows_entry("weight", "codes", "I8", (rows, cols), 1)
    else:
        codes = rows_entry("weight", "codes", "U8", (rows, cols), 1, direct=False)
    entries = [codes, rows_entry("weight_scale", "scale", "F32", shape, block[0])]
    if not scheme.symmetric:
        entries.append(rows_entry("weight_min", "bias", "F32", shape, block[0]))
    layout = make_layout(rows, cols, dtype, entries, block, packing)
    # A matrix of several weights has other groups where a group is a whole column.
    return layout._replace(
        joins=layout.joins and scheme.block[0] != ALL, flat=layout.flat and scheme.stride == 1
    )
