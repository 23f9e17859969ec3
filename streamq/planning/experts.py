"""Experts that a source has in one tensor of three dimensions, as weights of their own."""

from __future__ import annotations

from streamq.checkpoint import Checkpoint
from streamq.families import Family
from streamq.formats import Format
from streamq.tensors import DTYPES, FLOATS, TensorInfo, element
from streamq.views import View


def views_of(source: Checkpoint, family: Family, fmt: Format) -> dict[str, View]:
    """The experts that the format wants, by name.

    gpt-oss keeps its ``[experts, in, out]`` together and transposes each.
    """
    views: dict[str, View] = {}
    if fmt.stacks and family.model_type == "gpt_oss":
        for t in source.tensors.values():
            if is_stack(t):
                views |= transposed(t)
    return views


def is_stack(t: TensorInfo) -> bool:
    """Whether it holds the experts of a gpt-oss layer, not quantized."""
    names = ("experts.gate_up_proj", "experts.down_proj")
    return len(t.shape) == 3 and t.dtype in FLOATS and t.name.endswith(names)


def transposed(t: TensorInfo) -> dict[str, View]:
    """A weight ``[out, in]`` for each expert of ``[experts, in, out]``."""
    count, cols, rows = t.shape
    size = rows * cols * DTYPES[t.dtype].itemsize
    return {
        element(t.name, i): View(t, t.start + i * size, rows, cols, 1, rows) for i in range(count)
    }
