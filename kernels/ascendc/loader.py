"""The library of kernels and its device, or a sentence that says what is missing."""

from __future__ import annotations

import ctypes
import importlib
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from streamq.errors import DeviceError

from .chips import CHIPS, SIGNATURES, Call, Chip, chip_of

#: Where the library lies, if not where ``build`` puts it.
VARIABLE = "STREAMQ_ASCENDC"


def library_path(arch: int) -> Path:
    """Where ``build`` writes the library of an architecture and ``open_device`` looks for it."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named)
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache_home) / "streamq" / f"libstreamq_ascendc_{arch}.so"


@dataclass(frozen=True)
class Device:
    """An NPU that was opened: its chip, torch with torch_npu in it, and the kernels."""

    chip: Chip
    torch: Any
    library: ctypes.CDLL
    blocks: int
    type: str = "npu"  # as tensors of it say

    def run(self, call: Call, *tensors: Any) -> None:
        """Run a launcher on contiguous tensors of the NPU, and wait for it.

        torch_npu has a queue of its own, which a launch from outside would overtake: it is
        emptied before, and the kernel is waited for behind it.
        """
        self.torch.npu.synchronize()
        stream = self.torch.npu.current_stream().npu_stream
        pointers = [t.data_ptr() for t in tensors]
        launcher = getattr(self.library, call.function)
        if launcher(self.blocks, stream, *pointers, *call.arguments) != 0:
            raise DeviceError(f"{call.function} refused its arguments {call.arguments}")
        self.torch.npu.synchronize()


def bind(library: ctypes.CDLL, functions: tuple[str, ...]) -> None:
    """Tell ctypes what the launchers take. Raises AttributeError for one that is not there."""
    for name in functions:
        function = getattr(library, name)
        function.argtypes, function.restype = SIGNATURES[name], ctypes.c_int32


@cache
def open_device() -> Device:
    """The NPU of this process, ready to run kernels; opened once.

    Raises DeviceError with what is missing and what to do: torch, torch_npu, an NPU, a chip
    that there are kernels for, or their library.
    """
    try:
        torch = importlib.import_module("torch")
        importlib.import_module("torch_npu")
    except (ImportError, OSError, RuntimeError) as error:
        # Without CANN torch_npu misses a library, and torch, which loads it, tells of that in a
        # RuntimeError of several lines.
        first = str(error).strip().partition("\n")[0].rstrip(".")
        raise DeviceError(
            f"an NPU needs torch and torch_npu of the same version, and one cannot be imported "
            f"({first}): install both as Ascend's documentation of torch_npu says, and source "
            "CANN's set_env.sh."
        ) from None
    if not torch.npu.is_available():
        raise DeviceError(
            "torch_npu finds no NPU: look whether npu-smi info lists one and CANN's set_env.sh "
            "was sourced."
        )
    name = torch.npu.get_device_name()
    chip = chip_of(name)
    if chip is None:
        known = ", ".join(c.name for c in CHIPS)
        raise DeviceError(f"there are no kernels for the chip {name}: known are {known}.")
    path = library_path(chip.arch)
    if not path.is_file():
        raise DeviceError(
            f"{path} is not there: build the kernels for {chip.name} with "
            f"python -m streamq.kernels.ascendc.build {chip.arch}, which needs CANN's bisheng."
        )
    try:
        library = ctypes.CDLL(str(path))
        bind(library, chip.functions)
    except (OSError, AttributeError) as error:
        raise DeviceError(
            f"{path} cannot be used ({error}): build it again with "
            f"python -m streamq.kernels.ascendc.build {chip.arch}."
        ) from None
    properties = torch.npu.get_device_properties()
    blocks = int(getattr(properties, "vector_core_num", 0) or chip.cores)
    return Device(chip, torch, library, blocks)
