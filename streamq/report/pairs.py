"""The tensors of an output beside those of the source that they were made from."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from streamq.checkpoint import Checkpoint
from streamq.errors import CheckpointError
from streamq.families import Family
from streamq.planning import weights_in
from streamq.quality import Quality
from streamq.recipe import Recipe
from streamq.schemes import BYTES, Quantized, Scheme
from streamq.stored import Stored, Where, find_stored, look, read_rows, text_of
from streamq.tensors import TensorInfo, stack_of
from streamq.verifying.elements import slabs_of, source_rows

Array = np.ndarray[Any, Any]

#: What numbers its layers: ``model.layers.3.`` is layer 3 of the stack ``model.layers``.
_LAYER = re.compile(r"^((?:.*?\.)?(?:layers?|blocks?|h|resblocks))\.(\d+)\.")


class Pair(NamedTuple):
    """One tensor: ``source``, what it is there if no tensor of floats, and what it became.

    ``stored``, or the ``dtype`` it has where it is not quantized. ``bytes_out``: with its scales.
    """

    source: TensorInfo
    origin: Where | None
    stored: Stored | None
    dtype: str | None
    bytes_out: int

    @property
    def name(self) -> str:
        """The name in the source."""
        return self.source.name

    @property
    def bytes_in(self) -> int:
        """Bytes in the source."""
        return self.source.nbytes if self.origin is None else self.origin.nbytes

    @property
    def scheme(self) -> str | None:
        """The scheme, None where it is not quantized."""
        return None if self.stored is None else self.stored.scheme.name

    @property
    def layer(self) -> tuple[str, int] | None:
        """The stack of layers and the number in it, None outside of layers."""
        found = _LAYER.match(self.name)
        return (found[1], int(found[2])) if found else None


def pairs_of(out: Checkpoint, source: Checkpoint, recipe: Recipe | None = None) -> list[Pair]:
    """All tensors of the source with what they became, from headers.

    ``recipe``: the one ``out`` was made by, where that declares groups or layouts of experts.
    Raises CheckpointError for a tensor that is missing, or has another shape.
    """
    rows: dict[str, Any] = {}
    if recipe is not None:
        rows = {"extra_groups": recipe.groups, "extra_experts": recipe.experts}
    family = Family(source.config, **rows)
    origins, tensors = weights_in(source, family, look(out).format, out.tensors.keys())
    stored = find_stored(out)
    pairs = []
    for t in tensors:
        s, origin = stored.get(t.name), origins.get(t.name)
        if s is not None:
            if s.shape != t.shape:
                raise CheckpointError(
                    f"{t.name!r} is {text_of((t.dtype, t.shape))} in {source.place} and of shape "
                    f"{list(s.shape)} in {out.place}; give the source that it was made from."
                )
            pairs.append(Pair(t, origin, s, None, s.nbytes))
            continue
        kept = out.tensors.get(stack_of(t.name) or t.name)
        if kept is None:
            raise CheckpointError(
                f"{t.name!r} of {source.place} is not in {out.place}; give the source that it was "
                "made from."
            )
        parts = kept.shape[0] if stack_of(t.name) else 1
        pairs.append(Pair(t, origin, None, kept.dtype, kept.nbytes // parts))
    return pairs


def measure(
    out: Checkpoint, source: Checkpoint, pairs: list[Pair], workers: int,
    progress: Callable[[int, str], None] | None = None,
) -> Quality:  # fmt: skip
    """What the quantized weights lost, from both checkpoints, a slab of each at a time."""
    from streamq.kernels import cpu

    quality = Quality(detailed=True)

    def one(pair: Pair) -> None:
        s = pair.stored
        if s is not None:
            for first, rows in slabs_of(s, pair.source, pair.origin):
                x = source_rows(source, pair.source, pair.origin, first, rows, s.layout.cols)
                q, outer = _as_kernels_give(read_rows(out, s, first, rows), s.scheme, rows)
                none = np.zeros(rows, np.int64)
                sums, bins = cpu.losses(x, q, s.scheme, BYTES, outer, none)
                quality.add_losses([pair.name], sums.tolist(), bins)
        if progress:
            progress(pair.bytes_in, pair.name)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, pairs))
    return quality


def _as_kernels_give(q: Quantized, scheme: Scheme, rows: int) -> tuple[Quantized, Array | None]:
    """Contiguous arrays, and the scale above the blocks for each row."""
    above = q.scale if scheme.whole_tensor else q.global_scale
    outer = None
    if above is not None and scheme.needs_amax:
        outer = np.broadcast_to(above.astype(np.float32).reshape(-1), rows).copy()
    zero = None if q.zero_point is None else np.ascontiguousarray(q.zero_point)
    codes, scale = np.ascontiguousarray(q.codes), np.ascontiguousarray(q.scale)
    return replace(q, codes=codes, scale=scale, zero_point=zero), outer
