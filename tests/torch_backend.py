"""A backend of torch tensors with the face of the others, and Triton in its interpreter."""

import os
from importlib.util import find_spec
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from streamq.schemes import Quantized

NEEDED = ("torch", "triton")
MISSING = [name for name in NEEDED if find_spec(name) is None]
needs_triton = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")

_INTEGER = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}
_TORCH = {
    np.dtype(ml_dtypes.bfloat16): "bfloat16",
    np.dtype(np.float16): "float16",
    np.dtype(np.float32): "float32",
    np.dtype(np.float64): "float64",
    np.dtype(ml_dtypes.float8_e4m3fn): "float8_e4m3fn",
    np.dtype(np.int8): "int8",
    np.dtype(np.uint8): "uint8",
}
_NUMPY = {name: dtype for dtype, name in _TORCH.items()}


def tensor(x, device="cpu"):
    """The torch tensor of a numpy array, of any dtype; None stays None."""
    if x is None:
        return None
    import torch

    x = np.asarray(x)
    raw = np.ascontiguousarray(x).view(_INTEGER[x.itemsize])
    return torch.from_numpy(raw.copy()).view(getattr(torch, _TORCH[x.dtype])).to(device)


def array(t):
    """The numpy array of a torch tensor; None stays None."""
    if t is None:
        return None
    import torch

    raw = t.cpu().view(getattr(torch, np.dtype(_INTEGER[t.element_size()]).name))
    return raw.numpy().view(_NUMPY[str(t.dtype).removeprefix("torch.")])


def fields(q, convert):
    """``q`` with every array of it converted."""
    names = ("codes", "scale", "zero_point", "global_scale", "bias")
    return Quantized(**{name: convert(getattr(q, name)) for name in names})


def with_arrays(kernels, device="cpu"):
    """``kernels`` (``streamq.kernels.triton``, or a copy of it) for numpy arrays."""

    def there(x):
        return tensor(x, device)

    def quantize(x, scheme, *packing, outer=None, out=None, **kw):
        with np.errstate(all="ignore"):  # the interpreter's numpy
            q = kernels.quantize(there(x), scheme, *packing, outer=there(outer), **kw)
        return fields(q, array)

    def dequantize(q, scheme, out=None, **kw):
        with np.errstate(all="ignore"):
            values = kernels.dequantize(fields(q, there), scheme, there(out), **kw)
        return array(values)

    def energies(x, q, scheme, packing, outer):
        with np.errstate(all="ignore"):
            return array(kernels.energies(
                there(x), fields(q, there), scheme, packing, there(outer)))  # fmt: skip

    return SimpleNamespace(
        NAME=kernels.NAME, supports=kernels.supports, module=kernels, quantize=quantize,
        dequantize=dequantize, energies=energies, amax=lambda x: array(kernels.amax(there(x))),
    )  # fmt: skip


def interpreted():
    """``streamq.kernels.triton`` run by Triton's interpreter on the CPU.

    Whether it is, is decided when triton is imported, once in a process: what compiles runs in
    processes of its own.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    from streamq.kernels import triton
    from triton.runtime import interpreter

    # Its checks for overflow only count where debug is on, and take as long as the sums.
    options = interpreter.InterpreterOptions(sanitize_overflow=False)
    interpreter.interpreter_builder.options = options
    return triton
