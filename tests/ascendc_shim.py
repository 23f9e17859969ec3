"""The AscendC kernels on a CPU: built against the shim, run in a process that they may abort."""

import ctypes
import hashlib
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from streamq.kernels import reference
from streamq.kernels.ascendc import chips, loader

HERE = Path(__file__).parent / "ascendc"
KERNELS = Path(chips.__file__).parent
POISON = b"\xa5"

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="the AscendC kernels are compiled by g++, which is not here"
)


_FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror", "-fPIC",
          "-ffp-contract=off"]  # fmt: skip


def compiled(source, out, arch, *more, kernels=KERNELS):
    """``source``, with the kernels in reach, by g++ to ``out``."""
    defines = [f"-D__NPU_ARCH__={arch}", f"-DSTREAMQ_ARCH={arch}", f"-I{HERE}", f"-I{kernels}"]
    command = ["g++", *_FLAGS, *defines, *more, str(HERE / source), "-o", str(out)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return out


def kept(source, suffix, arch, *more):
    """The same, kept for all processes and runs of the tests until a source changes."""
    digest = hashlib.sha256()
    for path in sorted([*HERE.glob("*.*"), *KERNELS.rglob("*.h"), KERNELS / "kernels.asc"]):
        digest.update(path.read_bytes())
    folder = HERE.parent.parent / ".pytest_cache" / "ascendc"
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{source}-{arch}-"
    out = folder / f"{stem}{digest.hexdigest()[:16]}{suffix}"
    if not out.exists():
        for old in folder.glob(f"{stem}*{suffix}"):
            old.unlink(missing_ok=True)
        compiled(source, folder / f"{os.getpid()}{suffix}", arch, *more).replace(out)
    return out


def shim(arch):
    """The part of the shim that no kernel has to be compiled with."""
    return str(kept("core.cpp", ".o", arch, "-O1", "-c"))


def library(arch):
    """The kernels as they are for an architecture."""
    return kept("kernels.cpp", ".so", arch, "-O1", "-shared", shim(arch))


_ONE_LAUNCH = threading.Lock()  # the shim has one memory


@dataclass(frozen=True)
class OnHost(loader.Device):
    """A chip without a chip: its tensors lie in the memory of the host."""

    def run(self, call, *tensors):
        with _ONE_LAUNCH:
            self.library.shim_clear()
            for t in tensors:
                at, size = ctypes.c_void_p(t.data_ptr()), ctypes.c_uint64(t.nbytes)
                self.library.shim_memory(at, size, 1)
            super().run(call, *tensors)


def on_host(chip, torch):
    """A chip as ``open_device`` gives it, for tensors of torch's CPU.

    ``torch.npu`` has to stand in for ``synchronize`` and ``current_stream``.
    """
    lib = ctypes.CDLL(str(library(chip.arch)))
    loader.bind(lib, chip.functions)
    return OnHost(chip, torch, lib, 3, "cpu")


class Aborted(Exception):
    """A kernel did what the shim does not allow."""


class Kernels:
    """Launchers of a library, by name, on numpy arrays."""

    def __init__(self, path):
        self.path = path
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        self.child = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()
        self.errors.close()

    def stop(self):
        if self.child is not None:
            self.child.stdin.close()
            self.child.stdout.close()
            self.child.wait()
            self.child = None

    def run(self, function, arguments, *arrays, blocks=1):
        """Call a launcher. Arrays are inputs; a ``(shape, dtype)`` is one that it writes.

        Returns what it wrote. Every byte of that has to be written, and none of the inputs.
        """
        if self.child is None:
            self.child = subprocess.Popen(
                [sys.executable, str(HERE / "driver.py"), str(self.path)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
            )  # fmt: skip
        contents = []
        for a in arrays:
            if isinstance(a, np.ndarray):
                contents.append((np.ascontiguousarray(a).tobytes(), 1))
            else:
                contents.append((POISON * (int(np.prod(a[0])) * np.dtype(a[1]).itemsize), 0))
        request = function, blocks, contents, chips.SIGNATURES[function], arguments
        try:
            pickle.dump(request, self.child.stdin)
            self.child.stdin.flush()
            code, unwritten, after = pickle.load(self.child.stdout)
        except (EOFError, BrokenPipeError):
            self.stop()
            self.errors.seek(0)
            message = self.errors.read().decode()
            self.errors.seek(0)
            self.errors.truncate()
            raise Aborted(message) from None
        assert code == 0
        assert not unwritten, f"{function} left {unwritten} bytes of its output as they were"
        results = []
        for a, (before, known), raw in zip(arrays, contents, after, strict=True):
            if known:
                assert raw == before, f"{function} changed its input"
            else:
                results.append(np.frombuffer(raw, a[1]).reshape(a[0]))
        return results

    def quantize(self, x, scheme, numerics, outer, blocks=1):
        """Codes u8 and scales as they are stored, or None where they were given."""
        names = {2: "f16" if x.dtype == np.float16 else "bf16", 4: "f32"}
        call = chips.call_of(scheme, *x.shape, names[x.itemsize], numerics)
        codes = (x.shape, np.uint8)
        if scheme.whole_tensor:
            (got,) = self.run(call.function, call.arguments, x, codes, outer, blocks=blocks)
            return got, None
        kind = np.uint8 if scheme.scale == "e8m0" else np.float32
        got, scale = self.run(
            call.function, call.arguments, x, codes, (call.scales, kind), blocks=blocks
        )
        if scheme.scale != "e8m0":
            stored = reference.scales.scale_dtype(scheme, x.dtype)
            assert np.array_equal(scale.astype(stored).astype(np.float32), scale)
            scale = scale.astype(stored)
        return got, scale


def pruned(x, keep):
    """All but the ``keep`` largest magnitudes of each row as 0; of equals the first stay."""
    out = np.zeros_like(x)
    for row, kept in zip(x, out, strict=True):
        order = np.argsort(-np.abs(row.astype(np.float64)), kind="stable")[:keep]
        kept[order] = row[order]
    return out
