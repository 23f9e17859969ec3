"""The engine that needs no other machine: threads of this process."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from streamq.checkpoint import Checkpoint
from streamq.hub import upload_memory
from streamq.planning import Plan
from streamq.quality import Quality
from streamq.schemes import BYTES
from streamq.writer import Destination, HubPlace

from .devices import Means, is_quantized, means
from .engine import Started
from .jobs import JOB
from .places import Output
from .reads import traffic_of
from .run import Run, Shards

if TYPE_CHECKING:
    from . import Settings
    from .fleet import Fleet

#: Kernels that are in the cache on disk load in well under this; compiling takes longer.
SLOW_START = 0.7


def default_workers() -> int:
    """The processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def means_of(outputs: list[Output], settings: Settings) -> Means:
    """As many threads as memory allows, and devices; see ``Means``.

    With several outputs each thread holds what it reads, and from the Hub as well. Raises
    PlanError where memory does not hold one, and for a device that cannot be used.
    """
    plans, held = [o.plan for o in outputs], JOB if len(outputs) > 1 else 0
    wanted = settings.workers or default_workers()
    traffic = traffic_of(plans, folders_of(outputs))
    if traffic is not None:  # all that a job reads is in memory, and half of the jobs wait for it
        held, wanted = traffic.held, settings.workers or 2 * wanted
    found = means(
        plans, settings.device, wanted, settings.max_memory, settings.device_memory, held,
        settings.stats,
    )  # fmt: skip
    uploads = upload_memory() if any(isinstance(o.dst, HubPlace) for o in outputs) else 0
    return replace(found, traffic=traffic, uploads=uploads)


def folders_of(outputs: list[Output]) -> list[tuple[Path, int]]:
    """Where outputs lie on the disk, and the bytes that each takes there at most.

    None where a plan was asked for without.
    """
    return [(o.folder, o.disk_needed) for o in outputs if o.dst != Path()]


class Here:
    """Threads of this process, and its devices."""

    def means(self, outputs: list[Output], settings: Settings) -> Means:
        """See ``means_of``."""
        return means_of(outputs, settings)

    def start(
        self, source: Checkpoint, work: list[tuple[Plan, Destination]], means: Means, s: Settings
    ) -> Started:
        """The threads; they begin with ``run``."""
        progress = s.progress or (lambda n, name: None)
        run = Run(source, work, means.workers, progress, s.stats, s.details, means.fleet)
        return _Threads(run, [plan for plan, _ in work], means, s)


class _Threads:
    """What ``Here`` has started."""

    def __init__(self, run: Run, plans: list[Plan], means: Means, settings: Settings) -> None:
        self._run, self._plans, self._means, self._settings = run, plans, means, settings
        self.unmeasured, self.received = run.unmeasured, 0

    @property
    def measured(self) -> list[tuple[Quality | None, int]]:
        """See ``Started``."""
        return self._run.measured

    def run(self) -> tuple[str, tuple[str, ...]]:
        """See ``Started``."""
        means, fleet = self._means, self._means.fleet
        cpu = self._run.run(lambda: load_kernels(self._plans, self._settings, fleet)).NAME
        return means.backend(cpu), (*means.remarks, *(fleet.remarks(cpu) if fleet else ()))


def shards_to(
    source: Checkpoint, plan: Plan, target: Shards, settings: Settings
) -> tuple[Run, str]:
    """Give the shards of a plan to ``target``, and nothing else; the name of the kernels, too."""
    work = [] if plan.verbatim else [(plan, target)]
    wanted = settings.workers or default_workers()
    traffic = traffic_of([plan])
    held = 0 if traffic is None else traffic.held
    workers = plan.workers_within(wanted, max(settings.max_memory, held + plan.slab_memory), held)
    progress = settings.progress or (lambda n, name: None)
    run = Run(source, work, workers, progress, settings.stats, settings.details)
    kernels = run.run(lambda: load_kernels([plan for plan, _ in work], settings))
    return run, kernels.NAME


def load_kernels(plans: list[Plan], settings: Settings, fleet: Fleet | None = None) -> ModuleType:
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
