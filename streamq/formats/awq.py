"""AWQ: what AutoAWQ wrote and vLLM, gptqmodel and mlx-lm load; 4 bits with zero points.

GEMM packs eight neighbouring output columns of the transposed weight into a word, in the
order that its kernel unpacks them; GEMV packs along the input and pads its groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from streamq.errors import CheckpointError, PlanError
from streamq.schemes import ALL, Quantized, Scheme
from streamq.tensors import TensorInfo

from .base import Array, Format, Read, Rules, integer, names_of, one_scheme, quantization_of
from .layout import Layout, Role, columns_entry, make_layout

#: Nibble i of a GEMM word holds column ORDER[i] of eight (AutoAWQ, packing_utils.py).
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Awq(Format):
    """AutoAWQ's checkpoints, ``version`` "gemm" or "gemv"."""

    method = "awq"
    presets = ("W4A16_ASYM", "W4A16")
    code_suffixes = ("qweight",)
    other_suffixes = ("qzeros", "scales")
    scale_suffix = "scales"

    def __init__(self, version: str) -> None:
        self.version = version
        self.name = "awq" if version == "gemm" else f"awq_{version}"
        self.loaders = "vLLM, gptqmodel, mlx-lm" if version == "gemm" else "AutoAWQ"

    def concrete(self, scheme: Scheme) -> Scheme:
        """See ``Format.concrete``. A symmetric scheme has the zero point 8 everywhere."""
        scheme = super().concrete(scheme)
        group = scheme.block[1]
        if group == ALL or group % 32:
            raise PlanError(f"the format {self.name} needs a group size that 32 divides.")
        return replace(scheme, scale="f16")

    def layout(
        self, rows: int, cols: int, dtype: str, scheme: Scheme, input_scale: float = 1.0
    ) -> Layout:
        """See ``Format.layout``."""
        if rows % 8:
            raise PlanError(f"{rows} rows, and words of {self.name} hold 8 of them")
        return _layout(rows, cols, dtype, scheme, self.version)

    def pack(self, role: Role, q: Quantized, layout: Layout, scheme: Scheme) -> Array:
        """See ``Format.pack``."""
        if role == "scale":
            return np.ascontiguousarray(q.scale.T)
        if role == "codes":
            codes = q.codes
        elif q.zero_point is not None:
            codes = q.zero_point
        else:
            codes = np.zeros(q.scale.shape, np.int8)
        unsigned = (codes.view(np.uint8) + np.uint8(8)) & np.uint8(15)
        return _words(np.ascontiguousarray(unsigned.T), ORDER)

    def unpack(self, arrays: Mapping[Role, Array], layout: Layout, scheme: Scheme) -> Quantized:
        """See ``Format.unpack``."""
        codes = np.ascontiguousarray(_nibbles(arrays["codes"], ORDER).T)
        zeros = np.ascontiguousarray(_nibbles(arrays["zero_point"], ORDER).T)
        return Quantized(codes, np.ascontiguousarray(arrays["scale"].T), zeros)

    def shape_of(
        self, name: str, found: Mapping[str, TensorInfo], scheme: Scheme, read: Read
    ) -> tuple[int, int]:
        """See ``Format.shape_of``."""
        cols, words = found["qweight"].shape
        return words * 8, cols

    def config(
        self, schemes: Mapping[Scheme, list[str]], ignore: list[str], config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """``dtype`` is float16, as vLLM holds the scales in the dtype it runs in."""
        (scheme,) = schemes
        quantization = {
            "quant_method": self.method,
            "bits": 4,
            "group_size": scheme.block[1],
            "zero_point": True,
            "version": self.version,
            "modules_to_not_convert": ignore,
        }
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        return {**config, key: "float16", "quantization_config": quantization}

    def reads(self, config: Mapping[str, Any]) -> bool:
        """See ``Format.reads``."""
        version = str(quantization_of(config).get("version", "gemm")).lower()
        return super().reads(config) and version == self.version

    def rules(self, config: Mapping[str, Any]) -> tuple[Rules, list[str]]:
        """See ``Format.rules``."""
        quantization = quantization_of(config)
        ignore = names_of(quantization, "modules_to_not_convert")
        if quantization.get("bits", 4) != 4:
            raise CheckpointError("config.json: AWQ of other than 4 bits is not known.")
        scheme = self.concrete(integer(4, quantization.get("group_size", 128), False))
        return one_scheme(scheme, ignore), ignore


@cache
def _layout(rows: int, cols: int, dtype: str, scheme: Scheme, version: str) -> Layout:
    groups = cols // scheme.block[1]
    entries = [
        columns_entry("qweight", "codes", "I32", (cols, rows // 8), 8),
        columns_entry("scales", "scale", "F16", (groups, rows), 1),
        columns_entry("qzeros", "zero_point", "I32", (groups, rows // 8), 8),
    ]
    return make_layout(rows, cols, dtype, entries, scheme.block)


def _words(nibbles: Array, order: tuple[int, ...]) -> Array:
    """uint8 ``[n, 8 m]`` below 16 to int32 ``[n, m]``: nibble i is column ``order[i]`` of 8."""
    eights = nibbles.reshape(len(nibbles), -1, 8)[:, :, order].astype(np.uint8)
    low, high = eights[:, :, 0::2], eights[:, :, 1::2]
    return np.ascontiguousarray(low | high << np.uint8(4)).view("<i4")[:, :, 0]


def _nibbles(words: Array, order: tuple[int, ...]) -> Array:
    """The inverse of ``_words``, as signed codes, int8 ``[n, 8 m]``."""
    raw = np.ascontiguousarray(words).view(np.uint8).reshape(*words.shape, 4)
    out = np.empty((*words.shape, 8), np.uint8)
    out[:, :, order[0::2]] = raw & 15
    out[:, :, order[1::2]] = raw >> 4
    return (out.reshape(len(words), -1) - np.uint8(8)).view(np.int8)
