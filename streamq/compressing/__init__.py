"""Compressing a checkpoint to NZ tiles, for the 310P's engine or for storage, and back.

One pass, bounded memory: 128 rows of a matrix are whole tiles, so a worker holds some of
these, and streams are appended to their file as they are made. ``docs/ascend.md`` has the
format of the directory.
"""

from .building import Layer
from .opened import Opened, OpenFile
from .plan import make_plan, reasons
from .run import Summary, compress, disk_needed, workers_within
from .types import Options, Plan, sparsity
from .unpack import Unpacked, decompress, verify

__all__ = [
    "Layer", "OpenFile", "Opened", "Options", "Plan", "Summary", "Unpacked", "compress",
    "decompress", "disk_needed", "make_plan", "reasons", "sparsity", "verify", "workers_within",
]  # fmt: skip
