"""compressed-tensors: what vLLM, SGLang and transformers load.

Names and packings are those of compressed-tensors 0.19; the config uses only keys that
0.17 knows as well, because its models forbid others and vLLM 0.33 pins it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from itertools import chain
from math import gcd
from typing import Any

import numpy as np

from streamq.errors import CheckpointError
from streamq.families import BAD_REGEX
from streamq.schemes import ALL, SCHEMES, Activation, Packing, Quantized, Scheme
from streamq.tensors import TensorInfo

from .base import (
    Array,
    Format,
    Read,
    Rules,
    names_of,
    quantization_of,
    scale_tag,
)
from .layout import Entry, Layout, Role, make_layout, rows_entry
from .matching import with_head
from .targets import ignored_by, is_expert, is_no_linear, targets_of

VERSION = "0.17.0"

_TYPES = {"int": "int", "e4m3": "float", "e2m1": "float"}


class CompressedTensors(Format):
    """Integers packed into words, FP8, MX and NVFP4, with a scale in the weight's dtype."""

    name = method = "compressed-tensors"
    loaders = "vLLM, SGLang, transformers"
    presets = tuple(SCHEMES)
    code_suffixes = ("weight_packed", "weight")
    other_suffixes = ("weight_scale", "weight_zero_point", "weight_global_scale",
                      "input_global_scale", "weight_shape", "weight_g_idx")  # fmt: skip
    mixes = True

    def layout(
        self, rows: int, cols: int, dtype: str, scheme: Scheme, input_scale: float = 1.0
    ) -> Layout:
        """See ``Format.layout``."""
        return _layout(rows, cols, dtype, scheme, input_scale)

    def pack(self, role: Role, q: Quantized, layout: Layout, scheme: Scheme) -> Array:
        """See ``Format.pack``."""
        if role == "zero_point":
            assert q.zero_point is not None
            return pack_zero_point(q.zero_point, scheme.bits)
        return super().pack(role, q, layout, scheme)

    def unpack(self, arrays: Mapping[Role, Array], layout: Layout, scheme: Scheme) -> Quantized:
        """See ``Format.unpack``."""
        if scheme.symmetric:
            return super().unpack(arrays, layout, scheme)
        words = np.ascontiguousarray(arrays["zero_point"].T).view("<u4")
        zeros = _unpack_words(words, scheme.bits, len(arrays["scale"]))
        zero_point = np.ascontiguousarray(zeros.T)
        return super().unpack({**arrays, "zero_point": zero_point}, layout, scheme)

    def shape_of(
        self, name: str, found: Mapping[str, TensorInfo], scheme: Scheme, read: Read
    ) -> tuple[int, int]:
        """See ``Format.shape_of``."""
        if "weight_packed" not in found:
            rows, cols = found["weight"].shape
            return rows, cols
        rows, width = found["weight_packed"].shape
        if scheme.element == "e2m1":
            return rows, 2 * width
        shape = found.get("weight_shape")
        if shape is None or shape.dtype not in ("I64", "I32") or shape.shape != (2,):
            odd = f"{shape.dtype} {list(shape.shape)}" if shape else "absent"
            raise CheckpointError(f"{name + '.weight_shape'!r} is {odd}, not I64 [2].")
        said = read(shape).tolist()
        if said[0] != rows or said[1] < 1:
            raise CheckpointError(
                f"{name!r}: weight_shape says {said}, the codes have {rows} rows."
            )
        return said[0], said[1]

    def as_found(self, layout: Layout, found: Mapping[str, TensorInfo]) -> Layout:
        """See ``Format.as_found``: Kimi's checkpoints have their weight_shape in I32."""
        shape = found.get("weight_shape")
        if shape is None or shape.dtype != "I32":
            return layout
        entries = [e._replace(dtype="I32", size=8) if e.suffix == "weight_shape" else e
                   for e in layout.entries]  # fmt: skip
        return layout._replace(entries=tuple(entries))

    def config(
        self, schemes: Mapping[Scheme, list[str]], ignore: list[str], config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """A group for each distinct spelling; a single one has all Linears but ``ignore``."""
        alike: dict[str, tuple[Scheme, list[str]]] = {}
        for scheme, modules in schemes.items():
            alike.setdefault(repr(_group(scheme, [])), (scheme, []))[1].extend(modules)
        # transformers takes the first group whose regexes say "experts" for those it fuses.
        found = list(alike.values())
        if len(found) > 1:
            found.sort(key=lambda group: not any(map(is_expert, group[1])))
        names = [modules for _, modules in found]
        alone = [["Linear", *sorted(filter(is_no_linear, names[0]))]] if len(found) == 1 else None
        targets = alone or targets_of(names, ignore)
        formats = {format_name(scheme) for scheme in schemes}
        quantization = {
            "config_groups": {
                f"group_{i}": _group(scheme, t)
                for i, ((scheme, _), t) in enumerate(zip(found, targets, strict=True))
            },
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "global_compression_ratio": None,
            "ignore": ignored_by(names, with_head(ignore, chain(*names))),
            "kv_cache_scheme": None,
            "quant_method": self.method,
            "quantization_status": "compressed",
            "transform_config": {},
            "version": VERSION,
        }
        return {**config, "quantization_config": quantization}

    def rules(self, config: Mapping[str, Any]) -> tuple[Rules, list[str]]:
        """See ``Format.rules``; targets as transformers and vLLM match them."""
        quantization = quantization_of(config)
        ignore = names_of(quantization, "ignore")
        groups = quantization.get("config_groups")
        groups = list(groups.values()) if isinstance(groups, dict) else []
        if not groups or not all(isinstance(g, dict) for g in groups):
            raise CheckpointError("config.json: quantization_config has no config_groups.")
        if quantization.get("transform_config"):
            raise CheckpointError(
                "config.json: weights that are rotated as transform_config says are not read."
            )
        tests = [(_matcher(names_of(g, "targets")), _scheme_of(g)) for g in groups]
        ignored = _matcher(ignore)

        def scheme_of(module: str) -> Scheme | None:
            if ignored(module):
                return None
            return next((scheme for test, scheme in tests if test(module)), None)

        return scheme_of, ignore


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
def _layout(rows: int, cols: int, dtype: str, scheme: Scheme, input_scale: float) -> Layout:
    block = scheme.block_of(rows, cols)
    shape = scheme.scale_shape(rows, cols)
    scale = rows_entry("weight_scale", "scale", scale_tag(scheme, dtype), shape, block[0])
    if scheme.element == "e2m1":
        packing = Packing("nibbles", 4)
        entries = [rows_entry("weight_packed", "codes", "U8", (rows, cols // 2), 1), scale]
        if scheme.two_level:
            entries.append(Entry("weight_global_scale", "global_scale", "F32", (1,), 4))
        if scheme.activation is not None and scheme.activation.local:
            value = np.array([input_scale], "<f4").tobytes()
            entries.append(Entry("input_global_scale", "constant", "F32", (1,), 4, value=value))
    elif scheme.element == "e4m3" or _is_plain_int8(scheme):
        packing = Packing("bytes")
        tag = "I8" if scheme.element == "int" else "F8_E4M3"
        entries = [rows_entry("weight", "codes", tag, (rows, cols), 1), scale]
    else:
        packing = Packing("words", scheme.bits)
        words = (rows, packing.row_bytes(cols) // 4)
        entries = [rows_entry("weight_packed", "codes", "I32", words, 1), scale]
        if not scheme.symmetric:
            entries.append(_zero_point_entry(rows, shape[1], scheme.bits))
        value = np.array([rows, cols], "<i8").tobytes()
        entries.append(Entry("weight_shape", "constant", "I64", (2,), 16, value=value))
    return make_layout(rows, cols, dtype, entries, block, packing)


def _zero_point_entry(rows: int, groups: int, bits: int) -> Entry:
    """Packed along the rows: 32 / gcd(bits, 32) of them fill whole words."""
    step = 32 // gcd(bits, 32)
    words = -(-rows * bits // 32)
    nbytes = step * bits // 8 * groups
    return Entry("weight_zero_point", "zero_point", "I32", (words, groups), words * groups * 4,
                 step, nbytes)  # fmt: skip


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


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
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
    return {
        "targets": targets,
        "format": format_name(scheme),
        "weights": weights,
        "input_activations": _activation_args(scheme.activation),
        "output_activations": None,
    }


def _matcher(patterns: list[str]) -> Any:
    """Whether a module is named: exactly, by a ``re:`` regex from its start, or as a Linear."""
    exact = {p for p in patterns if not p.startswith("re:")}
    try:
        regexes = [re.compile(p[3:]) for p in patterns if p.startswith("re:")]
    except BAD_REGEX as e:
        raise CheckpointError(f"config.json: a pattern of quantization_config: {e}.") from None
    every = "Linear" in exact
    return lambda name: every or name in exact or any(r.match(name) for r in regexes)


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


def _scheme_of(group: dict[str, Any]) -> Scheme:
    """The scheme of a config group. Raises CheckpointError for one that is not known here."""
    wanted = _essentials(group)
    for scheme in SCHEMES.values():
        size = (wanted["weights"] or {}).get("group_size")
        grouped = scheme.element == "int" and scheme.block[1] != ALL
        if grouped and isinstance(size, int) and size > 0:
            scheme = replace(scheme, block=(1, size))
        elif grouped and (wanted["weights"] or {}).get("strategy") == "channel":
            scheme = replace(scheme, block=(1, ALL))
        if _essentials(_group(scheme, [])) == wanted:
            return scheme
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
