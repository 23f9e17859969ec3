"""GPTQ: what AutoGPTQ wrote and vLLM, gptqmodel and transformers load; codes without data here.

Codes and zero points lie in 32-bit words of the transposed weight. Version 1 stores zero
points minus one, version 2 as they are (gptqmodel, ``convert_gptq_v1_to_v2_format_module``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from streamq.errors import CheckpointError, PlanError
from streamq.families import BAD_REGEX
from streamq.schemes import ALL, Quantized, Scheme
from streamq.tensors import TensorInfo

from .base import Array, Format, Read, Rules, integer, quantization_of
from .layout import Entry, Layout, Role, columns_entry, make_layout

#: What gptqmodel's kernel for any device takes (TorchLinear.SUPPORTS_GROUP_SIZE).
GROUPS = (ALL, 16, 32, 64, 128, 256, 512, 1024)

_VERSIONS = ("gptq", "gptq_v2")


@dataclass(frozen=True, slots=True)
class ActOrder(Scheme):
    """A scheme whose groups of ``group_size`` columns lie anywhere: ``g_idx`` says where.

    Unpacked, each column has a scale of its own, so that ``block`` is a single column, and
    no format can hold the codes but their own.
    """

    group_size: int = 128


class Gptq(Format):
    """GPTQ checkpoints of one version; b bits, groups of g columns.

    qweight int32 ``[in * b / 32, out]``, packed along ``in``; qzeros int32 ``[in / g, out * b
    / 32]``, packed along ``out``; scales f16 ``[in / g, out]``; g_idx int32 ``[in]``, the
    group of each column.
    """

    method = "gptq"
    code_suffixes = ("qweight",)
    other_suffixes = ("qzeros", "scales", "g_idx")
    scale_suffix = "scales"
    reads_constant = True

    def __init__(self, version: int) -> None:
        self.version = version
        self.name = _VERSIONS[version - 1]
        self.presets = ("W4A16", "W8A16")
        self.loaders = "vLLM, gptqmodel, transformers"
        if version == 2:
            # Version 1 would borrow from the neighbour where a zero point is 0.
            self.presets += ("W4A16_ASYM", "W8A16_ASYM")
            self.loaders = "gptqmodel, transformers; vLLM if symmetric"

    def concrete(self, scheme: Scheme) -> Scheme:
        """See ``Format.concrete``."""
        scheme = super().concrete(scheme)
        if scheme.block[1] not in GROUPS:
            sizes = ", ".join(map(str, GROUPS[1:]))
            raise PlanError(
                f"the format {self.name} needs a group size of {sizes}, or -1 for whole rows, "
                f"got {scheme.block[1]}."
            )
        return replace(scheme, scale="f16")

    def layout(
        self, rows: int, cols: int, dtype: str, scheme: Scheme, input_scale: float = 1.0
    ) -> Layout:
        """See ``Format.layout``."""
        per = 32 // scheme.bits
        for n, axis in ((rows, "rows"), (cols, "columns")):
            if n % per:
                raise PlanError(f"{n} {axis} are no multiple of {per}, which {self.name} needs")
        return _layout(rows, cols, dtype, scheme)

    def pack(self, role: Role, q: Quantized, layout: Layout, scheme: Scheme) -> Array:
        """See ``Format.pack``."""
        from streamq.kernels.cpu.packing import pack_columns, pack_rows_transposed

        if role == "scale":
            return np.ascontiguousarray(q.scale.T)
        half = 1 << (scheme.bits - 1)
        if role == "codes":
            return pack_rows_transposed(q.codes, scheme.bits, half).view("<i4")
        zero = np.zeros(q.scale.shape, np.int8) if q.zero_point is None else q.zero_point
        words = pack_columns(zero, scheme.bits, half)
        return (words - self._less(scheme)).view("<i4")

    def unpack(self, arrays: Mapping[Role, Array], layout: Layout, scheme: Scheme) -> Quantized:
        """See ``Format.unpack``. Raises CheckpointError for a g_idx or zeros of another scheme."""
        from streamq.kernels.cpu.packing import unpack_columns, unpack_rows_transposed

        half = 1 << (scheme.bits - 1)
        codes = unpack_rows_transposed(arrays["codes"].view("<u4"), scheme.bits, half)
        scale = np.ascontiguousarray(arrays["scale"].T)
        words = arrays["zero_point"].view("<u4") + self._less(scheme)
        zero = None
        if not scheme.symmetric:
            zero = unpack_columns(words, scheme.bits, half)
        elif (words != half * _ones(scheme.bits)).any():
            raise CheckpointError(f"qzeros of a symmetric checkpoint stand for {half} everywhere.")
        order = arrays.get("constant")
        if isinstance(scheme, ActOrder):
            assert order is not None
            if order.min() < 0 or order.max() >= scale.shape[1]:
                raise CheckpointError(f"g_idx must name one of {scale.shape[1]} groups.")
            zero = None if zero is None else zero[:, order]
            return Quantized(codes, scale[:, order], zero)
        if order is not None and order.tobytes() != layout.entry("constant").value:
            raise CheckpointError("g_idx is not that of groups in order, as desc_act false says.")
        return Quantized(codes, scale, zero)

    def _less(self, scheme: Scheme) -> np.uint32:
        """What version 1 takes from a word of zero points: 1 of each, borrows cross them."""
        return _ones(scheme.bits) if self.version == 1 else np.uint32(0)

    def shape_of(
        self, name: str, found: Mapping[str, TensorInfo], scheme: Scheme, read: Read
    ) -> tuple[int, int]:
        """See ``Format.shape_of``."""
        words, rows = found["qweight"].shape
        return rows, words * 32 // scheme.bits

    def config(
        self, schemes: Mapping[Scheme, list[str]], ignore: list[str], config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What is left out is said twice, for gptqmodel (dynamic) and transformers.

        vLLM reads both, and the dtypes of the tensors where neither is there. ``dtype`` is
        float16, as vLLM holds the scales in the dtype it runs in.
        """
        ((scheme, modules),) = schemes.items()
        quantization: dict[str, Any] = {
            "quant_method": self.method,
            "checkpoint_format": self.name,
            "bits": scheme.bits,
            "group_size": scheme.block[1],
            "sym": scheme.symmetric,
            "desc_act": False,
            "lm_head": "lm_head" in modules,
            "pack_dtype": "int32",
        }
        if left := left_out(ignore):
            quantization["dynamic"] = left
            quantization["modules_in_block_to_quantize"] = [_in_block(modules, ignore)]
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        return {**config, key: "float16", "quantization_config": quantization}

    def reads(self, config: Mapping[str, Any]) -> bool:
        """See ``Format.reads``; version 1 refuses in ``rules`` what neither version is."""
        version = _version(quantization_of(config))
        mine = version if version in _VERSIONS else "gptq"
        return super().reads(config) and mine == self.name

    def rules(self, config: Mapping[str, Any]) -> tuple[Rules, list[str]]:
        """See ``Format.rules``; ``dynamic`` by its first match, as gptqmodel and vLLM look."""
        quantization = quantization_of(config)
        if _version(quantization) not in _VERSIONS:
            raise CheckpointError(
                f"config.json: GPTQ of checkpoint_format {_version(quantization)!r} is not known; "
                "gptq and gptq_v2 are."
            )
        _scheme_of(quantization)
        only = _flat(quantization.get("modules_in_block_to_quantize"))
        overrides = _overrides(quantization.get("dynamic"))

        def scheme_of(module: str) -> Scheme | None:
            if module.rpartition(".")[2] == "lm_head" and not quantization.get("lm_head"):
                return None
            more = next((more for regex, more in overrides if regex.match(module)), {})
            if more is None or (only and _LAYER.search(module) and not _named(module, only)):
                return None
            return _scheme_of({**quantization, **more})

        return scheme_of, []


