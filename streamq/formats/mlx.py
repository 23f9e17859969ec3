"""MLX: what mlx-lm writes and loads; a value is ``code * scale + bias``, or MX and NVFP4.

Facts are those of mlx 0.32 and mlx-lm 0.32. Which modules are quantized is told by the
presence of their ``scales``; an entry of a module's name in the config comes before that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from streamq.errors import CheckpointError, NonFiniteError, PlanError
from streamq.kernels.reference import E4M3
from streamq.schemes import BYTES, SCHEMES, Packing, Quantized, Scheme
from streamq.tensors import TensorInfo, stack_of

from .base import Array, Format, Read, Rules, integer, quantization_of, scale_tag
from .layout import Layout, Role, make_layout, rows_entry

#: Bits and group sizes that mlx has kernels for.
BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)

#: Presets of the other modes, with their bits and group size.
_MODES = {"mxfp4": ("MXFP4A16", 4, 32), "mxfp8": ("MXFP8A16", 8, 32), "nvfp4": ("NVFP4A16", 4, 16)}
_MODE_OF = {preset: mode for mode, (preset, _, _) in _MODES.items()}

#: One expert of a layer, and what mlx-lm calls its projections.
_EXPERT = re.compile(
    r"(.*\.)experts\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)(\.weight|\.bias|)"
)
_PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
#: Models whose stacks mlx-lm has elsewhere, or takes for a sign that norms are changed already.
_ELSEWHERE = (
    "Klear", "afmoe", "deepseek_v4", "deepseek_v41", "diffusion_gemma", "dots1", "gemma4",
    "gemma4_unified", "gpt_oss", "kimi_k3", "kimi_linear", "llama4", "muse_spark", "nemotron_h",
    "qwen3_next",
)  # fmt: skip


class Mlx(Format):
    """``weight`` as U32 words, ``scales`` and, for integers, ``biases``.

    A bias is the zero point times the scale, rounded to their dtype. Of 8 bits only the
    symmetric preset is held, because a bf16 bias cannot tell zero points above 128 apart.
    """

    name = method = "mlx"
    loaders = "mlx-lm"
    presets = (
        *(f"W{b}A16_ASYM" for b in (4, 2, 3, 5, 6)), *(f"W{b}A16" for b in BITS), *_MODE_OF,
    )  # fmt: skip
    code_suffixes = ("weight",)
    other_suffixes = ("scales", "biases")
    scale_suffix = "scales"
    mixes = True

    def concrete(self, scheme: Scheme) -> Scheme:
        """See ``Format.concrete``. NVFP4 has no global scale here."""
        scheme = super().concrete(scheme)
        if scheme.element == "int" and scheme.block[1] not in GROUPS:
            raise PlanError("the format mlx needs a --group-size of 32, 64 or 128.")
        return replace(scheme, two_level=False)

    def layout(
        self, rows: int, cols: int, dtype: str, scheme: Scheme, input_scale: float = 1.0
    ) -> Layout:
        """See ``Format.layout``."""
        return _layout(rows, cols, dtype, scheme)

    def pack(self, role: Role, q: Quantized, layout: Layout, scheme: Scheme) -> Array:
        """See ``Format.pack``. Raises NonFiniteError for a bias that is beyond its dtype."""
        if role != "bias":
            return super().pack(role, q, layout, scheme)
        half = np.float32(1 << (scheme.bits - 1))
        zero = half if q.zero_point is None else q.zero_point + half
        bias = _bias(zero, q.scale)
        good = np.isfinite(bias.astype(np.float32))
        if not good.all():
            row, group = np.argwhere(~good)[0]
            raise NonFiniteError("bias", int(row), int(group))
        return bias

    def unpack(self, arrays: Mapping[Role, Array], layout: Layout, scheme: Scheme) -> Quantized:
        """See ``Format.unpack``.

        The bias is kept, because ``mlx_lm.convert`` has the largest weight of a group for one
        and a scale of either sign. There is a zero point too where every bias is one that
        ``pack`` makes.
        """
        q = super().unpack(arrays, layout, scheme)
        if scheme.element != "int":
            return replace(q, scale=q.scale.view(E4M3)) if scheme.scale == "e4m3" else q
        scale, bias = q.scale.astype(np.float32), arrays["bias"].astype(np.float32)
        half = 1 << (scheme.bits - 1)
        with np.errstate(all="ignore"):
            zero = np.rint(-bias / scale)
            exact = (_bias(zero, q.scale).astype(np.float32) == bias) & (zero >= 0)
        exact &= zero == half if scheme.symmetric else zero < 2 * half
        zero_point = None
        if scheme.symmetric:
            if not exact.all():
                raise CheckpointError(
                    "its biases are not those of symmetric codes, which config.json says it has"
                )
        elif exact.all():
            zero_point = (zero - half).astype(np.int8)
        return replace(q, zero_point=zero_point, bias=bias)

    @staticmethod
    def place_of(name: str, model_type: str) -> tuple[str, int] | None:
        """The stack that mlx-lm has the tensor or module of an expert in, and its place there.

        None for what is none, and for models whose experts are not in a ``switch_mlp``.
        """
        found = _EXPERT.fullmatch(name) if ".experts." in name else None
        if found is None or not Mlx.has_stacks(model_type):
            return None
        parent, number, leaf, suffix = found.groups()
        return f"{parent}switch_mlp.{_PROJECTIONS.get(leaf, leaf)}{suffix}", int(number)

    @staticmethod
    def has_stacks(model_type: str) -> bool:
        """Whether the experts of a model are written in stacks."""
        return model_type.removesuffix("_text") not in _ELSEWHERE

    def joined(self, module: str, suffix: str) -> str:
        """See ``Format.joined``."""
        return super().joined(_module(module), suffix)

    def original(self, module: str) -> str:
        """See ``Format.original``; a weight of a stack has its name already."""
        return module if stack_of(module) else super().original(module)

    def slices(
        self, module: str, tensors: dict[str, TensorInfo]
    ) -> Iterator[tuple[str, dict[str, TensorInfo]]]:
        """See ``Format.slices``."""
        if "weight" in tensors and len(tensors["weight"].shape) == 3:
            return self.experts_of(super().original(module), tensors)
        return super().slices(module, tensors)

    def shape_of(
        self, name: str, found: Mapping[str, TensorInfo], scheme: Scheme, read: Read
    ) -> tuple[int, int]:
        """See ``Format.shape_of``."""
        shape = found["weight"].shape
        return shape[0], shape[1] * 32 // scheme.bits

    def config(
        self, schemes: Mapping[Scheme, list[str]], ignore: list[str], config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The scheme of most modules, and by name those of the others; false for ``ignore``.

        Which are symmetric is said in ``quantization_config`` alone: mlx-lm does not look at it,
        and calls ``to_quantized`` with every key of a module in ``quantization``.
        """
        most, *others = sorted(schemes, key=lambda scheme: -len(schemes[scheme]))
        entries: list[dict[str, Any]] = []
        for marked in (False, True):
            entry = _entry(most, marked)
            for scheme in others:
                entry |= {module: _entry(scheme, marked) for module in schemes[scheme]}
            entries.append(entry | dict.fromkeys(ignore, False))
        return {**config, "quantization": entries[0], "quantization_config": entries[1]}

    def reads(self, config: Mapping[str, Any]) -> bool:
        """See ``Format.reads``; other writers name a quant_method."""
        quantization, _ = _said(config)
        return "quant_method" not in quantization and {"bits", "group_size"} <= quantization.keys()

    def rules(self, config: Mapping[str, Any]) -> tuple[Rules, list[str]]:
        """See ``Format.rules``."""
        quantization, marked = _said(config)
        default = _scheme_of(quantization, marked)
        named: dict[str, Scheme | None] = {}
        for module, entry in quantization.items():
            if isinstance(entry, dict):
                named[module] = _scheme_of(entry, marked.get(module))
            elif entry is None or isinstance(entry, bool):
                named[module] = default if entry else None
        ignore = [module for module, scheme in named.items() if scheme is None]
        return (lambda module: named.get(_module(module), default)), ignore


