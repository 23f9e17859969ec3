"""Weights fused and cut for tensor-parallel ranks, as loaders do before they decompress.

q, k, v, gate and up are cut by rows and fused; o and down by columns, their biases stay on
the first rank and are zeros on the others; embeddings and head are cut by vocabulary, the
rest is on every rank. Key and value heads are repeated where there are more ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from streamq.checkpoint import Checkpoint
from streamq.errors import PlanError
from streamq.reindexing.fusing import FUSIONS
from streamq.stored import bytes_of
from streamq.tensors import TensorInfo

from .types import Run

MODEL_TYPES = ("llama", "qwen2", "qwen3")

_FUSED = {member: (fused, members) for fused, members in FUSIONS.items() for member in members}
_BY_COLUMNS = ("o_proj", "down_proj")
_BY_VOCABULARY = ("embed_tokens", "lm_head")
_FIRST_RANK_ONLY = ("bias", "quant_bias")
_DTYPES = ("I8", "F16", "BF16", "F32")


class Piece(NamedTuple):
    """A tensor of a rank. ``members``: the source tensors that it is made of; see Item."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    runs: tuple[Run, ...]
    members: tuple[TensorInfo, ...]


class Ranks:
    """Cuts a source for ``tp`` ranks. Raises PlanError for a model that it cannot cut."""

    def __init__(self, source: Checkpoint, tp: int) -> None:
        self._source, self._tp = source, tp
        config = source.config
        kind = config.get("model_type")
        if kind not in MODEL_TYPES:
            raise PlanError(
                f"--tp knows the models {', '.join(MODEL_TYPES)}, not {kind!r}; shard and fuse it "
                "with its loader first."
            )
        heads = config.get("num_attention_heads")
        if not isinstance(heads, int) or heads < 1 or heads % tp:
            raise PlanError(
                f"--tp {tp} does not divide the {heads} attention heads of the model "
                "(num_attention_heads in config.json); choose another number of ranks."
            )
        shared = config.get("num_key_value_heads") or heads
        if not isinstance(shared, int) or shared < 1 or (shared % tp and tp % shared):
            raise PlanError(
                f"--tp {tp} neither divides the {shared} key and value heads of the model "
                "(num_key_value_heads in config.json) nor is a multiple of them; choose another "
                "number of ranks."
            )
        self._heads_of = {"q_proj": heads, "k_proj": shared, "v_proj": shared}
        self._modules: dict[str, dict[str, TensorInfo]] = {}
        for t in source.tensors.values():
            module, _, suffix = t.name.rpartition(".")
            self._modules.setdefault(module, {})[suffix] = t

    def pieces(self, rank: int) -> Iterator[Piece]:
        """The tensors of a rank, in the order of the source."""
        for module, tensors in self._modules.items():
            parent, _, leaf = module.rpartition(".")
            if leaf not in _FUSED:
                for suffix, t in tensors.items():
                    yield self._cut(module, leaf, suffix, t, rank)
                continue
            fused, members = _FUSED[leaf]
            if leaf == members[0]:
                yield from self._fuse(f"{parent}.{fused}", [f"{parent}.{m}" for m in members], rank)
            elif f"{parent}.{members[0]}" not in self._modules:
                raise PlanError(f"{module!r} has no {members[0]} beside it to be fused with.")

    def _fuse(self, fused: str, members: list[str], rank: int) -> Iterator[Piece]:
        first = self._modules[members[0]]
        for member in members[1:]:
            if self._modules.get(member, {}).keys() != first.keys():
                raise PlanError(
                    f"{member!r} does not have the tensors of {members[0]!r}, with which it is "
                    "fused."
                )
        for suffix in first:
            parts = [
                self._cut(m, m.rpartition(".")[2], suffix, self._modules[m][suffix], rank)
                for m in members
            ]
            yield self._joined(f"{fused}.{suffix}", parts, self._scalar(members[0], suffix))

    def _joined(self, name: str, parts: list[Piece], scalar: bool) -> Piece:
        head, *others = parts
        for other in others:
            a, b = head.members[0], other.members[0]
            if head.dtype != other.dtype or head.shape[1:] != other.shape[1:]:
                raise PlanError(
                    f"{a.name!r} is {a.dtype} {list(a.shape)} and {b.name!r} {b.dtype} "
                    f"{list(b.shape)}: these cannot be fused."
                )
            if scalar and self._bytes(a) != self._bytes(b):
                raise PlanError(
                    f"{b.name!r} is not equal to {a.name!r}, and a fused weight has one of them."
                )
        members = tuple(p.members[0] for p in parts)
        if scalar:
            return head._replace(name=name, members=members)
        shape = (sum(p.shape[0] for p in parts), *head.shape[1:])
        runs = tuple(run for p in parts for run in p.runs)
        return Piece(name, head.dtype, shape, runs, members)

    def _cut(self, module: str, leaf: str, suffix: str, t: TensorInfo, rank: int) -> Piece:
        """What a rank has of a tensor, before it is fused."""
        if leaf in _BY_COLUMNS:
            self._scalar(module, suffix)
            if suffix == "weight":
                return self._columns(t, rank)
            if suffix in _FIRST_RANK_ONLY and rank:
                return Piece(t.name, t.dtype, t.shape, (), (t,))
        elif leaf in self._heads_of and not self._scalar(module, suffix):
            return self._heads(t, self._heads_of[leaf], rank)
        elif (leaf in _FUSED and not self._scalar(module, suffix)) or leaf in _BY_VOCABULARY:
            what = "its rows" if leaf in _FUSED else "the vocabulary"
            return self._rows(t, self._share(t, t.shape[0], what), rank)
        return self._rows(t, None, 0)

    def _scalar(self, module: str, suffix: str) -> bool:
        """Whether a tensor is one number for all rows. Raises PlanError for what is not known."""
        t, weight = self._modules[module][suffix], self._modules[module].get("weight")
        if weight is None or len(weight.shape) != 2 or weight.dtype not in _DTYPES:
            raise PlanError(
                f"the weight of {module!r} is no matrix in {', '.join(_DTYPES)}, which --tp cuts."
            )
        if t is weight or (t.shape[:1] == weight.shape[:1] and t.numel == weight.shape[0]):
            return False
        if t.numel == 1:
            return True
        raise PlanError(
            f"tensor {t.name!r} of shape {list(t.shape)} has neither one number nor one for each "
            f"row of {weight.name!r}; --tp cannot cut it."
        )

    def _heads(self, t: TensorInfo, heads: int, rank: int) -> Piece:
        if t.shape[0] % heads:
            raise PlanError(
                f"tensor {t.name!r} has {t.shape[0]} rows, which the {heads} heads in config.json "
                "do not divide."
            )
        rows = t.shape[0] // heads
        if heads >= self._tp:
            return self._rows(t, rows * heads // self._tp, rank)
        return self._rows(t, rows, rank // (self._tp // heads))

    def _share(self, t: TensorInfo, n: int, what: str) -> int:
        if n % self._tp:
            raise PlanError(
                f"--tp {self._tp} does not divide {what} of {t.name!r}, {n}; choose another "
                "number of ranks."
            )
        return n // self._tp

    @staticmethod
    def _rows(t: TensorInfo, rows: int | None, number: int) -> Piece:
        """Block ``number`` of ``rows`` rows of a tensor, or all of it."""
        total = t.shape[0] if t.shape else 1
        count = total if rows is None else rows
        width = t.nbytes // total if total else 0
        run = Run(t.file, t.start + number * count * width, count, width, width)
        return Piece(t.name, t.dtype, (count, *t.shape[1:]) if t.shape else (), (run,), (t,))

    def _columns(self, t: TensorInfo, rank: int) -> Piece:
        n, k = t.shape
        cols = self._share(t, k, "the columns")
        step = t.nbytes // n
        run = Run(t.file, t.start, n, step // self._tp, step, rank * step // self._tp)
        return Piece(t.name, t.dtype, (n, cols), (run,), (t,))

    def _bytes(self, t: TensorInfo) -> bytes:
        return bytes_of(self._source, t, 0, t.nbytes)
