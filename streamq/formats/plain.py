"""Not quantized: bf16, f16 or f32 weights under their own names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from streamq.schemes import FLOAT_TAGS, PLAIN, Quantized, Scheme

from .base import Array, Format, quantization_of
from .layout import Layout, Role, columns_entry, make_layout, rows_entry

_TORCH = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}


class Plain(Format):
    """What every loader reads; the way back from a quantized checkpoint."""

    name = method = "plain"
    loaders = "all"
    presets = tuple(PLAIN)
    code_suffixes = ("weight",)
    other_suffixes = ()

    def __init__(self, *, transposed: bool = False, suffix: str = "weight") -> None:
        """``transposed``: weights of stacks, which are ``[in, out]`` each and have no suffix."""
        self._transposed = transposed
        self._suffix = suffix

    def layout(
        self, rows: int, cols: int, dtype: str, scheme: Scheme, input_scale: float = 1.0
    ) -> Layout:
        """See ``Format.layout``."""
        tag = FLOAT_TAGS[scheme.element]
        if self._transposed:
            columns = columns_entry("", "codes", tag, (cols, rows), 1)
            return make_layout(rows, cols, dtype, [columns], (1, cols))
        codes = rows_entry(self._suffix, "codes", tag, (rows, cols), 1, direct=False)
        return make_layout(rows, cols, dtype, [codes], (1, cols))

    def layout_of(
        self, shape: tuple[int, ...], dtype: str, scheme: Scheme, input_scale: float = 1.0
    ) -> Layout:
        """See ``Format.layout_of``; the tensor has its own shape."""
        layout = super().layout_of(shape, dtype, scheme)
        if self._transposed:
            return layout
        return layout._replace(entries=(layout.entries[0]._replace(shape=shape),))

    def pack(self, role: Role, q: Quantized, layout: Layout, scheme: Scheme) -> Array:
        """See ``Format.pack``; the codes are the values."""
        return np.ascontiguousarray(q.codes.T) if self._transposed else q.codes

    def config(
        self, schemes: Mapping[Scheme, list[str]], ignore: list[str], config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See ``Format.config``."""
        (scheme,) = schemes
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        return {**config, key: _TORCH[scheme.element]}

    def reads(self, config: Mapping[str, Any]) -> bool:
        """See ``Format.reads``."""
        return not (quantization_of(config) or config.get("quantization"))
