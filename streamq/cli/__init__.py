"""The command line. Imports of numpy, numba and rich wait until a command needs them."""

from __future__ import annotations

import gc
import os
import sys
from typing import NoReturn

from . import allocate, batch, compress, convert, kernels, look, reindex, repair, report
from .group import cli
from .texts import add_to

__all__ = [
    "allocate", "batch", "cli", "compress", "convert", "kernels", "look", "main", "reindex",
    "repair", "report",
]  # fmt: skip

add_to(cli)


def main() -> NoReturn:
    """Entry point of the ``streamq`` command.

    The cyclic garbage collector stays off: headers and plans are many small objects without
    cycles, and walking them again and again takes 0.4 s of planning 70,000 tensors, as much
    as the rest. At the end nothing is torn down, as all files are closed by then.
    """
    gc.disable()
    # huggingface_hub warns of requests that it makes again, whose addresses are secret.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    code: object = 0
    try:
        cli(prog_name="streamq")
    except SystemExit as e:
        code = e.code or 0
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:  # closed by the caller
                stream.flush()
        except OSError:  # nowhere left to say so
            code = code or 1
    os._exit(code if isinstance(code, int) else 1)