@cache
def _layout(rows: int, cols: int, dtype: str, scheme: Scheme) -> Layout:
    shape = scheme.scale_shape(rows, cols)
    packing = Packing("words", scheme.bits)
    tag = "U8"
    if scheme.element != "int":
        packing = Packing("nibbles", 4) if scheme.element == "e2m1" else BYTES
    else:
        tag = scale_tag(scheme, dtype)
    words = packing.row_bytes(cols) // 4
    entries = [
        rows_entry("weight", "codes", "U32", (rows, words), 1),
        rows_entry("scales", "scale", tag, shape, 1),
    ]
    if scheme.element == "int":
        entries.append(rows_entry("biases", "bias", tag, shape, 1, direct=False))
    return make_layout(rows, cols, dtype, entries, scheme.block_of(rows, cols), packing)


def _module(name: str) -> str:
    """The module of a weight of a stack; any other is one already."""
    stack = stack_of(name)
    return stack.removesuffix(".weight") if stack else name


def _bias(zero: Any, scale: Array) -> Array:
    """``-zero * scale`` rounded to the dtype of the scale; ``zero`` f32, of an unsigned code."""
    with np.errstate(over="ignore"):
        bias: Array = (np.float32(0) - zero * scale.astype(np.float32)).astype(scale.dtype)
    return bias


# --- config.json -----------------------------------------------------------------------


def _said(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """``quantization``, which mlx-lm looks at first, and ``quantization_config``."""
    beside = quantization_of(config)
    found = config.get("quantization")
    return (found if isinstance(found, dict) else beside), beside


def _entry(scheme: Scheme, marked: bool) -> dict[str, Any]:
    """What the config says of a scheme; ``marked`` where it is symmetric."""
    mode = _MODE_OF.get(scheme.name, "affine")
    mark = {"symmetric": True} if marked and mode == "affine" and scheme.symmetric else {}
    return {"group_size": scheme.block[1], "bits": scheme.bits, "mode": mode, **mark}


def _scheme_of(entry: Mapping[str, Any], marked: Any) -> Scheme:
    """The scheme of an entry of the config, and what ``quantization_config`` has in its place.

    Raises CheckpointError for one that is not known here.
    """
    mode = str(entry.get("mode", "affine"))
    preset, bits, group = _MODES.get(mode, ("", 4, 64))
    bits, group = entry.get("bits") or bits, entry.get("group_size") or group
    if mode == "affine" and bits in BITS and group in GROUPS:
        return integer(bits, group, isinstance(marked, dict) and marked.get("symmetric") is True)
    if (preset, bits, group) == _MODES.get(mode):
        return replace(SCHEMES[preset], two_level=False)
    raise CheckpointError(
        f"config.json: the mode {mode!r} of mlx with {bits!r} bits and groups of {group!r} is not "
        "known here."
    )
