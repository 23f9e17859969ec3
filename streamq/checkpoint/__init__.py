"""The read side: headers first, then bytes into buffers that the caller owns."""

from .files import read_json
from .header import MAX_HEADER, read_header
from .local import (
    COMPRESSED,
    COMPRESSION,
    CONFIG,
    DESCRIPTION,
    INDEX_SUFFIX,
    Checkpoint,
    is_compressed,
    is_weights,
    open_checkpoint,
)

__all__ = [
    "COMPRESSED", "COMPRESSION", "CONFIG", "DESCRIPTION", "INDEX_SUFFIX", "MAX_HEADER",
    "Checkpoint", "is_compressed", "is_weights", "open_checkpoint", "read_header", "read_json",
]  # fmt: skip
