"""A Ray cluster: connecting to it, what it has, and whether its nodes see what they must."""

from __future__ import annotations

import logging
import os
import pickle
import socket
import uuid
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from streamq.checkpoint import Checkpoint
from streamq.converting import Means, Output, Settings, identity_of, traffic_of
from streamq.errors import PlanError
from streamq.hub import is_hub
from streamq.planning import Plan
from streamq.trust import VERSION
from streamq.writer import Destination

from .node import Order
from .tasks import Tasks

#: Seconds that the head of a cluster has to answer.
PATIENCE = 10.0
#: Where Ray notes the address of the cluster that was started last on this machine.
LAST = Path("/tmp/ray/ray_current_cluster")
#: In the folder of attempts: what nodes must be able to read.
TOKEN = "token"


class Ray:
    """The engine that is a Ray cluster, for one source."""

    def __init__(self, address: str, src: str | os.PathLike[str]) -> None:
        """``address``: as ``ray.init`` takes it; "" for what is running here, else a new one.

        Raises PlanError where Ray is not installed.
        """
        self._address = address
        self._source = str(src) if is_hub(src) else os.path.abspath(src)
        try:
            import ray
        except ImportError:
            raise PlanError(
                "--engine ray needs Ray, here and on every node: pip install 'streamq[ray]'."
            ) from None
        self.ray: ModuleType = ray
        self._own = not ray.is_initialized()

    def __enter__(self) -> Ray:
        """Connect, but for where this process is connected already. Raises PlanError."""
        if self._own:
            _connect(self.ray, self._address)
            _hush(self.ray, True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        if self._own:
            self.ray.shutdown()
            _hush(self.ray, False)

    def give_up(self, tasks: Iterable[Any]) -> None:
        """Nobody wants what these make.

        They end with a connection of ours, which is closed next. Asked to cancel a task that
        is just done, Ray 2.60 ends this process.
        """
        for task in () if self._own else tasks:
            with suppress(Exception):
                self.ray.cancel(task)

    def means(self, outputs: list[Output], settings: Settings) -> Means:
        """Threads and memory of each task.

        By default as few threads as leave no CPU idle: a file is written fastest by one.
        Raises PlanError where no node has as many.
        """
        if settings.device not in ("cpu", "auto"):
            raise PlanError(f"--device {settings.device} is for --engine local; Ray runs on CPUs.")
        cpus = list(map(_cpus, self.nodes(1)))
        if not cpus:
            raise PlanError("no node of the Ray cluster has a CPU.")
        tasks = sum(len(o.plan.shards) for o in outputs if not o.plan.verbatim)
        wanted = settings.workers or min(max(sum(cpus) // max(tasks, 1), 1), max(cpus))
        if wanted > max(cpus):
            raise PlanError(
                f"--workers {wanted}: the largest node of the Ray cluster has {max(cpus)} CPUs, "
                "and these are the threads of one task; ask for less."
            )
        traffic = traffic_of([o.plan for o in outputs])
        held = 0 if traffic is None else traffic.held
        workers = min(o.plan.workers_within(wanted, settings.max_memory, held) for o in outputs)
        said = f"Ray: {tasks} tasks of {workers} workers; {len(cpus)} nodes, {sum(cpus)} CPUs"
        return Means(workers, held, None, (said,), traffic)

    def start(
        self, source: Checkpoint, work: list[tuple[Plan, Destination]], means: Means, s: Settings
    ) -> Tasks:
        """The tasks; they begin with ``run``."""
        prints = source.fingerprint()
        token = uuid.uuid4().hex
        order = Order(
            token,
            self._address_of(source),
            tuple(identity_of(plan, prints) for plan, _ in work),
            tuple(Path(os.path.abspath(target.attempts), token) for _, target in work),
            tuple(target.wants_sha256 for _, target in work),
            replace(s, workers=means.workers, progress=None, notify=None),
        )
        return Tasks(self, order, work, s)

    def _address_of(self, source: Checkpoint) -> str:
        """What nodes open; of a repository the commit that was planned for."""
        if source.remote is None:
            return self._source
        alone = self._source.endswith(".safetensors")
        return f"{source.place}/{source.files[0]}" if alone else source.place

    def nodes(self, cpus: int) -> list[dict[str, Any]]:
        """Nodes that have as many CPUs."""
        return [node for node in self.ray.nodes() if node["Alive"] and _cpus(node) >= cpus]

    def refuse_unlike(self, order: Order, workers: int) -> None:
        """Raise PlanError, naming the node, where one cannot do tasks of an order.

        Each is asked at once: a node that sees other files must not be found after hours.
        """
        token = order.folders[0] / TOKEN
        token.write_text(order.token)
        pinned = self.ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        asked = [
            (node, self.ray.remote(num_cpus=0, max_retries=0)(_question())
             .options(scheduling_strategy=pinned(node["NodeID"], soft=False))
             .remote(VERSION, str(token), order.token, pickle.dumps(order)))
            for node in self.nodes(workers)
        ]  # fmt: skip
        for node, answer in asked:
            try:
                said = self.ray.get(answer)
            except self.ray.exceptions.RayTaskError as e:
                raise e.cause from e
            except self.ray.exceptions.RayError:
                continue  # a node that is lost meanwhile has no tasks
            if said is not None:
                name = f"{node['NodeManagerHostname']} ({node['NodeName']})"
                raise PlanError(f"node {name} of the Ray cluster: {said}")


def _cpus(node: dict[str, Any]) -> int:
    return int(node["Resources"].get("CPU", 0))


def _connect(ray: ModuleType, address: str) -> None:
    # or Ray says on every node that this will be so some day
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # a cluster that is made here would tell usage-stats.ray.io of itself, which nobody asked for
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    name = f"ray:{address}" if address else "ray"
    try:
        _knock(address)
        ray.init(address or None, logging_level=logging.ERROR, log_to_driver=False)
    except (OSError, RuntimeError, ValueError, ImportError, ray.exceptions.RayError) as e:
        said = str(e).strip().partition("\n")[0].removesuffix(".")
        raise PlanError(f"--engine {name}: no Ray cluster answers ({said}).") from None


def _knock(address: str) -> None:
    """Raise OSError where nothing listens: Ray 2.60 waits for minutes then, or for ever."""
    more = ""
    if address in ("", "auto"):
        address = os.environ.get("RAY_ADDRESS", "")
        if not address and LAST.is_file():
            address = LAST.read_text()
            more = f"; {LAST} names it, `ray stop` forgets it"
    host, _, port = address.strip().removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), PATIENCE).close()
        except OSError as e:
            raise OSError(f"{host}:{port}: {e.strerror or e}{more}") from None


def _hush(ray: ModuleType, quiet: bool) -> None:
    """Whether Ray may print to stdout that a node was lost, in the middle of JSON.

    ``log_to_driver`` is for what tasks print; for its own messages 2.60 has this and no option.
    """
    ray._private.worker._worker_logs_enabled = not quiet


def _question() -> Any:
    """What a node is asked, as a function that Ray sends as code.

    One that is found by its name would need this version of streamq there, which is the
    question; what it is given is for the same reason nothing but bytes and strings.
    """

    def question(version: str, path: str, token: str, order: bytes) -> str | None:
        import pickle

        try:
            from streamq.trust import VERSION
        except ImportError:
            return f"streamq is not installed there; install {version}."
        if version != VERSION:
            return f"streamq is {VERSION} there and {version} here; install the same."
        try:
            with open(path) as file:
                why = None if file.read() == token else "another file has that name"
        except OSError as e:
            why = e.strerror
        if why is not None:
            return f"{path} is not seen there ({why}); build the output where nodes share storage."
        from streamq.engines.node import refusal

        return refusal(pickle.loads(order))

    return question
