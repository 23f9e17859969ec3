"""gpt-fast: one int8 scale a row, as its ``WeightOnlyInt8Linear`` multiplies with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from streamq.errors import CheckpointError, PlanError
from streamq.schemes import ALL, SCHEMES, Scheme
from streamq.tensors import TensorInfo

from .base import Format, Read, Rules, names_of, one_scheme, quantization_of, scale_tag
from .layout import Layout, make_layout, rows_entry

#: Parts of names in Hugging Face's llama and in gpt-fast.
_NAMES = (
    ("embed_tokens.", "tok_embeddings."), ("lm_head.", "output."),
    (".self_attn.q_proj.", ".attention.wq."), (".self_attn.k_proj.", ".attention.wk."),
    (".self_attn.v_proj.", ".attention.wv."), (".self_attn.o_proj.", ".attention.wo."),
    (".mlp.gate_proj.", ".feed_forward.w1."), (".mlp.up_proj.", ".feed_forward.w3."),
    (".mlp.down_proj.", ".feed_forward.w2."), (".input_layernorm.", ".attention_norm."),
    (".post_attention_layernorm.", ".ffn_norm."),
)  # fmt: skip


class GptFast(Format):
    """``weight`` int8 ``[out, in]``, ``scales`` ``[out]`` in the weight's dtype.

    Codes come from the f32 scale, which is rounded only when it is stored (quantize.py,
    ``dynamically_quantize_per_channel``). gpt-fast itself has no config: ours is for reading
    back what is written.
    """

    name = method = "gpt-fast"
    loaders = "gpt-fast"
    presets = ("W8A16",)
    code_suffixes = ("weight",)
    other_suffixes = ("scales",)
    scale_suffix = "scales"
    options = ("gpt_fast_names",)

    def __init__(self, *, names: bool = False) -> None:
        """``names``: tensors are called as in gpt-fast, whose ``wqkv`` is q, k and v in one."""
        self.names = self.heads = names

    def configured(self, **options: Any) -> Format:
        """See ``Format.configured``. ``gpt_fast_names``: write gpt-fast's own names."""
        names = options.pop("gpt_fast_names", None)
        super().configured(**options)
        return GptFast(names=True) if names else self

    @property
    def chosen(self) -> dict[str, Any]:
        """See ``Format.chosen``."""
        return {"gpt_fast_names": True} if self.names else {}

    def as_read(self, config: Mapping[str, Any]) -> Format:
        """See ``Format.as_read``."""
        return GptFast(names=quantization_of(config).get("names") == self.method)

    def named_as(self, name: str) -> str:
        """See ``Format.named_as``; the names are those of gpt-fast's convert_hf_checkpoint.py."""
        if not self.names:
            return name
        name = name.removeprefix("model.")
        for theirs, ours in _NAMES:
            name = name.replace(theirs, ours)
        return name

    def concrete(self, scheme: Scheme) -> Scheme:
        """See ``Format.concrete``. The default group of the preset becomes whole rows."""
        scheme = super().concrete(scheme)
        if scheme.block[1] not in (ALL, SCHEMES[scheme.name].block[1]):
            raise PlanError("the format gpt-fast has one scale a row; leave out --group-size.")
        return replace(scheme, block=(1, ALL), unrounded=True)

    def layout(
        self, rows: int, cols: int, dtype: str, scheme: Scheme, input_scale: float = 1.0
    ) -> Layout:
        """See ``Format.layout``."""
        entries = [
            rows_entry("weight", "codes", "I8", (rows, cols), 1),
            rows_entry("scales", "scale", scale_tag(scheme, dtype), (rows,), 1),
        ]
        return make_layout(rows, cols, dtype, entries, (1, cols))

    def shape_of(
        self, name: str, found: Mapping[str, TensorInfo], scheme: Scheme, read: Read
    ) -> tuple[int, int]:
        """See ``Format.shape_of``."""
        rows, cols = found["weight"].shape
        return rows, cols

    def config(
        self, schemes: Mapping[Scheme, list[str]], ignore: list[str], config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See ``Format.config``."""
        quantization = {
            "quant_method": self.method,
            "bits": 8,
            "group_size": ALL,
            "modules_to_not_convert": ignore,
            **({"names": self.method} if self.names else {}),
        }
        return {**config, "quantization_config": quantization}

    def rules(self, config: Mapping[str, Any]) -> tuple[Rules, list[str]]:
        """See ``Format.rules``."""
        quantization = quantization_of(config)
        ignore = names_of(quantization, "modules_to_not_convert")
        if (quantization.get("bits", 8), quantization.get("group_size", ALL)) != (8, ALL):
            raise CheckpointError(
                "config.json: gpt-fast of other than 8 bits with a scale a row is not known."
            )
        return one_scheme(self.concrete(SCHEMES["W8A16"]), ignore), ignore
