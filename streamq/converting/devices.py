"""What a conversion runs on: threads, and devices beside the CPU if it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamq.checkpoint import Traffic
from streamq.errors import PlanError
from streamq.pipeline.names import device_names
from streamq.planning import Plan, Weights

if TYPE_CHECKING:  # what only devices need is imported for them: 3 ms
    from streamq.pipeline.layer import Device

    from .fleet import Fleet

#: Host memory of torch and Triton: measured with a build of torch 2.13 for the CPU (345 MiB with
#: numba, which takes 89 alone); the context of a GPU comes on top of it.
TORCH_MEMORY = 256 << 20
#: Of huggingface_hub (10 MiB), of what is under way on the connections to the Hub, and of buffers
#: that wait to be freed: 437 to 465 MiB were measured where the plan says 473 (four threads).
HUB_MEMORY = 64 << 20

#: What ``--device auto`` compares. Bytes of bf16 a second that one core quantizes: about the
#: slowest in docs/performance.md, and in docs/quality.md for searched scales.
CORE_RATE = {"absmax": 5.0e9, "search": 0.6e9}
#: Seconds until the first kernel of a GPU runs: 1.1 to import torch are measured, the rest, its
#: context and loading kernels, is assumed.
GPU_START = 3.0


@dataclass(frozen=True, slots=True)
class Means:
    """What a conversion runs on.

    ``workers``: threads. ``held``: bytes of each beside the buffers that the plan knows of.
    ``fleet``: None for the CPU. ``remarks``: why ``auto`` chose what it did. ``traffic``: what a
    source that is not on this machine has to send; None for others. ``uploads``: bytes that those
    of outputs take.
    """

    workers: int
    held: int
    fleet: Fleet | None = None
    remarks: tuple[str, ...] = ()
    traffic: Traffic | None = None
    uploads: int = 0

    @property
    def devices(self) -> list[str]:
        """Their names."""
        return [device.name for device in self.fleet.devices] if self.fleet else ["cpu"]

    def peak_memory(self, plan: Plan) -> int:
        """Estimate of the peak resident size of the process, in bytes."""
        more = (TORCH_MEMORY if self.fleet else 0) + (HUB_MEMORY if self.traffic else 0)
        return plan.peak_memory(self.workers, self.held) + more + self.uploads

    def backend(self, cpu: str) -> str:
        """Whose kernels ran, for people; ``cpu``: the name of the CPU's."""
        return self.fleet.backend(cpu) if self.fleet else cpu


def means(
    plans: Sequence[Plan], device: str, wanted: int, max_memory: int, device_memory: int | None,
    held: int, stats: bool,
) -> Means:  # fmt: skip
    """Choose devices and share out memory.

    ``wanted``: threads. ``max_memory``: bytes of host memory for all of them, ``device_memory``
    of each device. ``held``: see ``Plan.workers_within``. ``stats``: what was read is needed
    once more. Raises PlanError for a device that cannot be used, and for memory that does not
    hold one slab.
    """
    names = device_names(device)
    devices: list[Device] = []
    remarks: tuple[str, ...] = ()
    if names == ("auto",):
        devices, why = _chosen(plans, wanted)
        remarks = (why,)
    elif names != ("cpu",):
        from streamq.pipeline import find

        devices = find.open_devices(names)
    if devices:
        from .fleet import Fleet, share_out

        fleet = Fleet(plans, devices)
        buffers = max(plan.slab_memory for plan in plans) + held
        most = max(wanted, len(devices))
        try:
            workers = share_out(fleet, most, max_memory, device_memory, buffers, stats)
            return Means(workers, held + fleet.room(fleet.size).on_host, fleet, remarks)
        except PlanError as e:
            if not remarks:
                raise
            remarks = (f"device auto: the CPU, because of {str(e).removesuffix('.')}",)
    workers = min(plan.workers_within(wanted, max_memory, held) for plan in plans)
    return Means(workers, held, None, remarks)


def _chosen(plans: Sequence[Plan], workers: int) -> tuple[list[Device], str]:
    """The first GPU if it would be faster, and why or why not."""
    seconds = sum(
        int(w.column(lambda x: x.bytes_in).sum()) / CORE_RATE[w.scheme.scales] / workers
        for plan in plans if not plan.verbatim
        for s in plan.shards for w in s.weights if is_quantized(w)
    )  # fmt: skip
    why = f"its kernels need about {seconds:.1f} s for this, a GPU {GPU_START:.0f} s to start"
    if seconds <= GPU_START:
        return [], f"device auto: the CPU, because {why}"
    from streamq.pipeline import find

    if not find.has_gpu():
        return [], "device auto: the CPU, because this machine shows no GPU"
    try:
        devices = find.open_devices(["cuda:0"])
    except PlanError as e:
        return [], f"device auto: the CPU, because of {str(e).removesuffix('.')}"
    return devices, f"device auto: {devices[0].name}, because on the CPU {why}"


def is_quantized(weights: Weights) -> bool:
    """Whether codes are made, so that there is something for kernels to do."""
    return weights.target.origin != "codes" and not weights.scheme.is_float
