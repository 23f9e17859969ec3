"""Which tensors are compressed, how, and why the others are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from streamq.checkpoint import Checkpoint
from streamq.errors import PlanError
from streamq.families import Family, matcher
from streamq.formats.ascend import description_of
from streamq.formats.ascend_description import COMPRESSED, FILE, Description
from streamq.schemes import PLAIN
from streamq.tensors import FLOATS, TensorInfo

from .types import Coding, Options, is_tiled

#: Less than this, in bytes, is not worth a frame and its index.
SMALL, SMALL_SAID = 4096, "small"
#: The types that the sparse codec takes: what they are called then, the dtype, the mode.
SPARSE: dict[str, tuple[str, str, Coding]] = {
    "W8A8S": ("W8A8SC", "I8", "low"),
    "W16A16S": ("W16A16SC", "F16", "high"),
}


class Choice(NamedTuple):
    """How a tensor is stored. ``why``: the reason if it is stored as it is."""

    coding: Coding
    keep: float | None = None
    why: str = ""


Chooser = Callable[[TensorInfo], Choice]


def described(source: Checkpoint) -> tuple[str, Description] | None:
    """The name of Ascend's description of the source and what it says, None where it has none."""
    usual = source.root / FILE
    found = [usual] if usual.is_file() else [*source.root.glob(f"{usual.stem}_*{usual.suffix}")]
    # Of several older ones opening the source took none.
    return (found[0].name, description_of(source.config)) if len(found) == 1 else None


def chooser(source: Checkpoint, options: Options, said: Description | None) -> Chooser:
    """The choice for each tensor of the source.

    Raises PlanError where the codec cannot take the source, here or for one of its tensors.
    """
    if (
        options.codec == "ascend"
        and said is not None
        and (old := set(said.types.values()) & {*COMPRESSED})
    ):
        raise PlanError(f"{source.place}: its weights are {old.pop()}, so compressed already.")
    if options.keep is not None and said is not None:
        raise PlanError(
            f"--sparsity is for float checkpoints, and {source.place} has a {FILE}: its types and "
            "its quant_bias were made for the weights as they are; prune before quantizing."
        )
    test = matcher(options.disable)

    def disabled(t: TensorInfo) -> bool:
        return test(t.name) or test(t.name.removesuffix(".weight"))

    choose = _zstd(source, options) if options.codec == "zstd" else _ascend(source, options, said)
    return lambda t: Choice("raw", why="--disable-layers") if disabled(t) else choose(t)


def _pruned(source: Checkpoint, options: Options) -> Callable[[TensorInfo], str | None]:
    """A function from a tensor to the reason why it is not pruned, None where it is."""
    left = Family(source.config).left_alone(PLAIN["F16"])

    def why(t: TensorInfo) -> str | None:
        module = t.name.removesuffix(".weight")
        if module == t.name or len(t.shape) != 2 or t.dtype not in FLOATS:
            return "not a matrix of floats"
        if not is_tiled(t.dtype, t.shape, options.transpose):
            return _SHAPE
        return left(module)

    return why


_SHAPE = "fewer than 16 rows or columns, or rows too long for tiles"


def _zstd(source: Checkpoint, options: Options) -> Chooser:
    pruned = _pruned(source, options)

    def choose(t: TensorInfo) -> Choice:
        keep = options.keep if options.keep is not None and pruned(t) is None else None
        if t.nbytes < SMALL and keep is None:
            return Choice("raw", why=SMALL_SAID)
        return Choice("zstd", keep)

    return choose


def _ascend(source: Checkpoint, options: Options, said: Description | None) -> Chooser:
    if said is not None:
        types = said.types
        if not {*types.values()} & {*SPARSE}:
            raise PlanError(
                f"{source.place}: its {FILE} has no W8A8S and no W16A16S weight, and only these "
                "become something that a loader decompresses; use --codec zstd."
            )
        return lambda t: _typed(t, types.get(t.name, "no type"), options)
    if options.keep is None:
        raise PlanError(
            f"{source.place}: without a {FILE} there is no W8A8S or W16A16S weight for --codec "
            "ascend; give --sparsity magnitude:R for a checkpoint in f16, or use --codec zstd."
        )
    pruned = _pruned(source, options)

    def choose(t: TensorInfo) -> Choice:
        if (why := pruned(t)) is not None:
            return Choice("raw", why=why)
        if t.dtype != "F16":
            raise PlanError(
                f"tensor {t.name!r} is {t.dtype}, and --codec ascend takes F16; convert it with "
                "`streamq convert -s f16` first, or use --codec zstd."
            )
        return Choice("high", options.keep)

    return choose


def _typed(t: TensorInfo, kind: str, options: Options) -> Choice:
    """The choice for a tensor of a type of Ascend's."""
    if kind not in SPARSE or not t.name.endswith(".weight") or len(t.shape) != 2:
        return Choice("raw", why=kind if kind not in SPARSE else "not a matrix")
    _, dtype, coding = SPARSE[kind]
    if t.dtype != dtype:
        raise PlanError(
            f"tensor {t.name!r} is {t.dtype}, and {FILE} says {kind}, which is {dtype}; one of "
            "them is wrong."
        )
    if not is_tiled(t.dtype, t.shape, options.transpose):
        return Choice("raw", why=_SHAPE)
    return Choice(coding)
