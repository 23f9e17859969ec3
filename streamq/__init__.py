"""Quantize checkpoints of any size without building the model."""
