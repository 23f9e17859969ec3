"""Carry out plans: N workers, each with its own buffers; DST appears at the end."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from streamq.checkpoint import CONFIG, Checkpoint
from streamq.errors import PlanError
from streamq.pace import FREE, Pace
from streamq.planning import MAX_MEMORY, Plan
from streamq.quality import Quality
from streamq.schemes import BYTES
from streamq.trust import fingerprint
from streamq.writer import Destination, check_destination, same_disk

from .devices import Means, is_quantized, means
from .jobs import JOB
from .origin import identity_of, origin_of
from .run import Run, Target
from .worker import Progress

if TYPE_CHECKING:
    from .fleet import Fleet

__all__ = [
    "Means", "Output", "Progress", "Settings", "Summary", "convert", "convert_all",
    "default_workers", "means_of", "repeat",
]  # fmt: skip

INDEX = "model.safetensors.index.json"

#: Kernels that are in the cache on disk load in well under this; compiling takes longer.
SLOW_START = 0.7


@dataclass(frozen=True, slots=True)
class Settings:
    """How plans are carried out; no byte of an output depends on it.

    ``workers``: threads (default: the processors). ``max_memory``: bytes of buffers of
    all workers. ``sync``: flush to disk before an output appears. ``overwrite``: replace
    what is there, once the new one is complete. ``stats``: measure what the weights lose,
    with ``details`` all that a report shows of it. ``progress``: see ``Progress``. ``notify``: told
    sentences for people. ``restart``: discard what an interrupted run left. ``sha256``: note
    that of every file as well. ``device``: "cpu", "auto", "cuda", "npu", or several
    as in "cuda:0,cuda:1". ``device_memory``: bytes of each of them. ``limit_rate``: bytes of
    shards a second that all threads together read and write.
    """

    workers: int | None = None
    max_memory: int = MAX_MEMORY
    sync: bool = True
    overwrite: bool = False
    stats: bool = False
    details: bool = False
    progress: Progress | None = None
    notify: Callable[[str], None] | None = None
    restart: bool = False
    sha256: bool = False
    device: str = "cpu"
    device_memory: int | None = None
    limit_rate: int | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """A plan and the directory that it is carried out to."""

    plan: Plan
    dst: Path


@dataclass(frozen=True, slots=True)
class Summary:
    """What a conversion did; ``rounded`` scales of the source were not exact in the output.

    ``backend``: whose kernels ran, and where. ``resumed``: bytes of the output that an earlier
    run had written. ``remarks``: sentences about devices.
    """

    bytes_in: int
    bytes_out: int
    seconds: float
    workers: int
    backend: str
    quality: Quality | None
    rounded: int
    resumed: int = 0
    remarks: tuple[str, ...] = ()


def default_workers() -> int:
    """The processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def convert(
    source: Checkpoint, plan: Plan, dst: str | os.PathLike[str], settings: Settings = Settings()
) -> Summary:
    """Write the checkpoint that ``plan`` describes to the directory ``dst``."""
    (summary,) = convert_all(source, [Output(plan, Path(dst))], settings)
    return summary


def convert_all(
    source: Checkpoint, outputs: list[Output], settings: Settings = Settings()
) -> list[Summary]:
    """Carry out several plans for one source, which is read once.

    Goes on where an earlier run with the same plans was interrupted. Raises StreamqError; what
    is done then stays in ``dst.partial``, and notes on the exception say so.
    """
    began = time.perf_counter()
    means = means_of(outputs, settings)
    check_outputs(outputs, settings.overwrite)
    s = settings
    source.pace = Pace(s.limit_rate)
    targets = [Destination(o.dst, s.overwrite, s.sync, s.sha256, source.pace) for o in outputs]
    pairs = list(zip(outputs, targets, strict=True))
    progress = s.progress or (lambda n, name: None)
    prints = fingerprint(source.root, source.files, source.others)
    try:
        for output, target in pairs:
            target.begin(identity_of(output.plan, prints), s.restart)
        work = [(o.plan, t) for o, t in pairs if not o.plan.verbatim]
        run = Run(source, work, means.workers, progress, s.stats, s.details, means.fleet)
        resumed = [_resumed(source, o, t, s) for o, t in pairs]
        if run.unmeasured:
            _say(s, "an earlier run measured less; what it has done is not in the figures")
        cpu = run.run(lambda: _load_kernels([plan for plan, _ in work], s, means.fleet)).NAME
        for output, target in pairs:
            finish(source, output.plan, target, progress)
        source.refuse_changed()
        for output, target in pairs:
            target.commit(origin_of(output.plan, prints))
    except BaseException as e:
        for target in targets:
            if target.begun and target.partial.exists():
                e.add_note(
                    f"{target.dst} was not written; {target.partial} stays, the same command goes "
                    "on from there."
                )
        raise
    finally:
        source.pace = FREE
        for target in targets:
            target.close()
        if means.fleet:
            means.fleet.close()
    seconds = time.perf_counter() - began
    measured = iter(run.measured)
    backend = means.backend(cpu)
    remarks = (*means.remarks, *(means.fleet.remarks(cpu) if means.fleet else ()))
    summaries = []
    for plan, before in zip((o.plan for o in outputs), resumed, strict=True):
        ran, (quality, rounded) = (
            ("copied", (None, 0)) if plan.verbatim else (backend, next(measured))
        )
        summaries.append(
            Summary(
                plan.bytes_in,
                plan.bytes_out,
                seconds,
                means.workers,
                ran,
                quality,
                rounded,
                before,
                remarks,
            )
        )
    return summaries


