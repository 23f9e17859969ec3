"""Weights as Ascend's engines read them: FRACTAL_NZ, and the codecs of its tiles."""

from .codec import decode, encode
from .compressor import CompressConfig, Compressor
from .layout import Layout, from_nz, to_nz

__all__ = ["CompressConfig", "Compressor", "Layout", "decode", "encode", "from_nz", "to_nz"]
