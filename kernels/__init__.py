"""Kernels: arrays in, codes and scales out. They know no names and no files."""
