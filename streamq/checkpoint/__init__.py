"""The read side: headers first, then bytes into buffers that the caller owns."""

from .files import read_json
from .header import MAX_HEADER, read_header
from .local import CONFIG, DESCRIPTION, INDEX_SUFFIX, Checkpoint, open_checkpoint

__all__ = [
    "CONFIG", "DESCRIPTION", "INDEX_SUFFIX", "MAX_HEADER", "Checkpoint", "open_checkpoint",
    "read_header", "read_json",
]  # fmt: skip
