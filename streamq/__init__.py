"""Quantize checkpoints of any size without building the model."""

from streamq.api import compress, convert, decompress, open, plan, reindex, verify

__all__ = ["compress", "convert", "decompress", "open", "plan", "reindex", "verify"]
