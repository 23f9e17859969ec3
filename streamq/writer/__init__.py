"""The write side: shards that land in any order, a directory that lands all at once.

Order of a shard: temporary name, preallocate, pwrite, fsync, re-read the header, rename.
Order of a directory: all of it in ``DST.partial``, index and config last, fsync, rename.
``DST`` is therefore absent or complete at every moment.
"""

from .destination import Destination, check_destination, free_bytes, same_disk
from .growing import GrowingShard
from .shard import ShardWriter, build_header, quoted

__all__ = [
    "Destination", "GrowingShard", "ShardWriter", "build_header", "check_destination", "free_bytes",
    "quoted", "same_disk",
]  # fmt: skip
