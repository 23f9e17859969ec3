"""Carry out plans: N workers, each with its own buffers; DST appears at the end."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from streamq.checkpoint import SPOOL, Checkpoint
from streamq.hub import Committed, upload_memory
from streamq.planning import MAX_MEMORY, Plan
from streamq.quality import Quality
from streamq.schemes import BYTES
from streamq.writer import Destination, HubDestination, HubPlace, Upload, place_of

from .card import card_of
from .devices import Means, is_quantized, means
from .finish import finish
from .jobs import JOB
from .origin import identity_of, origin_of
from .places import Output, check_outputs, destination_of
from .reads import traffic_of
from .run import Run, Target
from .worker import Progress

if TYPE_CHECKING:
    from .fleet import Fleet

__all__ = [
    "Means", "Output", "Progress", "Settings", "Summary", "Upload", "check_outputs", "convert",
    "convert_all", "default_workers", "means_of", "repeat",
]  # fmt: skip

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
    as in "cuda:0,cuda:1". ``device_memory``: bytes of each of them. ``spool``: bytes on disk, in
    ``spool_dir``, of what a source on the Hub sent and is needed again. ``upload``: for outputs on
    the Hub.
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
    spool: int = SPOOL
    spool_dir: Path | None = None
    upload: Upload = field(default_factory=Upload)


@dataclass(frozen=True, slots=True)
class Summary:
    """What a conversion did; ``rounded`` scales of the source were not exact in the output.

    ``backend``: whose kernels ran, and where. ``resumed``: bytes of the output that an earlier
    run had written. ``remarks``: sentences about devices. ``downloaded``: bytes that came from
    the Hub, for all outputs together; None for a source on this machine. ``committed``: where an
    output on the Hub is.
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
    downloaded: int | None = None
    committed: Committed | None = None


def default_workers() -> int:
    """The processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def convert(
    source: Checkpoint, plan: Plan, dst: str | os.PathLike[str], settings: Settings = Settings()
) -> Summary:
    """Write the checkpoint that ``plan`` describes to ``dst``, a directory or ``hf://org/repo``."""
    (summary,) = convert_all(source, [Output(plan, place_of(dst, settings.upload))], settings)
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
    targets = [destination_of(o, s.overwrite, s.sync, s.sha256) for o in outputs]
    pairs = list(zip(outputs, targets, strict=True))
    progress = s.progress or (lambda n, name: None)
    prints = source.fingerprint()
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
        losses = dict(zip((id(t) for _, t in work), run.measured, strict=True))
        for output, target in pairs:
            if isinstance(target, HubDestination):
                if count := target.outlet.left:
                    _say(s, f"{target.name}: {count} converted shards are on their way there")
                quality, _ = losses.get(id(target), (None, 0))
                target.write_card(card_of(source, output, quality))
            target.commit(origin_of(output.plan, prints))
    except BaseException as e:
        for target in targets:
            if target.begun and target.partial.exists():
                e.add_note(
                    f"{target.name} was not written; {target.partial} stays, the same command goes "
                    "on from there."
                )
        raise
    finally:
        for target in targets:
            target.close()
        if means.fleet:
            means.fleet.close()
    seconds = time.perf_counter() - began
    measured = iter(run.measured)
    backend = means.backend(cpu)
    remarks = (*means.remarks, *(means.fleet.remarks(cpu) if means.fleet else ()))
    summaries = []
    for (output, target), before in zip(pairs, resumed, strict=True):
        plan = output.plan
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
                None if source.remote is None else source.received,
                target.committed,
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
    traffic = traffic_of([plan])
    held = 0 if traffic is None else traffic.held
    workers = plan.workers_within(wanted, max(settings.max_memory, held + plan.slab_memory), held)
    run = Run(source, work, workers, progress, settings.stats, settings.details)
    run.run(lambda: _load_kernels([plan for plan, _ in work], settings, None))
    finish(source, plan, target, progress)
    return run.measured[0][0] if run.measured else None


def means_of(outputs: list[Output], settings: Settings) -> Means:
    """As many threads as memory allows, and devices; see ``Means``.

    With several outputs each thread holds what it reads, and from the Hub as well. Raises
    PlanError where memory does not hold one, and for a device that cannot be used.
    """
    plans, held = [o.plan for o in outputs], JOB if len(outputs) > 1 else 0
    wanted = settings.workers or default_workers()
    traffic = traffic_of(plans)
    if traffic is not None:  # all that a job reads is in memory, and half of the jobs wait for it
        held, wanted = traffic.held, settings.workers or 2 * wanted
    found = means(
        plans, settings.device, wanted, settings.max_memory, settings.device_memory, held,
        settings.stats,
    )  # fmt: skip
    uploads = upload_memory() if any(isinstance(o.dst, HubPlace) for o in outputs) else 0
    return replace(found, traffic=traffic, uploads=uploads)


def _load_kernels(
    plans: list[Plan], settings: Settings, fleet: Fleet | None = None
) -> ModuleType:  # fmt: skip
    """Compile the CPU's kernels, or load them from the cache, before any thread needs them.

    Imported here and not above: numba takes 0.2 s, in which other threads already copy.
    """
    text = "compiling the CPU kernels for this machine, once; later runs load them from the cache"
    say = settings.notify or (lambda line: None)
    timer = threading.Timer(SLOW_START, lambda: say(text))
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
