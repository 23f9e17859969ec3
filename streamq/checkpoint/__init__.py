"""The read side: headers first, then bytes into buffers that the caller owns."""

from .blocks import BLOCK, Traffic, forecast, joined
from .files import read_json
from .header import MAX_HEADER, read_header
from .local import (
    COMPRESSED,
    COMPRESSION,
    CONFIG,
    DESCRIPTION,
    INDEX_SUFFIX,
    is_compressed,
    is_weights,
    open_checkpoint,
)
from .source import Checkpoint
from .spool import SPOOL
from .store import Reader, Remote, Span

__all__ = [
    "BLOCK", "COMPRESSED", "COMPRESSION", "CONFIG", "DESCRIPTION", "INDEX_SUFFIX", "MAX_HEADER",
    "SPOOL", "Checkpoint", "Reader", "Remote", "Span", "Traffic", "forecast", "is_compressed",
    "is_weights",
    "joined", "open_checkpoint", "read_header", "read_json",
]  # fmt: skip
