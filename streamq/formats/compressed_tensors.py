"""compressed-tensors: what vLLM, SGLang and transformers load.

Names and packings are those of compressed-tensors 0.19; the config uses only keys that
0.17 knows as well, because its models forbid others and vLLM 0.33 pins it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from math import gcd
from typing import Any

import numpy as np

from streamq.errors import CheckpointError
from streamq.schemes import ALL, SCHEMES, Activation, Packing, Quantized, Scheme
from streamq.tensors import DTYPES

from .layout import Entry, Layout, make_layout

NAME = "compressed-tensors"
VERSION = "0.17.0"

Array = np.ndarray[Any, Any]

_SCALE_DTYPES = {"e4m3": "F8_E4M3", "e8m0": "U8", "f32": "F32"}
_TYPES = {"int": "int", "e4m3": "float", "e2m1": "float"}


def format_name(scheme: Scheme) -> str:
    """The ``format`` of a config group."""
    if scheme.element == "e2m1":
        return "nvfp4-pack-quantized" if scheme.two_level else "mxfp4-pack-quantized"
    if scheme.element == "e4m3":
        return "mxfp8-quantized" if scheme.scale == "e8m0" else "float-quantized"
    return "int-quantized" if _is_plain_int8(scheme) else "pack-quantized"


def _is_plain_int8(scheme: Scheme) -> bool:
    return scheme.bits == 8 and scheme.block[1] == ALL and scheme.activation is not None


@cache
def layout(rows: int, cols: int, dtype: str, scheme: Scheme, input_scale: float = 1.0) -> Layout:
    """The tensors that a ``[rows, cols]`` weight of a header dtype becomes.

    ``input_scale``: the value of ``input_global_scale`` for schemes with a constant one.
    """
    block_rows, block_cols = scheme.block_of(rows, cols)
    tag = _SCALE_DTYPES.get(scheme.scale, dtype)
    shape = scheme.scale_shape(rows, cols)
    stride = shape[1] * DTYPES[tag].itemsize
    scale = Entry("weight_scale", "scale", tag, shape, shape[0] * stride, block_rows, stride)
    if scheme.element == "e2m1":
        packing = Packing("nibbles", 4)
        half = cols // 2
        codes = Entry("weight_packed", "codes", "U8", (rows, half), rows * half, 1, half)
        entries = [codes, scale]
        if scheme.two_level:
            entries.append(Entry("weight_global_scale", "global_scale", "F32", (1,), 4))
        if scheme.activation is not None and scheme.activation.local:
            value = np.array([input_scale], "<f4").tobytes()
            entries.append(Entry("input_global_scale", "constant", "F32", (1,), 4, value=value))
    elif scheme.element == "e4m3" or _is_plain_int8(scheme):
        packing = Packing("bytes")
        tag = "I8" if scheme.element == "int" else "F8_E4M3"
        entries = [Entry("weight", "codes", tag, (rows, cols), rows * cols, 1, cols), scale]
    else:
        packing = Packing("words", scheme.bits)
        width = packing.row_bytes(cols)
        words = (rows, width // 4)
        entries = [Entry("weight_packed", "codes", "I32", words, rows * width, 1, width), scale]
        if not scheme.symmetric:
            entries.append(_zero_point_entry(rows, shape[1], scheme.bits))
        value = np.array([rows, cols], "<i8").tobytes()
        entries.append(Entry("weight_shape", "constant", "I64", (2,), 16, value=value))
    return make_layout(rows, cols, dtype, entries, packing, (block_rows, block_cols))


def _zero_point_entry(rows: int, groups: int, bits: int) -> Entry:
    """Packed along the rows: 32 / gcd(bits, 32) of them fill whole words."""
    step = 32 // gcd(bits, 32)
    words = -(-rows * bits // 32)
    nbytes = step * bits // 8 * groups
    return Entry("weight_zero_point", "zero_point", "I32", (words, groups), words * groups * 4,
                 step, nbytes)  # fmt: skip


def pack(q: Quantized, scheme: Scheme) -> dict[str, Array]:
    """Arrays by role from codes that a kernel already packed as ``Layout.packing`` says.

    The rows of ``q`` may be a slab of the tensor that starts at a multiple of
    ``Layout.row_step``.
    """
    arrays = {"codes": q.codes, "scale": q.scale}
    if q.zero_point is not None:
        arrays["zero_point"] = pack_zero_point(q.zero_point, scheme.bits)
    return arrays


def unpack(arrays: Mapping[str, Array], scheme: Scheme, cols: int) -> Quantized:
    """Codes and scales from the arrays of rows, by role: the inverse of ``pack``.

    ``global_scale`` passes through. Codes come one per byte.
    """
    codes = arrays["codes"]
    rows = len(codes)
    packing = layout(rows, cols, "F32", scheme).packing
    if packing.kind == "nibbles":
        codes = np.stack([codes & 15, codes >> 4], axis=2).reshape(rows, cols)
    elif packing.kind == "words":
        codes = _unpack_words(codes.view("<u4"), scheme.bits, cols)
    zero_point = None
    if not scheme.symmetric:
        words = np.ascontiguousarray(arrays["zero_point"].T).view("<u4")
        zero_point = np.ascontiguousarray(_unpack_words(words, scheme.bits, rows).T)
    return Quantized(codes, arrays["scale"], zero_point, arrays.get("global_scale"))


def pack_zero_point(zero_point: Array, bits: int) -> Array:
    """int8 ``[rows, groups]`` to int32 ``[ceil(rows * bits / 32), groups]``, offset binary."""
    rows, groups = zero_point.shape
    value = (zero_point.T.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    unpacked = np.unpackbits(value[:, :, None], axis=2, count=bits, bitorder="little")
    out = np.zeros((groups, -(-rows * bits // 32) * 4), np.uint8)
    packed = np.packbits(unpacked.reshape(groups, rows * bits), axis=1, bitorder="little")
    out[:, : packed.shape[1]] = packed
    return np.ascontiguousarray(out.view("<i4").T)


def _unpack_words(words: Array, bits: int, count: int) -> Array:
    """Signed codes of ``bits`` bits from little-endian words ``[rows, words]``."""
    raw = words.view(np.uint8)
    unpacked = np.unpackbits(raw, axis=1, count=count * bits, bitorder="little")
    value = np.packbits(unpacked.reshape(len(raw), count, bits), axis=2, bitorder="little")
    return (value[:, :, 0].astype(np.int16) - (1 << (bits - 1))).astype(np.int8)


# --- config.json -----------------------------------------------------------------------


def config(scheme: Scheme, ignore: list[str]) -> dict[str, Any]:
    """``quantization_config``: one group, all Linear modules but the names in ``ignore``."""
    br, bc = scheme.block
    strategy = "tensor_group" if scheme.two_level else "group"
    if bc == ALL:
        strategy = "tensor" if br == ALL else "channel"
    elif br != 1:
        strategy = "block"
    weights = _args(
        scheme.bits, _TYPES[scheme.element], strategy, scheme.symmetric, False,
        group_size=bc if strategy in ("group", "tensor_group") else None,
        block_structure=[br, bc] if strategy == "block" else None,
        scale_dtype={"e4m3": "torch.float8_e4m3fn", "e8m0": "torch.uint8"}.get(scheme.scale),
        zp_dtype=None if scheme.symmetric else "torch.int8",
    )  # fmt: skip
    group = {
        "targets": ["Linear"],
        "format": format_name(scheme),
        "weights": weights,
        "input_activations": _activation_args(scheme.activation),
        "output_activations": None,
    }
    return {
        "config_groups": {"group_0": group},
        "format": format_name(scheme),
        "global_compression_ratio": None,
        "ignore": ignore,
        "kv_cache_scheme": None,
        "quant_method": NAME,
        "quantization_status": "compressed",
        "transform_config": {},
        "version": VERSION,
    }


def _activation_args(a: Activation | None) -> dict[str, Any] | None:
    if a is None:
        return None
    scale_dtype = None
    if a.local:
        scale_dtype = "torch.float8_e4m3fn"
    elif a.group_size == 32:
        scale_dtype = "torch.uint8"
    return _args(
        a.bits, _TYPES[a.element], a.strategy, True, "local" if a.local else True,
        group_size=a.group_size, scale_dtype=scale_dtype,
    )  # fmt: skip


def _args(
    bits: int, type_: str, strategy: str, symmetric: bool, dynamic: bool | str, *,
    group_size: int | None = None, block_structure: list[int] | None = None,
    scale_dtype: str | None = None, zp_dtype: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    return {
        "actorder": None,
        "block_structure": block_structure,
        "dynamic": dynamic,
        "group_size": group_size,
        "num_bits": bits,
        "observer": None,
        "observer_kwargs": {},
        "scale_dtype": scale_dtype,
        "strategy": strategy,
        "symmetric": symmetric,
        "type": type_,
        "zp_dtype": zp_dtype,
    }


def read_config(quantization: Any) -> tuple[Scheme, list[str]]:
    """The scheme and the ignore list of a ``quantization_config`` as ``config`` writes it.

    Raises CheckpointError for one with several groups or with a scheme not known here.
    """
    quantization = quantization if isinstance(quantization, dict) else {}
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise CheckpointError("config.json: quantization_config must have one config group.")
    ignore = quantization.get("ignore") or []
    if not isinstance(ignore, list) or not all(isinstance(name, str) for name in ignore):
        raise CheckpointError("config.json: ignore of quantization_config must be a list of names.")
    (group,) = groups.values()
    wanted = _essentials(group)
    for scheme in SCHEMES.values():
        size = (wanted["weights"] or {}).get("group_size")
        grouped = scheme.element == "int" and scheme.block[1] != ALL
        if grouped and isinstance(size, int) and size > 0:
            scheme = replace(scheme, block=(1, size))
        if _essentials(config(scheme, [])["config_groups"]["group_0"]) == wanted:
            return scheme, ignore
    raise CheckpointError(
        "config.json: the scheme of quantization_config is none that streamq knows: "
        f"{wanted['weights']}."
    )


_ESSENTIAL = (
    "num_bits", "type", "strategy", "group_size", "block_structure", "symmetric", "dynamic",
)  # fmt: skip


def _essentials(group: Any) -> dict[str, Any]:
    """What decides the numbers; observers and dtypes are spelled differently by other writers."""
    group = group if isinstance(group, dict) else {}

    def pick(args: Any) -> dict[str, Any] | None:
        return {k: args.get(k) for k in _ESSENTIAL} if isinstance(args, dict) else None

    return {k: pick(group.get(k)) for k in ("weights", "input_activations")}
