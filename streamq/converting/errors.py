"""A kernel knows a row and a column; a user wants the tensor."""

from __future__ import annotations

import numpy as np

from streamq.errors import NonFiniteError, StreamqError

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
