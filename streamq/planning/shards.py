"""What a tensor-parallel cut would split: blocks of scales, groups, packed words."""

from __future__ import annotations

from collections.abc import Iterable
from math import gcd

from streamq.families import collapse
from streamq.schemes import ALL, Scheme
from streamq.tensors import TensorInfo

from .types import ShardPlan

#: Last parts of modules whose rows, or whose columns, are shared out among ranks.
_ROWS = {
    "q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj", "w1", "w3",
    "wq", "wk", "wv", "query", "key", "value", "in_proj_qkv", "in_proj_z", "in_proj_qkvz",
    "in_proj_a", "in_proj_b", "in_proj_ba", "q_b_proj", "kv_b_proj", "c_fc", "fc1",
    "dense_h_to_4h", "query_key_value",
}  # fmt: skip
_COLUMNS = {
    "o_proj", "down_proj", "w2", "wo", "out_proj", "fc2", "c_proj", "dense_4h_to_h", "dense",
}  # fmt: skip
#: Those that ranks have copies of where they are more than the heads.
_HEADS = {"k_proj", "v_proj", "key", "value", "wk", "wv"}


def check_tp(shards: list[ShardPlan], sizes: tuple[int, ...], heads: int | None) -> list[str]:
    """Warnings for weights of a plan that ``sizes`` ranks cannot share; see ``cuts_of``."""
    if not sizes:
        return []
    weights = [(t, w.scheme) for shard in shards for w in shard.weights for t in w.sources]
    return cuts_of(weights, sizes, heads)


def cuts_of(
    weights: Iterable[tuple[TensorInfo, Scheme]], sizes: tuple[int, ...], heads: int | None
) -> list[str]:
    """Warnings for weights that ``sizes`` ranks cannot share, one for each kind and reason.

    ``heads``: those of keys and values, None where that is not known.
    """
    found: dict[tuple[int, str, str], list[TensorInfo]] = {}
    for t, scheme in weights:
        for ranks in sizes:
            if why := _split(t, scheme, ranks, heads or ranks):
                kind = collapse(t.name.removesuffix(".weight"))
                found.setdefault((ranks, kind, why), []).append(t)
    return [
        f"--check-tp {ranks}: {kind!r} of shape {list(tensors[0].shape)} ({len(tensors)} such "
        f"weights): {why}"
        for (ranks, kind, why), tensors in sorted(found.items())
    ]


def _split(t: TensorInfo, scheme: Scheme, ranks: int, heads: int) -> str | None:
    """What ranks would have to share of a weight, or None."""
    leaf = t.name.removesuffix(".weight").rpartition(".")[2]
    rows, cols = t.shape[0], t.shape[-1]
    high, wide = scheme.block
    if leaf in _HEADS:
        ranks = min(ranks, heads)
    if leaf in _ROWS:
        if rows % ranks:
            return f"{rows} rows are not a multiple of {ranks}"
        if high not in (1, ALL) and rows // ranks % high:
            return f"{rows // ranks} rows a rank would cut blocks of {high} rows"
        step = _rows_of_zeros(scheme)
        if rows // ranks % step:
            return f"{rows // ranks} rows a rank would cut words of {step} packed zero points"
    if leaf in _COLUMNS:
        if cols % ranks:
            return f"{cols} columns are not a multiple of {ranks}"
        part = cols // ranks
        if wide != ALL and part % wide:
            return f"{part} columns a rank would cut groups of {wide}"
        step = 32 // gcd(scheme.bits, 32) if scheme.element == "int" and scheme.bits < 8 else 1
        if part % step:
            return f"{part} columns a rank would cut words of {step} packed codes"
    return None


def _rows_of_zeros(scheme: Scheme) -> int:
    """Rows whose zero points fill whole words of compressed-tensors."""
    return 1 if scheme.symmetric else 32 // gcd(scheme.bits, 32)
