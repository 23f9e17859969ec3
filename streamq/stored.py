"""A quantized checkpoint, read back: which tensors make up a weight, and its values."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from streamq.checkpoint import Checkpoint, open_checkpoint
from streamq.errors import CheckpointError, PlanError
from streamq.formats import FORMATS, Entry, Format, Layout, Role, Rules, format_of
from streamq.kernels.reference import dequantize
from streamq.schemes import Quantized, Scheme
from streamq.tensors import DTYPES, FLOATS, TensorInfo, stack_of
from streamq.views import Joined, View

Array = np.ndarray[Any, Any]

#: Values of a stored weight that are looked at in one go, f32: several MB, because a piece of a
#: transposed tensor is read line by line.
SLAB = 16 << 20


class Stored(NamedTuple):
    """A quantized weight as it lies in a checkpoint.

    ``name``: the one it had before, ``model.layers.0.mlp.down_proj.weight``. ``tensors``: by
    suffix, those of ``layout``, which sees a weight of ``shape`` as a matrix.
    """

    name: str
    tensors: dict[str, TensorInfo]
    format: Format
    scheme: Scheme
    layout: Layout
    shape: tuple[int, ...]

    @property
    def module(self) -> str:
        """The module's name."""
        return self.name.removesuffix(".weight")

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def row_step(self) -> int:
        """Rows that a slab is a multiple of."""
        return self.layout.row_step

    @property
    def codes(self) -> TensorInfo:
        """The tensor that holds the codes."""
        return self.tensors[self.layout.entry("codes").suffix]


#: How a weight of a plan lies in a source where it is not a tensor of floats by itself.
Where = Stored | View | Joined


class Found(NamedTuple):
    """What a checkpoint says of its quantization: ``parts`` by module and suffix."""

    format: Format
    scheme_of: Rules
    ignore: list[str]
    parts: dict[str, dict[str, TensorInfo]]


def look(checkpoint: Checkpoint) -> Found:
    """Read config and names. Raises CheckpointError for a quantization that is not known."""
    fmt = format_of(checkpoint.config)
    _refuse_packed(checkpoint, fmt)
    if fmt.name == "plain":
        return Found(fmt, lambda module: None, [], {})
    scheme_of, ignore = fmt.rules(checkpoint.config)
    parts: dict[str, dict[str, TensorInfo]] = {}
    telling = {*fmt.code_suffixes, *fmt.other_suffixes} - {"weight"}
    for t in checkpoint.tensors.values():
        split = fmt.split(t.name)
        if split and split[1] in telling and not _is_ordinary(checkpoint, t.name):
            parts.setdefault(split[0], {})[split[1]] = t
    if "weight" in fmt.code_suffixes:
        for module, found in parts.items():
            if (weight := checkpoint.tensors.get(module + ".weight")) is not None:
                found["weight"] = weight
    return Found(fmt, scheme_of, ignore, parts)


def _refuse_packed(checkpoint: Checkpoint, fmt: Format) -> None:
    """Raise CheckpointError for parts of quantized weights that the config does not explain."""
    said, telling = f"names the format {fmt.name}", set()
    for f in FORMATS.values():
        telling |= {*f.code_suffixes}
        if fmt.name == "plain":
            said = "has no quantization_config"
            telling |= f.telling
    telling -= {*fmt.code_suffixes, *fmt.other_suffixes, "weight"}
    for name in checkpoint.tensors:
        if name[name.rfind(".") + 1 :] in telling and not _is_ordinary(checkpoint, name):
            raise CheckpointError(
                f"{name!r} belongs to a quantized weight, but config.json {said}."
            )


