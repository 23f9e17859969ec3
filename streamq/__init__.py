"""Quantize checkpoints of any size without building the model."""

from streamq.api import convert, open, plan, reindex, verify

__all__ = ["convert", "open", "plan", "reindex", "verify"]
