"""What a plan is made of: options, weights, copies, shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import lcm
from typing import Any, Literal, NamedTuple

import numpy as np

from streamq.checkpoint import Remote
from streamq.errors import PlanError
from streamq.formats import Format, Layout
from streamq.recipe import Recipe
from streamq.schemes import Numerics, Scheme
from streamq.stored import Where
from streamq.tensors import DTYPES, TensorInfo

Array = np.ndarray[Any, Any]

#: Default for ``--max-memory``: the buffers of all workers together, in bytes.
MAX_MEMORY = 512 << 20
#: What Python, numpy and numba take before the first buffer, in bytes (measured, x86-64).
BASE_MEMORY = 141 << 20
#: What the plan takes for each output tensor, in bytes (70,020 weights: 540 to 600).
TENSOR_MEMORY = 570
#: Source bytes of one slab: 1 to 4 MiB are all within 5%, and 1 MiB stays in the L2 cache.
SLAB = 1 << 20
#: What is gathered of transposed outputs before it is written, line by line, in bytes.
STRIP = 32 << 20


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asks for; two runs with equal options write equal bytes.

    ``format``: where None, the default of the scheme. ``requantize``: also take weights
    that are quantized to something else already. ``recipe``: overrides ``scheme`` but for what no
    rule names, if it has one for that. ``check_tp``: numbers of ranks that are to share weights.
    """

    scheme: Scheme
    ignore: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    numerics: Numerics = "f32"
    shard_size: int | None = None
    input_scale: float = 1.0
    format: Format | None = None
    requantize: bool = False
    recipe: Recipe | None = None
    check_tp: tuple[int, ...] = ()


#: What a weight is made from: a tensor of floats, a view in one, the values of its codes, or
#: its codes.
Origin = Literal["floats", "views", "values", "codes"]


class Target(NamedTuple):
    """What becomes of a weight. ``scheme``: with the scale dtype of this weight."""

    scheme: Scheme
    format: Format
    origin: Origin
    numerics: Numerics = "f32"


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """Weights of one shard that share a target and a dtype, as columns with a row for each.

    Ordered by step, then as in the source. Columns, because the same as one object a weight
    costs more than reading, quantizing and writing a weight of 64 KB.

    ``layouts``: the distinct ones, ``kind`` (``[n]``) the row's number among them.
    ``steps``: ``[n]``, the same number for weights that share the scale above the blocks.
    ``places``: ``[n, 2]``, the number of the source file and the absolute offset in it.
    ``starts``: ``[n, entries]``, absolute offsets of the entries of the layout in the shard.
    ``stored``: what each is in the source where it is not a tensor of floats; the values of
    codes are f32, and ``sources`` names the weight as it was before.
    """

    target: Target
    dtype: str
    sources: list[TensorInfo]
    layouts: list[Layout]
    kind: Array
    steps: Array
    places: Array
    starts: Array
    stored: Sequence[Where] | None = None

    @property
    def scheme(self) -> Scheme:
        """The scheme of the target."""
        return self.target.scheme

    @property
    def needs_amax(self) -> bool:
        """Whether all rows of a step are looked at before any is quantized."""
        return self.target.origin != "codes" and self.scheme.needs_amax

    def row_step(self, row: int) -> int:
        """Rows that a slab of a weight is a multiple of, in what is read and in what is written."""
        step = self.layouts[int(self.kind[row])].row_step
        return step if self.stored is None else lcm(step, self.stored[row].row_step)

    @property
    def numpy(self) -> np.dtype[Any]:
        """The numpy dtype of the weights; every float that is quantized has one."""
        dtype = DTYPES[self.dtype].numpy
        assert dtype is not None
        return dtype

    def pairs(self) -> Iterator[tuple[TensorInfo, Layout]]:
        """Each weight with its layout."""
        return zip(self.sources, map(self.layouts.__getitem__, self.kind.tolist()), strict=True)

    def column(self, of: Callable[[Layout], int], rows: Array | slice = slice(None)) -> Array:
        """A number that follows from the layout, for each of some rows; int64 ``[rows]``."""
        return np.array([of(layout) for layout in self.layouts], np.int64)[self.kind[rows]]


