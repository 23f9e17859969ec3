"""What a plan is made of: options, steps, shards."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from streamq.errors import PlanError
from streamq.formats.layout import Layout
from streamq.schemes import Numerics, Scheme
from streamq.tensors import TensorInfo
from streamq.writer import quoted

#: Default for ``--max-memory``: the buffers of all workers together, in bytes.
MAX_MEMORY = 512 << 20
#: What Python, numpy and numba take before the first buffer, in bytes (measured, x86-64).
BASE_MEMORY = 115 << 20
#: Source bytes of one slab: 1 to 4 MiB are all within 5%, and 1 MiB stays in the L2 cache.
SLAB = 1 << 20


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asks for; two runs with equal options write equal bytes."""

    scheme: Scheme
    ignore: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    numerics: Numerics = "f32"
    shard_size: int | None = None
    input_scale: float = 1.0


class Member(NamedTuple):
    """A weight that is quantized, and the absolute offsets of its entries in the shard."""

    source: TensorInfo
    layout: Layout
    starts: tuple[int, ...]


class Step(NamedTuple):
    """Weights that share a scheme and, where it has one, the global scale."""

    scheme: Scheme
    members: tuple[Member, ...]

    @property
    def nbytes(self) -> int:
        """Source bytes."""
        return sum([m.layout.bytes_in for m in self.members])

    @property
    def dtype(self) -> str:
        """Header dtype of the weights; members of a fused group have one."""
        return self.members[0].source.dtype


class Copy(NamedTuple):
    """A tensor that stays as it is, and its absolute offset in the shard."""

    source: TensorInfo
    start: int


@dataclass(slots=True)
class ShardPlan:
    """One output file."""

    name: str
    steps: list[Step] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    names: list[str] = field(default_factory=list)  # of all tensors, in the order of their data
    header: bytes = b""
    size: int = 0


@dataclass(slots=True)
class Plan:
    """A conversion that can be carried out."""

    options: Options
    shards: list[ShardPlan]
    config: dict[str, Any]
    others: list[str]
    other_bytes: int
    unquantized: list[tuple[TensorInfo, str]]
    warnings: list[str]
    notes: list[str]
    bytes_in: int
    slab_memory: int
    input_files: int

    @property
    def bytes_out(self) -> int:
        """Size of all output shards."""
        return sum(s.size for s in self.shards)

    @property
    def disk_needed(self) -> int:
        """Bytes on disk: shards, and the other files with the index (a rounded-up guess)."""
        return self.bytes_out + self.other_bytes + 200 * sum(len(s.names) for s in self.shards)

    @property
    def index(self) -> str:
        """Text of ``model.safetensors.index.json``, in the order of the data.

        ``total_size`` counts tensor bytes. Joined by hand: json's encoder is in C only
        without indentation, and takes 1.1 s for 200,000 names with it.
        """
        total = sum(s.size - len(s.header) for s in self.shards)
        lines = []
        for s in self.shards:
            between = f'": "{s.name}",\n    "'
            lines.append(f'    "{between.join(quoted(s.names))}": "{s.name}"')
        head = f'{{\n  "metadata": {{\n    "total_size": {total}\n  }},\n'
        return head + '  "weight_map": {\n' + ",\n".join(lines) + "\n  }\n}\n"

    def peak_memory(self, workers: int) -> int:
        """Estimate of the peak resident size of the process, in bytes."""
        tensors = sum(len(s.names) for s in self.shards)
        return BASE_MEMORY + workers * self.slab_memory + 1000 * tensors

    def workers_within(self, wanted: int, max_memory: int) -> int:
        """As many workers as their buffers fit into ``max_memory``.

        Raises PlanError where not even one fits.
        """
        fit = max_memory // self.slab_memory
        if fit < 1:
            raise PlanError(
                f"--max-memory {max_memory >> 20}MiB is too little: the widest tensor needs "
                f"{-(-self.slab_memory >> 20)}MiB of buffers."
            )
        return min(wanted, fit)


def slab_rows(layout: Layout, row_bytes: int) -> int:
    """Rows of one slab: about SLAB bytes of the source, a multiple of the layout's step."""
    step = layout.row_step
    return max(step, SLAB // max(row_bytes, 1) // step * step)
