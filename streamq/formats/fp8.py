"""FP8 in 128x128 blocks, as DeepSeek released it; transformers, vLLM and SGLang load it.

The scale is a multiplier although its name is ``weight_scale_inv``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from streamq.errors import CheckpointError, PlanError
from streamq.schemes import SCHEMES, Quantized, Scheme
from streamq.tensors import TensorInfo

from .base import Array, Format, Read, Rules, names_of, one_scheme, quantization_of, scale_tag
from .layout import Layout, Role, make_layout, rows_entry
from .matching import clashing, with_head

_POWERS = "ue8m0"
#: Header dtypes of scales that are an exponent, which others write for ``ue8m0``.
_EXPONENTS = ("F8_E8M0", "U8")
_FLOAT_SCALES = {"BF16": "bf16", "F16": "f16"}


class Fp8(Format):
    """e4m3 codes with an f32 scale for each block; with ``ue8m0`` all scales are powers of two.

    transformers on a CPU dequantizes on loading, and takes for granted that rows and columns
    are whole blocks; vLLM and transformers on a GPU do not.
    """

    name = method = "fp8"
    loaders = "transformers, vLLM, SGLang"
    presets = ("FP8_BLOCK",)
    code_suffixes = ("weight",)
    other_suffixes = ("weight_scale_inv",)
    options = ("scale_fmt",)
    scale_suffix = "weight_scale_inv"

    def __init__(self, scale_fmt: str | None = None) -> None:
        self.scale_fmt = scale_fmt

    def configured(self, **options: Any) -> Format:
        """See ``Format.configured``. ``scale_fmt``: "ue8m0" rounds scales up to powers of two."""
        scale_fmt = options.pop("scale_fmt", None)
        super().configured(**options)
        if scale_fmt not in (None, _POWERS):
            raise PlanError(f"--scale-fmt is {_POWERS} or left out, got {scale_fmt}.")
        return self if scale_fmt == self.scale_fmt else Fp8(scale_fmt)

    @property
    def chosen(self) -> dict[str, Any]:
        """See ``Format.chosen``."""
        return {"scale_fmt": self.scale_fmt} if self.scale_fmt else {}

    def concrete(self, scheme: Scheme) -> Scheme:
        """See ``Format.concrete``. Scales are f32, whatever the weight's dtype."""
        scheme = super().concrete(scheme)
        return replace(scheme, scale="f32", power_of_two=self.scale_fmt == _POWERS)

    def layout(
        self, rows: int, cols: int, dtype: str, scheme: Scheme, input_scale: float = 1.0
    ) -> Layout:
        """See ``Format.layout``."""
        return _layout(rows, cols, dtype, scheme)

    def unpack(self, arrays: Mapping[Role, Array], layout: Layout, scheme: Scheme) -> Quantized:
        """See ``Format.unpack``; scales that are exponents become f32."""
        scale = arrays["scale"]
        if scale.dtype.itemsize == 1:
            powers = np.ldexp(np.float32(1), scale.view(np.uint8).astype(np.int32) - 127)
            arrays = {**arrays, "scale": powers.astype(np.float32)}
        return super().unpack(arrays, layout, scheme)

    def shape_of(
        self, name: str, found: Mapping[str, TensorInfo], scheme: Scheme, read: Read
    ) -> tuple[int, int]:
        """See ``Format.shape_of``."""
        rows, cols = found["weight"].shape
        return rows, cols

    def as_stored(self, scheme: Scheme, found: Mapping[str, TensorInfo]) -> Scheme:
        """See ``Format.as_stored``: Qwen's checkpoints have bf16 scales, DeepSeek's f32."""
        tag = found[self.scale_suffix].dtype
        if tag in _EXPONENTS:
            return replace(scheme, power_of_two=True)
        element: Any = _FLOAT_SCALES.get(tag)
        return scheme if element is None else replace(scheme, scale=element)

    def config(
        self, schemes: Mapping[Scheme, list[str]], ignore: list[str], config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See ``Format.config``.

        transformers takes entries of modules_to_not_convert for regexes at the start of a name,
        or for its end: ``mlp.gate`` would leave out ``mlp.gate_proj`` too. Where that happens
        they end in ``$``, and ignored_layers, which vLLM and SGLang prefer and transformers does
        not look at then, has the exact names.
        """
        ((scheme, modules),) = schemes.items()
        ignored = with_head(ignore, modules)
        hidden = clashing(ignored, modules)
        quantization = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "modules_to_not_convert": [n + "$" if n in hidden else n for n in ignored],
            "quant_method": self.method,
            "weight_block_size": list(scheme.block),
            **({"ignored_layers": ignored} if hidden else {}),
            **({"scale_fmt": _POWERS} if scheme.power_of_two else {}),
        }
        return {**config, "quantization_config": quantization}

    def rules(self, config: Mapping[str, Any]) -> tuple[Rules, list[str]]:
        """See ``Format.rules``; any size of blocks."""
        q = quantization_of(config)
        ignore = names_of(q, "ignored_layers") or names_of(q, "modules_to_not_convert")
        block = q.get("weight_block_size")
        if q.get("activation_scheme", "dynamic") != "dynamic" or not block:
            raise CheckpointError(
                "config.json: fp8 with one scale for a whole tensor, or with static scales of "
                "the activations, is not known; streamq reads fp8 with a weight_block_size."
            )
        good = isinstance(block, list) and len(block) == 2
        if not good or not all(isinstance(n, int) and n > 0 for n in block):
            raise CheckpointError(
                f"config.json: weight_block_size of quantization_config is {block!r}, not two "
                "sizes."
            )
        if q.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
            raise CheckpointError(f"config.json: fp8 with the fmt {q['fmt']!r} is not known.")
        powers = q.get("scale_fmt") == _POWERS
        scheme = replace(
            SCHEMES["FP8_BLOCK"], scale="f32", power_of_two=powers, block=(block[0], block[1])
        )
        return one_scheme(scheme, ignore), ignore


@cache
def _layout(rows: int, cols: int, dtype: str, scheme: Scheme) -> Layout:
    block = scheme.block_of(rows, cols)
    tag = dtype if dtype in _EXPONENTS else scale_tag(scheme, dtype)
    entries = [
        rows_entry("weight", "codes", "F8_E4M3", (rows, cols), 1),
        rows_entry("weight_scale_inv", "scale", tag, scheme.scale_shape(rows, cols), block[0]),
    ]
    return make_layout(rows, cols, dtype, entries, block)