class Copy(NamedTuple):
    """A tensor that stays as it is, and its absolute offset in the shard."""

    source: TensorInfo
    start: int


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One output file."""

    name: str
    weights: list[Weights]
    copies: list[Copy]
    names: list[str]  # of all tensors, in the order of their data, as JSON spells them
    header: bytes
    size: int


@dataclass(slots=True)
class Plan:
    """A conversion that can be carried out.

    ``files``: JSON files of the format beside config.json, by name; ``texts``: other files.
    ``verbatim``: the source is already what is wanted, its files are copied. ``remote``: what is
    known of a source that is not on this machine.
    """

    options: Options
    shards: list[ShardPlan]
    config: dict[str, Any]
    files: dict[str, dict[str, Any]]
    others: list[str]
    other_bytes: int
    unquantized: list[tuple[TensorInfo, str]]
    warnings: list[str]
    notes: list[str]
    bytes_in: int
    slab_memory: int
    input_files: int
    verbatim: bool = False
    remote: Remote | None = None
    texts: dict[str, str] = field(default_factory=dict)

    @property
    def schemes(self) -> dict[str, tuple[int, int]]:
        """Number and bytes of the weights of each scheme, by name."""
        found: dict[str, tuple[int, int]] = {}
        for shard in self.shards:
            for w in shard.weights:
                n, size = found.get(w.scheme.name, (0, 0))
                size += int(w.column(lambda layout: layout.bytes_out).sum())
                found[w.scheme.name] = (n + len(w.sources), size)
        return found

    @property
    def scheme_names(self) -> str:
        """The scheme, or those of a recipe, for people."""
        if self.options.recipe is None:
            return self.options.scheme.name
        asked = dict.fromkeys(s.name for s in self.options.recipe.schemes)
        found = self.schemes
        return ", ".join([*filter(found.get, asked), *(n for n in found if n not in asked)])

    @property
    def bytes_out(self) -> int:
        """Size of all output shards."""
        return sum(s.size for s in self.shards)

    @property
    def disk_needed(self) -> int:
        """Bytes on disk: shards, and the other files with the index (a rounded-up guess)."""
        return self.bytes_out + self.other_bytes + 200 * sum(len(s.names) for s in self.shards)

    def index(self) -> Iterator[str]:
        """Text of ``model.safetensors.index.json``, in the order of the data, in pieces.

        ``total_size`` counts tensor bytes. Joined by hand: json's encoder is in C only
        without indentation, and takes 1.1 s for 200,000 names with it.
        """
        total = sum(s.size - len(s.header) for s in self.shards)
        yield f'{{\n  "metadata": {{\n    "total_size": {total}\n  }},\n  "weight_map": {{'
        comma = ""
        for s in self.shards:
            between = f'": "{s.name}",\n    "'
            yield f'{comma}\n    "{between.join(s.names)}": "{s.name}"'
            comma = ","
        yield "\n  }\n}\n"

    def peak_memory(self, workers: int, held: int = 0) -> int:
        """Estimate of the peak resident size of the process, in bytes.

        ``held``: bytes that each worker keeps of the source for several outputs.
        """
        tensors = sum(len(s.names) for s in self.shards)
        return BASE_MEMORY + workers * (self.slab_memory + held) + TENSOR_MEMORY * tensors

    def workers_within(self, wanted: int, max_memory: int, held: int = 0) -> int:
        """As many workers as their buffers, and ``held`` bytes each, fit into ``max_memory``.

        Raises PlanError where not even one fits.
        """
        need = max(1, self.slab_memory + held)
        fit = max_memory // need
        if fit < 1:
            raise PlanError(
                f"--max-memory {max_memory >> 20}MiB is too little: the widest tensor needs "
                f"{-(-need >> 20)}MiB of buffers."
            )
        return min(wanted, fit)


def slab_rows(step: int, row_bytes: int, slab: int = SLAB) -> int:
    """Rows of one slab: about ``slab`` bytes of the source, a multiple of ``step``."""
    return max(step, slab // max(row_bytes, 1) // step * step)
