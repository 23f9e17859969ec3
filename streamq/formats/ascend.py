"""Ascend: what msmodelslim writes and vllm-ascend and MindIE load.

Weights are plain ``[out, in]``; devices rearrange them on loading. config.json says nothing, the
type of each tensor is in ``quant_model_description.json`` (``ascend_description``). Names, dtypes
and shapes are those of msmodelslim's AscendV1Saver (commit 3de0a3c, ``ascendv1.py``) and of the
parameters that vllm-ascend registers (commit 182b75e, ``quantization/methods``).

Offsets are always there and always zero: MindIE subtracts one from a code (``w4a16.py``:
``-weight_offset`` is the operator's offset), vllm-ascend adds it (``w8a16.py``:
``antiquant_offset=weight_offset``).
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from streamq.errors import CheckpointError, PlanError
from streamq.schemes import ALL, Quantized, Scheme, resolve
from streamq.tensors import FLOATS, TensorInfo

from .ascend_description import COMPRESSED, FILE, FLOAT, Description, parse
from .ascend_tensors import (
    layout_of,
    pairs_rows,
    refuse_other_sums,
    row_sum,
    signed,
    static_layout,
    with_dtypes,
)
from .base import Array, Format, Read, Rules, quantization_of
from .layout import Layout, Role
from .targets import is_expert

#: The type of each preset.
TYPES = {
    "W8A8": "W8A8_DYNAMIC", "W8A16": "W8A16", "W4A8": "W4A8_DYNAMIC", "W4A16": "W4A16",
    "MXFP8": "W8A8_MXFP8", "W4A8_MXFP": "W4A8_MXFP", "MXFP4": "W4A4_MXFP4",
}  # fmt: skip
_PRESETS = {type_: preset for preset, type_ in TYPES.items()}
#: Types with scales of the activations that only data can give: read, not made.
STATIC = ("W8A8", "W8A8_MIX", "W8A8S")
#: What the names of their schemes begin with: W8A8 is that of dynamic scales elsewhere.
_STATIC = "static "
#: Types whose weights are floats; W16A16S has zeros among them.
_FLOATS = (FLOAT, "W16A16S")

#: Parts that ``scale_bias`` has, for as many ranks at most to share the columns of a weight
#: (msmodelslim's ``process_scale`` with ``tp_num`` 16), and projections that ranks share so.
CHUNKS = 16
_BY_COLUMNS = ("down_proj", "o_proj", "w2")
_BY_ROWS = ("up_proj", "gate_proj", "q_proj", "k_proj", "v_proj", "w1", "w3")

_ELEMENTS: dict[str, Any] = {"BF16": "bf16", "F16": "f16", "F32": "f32"}


class Ascend(Format):
    """Symmetric integers by row, MXFP8 and MXFP4.

    ``expert``, ``chunks``: of one module, see ``of_module``.
    """

    name = method = "ascend"
    loaders = "vllm-ascend, MindIE"
    presets = tuple(TYPES)
    code_suffixes = ("weight",)
    other_suffixes = (
        "weight_scale", "weight_offset", "scale_bias", "weight_scale_second",
        "weight_offset_second", "deq_scale", "quant_bias", "input_scale", "input_offset",
    )  # fmt: skip
    mixes = True
    group_size = ALL
    told_in = FILE

    def __init__(self, *, expert: bool = False, chunks: int = 0) -> None:
        self._expert = expert
        self._chunks = chunks

    def takes(self, name: str, scheme: Scheme) -> bool:
        """See ``Format.takes``: vllm-ascend has W4A8_DYNAMIC for routed experts only."""
        return scheme.name != "W4A8" or is_expert(name)

    def of_module(self, module: str, suffixes: Container[str] = ()) -> Format:
        """See ``Format.of_module``: the sums of W4A8_DYNAMIC depend on the projection."""
        if "deq_scale" in suffixes:
            return _WITH_SCALE if "weight_scale" in suffixes else _WITHOUT_SCALE
        leaf = module.rpartition(".")[2]
        chunks = CHUNKS if leaf in _BY_COLUMNS else int(leaf in _BY_ROWS)
        return _of(is_expert(module), chunks)

    def concrete(self, scheme: Scheme) -> Scheme:
        """See ``Format.concrete``: scales are f32, and int8 has the range +-127."""
        scheme = super().concrete(scheme)
        if scheme.element != "int":
            return scheme
        if scheme.name in ("W8A16", "W4A8") and scheme.block != (1, ALL):
            raise PlanError(
                f"{TYPES[scheme.name]} of the format {self.name} has one scale for each row, not "
                f"groups of {scheme.block[1]}; vllm-ascend refuses groups: use --group-size -1."
            )
        return replace(scheme, scale="f32", narrow=scheme.bits == 8)

    def layout(
        self, rows: int, cols: int, dtype: str, scheme: Scheme, input_scale: float = 1.0
    ) -> Layout:
        """See ``Format.layout``.

        vllm-ascend takes E8M0 scales in pairs: of all experts, and of any W4A8_MXFP (``reshape(n,
        k // 2, 2)`` there, where other linear layers pad).
        """
        if scheme.name.startswith(_STATIC):
            return static_layout(rows, cols, dtype, self.scale_suffix)
        pairs = scheme.scale == "e8m0" and (self._expert or scheme.name == "W4A8_MXFP")
        if pairs and cols % 64:
            where = "experts" if self._expert else "W4A8_MXFP"
            raise PlanError(f"{cols} columns are no multiple of 64, as {where} need it")
        if scheme.bits == 4 and scheme.element == "int":
            self._refuse_unfit(rows, cols, scheme)
        return layout_of(rows, cols, dtype, scheme, self._chunks)

    def _refuse_unfit(self, rows: int, cols: int, scheme: Scheme) -> None:
        """Raise PlanError for codes that do not fill whole bytes, or sums of uneven parts.

        vllm-ascend has four bytes of W4A8_DYNAMIC in a word (``_pack_to_int32``): of down_proj, or
        of gate_proj and up_proj one behind the other.
        """
        if not pairs_rows(scheme):
            if cols % 2:
                raise PlanError(f"{cols} columns are odd, and a byte holds the codes of two")
            return
        if scheme.name != "W4A8":
            if rows % 2:
                raise PlanError(f"{rows} rows are odd, and a byte holds the codes of two")
            return
        if not self._chunks:
            names = ", ".join((*_BY_ROWS, *_BY_COLUMNS))
            raise PlanError(f"W4A8_DYNAMIC has sums of rows for projections called {names} only")
        step = 8 if self._chunks == CHUNKS else 4
        if rows % step:
            raise PlanError(f"{rows} rows are no multiple of {step}, which W4A8_DYNAMIC needs")
        if cols % self._chunks:
            raise PlanError(f"{cols} columns are no multiple of {CHUNKS}, the parts of scale_bias")

    def pack(self, role: Role, q: Quantized, layout: Layout, scheme: Scheme) -> Array:
        """See ``Format.pack``."""
        if role == "offset":
            return np.zeros(q.scale.shape, np.float32)
        if role == "row_sum":
            return row_sum(q, layout.entry(role).shape[1])
        if role == "codes" and scheme.element == "int" and scheme.bits == 4:
            if pairs_rows(scheme):
                codes = q.codes.view(np.uint8)
                return ((codes[0::2] & 15) | (codes[1::2] << 4)).view(np.int8)
            from streamq.kernels.cpu.packing import pack_nibbles

            return pack_nibbles(q.codes.view(np.uint8) & 15).view(np.int8)
        return super().pack(role, q, layout, scheme)

    def unpack(self, arrays: Mapping[Role, Array], layout: Layout, scheme: Scheme) -> Quantized:
        """See ``Format.unpack``.

        Raises CheckpointError for an offset that is not zero, and for sums of other codes.
        """
        if (offset := arrays.get("offset")) is not None and offset.any():
            raise CheckpointError(
                "weight_offset is not zero; asymmetric weights are not read, because loaders "
                "differ in its sign."
            )
        q = super().unpack(arrays, layout, scheme)
        if scheme.element == "int" and scheme.bits == 4:
            q = replace(q, codes=signed(q.codes, layout, scheme))
        if (sums := arrays.get("row_sum")) is not None:
            refuse_other_sums(sums, q)
        return q

    def shape_of(
        self, name: str, found: Mapping[str, TensorInfo], scheme: Scheme, read: Read
    ) -> tuple[int, int]:
        """See ``Format.shape_of``."""
        rows, width = found["weight"].shape
        if scheme.bits == 8:
            return rows, width
        in_rows = scheme.element == "int" and pairs_rows(scheme)
        return (2 * rows, width) if in_rows else (rows, 2 * width)

    def config(
        self, schemes: Mapping[Scheme, list[str]], ignore: list[str], config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See ``Format.config``: vllm-ascend wants no word of it here, given ``--quantization``."""
        return dict(config)

    def rules(self, config: Mapping[str, Any]) -> tuple[Rules, list[str]]:
        """See ``Format.rules``; a tensor without an entry counts as FLOAT."""
        said = description_of(config)
        for name, type_ in said.types.items():
            if type_ in COMPRESSED:
                raise CheckpointError(
                    f"{FILE}: {name!r} is {type_}, compressed for the engine of the 310P; bring it "
                    "back with streamq decompress first."
                )
        if isinstance(metadata := said.head.get("metadata"), dict) and "quarot" in metadata:
            raise CheckpointError(
                f"{FILE}: weights that are rotated as metadata.quarot says are not read."
            )
        known: dict[str, Scheme | None] = dict.fromkeys(_FLOATS)

        def scheme_of(module: str) -> Scheme | None:
            type_ = said.type_of(module) or FLOAT
            if type_ not in known:
                known[type_] = _scheme_of(type_, module, said)
            return known[type_]

        return scheme_of, []

    def as_stored(self, scheme: Scheme, found: Mapping[str, TensorInfo]) -> Scheme:
        """See ``Format.as_stored``: older checkpoints have scales of other dtypes, and groups."""
        scale = found[self.scale_suffix]
        if scheme.element != "int" or len(scale.shape) != 2:
            return scheme
        scheme = replace(scheme, scale=_ELEMENTS.get(scale.dtype, "f32"))
        groups = scale.shape[1]
        if groups < 2:
            return scheme
        width = found["weight"].shape[1]  # packed along the rows, if at all
        return replace(scheme, block=(1, max(1, width // groups)))

    def as_found(self, layout: Layout, found: Mapping[str, TensorInfo]) -> Layout:
        """See ``Format.as_found``: offsets may have any dtype of floats."""
        return with_dtypes(layout, found, {"offset": FLOATS})


class Static(Ascend):
    """Weights beside scales of the activations, which nothing else here can hold.

    ``deq_scale`` is the scale of a row times that of the inputs, ``quant_bias`` undoes their
    offset. W8A8S, and W8A8 of newer msmodelslim, have no scale of the row itself.
    """

    lost = "static scales of the activations"

    def __init__(self, scale_suffix: str) -> None:
        super().__init__()
        self.scale_suffix = scale_suffix

    def as_found(self, layout: Layout, found: Mapping[str, TensorInfo]) -> Layout:
        """See ``Format.as_found``: msmodelslim has had several dtypes for all of these."""
        layout = super().as_found(layout, found)
        return with_dtypes(layout, found, {
            "deq_scale": ("I64", "F32"), "input_scale": FLOATS, "input_offset": (*FLOATS, "I8"),
        })  # fmt: skip

    def unpadded(self, scale: Array, layout: Layout, scheme: Scheme) -> Array:
        """See ``Format.unpadded``: as the f32 whose bits an i64 holds, for models of f16."""
        return scale.astype(np.uint32).view(np.float32) if scale.dtype == np.int64 else scale

    def unpack(self, arrays: Mapping[Role, Array], layout: Layout, scheme: Scheme) -> Quantized:
        """See ``Format.unpack``; without a scale of the row to within a unit in the last place."""
        if self.scale_suffix == "deq_scale":
            scale = self.unpadded(arrays["scale"], layout, scheme)
            inputs = arrays["global_scale"].astype(np.float32)
            arrays = {"codes": arrays["codes"], "scale": scale.reshape(-1, 1) / inputs}
        return super().unpack(arrays, layout, scheme)


_WITH_SCALE, _WITHOUT_SCALE = Static("weight_scale"), Static("deq_scale")


@cache
def _of(expert: bool, chunks: int) -> Ascend:
    return Ascend(expert=expert, chunks=chunks)


def description_of(config: Mapping[str, Any]) -> Description:
    """The description that came with a config. Raises CheckpointError where there is none."""
    found = quantization_of(config).get("description")
    if not isinstance(found, dict):
        raise CheckpointError(f"config.json speaks of Ascend's types, and there is no {FILE}.")
    return parse(found)


def _scheme_of(type_: str, module: str, said: Description) -> Scheme:
    """The scheme of a type of quantized weights, by row where it has groups at all.

    Raises CheckpointError for a type that is not known, and for int4 codes of a file without a
    version, which lie one in a byte (msmodelslim's ``is_new_version``, MindIE's ``quant_version``).
    """
    weight = f"{FILE}: {module + '.weight'!r} is {type_}"
    if type_ in STATIC:
        return Scheme(_STATIC + type_, "int", 8, (1, ALL), "f32", narrow=True)
    if type_ not in _PRESETS:
        known = ", ".join((*_PRESETS, *STATIC, *_FLOATS))
        raise CheckpointError(f"{weight}, none of the types that streamq reads: {known}.")
    scheme = resolve(_PRESETS[type_])
    if scheme.element != "int":
        return scheme
    if scheme.bits == 4 and "version" not in said.head:
        raise CheckpointError(f"{weight} and there is no version: older packing is not read.")
    return replace(scheme, block=(1, ALL), scale="f32", narrow=scheme.bits == 8)


def type_of(scheme: Scheme) -> str:
    """The type that a description gives to the tensors of a weight."""
    return TYPES.get(scheme.name) or scheme.name.removeprefix(_STATIC)
