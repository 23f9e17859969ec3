"""A kernel knows a row and a column; a user wants the tensor."""

from __future__ import annotations

import numpy as np

from streamq.errors import NonFiniteError, StreamqError
from streamq.kernels.reference import E4M3
from streamq.schemes import Quantized

from .slabs import Slab


class telling:
    """Gives a NonFiniteError the name of the tensor and the place in it."""

    def __init__(self, slab: Slab, width: int) -> None:
        self._slab = slab
        self._width = width

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, NonFiniteError):
            return
        slab = self._slab
        at = error.row * self._width + error.col
        number = int(np.searchsorted(slab.ends, at, "right"))
        t = slab.weights.sources[slab.members[number]]
        cols = slab.weights.layouts[int(slab.weights.kind[slab.members[number]])].cols
        row, col = divmod(at - (int(slab.ends[number - 1]) if number else 0), cols)
        row += slab.first
        if error.what != "weight":
            raise StreamqError(
                f"tensor {t.name!r}: the {error.what} of group {col} in row {row} is not "
                "finite in its dtype; leave this tensor unquantized with --ignore."
            ) from None
        raise StreamqError(
            f"tensor {t.name!r} in {t.file}: row {row}, column {col} is NaN or Inf; "
            "the checkpoint is damaged, or leave this tensor unquantized with --ignore."
        ) from None


def refuse_damaged(slab: Slab, q: Quantized) -> None:
    """Raise StreamqError for scales or codes of a source that are NaN or infinite."""
    powers = q.scale.dtype == np.uint8
    bad = q.scale == 255 if powers else ~np.isfinite(q.scale.astype(np.float32))
    what = "scale"
    if not bad.any() and q.codes.dtype == E4M3:
        bad, what = (q.codes.view(np.uint8) & 127) == 127, "code"
    if bad.any():
        last = slab.first + int(slab.ends[0]) // slab.layout.cols - 1
        raise StreamqError(
            f"tensor {slab.head.name!r}: a {what} of rows {slab.first} to {last} is not finite; "
            "the checkpoint is damaged."
        )
    g = q.global_scale
    if g is not None and not (np.isfinite(g).all() and (g > 0).all()):
        raise StreamqError(
            f"tensor {slab.head.name!r}: its global scale is {g.flat[0]:g}; the checkpoint is "
            "damaged."
        )