@cache
def _layout(rows: int, cols: int, dtype: str, scheme: Scheme) -> Layout:
    per = 32 // scheme.bits
    group = scheme.group_size if isinstance(scheme, ActOrder) else scheme.block_of(rows, cols)[1]
    groups = -(-cols // group)
    order = (np.arange(cols, dtype="<i4") // group).astype("<i4").tobytes()
    entries = [
        columns_entry("qweight", "codes", "I32", (cols // per, rows), 1),
        columns_entry("scales", "scale", "F16", (groups, rows), 1),
        columns_entry("qzeros", "zero_point", "I32", (groups, rows // per), per),
        Entry("g_idx", "constant", "I32", (cols,), 4 * cols, value=order),
    ]
    return make_layout(rows, cols, dtype, entries, scheme.block_of(rows, cols))


def _ones(bits: int) -> np.uint32:
    """A word whose codes are all 1."""
    return np.uint32(0xFFFFFFFF // ((1 << bits) - 1))


# --- config.json -----------------------------------------------------------------------

#: In the name of a module that lies in one of many layers.
_LAYER = re.compile(r"\.\d+\.")


def left_out(ignore: list[str]) -> dict[str, dict[str, Any]]:
    """``dynamic`` for modules in layers and projections; gptqmodel leaves others alone.

    It reads no other key that names them, for AWQ too, and loads weights wrong without a word.
    """
    left = (name for name in ignore if _LAYER.search(name) or name.endswith("_proj"))
    return {f"-:^{re.escape(name)}$": {} for name in left}


def _in_block(modules: list[str], left: list[str]) -> list[str]:
    """Names behind the number of the layer, or whole ones where those would mean too much.

    transformers asks whether a module ends with one of them, vLLM whether it contains one.
    """
    short = dict.fromkeys(_LAYER.split(name, maxsplit=1)[-1] for name in modules)
    return list(modules if any(_named(name, list(short)) for name in left) else short)


def _named(module: str, names: list[str]) -> bool:
    return any(name in module for name in names)


def _flat(names: Any) -> list[str]:
    """A list of names, or of lists of them."""
    lists = [n if isinstance(n, list) else [n] for n in names] if isinstance(names, list) else []
    flat = [name for part in lists for name in part]
    if (names and not lists) or not all(isinstance(name, str) for name in flat):
        raise CheckpointError(
            "config.json: modules_in_block_to_quantize of quantization_config must be lists of "
            "names."
        )
    return flat


def _overrides(dynamic: Any) -> list[tuple[re.Pattern[str], dict[str, Any] | None]]:
    """Regexes that modules start with, and what they have of their own; None: unquantized."""
    if not isinstance(dynamic or {}, dict):
        raise CheckpointError("config.json: dynamic of quantization_config must be an object.")
    found: list[tuple[re.Pattern[str], dict[str, Any] | None]] = []
    for pattern, more in (dynamic or {}).items():
        left = pattern.startswith("-:")
        raw = pattern[2:] if pattern.startswith(("-:", "+:")) else pattern
        try:
            regex = re.compile(raw)
        except BAD_REGEX as e:
            raise CheckpointError(
                f"config.json: the pattern {pattern!r} of dynamic: {e}."
            ) from None
        found.append((regex, None if left else (more if isinstance(more, dict) else {})))
    return found


def _scheme_of(quantization: Mapping[str, Any]) -> Scheme:
    """The scheme of a module. Raises CheckpointError for one that is not known here."""
    bits, group = quantization.get("bits", 4), quantization.get("group_size", 128)
    if bits not in (2, 4, 8):
        raise CheckpointError(f"config.json: GPTQ of {bits!r} bits is not read; of 2, 4, 8 it is.")
    if not isinstance(group, int) or (not 1 <= group < 1 << 31 and group != ALL):
        raise CheckpointError(f"config.json: GPTQ of group_size {group!r} is not known.")
    scheme = replace(integer(bits, group, bool(quantization.get("sym", True))), scale="f16")
    if not quantization.get("desc_act") or group == ALL:
        return scheme
    return ActOrder(
        f"{scheme.name} (act-order)", "int", bits, (1, 1), "f16", scheme.symmetric,
        group_size=group,
    )  # fmt: skip


def _version(quantization: Mapping[str, Any]) -> str:
    """``checkpoint_format``; newer gptqmodel says ``format`` as well."""
    found = quantization.get("checkpoint_format") or quantization.get("format") or "gptq"
    return str(found).lower()
