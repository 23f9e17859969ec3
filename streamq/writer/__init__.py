"""The write side: shards that land in any order, a directory that lands all at once.

Order of a shard: temporary name, preallocate, pwrite, fsync, re-read the header, rename.
Order of a directory: all of it in ``DST.partial``, index and config last, fsync, rename.
``DST`` is therefore absent or complete at every moment. What is on disk is noted in a journal,
after it is there, so that a run goes on where another was interrupted.
"""

from .destination import (
    Destination,
    check_destination,
    existing_parent,
    free_bytes,
    partial_bytes,
    same_disk,
)
from .disk import SyncPool
from .growing import GrowingShard
from .header import build_header, quoted
from .places import HubPlace, Place, Upload, folder_of, place_of, refuse_unused
from .shard import ShardWriter, Unit, joined
from .uploading import CARD, SHARDS, HubDestination, check_branch

__all__ = [
    "CARD", "SHARDS", "Destination", "GrowingShard", "HubDestination", "HubPlace", "Place",
    "ShardWriter", "SyncPool", "Unit", "Upload", "build_header", "check_branch",
    "check_destination", "existing_parent", "folder_of", "free_bytes", "joined", "partial_bytes",
    "place_of", "quoted", "refuse_unused", "same_disk",
]  # fmt: skip
