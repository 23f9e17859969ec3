"""The verbs of the command line for Python. Heavy imports wait until one of them is called."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal

from streamq.errors import PlanError

if TYPE_CHECKING:
    from streamq.compressing import Summary as Compressed
    from streamq.compressing import Unpacked
    from streamq.converting import Settings, Summary
    from streamq.planning import Options, Plan
    from streamq.reindexing import Summary as Reindexed
    from streamq.stored import Tensors
    from streamq.verifying import Report

Path = str | os.PathLike[str]


def options(
    scheme: str | None = None,
    *,
    recipe: Path | Mapping[str, Any] | None = None,
    format: str | None = None,
    group_size: int | None = None,
    scales: str = "absmax",
    ignore: Iterable[str] = (),
    only: Iterable[str] = (),
    numerics: str = "f32",
    input_scale: float = 1.0,
    shard_size: int | None = None,
    requantize: bool = False,
    check_tp: Iterable[int] = (),
    **of_format: Any,
) -> Options:
    """What a conversion should do, as the options of the command line spell it.

    ``scheme``: a preset such as "nvfp4a16", or "bf16". ``recipe``: a file or its contents, see
    docs/recipes.md; ``scheme`` is then for what no rule names. ``format``: see ``streamq formats``.
    ``shard_size``: bytes. ``check_tp``: numbers of tensor-parallel ranks; blocks that they would
    cut are warnings. Raises PlanError for what is not known or does not fit together.
    """
    from streamq.formats import named
    from streamq.planning import Options
    from streamq.recipe import load
    from streamq.schemes import ASCEND, has_groups, resolve

    if not (isfinite(input_scale) and input_scale > 0):
        raise PlanError(f"--input-scale must be above zero, got {input_scale}.")
    for name, value, known in (
        ("--scales", scales, ("absmax", "search")), ("--numerics", numerics, ("f32", "weight")),
    ):  # fmt: skip
        if value not in known:
            raise PlanError(f"{name} must be {' or '.join(known)}, got {value!r}.")
    given = {k: v for k, v in of_format.items() if v is not None}
    if scheme is not None and scheme.upper() in ASCEND:
        if format not in (None, "ascend"):
            raise PlanError(f"{scheme} is a name of the format ascend, not of {format}.")
        format = "ascend"
    if given and format is None:
        option = "--" + next(iter(given)).replace("_", "-")
        raise PlanError(f"{option} needs a --format that has it.")
    rules = None

    def group_of(named_in: str | None) -> int | None:
        found = format or named_in
        return named(found).group_size if found else None

    if recipe is not None:
        rules = load(recipe, scales, group_of)
        format = format or rules.format
    if scheme is not None:
        size = group_of(format) if group_size is None and has_groups(scheme) else group_size
        chosen = replace(resolve(scheme, size), scales=scales)  # type: ignore[arg-type]
    if rules is not None:
        if scheme is not None:
            rules = replace(rules, scheme=chosen)
        elif group_size is not None:
            raise PlanError("--group-size is for --scheme; rules have a group_size of their own.")
        if not rules.schemes:
            raise PlanError("the recipe gives nothing a scheme; add a rule, or use --scheme.")
        chosen, ignore = rules.schemes[0], (*ignore, *rules.ignore)
    elif scheme is None:
        raise PlanError("a scheme or a recipe is needed.")
    return Options(
        chosen, tuple(ignore), tuple(only), numerics, shard_size, input_scale,  # type: ignore[arg-type]
        named(format, **given) if format else None, requantize, rules,
        tuple(check_tp),
    )  # fmt: skip


def plan(src: Path, scheme: str | None = None, **how: Any) -> Plan:
    """What a conversion of the checkpoint ``src`` would do; see ``options`` for ``how``.

    Reads headers only. Raises StreamqError, naming the tensor, for what cannot be done.
    """
    from streamq.checkpoint import open_checkpoint
    from streamq.planning import make_plan

    with open_checkpoint(src) as source:
        return make_plan(source, options(scheme, **how))


def convert(
    src: Path,
    dst: Path,
    scheme: str | None = None,
    *,
    settings: Settings | None = None,
    engine: str = "local",
    **how: Any,
) -> Summary:
    """Convert the checkpoint ``src`` into the new directory ``dst``; see ``options`` for ``how``.

    ``dst`` may be ``hf://org/repo``, see ``Settings.upload``. ``engine``: "local", or "ray",
    "ray:HOST:PORT" and so on, see docs/ray.md. Raises StreamqError; ``dst`` is then as it was.
    """
    from streamq.checkpoint import open_checkpoint
    from streamq.converting import Settings
    from streamq.converting import convert as run
    from streamq.engines import opened
    from streamq.planning import make_plan, refuse_overlap

    refuse_overlap(src, dst)
    s = settings or Settings()
    with (
        opened(engine, src) as where,
        open_checkpoint(src, spool=s.spool, spool_dir=s.spool_dir) as source,
    ):
        return run(source, make_plan(source, options(scheme, **how)), dst, s, where)


def reindex(
    src: Path,
    dst: Path,
    *,
    fuse: bool = False,
    split: bool = False,
    rename: Iterable[tuple[str, str]] = (),
    shard_size: int | None = None,
    settings: Settings | None = None,
) -> Reindexed:
    """Re-shard the checkpoint ``src`` into the new directory ``dst``, without quantizing.

    Fused groups come into one shard. ``fuse``: concatenate q, k and v, gate and up. ``split``:
    take apart what is concatenated. ``rename``: regexes over names of tensors, with what they
    become. ``shard_size``: bytes. Raises StreamqError; ``dst`` is then as it was.
    """
    from streamq.checkpoint import open_checkpoint
    from streamq.converting import Settings, default_workers
    from streamq.planning import refuse_overlap
    from streamq.reindexing import Options, make_plan
    from streamq.reindexing import reindex as run

    refuse_overlap(src, dst)
    s = settings or Settings()
    with open_checkpoint(src, spool=s.spool, spool_dir=s.spool_dir) as source:
        return run(
            source, make_plan(source, Options(fuse, split, shard_size, tuple(rename))), dst,
            workers=s.workers or default_workers(), max_memory=s.max_memory, sync=s.sync,
            overwrite=s.overwrite, restart=s.restart, sha256=s.sha256, progress=s.progress,
            notify=s.notify, limit_rate=s.limit_rate,
        )  # fmt: skip


def compress(
    src: Path,
    dst: Path,
    *,
    codec: Literal["zstd", "ascend"] = "zstd",
    dictionary: Literal["call", "tile"] = "call",
    disable_layers: Iterable[str] = (),
    transpose: bool = False,
    sparsity: str | None = None,
    tp: int | None = None,
    settings: Settings | None = None,
) -> Compressed:
    """Compress the checkpoint ``src`` into the new directory ``dst``, see docs/compress.md.

    ``sparsity``: "magnitude:0.5" keeps half of each row. Raises StreamqError; ``dst`` is then as
    it was.
    """
    from streamq.checkpoint import open_checkpoint
    from streamq.compressing import Options, make_plan
    from streamq.compressing import compress as run
    from streamq.compressing import sparsity as kept
    from streamq.converting import Settings, default_workers
    from streamq.planning import refuse_overlap

    refuse_overlap(src, dst)
    keep = kept(sparsity) if sparsity is not None else None
    options = Options(codec, dictionary, tuple(disable_layers), transpose, keep, tp)
    s = settings or Settings()
    with open_checkpoint(src, spool=s.spool, spool_dir=s.spool_dir) as source:
        return run(
            source, make_plan(source, options), dst, workers=s.workers or default_workers(),
            max_memory=s.max_memory, sync=s.sync, overwrite=s.overwrite, progress=s.progress,
        )  # fmt: skip


def decompress(src: Path, dst: Path, *, settings: Settings | None = None) -> Unpacked:
    """Write what ``compress`` was given into the new directory ``dst``.

    Raises StreamqError, naming what is damaged; ``dst`` is then as it was.
    """
    from streamq.compressing import Opened
    from streamq.compressing import decompress as run
    from streamq.converting import Settings, default_workers
    from streamq.planning import refuse_overlap

    refuse_overlap(src, dst)
    s = settings or Settings()
    return run(
        Opened(src), dst, workers=s.workers or default_workers(), max_memory=s.max_memory,
        sync=s.sync, overwrite=s.overwrite, progress=s.progress,
    )  # fmt: skip


def verify(
    dst: Path,
    source: Path | None = None,
    *,
    recipe: Path | Mapping[str, Any] | None = None,
    check_tp: Iterable[int] = (),
) -> Report:
    """Check a quantized checkpoint; with ``source``, every element of it. See ``Report``.

    Of a compressed directory every tensor is decoded, and compared with its check sum.

    ``recipe``: that of ``dst``, where it declares fused groups or layouts of experts.
    ``check_tp``: numbers of tensor-parallel ranks; what they would cut are warnings.
    """
    from contextlib import nullcontext

    from streamq.checkpoint import is_compressed, open_checkpoint
    from streamq.recipe import load
    from streamq.verifying import verify as run

    if is_compressed(dst):
        from streamq.compressing import verify as decode
        from streamq.converting import Settings, default_workers

        if source is not None:
            raise PlanError(f"{dst}: is compressed; it has check sums, and takes no source.")
        return decode(dst, workers=default_workers(), max_memory=Settings().max_memory)

    rows = load(recipe) if recipe is not None else None
    with open_checkpoint(source) if source is not None else nullcontext() as original:
        return run(dst, original, recipe=rows, check_tp=tuple(check_tp))


def open(path: Path) -> Tensors:
    """The tensors of a checkpoint, names with arrays, each read when it is looked at.

    Quantized weights come dequantized, f32 ``[rows, cols]``, under the names they had; the
    rest as it is stored: ``for name, array in streamq.open(path): ...``.
    """
    from streamq.stored import open_tensors

    return open_tensors(path)
