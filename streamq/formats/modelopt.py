"""ModelOpt: what TensorRT-LLM, vLLM and SGLang load from NVIDIA's Model Optimizer.

The quantization is said twice: in config.json, which vLLM and SGLang read, and in
hf_quant_config.json, which TensorRT-LLM reads. Names and shapes are those that vLLM 0.32
registers for each ``quant_algo``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from fnmatch import translate
from functools import cache
from re import compile as compile_regex
from typing import Any

import ml_dtypes
import numpy as np

from streamq.errors import CheckpointError, PlanError
from streamq.kernels.reference import NVFP4_RANGE
from streamq.schemes import SCHEMES, Packing, Scheme
from streamq.tensors import TensorInfo

from .base import Array, Format, Read, Rules, names_of, one_scheme, quantization_of, scale_tag
from .layout import Entry, Layout, make_layout, rows_entry
from .matching import clashing, with_head

#: The version whose files these are, as ``producer`` says it.
VERSION = "0.39.0"

#: ``quant_algo`` by preset. TensorRT-LLM knows 128x128 blocks in lower case only, vLLM in any.
ALGOS = {
    "NVFP4": "NVFP4",
    "NVFP4A16": "W4A16_NVFP4",
    "FP8_DYNAMIC": "FP8_PER_CHANNEL_PER_TOKEN",
    "FP8_BLOCK": "fp8_pb_wo",
    "MXFP8": "MXFP8",
}
_PRESETS = {algo.upper(): name for name, algo in ALGOS.items()} | {"FP8_BLOCK_SCALES": "FP8_BLOCK"}

_F32 = np.float32
_SHORT = (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))


class ModelOpt(Format):
    """NVFP4, MXFP8, and FP8 by row or by block, with f32 multipliers."""

    name = method = "modelopt"
    loaders = "TensorRT-LLM, vLLM, SGLang"
    presets = tuple(ALGOS)
    code_suffixes = ("weight",)
    other_suffixes = ("weight_scale", "weight_scale_2", "input_scale")

    def concrete(self, scheme: Scheme) -> Scheme:
        """See ``Format.concrete``. FP8 scales are f32, whatever the weight's dtype."""
        scheme = super().concrete(scheme)
        return replace(scheme, scale="f32") if scheme.scale == "weight" else scheme

    def layout(
        self, rows: int, cols: int, dtype: str, scheme: Scheme, input_scale: float = 1.0
    ) -> Layout:
        """See ``Format.layout``.

        ``input_scale`` is a divisor, as compressed-tensors stores it; ModelOpt's tensor of
        that name is what vLLM inverts before it quantizes, so it gets the reciprocal.
        """
        if scheme.block[0] == 128 and cols % 128:
            raise PlanError(f"{cols} columns, and FP8_PB_WO needs a multiple of 128")
        return _layout(rows, cols, dtype, scheme, input_scale)

    def pack_global(self, g: Array, dtype: np.dtype[Any]) -> Array:
        """``weight_scale_2``, a multiplier, f32 ``[n]``, for divisors ``g``.

        ModelOpt computes amax / 2688 and compressed-tensors 2688 / amax, and in f32 the
        reciprocal of one is not always the other. So the bf16 or f16 amax is recovered that
        gives just this ``g``; one that is bf16 or f16 itself, as llm-compressor writes it, is
        inverted, and so is any other. ``unpack_global`` gives back every ``g`` of a bf16 or f16
        amax, and every one that is bf16 or f16; 14% of the others come back one unit in the
        last place away.
        """
        return _counterpart(g, np.asarray(g, _F32), 0)

    def unpack_global(self, stored: Array) -> Array:
        """See ``Format.unpack_global``: the inverse of ``pack_global``."""
        w = np.asarray(stored, _F32).reshape(-1)
        with np.errstate(all="ignore"):
            return _counterpart(w, _F32(1) / w, 1)

    def shape_of(
        self, name: str, found: Mapping[str, TensorInfo], scheme: Scheme, read: Read
    ) -> tuple[int, int]:
        """See ``Format.shape_of``."""
        rows, width = found["weight"].shape
        return rows, 2 * width if scheme.element == "e2m1" else width

    def config(
        self, schemes: Mapping[Scheme, list[str]], ignore: list[str], config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See ``Format.config``.

        vLLM also leaves out what has an ignored name within its own, so a name that lies within
        a quantized one is written as a wildcard that matches nothing else: ``mlp.gat[e]``.
        """
        ((scheme, modules),) = schemes.items()
        ignored = with_head(ignore, modules)
        hidden = clashing(ignored, modules)
        size = scheme.block[1] if scheme.block[0] == 1 and scheme.block[1] > 0 else None
        quantization = {
            "config_groups": {"group_0": _group(scheme, size)},
            "ignore": [f"{n[:-1]}[{n[-1]}]" if n in hidden else n for n in ignored],
            "producer": {"name": "modelopt", "version": VERSION},
            "quant_algo": ALGOS[scheme.name],
            "quant_method": self.method,
            **({} if size is None else {"group_size": size}),
        }
        return {**config, "quantization_config": quantization}

    def files(self, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """hf_quant_config.json, the older place; vLLM demands the three keys for NVFP4."""
        q = config["quantization_config"]
        quantization = {
            "quant_algo": q["quant_algo"],
            "kv_cache_quant_algo": None,
            "group_size": q.get("group_size"),
            "exclude_modules": q["ignore"],
        }
        return {"hf_quant_config.json": {"producer": q["producer"], "quantization": quantization}}

    def reads(self, config: Mapping[str, Any]) -> bool:
        """See ``Format.reads``; vLLM's names for parts of it begin in the same way."""
        return str(quantization_of(config).get("quant_method")).startswith(self.method)

    def rules(self, config: Mapping[str, Any]) -> tuple[Rules, list[str]]:
        """See ``Format.rules``; both spellings, and one algorithm per layer in MIXED_PRECISION."""
        q = quantization_of(config)
        older = q.get("quantization")
        if isinstance(older, dict):
            q = {**older, "ignore": older.get("exclude_modules")}
        ignore = names_of(q, "ignore")
        algo = str(q.get("quant_algo")).upper()
        layers = q.get("quantized_layers")
        if algo == "MIXED_PRECISION" and isinstance(layers, dict):
            return _layer_rules(layers, self), ignore
        groups = q.get("config_groups")
        weights_only = isinstance(groups, dict) and groups and not any(
            isinstance(g, dict) and g.get("input_activations") for g in groups.values()
        )  # fmt: skip
        if algo == "NVFP4" and weights_only:  # vLLM takes it so, too
            algo = "W4A16_NVFP4"
        return _excluding(_scheme_of(algo, "config.json", self), ignore), ignore


def _counterpart(x: Array, g: Array, side: int) -> Array:
    """The other half of the likeliest pair of divisor and multiplier that has ``x`` on ``side``.

    ``g``: the divisor, or nearly so. Without such a pair it is 1 / x.
    """
    with np.errstate(all="ignore"):
        out = _F32(1) / x
        for pair in reversed(list(_pairs(g))):
            out = np.where((pair[side] == x) & (pair[1 - side] > 0), pair[1 - side], out)
    return out


def _pairs(g: Array) -> Iterator[tuple[Array, Array]]:
    """Divisors and multipliers, f32 ``[n]``, of weights whose divisor is nearly ``g``."""
    for dtype in _SHORT:
        amax = (NVFP4_RANGE / g).astype(dtype).astype(_F32)
        yield NVFP4_RANGE / amax, amax / NVFP4_RANGE
        short = g.astype(dtype).astype(_F32)
        yield short, _F32(1) / short


@cache
def _layout(rows: int, cols: int, dtype: str, scheme: Scheme, input_scale: float) -> Layout:
    block = scheme.block_of(rows, cols)
    blocks = scheme.scale_shape(rows, cols)
    shape: tuple[int, ...] = blocks
    if scheme.block[0] == 128:
        shape = (blocks[0], 1, blocks[1], 1)
    elif scheme.name == "FP8_DYNAMIC":
        shape = (rows,)
    scale = rows_entry("weight_scale", "scale", scale_tag(scheme, dtype), shape, block[0])
    if scheme.element != "e2m1":
        codes = rows_entry("weight", "codes", "F8_E4M3", (rows, cols), 1)
        return make_layout(rows, cols, dtype, [codes, scale], block)
    entries = [
        rows_entry("weight", "codes", "U8", (rows, cols // 2), 1),
        scale,
        Entry("weight_scale_2", "global_scale", "F32", (), 4),
    ]
    if scheme.activation is not None:
        value = (_F32(1) / _F32(input_scale)).tobytes()
        entries.append(Entry("input_scale", "constant", "F32", (), 4, value=value))
    return make_layout(rows, cols, dtype, entries, block, Packing("nibbles", 4))


# --- config.json -----------------------------------------------------------------------


def _group(scheme: Scheme, size: int | None) -> dict[str, Any]:
    """The config group, with the keys that ModelOpt gives it; no activations say weights only."""
    weights: dict[str, Any] = {"dynamic": False, "num_bits": scheme.bits, "type": "float"}
    if size is not None:
        weights["group_size"] = size
    elif scheme.block[0] == 128:
        weights |= {"strategy": "block", "block_structure": list(scheme.block)}
    else:
        weights["strategy"] = "channel"
    activations = None
    if (a := scheme.activation) is not None and scheme.block[0] != 128:
        activations = {"dynamic": not a.local, "num_bits": a.bits, "type": "float"}
        activations |= {"strategy": "token"} if size is None else {"group_size": size}
    return {"input_activations": activations, "targets": ["Linear"], "weights": weights}


def _scheme_of(algo: str, place: str, fmt: ModelOpt) -> Scheme:
    """The scheme of a ``quant_algo``. Raises CheckpointError for one that is not known."""
    if algo in _PRESETS:
        return fmt.concrete(SCHEMES[_PRESETS[algo]])
    static = ", which has one static scale for a whole tensor," if algo == "FP8" else ""
    raise CheckpointError(
        f"{place}: the ModelOpt quant_algo {algo!r}{static} is none that streamq reads: "
        f"{', '.join(_PRESETS)}."
    )


def _layer_rules(layers: Mapping[str, Any], fmt: ModelOpt) -> Rules:
    """Rules of MIXED_PRECISION; an algorithm that is not known matters where it is used."""

    def scheme_of(module: str) -> Scheme | None:
        layer = layers.get(module)
        if not isinstance(layer, dict):
            return None
        return _scheme_of(str(layer.get("quant_algo")).upper(), repr(module), fmt)

    return scheme_of


def _excluding(scheme: Scheme, ignore: list[str]) -> Rules:
    """Rules of one scheme; entries with ``*``, ``?`` or ``[`` are globs over whole names."""
    globs = [name for name in ignore if set("*?[") & set(name)]
    plain = one_scheme(scheme, [name for name in ignore if not set("*?[") & set(name)])
    wild = compile_regex("|".join(map(translate, globs)) or r"(?!)")
    return lambda module: None if wild.match(module) else plain(module)
