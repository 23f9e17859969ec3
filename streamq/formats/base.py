"""What all formats have in common: how a codec of bytes, names and config is asked."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from math import prod
from typing import Any

import numpy as np

from streamq.checkpoint import CONFIG
from streamq.errors import CheckpointError, PlanError
from streamq.kernels.reference import E4M3
from streamq.schemes import FLOAT_TAGS, SCHEMES, Quantized, Scheme
from streamq.tensors import TensorInfo, element, stack_of

from .layout import Layout, Role

Array = np.ndarray[Any, Any]

#: The scheme of a module by its name, None where it is not quantized.
Rules = Callable[[str], Scheme | None]
#: Reads a whole tensor of the checkpoint that a format looks at.
Read = Callable[[TensorInfo], Array]

_SCALE_TAGS: dict[str, str] = {"e4m3": "F8_E4M3", "e8m0": "U8", **FLOAT_TAGS}


class Format:
    """A codec between ``Quantized`` and the named tensors that a loader wants.

    Stateless; a subclass says what it holds, and overrides what differs from row-major
    codes with a scale beside them.
    """

    #: As ``--format`` spells it, and ``quant_method`` in config.json.
    name: str
    method: str
    #: Who loads it, for tables.
    loaders: str
    #: Presets it can hold; the first is what ``--format`` alone means.
    presets: tuple[str, ...]
    #: Endings of the tensors that make up a weight, behind its module's name. The first
    #: that is found holds the codes.
    code_suffixes: tuple[str, ...]
    other_suffixes: tuple[str, ...]
    #: Whether one checkpoint may hold several schemes.
    mixes = False
    #: Whether it holds experts and nothing else, all of a layer in one tensor.
    stacks = False

    # --- writing ------------------------------------------------------------------------

    def concrete(self, scheme: Scheme) -> Scheme:
        """The scheme as this format holds it: its scale dtype, its block.

        Raises PlanError for a scheme it cannot hold, naming those it can.
        """
        if scheme.name not in self.presets:
            raise PlanError(
                f"the format {self.name} cannot hold {scheme.name}; it holds "
                f"{', '.join(self.presets)}."
            )
        return scheme

    #: Whether the output head is quantized as any other Linear.
    heads = False

    #: Columns that share a scale of integers where none are asked for; None: the preset's.
    group_size: int | None = None

    def takes(self, name: str, scheme: Scheme) -> bool:
        """Whether it can have a weight of this name in a scheme; one that it cannot stays."""
        return not self.stacks or stack_of(name) is not None

    def of_module(self, module: str, suffixes: Container[str] = ()) -> Format:
        """This format as it has the weight of one module.

        ``suffixes``: of the tensors of the module in a source.
        """
        return self

    #: What ``configured`` takes.
    options: tuple[str, ...] = ()

    def named_as(self, name: str) -> str:
        """What the format calls a tensor."""
        return name

    def configured(self, **options: Any) -> Format:
        """This format with options of its own, by name; None for those not given.

        Raises PlanError for one that it does not have.
        """
        for key, value in options.items():
            if value is not None:
                option = "--" + key.replace("_", "-")
                raise PlanError(f"{option} does not apply to the format {self.name}.")
        return self

    @property
    def chosen(self) -> dict[str, Any]:
        """The options that make this format with ``configured``, by name."""
        return {}

    def layout(
        self, rows: int, cols: int, dtype: str, scheme: Scheme, input_scale: float = 1.0
    ) -> Layout:
        """The tensors that a ``[rows, cols]`` weight becomes, from its shape alone.

        ``dtype``: the header dtype of the weight, and of scales that follow it.
        ``input_scale``: the value of a constant scale of the activations.
        """
        raise NotImplementedError

    def layout_of(
        self, shape: tuple[int, ...], dtype: str, scheme: Scheme, input_scale: float = 1.0
    ) -> Layout:
        """``layout`` of a tensor of any dimensions, seen as a matrix ``[shape[0], the rest]``."""
        return self.layout(shape[0], prod(shape[1:]), dtype, scheme, input_scale)

    def note(self, shape: tuple[int, ...], scheme: Scheme) -> str | None:
        """What ``__metadata__`` says of a weight under ``<format>:<its name>``; each or none."""
        return None

    def pack(self, role: Role, q: Quantized, layout: Layout, scheme: Scheme) -> Array:
        """The array of an entry for some rows, from codes that come one per byte.

        Contiguous; what it is made of lies as the file has it, line after line.
        """
        if role == "codes":
            from streamq.kernels.cpu.packing import pack  # numba, when there is work to do

            return pack(q.codes, layout.packing)
        if role == "scale":
            return q.scale
        raise NotImplementedError(role)

    def pack_global(self, g: Array, dtype: np.dtype[Any]) -> Array:
        """What is stored for divisors ``g``, f32 ``[n]``, of weights of ``dtype``."""
        return g

    def config(
        self, schemes: Mapping[Scheme, list[str]], ignore: list[str], config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """config.json of the output, from that of the source without its quantization.

        ``schemes``: the modules of each, in order. ``ignore``: modules that a loader may
        take for quantized and that are not.
        """
        raise NotImplementedError

    def files(self, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Other JSON files that go with the written ``config``, by name."""
        return {}

    # --- names ----------------------------------------------------------------------------

    def split(self, name: str) -> tuple[str, str] | None:
        """Module and suffix of a tensor's name; None where it has no suffix of this format."""
        module, _, suffix = name.rpartition(".")
        return (module, suffix) if module else None

    @property
    def telling(self) -> set[str]:
        """Last parts of names that only tensors of this format have."""
        return {*self.code_suffixes, *self.other_suffixes} - {"weight"}

    def joined(self, module: str, suffix: str) -> str:
        """The inverse of ``split``."""
        return f"{module}.{suffix}"

    def original(self, module: str) -> str:
        """The name that the weight of a module had before it was quantized."""
        return module + ".weight"

    def slices(
        self, module: str, tensors: dict[str, TensorInfo]
    ) -> Iterator[tuple[str, dict[str, TensorInfo]]]:
        """The weights that tensors of one name hold; of a stack each expert by itself."""
        yield module, tensors

    def experts_of(
        self, module: str, tensors: dict[str, TensorInfo]
    ) -> Iterator[tuple[str, dict[str, TensorInfo]]]:
        """Slices along the first axis. Raises CheckpointError where they differ in number."""
        counts = {t.shape[0] if t.shape else 0 for t in tensors.values()}
        count = counts.pop()
        if counts or not count:
            have = ", ".join(f"{s} of shape {list(t.shape)}" for s, t in sorted(tensors.items()))
            raise CheckpointError(f"{module!r} has {have}: not the same number of experts.")
        for i in range(count):
            parts = {
                suffix: t._replace(shape=t.shape[1:], start=t.start + i * (t.nbytes // count))
                for suffix, t in tensors.items()
            }
            yield element(module, i), parts

    # --- reading ------------------------------------------------------------------------

    #: The file that says which module has which scheme, for messages.
    told_in = CONFIG
    #: What a source has that is in no other format, for messages.
    lost: str | None = None

    def as_read(self, config: Mapping[str, Any]) -> Format:
        """This format with the options that a config it reads speaks of."""
        return self

    def reads(self, config: Mapping[str, Any]) -> bool:
        """Whether a config.json says that a checkpoint is in this format."""
        return quantization_of(config).get("quant_method") == self.method

    def rules(self, config: Mapping[str, Any]) -> tuple[Rules, list[str]]:
        """The scheme of each module, and the ignore list.

        Raises CheckpointError for a scheme that is not known here.
        """
        raise NotImplementedError

    def shape_of(
        self, name: str, found: Mapping[str, TensorInfo], scheme: Scheme, read: Read
    ) -> tuple[int, int]:
        """Rows and columns of a weight from its tensors by suffix."""
        raise NotImplementedError

    def as_stored(self, scheme: Scheme, found: Mapping[str, TensorInfo]) -> Scheme:
        """The scheme of ``rules`` with what only the tensors by suffix tell."""
        return scheme

    def as_found(self, layout: Layout, found: Mapping[str, TensorInfo]) -> Layout:
        """``layout`` with the dtypes that others give to what is no code and no scale."""
        return layout

    def noted_shape(self, name: str, note: str | None, scheme: Scheme) -> tuple[int, ...] | None:
        """The shape of the weight of a module from its ``note``; None where there are none.

        Raises CheckpointError for a note that is missing or does not fit.
        """
        return None

    def scale_tag(self, found: Mapping[str, TensorInfo], scheme: Scheme) -> str:
        """The header dtype of scales that follow the weight's, for ``layout``."""
        return found[self.scale_suffix].dtype

    #: The suffix of the scale.
    scale_suffix = "weight_scale"
    #: Whether ``unpack`` looks at the layout's constant as well.
    reads_constant = False

    def unpack(self, arrays: Mapping[Role, Array], layout: Layout, scheme: Scheme) -> Quantized:
        """Codes, one per byte, and scales of some rows: the inverse of ``pack``."""
        codes = arrays["codes"]
        if layout.packing.kind != "bytes":
            signed = scheme.element == "int"
            raw = codes.view(np.uint8).reshape(len(codes), -1)
            from streamq.kernels.cpu.packing import unpack

            codes = unpack(raw, layout.packing, layout.cols, signed)
        elif scheme.element == "e4m3":
            codes = codes.view(E4M3)
        scale = arrays["scale"].reshape(len(arrays["scale"]), -1)
        g = arrays.get("global_scale")
        divisor = None if g is None else self.unpack_global(g)
        return Quantized(codes, scale, arrays.get("zero_point"), divisor)

    def unpadded(self, scale: Array, layout: Layout, scheme: Scheme) -> Array:
        """A stored scale without what only fills it up."""
        return scale

    def unpack_global(self, stored: Array) -> Array:
        """The divisor, f32 ``[1]``, of a stored global scale."""
        return stored.reshape(-1)


def scale_tag(scheme: Scheme, dtype: str) -> str:
    """The header dtype of a scale of a weight of ``dtype``."""
    return _SCALE_TAGS.get(scheme.scale, dtype)


def quantization_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """``quantization_config``, also under text_config and in its older spelling; {} if none.

    Raises CheckpointError for one that is no object.
    """
    text = config.get("text_config")
    for place in (config, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            if place.get(key):
                found = place[key]
                if not isinstance(found, dict):
                    raise CheckpointError(f"config.json: {key} must be an object, got {found!r}.")
                return found
    return {}


def names_of(quantization: Mapping[str, Any], key: str) -> list[str]:
    """A list of module names or patterns. Raises CheckpointError for anything else."""
    value = quantization.get(key) or []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise CheckpointError(f"config.json: {key} of quantization_config must be a list of names.")
    return value


def one_scheme(scheme: Scheme, ignore: list[str]) -> Rules:
    """Rules of a format with one scheme: all modules but those in ``ignore``.

    An entry names a module, or part of its dotted name (as AutoAWQ and transformers match).
    """
    exact = set(ignore)

    def scheme_of(module: str) -> Scheme | None:
        if module in exact or any(f".{name}." in f".{module}." for name in ignore):
            return None
        return scheme

    return scheme_of


def integer(scheme_bits: int, group: int, symmetric: bool) -> Scheme:
    """The integer preset of that many bits with a group size, -1 for whole rows.

    Raises KeyError where there is none.
    """
    from dataclasses import replace

    preset = SCHEMES[f"W{scheme_bits}A16" + ("" if symmetric else "_ASYM")]
    return replace(preset, block=(1, group))
