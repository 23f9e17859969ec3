"""From the name of a device to the device, or to a sentence about what is missing."""

from __future__ import annotations

from collections.abc import Sequence
from glob import glob
from importlib.util import find_spec

from streamq.errors import PlanError

from .layer import Device

#: What the kernels of a GPU need, for people.
EXTRA = "pip install 'streamq[gpu]'"
#: Files by which Linux shows an NVIDIA GPU, an AMD one, and one inside of WSL.
_GPU_FILES = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dxg")

#: What torch says where it finds no GPU, and what that means.
_REASONS = {
    "not compiled with CUDA": "torch {torch} is built for the CPU alone; install one for GPUs "
                              "(https://pytorch.org/get-started)",
    "driver on your system is too old": "the NVIDIA driver is too old for torch {torch}; update "
                                        "it, or install a torch that is built for it",
    "Found no NVIDIA driver": "there is no NVIDIA driver; install one",
    "No CUDA GPUs are available": "no GPU is visible to torch; look at CUDA_VISIBLE_DEVICES and "
                                  "nvidia-smi",
}  # fmt: skip


def has_gpu() -> bool:
    """Whether this machine shows one, without importing torch, which takes a second."""
    return any(map(glob, _GPU_FILES))


def open_devices(names: Sequence[str]) -> list[Device]:
    """The devices of ``device_names``, one kind of them.

    Raises PlanError for what is not installed or not there, saying what to do.
    """
    numbers = [int(name.partition(":")[2]) for name in names]
    if names[0].startswith("npu"):
        from .npu import open_npus

        return open_npus(numbers)
    missing = [module for module in ("torch", "triton") if find_spec(module) is None]
    if missing:
        raise PlanError(
            f"--device {','.join(names)} needs {' and '.join(missing)}; {EXTRA}, or use "
            "--device cpu."
        )
    try:
        from .cuda import open_gpus
    except (ImportError, OSError) as e:  # OSError: a library of CUDA that is missing
        raise PlanError(
            f"--device {','.join(names)}: torch or triton cannot be loaded ({_first(str(e))}); "
            "install them anew, or use --device cpu."
        ) from e
    return open_gpus(numbers)


def no_gpu(said: str, version: str) -> str:
    """Why there is no GPU and what to do, in clauses for people.

    ``said``: the exception of ``torch.cuda.init``, by torch of a ``version``.
    """
    for part, means in _REASONS.items():
        if part in said:
            return means.format(torch=version)
    return f"torch finds no GPU ({_first(said)}); mend that"


def _first(text: str) -> str:
    """The first line of a message, without its full stop."""
    return text.strip().partition("\n")[0].rstrip(".")
