"""gpt-oss: MXFP4 experts, all of a layer in one tensor of blocks and one of scales.

``experts.gate_up_proj_blocks`` uint8 ``[experts, out, in / 32, 16]``, the even column in the low
nibble; ``_scales`` uint8 ``[experts, out, in / 32]``, E8M0. Gate and up interleave by row. The
bf16 originals are ``[experts, in, out]``, transposed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from streamq.schemes import SCHEMES, Packing, Quantized, Scheme
from streamq.tensors import TensorInfo

from .base import Array, Format, Read, Rules, names_of, quantization_of
from .layout import Layout, Role, make_layout, rows_entry

_SCHEME = SCHEMES["MXFP4A16"]
_SUFFIXES = ("_blocks", "_scales")


class GptOss(Format):
    """The checkpoints of gpt-oss; nothing but its experts is quantized."""

    name = "gpt-oss"
    method = "mxfp4"
    loaders = "transformers, vLLM, SGLang"
    presets = ("MXFP4A16",)
    code_suffixes = ("_blocks",)
    other_suffixes = ("_scales",)
    scale_suffix = "_scales"
    stacks = True

    def layout(
        self, rows: int, cols: int, dtype: str, scheme: Scheme, input_scale: float = 1.0
    ) -> Layout:
        """See ``Format.layout``; of one expert."""
        return _layout(rows, cols, dtype, scheme)

    def unpack(self, arrays: Mapping[Role, Array], layout: Layout, scheme: Scheme) -> Quantized:
        """See ``Format.unpack``."""
        blocks = arrays["codes"]
        return super().unpack({**arrays, "codes": blocks.reshape(len(blocks), -1)}, layout, scheme)

    def config(
        self, schemes: Mapping[Scheme, list[str]], ignore: list[str], config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See ``Format.config``; what is not an expert is the same in all of these models."""
        quantization = {
            "quant_method": self.method,
            "modules_to_not_convert": [
                "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens",
                "lm_head",
            ],
        }  # fmt: skip
        return {**config, "quantization_config": quantization}

    def split(self, name: str) -> tuple[str, str] | None:
        """See ``Format.split``."""
        for suffix in _SUFFIXES:
            if name.endswith("proj" + suffix):
                return name.removesuffix(suffix), suffix
        return None

    @property
    def telling(self) -> set[str]:
        """See ``Format.telling``."""
        return {p + suffix for p in ("gate_up_proj", "down_proj") for suffix in _SUFFIXES}

    def joined(self, module: str, suffix: str) -> str:
        """See ``Format.joined``."""
        return module + suffix

    def original(self, module: str) -> str:
        """See ``Format.original``; there is no ``.weight``."""
        return module

    def slices(
        self, module: str, tensors: dict[str, TensorInfo]
    ) -> Iterator[tuple[str, dict[str, TensorInfo]]]:
        """See ``Format.slices``."""
        return self.experts_of(module, tensors)

    def rules(self, config: Mapping[str, Any]) -> tuple[Rules, list[str]]:
        """See ``Format.rules``."""
        ignore = names_of(quantization_of(config), "modules_to_not_convert")
        return (lambda module: _SCHEME if ".experts." in module else None), ignore

    def shape_of(
        self, name: str, found: Mapping[str, TensorInfo], scheme: Scheme, read: Read
    ) -> tuple[int, int]:
        """See ``Format.shape_of``."""
        rows, *blocks = found["_blocks"].shape
        return rows, 32 * (blocks[0] if blocks else 0)


@cache
def _layout(rows: int, cols: int, dtype: str, scheme: Scheme) -> Layout:
    blocks = cols // 32
    entries = [
        rows_entry("_blocks", "codes", "U8", (rows, blocks, 16), 1),
        rows_entry("_scales", "scale", "U8", (rows, blocks), 1),
    ]
    return make_layout(rows, cols, dtype, entries, scheme.block, Packing("nibbles", 4))
