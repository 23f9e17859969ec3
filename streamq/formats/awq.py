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
from streamq.schemes import ALL, BYTES, Packing, Quantized, Scheme
from streamq.tensors import TensorInfo

from .base import Array, Format, Read, Rules, integer, names_of, one_scheme, quantization_of
from .gptq import left_out
from .layout import Layout, Role, columns_entry, make_layout, rows_entry

#: Nibble i of a GEMM word holds column ORDER[i] of eight (AutoAWQ, packing_utils.py).
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

_VERSIONS = ("gemm", "gemv")
_NIBBLES = Packing("words", 4)


class Awq(Format):
    """AutoAWQ's checkpoints, ``version`` "gemm" or "gemv".

    GEMM: qweight int32 ``[in, out / 8]``, qzeros int32 ``[in / g, out / 8]``, scales f16
    ``[in / g, out]``. GEMV: qweight int32 ``[out, in / 8]``, qzeros int32 ``[out, z]``,
    scales f16 ``[out, 8 * z]``, padded with zeros to ``z`` words (``zeros_width``).
    """

    method = "awq"
    presets = ("W4A16_ASYM",)
    code_suffixes = ("qweight",)
    other_suffixes = ("qzeros", "scales")
    scale_suffix = "scales"

    def __init__(self, version: str) -> None:
        self.version = version
        self.name = "awq" if version == "gemm" else f"awq_{version}"
        self.loaders = "vLLM, gptqmodel, mlx-lm" if version == "gemm" else "AutoAWQ, gptqmodel"

    def concrete(self, scheme: Scheme) -> Scheme:
        """See ``Format.concrete``."""
        scheme = super().concrete(scheme)
        group = scheme.block[1]
        if self.version == "gemv" and group not in (32, 64, 128):
            raise PlanError(f"the format {self.name} needs a group size of 32, 64 or 128.")
        if group == ALL or group % 32:
            raise PlanError(f"the format {self.name} needs a group size that 32 divides.")
        return replace(scheme, scale="f16")

    def layout(
        self, rows: int, cols: int, dtype: str, scheme: Scheme, input_scale: float = 1.0
    ) -> Layout:
        """See ``Format.layout``."""
        if rows % 8:
            raise PlanError(f"{rows} rows are no multiple of 8, which {self.name} needs")
        if cols % scheme.block[1]:
            raise PlanError(f"{cols} columns are no multiple of the group size {scheme.block[1]}")
        return _layout(rows, cols, dtype, scheme, self.version)

    def pack(self, role: Role, q: Quantized, layout: Layout, scheme: Scheme) -> Array:
        """See ``Format.pack``."""
        if self.version == "gemv":
            return self._pack_gemv(role, q, layout, scheme)
        if role == "scale":
            return np.ascontiguousarray(q.scale.T)
        from streamq.kernels.cpu.packing import pack_columns

        codes = q.codes if role == "codes" else q.zero_point
        assert codes is not None
        return pack_columns(codes, 4, 8, ORDER).view("<i4")

    def _pack_gemv(self, role: Role, q: Quantized, layout: Layout, scheme: Scheme) -> Array:
        from streamq.kernels.cpu.packing import pack_words

        if role == "codes":
            return pack_words(q.codes, 4, 8).view("<i4")
        values, nothing = (q.scale, 0) if role == "scale" else (q.zero_point, -8)  # stored as 0
        assert values is not None
        width = 8 * zeros_width(layout.cols, scheme.block[1])
        padded = np.full((len(values), width), nothing, values.dtype)
        padded[:, : values.shape[1]] = values
        return padded if role == "scale" else pack_words(padded, 4, 8).view("<i4")

    def unpack(self, arrays: Mapping[Role, Array], layout: Layout, scheme: Scheme) -> Quantized:
        """See ``Format.unpack``."""
        from streamq.kernels.cpu.packing import unpack_columns, unpack_words

        scale = self.unpadded(arrays["scale"], layout, scheme)
        if self.version == "gemm":
            codes, zeros = (unpack_columns(arrays[role].view("<u4"), 4, 8, ORDER)
                            for role in ("codes", "zero_point"))  # fmt: skip
            return Quantized(codes, np.ascontiguousarray(scale.T), zeros)
        codes = unpack_words(arrays["codes"].view(np.uint8), 4, layout.cols, 8)
        zeros = unpack_words(arrays["zero_point"].view(np.uint8), 4, scale.shape[1], 8)
        return Quantized(codes, np.ascontiguousarray(scale), zeros)

    def unpadded(self, scale: Array, layout: Layout, scheme: Scheme) -> Array:
        """See ``Format.unpadded``."""
        return scale if self.version == "gemm" else scale[:, : layout.cols // scheme.block[1]]

    def shape_of(
        self, name: str, found: Mapping[str, TensorInfo], scheme: Scheme, read: Read
    ) -> tuple[int, int]:
        """See ``Format.shape_of``."""
        lines, words = found["qweight"].shape
        return (words * 8, lines) if self.version == "gemm" else (lines, words * 8)

    def config(
        self, schemes: Mapping[Scheme, list[str]], ignore: list[str], config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What is left out of layers is said twice, for gptqmodel under ``dynamic``.

        ``dtype`` is float16, as vLLM holds the scales in the dtype it runs in.
        """
        (scheme,) = schemes
        quantization: dict[str, Any] = {
            "quant_method": self.method,
            "bits": 4,
            "group_size": scheme.block[1],
            "zero_point": True,
            "version": self.version,
            "modules_to_not_convert": ignore,
        }
        if left := left_out(ignore):
            quantization["dynamic"] = left
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        return {**config, key: "float16", "quantization_config": quantization}

    def reads(self, config: Mapping[str, Any]) -> bool:
        """See ``Format.reads``; GEMM refuses in ``rules`` what neither version is."""
        version = _version(quantization_of(config))
        mine = version if version in _VERSIONS else "gemm"
        return super().reads(config) and mine == self.version

    def rules(self, config: Mapping[str, Any]) -> tuple[Rules, list[str]]:
        """See ``Format.rules``. Where ``zero_point`` is false there are zero points all the same.

        AutoAWQ and gptqmodel write them, 8 everywhere, and subtract what is there.
        """
        quantization = quantization_of(config)
        ignore = names_of(quantization, "modules_to_not_convert")
        if _version(quantization) not in _VERSIONS:
            raise CheckpointError(
                f"config.json: AWQ of version {_version(quantization)!r} is not known; "
                "gemm and gemv are."
            )
        bits = quantization.get("bits", quantization.get("w_bit", 4))
        if bits != 4:
            raise CheckpointError(f"config.json: AWQ of {bits!r} bits is not known, of 4 it is.")
        group = quantization.get("group_size", quantization.get("q_group_size", 128))
        if not isinstance(group, int) or group < 1:
            raise CheckpointError(f"config.json: AWQ of group_size {group!r} is not known.")
        scheme = replace(integer(4, group, False), scale="f16")
        return one_scheme(scheme, ignore), ignore


def zeros_width(cols: int, group: int) -> int:
    """Words that the zero points of a GEMV row take (AutoAWQ, ``calculate_zeros_width``)."""
    multiple = max(1, 128 // group)
    words = -(-(cols // group) // 8)
    return -(-words // multiple) * multiple


@cache
def _layout(rows: int, cols: int, dtype: str, scheme: Scheme, version: str) -> Layout:
    group = scheme.block[1]
    if version == "gemm":
        entries = [
            columns_entry("qweight", "codes", "I32", (cols, rows // 8), 8),
            columns_entry("scales", "scale", "F16", (cols // group, rows), 1),
            columns_entry("qzeros", "zero_point", "I32", (cols // group, rows // 8), 8),
        ]
        return make_layout(rows, cols, dtype, entries, scheme.block, BYTES)
    width = zeros_width(cols, group)
    entries = [
        rows_entry("qweight", "codes", "I32", (rows, cols // 8), 1),
        rows_entry("scales", "scale", "F16", (rows, 8 * width), 1, direct=False),
        rows_entry("qzeros", "zero_point", "I32", (rows, width), 1, direct=False),
    ]
    return make_layout(rows, cols, dtype, entries, scheme.block, _NIBBLES)


def _version(quantization: Mapping[str, Any]) -> str:
    """``version``, as AutoAWQ spells it in either case; gptqmodel may have the others alone."""
    keys = ("version", "checkpoint_format", "format")
    return str(next((quantization[k] for k in keys if quantization.get(k)), "gemm")).lower()