def _resumed(source: Checkpoint, output: Output, target: Destination, settings: Settings) -> int:
    """Say how far an earlier run came; bytes of its shards that are there."""
    plan = output.plan
    names = source.files if plan.verbatim else [shard.name for shard in plan.shards]
    if said := target.how_far(names, plan.bytes_out):
        _say(settings, said)
    done = sum(map(target.bytes_of, names))
    if settings.progress and done:
        settings.progress(plan.bytes_in * done // plan.bytes_out, "")
    return done


def _say(settings: Settings, line: str) -> None:
    if settings.notify:
        settings.notify(line)


def repeat(source: Checkpoint, plan: Plan, target: Target, settings: Settings) -> Quality | None:
    """Give all that a conversion would write to ``target``; what the weights lost, if asked for."""
    progress = settings.progress or (lambda n, name: None)
    work = [] if plan.verbatim else [(plan, target)]
    wanted = settings.workers or default_workers()
    workers = plan.workers_within(wanted, settings.max_memory)
    run = Run(source, work, workers, progress, settings.stats, settings.details)
    run.run(lambda: _load_kernels([plan for plan, _ in work], settings, None))
    finish(source, plan, target, progress)
    return run.measured[0][0] if run.measured else None


def means_of(outputs: list[Output], settings: Settings) -> Means:
    """As many threads as memory allows, and devices; see ``Means``.

    With several outputs each thread holds what it reads. Raises PlanError where memory does
    not hold one, and for a device that cannot be used.
    """
    return means(
        [o.plan for o in outputs], settings.device, settings.workers or default_workers(),
        settings.max_memory, settings.device_memory, JOB if len(outputs) > 1 else 0,
        settings.stats,
    )  # fmt: skip


def refuse_entangled(folders: list[Path]) -> None:
    """Raise PlanError where one output would lie in another, or be built where another is."""
    taken: list[tuple[Path, Path]] = []
    for folder in folders:
        places = [folder.resolve(), folder.with_name(folder.name + ".partial").resolve()]
        for place in places:
            for other, of in taken:
                if place == other or place in other.parents or other in place.parents:
                    raise PlanError(f"the outputs {of} and {folder} overlap; choose other places.")
        taken += [(place, folder) for place in places]


def check_outputs(outputs: list[Output], overwrite: bool) -> int:
    """Everything about the destinations that can be known before writing.

    Returns the free bytes of the first. Raises WriteError; those on one disk share it.
    """
    refuse_entangled([o.dst for o in outputs])
    free = []
    for o in outputs:
        together = sum(p.plan.disk_needed for p in outputs if same_disk(p.dst, o.dst))
        free.append(check_destination(o.dst, together, overwrite))
    return free[0]


def finish(source: Checkpoint, plan: Plan, target: Target, progress: Progress) -> None:
    """All files but the shards; all files at all of a source that is what is wanted."""
    if plan.verbatim:
        index = [path.name for path in source.root.glob("*.safetensors.index.json")]
        for name in [*source.others, *index, *source.files]:
            target.copy_file(source.root / name, name, keep=name in source.files)
            progress(sum(t.nbytes for t in source.tensors.values() if t.file == name), name)
        return
    for name in plan.others:
        if name != CONFIG and name not in plan.files and name not in plan.texts:
            target.copy_file(source.root / name, name)
    if len(plan.shards) > 1:
        target.write_text(INDEX, plan.index())
    for name, value in {**plan.files, CONFIG: plan.config}.items():
        target.write_json(name, value)
    for name, text in plan.texts.items():
        target.write_text(name, [text])


def _load_kernels(
    plans: list[Plan], settings: Settings, fleet: Fleet | None = None
) -> ModuleType:  # fmt: skip
    """Compile the CPU's kernels, or load them from the cache, before any thread needs them.

    Imported here and not above: numba takes 0.2 s, in which other threads already copy.
    """
    say = settings.notify or (lambda line: None)
    timer = threading.Timer(SLOW_START, lambda: _tell_of_compiling(say))
    timer.daemon = True
    timer.start()
    try:
        from streamq.kernels import cpu

        for target, packing, dtype in {
            (w.target, layout.packing if layout.entry("codes").direct else BYTES, w.numpy)
            for plan in plans
            for shard in plan.shards for w in shard.weights for layout in w.layouts
            if is_quantized(w) and not (fleet and fleet.takes(w))
        }:  # fmt: skip
            how = target.numerics, settings.stats, settings.details
            cpu.warm_up(target.scheme, packing, dtype, *how)
    finally:
        timer.cancel()
    return cpu


def _tell_of_compiling(say: Callable[[str], None]) -> None:
    """Say why the start takes so long, if that is why."""
    from streamq import kernels
    from streamq.compiled import COUNTS, home

    if not COUNTS.compiled:
        return
    if home(Path(kernels.__path__[0], "cpu")) is None:
        say(
            "compiling the CPU kernels for this run alone, as nowhere can they be kept; set "
            "NUMBA_CACHE_DIR to a directory that can be written"
        )
        return
    say("compiling the CPU kernels for this machine, once; later runs load them from the cache")