def _is_ordinary(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor called scales or biases is a float that no codes lie beside."""
    module, _, suffix = name.rpartition(".")
    if suffix not in ("scales", "biases") or checkpoint.tensors[name].dtype not in FLOATS:
        return False
    beside = (checkpoint.tensors.get(f"{module}.{s}") for s in ("weight", "qweight"))
    return all(t is None or t.dtype in FLOATS for t in beside)


def find_stored(checkpoint: Checkpoint) -> dict[str, Stored]:
    """The quantized weights of a checkpoint, by the name they had before.

    Raises CheckpointError, naming the tensor, for one that is not as its config says.
    """
    found = look(checkpoint)
    stored = {}
    for module, tensors in weights_of(found):
        s = stored_of(checkpoint, found, module, tensors)
        stored[s.name] = s
    narrow = {tag for tag, dtype in DTYPES.items() if dtype.bits <= 8 and tag != "BOOL"}
    for t in checkpoint.tensors.values():
        if t.dtype not in narrow or t.name in stored:
            continue
        if len(t.shape) == 2 and t.name.endswith(".weight"):
            raise CheckpointError(
                f"{t.name!r} in {t.file} is {t.dtype} and has no {found.format.scale_suffix}: "
                "its values are not known."
            )
    return stored


def weights_of(found: Found) -> Iterator[tuple[str, dict[str, TensorInfo]]]:
    """Module and tensors of each weight, those of a stack one by one."""
    for module, tensors in found.parts.items():
        yield from found.format.slices(module, tensors)


def stored_of(
    checkpoint: Checkpoint, found: Found, module: str, tensors: dict[str, TensorInfo]
) -> Stored:
    """One weight from its tensors. Raises CheckpointError where they do not fit its scheme."""
    fmt, scheme = found.format.of_module(module, tensors), found.scheme_of(module)
    if scheme is None:
        raise CheckpointError(
            f"{module!r} is quantized, but {fmt.told_in} ignores it, or has no scheme for it."
        )
    codes = next((tensors[s] for s in fmt.code_suffixes if s in tensors), None)
    if codes is None or len(codes.shape) < 2 or fmt.scale_suffix not in tensors:
        have = ", ".join(sorted(tensors))
        raise CheckpointError(
            f"{module!r} has {have}: no weight of two dimensions with its {fmt.scale_suffix}."
        )
    if 0 in codes.shape:
        raise CheckpointError(f"{codes.name!r} of shape {list(codes.shape)} is empty.")
    scheme = fmt.as_stored(scheme, tensors)
    note = checkpoint.metadata[codes.file].get(f"{fmt.name}:{fmt.original(module)}")
    shape = fmt.noted_shape(module, note, scheme)
    if shape is None:
        if len(codes.shape) > 2 and not fmt.stacks:
            raise CheckpointError(
                f"{codes.name!r} of shape {list(codes.shape)} holds the experts of a layer in one, "
                "which streamq cannot split yet."
            )
        shape = fmt.shape_of(module, tensors, scheme, lambda t: read(checkpoint, t))
    scheme = scheme.folded(shape)
    tag = fmt.scale_tag(tensors, scheme)
    try:
        layout = fmt.as_found(fmt.layout_of(shape, tag, scheme), tensors)
    except PlanError as e:
        raise CheckpointError(f"{codes.name!r}: {e}.") from None
    want = {e.suffix: (e.dtype, e.shape) for e in layout.entries}
    have_ = {suffix: (t.dtype, t.shape) for suffix, t in tensors.items()}
    if want != have_:
        part = next(s for s in sorted(want.keys() | have_.keys()) if want.get(s) != have_.get(s))
        raise CheckpointError(
            f"{fmt.joined(module, part)!r} is {text_of(have_.get(part))}, "
            f"{scheme.name} has {text_of(want.get(part))}."
        )
    if scheme.scale == "weight" and tag not in FLOATS:
        name = fmt.joined(module, fmt.scale_suffix)
        raise CheckpointError(f"{name!r} is {tag}, not a float.")
    return Stored(fmt.original(module), tensors, fmt, scheme, layout, shape)


def read_rows(checkpoint: Checkpoint, s: Stored, first: int, rows: int) -> Quantized:
    """Codes and scales of some rows; ``first`` is a multiple of ``Layout.row_step``."""
    arrays: dict[Role, Array] = {}
    for e in s.layout.entries:
        if e.role == "unused":
            continue
        if e.rows:
            arrays[e.role] = _piece(checkpoint, s.tensors[e.suffix], e, first, rows)
        elif e.role == "global_scale" or (e.role == "constant" and s.format.reads_constant):
            arrays[e.role] = read(checkpoint, s.tensors[e.suffix])
    try:
        return s.format.unpack(arrays, s.layout, s.scheme)
    except CheckpointError as e:
        raise CheckpointError(f"{s.name!r}: {e}") from None


def _piece(c: Checkpoint, t: TensorInfo, e: Entry, first: int, rows: int) -> Array:
    """What some rows of a weight became; a copy, ``[pieces, ...]`` or ``[lines, pieces]``."""
    start, stop = first // e.rows * e.nbytes, -(-(first + rows) // e.rows) * e.nbytes
    stop = min(stop, e.stride)
    dtype = DTYPES[t.dtype].numpy
    width = stop - start
    if e.lines == 1 or width == e.stride:
        raw = bytes_of(c, t, start, width * e.lines)
    else:
        buffer = bytearray(width * e.lines)
        view = memoryview(buffer)
        for line in range(e.lines):
            at = t.start + line * e.stride + start
            c.pread(t.file, at, view[line * width : (line + 1) * width])
        raw = bytes(buffer)
    shape = (e.lines, -1) if e.transposed else (-1, *e.shape[1:])
    return np.frombuffer(raw, dtype).reshape(shape)


def slab_rows(s: Stored) -> int:
    """Rows whose values are SLAB bytes or less, a multiple of the layout's step."""
    step = s.layout.row_step
    return max(step, SLAB // (4 * s.layout.cols) // step * step)


def slabs(s: Stored) -> Iterator[tuple[int, int]]:
    """First row and number of rows of each slab."""
    height = slab_rows(s)
    for first in range(0, s.layout.rows, height):
        yield first, min(height, s.layout.rows - first)


class Tensors:
    """The tensors of a checkpoint under the names they had before it was quantized.

    Iterates names with arrays, in the order of the files; each look reads the file again.
    Quantized weights come dequantized, as f32 ``[rows, cols]``, experts that share a
    tensor as ``[experts, rows, cols]``; the rest as it is stored.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.stored = find_stored(checkpoint)
        parts = {t.name: stack_of(s.name) or s.name
                 for s in self.stored.values() for t in s.tensors.values()}  # fmt: skip
        self.names = list(dict.fromkeys(parts.get(name, name) for name in checkpoint.tensors))
        self._stacks: dict[str, list[Stored]] = {}
        for s in self.stored.values():
            if stack := stack_of(s.name):
                self._stacks.setdefault(stack, []).append(s)

    def __iter__(self) -> Iterator[tuple[str, Array]]:
        for name in self.names:
            yield name, self[name]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, name: str) -> Array:
        if name in self._stacks:
            return np.stack([self._values(s) for s in self._stacks[name]])
        s = self.stored.get(name)
        if s is None:
            return read(self.checkpoint, self.checkpoint.tensors[name])
        return self._values(s)

    def _values(self, s: Stored) -> Array:
        out = np.empty((s.layout.rows, s.layout.cols), np.float32)
        for first, rows in slabs(s):
            out[first : first + rows] = dequantize(
                read_rows(self.checkpoint, s, first, rows), s.scheme
            )
        return out.reshape(s.shape)

    def close(self) -> None:
        """Close the files."""
        self.checkpoint.close()

    def __enter__(self) -> Tensors:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_tensors(path: str | os.PathLike[str]) -> Tensors:
    """Open a checkpoint, quantized in a format that streamq reads or not at all.

    Raises CheckpointError for one that is damaged or quantized in another way.
    """
    return Tensors(open_checkpoint(path))


def text_of(entry: tuple[str, tuple[int, ...]] | None) -> str:
    """A dtype and a shape for messages."""
    return "absent" if entry is None else f"{entry[0]} {list(entry[1])}"


def bytes_of(c: Checkpoint, t: TensorInfo, at: int, n: int) -> bytes:
    """``n`` bytes of a tensor from byte ``at`` of it."""
    buffer = bytearray(n)
    c.pread(t.file, t.start + at, memoryview(buffer))
    return bytes(buffer)


def read(c: Checkpoint, t: TensorInfo) -> Array:
    """A whole tensor. Raises CheckpointError for elements that are not whole bytes."""
    if DTYPES[t.dtype].numpy is None:
        raise CheckpointError(f"{t.name!r} is {t.dtype}, which numpy has no dtype for.")
    if len(t.shape) > 64:
        raise CheckpointError(f"{t.name!r} has {len(t.shape)} dimensions, numpy at most 64.")
    return np.frombuffer(bytes_of(c, t, 0, t.nbytes), DTYPES[t.dtype].numpy).reshape(t.shape)
