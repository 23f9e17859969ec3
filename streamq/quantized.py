"""A quantized checkpoint, read back: which tensors make up a weight, and its values."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from streamq.checkpoint import Checkpoint, open_checkpoint
from streamq.errors import CheckpointError
from streamq.formats import compressed_tensors as fmt
from streamq.formats.layout import Layout
from streamq.kernels.reference import dequantize
from streamq.schemes import Quantized, Scheme
from streamq.tensors import DTYPES, FLOATS, TensorInfo

Array = np.ndarray[Any, Any]

_PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_global_scale",
          "input_global_scale", "weight_shape")  # fmt: skip


class Module(NamedTuple):
    """A quantized weight: its tensors by suffix, its shape and layout."""

    name: str
    tensors: dict[str, TensorInfo]
    rows: int
    cols: int
    layout: Layout


class Tensors:
    """The tensors of a checkpoint under the names they had before it was quantized.

    Iterates names with arrays; each look reads the file again. Quantized
    weights come dequantized, as f32 ``[rows, cols]``; the rest as it is stored.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.scheme: Scheme | None = None
        self._modules: dict[str, Module] = {}
        if quantization := checkpoint.config.get("quantization_config"):
            self.scheme, _ = fmt.read_config(quantization)
            for name, found in parts_of(checkpoint).items():
                self._modules[name + ".weight"] = module_of(checkpoint, name, found, self.scheme)
        parts = {t.name for m in self._modules.values() for t in m.tensors.values()}
        self.names = [n for n in checkpoint.tensors if n not in parts] + list(self._modules)

    def __iter__(self) -> Iterator[tuple[str, Array]]:
        for name in self.names:
            yield name, self[name]

    def __getitem__(self, name: str) -> Array:
        m = self._modules.get(name)
        if m is None:
            return read(self.checkpoint, self.checkpoint.tensors[name])
        assert self.scheme is not None
        return dequantize(unpack_rows(self.checkpoint, m, self.scheme, 0, m.rows), self.scheme)

    def close(self) -> None:
        """Close the files."""
        self.checkpoint.close()

    def __enter__(self) -> Tensors:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_tensors(path: str | os.PathLike[str]) -> Tensors:
    """Open a checkpoint, quantized by streamq or not at all, to look at its values.

    Raises CheckpointError for one that is damaged or quantized in another way.
    """
    return Tensors(open_checkpoint(path))


def parts_of(checkpoint: Checkpoint) -> dict[str, dict[str, TensorInfo]]:
    """By module, the tensors of each quantized weight by their suffix."""
    parts: dict[str, dict[str, TensorInfo]] = {}
    for t in checkpoint.tensors.values():
        module, _, suffix = t.name.rpartition(".")
        if suffix in _PARTS:
            parts.setdefault(module, {})[suffix] = t
    for module, found in parts.items():
        if (weight := checkpoint.tensors.get(module + ".weight")) is not None:
            found["weight"] = weight
    return parts


def module_of(
    checkpoint: Checkpoint, name: str, found: dict[str, TensorInfo], scheme: Scheme
) -> Module:
    """A module from its parts. Raises CheckpointError where they are not what the scheme has."""
    codes = found.get("weight_packed") or found.get("weight")
    if codes is None or len(codes.shape) != 2 or "weight_scale" not in found:
        raise CheckpointError(f"{name!r} has {', '.join(sorted(found))}, no weight with its scale")
    rows, cols = codes.shape
    if scheme.element == "e2m1":
        cols *= 2
    elif "weight_packed" in found:
        shape = found.get("weight_shape")
        if shape is None or (shape.dtype, shape.shape) != ("I64", (2,)):
            odd = text_of(shape and (shape.dtype, shape.shape))
            raise CheckpointError(f"{name + '.weight_shape'!r} is {odd}, not I64 [2]")
        rows, cols = read(checkpoint, shape).tolist()
        if rows != codes.shape[0] or cols < 1:
            raise CheckpointError(f"{name!r}: weight_shape says {[rows, cols]}")
    scale_dtype = found["weight_scale"].dtype
    layout = fmt.layout(rows, cols, scale_dtype, scheme)
    want = {e.suffix: (e.dtype, e.shape) for e in layout.entries}
    have = {suffix: (t.dtype, t.shape) for suffix, t in found.items()}
    if want != have:
        part = next(s for s in sorted(want.keys() | have.keys()) if want.get(s) != have.get(s))
        raise CheckpointError(
            f"{name + '.' + part!r} is {text_of(have.get(part))}, "
            f"{scheme.name} has {text_of(want.get(part))}"
        )
    if scheme.scale == "weight" and scale_dtype not in FLOATS:
        raise CheckpointError(f"{name + '.weight_scale'!r} is {scale_dtype}, not a float")
    return Module(name, found, rows, cols, layout)


def unpack_rows(
    checkpoint: Checkpoint, m: Module, scheme: Scheme, first: int, rows: int
) -> Quantized:
    """Codes and scales of some rows; ``first`` is a multiple of ``Layout.row_step``."""
    arrays: dict[str, Array] = {}
    for e in m.layout.entries:
        t = m.tensors[e.suffix]
        if e.role == "global_scale":
            arrays[e.role] = read(checkpoint, t)
        elif e.rows:
            start = first // e.rows * e.nbytes
            n = -(-rows // e.rows)
            stop = min(start + n * e.nbytes, t.nbytes)
            data = np.frombuffer(
                bytes_of(checkpoint, t, start, stop - start), DTYPES[t.dtype].numpy
            )
            arrays[e.role] = data.reshape(-1, e.shape[1])
    if "codes" in arrays and m.layout.packing.kind != "bytes":
        arrays["codes"] = arrays["codes"].view(np.uint8)
    return fmt.unpack(arrays, scheme, m.cols)


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
    return np.frombuffer(bytes_of(c, t, 0, t.nbytes), DTYPES[t.dtype].numpy).reshape(t.shape)
