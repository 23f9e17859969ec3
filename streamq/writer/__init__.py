"""The write side: shards that land in any order, a directory that lands all at once.

Order of a shard: temporary name, preallocate, pwrite, fsync, re-read the header, rename.
Order of a directory: all of it in ``DST.partial``, index and config last, fsync, rename.
``DST`` is therefore absent or complete at every moment. What is on disk is noted in a journal,
after it is there, so that a run goes on where another was interrupted.
"""

from .destination import Destination, check_destination, free_bytes, same_disk
from .disk import SyncPool
from .growing import GrowingShard
from .header import build_header, quoted
from .shard import ShardWriter, Unit, joined

__all__ = [
    "Destination", "GrowingShard", "ShardWriter", "SyncPool", "Unit", "build_header",
    "check_destination", "free_bytes", "joined", "quoted", "same_disk",
]  # fmt: skip
