"""q, k and v as the one weight that gpt-fast has of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from streamq.checkpoint import Checkpoint
from streamq.errors import PlanError
from streamq.formats import Format, GptFast
from streamq.tensors import FLOATS
from streamq.views import Array, Joined


def joined_of(source: Checkpoint, fmt: Format) -> dict[str, Joined]:
    """``layers.N.attention.wqkv.weight`` of every layer, by name, where the format wants it.

    gpt-fast rotates neighbouring pairs of a head, Hugging Face its halves: rows of q and k
    are permuted so that pair i is rows i and i + head_dim / 2 of the head.
    Raises PlanError where q, k and v do not lie as a llama has them.
    """
    if not isinstance(fmt, GptFast) or not fmt.names:
        return {}
    joined = {}
    for q in source.tensors.values():
        if not q.name.endswith(".self_attn.q_proj.weight"):
            continue
        names = [q.name.replace("q_proj", f"{p}_proj") for p in "qkv"]
        members = tuple(t for n in names if (t := source.tensors.get(n)) is not None)
        if len(members) < 3 or len({(t.dtype, t.shape[1:]) for t in members}) > 1:
            raise PlanError(
                f"{q.name!r} has no k_proj and v_proj of its dtype and width beside it."
            )
        if q.dtype not in FLOATS:
            raise PlanError(f"{q.name!r} is {q.dtype}; gpt-fast's names are for float sources.")
        size = _head_dim(source.config, q.shape[0])
        if any(t.shape[0] % size for t in members):
            raise PlanError(f"{q.name!r} and its k_proj are not whole heads of {size} rows.")
        orders = (_order(members[0].shape[0], size), _order(members[1].shape[0], size), None)
        name = fmt.named_as(q.name).replace(".wq.", ".wqkv.")
        joined[name] = Joined(members, orders)
    return joined


def _head_dim(config: dict[str, Any], rows: int) -> int:
    heads = config.get("num_attention_heads")
    size = config.get("head_dim") or (rows // heads if isinstance(heads, int) and heads else 0)
    if not isinstance(size, int) or size < 2 or size % 2:
        raise PlanError("config.json: num_attention_heads or head_dim must say how wide a head is.")
    return size


def _order(rows: int, size: int) -> Array:
    """Rows of every head, ``[2, size / 2]`` turned to ``[size / 2, 2]``."""
    order: Array = np.arange(rows).reshape(-1, 2, size // 2).transpose(0, 2, 1).reshape(-1)
    return order
