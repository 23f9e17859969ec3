"""Compile the kernels with CANN's bisheng: ``python -m streamq.kernels.ascendc.build 2201``."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from streamq.errors import DeviceError, StreamqError

from .chips import CHIPS
from .loader import library_path

FOLDER = Path(__file__).parent


def command(arch: int, out: Path) -> list[str]:
    """What compiles the library of ``arch`` to ``out``; ``CMakeLists.txt`` does the same."""
    return [
        "bisheng", "-shared", str(FOLDER / "kernels.asc"), "-o", str(out), "-fPIC", "-std=c++17",
        "-O2", f"--npu-arch=dav-{arch}", f"-DSTREAMQ_ARCH={arch}",
    ]  # fmt: skip


def build(arch: int) -> Path:
    """Compile the library for ``--npu-arch=dav-<arch>`` to where it is looked for.

    Raises DeviceError where there is no bisheng, no such architecture, or it does not compile.
    """
    known = sorted({chip.arch for chip in CHIPS})
    if arch not in known:
        raise DeviceError(f"there are kernels for the architectures {known}, not for {arch}")
    if shutil.which("bisheng") is None:
        raise DeviceError("bisheng is not in PATH: install CANN and source its set_env.sh")
    out = library_path(arch)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Not over the old one, which another process may have open.
    part = out.with_name(f"{out.name}.partial")
    done = subprocess.run(command(arch, part), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        part.unlink(missing_ok=True)
        raise DeviceError(f"bisheng does not compile the kernels for dav-{arch}:\n{done.stderr}")
    return part.replace(out)


def main(arguments: list[str]) -> int:
    """Build what is asked for; 0, 1 for an error, 2 for wrong usage."""
    if len(arguments) != 1 or not arguments[0].isdigit():
        print("usage: python -m streamq.kernels.ascendc.build 2002|2201|3510", file=sys.stderr)
        return 2
    try:
        print(build(int(arguments[0])))
    except StreamqError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
